"""`flyp wiseft`: sweep, choose alpha, write merged weights, record and picture. The method is wiseft.py's."""

import argparse
import importlib.util
import json
import logging
import math
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.transform import PreprocessCfg

import flyp_plugin
from flyp_plugin.checkpoints import (
    FORCED,
    PREPROCESSING,
    Model,
    StateDict,
    load_tokenizer,
    model_from_args,
    read_state_dict,
    refuse_existing,
    replacing,
    save,
    sha256,
    weights_file,
)
from flyp_plugin.errors import InputError
from flyp_plugin.evalsets import loader_from_args, parse_eval_sets
from flyp_plugin.flags import as_words
from flyp_plugin.heads import val_preprocess, zeroshot_as_learned
from flyp_plugin.jobs import alone
from flyp_plugin.learned import HEAD, ClassHead, head_of
from flyp_plugin.metrics import Metrics, table
from flyp_plugin.precision import match_open_clip_precision
from flyp_plugin.wiseft import average, check_same, choose, interpolate, sweep

Results = Mapping[float, Mapping[str, Metrics]]  # of each alpha on each set, the ID set first
_log = logging.getLogger(__name__)


def wiseft_command(args: argparse.Namespace) -> None:
    """`flyp wiseft`; the table or the JSON goes to stdout.

    Raises:
        InputError: as its parts; all but a full disk before anything is written.
    """
    match_open_clip_precision()
    alphas = parse_alphas(args.alphas if args.alpha is None else str(args.alpha))
    sets = parse_eval_sets(args.eval_data or [], args.classnames, args.templates, args.own_first)
    out = Path(args.out)
    _check_outputs(out, alphas, bool(sets), args.force)
    paths = args.average or [args.finetuned]
    ends = [read_state_dict(path) for path in paths]
    model, pretrained = _start(args, head_of(ends[0]))
    _check_classes([*ends, pretrained], [*paths, args.pretrained])
    finetuned = average(ends) if args.average else ends[0]
    check_same(pretrained, finetuned, " + ".join(paths), args.pretrained)
    finetuned = {key: tensor.to(model.logit_scale.device) for key, tensor in finetuned.items()}
    results: Results = {alpha: {} for alpha in alphas}
    chosen = alphas[0]
    with alone(out):
        _check_outputs(out, alphas, bool(sets), args.force)  # another sweep may just have ended
        if sets:
            tokenizer, preprocess = (
                load_tokenizer(args.model, args.force_context_length),
                val_preprocess(model),
            )
            loader = partial(loader_from_args, preprocess=preprocess, args=args)
            results = sweep(model, pretrained, finetuned, alphas, sets, tokenizer, loader, args.precision)
            chosen = choose(results, sets[0].name)
        names = ["wiseft.json"]
        for alpha in alphas if args.save_all else [chosen]:
            names.append(merged_name(alpha))
            merged = interpolate(pretrained, finetuned, alpha)
            weights = {key: tensor.cpu().contiguous() for key, tensor in merged.items()}
            save(weights, out / merged_name(alpha))
        text = json.dumps(_record(args, paths, results, chosen, sets[0].name if sets else None), indent=1)
        with replacing(out / "wiseft.json") as part:
            part.write_text(text + "\n", encoding="utf-8")
        if len(alphas) > 1:
            names.append("frontier.png")
            draw_frontier(results, chosen, out / "frontier.png", args.per_set)
    if args.json:
        sys.stdout.write(text + "\n")
    elif sets:
        sys.stdout.write(table(_rows(results, chosen), "alpha") + "\n")
    _log.info(f"Wrote {out}/: {', '.join(names)}.")
    others = sorted(path.name for path in out.glob("wise_ft_alpha=*.pt") if path.name not in names)
    if others:
        _log.warning(f"Not of this merge, but still in {out}/ from one before: {', '.join(others)}.")
    words = ["flyp", "export", str(out / merged_name(chosen)), *model_flags(args, model), "--data",
             sets[0].source if sets else "DIR", "--format", "timm", "--out", str(out / "classifier")]  # fmt: skip
    _log.info(f"Next: {shlex.join(words)}")


def parse_alphas(text: str) -> list[float]:
    """START:STOP:STEP, both ends included, or numbers joined by commas; in order, each once.

    Raises:
        InputError: not that, outside [0, 1], or finer than 0.01, which is what the files' names tell apart.
    """
    parts = text.split(":")
    try:
        if len(parts) == 3:
            start, stop, step = map(float, parts)
            if abs(step) < 0.0099:
                raise ValueError
            for end in (start, stop):
                _check_alpha(end)
            # a little grace at the end, for 0.1 is no binary fraction
            alphas = [start + i * step for i in range(math.floor((stop - start) / step + 1e-6) + 1)]
        else:
            alphas = [float(part) for part in text.split(",")]
    except InputError:
        raise
    except ValueError:
        alphas = []
    if not alphas:
        raise InputError(
            f"{text!r} is not START:STOP:STEP, with a STEP of 0.01 or more, nor numbers joined by commas."
        )
    for alpha in alphas:
        _check_alpha(alpha)
        if abs(alpha - round(alpha, 2)) > 1e-9:
            raise InputError(
                f"alpha {alpha:g} is finer than 0.01, which the names of the files cannot tell; round it."
            )
    return sorted({abs(round(alpha, 2)) for alpha in alphas})


def _check_alpha(alpha: float) -> None:
    if not -1e-9 <= alpha <= 1 + 1e-9:
        raise InputError(
            f"alpha {alpha:g} is outside [0, 1]; 0 is the pretrained and 1 the fine-tuned model."
        )


def merged_name(alpha: float) -> str:
    return f"wise_ft_alpha={alpha:.2f}.pt"


def _check_outputs(out: Path, alphas: list[float], scored: bool, force: bool) -> None:
    draw = len(alphas) > 1
    if draw and not scored:
        raise InputError(
            "which alpha is best can only be told from data; give --eval-data NAME=SHARDS, or one --alpha."
        )
    if draw and importlib.util.find_spec("matplotlib") is None:
        raise InputError("frontier.png needs matplotlib; pip install 'flyp-plugin[plot]'.")
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} cannot be made a folder: there is a file of that name; give another --out.")
    if any(out.glob("epoch_*.pt")):
        raise InputError(
            f"{out} holds a run's checkpoints, the newest of which is resumed; give another --out."
        )
    for name in [*map(merged_name, alphas), "wiseft.json", *(["frontier.png"] if draw else [])]:
        refuse_existing(out / name, force)


def _start(args: argparse.Namespace, learned: ClassHead | None) -> tuple[Model, dict[str, torch.Tensor]]:
    """A working model in --precision, and the pretrained weights in float32.

    Against a learned head, the pretrained model's is the zero-shot head of the same classes and templates.
    """
    source = model_from_args(args, args.pretrained, "fp32")
    if learned is not None and not hasattr(source, HEAD):
        setattr(
            source,
            HEAD,
            zeroshot_as_learned(
                source, load_tokenizer(args.model, args.force_context_length), learned.class_prompts
            ),
        )
    pretrained = {key: tensor.clone() for key, tensor in source.state_dict().items()}
    if args.precision in ("fp32", "amp", "amp_bf16", "amp_bfloat16"):
        return source, pretrained
    model = model_from_args(args, args.pretrained)
    if hasattr(source, HEAD):
        setattr(model, HEAD, getattr(source, HEAD))
    return model, pretrained


def _check_classes(states: Sequence[StateDict], paths: Sequence[str]) -> None:
    """InputError where learned heads that are to be put together are of other classes."""
    heads = [head_of(state) for state in states]
    names = [head and head.class_prompts.classnames for head in heads]
    for path, other in zip(paths, names):
        if other != names[0]:
            raise InputError(
                f"{path} and {paths[0]} have not learned a head of the same classes; merge runs on the same class names."
            )


def model_flags(args: argparse.Namespace, model: Model) -> list[str]:
    """The flags that make `model` again from a checkpoint, which does not tell a tag's preprocessing."""
    config = open_clip.get_model_config(args.model.replace("/", "-")) or {}
    quick = any(type(module).__name__ == "QuickGELU" for module in model.modules())
    flags = {"model": args.model, "model_config": args.model_config}
    flags |= {name: getattr(args, name) for name in FORCED}
    flags["force_quick_gelu"] = quick and not config.get("quick_gelu")
    for name in PREPROCESSING:
        value = model.visual.preprocess_cfg[name]
        value = value if isinstance(value, str) else tuple(value)
        flags[f"image_{name}"] = None if value == getattr(PreprocessCfg(), name) else value
    return as_words(flags)


def _record(
    args: argparse.Namespace, finetuned: list[str], results: Results, chosen: float, chosen_by: str | None
) -> dict[str, Any]:
    def source(given: str, path: str) -> dict[str, str]:
        return {"given": given, "sha256": sha256(path)}

    return {
        "model": args.model,
        "chosen_alpha": chosen,
        "chosen_by": chosen_by and f"{chosen_by}/top1",
        "alphas": {f"{alpha:.2f}": metrics for alpha, metrics in results.items()},
        "inputs": {
            "pretrained": source(args.pretrained, weights_file(args.model, args.pretrained)),
            "finetuned": [source(path, path) for path in finetuned],
        },
        "versions": {module.__name__: module.__version__ for module in (flyp_plugin, open_clip, torch)},
    }


def mean_ood(by_set: Mapping[str, Mapping[str, Any]]) -> float | None:
    """Mean top-1 over all sets but the first; None where there is only one."""
    _, *others = (metrics["top1"] for metrics in by_set.values())
    return sum(others) / len(others) if others else None


def _rows(results: Results, chosen: float) -> dict[str, dict[str, float]]:
    rows = {}
    for alpha, by_set in results.items():
        row = {f"{name} top1": metrics["top1"] for name, metrics in by_set.items()}
        ood = mean_ood(by_set)
        row |= {} if ood is None else {"mean OOD": ood}
        rows[f"{alpha:.2f}{' *' if alpha == chosen else ''}"] = row
    return rows


def draw_frontier(results: Results, chosen: float, path: Path, per_set: bool = False) -> None:
    """ID accuracy across, OOD accuracy up, a point an alpha (WiSE-FT, figure 1); with one set, alpha across.

    Args:
        results: metrics of each alpha on each set, the first set being the ID one.
        chosen: the alpha that gets the star.
        path: where the PNG goes.
        per_set: a curve for each OOD set in place of their mean.
    """
    alphas = sorted(results)
    first, *others = results[alphas[0]]
    across = [100 * results[alpha][first]["top1"] for alpha in alphas] if others else alphas
    ups = {name: [100 * results[alpha][name]["top1"] for alpha in alphas] for name in others if per_set}
    if others and not per_set:
        ups["mean OOD"] = [100 * mean_ood(results[alpha]) for alpha in alphas]  # type: ignore[operator]
    if not others:
        ups[first] = [100 * results[alpha][first]["top1"] for alpha in alphas]
    at = alphas.index(chosen)
    curves = {name: Curve(across, up, (across[at], up[at])) for name, up in ups.items()}
    labels = [f"{alpha:g}" for alpha in alphas]
    draw_curves({"": curves}, labels, f"chosen: alpha = {chosen:g}", first if others else None, path)


@dataclass(frozen=True)
class Curve:
    """Points in the order of the alphas, and the one that gets a star; accuracies in percent."""

    across: Sequence[float]
    up: Sequence[float]
    star: tuple[float, float]


def draw_curves(
    panels: dict[str, dict[str, Curve]], labels: Sequence[str], star: str, id_name: str | None, path: Path
) -> None:
    """Frontiers, side by side.

    Args:
        panels: the curves of each by name; the panels by title.
        labels: what stands at the points, '' for nothing.
        star: what a star means.
        id_name: the set whose accuracy goes across; None: alpha does.
        path: where the PNG goes.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6 * len(panels), 4.5), layout="constrained")
    for (title, curves), axes in zip(panels.items(), figure.subplots(1, len(panels), squeeze=False)[0]):
        for name, curve in curves.items():
            (line,) = axes.plot(curve.across, curve.up, "o-", markersize=4, label=name)
            axes.plot(*curve.star, "*", markersize=16, color=line.get_color(), markeredgecolor="black")
            for x, y, label in zip(curve.across, curve.up, labels):
                axes.annotate(label, (x, y), textcoords="offset points", xytext=(4, 4), fontsize=7)
        axes.plot([], [], "*", markersize=12, color="white", markeredgecolor="black", label=star)
        axes.set_title(title)
        axes.set_xlabel(f"{id_name} (ID) top-1, %" if id_name else "alpha (0: pretrained, 1: fine-tuned)")
        axes.set_ylabel("OOD top-1, %" if id_name else "top-1, %")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    with replacing(path) as part:
        figure.savefig(part, format="png", dpi=150)
