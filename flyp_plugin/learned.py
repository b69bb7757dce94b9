"""A learned linear head beside a CLIP model's towers: its class names travel with it; and how a linear probe is fitted.

The zero-shot head, and classifiers from either, are heads.py's. What trains a head is in objectives.py.
"""

import json
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from flyp_plugin.errors import InputError
from flyp_plugin.names import to_unique_keys
from flyp_plugin.precision import full_float32
from flyp_plugin.prompts import ClassPrompts

HEAD = "class_head"  # its name in the model, and so its key in checkpoints
_CHUNK = 65536  # features at a time in float64: 256 MiB at a width of 512


class ClassHead(nn.Module):
    """A learned linear head: logits = weight @ normalised image feature, a row a class.

    It starts as the zero-shot head times logit_scale.exp(), as in WiSE-FT's code (arXiv 2109.01903), and has no bias,
    as that has none: timm's classifiers, which do not normalise, can then rank as it does. Its class names travel
    with it, as JSON in a uint8 tensor, so that a state_dict holds tensors alone.

    Args:
        weight: float (C, D), logit_scale.exp() included.
        prompts: the C class names, and the templates that the head started from.
    """

    prompts: Tensor

    def __init__(self, weight: Tensor, prompts: ClassPrompts):
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone(memory_format=torch.contiguous_format).float())
        text = json.dumps({"classnames": prompts.classnames, "templates": prompts.templates})
        raw = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
        self.register_buffer("prompts", raw.to(weight.device))

    def forward(self, features: Tensor) -> Tensor:
        """Normalised features (B, D) -> float32 logits (B, C)."""
        return exact_logits(features, self.weight)

    @property
    def class_prompts(self) -> ClassPrompts:
        """The class names and templates that `prompts` holds."""
        return _read(self.prompts)

    def restricted(self, classnames: Sequence[str]) -> Tensor:
        """The rows of these class names, in their order: (len(classnames), D).

        Raises:
            InputError: a name that the head does not have.
        """
        return self.weight.detach()[class_rows(self.class_prompts.classnames, classnames)]


def head_of(state: Mapping[str, Tensor]) -> ClassHead | None:
    """The learned head in a state_dict; None where it has none."""
    if f"{HEAD}.weight" not in state:
        return None
    return ClassHead(state[f"{HEAD}.weight"], _read(state[f"{HEAD}.prompts"]))


def _read(prompts: Tensor) -> ClassPrompts:
    places = ("the learned head's class names, entry", "the learned head's templates, entry")
    return ClassPrompts(**json.loads(bytes(prompts.cpu().numpy())), places=places)


def exact_logits(features: Tensor, weight: Tensor) -> Tensor:
    """features (B, D) @ weight (C, D)^T in float32, whatever --precision: bfloat16 logits are often equal.

    So it is on a GPU that is allowed TF32; the products of the gradient are then in TF32.
    """
    with torch.autocast(features.device.type, enabled=False):
        features, weight = features.float(), weight.float().T
        return _float32_product(features, weight) if features.is_cuda else features @ weight


@torch.compiler.disable  # a compiled graph would hold the product, but not what it is to be run with
def _float32_product(a: Tensor, b: Tensor) -> Tensor:
    with full_float32():
        return a @ b


def class_rows(known: Sequence[str], wanted: Sequence[str], where: str = "the set") -> list[int]:
    """Where the names `wanted` are in `known`, compared as in names.py; of a name that is there twice, as in ImageNet,
    the first is the first.

    Raises:
        InputError: a name that is not there.
    """
    rows = {key: row for row, key in enumerate(to_unique_keys(known))}
    missing = [key[0] for key in to_unique_keys(wanted) if key not in rows]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        some = ", ".join(known[:5]) + (", ..." if len(known) > 5 else "")
        raise InputError(
            f"the learned head has no class {missing[0]!r}{more} of {where}, only the {len(known)} that it was trained "
            f"on ({some}); give class names that are among them."
        )
    return [rows[key] for key in to_unique_keys(wanted)]


def fit_head(features: Tensor, labels: Tensor, num_classes: int, c: float) -> Tensor:
    """The weight (C, D) of a linear probe: L2-regularised multinomial logistic regression, by L-BFGS in float64.

    It minimises sum_i cross_entropy(W f_i, y_i) + |W|^2 / (2 c), the objective of scikit-learn's
    LogisticRegression(C=c, fit_intercept=False). That is strictly convex: where it starts (at zero) changes nothing.
    With several ranks each brings its part of the images, and all get the head of the whole.

    Args:
        features: float (N, D), normalised.
        labels: int64 (N,), in 0..num_classes-1.
        c: inverse strength of the regularisation; larger is weaker.

    Raises:
        InputError: no rank has an image.
    """
    weight = torch.zeros(num_classes, features.shape[1], dtype=torch.float64, device=features.device)
    weight.requires_grad_()
    number = _sum_over_ranks(torch.tensor(float(len(features)), device=features.device))
    if not number:
        raise InputError("there is no image to fit the head to; check the shards and --image-key.")
    optimizer = torch.optim.LBFGS(
        [weight], max_iter=1000, tolerance_grad=1e-8, tolerance_change=1e-13, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        weight.grad = torch.zeros_like(weight)
        total = torch.zeros((), dtype=torch.float64, device=weight.device)
        for part, classes in zip(features.split(_CHUNK), labels.split(_CHUNK)):
            loss = F.cross_entropy(part.double() @ weight.T, classes, reduction="sum") / number
            loss.backward()
            total += loss.detach()
        _sum_over_ranks(weight.grad)
        weight.grad += weight.detach() / (c * number)
        return _sum_over_ranks(total) + weight.detach().square().sum() / (2 * c * number)

    optimizer.step(closure)  # type: ignore[arg-type]
    result = weight.detach().float()
    if dist.is_initialized():
        dist.broadcast(result, 0)  # other hardware may round otherwise
    return result


def _sum_over_ranks(tensor: Tensor) -> Tensor:
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor
