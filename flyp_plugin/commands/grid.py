"""What `flyp compare` trains: each of the methods with each of its settings and each seed, in each block.

Pure functions of the flags, which raise InputError for what they cannot read. A new method is an entry of METHODS.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from flyp_plugin.errors import InputError

# the tuned flags of a training with their values; the first is its method's own
Setting = tuple[tuple[str, float], ...]
_PRETRAINED = {"anchor": 3.5, "anchor_teacher": "pretrained"}  # TRACER's weight (arXiv 2605.29380)
_TRAJECTORY = {"anchor": 3.5, "anchor_teacher": "trajectory"}
METHODS: dict[str, dict[str, Any]] = {  # the flags of `flyp train` that make each
    "flyp": {},
    "ce": {"objective": "ce"},
    "lp": {"objective": "lp"},
    "lp-ft": {"objective": "lp-ft"},
    "flyp-ce": {"objective": "flyp-ce"},
    "flyp-anchor": _PRETRAINED,
    "flyp-trajectory": _TRAJECTORY,
    "ce-anchor": {"objective": "ce", **_PRETRAINED},
    "ce-trajectory": {"objective": "ce", **_TRAJECTORY},
}
TRIED = {"lr": "1e-6,3e-6,1e-5,3e-5", "lp-c": "1,10,100,1000"}  # the default values
# settings of --tune: whether a method of these flags has it
TUNABLE: dict[str, Callable[[dict[str, Any]], bool]] = {
    "anchor": lambda flags: "anchor" in flags,
    "logit-scale": lambda flags: flags.get("objective") not in ("lp", "lp-ft"),  # their head is fitted
}


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
    """One training, or a merge of those with all seeds."""

    block: Block
    method: str
    setting: Setting
    seed: int | None  # None: all seeds, merged by Model Stock

    @property
    def name(self) -> str:
        values = "".join(f"{flag}{value}_" for flag, value in self.setting)
        seed = "model_stock" if self.seed is None else f"seed{self.seed}"
        return f"{self.block.prefix}{self.method}_{values}{seed}"

    @property
    def title(self) -> str:
        values = (f"{flag} {value:g}" for flag, value in self.setting)
        seed = "all seeds" if self.seed is None else f"seed {self.seed}"
        return ", ".join(filter(None, (self.block.title, self.method, *values, seed)))


def tuned(method: str) -> str:
    """The flag that is tuned for a method."""
    return "lp-c" if method == "lp" else "lr"


def has_teacher(method: str) -> bool:
    """Whether training by a method yields a second model."""
    return METHODS[method].get("anchor_teacher") == "trajectory"


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
    flags = dict.fromkeys(map(tuned, methods))
    values = {flag: _numbers(f"--{flag}", texts[flag], float, "1e-6,1e-5") for flag in flags}
    _refuse_unequal({f"--{flag}": some for flag, some in values.items()})
    return {method: values[tuned(method)] for method in methods}


def parse_tune(methods: Sequence[str], texts: Sequence[str]) -> dict[str, list[float]]:
    """The values to try of each SETTING=A,B,... in --tune; InputError if it could not be fair or has no use."""
    tune: dict[str, list[float]] = {}
    for text in texts:
        flag, _, values = text.partition("=")
        if flag not in TUNABLE or flag in tune:
            raise InputError(
                f"--tune must be different ones of {', '.join(TUNABLE)}, as in anchor=1,10; got {text!r}."
            )
        tune[flag] = _numbers(f"--tune {flag}", values, float, "1,10")
        defaults = [METHODS[method].get(flag) for method in methods]
        if again := [value for value in tune[flag] if value in defaults]:
            raise InputError(f"--tune {text}: {again[0]:g} is tried in any case; pass other values.")
    _refuse_unequal({f"--tune {flag}": values for flag, values in tune.items()})
    for flag in tune:
        if flag not in (second(method, tune) for method in methods):
            raise InputError(
                f"--tune {flag} would tune none of --methods {','.join(methods)}; leave it out, or put it first."
            )
    return tune


def _refuse_unequal(values: Mapping[str, Sequence[float]]) -> None:
    if len(set(map(len, values.values()))) > 1:
        counts = " and ".join(f"{flag} {len(some)}" for flag, some in values.items())
        raise InputError(f"methods would be tuned unequally ({counts} values); pass as many of each.")


def second(method: str, tune: Iterable[str]) -> str | None:
    """The setting of --tune that a method tries after its own: the first one that it has, or None."""
    return next((flag for flag in tune if TUNABLE[flag](METHODS[method])), None)


def further(
    chosen: Setting, own: Sequence[float], method: str, tune: Mapping[str, Sequence[float]]
) -> list[Setting]:
    """The settings that a method tries after those with its `own` values, of which `chosen` was best; equally many for all.

    They add the values of --tune to `chosen`; a method without such a setting gets more values of its own (`refine`).
    """
    if flag := second(method, tune):
        return [(*chosen, (flag, value)) for value in tune[flag]]
    ((flag, value),) = chosen
    count = len(next(iter(tune.values()), ()))
    return [((flag, new),) for new in refine(own, value, count)]


def refine(values: Sequence[float], chosen: float, count: int) -> list[float]:
    """`count` new values around the chosen one, at equal ratios between it and its neighbours on both sides.

    Beyond an end of `values` the neighbour is as far as the one before it (10 times, for a single value). Of an odd
    number the additional one is above, or below the least value. Rounded to 3 digits, where that keeps them apart.
    """
    tried = sorted(values)
    i, last = tried.index(chosen), len(tried) - 1
    up = tried[i + 1] / chosen if i < last else chosen / tried[i - 1] if last else 10.0
    down = chosen / tried[i - 1] if i else up
    below = (count + (last > 0 and i == 0)) // 2
    above = count - below
    exact = [chosen / down ** (n / (below + 1)) for n in range(below, 0, -1)]
    exact += [chosen * up ** (n / (above + 1)) for n in range(1, above + 1)]
    rounded = [float(f"{value:.3g}") for value in exact]
    return rounded if len({*rounded, *tried}) == count + len(tried) else exact


def choose(figures: Mapping[Setting, float], metric: str) -> Setting:
    """The best of the settings tried; of equal ones the smallest value, or what a method has by default."""
    from flyp_plugin.metrics import best

    ordered = sorted(figures)  # a setting before those that add to it
    return ordered[best({number: figures[setting] for number, setting in enumerate(ordered)}, metric)]


def parse_seeds(text: str) -> list[int]:
    """A:B (excluding B, at most 1,000 seeds) or A,B,...; InputError if it is neither."""
    start, colon, end = text.partition(":")
    if colon and start.isdecimal() and end.isdecimal() and int(start) < int(end) <= int(start) + 1000:
        return list(range(int(start), int(end)))
    return _numbers("--seeds", text, int, "0:3 or 0,1,2", zero=True)


def parse_blocks(
    shots: str | None, templates: Sequence[str] | None = None, prompts: Sequence[str] | None = None
) -> list[Block]:
    """One block for each number of shots and each templates or prompts."""
    counts: Sequence[int | None] = _numbers("--shots", shots, int, "4,16") if shots else [None]
    given = {"templates": dict.fromkeys(templates or ()), "prompts": dict.fromkeys(prompts or ())}
    texts = [(f"{flag}{number}_", {flag: text}) for flag in given for number, text in enumerate(given[flag])]
    return [
        Block((f"shots{count}_" if count else "") + prefix, count, **text)
        for count, (prefix, text) in product(counts, texts or [("", {})])
    ]


def _numbers(flag: str, text: str, kind: Callable, example: str, zero: bool = False) -> list:
    """Positive numbers A,B,... without duplicates, with `zero` also 0; InputError if they are not."""
    try:
        numbers = list(dict.fromkeys(map(kind, text.split(","))))
        valid = all(0 < number < math.inf or (zero and number == 0) for number in numbers)
    except ValueError:
        valid = False
    if not valid:
        what = "numbers >= 0" if zero else "positive numbers"
        raise InputError(f"{flag} must be {what} joined by commas, such as {example}, got {text!r}.")
    return numbers
