"""The picture of a WiSE-FT sweep; the only place that needs matplotlib."""

from collections.abc import Mapping
from pathlib import Path

from flyp_plugin.checkpoints import replacing
from flyp_plugin.metrics import Metrics, mean_ood


def draw_frontier(
    results: Mapping[float, Mapping[str, Metrics]], chosen: float, path: Path, per_set: bool = False
) -> None:
    """ID accuracy across, OOD accuracy up, a point an alpha (WiSE-FT, figure 1); with one set alone, alpha across.

    Args:
        results: metrics of each alpha on each set, the first set being the ID one.
        chosen: the alpha that gets the star.
        path: where the PNG goes.
        per_set: a curve for each OOD set in place of their mean.
    """
    from matplotlib.figure import Figure

    alphas = sorted(results)
    first, *others = results[alphas[0]]
    across = [100 * results[alpha][first]["top1"] for alpha in alphas] if others else alphas
    curves = {name: [100 * results[alpha][name]["top1"] for alpha in alphas] for name in others if per_set}
    if others and not per_set:
        curves["mean OOD"] = [100 * mean_ood(results[alpha]) for alpha in alphas]  # type: ignore[operator]
    if not others:
        curves[first] = [100 * results[alpha][first]["top1"] for alpha in alphas]
    figure = Figure(figsize=(6, 4.5), layout="constrained")
    axes = figure.add_subplot()
    at = alphas.index(chosen)
    for name, up in curves.items():
        (line,) = axes.plot(across, up, "o-", markersize=4, label=name)
        axes.plot(across[at], up[at], "*", markersize=16, color=line.get_color(), markeredgecolor="black")
        for x, y, alpha in zip(across, up, alphas):
            axes.annotate(f"{alpha:g}", (x, y), textcoords="offset points", xytext=(4, 4), fontsize=7)
    axes.plot([], [], "*", markersize=12, color="white", markeredgecolor="black", label=f"chosen: alpha = {chosen:g}")
    axes.set_xlabel(f"{first} (ID) top-1, %" if others else "alpha (0: pretrained, 1: fine-tuned)")
    axes.set_ylabel("OOD top-1, %" if others else "top-1, %")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    with replacing(path) as part:
        figure.savefig(part, format="png", dpi=150)
