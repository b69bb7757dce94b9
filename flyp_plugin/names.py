"""Lists of class names, templates and descriptions: which names count as equal, and what is wrong with a list."""

import logging
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache

from flyp_plugin.errors import CONTROLS, InputError, escape_control_chars

_INVISIBLE = re.compile("[\u00ad\u200b\u2060\ufeff]")  # soft hyphen, zero-width space and joiner, BOM
PLACEHOLDER = re.compile(r"\{c?\}")  # the place of the class name in a template
_LAMBDA = re.compile(r"\blambda\s+\w+\s*:")
_QUOTED = re.compile(r"""(?<!\w)[rbfuRBFU]{0,2}(?:"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*')""")
_AROUND_QUOTED = re.compile(r"#.*|(\w+\s*[=:]\s*)?[-\s\d\[\](){},;:]*")  # comments, brackets, commas, keys
_BULLET = re.compile(r"[-*\u2022]\s+\S")
_NUMBERED = re.compile(r"(\d{1,9})\s*[,:;]\s*\S")  # "0,cat", but not a folder's "001.Black footed Albatross"
_log = logging.getLogger(__name__)


def normalize_name(name: str) -> str:
    """The form in which names are compared: names that look alike are equal.

    That is Unicode's composed form NFC (macOS decomposes folder names), without invisible characters, with each run of
    white space (which may be no-break spaces) as one space.
    """
    return " ".join(_INVISIBLE.sub("", unicodedata.normalize("NFC", name)).split())


def same_names(some: Sequence[str], others: Sequence[str]) -> bool:
    """Whether two lists hold equal names in the same order."""
    return [normalize_name(name) for name in some] == [normalize_name(name) for name in others]


def to_unique_keys(names: Sequence[str]) -> list[tuple[str, int]]:
    """(normalized name, 1 at its first occurrence, 2 at its second, ...): unique even where ImageNet repeats a name."""
    seen: Counter[str] = Counter()
    keys = []
    for name in map(normalize_name, names):
        seen[name] += 1
        keys.append((name, seen[name]))
    return keys


def index_names(names: Sequence[str]) -> dict[str, int]:
    """{normalized name: class index}, with -1 for a name that occurs twice, as in ImageNet's list."""
    indices: dict[str, int] = {}
    for index, name in enumerate(map(normalize_name, names)):
        indices[name] = -1 if name in indices else index
    return indices


def first_few(names: Sequence[str], most: int = 5, joint: str = ", ") -> str:
    """The first names of a list, for a message."""
    return joint.join([*names[:most], *(["..."] if len(names) > most else [])])


def detect_syntax(lines: Sequence[str]) -> str | None:
    """What a list is written in, for a message, if it is not plain text with one entry per line; else None.

    An entry may contain quotes, commas and brackets. A list is code if it contains a lambda, or if *every* line is
    quoted strings with nothing around them but brackets, commas, numbers and a name to assign to.
    """
    lines = [line.strip() for line in lines]
    if any(map(_LAMBDA.search, lines)):
        return "Python"
    quoted = any(map(_QUOTED.search, lines))
    if quoted and all(_AROUND_QUOTED.fullmatch(_QUOTED.sub("", line)) for line in lines):
        return "in quotes, as in Python or JSON"
    if len(lines) > 1 and all(map(_BULLET.match, lines)):
        return "a bulleted list"
    numbers = [int(found[1]) for found in map(_NUMBERED.match, lines) if found]
    if len(numbers) >= max(2, len(lines) - 1) and numbers == [numbers[0] + i for i in range(len(numbers))]:
        return "numbered"  # all lines, or all but a header
    return None


def check_syntax(lines: Sequence[str], place: str, what: str) -> None:
    """Raise InputError if a list is code or JSON: the text tower would read its quotes and commas."""
    syntax = detect_syntax(lines)
    if what == "class names" and len(lines) == 1 and re.search("[,;|]", lines[0]):
        syntax = syntax or "one line"
    if syntax:
        example = "a photo of a {c}." if what == "templates" else "golden retriever"
        raise InputError(
            f"{place} is {syntax} ({escape_control_chars(lines[0][:80])!r}, ...); write each of the {what} on a line of "
            f"its own, without quotes, brackets, bullets or numbers around it: {example}"
        )


def check_list(entries: Sequence[str], place: str, what: str) -> None:
    """Raise InputError if "class names" or "templates" are empty or have a bad entry; warn of repeated class names."""
    one = "template with {c}" if what == "templates" else "class name"
    if not any(entry.strip() for entry in entries):
        raise InputError(f"{place.rpartition(',')[0]} is empty; give at least one {one}.")
    for number, entry in enumerate(entries, 1):
        shown = f"{place} {number}, {entry[:80]!r},"
        if not entry.strip():
            raise InputError(f"{shown} is blank; write a {one} there, or delete it.")
        if CONTROLS.search(entry):
            raise InputError(f"{shown} contains a control character; delete it.")
        if what == "templates" and not PLACEHOLDER.search(entry):
            raise InputError(f"{shown} has no place for the class name; write {{c}} where it goes.")
    keys = to_unique_keys(entries) if what == "class names" else []
    for number, (name, occurrence) in enumerate(keys, 1):
        if occurrence == 2:
            first = f"{place.rpartition(' ')[2]} {keys.index((name, 1)) + 1}"
            _warn_once(f"{place} {number}, repeats {first}, {name!r}: no prompt can distinguish them.")


def find_undescribed(classnames: Sequence[str], descriptions: Mapping[str, Sequence[str]]) -> list[str]:
    """The class names for which there are no descriptions."""
    described = set(map(normalize_name, descriptions))
    return [name for name in classnames if normalize_name(name) not in described]


def check_descriptions(
    descriptions: Mapping[str, Sequence[str]], classnames: Sequence[str], place: str
) -> None:
    """Raise InputError if a class has no list of prompts, or if the list of any class is not one of proper texts."""
    for name, texts in descriptions.items():
        where = f"{place}, {name[:80]!r},"
        if isinstance(texts, str) or not isinstance(texts, Sequence):
            raise InputError(f'{where} has {repr(texts)[:40]}, not a list of prompts; write ["prompt", ...].')
        if not texts:
            raise InputError(f"{where} has an empty list; give at least one prompt.")
        for number, text in enumerate(texts, 1):
            if not isinstance(text, str) or not text.strip():
                raise InputError(
                    f"{where} prompt {number}, is {text!r}, not a text; write one, or delete it."
                )
            if CONTROLS.search(" ".join(text.split())):
                raise InputError(
                    f"{where} prompt {number}, {text[:80]!r}, contains a control character; delete it."
                )
    known = Counter(map(normalize_name, descriptions))
    if twice := [name for name, number in known.items() if number > 1]:
        raise InputError(
            f"{place} has {twice[0]!r} twice, in two spellings that look alike; join the two lists."
        )
    if missing := find_undescribed(classnames, descriptions):
        some = first_few([repr(name[:40]) for name in descriptions]) or "none"
        raise InputError(
            f"{place} has no prompts for {len(missing)} of {len(classnames)} classes, the first {missing[0][:80]!r} (it has "
            f"{some}); add them, or correct the names."
        )


@cache  # the same list is read for every set that has it
def _warn_once(message: str) -> None:
    _log.warning(message)


def check_order(names: Sequence[str], path: str, own: Sequence[str], own_path: str) -> None:
    """Raise InputError if `names` puts a class at another index than the shards' `own` list, which their labels mean."""
    lines = {key: line for line, key in enumerate(to_unique_keys(names), 1)}
    for line, key in enumerate(to_unique_keys(own), 1):
        if lines.get(key, line) != line:
            raise InputError(
                f"{key[0]!r} is line {lines[key]} of {path} and line {line} of {own_path}; the labels in the shards are "
                "line numbers of the latter, so list the classes in the same order."
            )


def describe_same_tokens(names: Sequence[str], groups: Sequence[Sequence[int]]) -> str:
    """A message on groups of class indices with equal tokens, except equal names, of which check_list warned; or ''."""
    groups = [group for group in groups if len({normalize_name(names[i]) for i in group}) > 1]
    if not groups:
        return ""
    named = [" and ".join(f"{names[i][:80]!r} (class {i})" for i in group[:5]) for group in groups]
    return (
        f"{len(groups)} group{'s' if len(groups) > 1 else ''} of classes have prompts with the same tokens, so the text "
        f"tower cannot distinguish them: {first_few(named, joint='; ')}; give them names that differ in more than case, "
        "accents' encoding or punctuation."
    )
