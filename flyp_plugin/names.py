"""Class names as text: which names count as equal, and which lists are really code or JSON."""

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

_INVISIBLE = re.compile(
    "[\u00ad\u200b\u2060\ufeff]"
)  # soft hyphen, zero-width space and joiner, byte order mark
_LAMBDA = re.compile(r"\blambda\s+\w+\s*:")
_QUOTED = re.compile(r"""(?<!\w)[rbfuRBFU]{0,2}(?:"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*')""")
_AROUND_QUOTED = re.compile(r"#.*|(\w+\s*[=:]\s*)?[-\s\d\[\](){},;:]*")  # comments, brackets, commas, keys
_BULLET = re.compile(r"[-*\u2022]\s+\S")
_NUMBERED = re.compile(
    r"(\d{1,9})\s*[,:;]\s*\S"
)  # "0,cat", but not the folder name "001.Black footed Albatross"


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


def detect_syntax(lines: Sequence[str]) -> str | None:
    """What a list is written in, for a message, if it is not plain text with one entry per line; else None.

    An entry may contain quotes, commas and brackets. A list is code if it contains a lambda, or if *every* line is
    quoted strings with nothing around them but brackets, commas, numbers and a name to assign to.
    """
    lines = [line.strip() for line in lines]
    if any(map(_LAMBDA.search, lines)):
        return "Python"
    if any(map(_QUOTED.search, lines)) and all(
        _AROUND_QUOTED.fullmatch(_QUOTED.sub("", line)) for line in lines
    ):
        return "in quotes, as in Python or JSON"
    if len(lines) > 1 and all(map(_BULLET.match, lines)):
        return "a bulleted list"
    numbers = [int(found[1]) for found in map(_NUMBERED.match, lines) if found]
    if len(numbers) >= max(2, len(lines) - 1) and numbers == list(
        range(numbers[0], numbers[0] + len(numbers))
    ):
        return "numbered"  # all lines, or all but a header
    return None
