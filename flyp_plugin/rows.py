"""From class folders or a CSV to the rows that shards.py writes: (image path, label, group). Opens no image."""

import csv
import io
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from flyp_plugin.errors import InputError, escape_control_chars
from flyp_plugin.names import normal
from flyp_plugin.sources import IMAGE_KEY, read_text

Row = tuple[str, str, str | None]  # image path, label as the source has it, group
IMAGES = IMAGE_KEY.replace(";", ", ")
DELIMITERS = ",\t;|"
# What the values of a column that says train or test look like, alone or within a longer word such as id_val
_SPLITS = {
    "train": "train",
    "training": "train",
    "test": "test",
    "testing": "test",
    "eval": "val",
} | dict.fromkeys(["val", "valid", "validation", "dev"], "val")
MOST_SPLITS = 50  # values of a column, beyond which it is not one of splits
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
            rows += [(paths[name], normal(folder.name), None) for name in images]
            others += [paths[name] for name in names if name not in images]
    if not rows:
        raise InputError(f"the class folders in {source} hold no {IMAGES} files; check the path.")
    if others:
        _log.info(
            f"Left out {len(others)} that are not {IMAGES} files, or are links to folders, such as {min(others)}."
        )
    _tell_spelled(folder.name for folder in folders)
    return sorted(rows), [normal(folder.name) for folder in folders]


def _check_names(folders: list[Path]) -> None:
    names: dict[str, Path] = {}
    for folder in folders:
        try:
            folder.name.encode()
        except UnicodeEncodeError:
            raise InputError(
                f"the folder {os.fsencode(folder)!r} has a name that is not UTF-8; rename it, for it is a class name."
            ) from None
        other = names.setdefault(normal(folder.name), folder)
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
    split: str | None = None,
    group_col: str = "",
    root: str = "",
) -> tuple[list[Row], list[str]]:
    """Images that a CSV (or TSV) lists, by its column names, in its order; and the labels that occur.

    Args:
        split: the value of split_col in the lines to take, as it stands there; "" takes all lines. None, too, where
            there is no such column: with one, which lines are wanted has to be said.
        root: folder of the image paths; "" is the CSV's own.

    Raises:
        InputError: a line that is not CSV or has other fields than the header, a column or an image that is not there,
            a label over several lines, ...
    """
    text = read_text(path)
    if text is None:
        raise InputError(f"there is no folder or CSV file {path}; check the path.")
    image_col, label_col, group_col, split_col = (
        name.strip() for name in (image_col, label_col, group_col, split_col)
    )
    needed = {"--image-col": image_col, "--label-col": label_col}
    needed |= {"--group-col": group_col} if group_col else {}
    wanted = needed | ({"--split-col": split_col} if split or split_col != "split" else {})
    table = _read_table(text, path, list(wanted.values()))
    header = next(table, (0, []))[1]
    for flag, column in wanted.items():
        if header.count(column) != 1 or not column:
            wrong = f"{flag} {column} is not a column" if column else f"{flag} is not given"
            wrong = (
                f"{flag} {column} is {header.count(column)} columns" if column in header and column else wrong
            )
            raise InputError(
                f"{wrong}: the columns of {path} are {escape_control_chars(', '.join(header) or 'none')}."
            )
    rows: list[Row] = []
    values: dict[str, Counter[str]] = {name: Counter() for name in header}
    spellings: set[str] = set()
    missing = []
    for line, fields in table:
        row = dict(zip(header, fields))
        for name, value in row.items():
            if name == split_col or len(values[name]) <= MOST_SPLITS:
                values[name][value] += 1
        if split and row[split_col] != split:
            continue
        for column in needed.values():
            if not row[column].strip():
                raise InputError(f"{path}, line {line}, has no {column}; fill it in, or delete the line.")
        label = row[label_col]
        if len(label.strip().splitlines()) > 1:
            raise InputError(
                f"{path}, line {line}: the {label_col} begins with {label.splitlines()[0][:40]!r} and goes on over several "
                "lines, as after a quote mark that is not closed; close it, or take it out."
            )
        image = os.path.join(root or os.path.dirname(path), row[image_col])
        if not os.path.isfile(image):
            missing.append(f"{escape_control_chars(image)} (line {line})")
        elif not image_ending(image):
            raise InputError(f"{image} ({path}, line {line}) is not a {IMAGES} file; convert it first.")
        spellings.add(label)
        rows.append((image, normal(label), row[group_col].strip() if group_col else None))
    if split:
        _tell_alike(split, values[split_col], path)
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
        found = values[split_col] if split else None
        there = f" with {split_col} {split!r} (it has {_listed(found)})" if found else ""
        raise InputError(f"{path} has no lines{there}; there is nothing to write.")
    if split is None:
        _tell_forgotten(values, set(needed.values()), split_col, path)
    _tell_spelled(spellings)
    return rows, sorted({label for _, label, _ in rows})


def _read_table(text: str, path: str, wanted: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
    """(line, fields) of a CSV's records, the header, without blanks around its names, first; blank lines are left out.

    Raises:
        InputError: what is not CSV, or may have been meant otherwise than it would be read, with its line.
    """
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise InputError(
            f"{path}, line {line}, has a NUL in it, so it is not text; save the file as UTF-8 CSV."
        )
    headers = {delimiter: _header(text, delimiter) for delimiter in DELIMITERS}
    # that which has the columns; the number of columns decides where several or none have
    delimiter = max(headers, key=lambda one: (set(wanted) <= set(headers[one]), len(headers[one])))
    records = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    width, start = 0, 1
    try:
        for fields in records:
            line, start = start, records.line_num + 1
            if not any(field.strip() for field in fields) and (len(fields) < 2 or not width):
                continue
            if not width:
                width, fields = len(fields), [field.strip() for field in fields]
            _check_fields(fields, width, delimiter, f"{path}, line {line}")
            yield line, fields
    except csv.Error as error:
        place = f"{path}, line {start}"
        if records.line_num > start:
            place += f" (and the lines up to {records.line_num}, which an open quote mark joins to it)"
        raise InputError(
            f"{place}, cannot be read as CSV ({error}); put the whole field in quote marks and double those within it "
            '("6"" plate"), or take them out.'
        ) from None


def _header(text: str, delimiter: str) -> list[str]:
    try:
        records = csv.reader(io.StringIO(text.lstrip()[:100_000], newline=""), delimiter=delimiter)
        return [field.strip() for field in next(records, [])]
    except csv.Error:
        return []


def _check_fields(fields: Sequence[str], width: int, delimiter: str, place: str) -> None:
    name = {"\t": "a tab", ",": "a comma", ";": "a semicolon"}.get(delimiter, f"{delimiter!r}")
    for field in fields:
        if re.match(r"\s+[\"]", field):
            raise InputError(
                f"{place}, has a blank before the quote mark of {field.strip()[:40]!r}, which is then a part of the text; "
                f"take out the blanks after {name}."
            )
    if len(fields) != width:
        raise InputError(
            f"{place}, has {len(fields)} fields and the header {width}: {escape_control_chars(delimiter.join(fields)[:80])!r}; put a "
            f'text with {name} in it in quote marks ("crane, bird"), and write all fields.'
        )


def _split_word(value: str) -> str | None:
    """train, val or test, where a value is, or has as one of its words, what these are called."""
    words = re.split(r"[^a-z]+", value.casefold())
    return next((_SPLITS[word] for word in words if word in _SPLITS), None)


def _tell_forgotten(values: Mapping[str, Counter[str]], used: set[str], split_col: str, path: str) -> None:
    """Where no split is asked for: an error if there is a column of that name with several, a warning if one looks so."""
    for name, found in values.items():
        if name in used or len(found) < 2:
            continue
        if name.casefold() == split_col.casefold():
            example = next((value for value in found if _split_word(value) == "train"), next(iter(found)))
            raise InputError(
                f"{path} has a column {name} with {_listed(found)}, and no --split says which lines to take; give --split "
                f"{example!r}, or --split '' for all lines."
            )
        if len(found) <= MOST_SPLITS and len({_split_word(value) for value in found} - {None}) > 1:
            _log.warning(
                f"{path} has a column {name} with {_listed(found)}: all lines are taken; --split VALUE --split-col {name} "
                "takes those of one value."
            )


def _tell_alike(split: str, found: Counter[str], path: str) -> None:
    alike = Counter(
        {value: count for value, count in found.items() if value != split and _alike(value, split)}
    )
    if alike:
        _log.warning(
            f"{path}: {sum(alike.values())} lines with {_listed(alike)} are left out, for they are not --split {split!r} to "
            "the letter; write them alike if they are meant."
        )


def _alike(value: str, split: str) -> bool:
    one, other = (normal(text).casefold() for text in (value, split))
    try:
        return one == other or float(one) == float(other)
    except ValueError:
        return one in _SPLITS and _SPLITS[one] == _SPLITS.get(other)


def _listed(found: Counter[str]) -> str:
    """Values and how many lines have each, for a message."""
    shown = ", ".join(f"{value!r} ({count})" for value, count in found.most_common(10))
    return shown + (f" and {len(found) - 10} more values" if len(found) > 10 else "")


def image_ending(name: str) -> str | None:
    """The ending of an image's file name, in lower case; None for another file."""
    ending = os.path.splitext(name)[1][1:].lower()
    return ending if ending in IMAGE_KEY.split(";") else None


def _tell_spelled(spellings: Iterable[str]) -> None:
    """Say that class names are taken otherwise than they are spelled in the source, where they are."""
    other = sorted(name for name in set(spellings) if name.strip() != normal(name))
    if other:
        _log.info(
            "Class names are taken without what cannot be seen in them (white space other than single blanks, accents "
            f"apart from their letters): {len(other)} here, such as {escape_control_chars(normal(other[0]))!r}."
        )


def unreadable(error: OSError) -> NoReturn:
    """Tell of a file or folder that cannot be read."""
    raise InputError(
        f"{error.filename} cannot be read ({error.strerror}); check the path and its permissions."
    )
