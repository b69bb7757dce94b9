"""Class names as text: which of them are one name, and what is no list of names but code that holds one."""

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

_INVISIBLE = re.compile("[\u00ad\u200b\u2060\ufeff]")  # soft hyphen, blanks of no width, byte order mark
_QUOTED = re.compile(r"""(?<!\w)[rbfuRBFU]{0,2}(?:"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*')""")
_AROUND = re.compile(r"(\w+\s*[=:]\s*)?[-\s\d\[\](){},;:]*")  # of the quoted parts: brackets, commas, keys
_LAMBDA = re.compile(r"\blambda\s+\w+\s*:")
_NUMBERED = re.compile(
    r"(\d{1,9})\s*[,:;]\s*\S"
)  # not "001.Black footed Albatross", which is a folder's name
_MARKED = re.compile(r"[-*\u2022]\s+\S")


def normal(name: str) -> str:
    """`name` as names are compared: names that look alike are one.

    That is Unicode's composed form (macOS gives folder names decomposed) with each run of white space, which may be
    no-break spaces, as one blank, and without characters that cannot be seen.
    """
    return " ".join(_INVISIBLE.sub("", unicodedata.normalize("NFC", name)).split())


def same_names(some: Sequence[str], others: Sequence[str]) -> bool:
    """Whether two lists hold the same names in the same order."""
    return [normal(name) for name in some] == [normal(name) for name in others]


def numbered(names: Sequence[str]) -> list[tuple[str, int]]:
    """(name as compared, 1 for its first place in the list, 2 for its second, ...): unique where names are not."""
    seen: Counter[str] = Counter()
    keys = []
    for name in map(normal, names):
        seen[name] += 1
        keys.append((name, seen[name]))
    return keys


def repeated_names(names: Sequence[str]) -> dict[str, list[int]]:
    """The positions of each name that is in the list more than once, by the name as compared."""
    places: dict[str, list[int]] = {}
    for position, name in enumerate(names):
        places.setdefault(normal(name), []).append(position)
    return {name: positions for name, positions in places.items() if len(positions) > 1}


def what_else(lines: Sequence[str]) -> str | None:
    """What lines are where they are not a plain list, for a message: "Python or JSON", ...; None where they are one.

    A name or template may have quote marks, commas and brackets in it. It is code where a lambda stands in it, or where
    *every* line is quoted strings with nothing around them but brackets, commas, numbers and a name to assign to.
    """
    lines = [line.strip() for line in lines]
    if any(_LAMBDA.search(line) for line in lines):
        return "Python"
    quoted = [bool(_QUOTED.search(line) and _AROUND.fullmatch(_QUOTED.sub("", line))) for line in lines]
    others = [line for line, is_quoted in zip(lines, quoted) if not is_quoted]
    if any(quoted) and all(line.startswith("#") or _AROUND.fullmatch(line) for line in others):
        return "in quote marks, as in Python or JSON"
    if len(lines) > 1 and all(_MARKED.match(line) for line in lines):
        return "a list with marks"
    for rows in (lines, lines[1:]):  # without a header
        numbers = [int(found[1]) for found in map(_NUMBERED.match, rows) if found]
        if len(numbers) == len(rows) > 1 and numbers == list(range(numbers[0], numbers[0] + len(rows))):
            return "numbered"
    return None
