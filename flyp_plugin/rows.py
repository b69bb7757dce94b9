"""The images, labels and groups that a folder of class folders or a CSV lists, for shards.py to write.

No image is opened here. A CSV is where a data set goes wrong silently: lines of another split, a comma that is not
quoted, a label that swallows the next lines. Such a line is an error with its number, never a guess.
"""

import csv
import io
import logging
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, NoReturn

from tqdm import tqdm

from flyp_plugin.errors import InputError, escape_control_chars
from flyp_plugin.names import first_few, normalize_name
from flyp_plugin.remote import read_text
from flyp_plugin.sources import IMAGE_KEY

EXTENSIONS = IMAGE_KEY.replace(";", ", ")
MAX_SPLITS = 50  # a column with more values is not one of splits
_SPLIT_NAME = re.compile(r"(?<![a-z])(train|test|val|dev)(?:ing|id|idation)?(?![a-z])")  # also in id_val
_log = logging.getLogger(__name__)


class Row(NamedTuple):
    """An image to write."""

    image: str  # its path
    label: str  # class name or index
    shown: str  # the path as the user knows it: relative to the source folder, or as the CSV has it
    group: str | None = None
    by: str = ""  # images with the same value stay in one split


def read_folder(source: str) -> tuple[list[Row], list[str]]:
    """The images in a folder of class folders, at any depth, sorted by path; and the class names, sorted.

    Other files, hidden ones (._a.jpg, .ipynb_checkpoints), links to folders, and class folders without images (__MACOSX)
    are left out and logged. torchvision's make_dataset would read the hidden files and silently skip a folder that it may
    not read.
    """
    entries = sorted(Path(source).iterdir())
    folders = [entry for entry in entries if entry.is_dir() and not entry.name.startswith(".")]
    if not folders:
        raise InputError(f"{source} contains no folders; give one with a folder of images for each class.")
    if {folder.name.lower() for folder in folders} <= {"train", "test", "val", "valid", "validation"}:
        raise InputError(f"{source} contains splits, not classes; give one of them, such as {folders[0]}.")
    rows: list[Row] = []
    skipped = [str(entry) for entry in entries if not entry.is_dir()]
    classes: dict[str, str] = {}  # folder names
    for folder in tqdm(folders, desc="listing", unit="class", disable=None, delay=3):
        name = normalize_name(folder.name)
        if re.search("[\ud800-\udfff]", name):  # how Python decodes other bytes
            raise InputError(f"the folder name {os.fsencode(folder)!r} is not UTF-8; rename the folder.")
        if name in classes:
            raise InputError(f"{classes[name]!r} and {folder.name!r} are the same class name; rename one.")
        classes[name] = folder.name
        for top, inner, files in os.walk(folder, onerror=_raise_unreadable):
            skipped += [path for child in inner if os.path.islink(path := os.path.join(top, child))]
            inner[:] = [child for child in inner if not child.startswith(".")]
            images = {file for file in files if image_extension(file) and not file.startswith(".")}
            inside = os.path.relpath(top, source)
            rows += [Row(os.path.join(top, file), name, os.path.join(inside, file)) for file in images]
            skipped += [os.path.join(top, file) for file in files if file not in images]
    if not rows:
        raise InputError(f"the class folders in {source} contain no {EXTENSIONS} files; check the path.")
    if skipped:
        _log.info(
            f"Skipped {len(skipped)} files (hidden, links or not {EXTENSIONS}), such as {min(skipped)}."
        )
    if empty := sorted(classes.keys() - {row.label for row in rows}):
        few = escape_control_chars(first_few([classes[name] for name in empty]))
        _log.warning(f"Left out {len(empty)} folders without images: {few}.")
        classes = {name: folder for name, folder in classes.items() if name not in empty}
    return sorted(rows), list(classes)


def read_table(
    path: str,
    *,
    image_col: str = "",
    label_col: str = "",
    split_col: str = "split",
    split: str | None = None,
    group_col: str = "",
    by: str = "",
    root: str = "",
) -> tuple[list[Row], list[str]]:
    """The images that a CSV lists, in its order; and the labels that occur, sorted.

    Args:
        path: a CSV with a header line; the separator is the comma, tab, semicolon or bar that gives its columns.
        split: the lines to take: those with this value in split_col; "" takes all. None also takes all, but is refused
            where there is such a column with several values.
        root: the folder that image paths are relative to; by default the CSV's own.

    Raises:
        InputError: a column or an image does not exist, a line does not have the header's number of fields, ...
    """
    text = read_text(path)
    if text is None:
        raise InputError(f"there is no folder or CSV file {path}; check the path.")
    columns = [column.strip() for column in (image_col, label_col, group_col, by, split_col)]
    image_col, label_col, group_col, by, split_col = columns
    flags = {"--image-col": image_col, "--label-col": label_col}
    flags |= {"--group-col": group_col} if group_col else {}
    flags |= {"--by": by} if by else {}
    needed = list(flags.values())
    flags |= {"--split-col": split_col} if split or split_col != "split" else {}
    lines = _read_csv(text, path, set(flags.values()))
    header = [column.strip() for column in next(lines, (0, []))[1]]
    for flag, column in flags.items():
        if header.count(column) != 1:
            found = f"{header.count(column)} columns of {path} ({escape_control_chars(', '.join(header))})"
            flag = f"{flag} {column}".strip()
            raise InputError(f"{flag} matches {found}; name one of them.")
    rows: list[Row] = []
    missing = []
    others = [column for column in header if column == split_col or column not in needed]
    values: dict[str, Counter[str]] = {column: Counter() for column in others}
    for line, fields in tqdm(lines, desc="listing", unit="line", disable=None, delay=3):
        row, place = dict(zip(header, fields)), f"{path}, line {line}"
        for column, counter in values.items():
            if column == split_col or len(counter) <= MAX_SPLITS:
                counter[row[column]] += 1
        if split and row[split_col] != split:
            continue
        if empty := [column for column in needed if not row[column].strip()]:
            raise InputError(f"{place}, has no {empty[0]}; fill it in, or delete the line.")
        first, *more = row[label_col].strip().splitlines()
        if more:
            raise InputError(
                f"{place}: the {label_col} {first[:40]!r} continues on the next line; close its quotes."
            )
        image = os.path.join(root or os.path.dirname(path), row[image_col])
        if not os.path.isfile(image):
            missing.append(f"{escape_control_chars(image)} (line {line})")
        elif not image_extension(image):
            raise InputError(f"{place}: {image} is not a {EXTENSIONS} file; convert it first.")
        group = row[group_col].strip() if group_col else None
        rows.append(
            Row(image, normalize_name(first), row[image_col], group, normalize_name(row[by]) if by else "")
        )
    if missing:
        number = f"{len(missing)} of {len(rows)}"
        raise InputError(f"{number} images of {path} do not exist, first {missing[0]}; check --root.")
    if not rows:
        only = f" with {split_col} {split!r}, only {_list_values(values[split_col])}" if split else ""
        raise InputError(f"{path} has no lines{only}; there is nothing to write.")
    _report_splits(values, split_col, split, path)
    # pandas writes the integers of a column with a missing value so
    if all(re.fullmatch(r"-?[0-9]+\.0+", row.label) for row in rows):
        rows = [row._replace(label=row.label.partition(".")[0]) for row in rows]
        _log.info(f"The {label_col} is read as integers: {rows[0].label}.0 is {rows[0].label}.")
    once = {(os.path.normpath(row.image), row.label, row.group, row.by): row for row in reversed(rows)}
    if len(once) < len(rows):
        _log.warning(f"{len(rows) - len(once)} lines of {path} repeat others; their images are written once.")
        rows = list(reversed(once.values()))
    labels = Counter(image for image, _ in {(row.image, row.label) for row in rows})
    if several := sorted(image for image, count in labels.items() if count > 1):
        _log.warning(
            f"{len(several)} images have several classes, such as {several[0]}; each class gets a copy."
        )
    return rows, sorted({row.label for row in rows})


def _read_csv(text: str, path: str, wanted: set[str]) -> Iterator[tuple[int, list[str]]]:
    """(line number, fields) of the header and of the lines that are not blank, split by the separator of the header."""

    def columns(separator: str) -> set[str]:
        header = csv.reader(text.lstrip()[:100_000].splitlines(), delimiter=separator, skipinitialspace=True)
        return {name.strip() for name in next(header, [])}

    separator = max(",\t;|", key=lambda one: (wanted <= columns(one), len(columns(one))))
    file = io.StringIO(text, newline="")
    reader = csv.reader(file, delimiter=separator, strict=True, skipinitialspace=True)
    width, line = 0, 1
    try:
        for fields in reader:
            if any(field.strip() for field in fields):
                width = width or len(fields)
                if len(fields) != width:
                    shown = escape_control_chars(separator.join(fields)[:80])
                    raise InputError(
                        f"{path}, line {line}, has {len(fields)} fields and the header {width}: {shown!r}; quote text "
                        f'that contains {separator!r} ("crane, bird").'
                    )
                yield line, fields
            line = reader.line_num + 1
    except csv.Error as error:
        raise InputError(
            f"{path}, line {line} to line {reader.line_num}, is not valid CSV ({error}); quote the whole field and "
            'double the quotes within it ("6"" plate"), or delete them.'
        ) from None


def _report_splits(values: dict[str, Counter[str]], split_col: str, split: str | None, path: str) -> None:
    """Refuse or report what would silently mix splits: --split forgotten, or its value spelled differently."""
    if split:
        others = values[split_col] - Counter({split: values[split_col][split]})
        alike = [value for value in others if value.strip().casefold() == split.strip().casefold()]
        log = _log.warning if alike else _log.info
        if others:
            log(f"--split {split!r} leaves out {others.total()} lines of {path}: {_list_values(others)}.")
    elif split is None:
        for column, counter in values.items():
            if column.casefold() == split_col.casefold() and len(counter) > 1:
                raise InputError(
                    f"{path} has a column {column} with {_list_values(counter)}; choose the lines with --split "
                    f"{next(iter(counter))!r}, or take all with --split ''."
                )
            names = set(_SPLIT_NAME.findall(" ".join(counter).casefold()))
            if len(counter) <= MAX_SPLITS and len(names) > 1:
                _log.warning(
                    f"{path} has a column {column} with {_list_values(counter)}, and all lines are taken; to take "
                    f"those of one value, give --split VALUE --split-col {column}."
                )


def _list_values(counter: Counter[str]) -> str:
    """Values and how many lines have each, for a message."""
    return first_few([f"{value!r} ({count})" for value, count in counter.most_common()], 10)


def image_extension(path: str) -> str | None:
    """The extension of an image file, in lower case; None for another file."""
    extension = os.path.splitext(path)[1][1:].lower()
    return extension if extension in IMAGE_KEY.split(";") else None


def _raise_unreadable(error: OSError) -> NoReturn:
    raise InputError(f"{error.filename} could not be read ({error.strerror}); check its permissions.")
