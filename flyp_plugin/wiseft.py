"""WiSE-FT (arXiv 2109.01903): weights between the pretrained and the fine-tuned model, and which to choose.

`interpolate` and `average` are pure; the sweep scores all alphas on each decoded image. Files are merge.py's.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from tqdm import tqdm

from flyp_plugin.checkpoints import Model, StateDict, first_difference
from flyp_plugin.errors import InputError
from flyp_plugin.evalsets import EvalSet, with_progress
from flyp_plugin.heads import ImageClassifier
from flyp_plugin.metrics import Metrics, Tally, best, score

# Bytes of decoded images scored under one alpha before the weights are moved to the next. Larger: fewer
# moves, which cost one pass over the image tower's weights each; 256 MiB are 445 images at 224 pixels.
_BLOCK = 256 << 20


def interpolate(pretrained: StateDict, finetuned: StateDict, alpha: float) -> dict[str, torch.Tensor]:
    """(1 - alpha) * pretrained + alpha * finetuned, over every floating-point tensor (WiSE-FT, eq. 1).

    Computed in float32 or wider, given back in the wider type of the two. Other tensors (counters) are the
    fine-tuned side's. alpha 0 and 1 give the end points to the last bit.

    Raises:
        InputError: alpha outside [0, 1], or state dicts of different architectures.
    """
    if not 0 <= alpha <= 1:
        raise InputError(f"alpha {alpha} is outside [0, 1]; 0 is the pretrained and 1 the fine-tuned model.")
    check_same(pretrained, finetuned, "the fine-tuned weights", "the pretrained ones")
    return {key: _between(tensor, finetuned[key], alpha) for key, tensor in pretrained.items()}


def average(state_dicts: Sequence[StateDict]) -> dict[str, torch.Tensor]:
    """The mean of every floating-point tensor (uniform soup, arXiv 2203.05482); others are the last one's.

    Computed in float64, given back in float32 or the tensors' own wider type.

    Raises:
        InputError: state dicts of different architectures.
    """
    *_, last = state_dicts
    for number, other in enumerate(state_dicts, 1):
        check_same(last, other, f"checkpoint {number} of {len(state_dicts)} to average", "the last one")
    result = {}
    for key, tensor in last.items():
        if tensor.is_floating_point():
            mean = torch.stack([other[key].double() for other in state_dicts]).mean(dim=0)
            tensor = mean.to(torch.promote_types(tensor.dtype, torch.float32))
        result[key] = tensor.clone()
    return result


def check_same(expected: StateDict, given: StateDict, name: str, expected_name: str) -> None:
    """InputError, naming the first tensor, where two state dicts are not of one architecture."""
    difference = first_difference(expected, given)
    if difference:
        raise InputError(f"{name} are not of the architecture of {expected_name}: {difference}.")


def _between(pretrained: torch.Tensor, finetuned: torch.Tensor, alpha: float) -> torch.Tensor:
    if not finetuned.is_floating_point():
        return finetuned.clone()
    dtype = torch.promote_types(pretrained.dtype, finetuned.dtype)
    if alpha in (0, 1):
        return (finetuned if alpha else pretrained).to(dtype, copy=True)
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
        pretrained, finetuned: the end points, best on the model's device. A learned head that the model and both have
            moves with the towers, and is each set's head by its class names.
        loader: gives a set's batches.
        precision: open_clip's --precision that the model was made with.

    Raises:
        InputError: end points of different architectures, or class names that a learned head does not have.
    """
    check_same(pretrained, finetuned, "the fine-tuned weights", "the pretrained ones")
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
            classifier = ImageClassifier.from_model(model, tokenizer, eval_set.prompts, precision)
            heads[alpha, eval_set.name] = classifier.head
    results: dict[float, dict[str, Metrics]] = {alpha: {} for alpha in alphas}
    for eval_set in sets:
        names = eval_set.prompts.classnames
        tallies = {alpha: Tally(len(names)) for alpha in alphas}
        for block in _blocks(with_progress(loader(eval_set), eval_set.name), model.logit_scale.device):
            for alpha in alphas:
                move_to(alpha, image_side)
                classifier = ImageClassifier(model, heads[alpha, eval_set.name], names, precision)
                score(classifier, block, tallies[alpha])
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
    return best({alpha: by_set[first]["top1"] for alpha, by_set in results.items()})
