"""`flyp wiseft`: sweep, choose alpha, write merged weights, record and picture. The method is wiseft.py's."""

import argparse
import importlib.util
import json
import logging
import math
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import open_clip
import torch

import flyp_plugin
from flyp_plugin import record
from flyp_plugin.checkpoints import (
    Model,
    StateDict,
    atomic_write,
    build_model,
    locate_weights,
    read_state_dict,
    refuse_existing,
    save,
)
from flyp_plugin.commands.flags import add_classes_flags, add_data_flags, add_model_flags
from flyp_plugin.errors import InputError
from flyp_plugin.evalsets import EvalSet, eval_sets_from_args, loader_from_args
from flyp_plugin.heads import val_preprocess, zeroshot_as_learned
from flyp_plugin.learned import HEAD, ClassHead, head_of
from flyp_plugin.metrics import Metrics, table
from flyp_plugin.model_spec import ModelSpec, is_place
from flyp_plugin.names import same_names
from flyp_plugin.precision import match_open_clip_precision
from flyp_plugin.record import Record, sha256
from flyp_plugin.run_folder import folder_lock
from flyp_plugin.targets import choose_weights, fill_in, find_record, merged_name, spec_from_args
from flyp_plugin.wiseft import average, check_same, choose, interpolate, sweep

Results = Mapping[float, Mapping[str, Metrics]]  # of each alpha on each set, the ID set first
_log = logging.getLogger(__name__)
EXAMPLE = """  flyp wiseft logs/birds
  flyp wiseft --model ViT-B-16 --pretrained openai --finetuned epoch_10.pt --eval-data val=data/val --out merged"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    add_model_flags(parser)
    add_data_flags(parser)
    add_classes_flags(parser)
    # fmt: off
    add = parser.add_argument
    add("run", nargs="?", metavar="RUN", help="a run's folder (its last epoch, or --epoch) or a checkpoint in one")
    add("--pretrained", metavar="TAG|PATH", help="what the fine-tuning started from (default: what the run did)")
    finetuned = parser.add_mutually_exclusive_group()
    finetuned.add_argument("--finetuned", metavar="PATH", help="a checkpoint in place of RUN")
    finetuned.add_argument("--average", nargs="+", metavar="PATH", help="several runs or checkpoints in place of RUN, of "
        "which the mean is taken")
    alphas = parser.add_mutually_exclusive_group()
    of = "or A,B,... (default: %(default)s)"
    alphas.add_argument("--alphas", default="0:1:0.1", metavar="A:B:STEP", help=of)
    alphas.add_argument("--alpha", type=float, help="this one alone; needs no --eval-data")
    add("--out", metavar="DIR", help="for the merged weights, wiseft.json and frontier.png (default: RUN/wiseft)")
    add("--save-all", action="store_true", help="write the weights of every alpha")
    add("--per-set", action="store_true", help="a curve a set in frontier.png, in place of the mean")
    add("--json", action="store_true", help="JSON on the terminal in place of the table")
    # fmt: on


@dataclass(frozen=True)
class _Ends:
    """What is merged: the fine-tuned checkpoints, of which the mean is taken, and what they started from."""

    finetuned: list[str]
    pretrained: str  # a tag, a path, or '' for the weights of an hf-hub: or local-dir: model
    spec: ModelSpec
    known: Record | None


def run(args: argparse.Namespace) -> None:
    """`flyp wiseft`; the table or the JSON goes to stdout.

    Raises:
        InputError: as its parts; all but a full disk before anything is written.
    """
    match_open_clip_precision()
    alphas = parse_alphas(args.alphas if args.alpha is None else str(args.alpha))
    ends = _ends(args)
    sets = eval_sets_from_args(args, ends.known)
    out = _out(args, ends.known)
    _check_outputs(out, alphas, bool(sets), args.force)
    states = [read_state_dict(path) for path in ends.finetuned]
    tokenizer = ends.spec.tokenizer()
    model, pretrained = _start(args, ends, head_of(states[0]), tokenizer)
    _check_classes([*states, pretrained], [*ends.finetuned, ends.pretrained])
    finetuned = average(states) if args.average else states[0]
    check_same(pretrained, finetuned, " + ".join(ends.finetuned), ends.pretrained or ends.spec.name)
    finetuned = {key: tensor.to(model.logit_scale.device) for key, tensor in finetuned.items()}
    results: Results = {alpha: {} for alpha in alphas}
    chosen = alphas[0]
    with folder_lock(out):
        _check_outputs(out, alphas, bool(sets), args.force)  # another sweep may just have ended
        if sets:
            loader = partial(loader_from_args, preprocess=val_preprocess(model), args=args)
            results = sweep(model, pretrained, finetuned, alphas, sets, tokenizer, loader, args.precision)
            chosen = choose(results, sets[0].name)
        names = [record.FILE, "wiseft.json"]
        for alpha in alphas if args.save_all else [chosen]:
            names.append(merged_name(alpha))
            merged = interpolate(pretrained, finetuned, alpha)
            weights = {key: tensor.cpu().contiguous() for key, tensor in merged.items()}
            save(weights, out / merged_name(alpha))
        merged_record = _record_of_merged(args, ends, sets)
        merged_record.write(out)
        text = json.dumps(_results(ends, results, chosen, sets[0].name if sets else None), indent=1)
        with atomic_write(out / "wiseft.json") as part:
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
    run = out.parent if ends.known and out == _default_out(ends.known) else out
    data = "" if merged_record.prompts else " --data DIR"
    _log.info(f"Next: flyp export {shlex.quote(str(run))}{data} --format timm --out classifier")


def _ends(args: argparse.Namespace) -> _Ends:
    """The end points from RUN, --finetuned or --average, and --pretrained; fills in the flags that the run knows.

    Raises:
        InputError: none or too many of them are given, they do not belong together, or the pretrained weights are gone or
            have changed.
    """
    given = args.average or [end for end in (args.run, args.finetuned) if end]
    if not given or (args.run and (args.average or args.finetuned)):
        raise InputError(
            "give what to merge as one of RUN (logs/birds), --finetuned PATH or --average PATH PATH ...; the flags are "
            "in --help."
        )
    pairs = [(path, find_record(path)) for path in given]
    finetuned = [
        str(choose_weights(known, args.epoch or "last")) if known and os.path.isdir(path) else path
        for path, known in pairs
    ]
    records = [known for _, known in pairs if known]
    record.check_same_model(records)
    known = records[0] if records else None
    if args.pretrained is None:
        pretrained = _start_of(known, given[0])
    else:
        pretrained = args.pretrained
        before = record.find(pretrained)
        if known and before:
            record.check_same_model([before, known])
    fill_in(args, known)
    return _Ends(finetuned, pretrained, spec_from_args(args, pretrained, known), known)


def _start_of(known: Record | None, given: str) -> str:
    """The weights that a run started from, as its record has them, found to be the same still."""
    if known is None:
        raise InputError(
            f"there is no {record.FILE} beside {given} that says what it started from; give --pretrained."
        )
    start, digest = known.pretrained, known.get("pretrained", {}).get("sha256")
    if not start and not is_place(known.spec.name):
        raise InputError(
            f"{known.folder} was trained from random weights; give --pretrained, if you know better."
        )
    if digest and not os.path.isfile(start):
        raise InputError(f"{start}, from which {known.folder} was trained, is not there; give --pretrained.")
    if digest and sha256(start) != digest:
        raise InputError(
            f"{start} is not the file from which {known.folder} was trained (its SHA-256 has changed); give --pretrained."
        )
    return start


def _default_out(known: Record) -> Path:
    assert known.folder is not None  # noqa: S101 - records that are found have one
    return known.folder / "wiseft"


def _out(args: argparse.Namespace, known: Record | None) -> Path:
    if args.out:
        return Path(args.out)
    if args.average or known is None or not (known.folder and (known.folder / "checkpoints").is_dir()):
        raise InputError("--out is missing; give a folder for the merged weights.")
    return _default_out(known)


def _record_of_merged(args: argparse.Namespace, ends: _Ends, sets: Sequence[EvalSet]) -> Record:
    """The run's record, with what flags have changed; of loose weights, what is known: model, and classes of the ID set."""
    content = {**(ends.known.content if ends.known else {}), **record.describe_model(ends.spec)}
    if sets and not ends.known:
        content |= {name: getattr(sets[0].prompts, name) for name in ("classnames", "templates")}
    if args.pretrained is not None or not ends.known:
        content["pretrained"] = record.describe_weights(ends.pretrained)
    return Record(content)


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


def _start(
    args: argparse.Namespace, ends: _Ends, learned: ClassHead | None, tokenizer: Callable
) -> tuple[Model, dict[str, torch.Tensor]]:
    """A working model in --precision, and the pretrained weights in float32.

    Against a learned head, the pretrained model's is the zero-shot head of the same classes and templates.
    """
    source = build_model(ends.spec, ends.pretrained, "fp32", args.device)
    if learned is not None and not hasattr(source, HEAD):
        setattr(source, HEAD, zeroshot_as_learned(source, tokenizer, learned.class_prompts))
    pretrained = {key: tensor.clone() for key, tensor in source.state_dict().items()}
    if args.precision in ("fp32", "amp", "amp_bf16", "amp_bfloat16"):
        return source, pretrained
    model = build_model(ends.spec, ends.pretrained, args.precision, args.device)
    if hasattr(source, HEAD):
        setattr(model, HEAD, getattr(source, HEAD))
    return model, pretrained


def _check_classes(states: Sequence[StateDict], paths: Sequence[str]) -> None:
    """InputError where learned heads that are to be put together are of other classes."""
    heads = [head_of(state) for state in states]
    names = [head.class_prompts.classnames if head else [] for head in heads]
    for path, other in zip(paths, names):
        if not same_names(other, names[0]):
            raise InputError(
                f"{path} and {paths[0]} have not learned a head of the same classes; merge runs on the same class names."
            )


def _results(ends: _Ends, results: Results, chosen: float, chosen_by: str | None) -> dict[str, Any]:
    """The content of wiseft.json."""
    paths = {"finetuned": ends.finetuned, "pretrained": [locate_weights(ends.spec, ends.pretrained)]}
    inputs = {
        name: [{"given": path, "sha256": sha256(path)} for path in some] for name, some in paths.items()
    }
    return {
        "model": ends.spec.name,
        "chosen_alpha": chosen,
        "chosen_by": chosen_by and f"{chosen_by}/top1",
        "last_epoch": max(record.epochs(ends.known.folder), default=None)
        if ends.known and ends.known.folder
        else None,
        "alphas": {f"{alpha:.2f}": metrics for alpha, metrics in results.items()},
        "inputs": {**inputs, "pretrained": {**inputs["pretrained"][0], "given": ends.pretrained}},
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
    with atomic_write(path) as part:
        figure.savefig(part, format="png", dpi=150)
