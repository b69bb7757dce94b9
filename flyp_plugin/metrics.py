"""Classification metrics from counts, which are collected in one pass and can be added up over ranks.

A `Tally` counts predictions. A metric is a function of a Tally with the decorator `@metric`: to add one, write it here,
and it appears in training logs, `flyp eval`, `flyp wiseft` and `flyp compare`. A classifier is anything that returns logits.
"""

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import nn

from flyp_plugin.errors import InputError

Key = TypeVar("Key", int, float)
Metrics = dict[str, Any]  # numbers, and the name of the worst group
_log = logging.getLogger(__name__)
_METRICS: list[Callable[["Tally"], Metrics]] = []


@dataclass
class Tally:
    """Counts of predictions for C classes; small and picklable.

    Attributes:
        labelled, predicted, correct: int64 (C,), the images of each class, those predicted as it, and those both.
        in_top5: images whose class is among the five most likely.
        groups: (images, correct images) of each group; '' is the group of images without one.
    """

    num_classes: int
    labelled: torch.Tensor = field(init=False)
    predicted: torch.Tensor = field(init=False)
    correct: torch.Tensor = field(init=False)
    in_top5: int = 0
    groups: dict[str, tuple[int, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.labelled, self.predicted, self.correct = torch.zeros(3, self.num_classes, dtype=torch.int64)

    def update(self, logits: torch.Tensor, labels: torch.Tensor, groups: Iterable[str] | None = None) -> None:
        """Count a batch: logits (B, C), labels int (B,), the images' groups.

        Raises:
            InputError: a label outside 0..C-1, or a logit that is NaN.
        """
        logits, labels = logits.float(), labels.to(logits.device)
        if logits.isnan().any():
            raise InputError(
                "the logits of a batch are NaN: training has diverged, or the weights overflow in this --precision; use "
                "other weights, or --precision fp32."
            )
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < self.num_classes:
            wrong = labels.max() if labels.max() >= self.num_classes else labels.min()
            raise InputError(
                f"label {int(wrong)} is outside 0..{self.num_classes - 1}; pass the class names of this set."
            )
        prediction = logits.argmax(dim=1)
        hit = prediction == labels
        count = partial(torch.bincount, minlength=self.num_classes)
        self.labelled += count(labels).cpu()
        self.predicted += count(prediction).cpu()
        self.correct += count(labels[hit]).cpu()
        if self.num_classes > 5:
            self.in_top5 += int((logits.topk(5, dim=1).indices == labels[:, None]).sum())
        for group, correct in zip(groups or (), hit.tolist()):
            self._count_group(group, 1, int(correct))

    def merge(self, other: "Tally") -> None:
        """Add the counts of another rank."""
        self.labelled += other.labelled
        self.predicted += other.predicted
        self.correct += other.correct
        self.in_top5 += other.in_top5
        for group, (number, correct) in other.groups.items():
            self._count_group(group, number, correct)

    def metrics(self) -> Metrics:
        """All metrics by name. Raises InputError if no image was counted."""
        if not self.labelled.any():
            raise InputError("this set has no images to score; check its shards and --image-key.")
        return {name: value for metric in _METRICS for name, value in metric(self).items()}

    def _count_group(self, group: str, number: int, correct: int) -> None:
        before = self.groups.get(group, (0, 0))
        self.groups[group] = (before[0] + number, before[1] + correct)


def metric(function: Callable[[Tally], Metrics]) -> Callable[[Tally], Metrics]:
    """Decorator: report the {name: value} that `function` returns for a Tally along with the other metrics."""
    _METRICS.append(function)
    return function


@metric
def _accuracy(tally: Tally) -> Metrics:
    n = int(tally.labelled.sum())
    top5 = {"top5": tally.in_top5 / n} if tally.num_classes > 5 else {}
    return {"n": n, "top1": int(tally.correct.sum()) / n, **top5}


@metric
def _mean_per_class_recall(tally: Tally) -> Metrics:
    """Mean over the classes in the ground truth: scikit-learn's balanced_accuracy_score."""
    occurs = tally.labelled > 0
    return {"mean_per_class_recall": (tally.correct[occurs].double() / tally.labelled[occurs]).mean().item()}


@metric
def _macro_f1(tally: Tally) -> Metrics:
    """Mean over the classes in the ground truth, as WILDS (arXiv 2012.07421) scores iWildCam."""
    occurs = tally.labelled > 0
    f1 = 2 * tally.correct[occurs].double() / (tally.labelled + tally.predicted)[occurs]
    return {"macro_f1": f1.mean().item()}


@metric
def _worst_group(tally: Tally) -> Metrics:
    """The lowest accuracy of any group, as in WILDS (arXiv 2012.07421), and the group's name."""
    accuracy = {group: correct / number for group, (number, correct) in sorted(tally.groups.items()) if group}
    if not accuracy:
        if tally.groups:
            _log.warning("No image of this set has a group; --group-key names the member that holds it.")
        return {}
    worst = min(accuracy, key=accuracy.__getitem__)
    return {"worst_group_top1": accuracy[worst], "worst_group": worst}


@torch.no_grad()
def score(
    classifier: Callable[[torch.Tensor], torch.Tensor],
    loader: Iterable,
    tally: Tally | None = None,
    on_batch: Callable[[dict[str, Any], torch.Tensor], None] | None = None,
) -> Tally:
    """Count a classifier's predictions over a loader, in one pass.

    Args:
        classifier: images (B, 3, H, W) -> logits (B, C). A module runs in eval mode and is then restored.
        loader: batches as dicts with "images", "labels" and optionally "groups", or as (images, labels).
        tally: counts to add to; None: a new Tally.
        on_batch: called with each batch (a dict) and its logits.

    Raises:
        InputError: a label outside 0..C-1, or a NaN logit.
    """
    module = classifier if isinstance(classifier, nn.Module) else nn.Module()
    device = next((t.device for t in chain(module.parameters(), module.buffers())), torch.device("cpu"))
    training = module.training
    module.eval()
    try:
        for batch in loader:
            if not isinstance(batch, Mapping):
                batch = {"images": batch[0], "labels": batch[1]}
            logits = classifier(batch["images"].to(device, non_blocking=True))
            tally = tally or Tally(logits.shape[1])
            tally.update(logits, batch["labels"], batch.get("groups"))
            if on_batch:
                on_batch(batch, logits)
    finally:
        module.train(training)
    return tally or Tally(1)


def evaluate(classifier: Callable[[torch.Tensor], torch.Tensor], loader: Iterable, **kwargs: Any) -> Metrics:
    """The metrics of a classifier over a loader; takes the arguments of `score`.

    Returns:
        n; top1; top5 if C > 5; mean_per_class_recall and macro_f1 over the classes in the ground truth;
        worst_group_top1 and worst_group (its name) if there are groups. All in [0, 1] except n and the name.
        Equal to scikit-learn's with labels=np.unique(y), and to WILDS' for groups.

    Raises:
        InputError: a label outside 0..C-1, a NaN logit, or no images.
    """
    return score(classifier, loader, **kwargs).metrics()


def best(figures: Mapping[Key, float]) -> Key:
    """The key (an alpha, an epoch, a setting) of the highest figure; the smallest of equal ones, which changes least."""
    return max(figures, key=lambda key: (figures[key], -key))


def table(rows: Mapping[str, Mapping[str, Any]], corner: str = "") -> str:
    """Rows of metrics as an aligned text table, with fractions as percentages."""
    columns = list(dict.fromkeys(chain.from_iterable(rows.values())))
    lines = [[corner, *columns]]
    lines += [[name, *(_cell(row.get(column, "")) for column in columns)] for name, row in rows.items()]
    widths = [max(map(len, column)) for column in zip(*lines)]
    padded = ([first.ljust(widths[0]), *map(str.rjust, rest, widths[1:])] for first, *rest in lines)
    return "\n".join("  ".join(cells).rstrip() for cells in padded)


def _cell(value: Any) -> str:
    return f"{100 * value:.2f}" if isinstance(value, float) else str(value)
