"""WiSE-FT (arXiv 2109.01903): weights between the pretrained and the fine-tuned model, and the alpha to choose.

`interpolate` and `average` are pure; the sweep scores all alphas on each decoded image; `flyp wiseft` writes.
"""

import argparse
import importlib.util
import json
import logging
import math
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import open_clip
import torch
from tqdm import tqdm

import flyp_plugin
from flyp_plugin.checkpoints import (
    Model,
    StateDict,
    first_difference,
    model_from_args,
    read_state_dict,
    refuse_existing,
    replacing,
    sha256,
    weights_file,
)
from flyp_plugin.errors import InputError
from flyp_plugin.evalsets import EvalSet, loader_from_args, parse_eval_sets, with_progress
from flyp_plugin.heads import ImageClassifier, val_preprocess
from flyp_plugin.metrics import Metrics, Tally, mean_ood, score, table
from flyp_plugin.plots import draw_frontier

# Bytes of decoded images scored under one alpha before the weights are moved to the next. Larger: fewer moves, which
# cost one pass over the image tower's weights each; 256 MiB are 445 images at 224 pixels.
_BLOCK = 256 << 20
_log = logging.getLogger(__name__)


def interpolate(pretrained: StateDict, finetuned: StateDict, alpha: float) -> dict[str, torch.Tensor]:
    """(1 - alpha) * pretrained + alpha * finetuned, over every floating-point tensor (WiSE-FT, eq. 1).

    Computed in float32 or wider, given back in the wider type of the two. Other tensors (counters) are the
    fine-tuned side's. alpha 0 and 1 give the end points to the last bit.

    Raises:
        InputError: alpha outside [0, 1], or state dicts of different architectures.
    """
    if not 0 <= alpha <= 1:
        raise InputError(f"alpha {alpha} is outside [0, 1]; 0 is the pretrained and 1 the fine-tuned model.")
    _check_same(pretrained, finetuned, "the fine-tuned weights", "the pretrained ones")
    return {key: _between(tensor, finetuned[key], alpha) for key, tensor in pretrained.items()}


def average(state_dicts: Sequence[StateDict]) -> dict[str, torch.Tensor]:
    """The mean of every floating-point tensor (a uniform soup, arXiv 2203.05482); other tensors are the last one's.

    Computed in float64, given back in float32 or the tensors' own wider type.

    Raises:
        InputError: state dicts of different architectures.
    """
    *_, last = state_dicts
    for number, other in enumerate(state_dicts, 1):
        _check_same(last, other, f"checkpoint {number} of {len(state_dicts)} to average", "the last one")
    result = {}
    for key, tensor in last.items():
        if tensor.is_floating_point():
            mean = torch.stack([other[key].double() for other in state_dicts]).mean(dim=0)
            tensor = mean.to(torch.promote_types(tensor.dtype, torch.float32))
        result[key] = tensor
    return result


def _check_same(expected: StateDict, given: StateDict, name: str, expected_name: str) -> None:
    difference = first_difference(expected, given)
    if difference:
        raise InputError(f"{name} are not of the architecture of {expected_name}: {difference}.")


def _between(pretrained: torch.Tensor, finetuned: torch.Tensor, alpha: float) -> torch.Tensor:
    if not finetuned.is_floating_point():
        return finetuned
    dtype = torch.promote_types(pretrained.dtype, finetuned.dtype)
    if alpha in (0, 1):
        return (finetuned if alpha else pretrained).to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    return ((1 - alpha) * pretrained.to(wide) + alpha * finetuned.to(wide)).to(dtype)


@torch.no_grad()
def sweep(
    model: Model,
    pretrained: StateDict,
    finetuned: StateDict,
    alphas: Sequence[float],
    sets: Sequence[EvalSet],
    tokenizer: Callable,
    loader: Callable[[EvalSet], Iterable[dict[str, Any]]],
    precision: str = "fp32",
) -> dict[float, dict[str, Metrics]]:
    """The metrics of each alpha on each set; every image is decoded once, whatever the number of alphas.

    Memory: the end points, `model`, a block of images, and a head (D, C) an alpha and set.

    Args:
        model: is given the weights of each alpha in turn; those it is left with mean nothing.
        pretrained, finetuned: the end points, best on the model's device.
        loader: gives a set's batches.
        precision: open_clip's --precision that the model was made with.

    Raises:
        InputError: end points of different architectures.
    """
    _check_same(pretrained, finetuned, "the fine-tuned weights", "the pretrained ones")
    weights = model.state_dict()
    # once the heads are built, the text tower need not follow
    image_side = {key: tensor for key, tensor in weights.items() if key.startswith(("visual.", "logit_"))}

    def move_to(alpha: float, tensors: StateDict) -> None:
        for key, tensor in tensors.items():
            tensor.copy_(_between(pretrained[key], finetuned[key], alpha))

    heads: dict[tuple[float, str], torch.Tensor] = {}
    for alpha in tqdm(alphas, desc="heads", unit="alpha", disable=None):
        move_to(alpha, weights)
        for eval_set in sets:
            heads[alpha, eval_set.name] = ImageClassifier.from_prompts(model, tokenizer, eval_set.prompts, precision).head
    results: dict[float, dict[str, Metrics]] = {alpha: {} for alpha in alphas}
    for eval_set in sets:
        names = eval_set.prompts.classnames
        tallies = {alpha: Tally(len(names)) for alpha in alphas}
        for block in _blocks(with_progress(loader(eval_set), eval_set.name), model.logit_scale.device):
            for alpha in alphas:
                move_to(alpha, image_side)
                score(ImageClassifier(model, heads[alpha, eval_set.name], names, precision), block, tallies[alpha])
        for alpha in alphas:
            results[alpha][eval_set.name] = tallies[alpha].metrics()
    return results


def _blocks(loader: Iterable[dict[str, Any]], device: torch.device) -> Iterator[list[dict[str, Any]]]:
    block: list[dict[str, Any]] = []
    size = 0
    for batch in loader:
        # copied: what came from a worker lies in shared memory, of which there may be no more than 64 MB
        tensors = {key: batch[key].to(device, copy=True) for key in ("images", "labels")}
        size += tensors["images"].nbytes
        block.append({**batch, **tensors})
        if size >= _BLOCK:
            yield block
            block, size = [], 0
    if block:
        yield block


def choose(results: Mapping[float, Mapping[str, Metrics]], first: str) -> float:
    """The alpha with the best top-1 on the set `first` alone; of equal ones the smallest."""
    return max(results, key=lambda alpha: (results[alpha][first]["top1"], -alpha))


def parse_alphas(text: str) -> list[float]:
    """START:STOP:STEP, both ends included, or numbers joined by commas; in order, each once.

    Raises:
        InputError: not that, outside [0, 1], or finer than 0.01, which is what the files' names tell apart.
    """
    parts = text.split(":")
    try:
        if len(parts) == 3:
            start, stop, step = map(float, parts)
            # a little grace at the end, for 0.1 is no binary fraction
            if abs(step) < 0.0099:
                raise ValueError
            alphas = [start + i * step for i in range(math.floor((stop - start) / step + 1e-6) + 1)]
        else:
            alphas = [float(part) for part in text.split(",")]
    except (ValueError, ZeroDivisionError, OverflowError):
        alphas = []
    if not alphas:
        raise InputError(f"{text!r} is not START:STOP:STEP or numbers joined by commas, no finer than 0.01; for instance 0:1:0.1.")
    for alpha in alphas:
        if not -1e-9 <= alpha <= 1 + 1e-9:
            raise InputError(f"alpha {alpha:g} is outside [0, 1]; 0 is the pretrained and 1 the fine-tuned model.")
        if abs(alpha - round(alpha, 2)) > 1e-9:
            raise InputError(f"alpha {alpha:g} is finer than 0.01, which the names of the files cannot tell; round it.")
    return sorted({abs(round(alpha, 2)) for alpha in alphas})


def wiseft_command(args: argparse.Namespace) -> None:
    """`flyp wiseft`: sweep, choose, merge and write; the table or the JSON goes to stdout.

    Raises:
        InputError: as its parts; nothing is written then.
    """
    alphas = parse_alphas(args.alphas) if args.alpha is None else parse_alphas(str(args.alpha))
    sets = parse_eval_sets(args.eval_data or [], args.classnames, args.templates)
    out = Path(args.out)
    draw = len(alphas) > 1
    if draw and not sets:
        raise InputError("which alpha is best can only be told from data; give --eval-data NAME=SHARDS, or one --alpha.")
    if draw and importlib.util.find_spec("matplotlib") is None:
        raise InputError("frontier.png needs matplotlib; pip install 'flyp-plugin[plot]'.")
    for name in [merged_name(alpha) for alpha in alphas] + ["wiseft.json", *(["frontier.png"] if draw else [])]:
        refuse_existing(out / name, args.force)
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} cannot be made a folder: there is a file of that name; give another --out.")
    source = model_from_args(args, args.pretrained, "fp32")
    in_fp32 = args.precision in ("fp32", "amp", "amp_bf16", "amp_bfloat16")
    model = source if in_fp32 else model_from_args(args, args.pretrained)
    pretrained = {key: t.clone() if in_fp32 else t for key, t in source.state_dict().items()}
    finetuned_paths = args.average or [args.finetuned]
    given = [read_state_dict(path) for path in finetuned_paths]
    finetuned = average(given) if args.average else given[0]
    _check_same(pretrained, finetuned, " + ".join(finetuned_paths), args.pretrained)
    finetuned = {key: tensor.to(model.logit_scale.device) for key, tensor in finetuned.items()}
    results: dict[float, dict[str, Metrics]] = {alpha: {} for alpha in alphas}
    chosen = alphas[0]
    if sets:
        tokenizer, preprocess = open_clip.get_tokenizer(args.model), val_preprocess(model)
        results = sweep(
            model,
            pretrained,
            finetuned,
            alphas,
            sets,
            tokenizer,
            lambda eval_set: loader_from_args(eval_set, preprocess, args),
            args.precision,
        )
        chosen = choose(results, sets[0].name)
    for alpha in alphas if args.save_all else [chosen]:
        merged = interpolate(pretrained, finetuned, alpha)
        with replacing(out / merged_name(alpha)) as part:
            torch.save({key: tensor.cpu().contiguous() for key, tensor in merged.items()}, part)
    record = {
        "model": args.model,
        "chosen_alpha": chosen,
        "chosen_by": f"{sets[0].name}/top1" if sets else None,
        "alphas": {f"{alpha:.2f}": metrics for alpha, metrics in results.items()},
        "inputs": {
            "pretrained": _input(args.pretrained, weights_file(args.model, args.pretrained)),
            "finetuned": [_input(path, path) for path in finetuned_paths],
        },
        "versions": {"flyp_plugin": flyp_plugin.__version__, "open_clip": open_clip.__version__, "torch": torch.__version__},
    }
    text = json.dumps(record, indent=1)
    with replacing(out / "wiseft.json") as part:
        part.write_text(text + "\n", encoding="utf-8")
    if draw:
        draw_frontier(results, chosen, out / "frontier.png", args.per_set)
    if args.json:
        sys.stdout.write(text + "\n")
    elif sets:
        sys.stdout.write(table(_rows(results, chosen), "alpha") + "\n")
    best = out / merged_name(chosen)
    _log.info(f"Wrote {out}/: {', '.join(sorted(path.name for path in out.iterdir()))}.")
    data = f" --data {shlex.quote(sets[0].source)}" if sets else " --data DIR"
    _log.info(
        f"Next: flyp export {shlex.quote(str(best))} --model {shlex.quote(args.model)}{data} --format timm --out classifier"
    )


def merged_name(alpha: float) -> str:
    return f"wise_ft_alpha={alpha:.2f}.pt"


def _input(given: str, path: str) -> dict[str, str]:
    return {"given": given, "sha256": sha256(path)}


def _rows(results: Mapping[float, Mapping[str, Metrics]], chosen: float) -> dict[str, dict[str, float]]:
    rows = {}
    for alpha, by_set in results.items():
        row = {f"{name} top1": metrics["top1"] for name, metrics in by_set.items()}
        ood = mean_ood(by_set)
        rows[f"{alpha:.2f}{' *' if alpha == chosen else ''}"] = row | ({} if ood is None else {"mean OOD": ood})
    return rows
