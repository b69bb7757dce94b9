"""Merging weights: WiSE-FT (arXiv 2109.01903), uniform soups, Model Stock (arXiv 2403.19522).

WiSE-FT takes weights on the line between the pretrained and the fine-tuned model:

    theta(alpha) = (1 - alpha) * theta_pretrained + alpha * theta_finetuned          (eq. 1)

Fine-tuning gains accuracy in distribution (ID) and loses some out of distribution (OOD); a point between the two
models often has both. Model Stock finds a point without data, from several runs. `interpolate`, `average` and
`model_stock` are pure functions of state dicts. `sweep` scores every alpha on every evaluation set while decoding each
image once, and `choose_alpha` takes the best on the ID validation set: the OOD sets never choose. `flyp wiseft`
(commands/wiseft.py) runs all of it on files.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from tqdm import tqdm

from flyp_plugin.checkpoints import Model, StateDict, first_difference
from flyp_plugin.errors import InputError
from flyp_plugin.evalsets import EvalSet, build_for_each, with_progress
from flyp_plugin.heads import ImageClassifier
from flyp_plugin.metrics import Metrics, Tally, best, score

# Bytes of decoded images scored at one alpha before the weights move to the next. Moving costs one pass over the image
# tower's weights, so larger is faster; 256 MiB hold 445 images at 224 pixels.
_BLOCK = 256 << 20


def interpolate(pretrained: StateDict, finetuned: StateDict, alpha: float) -> dict[str, torch.Tensor]:
    """(1 - alpha) * pretrained + alpha * finetuned for every floating-point tensor (WiSE-FT, eq. 1).

    Computed in float32 or wider and returned in the wider dtype of the two. Other tensors (counters) are the
    fine-tuned side's. alpha 0 and 1 return the end points bit for bit.

    Raises:
        InputError: alpha outside [0, 1], or state dicts of different architectures.
    """
    if not 0 <= alpha <= 1:
        raise InputError(f"alpha must be in [0, 1] (0: pretrained, 1: fine-tuned), got {alpha}.")
    check_same_architecture(pretrained, finetuned, "the fine-tuned weights", "the pretrained weights")
    return {key: _interpolate_tensor(tensor, finetuned[key], alpha) for key, tensor in pretrained.items()}


def average(state_dicts: Sequence[StateDict]) -> dict[str, torch.Tensor]:
    """The mean of every floating-point tensor (uniform soup, arXiv 2203.05482); other tensors are the last one's.

    Computed in float64 and returned in float32, or in the tensors' own dtype if that is wider.

    Raises:
        InputError: state dicts of different architectures.
    """
    *_, last = state_dicts
    for number, other in enumerate(state_dicts, 1):
        name = f"checkpoint {number} of {len(state_dicts)}"
        check_same_architecture(last, other, name, "the last checkpoint")
    result = {}
    for key, tensor in last.items():
        if tensor.is_floating_point():
            mean = torch.stack([other[key].double() for other in state_dicts]).mean(dim=0)
            tensor = mean.to(torch.promote_types(tensor.dtype, torch.float32))
        result[key] = tensor.clone()
    return result


def model_stock(
    pretrained: StateDict, finetuned: Sequence[StateDict], ratios: Mapping[str, float] | None = None
) -> dict[str, torch.Tensor]:
    """Model Stock (arXiv 2403.19522): each tensor is t * mean of the runs + (1 - t) * pretrained.

    The runs started from `pretrained` and differ in their seed. Computed in float32 or wider and returned so; other
    tensors (counters) are the last run's. `ratios` are the t by tensor; None: `stock_ratios` of the same weights.

    Raises:
        InputError: fewer than two runs, or state dicts of different architectures.
    """
    ratios, mean = stock_ratios(pretrained, finetuned) if ratios is None else ratios, average(finetuned)
    return {
        key: _interpolate_tensor(start, mean[key], ratios.get(key, 0)) for key, start in pretrained.items()
    }


def stock_ratios(pretrained: StateDict, finetuned: Sequence[StateDict]) -> dict[str, float]:
    """Model Stock's t in [0, 1] for each floating-point tensor that training changed; computed in float64.

    t = k cos / (1 + (k - 1) cos) for k runs, where cos is the mean cosine between two runs' differences from the
    pretrained weights: t is 1 where the runs agree, 0 where they have nothing in common. A layer of the paper is one
    tensor here, so a weight and its bias have a t each, as in mergekit.

    Raises:
        InputError: as `model_stock`.
    """
    number = len(finetuned)
    if number < 2:
        raise InputError("Model Stock goes by the angle between runs: give at least two of them.")
    for i, other in enumerate(finetuned, 1):
        check_same_architecture(pretrained, other, f"checkpoint {i} of {number}", "the pretrained weights")
    ratios = {}
    for key, start in pretrained.items():
        if not start.is_floating_point():
            continue
        deltas = torch.stack([(state[key].double() - start.double()).flatten() for state in finetuned])
        products = deltas @ deltas.T
        lengths = products.diagonal().sqrt()
        if not lengths.any():  # frozen: no angle, and nothing to merge
            continue
        lengths[lengths == 0] = 1  # of a run that left this tensor alone: its cosines are 0
        cosines = products / lengths.outer(lengths)
        cosine = ((cosines.sum() - cosines.trace()) / (number * (number - 1))).item()
        # The paper has runs differ from their centre in orthogonal directions, so the product of two differences is the
        # squared distance between the centre and the pretrained weights: never negative. A negative cosine is noise
        # about 0. Put into the formula it would move away from the runs, without bound near cos = -1 / (k - 1).
        cosine = min(max(cosine, 0.0), 1.0)
        ratios[key] = number * cosine / (1 + (number - 1) * cosine)
    return ratios


def check_same_architecture(expected: StateDict, given: StateDict, name: str, expected_name: str) -> None:
    """Raise InputError, naming the first tensor, if two state dicts differ in keys or shapes."""
    if difference := first_difference(expected, given):
        raise InputError(f"{name} and {expected_name} are of different architectures: {difference}.")


def _interpolate_tensor(pretrained: torch.Tensor, finetuned: torch.Tensor, alpha: float) -> torch.Tensor:
    if not finetuned.is_floating_point():
        return finetuned.clone()
    dtype = torch.promote_types(pretrained.dtype, finetuned.dtype)
    if alpha in (0, 1):
        return (finetuned if alpha else pretrained).to(dtype, copy=True)
    wide = torch.promote_types(dtype, torch.float32)
    return ((1 - alpha) * pretrained.to(wide) + alpha * finetuned.to(wide)).to(dtype)


@torch.no_grad()
def sweep(
    model: Model,  # receives the weights of each alpha in turn, and is left with arbitrary ones
    pretrained: StateDict,  # the end points, of one architecture, preferably on the model's device
    finetuned: StateDict,
    alphas: Sequence[float],
    sets: Sequence[EvalSet],
    tokenizer: Callable,
    loader: Callable[[EvalSet], Iterable[dict[str, Any]]],  # the batches of a set
    precision: str = "fp32",  # open_clip's --precision that the model was built with
) -> dict[float, dict[str, Metrics]]:
    """The metrics of each alpha on each set, decoding every image once whatever the number of alphas.

    Memory: the two end points, `model`, a block of images, and one head (D, C) for each alpha and set. A learned head
    that both end points have is interpolated like the towers; InputError if it lacks a set's class.
    """
    weights = model.state_dict()
    # the heads are built first, so that later only the image side has to move
    image_side = {key: tensor for key, tensor in weights.items() if key.startswith(("visual.", "logit_"))}

    def load(alpha: float, tensors: StateDict) -> None:
        for key, tensor in tensors.items():
            tensor.copy_(_interpolate_tensor(pretrained[key], finetuned[key], alpha))

    classifiers: dict[float, dict[str, ImageClassifier]] = {}  # of the one model, each with its own head
    build = partial(ImageClassifier.from_model, model, tokenizer, precision=precision)
    for alpha in tqdm(alphas, desc="heads", unit="alpha", disable=None):
        load(alpha, weights)
        classifiers[alpha] = build_for_each(sets, build)
    results: dict[float, dict[str, Metrics]] = {alpha: {} for alpha in alphas}
    for eval_set in sets:
        tallies = {alpha: Tally(len(eval_set.prompts.classnames)) for alpha in alphas}
        for block in _blocks(with_progress(loader(eval_set), eval_set.name), model.logit_scale.device):
            for alpha in alphas:
                load(alpha, image_side)
                score(classifiers[alpha][eval_set.name], block, tallies[alpha])
        for alpha in alphas:
            results[alpha][eval_set.name] = tallies[alpha].metrics()
    return results


def _blocks(loader: Iterable[dict[str, Any]], device: torch.device) -> Iterator[list[dict[str, Any]]]:
    """Lists of batches on `device`, of about _BLOCK bytes each."""
    block: list[dict[str, Any]] = []
    size = 0
    for batch in loader:
        # copies: a worker's batch lies in shared memory, which may be no larger than 64 MB
        block.append(
            batch | {"images": batch["images"].to(device, copy=True), "labels": batch["labels"].clone()}
        )
        size += batch["images"].nbytes
        if size >= _BLOCK:
            yield block
            block, size = [], 0
    if block:
        yield block


def choose_alpha(results: Mapping[float, Mapping[str, Mapping[str, Any]]], id_set: str) -> float:
    """The alpha with the best top-1 on the ID validation set; the smallest of equal ones."""
    return best({alpha: by_set[id_set]["top1"] for alpha, by_set in results.items()})
