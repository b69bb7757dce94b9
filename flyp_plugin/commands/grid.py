"""What `flyp compare` trains: each of the methods with each value of its tuned flag and each seed, in each block.

Pure functions of the flags, which raise InputError for what they cannot read.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from flyp_plugin.errors import InputError

METHODS = ("flyp", "ce", "lp", "lp-ft", "flyp-ce")  # objectives of `flyp train`
TRIED = {"lr": "1e-6,3e-6,1e-5,3e-5", "lp-c": "1,10,100,1000"}  # the default values


@dataclass(frozen=True)
class Block:
    """One table: the shots (None: all images) and the templates or prompts (None: the data's) of its trainings."""

    prefix: str  # of the names of its runs
    shots: int | None
    templates: str | None = None
    prompts: str | None = None

    @property
    def title(self) -> str:
        shots = f"{self.shots} shots" if self.shots else ""
        texts = self.templates and f"templates {self.templates}", self.prompts and f"prompts {self.prompts}"
        return ", ".join(filter(None, (shots, *texts)))


@dataclass(frozen=True)
class Run:
    """One training."""

    block: Block
    method: str
    value: float  # of the tuned flag
    seed: int

    @property
    def name(self) -> str:
        return f"{self.block.prefix}{self.method}_{tuned(self.method)}{self.value}_seed{self.seed}"

    @property
    def title(self) -> str:
        parts = (self.block.title, self.method, f"{tuned(self.method)} {self.value:g}", f"seed {self.seed}")
        return ", ".join(filter(None, parts))


def tuned(method: str) -> str:
    """The flag that is tuned for a method."""
    return "lp-c" if method == "lp" else "lr"


def parse_methods(text: str) -> list[str]:
    methods = text.split(",")
    if not set(methods) <= set(METHODS) or len(set(methods)) < len(methods):
        raise InputError(f"--methods must be different ones of {', '.join(METHODS)}, got {text!r}.")
    return methods


def with_defaults(texts: Mapping[str, str | None]) -> dict[str, str]:
    """The values to try for each flag, A,B,...; for a flag not given, the middle ones of its defaults.

    Every flag gets as many values as the one that is given, so that no method is tuned more than another.
    """
    counts = [len(set(text.split(","))) for text in texts.values() if text is not None]
    filled = {}
    for flag, text in texts.items():
        defaults = TRIED[flag].split(",")
        count = min(*counts, len(defaults)) if counts else len(defaults)
        start = (len(defaults) - count + 1) // 2
        filled[flag] = ",".join(defaults[start : start + count]) if text is None else text
    return filled


def parse_values(methods: Sequence[str], texts: Mapping[str, str]) -> dict[str, list[float]]:
    """The values to try for each method, from A,B,... for each flag; InputError if one method has more than another."""
    values = {}
    for flag in dict.fromkeys(map(tuned, methods)):
        values[flag] = _numbers(f"--{flag}", texts[flag], float, "1e-6,1e-5")
        if not all(0 < value < math.inf for value in values[flag]):
            raise InputError(f"--{flag} must be positive numbers such as 1e-6,1e-5, got {texts[flag]!r}.")
    if len({len(some) for some in values.values()}) > 1:
        counts = " and ".join(f"--{flag} {len(some)}" for flag, some in values.items())
        raise InputError(f"methods would be tuned unequally ({counts} values); pass as many of each.")
    return {method: values[tuned(method)] for method in methods}


def parse_seeds(text: str) -> list[int]:
    """A:B (excluding B, at most 1,000 seeds) or A,B,...; InputError if it is neither."""
    start, colon, end = text.partition(":")
    if colon and start.isdecimal() and end.isdecimal() and int(start) < int(end) <= int(start) + 1000:
        return list(range(int(start), int(end)))
    return _numbers("--seeds", text, int, "0:3 or 0,1,2")


def parse_blocks(
    shots: str | None, templates: Sequence[str] | None = None, prompts: Sequence[str] | None = None
) -> list[Block]:
    """One block for each number of shots and each templates or prompts."""
    counts: Sequence[int | None] = _numbers("--shots", shots, int, "4,16") if shots else [None]
    if 0 in counts:
        raise InputError(f"--shots must be >= 1, got {shots!r}.")
    given = {"templates": dict.fromkeys(templates or ()), "prompts": dict.fromkeys(prompts or ())}
    texts = [(f"{flag}{number}_", {flag: text}) for flag in given for number, text in enumerate(given[flag])]
    blocks = []
    for count, (prefix, text) in product(counts, texts or [("", {})]):
        blocks.append(Block((f"shots{count}_" if count else "") + prefix, count, **text))
    return blocks


def _numbers(flag: str, text: str, kind: Callable, example: str) -> list:
    try:
        numbers = list(dict.fromkeys(map(kind, text.split(","))))
    except ValueError:
        numbers = [-1]
    if min(numbers) < 0:
        raise InputError(f"{flag} must be numbers >= 0 joined by commas, such as {example}, got {text!r}.")
    return numbers
