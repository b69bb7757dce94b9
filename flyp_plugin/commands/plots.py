"""What `flyp compare` makes of its sweeps: figures by seed, intervals, table and picture. Runs and reads nothing.

Everything is a function of compare.json's content, which compare.py describes.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from statistics import NormalDist, fmean, stdev
from typing import Any

from flyp_plugin.commands.wiseft import Curve, draw_curves, mean_ood

Record = Mapping[str, Any]
Table = dict[str, dict[str, dict[str, Any]]]  # rows -> columns -> what `figure` gives
_WISE = " + WiSE-FT"


def t_quantile(df: int) -> float:
    """The 97.5 % point of Student's t, to 4 digits, without scipy, which nothing else here needs.

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


def figure(values: Sequence[float]) -> dict[str, Any]:
    """The mean of a value of each seed, and half of its 95 % interval by Student's t; None where there is one seed."""
    n = len(values)
    half = t_quantile(n - 1) * stdev(values) / math.sqrt(n) if n > 1 else None
    return {"mean": fmean(values), "half_width_95": half, "by_seed": list(values)}


def top1(by_set: Mapping[str, Mapping[str, Any]], id_sets: Sequence[str]) -> dict[str, float]:
    """Top-1 on each set, the ID sets first, and the mean over the others."""
    ood = {name: metrics for name, metrics in by_set.items() if name not in id_sets}
    row = {name: by_set[name]["top1"] for name in [*id_sets, *ood]}
    mean = mean_ood({id_sets[0]: by_set[id_sets[0]], **ood})
    return row if mean is None else {**row, "mean OOD": mean}


def rows(methods: Mapping[str, Record], id_sets: Sequence[str]) -> Table:
    """Zero-shot (once, for no seed changes it), each method, and each at the alpha chosen for each seed."""
    table: Table = {}
    for method, found in methods.items():
        sweeps = list(found["seeds"].values())
        by_row = {
            "zero-shot": [found["zero_shot"]],
            method: [sweep["alphas"]["1.00"] for sweep in sweeps],
            method + _WISE: [sweep["alphas"][f"{sweep['chosen_alpha']:.2f}"] for sweep in sweeps],
        }
        for name, seeds in by_row.items():
            of_seeds = [top1(by_set, id_sets) for by_set in seeds]
            table.setdefault(name, {c: figure([row[c] for row in of_seeds]) for c in of_seeds[0]})
    return table


def differences(table: Table, methods: Sequence[str]) -> Table:
    """Each method less the first, seed by seed: both without, or both with WiSE-FT."""
    first, *others = methods
    result: Table = {}
    for name, less in ((method + wise, first + wise) for method in others for wise in ("", _WISE)):
        result[name] = {
            column: figure([a - b for a, b in zip(cell["by_seed"], table[less][column]["by_seed"])])
            for column, cell in table[name].items()
        }
    return result


def document(record: Record) -> str:
    """compare.md."""
    settings, seeds, (val, *test) = record["settings"], record["seeds"], record["id_sets"]
    listed = ", ".join(map(str, seeds))
    of = (
        f"mean over seeds {listed} ± half of its 95 % interval (Student's t). The interval is of the seeds alone: "
        "that there are only n test images adds a standard error of up to 50/√n points"
        if len(seeds) > 1
        else f"of seed {listed}"
    )
    less = (
        ""
        if test
        else ", so its own figures are a little too good (--id-test names a set that chose nothing)"
    )
    how = (
        f"Top-1 in %, {of}. Each method is taken after its last epoch ({record['epochs']}). `{val}` chose the setting "
        f"of each method (on seed {seeds[0]}) and alpha (for each seed){less}; no other set chose anything."
    )
    text = [f"# {settings['model']} ({settings['pretrained']}), fine-tuned on {settings['train_data']}", how]
    for block in record["blocks"]:
        text += [f"## {block['title']}"] if block["title"] else []
        text += [_markdown(block["rows"], record, block["methods"])]
        if block["differences"]:
            first = record["methods"][0]
            text += [f"In points, less {first}, and with WiSE-FT less {first}{_WISE}, paired by seed:"]
            text += [_markdown(block["differences"], record, block["methods"], "+")]
    pairs = product(record["blocks"], record["methods"])
    missing = [f"{method} ({block['title']})" for block, method in pairs if method not in block["methods"]]
    text += [f"Not finished: {', '.join(missing).replace(' ()', '')}."] if missing else []
    return "\n\n".join(text) + "\n"


def _markdown(table: Table, record: Record, methods: Mapping[str, Record], sign: str = "") -> str:
    """With the tuned setting and the alpha of each row."""
    if not table:
        return "No method has finished."
    notes = {"zero-shot": ["", "0"]}
    for method, found in methods.items():
        tried = sorted(map(float, found["id_top1_by_value"]))
        end = {tried[0]: " (least tried)", tried[-1]: " (most tried)"} if len(tried) > 2 else {}
        setting = f"{found['tuned']} {found['value']:g}{end.get(found['value'], '')}"
        mean = fmean(sweep["chosen_alpha"] for sweep in found["seeds"].values())
        notes |= {method: [setting, "1"], method + _WISE: [setting, f"{mean:.2f}"]}
    columns = list(next(iter(table.values())))
    lines = [["", *(_heading(name, record, methods) for name in columns), "setting", "mean alpha"]]
    lines += [["---", *["---:"] * (len(columns) + 2)]]
    lines += [[name, *(percent(row[c], sign) for c in columns), *notes[name]] for name, row in table.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _heading(name: str, record: Record, methods: Mapping[str, Record]) -> str:
    found, (val, *test) = next(iter(methods.values())), record["id_sets"]
    role = " (ID, chose)" if name == val else " (ID test)" if name in test else ""
    return f"{name}{role}" + (f", n={found['zero_shot'][name]['n']}" if name != "mean OOD" else "")


def percent(cell: Mapping[str, Any], sign: str = "") -> str:
    half = cell["half_width_95"]
    return f"{100 * cell['mean']:{sign}.1f}" + ("" if half is None else f" ± {100 * half:.1f}")


def draw(record: Record, path: Path) -> None:
    """compare.png: a frontier a method, a panel a block (FLYP, figure 2). Of the alphas only 0 and 1 are written."""
    id_sets, panels, labels, ood = record["id_sets"], {}, [""], False
    for block in record["blocks"]:
        curves = {}
        for method, found in block["methods"].items():
            sweeps = list(found["seeds"].values())
            curves[method] = curve(sweeps, id_sets)
            labels = [{"0.00": "0", "1.00": "1"}.get(alpha, "") for alpha in sweeps[0]["alphas"]]
            ood = "mean OOD" in block["rows"][method]
        panels[block["title"]] = curves
    draw_curves(panels, labels, "at the alphas chosen", id_sets[-1] if ood else None, path)


def curve(sweeps: Sequence[Record], id_sets: Sequence[str]) -> Curve:
    """A method's frontier, each point the mean over seeds: the last of `id_sets` across, mean OOD up.

    The star is the mean of the points that the seeds chose: beside the curve, where they chose different alphas. Without
    OOD sets alpha is across.
    """

    def point(chosen: Sequence[str]) -> tuple[float, float]:
        seeds = [top1(sweep["alphas"][alpha], id_sets) for sweep, alpha in zip(sweeps, chosen)]
        across = 100 * fmean(row[id_sets[-1]] for row in seeds)
        if "mean OOD" not in seeds[0]:
            return fmean(map(float, chosen)), across
        return across, 100 * fmean(row["mean OOD"] for row in seeds)

    across, up = zip(*(point([alpha] * len(sweeps)) for alpha in sweeps[0]["alphas"]))
    return Curve(across, up, point([f"{sweep['chosen_alpha']:.2f}" for sweep in sweeps]))
