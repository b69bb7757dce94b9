"""What `flyp compare` makes of its sweeps: figures by seed, intervals, tables and curves. Runs and reads nothing."""

import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist, fmean, stdev
from typing import Any

from flyp_plugin.merge import Curve, mean_ood

Sweep = Mapping[str, Any]  # what wiseft.json holds: alphas -> sets -> metrics, and the alpha chosen
Table = dict[str, dict[str, list[float]]]  # rows -> columns -> a figure of each seed
_WISE = " + WiSE-FT"


def interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and half of its 95 % interval by Student's t over the values; None where there is only one."""
    n = len(values)
    return fmean(values), t_quantile(n - 1) * stdev(values) / math.sqrt(n) if n > 1 else None


def t_quantile(df: int) -> float:
    """The 97.5 % point of Student's t, to 4 digits: without scipy, which nothing else here needs.

    From tables up to 4 degrees of freedom; from there the expansion about the normal point (Abramowitz and Stegun,
    26.7.5), whose error is 1 in 10,000 at 5 and falls.
    """
    table = [12.7062, 4.3027, 3.1824, 2.7764]
    if df <= len(table):
        return table[df - 1]
    z = NormalDist().inv_cdf(0.975)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return sum(term / df**power for power, term in enumerate(terms))


def figures(by_set: Mapping[str, Mapping[str, Any]], id_sets: Sequence[str]) -> dict[str, float]:
    """Top-1 on each set, the ID sets first, and the mean over the others."""
    ood = {name: metrics for name, metrics in by_set.items() if name not in id_sets}
    top1 = {name: by_set[name]["top1"] for name in [*id_sets, *ood]}
    mean = mean_ood({id_sets[0]: by_set[id_sets[0]], **ood})
    return top1 if mean is None else {**top1, "mean OOD": mean}


def rows(sweeps: Mapping[str, Sequence[Sweep]], id_sets: Sequence[str]) -> Table:
    """Zero-shot (once: no seed changes it), each method, and each at the alpha chosen for each seed."""
    table: Table = {}
    for method, by_seed in sweeps.items():
        some = {
            "zero-shot": [by_seed[0]["alphas"]["0.00"]],
            method: [sweep["alphas"]["1.00"] for sweep in by_seed],
            method + _WISE: [sweep["alphas"][f"{sweep['chosen_alpha']:.2f}"] for sweep in by_seed],
        }
        for name, sets in some.items():
            of_seeds = [figures(by_set, id_sets) for by_set in sets]
            table[name] = {column: [row[column] for row in of_seeds] for column in of_seeds[0]}
    return table


def differences(table: Table, methods: Sequence[str]) -> Table:
    """Each method less the first, seed by seed, both without or both with WiSE-FT."""
    first, *others = methods
    return {
        method + wise: {
            column: [a - b for a, b in zip(values, table[first + wise][column])]
            for column, values in table[method + wise].items()
        }
        for method in others
        for wise in ("", _WISE)
    }


def summary(table: Table) -> dict[str, dict[str, dict[str, Any]]]:
    """The table with means and intervals, for JSON."""
    return {
        name: {
            column: dict(zip(("mean", "half_width_95", "by_seed"), (*interval(values), values)))
            for column, values in row.items()
        }
        for name, row in table.items()
    }


def markdown(
    table: Table, columns: Mapping[str, str], notes: Mapping[str, Sequence[str]], sign: str = ""
) -> str:
    """A table in percent.

    Args:
        table: to be shown.
        columns: what stands above each of its columns.
        notes: further cells of each row, by heading, in the order of the rows.
        sign: "+" for differences.
    """
    lines = [["", *columns.values(), *notes], ["---", *["---:"] * (len(columns) + len(notes))]]
    for number, (name, row) in enumerate(table.items()):
        lines.append(
            [name, *(percent(row[c], sign) for c in columns), *(note[number] for note in notes.values())]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def percent(values: Sequence[float], sign: str = "") -> str:
    mean, half = interval(values)
    return f"{100 * mean:{sign}.1f}" + ("" if half is None else f" ± {100 * half:.1f}")


def curve(sweeps: Sequence[Sweep], id_sets: Sequence[str]) -> Curve:
    """A method's frontier, each point the mean over seeds: the last of `id_sets` across, mean OOD up.

    The star is the mean of the points that the seeds chose. Without OOD sets alpha is across.
    """
    alphas = list(sweeps[0]["alphas"])

    def point(chosen: Sequence[str]) -> tuple[float, float]:
        of_seeds = [figures(sweep["alphas"][alpha], id_sets) for sweep, alpha in zip(sweeps, chosen)]
        x, y = (100 * fmean(f.get(c, 0.0) for f in of_seeds) for c in (id_sets[-1], "mean OOD"))
        return (x, y) if "mean OOD" in of_seeds[0] else (fmean(map(float, chosen)), x)

    points = [point([alpha] * len(sweeps)) for alpha in alphas]
    star = point([f"{sweep['chosen_alpha']:.2f}" for sweep in sweeps])
    return Curve([x for x, _ in points], [y for _, y in points], star)
