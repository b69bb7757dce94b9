"""FLYP's loss, the paper's other objectives and the anchor, trained by open_clip's unchanged loop.

In that loop the model's forward() gives a dict, and the loss is called with the dict's entries. An Objective says what a
model returns in training (`outputs`) and which loss takes it. To add one, write these two functions, add an entry to
OBJECTIVES at the end of this file, and its name to --objective in flags.py. Learned heads are in learned.py, the teachers
of --anchor in anchor.py.
"""

import re
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import open_clip
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from flyp_plugin.anchor import Teacher
from flyp_plugin.flags import parser, to_argv
from flyp_plugin.learned import HEAD, exact_logits
from flyp_plugin.tokens import PromptTokens

COLLISIONS = ("keep", "mask", "soft")  # see PairLoss
Outputs = dict[str, Tensor]


class ClassLoss(nn.Module):
    """Cross-entropy of class logits. DistributedDataParallel averages it over ranks, which is the mean over all images."""

    def forward(
        self, class_logits: Tensor, labels: Tensor, logit_scale: Tensor, output_dict: bool = False
    ) -> Any:
        """class_logits (B, C), labels int64 (B,) -> the loss, as {"ce_loss": ...} with `output_dict`."""
        loss = F.cross_entropy(class_logits, labels)
        return {"ce_loss": loss} if output_dict else loss


class PairLoss(open_clip.ClipLoss):
    """FLYP's contrastive loss (arXiv 2212.00638, sec. 3), with a choice for pairs of the same class and one more term.

    Args:
        collisions: two pairs of the same class in a batch are negatives of each other ("keep": the paper's recipe, and
            ClipLoss), are left out of each other's softmax ("mask"), or share the target evenly ("soft").
        ce_weight: adds this times the cross-entropy of the images over the head of the batch (`batch_head`).
        local_loss, gather_with_grad, rank, world_size: as in open_clip.ClipLoss; the batch is that of all ranks.
    """

    def __init__(self, collisions: str = "keep", ce_weight: float = 0.0, **kwargs: Any):
        super().__init__(**kwargs)
        self.collisions, self.ce_weight = collisions, ce_weight

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        labels: Tensor,
        logit_bias: Tensor | None = None,
        output_dict: bool = False,
    ) -> Any:
        """Features (B, D), both normalised, labels int64 (B,) -> the loss, or with `output_dict` a dict of its terms."""
        rows, columns, first = self._gather(image_features, text_features, labels)
        own = torch.arange(len(rows[2]), device=labels.device) + first  # the column of each row's own pair
        bias = 0 if logit_bias is None else logit_bias
        image_logits = logit_scale * rows[0] @ columns[1].T + bias
        text_logits = logit_scale * rows[1] @ columns[0].T + bias
        same = rows[2][:, None] == columns[2]
        softmaxes = [self._softmax(logits, own, same) for logits in (image_logits, text_logits)]
        terms = {"contrastive_loss": sum(softmaxes) / 2}
        if self.ce_weight:
            head, index = batch_head(columns[1], columns[2])
            logits = logit_scale.float() * exact_logits(rows[0], head)
            terms["ce_loss"] = self.ce_weight * F.cross_entropy(logits, index[own])
        return terms if output_dict else sum(terms.values())

    def _softmax(self, logits: Tensor, own: Tensor, same: Tensor) -> Tensor:
        if self.collisions == "soft":
            return F.cross_entropy(logits, (same / same.sum(dim=1, keepdim=True)).to(logits.dtype))
        if self.collisions == "mask":
            others = same.scatter(1, own[:, None], False)
            logits = logits.masked_fill(others, float("-inf"))
        return F.cross_entropy(logits, own)

    def _gather(self, *local: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], int]:
        """(images, texts, labels) for the rows and for the columns of the logits; the column of the first row's pair."""
        if self.world_size == 1:
            return local, local, 0
        images, texts = open_clip.loss.gather_features(
            *local[:2], self.local_loss, self.gather_with_grad, self.rank, self.world_size
        )
        labels = [torch.empty_like(local[2]) for _ in range(self.world_size)]
        dist.all_gather(labels, local[2].contiguous())
        everything = (images, texts, torch.cat(labels))
        return (
            (local, everything, self.rank * len(local[2])) if self.local_loss else (everything, everything, 0)
        )


class AnchoredLoss(nn.Module):
    """Another loss plus `weight` times the mean distance from a teacher (anchor.py).

    Args:
        loss: takes all outputs of the model but `anchor`, and returns a dict with output_dict=True.
        weight: W of --anchor.
    """

    def __init__(self, loss: nn.Module, weight: float):
        super().__init__()
        self.loss, self.weight = loss, weight

    def forward(self, anchor: Tensor, output_dict: bool = False, **outputs: Tensor) -> Any:
        """Squared distances `anchor` (B,) and the outputs for the other loss -> the sum, or a dict of all terms."""
        terms = self.loss(**outputs, output_dict=True)
        terms["anchor_loss"] = self.weight * anchor.mean()
        return terms if output_dict else sum(terms.values())


def batch_head(text_features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The head of the K classes in a batch: (K, D), their normalised mean text features; and each pair's row in it (B,)."""
    classes, index = labels.unique(return_inverse=True)
    sums = text_features.new_zeros(len(classes), text_features.shape[1]).index_add(0, index, text_features)
    return F.normalize(sums, dim=-1), index


# What a model returns in training, from itself, its original forward, images, tokens (B, L) and labels (B,). With
# --accum-freq open_clip's loop concatenates every entry but logit_scale, so an entry needs B rows. Towers are called
# through that forward: with --fsdp, encode_image and encode_text would release the parameters that are gathered for it.


def _pair_outputs(model: Any, forward: Callable, images: Tensor, tokens: Tensor, labels: Tensor) -> Outputs:
    return {**forward(images, tokens), "labels": labels}


def _head_outputs(model: Any, forward: Callable, images: Tensor, tokens: Tensor, labels: Tensor) -> Outputs:
    out = forward(images)
    logits = model.class_head(out["image_features"])
    kept = {name: out[name] for name in ("logit_scale", "anchor") if name in out}
    return {**kept, "class_logits": logits, "labels": labels}


def _text_outputs(model: Any, forward: Callable, images: Tensor, tokens: Tensor, labels: Tensor) -> Outputs:
    """Logits over the current text features of all classes, each in a random prompt of its own, as in the paper's code."""
    out = forward(images, _draw_prompts(model.class_tokens).to(images.device))
    logits = out["logit_scale"].float() * exact_logits(out["image_features"], out["text_features"])
    return {"class_logits": logits, "labels": labels, "logit_scale": out["logit_scale"]}


@torch.compiler.disable  # a compiled graph would draw other numbers
def _draw_prompts(tokens: PromptTokens) -> Tensor:
    """The tokens of a random prompt of each class, int64 (C, L)."""
    counts = torch.from_numpy(tokens.counts)
    numbers = torch.randint(2**62, counts.shape) % counts
    return tokens.take(range(len(counts)), numbers.tolist())


def _make_pair_loss(args: Namespace) -> nn.Module:
    ranks = {name: getattr(args, name) for name in ("local_loss", "gather_with_grad", "rank", "world_size")}
    return PairLoss(args.collisions, args.ce_weight, **ranks)


@dataclass(frozen=True)
class Objective:
    """How a model is trained."""

    outputs: Callable[..., Outputs]  # what the model returns in training
    loss: Callable[[Namespace], nn.Module] = lambda args: ClassLoss()  # takes `outputs`; made from all flags
    trains: str = ""  # regular expression for the start of the names of the parameters that learn
    learned_head: bool = False  # the model has a ClassHead, `class_head`; else the text tower gives the head
    class_tokens: bool = False  # the model has the tokens of all class prompts, `class_tokens`
    fit: bool = False  # the head is fitted to features of the frozen image tower before the first epoch
    loop: bool = True  # open_clip's loop trains; else the fit is all
    anchored: bool = False  # --anchor can be added

    def create_loss(self, args: Namespace) -> nn.Module:
        """The loss, with all terms that the flags ask for."""
        loss = self.loss(args)
        if not args.anchor:
            return loss
        # ClipLoss without both flags of several ranks has a gradient that is smaller by their number; a ClassLoss has not
        smaller = not (self.learned_head or args.local_loss or args.gather_with_grad)
        return AnchoredLoss(loss, args.anchor / (args.world_size if smaller else 1))

    def install(self, model: Any, teacher: Teacher | None = None) -> None:
        """Make `model`, whose forward returns a dict, take labels (B,) and return `outputs`, in training mode only.

        open_clip 4 passes all parts of a batch by name; before, it passes two by position, and the labels are the last
        column of the tokens (B, L + 1). Call this after adding `class_head` or `class_tokens`, before
        DistributedDataParallel, FSDP, torch.compile and the optimizer.
        """
        original = model.forward

        def features(image: Tensor, text: Tensor | None = None) -> Outputs:
            out = original(image, text)
            return {**out, "anchor": teacher.distances(image, text, out)} if teacher else out

        def forward(
            image: Tensor | None = None, text: Tensor | None = None, labels: Tensor | None = None
        ) -> Any:
            if not model.training:
                return original(image, text)
            if labels is None:
                text, labels = text[:, :-1], text[:, -1]  # type: ignore[index]
            return self.outputs(model, features, image, text, labels)

        model.forward = forward
        for name, parameter in model.named_parameters():
            if not re.match(self.trains, name):  # DistributedDataParallel would wait for its gradient
                parameter.requires_grad_(False)


_IMAGE_SIDE = rf"visual\.|{HEAD}\."
OBJECTIVES = {
    "flyp": Objective(_pair_outputs, _make_pair_loss, anchored=True),
    "ce": Objective(_head_outputs, trains=_IMAGE_SIDE, learned_head=True, anchored=True),
    "lp": Objective(_head_outputs, trains=rf"{HEAD}\.", learned_head=True, fit=True, loop=False),
    "lp-ft": Objective(_head_outputs, trains=_IMAGE_SIDE, learned_head=True, fit=True),
    "flyp-ce": Objective(_text_outputs, trains="(?!logit_bias)", class_tokens=True),
}


def changed_flags(args: Namespace) -> list[str]:
    """The flags given that make training differ from plain FLYP, as a user writes them."""
    names = ("objective", "collisions", "ce_weight", "anchor", "anchor_teacher")
    given, default = {name: getattr(args, name) for name in names}, parser().get_default
    return [" ".join(to_argv({name: value})) for name, value in given.items() if value != default(name)]


def find_mistakes(args: Namespace) -> Iterator[str]:
    """Mistakes in the objective's flags that would change or spoil the training silently."""
    objective, changes = OBJECTIVES[args.objective], changed_flags(args)
    name = f"--objective {args.objective}"
    of_flyp = [flag for flag in changes if flag.startswith(("--collisions", "--ce-weight"))]
    if args.objective != "flyp" and of_flyp:
        yield f"{of_flyp[0]} changes FLYP's loss, which {name} does not use; leave one of them out."
    if args.anchor and not objective.anchored:
        those = " and ".join(key for key, other in OBJECTIVES.items() if other.anchored)
        yield f"--anchor is for --objective {those}; leave it out with {name}."
    if args.anchor_teacher != "pretrained" and not args.anchor:
        yield f"--anchor-teacher {args.anchor_teacher} has no effect without --anchor; add that, or leave it out."
    if args.anchor_teacher == "trajectory" and getattr(args, "fsdp", False):
        yield "--anchor-teacher trajectory cannot follow weights that --fsdp divides; use pretrained, or leave --fsdp out."
    if args.logit_scale and objective.fit:
        yield f"--logit-scale has no effect with {name}, whose head is fitted; leave it out."
    if args.lp_c is not None and not objective.fit:
        yield f"--lp-c is for the linear probe of lp and lp-ft; leave it out with {name}."
    for other in ("siglip", "distill_model", "horovod", "torchscript"):
        if changes and getattr(args, other, None):
            yield f"{changes[0]} cannot be combined with {to_argv({other: True})[0]}; leave one of them out."
    frozen = args.lock_image and not (objective.loop and args.lock_image_unlocked_groups)
    if objective.learned_head and frozen:
        yield f"{name} with --lock-image leaves only the head to train; use --objective lp without --lock-image."
    for tower, trained, some in (
        ("text", not objective.learned_head, args.lock_text_unlocked_layers),
        ("image", objective.loop, args.lock_image_unlocked_groups),
    ):
        locked = getattr(args, f"lock_{tower}") and not some
        if getattr(args, f"{tower}_layer_decay", None) and (locked or not trained):  # open_clip 4
            yield f"--{tower}-layer-decay has no effect on a tower that is not trained; leave it out."
    if args.balance and not objective.loop:
        yield f"--balance has no effect with {name}, which fits its head to every image once; leave it out."
    if objective.fit and args.dataset_resampled:
        yield f"{name} fits its head to every image once; leave --dataset-resampled out."
