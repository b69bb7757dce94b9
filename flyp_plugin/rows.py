"""From class folders or a CSV to the rows that shards.py writes: (image path, label, group). Opens no image."""

import csv
import io
import logging
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from flyp_plugin.errors import InputError
from flyp_plugin.sources import IMAGE_KEY, read_text

Row = tuple[str, str, str | None]  # image path, label as the source has it, group
IMAGES = IMAGE_KEY.replace(";", ", ")
_log = logging.getLogger(__name__)


def from_folder(source: str, **columns: str) -> tuple[list[Row], list[str]]:
    """Images below a folder of class folders, which name the classes, sorted; and those names.

    Files that are no images, and hidden ones, are left out; their number is logged.
    """
    for name in columns:
        raise InputError(f"--{name.replace('_', '-')} is for a CSV, but {source} is a folder; leave it out.")
    entries = sorted(Path(source).iterdir())
    folders = [entry for entry in entries if entry.is_dir() and not entry.name.startswith(".")]
    if not folders:
        raise InputError(f"{source} holds no folders; give one that holds a folder of images for each class.")
    if {folder.name.lower() for folder in folders} <= {"train", "test", "val", "valid", "validation"}:
        raise InputError(f"{source} holds splits, not classes; give one of them, such as {folders[0]}.")
    _check_names(folders)
    rows: list[Row] = []
    others = [str(entry) for entry in entries if not entry.is_dir()]
    for folder in folders:
        for top, inner, names in os.walk(folder, onerror=unreadable):
            others += [path for name in inner if os.path.islink(path := os.path.join(top, name))]
            inner[:] = [name for name in inner if not name.startswith(".")]  # .ipynb_checkpoints
            paths = {name: os.path.join(top, name) for name in names}
            images = {name for name in names if image_ending(name) and name[0] != "."}  # ._a.jpg is no image
            rows += [(paths[name], _one_line(folder.name), None) for name in images]
            others += [paths[name] for name in names if name not in images]
    if not rows:
        raise InputError(f"the class folders in {source} hold no {IMAGES} files; check the path.")
    if others:
        _log.info(
            f"Left out {len(others)} that are not {IMAGES} files, or are links to folders, such as {min(others)}."
        )
    return sorted(rows), [_one_line(folder.name) for folder in folders]


def _check_names(folders: list[Path]) -> None:
    names: dict[str, Path] = {}
    for folder in folders:
        try:
            folder.name.encode()
        except UnicodeEncodeError:
            raise InputError(
                f"the folder {os.fsencode(folder)!r} has a name that is not UTF-8; rename it, for it is a class name."
            ) from None
        other = names.setdefault(_one_line(folder.name), folder)
        if other is not folder:
            raise InputError(
                f"{other.name!r} and {folder.name!r} in {folder.parent} are one class name; rename one."
            )


def from_table(
    path: str,
    *,
    image_col: str = "",
    label_col: str = "",
    split_col: str = "split",
    split: str = "",
    group_col: str = "",
    root: str = "",
) -> tuple[list[Row], list[str]]:
    """Images that a CSV (or TSV) lists, by its column names, in its order; and the labels that occur.

    Args:
        split: the value of split_col in the lines to take; "" takes all lines.
        root: folder of the image paths; "" is the CSV's own.
    """
    text = read_text(path)
    if text is None:
        raise InputError(f"there is no folder or CSV file {path}; check the path.")
    delimiter = max(",\t;", key=text.partition("\n")[0].count)
    table = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, restval="")
    wanted = {"--image-col": image_col, "--label-col": label_col}
    wanted |= {"--group-col": group_col} if group_col else {}
    wanted |= {"--split-col": split_col} if split else {}
    for flag, column in wanted.items():
        if column not in (table.fieldnames or ()):
            wrong = f"{flag} {column} is not a column" if column else f"{flag} is not given"
            raise InputError(f"{wrong}: the columns of {path} are {', '.join(table.fieldnames or ['none'])}.")
    rows: list[Row] = []
    splits: Counter[str] = Counter()
    missing = []
    for line, row in _lines(table, path):
        splits[row.get(split_col, "")] += 1
        if split and row[split_col] != split:
            continue
        for column in wanted.values():
            if not row[column].strip():
                raise InputError(f"{path}, line {line}, has no {column}; fill it in, or delete the line.")
        image = os.path.join(root or os.path.dirname(path), row[image_col])
        if not os.path.isfile(image):
            missing.append(f"{image} (line {line})")
        elif not image_ending(image):
            raise InputError(f"{image} ({path}, line {line}) is not a {IMAGES} file; convert it first.")
        rows.append((image, _one_line(row[label_col]), row[group_col].strip() if group_col else None))
    two = sorted(
        path for path, count in Counter(path for path, _ in {row[:2] for row in rows}).items() if count > 1
    )
    if two:
        _log.warning(
            f"{len(two)} images are in more than one class, such as {two[0]}: each is written for each."
        )
    if missing:
        number = f"{len(missing)} of {len(rows)}"
        raise InputError(f"{number} images of {path} are not there, first {missing[0]}; check --root.")
    if not rows:
        there = f" with {split_col} {split!r} (it has {', '.join(splits)})" if split and splits else ""
        raise InputError(f"{path} has no lines{there}; there is nothing to write.")
    return rows, sorted({label for _, label, _ in rows})


def _lines(table: csv.DictReader, path: str) -> Iterator[tuple[int, dict[str, str]]]:
    try:
        for row in table:
            yield table.line_num, row
    except csv.Error as error:
        place = f"{path}, line {table.line_num}"
        raise InputError(f"{place}, cannot be read as CSV ({error}); mend the line.") from None


def image_ending(name: str) -> str | None:
    """The ending of an image's file name, in lower case; None for another file."""
    ending = os.path.splitext(name)[1][1:].lower()
    return ending if ending in IMAGE_KEY.split(";") else None


def _one_line(name: str) -> str:
    return " ".join(name.split())  # as classnames.txt can hold it


def unreadable(error: OSError) -> NoReturn:
    """Tell of a file or folder that cannot be read."""
    raise InputError(
        f"{error.filename} cannot be read ({error.strerror}); check the path and its permissions."
    )
