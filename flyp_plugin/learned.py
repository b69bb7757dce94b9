"""Learned linear heads, and how a linear probe is fitted.

A learned head (ClassHead) is a module beside a CLIP model's towers, `model.class_head`. Objectives that train one
(objectives.py) start it from the zero-shot head of heads.py; its class names are saved with it in the checkpoint.
"""

import json
from collections.abc import Mapping, Sequence
from textwrap import shorten
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from flyp_plugin import sharding
from flyp_plugin.errors import InputError
from flyp_plugin.names import to_unique_keys
from flyp_plugin.precision import full_float32
from flyp_plugin.prompts import ClassPrompts

HEAD = "class_head"  # name of the attribute of the model, and so of the keys in checkpoints
# The default C of linear probes. CLIP's example code has 0.316 for features that are not normalised and have a norm of
# about 10; features with norm 1 need 100 times that.
LP_C = 31.6
_CHUNK = 65536  # features multiplied at a time: in float64, 256 MiB at a width of 512


class ClassHead(nn.Module):
    """A learned linear head: logits = weight @ normalised image feature, one row per class.

    It has no bias, like the head of WiSE-FT's code (arXiv 2109.01903): so a timm classifier, which does not normalise
    features, still ranks the classes the same. Class names and prompts are JSON in a uint8 tensor, so that a state_dict
    with a head holds only tensors.

    Args:
        weight: float (C, D), including the factor logit_scale.exp().
        prompts: the C class names, and the prompts of the zero-shot head from which training starts.
    """

    prompts: Tensor

    def __init__(self, weight: Tensor, prompts: ClassPrompts):
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone(memory_format=torch.contiguous_format).float())
        raw = torch.frombuffer(bytearray(json.dumps(prompts.lists()).encode()), dtype=torch.uint8)
        self.register_buffer("prompts", raw.to(weight.device))

    def forward(self, features: Tensor) -> Tensor:
        """Normalised features (B, D) -> float32 logits (B, C)."""
        return exact_logits(features, self.weight)

    @property
    def class_prompts(self) -> ClassPrompts:
        """The class names and prompts as text."""
        return _decode_prompts(self.prompts)

    def restricted(self, classnames: Sequence[str]) -> Tensor:
        """The rows of these class names, in this order: (len(classnames), D); InputError for an unknown name."""
        return self.weight.detach()[find_class_rows(self.class_prompts.classnames, classnames)]


def load_head(state: Mapping[str, Tensor]) -> ClassHead | None:
    """The learned head in a state_dict; None if there is none."""
    if f"{HEAD}.weight" not in state:
        return None
    return ClassHead(state[f"{HEAD}.weight"], _decode_prompts(state[f"{HEAD}.prompts"]))


def _decode_prompts(prompts: Tensor) -> ClassPrompts:
    lists = ("class names, entry", "templates, entry", "descriptions")
    places = [f"the learned head's {name}" for name in lists]
    return ClassPrompts(**json.loads(bytes(prompts.cpu().numpy())), places=places)


def exact_logits(features: Tensor, weight: Tensor) -> Tensor:
    """features (B, D) @ weight (C, D)^T in float32, whatever --precision is: in bfloat16 many logits are equal.

    TF32 is switched off too, for the forward pass; gradients on a GPU that is allowed TF32 are computed in it.
    """
    with torch.autocast(features.device.type, enabled=False):
        features, weight = features.float(), weight.float().T
        return _float32_product(features, weight) if features.is_cuda else features @ weight


@torch.compiler.disable  # a compiled graph would not switch TF32 off
def _float32_product(a: Tensor, b: Tensor) -> Tensor:
    with full_float32():
        return a @ b


def set_logit_scale(model: Any, scale: float) -> None:
    """Make logit_scale.exp() `scale`, also in the weights of a learned head. The model may be sharded."""
    head = getattr(model, HEAD, None)
    if head is not None:
        sharding.assign(head.weight, head.weight.detach() * (scale / model.logit_scale.detach().exp()))
    sharding.assign(model.logit_scale, torch.full_like(model.logit_scale.detach(), scale).log())


def find_class_rows(known: Sequence[str], wanted: Sequence[str], where: str = "the set") -> list[int]:
    """The index in `known` of each name in `wanted`; InputError if a name is missing.

    Names are compared as in names.py; the n-th of equal names (ImageNet has some) matches the n-th.
    """
    rows = {key: row for row, key in enumerate(to_unique_keys(known))}
    if missing := [key[0] for key in to_unique_keys(wanted) if key not in rows]:
        some = shorten(", ".join(known), 60, placeholder=" ...")
        raise InputError(
            f"the learned head has no class {missing[0]!r} of {where} ({len(missing)} missing), only the {len(known)} that "
            f"it was trained on ({some}); choose class names from those."
        )
    return [rows[key] for key in to_unique_keys(wanted)]


def fit_head(
    features: Tensor, labels: Tensor, num_classes: int, c: float, dtype: torch.dtype | None = None
) -> Tensor:
    """The weight (C, D) of a linear probe: L2-regularised multinomial logistic regression, by L-BFGS.

    It minimises sum_i cross_entropy(W f_i, y_i) + |W|^2 / (2 c), like scikit-learn's LogisticRegression(C=c,
    fit_intercept=False): strictly convex, so the start (zero) does not matter. Each rank brings its part of the images,
    and all get the head of the whole set.

    Args:
        features: float (N, D), normalised.
        labels: int64 (N,), in 0..num_classes-1.
        c: inverse strength of the regularisation.
        dtype: of weights and products. Default: float64 on a CPU; elsewhere float32, because most GPUs compute float64 at
            1/64 of the speed or, on MPS, not at all. Losses are summed in float64 everywhere, or the line search would stop
            early; the minimum then is within 2e-7 of float64's, and the accuracy within an image.
    """
    device = features.device
    dtype = dtype or (torch.float64 if device.type == "cpu" else torch.float32)
    adds = torch.device("cpu") if device.type == "mps" else device  # where losses are summed
    reduction = "sum" if dtype == torch.float64 else "none"
    weight = torch.zeros(num_classes, features.shape[1], dtype=dtype, device=device, requires_grad=True)
    number = _sum_over_ranks(torch.tensor(float(len(features)), device=device))
    optimizer = torch.optim.LBFGS(
        [weight], max_iter=1000, tolerance_grad=1e-8, tolerance_change=1e-13, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        weight.grad = torch.zeros_like(weight)
        total = torch.zeros((), dtype=torch.float64, device=adds)
        for part, classes in zip(features.split(_CHUNK), labels.split(_CHUNK)):
            losses = F.cross_entropy(part.to(dtype) @ weight.T, classes, reduction=reduction)
            loss = losses.to(adds).double().sum() / number.to(adds)
            loss.backward()
            total += loss.detach()
        _sum_over_ranks(weight.grad)
        weight.grad += weight.detach() / (c * number)
        penalty = weight.detach().square().sum() / (2 * c * number)
        return _sum_over_ranks(total) + penalty.to(adds)

    with full_float32():
        optimizer.step(closure)  # type: ignore[arg-type]
    result = weight.detach().float()
    if dist.is_initialized():
        dist.broadcast(result, 0)  # ranks on other hardware may round differently
    return result


def _sum_over_ranks(tensor: Tensor) -> Tensor:
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor
