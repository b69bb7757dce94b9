"""The paper's other objectives for open_clip's unchanged loop: what a model gives to the loss, the losses.

An objective is one entry of OBJECTIVES, at the end of this file: a function from (model, images, tokens, labels) to
the dict that open_clip's loop hands to the loss, and the loss. Learned heads are learned.py's.
"""

import math
import re
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import open_clip
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from flyp_plugin.errors import InputError
from flyp_plugin.flags import COLLISIONS, to_argv
from flyp_plugin.learned import HEAD, exact_logits

Outputs = dict[str, Tensor]


class ClassLoss(nn.Module):
    """Cross-entropy of class logits; over ranks, the mean that DistributedDataParallel takes is that of all images."""

    def forward(
        self, class_logits: Tensor, labels: Tensor, logit_scale: Tensor, output_dict: bool = False
    ) -> Any:
        """class_logits (B, C), labels int64 (B,) -> the loss, as {"ce_loss": ...} with `output_dict`."""
        loss = F.cross_entropy(class_logits, labels)
        return {"ce_loss": loss} if output_dict else loss


class PairLoss(nn.Module):
    """FLYP's contrastive loss (arXiv 2212.00638, sec. 3) with another treatment of class collisions, and more terms.

    Args:
        collisions: two pairs of one class in a batch are negatives of each other ("keep", the paper's recipe, which
            is ClipLoss), are left out of each other's softmax ("mask"), or share the target evenly ("soft").
        ce_weight: adds this times the cross-entropy of the images over the batch's class head, whose rows are the
            normalised mean text features of each class in the batch.
        local_loss, gather_with_grad, rank, world_size: as in open_clip.ClipLoss; the batch is that of all ranks.
    """

    def __init__(
        self,
        collisions: str = "keep",
        ce_weight: float = 0.0,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ):
        super().__init__()
        if collisions not in COLLISIONS:
            raise ValueError(f"collisions is {collisions!r}, not one of {', '.join(COLLISIONS)}")
        self.collisions, self.ce_weight = collisions, ce_weight
        self.local_loss, self.gather_with_grad = local_loss, gather_with_grad
        self.rank, self.world_size = rank, world_size

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        labels: Tensor,
        logit_bias: Tensor | None = None,
        output_dict: bool = False,
    ) -> Any:
        """Features (B, D), both normalised, labels int64 (B,) -> the loss, in its parts with `output_dict`."""
        rows, columns, first = self._batches(image_features, text_features, labels)
        own = torch.arange(len(rows[2]), device=labels.device) + first  # the column of a row's own pair
        bias = 0 if logit_bias is None else logit_bias
        of_images = logit_scale * rows[0] @ columns[1].T + bias
        of_texts = logit_scale * rows[1] @ columns[0].T + bias
        same = rows[2][:, None] == columns[2]
        softmaxes = [self._softmax(logits, own, same) for logits in (of_images, of_texts)]
        parts = {"contrastive_loss": sum(softmaxes) / 2}
        if self.ce_weight:
            head, index = batch_head(columns[1], columns[2])
            logits = logit_scale.float() * exact_logits(rows[0], head)
            parts["ce_loss"] = self.ce_weight * F.cross_entropy(logits, index[own])
        return parts if output_dict else sum(parts.values())

    def _softmax(self, logits: Tensor, own: Tensor, same: Tensor) -> Tensor:
        if self.collisions == "soft":
            return F.cross_entropy(logits, (same / same.sum(dim=1, keepdim=True)).to(logits.dtype))
        if self.collisions == "mask":
            others = same.scatter(1, own[:, None], False)
            logits = logits.masked_fill(others, float("-inf"))
        return F.cross_entropy(logits, own)

    def _batches(self, *local: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], int]:
        """(images, texts, labels) of the rows and of the columns of the logits, and the first row's own column."""
        if self.world_size == 1:
            return local, local, 0
        images, texts = open_clip.loss.gather_features(
            *local[:2], self.local_loss, self.gather_with_grad, self.rank, self.world_size
        )
        labels = [torch.empty_like(local[2]) for _ in range(self.world_size)]
        dist.all_gather(labels, local[2].contiguous())
        everything = (images, texts, torch.cat(labels))
        if self.local_loss:
            return local, everything, self.rank * len(local[2])
        return everything, everything, 0


def batch_head(text_features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The head of the K classes in a batch: (K, D), normalised mean text features, and each pair's row in it (B,)."""
    classes, index = labels.unique(return_inverse=True)
    sums = text_features.new_zeros(len(classes), text_features.shape[1]).index_add(0, index, text_features)
    return F.normalize(sums, dim=-1), index


# What a model gives to the loss, from itself, its plain forward, images, tokens (B, L) and labels (B,). Under
# --accum-freq the loop puts all but logit_scale together along the first dimension: so an entry has B rows.


def _pairs(model: Any, forward: Callable, images: Tensor, tokens: Tensor, labels: Tensor) -> Outputs:
    return {**forward(images, tokens), "labels": labels}


def _learned(model: Any, forward: Callable, images: Tensor, tokens: Tensor, labels: Tensor) -> Outputs:
    logits = model.class_head(model.encode_image(images, normalize=True))
    return {"class_logits": logits, "labels": labels, "logit_scale": model.logit_scale.exp()}


def _from_text(model: Any, forward: Callable, images: Tensor, tokens: Tensor, labels: Tensor) -> Outputs:
    """Over the head that the text tower gives now, each class in one template at random, as in the paper's code."""
    classes, templates = model.class_tokens.table.shape[:2]
    prompts = model.class_tokens.take(range(classes), torch.randint(templates, (classes,)).tolist())
    head = model.encode_text(prompts.to(images.device), normalize=True)
    scale = model.logit_scale.exp()
    logits = scale.float() * exact_logits(model.encode_image(images, normalize=True), head)
    return {"class_logits": logits, "labels": labels, "logit_scale": scale}


@dataclass(frozen=True)
class Objective:
    """How a model is trained.

    Attributes:
        outputs: what the model gives to the loss in training.
        loss: that loss, from open_clip's and FLYP's flags.
        trains: a regular expression that the names of the parameters that learn begin with.
        learned_head: there is a ClassHead; else the text tower gives the head.
        fit: that head is fitted to the features of the frozen image tower, before the first epoch.
        loop: open_clip's loop trains; else the fit is all.
    """

    outputs: Callable[..., Outputs]
    loss: Callable[[Namespace], nn.Module] = lambda args: ClassLoss()
    trains: str = ""
    learned_head: bool = False
    fit: bool = False
    loop: bool = True

    def install(self, model: Any) -> None:
        """Make `model`, in training, take tokens (B, L + 1), labels last, and give `outputs`; in eval it is as before.

        To be called before DistributedDataParallel, torch.compile and the optimizer. A learned head or, for flyp-ce,
        `class_tokens` are there already.
        """
        plain = model.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            if not model.training:
                return plain(*args, **kwargs)
            images, texts = args
            return self.outputs(model, plain, images, texts[:, :-1], texts[:, -1])

        model.forward = forward
        for name, parameter in model.named_parameters():
            if not re.match(self.trains, name):  # DistributedDataParallel would wait for its gradient
                parameter.requires_grad_(False)


def _pair_loss(args: Namespace) -> nn.Module:
    gather = args.local_loss, args.gather_with_grad, args.rank, args.world_size
    return PairLoss(args.collisions, args.ce_weight, *gather)


_IMAGE_SIDE = rf"visual\.|{HEAD}\."
OBJECTIVES = {
    "flyp": Objective(_pairs, _pair_loss),
    "ce": Objective(_learned, trains=_IMAGE_SIDE, learned_head=True),
    "lp": Objective(_learned, trains=rf"{HEAD}\.", learned_head=True, fit=True, loop=False),
    "lp-ft": Objective(_learned, trains=_IMAGE_SIDE, learned_head=True, fit=True),
    "flyp-ce": Objective(_from_text, trains="(?!logit_bias)"),
}


def changes(args: Namespace) -> list[str]:
    """The flags given that change the training from plain FLYP, as a user writes them."""
    flags = {"objective": "flyp", "collisions": "keep", "ce_weight": 0.0}
    given = {name: getattr(args, name) for name, default in flags.items() if getattr(args, name) != default}
    return [" ".join(to_argv({name: value})) for name, value in given.items()]


def check_flags(args: Namespace) -> None:
    """InputError where flags of the objective do not go together with each other, or with open_clip's."""
    objective, name = OBJECTIVES[args.objective], f"--objective {args.objective}"
    if not 0 <= args.ce_weight < math.inf:
        raise InputError(f"--ce-weight {args.ce_weight} is no weight; give 0 or more.")
    if args.objective != "flyp" and len(changes(args)) > 1:
        raise InputError(f"{changes(args)[1]} changes FLYP's loss, which {name} has not; leave one out.")
    if args.lp_c is not None and not 0 < args.lp_c < math.inf:
        raise InputError(f"--lp-c {args.lp_c} is no strength of a regularisation; give more than 0.")
    if args.lp_c is not None and not objective.fit:
        raise InputError(f"--lp-c is for the linear probe of lp and lp-ft; leave it out with {name}.")
    for other in ("siglip", "distill_model", "horovod", "torchscript", "trace"):
        if changes(args) and getattr(args, other, None):
            flag = f"--{other.replace('_', '-')}"
            raise InputError(f"{changes(args)[0]} cannot be had together with {flag}; leave one of them out.")
    tower_learns = not args.lock_image or (objective.loop and args.lock_image_unlocked_groups)
    if objective.learned_head and not tower_learns:
        raise InputError(
            f"{name} with --lock-image leaves nothing but the head to train, which is what --objective lp alone does; "
            "leave --lock-image out."
        )
    if objective.fit and (args.dataset_resampled or args.train_data_upsampling_factors):
        raise InputError(f"{name} fits its head to every image once; leave --dataset-resampled out.")
