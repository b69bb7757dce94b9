"""Classification metrics, from counts that are gathered in one pass and can be added up over ranks.

A metric is one function of the counts. Not for models: a classifier here is anything that gives logits.
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
    """What the metrics need to know of the predictions so far, for C classes; small, and can be pickled.

    Attributes:
        labelled, predicted, correct: int64 (C,), images of a class, predicted as it, and both.
        in_top5: images whose class is among the five most likely.
        groups: images and correct ones of each group; '' stands for images that have none.
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
                "the logits of a batch are no numbers (NaN): the weights have diverged in training, or --precision is too "
                "narrow for them; take other weights, or fp32."
            )
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < self.num_classes:
            wrong = labels.max() if labels.max() >= self.num_classes else labels.min()
            raise InputError(
                f"label {int(wrong)} is outside 0..{self.num_classes - 1}; give the classes of this set."
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
        """All metrics.

        Raises:
            InputError: no image was counted.
        """
        if not self.labelled.any():
            raise InputError("there is no image to score in this set; check its shards and --image-key.")
        return {name: value for metric in _METRICS for name, value in metric(self).items()}

    def _count_group(self, group: str, number: int, correct: int) -> None:
        before = self.groups.get(group, (0, 0))
        self.groups[group] = (before[0] + number, before[1] + correct)


def metric(function: Callable[[Tally], Metrics]) -> Callable[[Tally], Metrics]:
    """Report what `function` makes of a Tally, by name, with the other metrics."""
    _METRICS.append(function)
    return function


@metric
def _accuracy(tally: Tally) -> Metrics:
    n = int(tally.labelled.sum())
    top5 = {"top5": tally.in_top5 / n} if tally.num_classes > 5 else {}
    return {"n": n, "top1": int(tally.correct.sum()) / n, **top5}


@metric
def _mean_per_class_recall(tally: Tally) -> Metrics:
    """Over the classes that occur in the ground truth: scikit-learn's balanced_accuracy_score."""
    occurs = tally.labelled > 0
    return {"mean_per_class_recall": (tally.correct[occurs].double() / tally.labelled[occurs]).mean().item()}


@metric
def _macro_f1(tally: Tally) -> Metrics:
    """Over the classes that occur in the ground truth, as WILDS (arXiv 2012.07421) scores iWildCam."""
    occurs = tally.labelled > 0
    f1 = 2 * tally.correct[occurs].double() / (tally.labelled + tally.predicted)[occurs]
    return {"macro_f1": f1.mean().item()}


@metric
def _worst_group(tally: Tally) -> Metrics:
    """The least accuracy of a group that occurs, as in WILDS (arXiv 2012.07421), and its name."""
    accuracy = {group: correct / number for group, (number, correct) in sorted(tally.groups.items()) if group}
    if not accuracy:
        if tally.groups:
            _log.warning(
                "No image of this set has a group, so none is the worst; --group-key names its member."
            )
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
        classifier: images (B, 3, H, W) -> logits (B, C); a module is put in eval mode meanwhile.
        loader: batches as dicts with "images", "labels" and perhaps "groups", or as (images, labels).
        tally: counts to go on from; None: a new one.
        on_batch: called with each batch (a dict) and its logits.

    Raises:
        InputError: a label outside 0..C-1, a logit that is NaN; or no batch at all, where no tally is given.
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
    """The metrics of a classifier over a loader; arguments as for `score`.

    Returns:
        n; top1; top5 where C > 5; mean_per_class_recall and macro_f1, over the classes that occur in the
        ground truth; worst_group_top1 and worst_group (its name) where there are groups. All but n and the
        name in 0..1.
        Equal to scikit-learn's with labels=np.unique(y), and to WILDS' for groups.

    Raises:
        InputError: a label outside 0..C-1, a logit that is NaN, or no image.
    """
    return score(classifier, loader, **kwargs).metrics()


def best(figures: Mapping[Key, float]) -> Key:
    """The key (an alpha, an epoch, a setting) of the highest figure; of equal ones the smallest, which moves least."""
    return max(figures, key=lambda key: (figures[key], -key))


def table(rows: Mapping[str, Mapping[str, Any]], corner: str = "") -> str:
    """Rows of metrics as aligned text, fractions as percentages."""
    columns = list(dict.fromkeys(chain.from_iterable(rows.values())))
    lines = [[corner, *columns]]
    for name, row in rows.items():
        lines.append([name, *(_cell(row.get(column, "")) for column in columns)])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    padded = ([first.ljust(widths[0]), *map(str.rjust, rest, widths[1:])] for first, *rest in lines)
    return "\n".join("  ".join(cells).rstrip() for cells in padded)


def _cell(value: Any) -> str:
    return f"{100 * value:.2f}" if isinstance(value, float) else str(value)
