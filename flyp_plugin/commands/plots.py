"""Tables and pictures of `flyp wiseft` and `flyp compare`: figures by seed, intervals, Markdown, frontiers.

Pure functions: the `Record` that those of `flyp compare` take is the content of compare.json, as compare.py writes it.
"""

from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from flyp_plugin.commands.grid import has_teacher

Record = Mapping[str, Any]
Table = dict[str, dict[str, dict[str, Any]]]  # rows -> columns -> what `figure` returns
# in the names of rows and columns
_WISE, _STOCK, _TEACHER, OOD = " + WiSE-FT", " + Model Stock", ", teacher", "mean OOD"


class Curve(NamedTuple):
    """A frontier: its points in the order of the alphas, and those that get a star and a diamond; accuracies in percent."""

    across: Sequence[float]
    up: Sequence[float]
    star: tuple[float, float]
    diamond: tuple[float, float] | None = None  # Model Stock, which has no alpha


def draw_frontier(
    results: Mapping[float, Mapping[str, Mapping[str, Any]]], chosen: float, path: Path, per_set: bool = False
) -> None:
    """ID accuracy across, OOD accuracy up, one point per alpha (WiSE-FT, figure 1); with one set, alpha across.

    Args:
        results: metrics of each alpha on each set, the ID set first.
        chosen: the alpha that gets the star.
        path: where the PNG goes.
        per_set: one curve for each OOD set instead of their mean.
    """
    by_alpha = {f"{alpha:.2f}": results[alpha] for alpha in sorted(results)}
    first, *others = results[chosen]
    sweep = {"alphas": by_alpha, "chosen_alpha": chosen}
    ups = others if others and per_set else [OOD]
    curves = {name if others else first: curve([sweep], [first], name) for name in ups}
    labels = [f"{float(alpha):g}" for alpha in by_alpha]
    _draw_curves({"": curves}, labels, f"chosen: alpha = {chosen:g}", first if others else None, path)


def _draw_curves(
    panels: Mapping[str, Mapping[str, Curve]],  # by title, the curves of each panel by name
    labels: Sequence[str],  # at the points, in the order of the alphas
    star: str,  # its legend
    id_name: str | None,  # the set whose accuracy goes across; None: alpha does
    path: Path,
) -> None:
    """Frontiers side by side, as a PNG."""
    from matplotlib.figure import Figure

    picture = Figure(figsize=(6 * len(panels), 4.5), layout="constrained")
    for (title, curves), axes in zip(panels.items(), picture.subplots(1, len(panels), squeeze=False)[0]):
        for name, curve in curves.items():
            style = "o--" if name.endswith(_TEACHER) else "o-"
            (line,) = axes.plot(curve.across, curve.up, style, markersize=4, label=name)
            marked = {"color": line.get_color(), "markeredgecolor": "black"}
            axes.plot(*curve.star, "*", markersize=16, **marked)
            if curve.diamond:
                axes.plot(*curve.diamond, "D", markersize=8, label=name + _STOCK, **marked)
            for x, y, label in zip(curve.across, curve.up, labels):
                axes.annotate(label, (x, y), textcoords="offset points", xytext=(4, 4), fontsize=7)
        axes.plot([], [], "*", markersize=12, color="white", markeredgecolor="black", label=star)
        axes.set_title(title)
        axes.set_xlabel(f"{id_name} (ID) top-1, %" if id_name else "alpha (0: pretrained, 1: fine-tuned)")
        axes.set_ylabel("OOD top-1, %" if id_name else "top-1, %")
        axes.grid(alpha=0.3)
        many = len(axes.get_legend_handles_labels()[0]) > 8  # a legend that would cover the curves
        axes.legend(fontsize=8, **({"loc": "upper left", "bbox_to_anchor": (1, 1)} if many else {}))
    picture.savefig(path, format="png", dpi=150)


def figure(values: Sequence[float]) -> dict[str, Any]:
    """The mean over seeds, and half of its 95 % confidence interval (Student's t); None for a single seed."""
    from scipy import stats

    n = len(values)
    half = float(stats.t.ppf(0.975, n - 1) * stats.sem(values)) if n > 1 else None
    return {"mean": fmean(values), "half_width_95": half, "by_seed": list(values)}


def columns(
    by_set: Mapping[str, Mapping[str, Any]], id_sets: Sequence[str], metric: str = "top1"
) -> dict[str, float]:
    """A metric on each set, the ID sets first, then its mean over the OOD sets."""
    ood = [name for name in by_set if name not in id_sets]
    row = {name: by_set[name][metric] for name in [*id_sets, *ood]}
    return {**row, OOD: fmean(row[name] for name in ood)} if ood else row


def rows(methods: Mapping[str, Record], id_sets: Sequence[str], metric: str = "top1") -> Table:
    """The rows of the table: zero-shot, and each method with and without WiSE-FT at the alpha chosen for each seed.

    A method whose training yields a teacher has these two rows for the teacher as well, and one for Model Stock.
    """
    table: Table = {}
    for method, found in methods.items():
        by_row = {"zero-shot": [found["zero_shot"]]}
        for name, sweeps in _models(method, found).items():
            by_row[name] = [sweep["alphas"]["1.00"] for sweep in sweeps]
            by_row[name + _WISE] = [sweep["alphas"][f"{sweep['chosen_alpha']:.2f}"] for sweep in sweeps]
        if stock := found.get("model_stock", {}).get("sets"):
            by_row[method + _STOCK] = [stock]
        for name, seeds in by_row.items():
            of_seeds = [columns(by_set, id_sets, metric) for by_set in seeds]
            table.setdefault(name, {c: figure([row[c] for row in of_seeds]) for c in of_seeds[0]})
    return table


def _models(method: str, found: Record) -> dict[str, list[Record]]:
    """The sweeps of a method by the name of what was merged, one for each seed: its model, and its teacher if any."""
    sweeps = list(found["seeds"].values())
    teachers = [sweep["teacher"] for sweep in sweeps if "teacher" in sweep]
    return {method: sweeps, **({method + _TEACHER: teachers} if teachers else {})}


def differences(table: Table, methods: Sequence[str]) -> Table:
    """Each row minus the first method's, paired by seed: both without or both with WiSE-FT. Model Stock has no seeds."""
    baselines = {wise: table[methods[0] + wise] for wise in ("", _WISE)}
    result: Table = {}
    for name, row in table.items():
        baseline = baselines[_WISE if name.endswith(_WISE) else ""]
        if name != "zero-shot" and not name.endswith(_STOCK) and row is not baseline:
            result[name] = {
                column: figure([a - b for a, b in zip(cell["by_seed"], baseline[column]["by_seed"])])
                for column, cell in row.items()
            }
    return result


def document(record: Record) -> str:
    """compare.md."""
    settings, seeds, (val, *test) = record["settings"], record["seeds"], record["id_sets"]
    how = f"Top-1 in %, seed {seeds[0]}."
    if len(seeds) > 1:
        how = (
            f"Top-1 in %, mean over seeds {', '.join(map(str, seeds))} ± half of its 95 % confidence interval (Student's "
            "t). The interval covers seeds only; n test images add a standard error of up to 50/√n points."
        )
    select = settings["select"]
    by = ("by loss, ", "by top-1, ") if select == "loss" else ("", "")
    if select == "last":
        how += f" Each method is scored after its last epoch ({record['epochs']})."
    else:
        figure = "lowest loss (mean cross-entropy)" if select == "loss" else "highest top-1"
        fit = " (for `lp`, 0 and 1, its fit)" if "lp" in record["methods"] else ""
        how += (
            f" Each run is scored at the epoch with the {figure} on `{val}`, the earliest of equals; the choices are 0 "
            f"(zero-shot) to {record['epochs']}{fit}. At epoch 0 there is nothing to merge, so WiSE-FT is zero-shot as well, "
            "with alpha 0."
        )
    how += (
        f" `{val}` chose the setting of each method ({by[0]}on seed {seeds[0]}) and alpha ({by[1]}for each seed); no other "
        "set chose anything."
    )
    if not test:
        how += f" So the figures on `{val}` are slightly optimistic; pass --id-test for a set that chooses nothing."
    own, more = record["tries"]
    if more:
        how += (
            f" Each method had {own} + {more} tries: the values of its learning rate (lp: C) and then, at the best, those of "
            f"{' or '.join(settings['tune'])} or, without such a setting, more values around it."
        )
    if any(text.startswith("logit-scale") for text in settings["tune"]):
        how += (
            " A logit-scale that is not listed is the pretrained model's, which is also that of WiSE-FT's alpha 0: ECE is "
            "not comparable between models that differ in it."
        )
    if any(map(has_teacher, record["methods"])):
        how += " A teacher has the setting and the epoch that were chosen for its model, and an alpha of its own."
    text = [f"# {settings['model']} ({settings['pretrained']}), fine-tuned on {settings['train_data']}", how]
    for block in record["blocks"]:
        text += [f"## {block['title']}"] if block["title"] else []
        text += [_markdown(block["rows"], record, block["methods"])]
        if select != "last" and block["methods"]:
            text += [f"Epochs chosen, in the order of the seeds: {_epochs(block['methods'])}."]
        if block["methods"]:
            text += ["Expected calibration error (ECE, 15 bins) in %, lower is better:"]
            text += [_markdown(block["ece"], record, block["methods"])]
        text += _stock_notes(block["methods"])
        if block["differences"]:
            first = record["methods"][0]
            for key, what in (("differences", "top-1"), ("ece_differences", "ECE")):
                said = f"Difference of {what} to {first} (with WiSE-FT: to {first}{_WISE}) in points, paired by seed:"
                text += [said, _markdown(block[key], record, block["methods"], "+")]
    pairs = product(record["blocks"], record["methods"])
    missing = [f"{method} ({block['title']})" for block, method in pairs if method not in block["methods"]]
    text += [f"Not finished: {', '.join(missing).replace(' ()', '')}."] if missing else []
    return "\n\n".join(text) + "\n"


def _stock_notes(methods: Mapping[str, Record]) -> list[str]:
    """What to know of the rows with Model Stock, if there are any."""
    merged = {method: found for method, found in methods.items() if "model_stock" in found}
    if not merged:
        return []
    said = "Model Stock merges all seeds of a method into one model, so it has no interval."
    if "lp" in methods:
        said += " It leaves out lp, whose seeds share all weights but those of the head."
    for method, found in merged.items():
        seeds = found["model_stock"]["seeds"]
        if len(seeds) < len(found["seeds"]):
            only = f"only {', '.join(map(str, seeds))}"
            left = only if len(seeds) > 1 else "fewer than two, so it has no such row"
            said += f" Of {method} the seeds that are not scored at epoch 0 are {left}."
    return [said]


def _epochs(methods: Mapping[str, Record]) -> str:
    by_method = {
        method: [sweep["epoch"] for sweep in found["seeds"].values()] for method, found in methods.items()
    }
    return "; ".join(f"{method} {', '.join(map(str, some))}" for method, some in by_method.items())


def _markdown(table: Table, record: Record, methods: Mapping[str, Record], sign: str = "") -> str:
    if not table:
        return "No method has finished."
    notes = {"zero-shot": ["", "0"]}
    for method, found in methods.items():
        setting = ", ".join(filter(None, map(_value, (found, found.get("then", {})))))
        for name, sweeps in _models(method, found).items():
            mean = fmean(sweep["chosen_alpha"] for sweep in sweeps)
            notes |= {name: [setting, "1"], name + _WISE: [setting, f"{mean:.2f}"]}
        notes[method + _STOCK] = [setting, ""]
    names = list(next(iter(table.values())))
    lines = [["", *(_heading(name, record, methods) for name in names), "setting", "mean alpha"]]
    lines += [["---", *["---:"] * (len(names) + 2)]]
    lines += [[name, *(percent(row[c], sign) for c in names), *notes[name]] for name, row in table.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _value(found: Record) -> str:
    """A tuned flag with its value, and whether that is at an end of those tried; '' for the model's own."""
    if found.get("value") is None:
        return ""
    tried = sorted(map(float, found["by_value"]))
    end = {tried[0]: " (least tried)", tried[-1]: " (most tried)"} if len(tried) > 2 else {}
    return f"{found['tuned']} {found['value']:g}{end.get(found['value'], '')}"


def _heading(name: str, record: Record, methods: Mapping[str, Record]) -> str:
    found, (val, *test) = next(iter(methods.values())), record["id_sets"]
    role = " (ID, chose)" if name == val else " (ID test)" if name in test else ""
    return f"{name}{role}" + (f", n={found['zero_shot'][name]['n']}" if name != OOD else "")


def percent(cell: Mapping[str, Any], sign: str = "") -> str:
    half = cell["half_width_95"]
    return f"{100 * cell['mean']:{sign}.1f}" + ("" if half is None else f" ± {100 * half:.1f}")


def draw(record: Record, path: Path) -> None:
    """compare.png: one frontier per method, one panel per block (FLYP, figure 2); only alphas 0 and 1 are labelled."""
    id_sets, panels, labels, ood = record["id_sets"], {}, [""], False
    for block in record["blocks"]:
        curves = {}
        for method, found in block["methods"].items():
            ood = OOD in block["rows"][method]
            for name, sweeps in _models(method, found).items():
                curves[name] = curve(sweeps, id_sets)
                labels = [{"0.00": "0", "1.00": "1"}.get(alpha, "") for alpha in sweeps[0]["alphas"]]
            if ood and method + _STOCK in block["rows"]:
                across, up = (block["rows"][method + _STOCK][c]["mean"] for c in (id_sets[-1], OOD))
                curves[method] = curves[method]._replace(diamond=(100 * across, 100 * up))
        panels[block["title"]] = curves
    _draw_curves(panels, labels, "at the alphas chosen", id_sets[-1] if ood else None, path)


def curve(sweeps: Sequence[Record], id_sets: Sequence[str], up: str = OOD) -> Curve:
    """A frontier, each point a mean over seeds: the last of `id_sets` across (without OOD sets, alpha), `up` up.

    The star is the mean of the points that the seeds chose, so it lies off the curve if they chose different alphas.
    """

    def point(chosen: Sequence[str]) -> tuple[float, float]:
        seeds = [columns(sweep["alphas"][alpha], id_sets) for sweep, alpha in zip(sweeps, chosen)]
        across = 100 * fmean(row[id_sets[-1]] for row in seeds)
        if up not in seeds[0]:
            return fmean(map(float, chosen)), across
        return across, 100 * fmean(row[up] for row in seeds)

    across, ups = zip(*(point([alpha] * len(sweeps)) for alpha in sweeps[0]["alphas"]))
    return Curve(across, ups, point([f"{sweep['chosen_alpha']:.2f}" for sweep in sweeps]))
