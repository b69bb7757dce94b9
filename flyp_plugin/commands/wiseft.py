"""`flyp wiseft logs/birds`: merge pretrained and fine-tuned weights (WiSE-FT, arXiv 2109.01903, or Model Stock).

Three steps: load the end points, score the alphas, write the merged weights, wiseft.json and frontier.png. Of Model
Stock the fine-tuned end is what it merged, and 1 the only alpha. The methods are in flyp_plugin/wiseft.py.
"""

import argparse
import json
import logging
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from flyp_plugin.commands.flags import add_classes_flags, add_data_flags, add_model_flags
from flyp_plugin.commands.plots import OOD, columns, draw_frontier
from flyp_plugin.errors import InputError

if TYPE_CHECKING:
    from flyp_plugin.checkpoints import Model
    from flyp_plugin.evalsets import EvalSet
    from flyp_plugin.model_spec import ModelSpec
    from flyp_plugin.record import Record

# metrics of each alpha on each set, the ID set first
Results = Mapping[float, Mapping[str, Mapping[str, Any]]]
EXAMPLE = """  flyp wiseft logs/birds
  flyp wiseft --model ViT-B-16 --pretrained openai --finetuned epoch_10.pt --eval-data val=data/val --out merged
  flyp wiseft --model-stock logs/birds-seed0 logs/birds-seed1 --out stock"""
_MODEL_STOCK = "model_stock.pt"
_log = logging.getLogger(__name__)


def add_flags(parser: argparse.ArgumentParser) -> None:
    add_model_flags(parser)
    add_data_flags(parser)
    add_classes_flags(parser)
    add = parser.add_argument
    # fmt: off
    add("run_folder", nargs="?", metavar="RUN", help="a run's folder (its last epoch, or --epoch) or a checkpoint in one")
    add("--pretrained", metavar="TAG|PATH", help="what the fine-tuning started from (default: what the run says)")
    finetuned = parser.add_mutually_exclusive_group()
    finetuned.add_argument("--finetuned", metavar="PATH", help="a checkpoint, instead of RUN")
    finetuned.add_argument("--average", nargs="+", metavar="PATH", help="the mean of several runs or checkpoints, instead of RUN")
    finetuned.add_argument("--model-stock", nargs="+", metavar="PATH", help="Model Stock (arXiv 2403.19522) of runs that differ in their seed: for each tensor, as far from the pretrained weights to the runs' mean as the runs agree; instead of RUN and alpha, and needs no --eval-data")
    alphas = parser.add_mutually_exclusive_group()
    alphas.add_argument("--alphas", metavar="A:B:STEP", help="or A,B,... (default: 0:1:0.1)")
    alphas.add_argument("--alpha", type=float, help="only this one; needs no --eval-data")
    add("--out", metavar="DIR", help="folder for the merged weights, wiseft.json and frontier.png (default: RUN/wiseft, or RUN/wiseft_teacher)")
    add("--save-all", action="store_true", help="write the weights of every alpha")
    add("--per-set", action="store_true", help="draw one curve per set in frontier.png instead of their mean")
    add("--json", action="store_true", help="print JSON, not the table")
    # fmt: on


@dataclass(frozen=True)
class EndPoints:
    """What is merged: the fine-tuned checkpoints (their mean, if several) and the weights that they started from."""

    finetuned: list[str]
    pretrained: str  # a tag, a path, or '' for the weights of an hf-hub: or local-dir: model
    spec: "ModelSpec"
    record: "Record | None"


def run(args: argparse.Namespace) -> None:
    """Merge; the table or the JSON goes to stdout. Every mistake but a full disk is found before anything is written."""
    from flyp_plugin.checkpoints import save
    from flyp_plugin.evalsets import eval_sets_from_args, loader_from_args
    from flyp_plugin.heads import val_preprocess
    from flyp_plugin.precision import match_open_clip_precision
    from flyp_plugin.run_folder import folder_lock
    from flyp_plugin.wiseft import choose_alpha, interpolate, sweep

    match_open_clip_precision()
    names = _names(args)
    alphas = [*names]
    ends = _find_end_points(args)
    sets = eval_sets_from_args(args, ends.record)
    out = _output_folder(args, ends)
    _check_outputs(out, names, bool(sets), args.force)
    model, pretrained, finetuned, ratios = _load(args, ends)
    with folder_lock(out):
        _check_outputs(out, names, bool(sets), args.force)  # another sweep may just have finished
        results: Results = {alpha: {} for alpha in alphas}
        chosen = alphas[0]
        if sets:
            loader = partial(loader_from_args, preprocess=val_preprocess(model), args=args)
            tokenizer = ends.spec.tokenizer
            results = sweep(model, pretrained, finetuned, alphas, sets, tokenizer, loader, args.precision)
            chosen = choose_alpha(results, sets[0].name)
        saved = alphas if args.save_all else [chosen]
        for alpha in saved:
            merged = interpolate(pretrained, finetuned, alpha)
            save({key: tensor.cpu().contiguous() for key, tensor in merged.items()}, out / names[alpha])
        _report(args, ends, sets, results, chosen, out, {alpha: names[alpha] for alpha in saved}, ratios)


def _names(args: argparse.Namespace) -> dict[float, str]:
    """The alphas, and the file name of each one's weights."""
    given = args.alphas if args.alpha is None else str(args.alpha)
    if not args.model_stock:
        alphas = parse_alphas("0:1:0.1" if given is None else given)
        return {alpha: f"wise_ft_alpha={alpha:.2f}.pt" for alpha in alphas}
    if given is not None:
        raise InputError("--model-stock computes an alpha for each tensor; leave out --alpha and --alphas.")
    if len(args.model_stock) < 2:
        raise InputError("--model-stock needs two runs or more, which were trained with different --seed.")
    return {1.0: _MODEL_STOCK}


def _find_end_points(args: argparse.Namespace) -> EndPoints:
    """The end points from RUN, --finetuned, --average or --model-stock, and --pretrained, checked to belong together."""
    from flyp_plugin import record
    from flyp_plugin.targets import choose_weights, refuse_no_run, spec_from_args

    several = args.average or args.model_stock
    given = several or [path for path in (args.run_folder, args.finetuned) if path]
    if not given or (args.run_folder and (several or args.finetuned)):
        ways = "RUN, --finetuned PATH, --average PATH PATH ... and --model-stock PATH PATH ..."
        raise InputError(f"pass one of {ways} (see --help).")
    found, epoch = [record.find(path) for path in given], args.epoch or "last"
    for path, known in zip(given, found) if args.teacher else ():
        refuse_no_run(known, path)
    finetuned = [
        str(choose_weights(known, epoch, args.teacher)) if known and os.path.isdir(path) else path
        for path, known in zip(given, found)
    ]
    for path in finetuned:
        if not os.path.exists(path):
            raise InputError(f"there is no run or checkpoint {path}; check the path.")
    if args.model_stock:
        _check_several(finetuned, found)
    records = [known for known in found if known]
    known = records[0] if records else None
    pretrained = args.pretrained
    if pretrained is None:
        pretrained = _starting_weights(known, given[0])
    elif before := record.find(pretrained):
        records.append(before)
    record.check_same_model(records)
    if args.pretrained is None:
        record.check_same_start(records)
    return EndPoints(finetuned, pretrained, spec_from_args(args, pretrained, known), known)


def _check_several(finetuned: Sequence[str], found: "Sequence[Record | None]") -> None:
    """InputError if two checkpoints are of one run or seed: they agree in what runs with different seeds do not."""
    before: dict[Any, str] = {}
    for path, known in zip(finetuned, found):
        folder = os.path.dirname(os.path.realpath(path))
        training = known.training if known else {}
        one = training.get("seed", folder if os.path.basename(folder) == "checkpoints" else path)
        if one in before:
            raise InputError(
                f"--model-stock needs runs with different --seed, and {before[one]} and {path} have the same or are of one "
                "run; --average merges any."
            )
        before[one] = path


def _starting_weights(known: "Record | None", given: str) -> str:
    """The weights that a run started from according to its record, checked to be unchanged."""
    from flyp_plugin.model_spec import is_place
    from flyp_plugin.record import FILE, sha256

    if known is None:
        raise InputError(f"{given} has no {FILE} that names the weights it started from; pass --pretrained.")
    start, digest = known.pretrained, known.get("pretrained", {}).get("sha256")
    if not start and not is_place(known.spec.name):
        raise InputError(f"{known.folder} started from random weights: there is nothing to merge it with.")
    if digest and not os.path.isfile(start):
        raise InputError(f"{start}, the start of {known.folder}, does not exist; pass --pretrained.")
    if digest and sha256(start) != digest:
        raise InputError(f"{start} (SHA-256) has changed since {known.folder} started; pass --pretrained.")
    return start


def _output_folder(args: argparse.Namespace, ends: EndPoints) -> Path:
    from flyp_plugin.record import is_teacher

    known = ends.record
    if args.out:
        return Path(args.out)
    several = args.average or args.model_stock
    if several or known is None or not (known.folder and (known.folder / "checkpoints").is_dir()):
        raise InputError("--out is required here; pass a folder for the merged weights.")
    teacher = args.teacher or is_teacher(ends.finetuned[0])
    return known.folder / ("wiseft_teacher" if teacher else "wiseft")


def _check_outputs(out: Path, names: Mapping[float, str], scored: bool, force: bool) -> None:
    from flyp_plugin.checkpoints import refuse_existing

    draw = len(names) > 1
    if draw and not scored:
        raise InputError("choosing alpha needs data; pass --eval-data NAME=SHARDS, or a single --alpha.")
    if draw and find_spec("matplotlib") is None:
        raise InputError("frontier.png needs matplotlib: pip install 'flyp-plugin[plot]'.")
    if out.is_file():
        raise InputError(f"{out} is a file, not a folder; choose another --out.")
    # merged weights would be resumed as the newest checkpoint, or be taken for those of that run
    if any(out.glob("epoch_*.pt")) or (out / "checkpoints").is_dir():
        raise InputError(f"{out} holds a run's checkpoints; choose another --out.")
    for name in [*names.values(), "wiseft.json", *(["frontier.png"] if draw else [])]:
        refuse_existing(out / name, force)


def _load(
    args: argparse.Namespace, ends: EndPoints
) -> "tuple[Model, dict[str, Any], dict[str, Any], dict[str, float]]":
    """(a working model in --precision, pretrained weights in float32, fine-tuned weights), on --device; Model Stock's t.

    Against a learned head, the pretrained side's is the zero-shot head of the same classes and templates.
    """
    import torch

    from flyp_plugin.checkpoints import build_model, read_state_dict
    from flyp_plugin.heads import zeroshot_as_learned
    from flyp_plugin.learned import HEAD, load_head
    from flyp_plugin.names import same_names
    from flyp_plugin.wiseft import average, check_same_architecture, model_stock, stock_ratios

    states = [read_state_dict(path) for path in ends.finetuned]
    learned = load_head(states[0])
    source = build_model(ends.spec, ends.pretrained, "fp32", args.device)
    if learned is not None and not hasattr(source, HEAD):
        scale = ends.record.training.get("logit_scale") if ends.record else None  # that the head started at
        head = zeroshot_as_learned(source, ends.spec.tokenizer, learned.class_prompts, scale=scale)
        setattr(source, HEAD, head)
    pretrained = {key: tensor.clone() for key, tensor in source.state_dict().items()}
    model = source
    if args.precision not in ("fp32", "amp", "amp_bf16", "amp_bfloat16"):
        model = build_model(ends.spec, ends.pretrained, args.precision, args.device)
        if hasattr(source, HEAD):
            setattr(model, HEAD, getattr(source, HEAD))
    heads = [load_head(state) for state in [*states, pretrained]]
    classes = [head.class_prompts.classnames if head else [] for head in heads]
    for path, names in zip([*ends.finetuned, ends.pretrained], classes):
        if not same_names(names, classes[0]):
            both = f"{path} and {ends.finetuned[0]}"
            both_have = names and classes[0]
            what = "have different classes" if both_have else "are not of one kind: one has no such head"
            raise InputError(f"the learned heads of {both} {what}; merge runs with the same ones.")
    finetuned, ratios = average(states) if args.average else states[0], {}
    if args.model_stock:
        start = {key: tensor.cpu() for key, tensor in pretrained.items()}
        ratios = stock_ratios(start, states)
        for (i, one), (j, other) in combinations(enumerate(states), 2):
            if all(torch.equal(one[key], other[key]) for key in start):
                runs = f"{ends.finetuned[i]} and {ends.finetuned[j]}"
                raise InputError(f"{runs} have the same weights; give runs that differ in their --seed.")
        finetuned = model_stock(start, states, ratios)
        mean = f"{fmean(ratios.values()):.2f}, the mean over {len(ratios)} tensors"
        _log.info(f"Model Stock: t = {mean} (0: pretrained, 1: the mean of the runs).")
    end_names = " + ".join(ends.finetuned), ends.pretrained or ends.spec.name
    check_same_architecture(pretrained, finetuned, *end_names)
    device = model.logit_scale.device
    return model, pretrained, {key: tensor.to(device) for key, tensor in finetuned.items()}, ratios


def _report(
    args: argparse.Namespace,
    ends: EndPoints,
    sets: "Sequence[EvalSet]",
    results: Results,
    chosen: float,
    out: Path,
    weights: Mapping[float, str],
    ratios: Mapping[str, float],
) -> None:
    """Write flyp.json, wiseft.json and frontier.png beside the merged `weights`, and say what is where."""
    from flyp_plugin import record
    from flyp_plugin.checkpoints import atomic_write, locate_weights
    from flyp_plugin.metrics import table

    names = [*weights.values(), record.FILE, "wiseft.json"]
    merged_record = _record_of_merged(args, ends, sets)
    merged_record.write(out)
    said: dict[str, Any] = {"weights": weights[chosen]}
    if args.model_stock:
        said |= {"t": ratios, "sets": results[chosen]}
    else:
        said |= {"chosen_alpha": chosen, "chosen_by": f"{sets[0].name}/top1" if sets else None}
        said["alphas"] = {f"{alpha:.2f}": metrics for alpha, metrics in results.items()}
    folder = ends.record.folder if ends.record else None
    said |= {
        "model": ends.spec.name,
        "last_epoch": max(record.epochs(folder), default=None) if folder else None,
    }
    digest = record.sha256(locate_weights(ends.spec, ends.pretrained))
    said["inputs"] = {
        "finetuned": [record.describe_weights(path) for path in ends.finetuned],
        "pretrained": {"given": ends.pretrained, "sha256": digest},
    }
    text = json.dumps({**said, "versions": merged_record.get("versions")}, indent=1)
    with atomic_write(out / "wiseft.json") as part:
        part.write_text(text + "\n", encoding="utf-8")
    if len(results) > 1:
        names.append("frontier.png")
        with atomic_write(out / "frontier.png") as part:
            draw_frontier(results, chosen, part, args.per_set)
    if args.json:
        sys.stdout.write(text + "\n")
    elif sets:
        labels = {alpha: f"{alpha:.2f}{' *' if alpha == chosen else ''}" for alpha in results}
        labels = {chosen: "Model Stock"} if args.model_stock else labels
        rows = {labels[alpha]: _table_row(by_set) for alpha, by_set in results.items()}
        sys.stdout.write(table(rows, "" if args.model_stock else "alpha") + "\n")
    _log.info(f"Wrote {out}/: {', '.join(names)}.")
    merges = [*out.glob("wise_ft_alpha=*.pt"), *out.glob(_MODEL_STOCK)]
    others = sorted(path.name for path in merges if path.name not in names)
    if others:
        _log.warning(f"{out}/ still holds weights of an earlier merge: {', '.join(others)}.")
    run = out.parent if not args.out and out.name == "wiseft" else out
    data = "" if merged_record.prompts else " --data DIR"
    _log.info(f"Next: flyp export {shlex.quote(str(run))}{data} --format timm --out classifier")


def _record_of_merged(args: argparse.Namespace, ends: EndPoints, sets: "Sequence[EvalSet]") -> "Record":
    """The run's record with what flags changed; of loose files, what is known: the model, and the ID set's classes."""
    from flyp_plugin import record

    content = {**(ends.record.content if ends.record else {}), **record.describe_model(ends.spec)}
    if sets and not ends.record:
        content |= sets[0].prompts.lists()
    if args.pretrained is not None or not ends.record:
        content["pretrained"] = record.describe_weights(ends.pretrained)
    return record.Record(content)


def _table_row(by_set: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Top-1 of each set and the mean over the OOD sets; the calibration error of the ID set, and that mean."""
    id_set = next(iter(by_set))
    row = {f"{name} top1": value for name, value in columns(by_set, [id_set]).items()}
    errors = columns(by_set, [id_set], "ece")
    return row | {f"{name} ece": errors[name] for name in (id_set, OOD) if name in errors}


def parse_alphas(text: str) -> list[float]:
    """A:B:STEP, both ends included, or numbers joined by commas; sorted, without duplicates.

    Raises:
        InputError: neither, outside [0, 1], or finer than 0.01, which file names cannot hold.
    """
    try:
        exact = [100 * float(part) for part in text.split(":" if ":" in text else ",")]
        percents: Sequence[int] = [round(part) for part in exact]
        valid = all(0 <= n <= 100 and abs(part - n) < 1e-7 for part, n in zip(exact, percents))
        if ":" in text:
            start, stop, step = percents
            percents = range(start, stop + 1, step)
    except (ValueError, OverflowError):  # not a number, not three of them, a step of 0, infinity
        valid = False
    if not valid or not percents:
        what = "A:B:STEP or numbers joined by commas, in [0, 1] and multiples of 0.01"
        raise InputError(f"--alphas (or --alpha) {text} must be {what} (0: pretrained, 1: fine-tuned).")
    return sorted({n / 100 for n in percents})
