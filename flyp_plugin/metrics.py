"""Classification metrics from counts, which are collected in one pass and can be added up over ranks.

A `Tally` counts predictions. A metric is a function of a Tally with the decorator `@metric`: to add one, write it here,
and it appears in training logs, `flyp eval`, `flyp wiseft` and `flyp compare`. A classifier is anything that returns logits.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain, compress
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from flyp_plugin.errors import InputError

Key = TypeVar("Key", int, float)
Metrics = dict[str, Any]  # numbers, and the name of the worst group
_log = logging.getLogger(__name__)
_METRICS: list[Callable[["Tally"], Metrics]] = []
_BINS = 15  # of the calibration error, as Guo et al. count it (arXiv 1706.04599)


class Tally:
    """Counts of predictions for C classes; small and picklable.

    Attributes:
        counts: int64 (3, C), the images of each class, those predicted as it, and those both.
        in_top5: images whose class is among the five most likely.
        loss: the sum of the images' cross-entropies, in nats.
        overconfidence: float64 (15,), the images' top probabilities less the correct ones among them, summed over the
            images whose top probability is in (0, 1/15], (1/15, 2/15], ..., (14/15, 1].
        group_images, group_correct: images and correct images of each group; '' is the group of images without one.
    """

    def __init__(self, num_classes: int):
        self.num_classes, self.in_top5, self.loss = num_classes, 0, 0.0
        self.counts = torch.zeros(3, num_classes, dtype=torch.int64)
        self.overconfidence = torch.zeros(_BINS, dtype=torch.float64)
        self.group_images, self.group_correct = Counter[str](), Counter[str]()

    def update(self, logits: torch.Tensor, labels: torch.Tensor, groups: Iterable[str] | None = None) -> None:
        """Count a batch: logits (B, C), labels int (B,), the images' groups.

        Raises:
            InputError: a label outside 0..C-1, or a logit that is NaN.
        """
        logits, top = logits.float(), min(5, logits.shape[1])
        if len(wrong := labels[(labels < 0) | (labels >= self.num_classes)]):
            raise InputError(
                f"label {int(wrong[0])} is outside 0..{self.num_classes - 1}; pass the class names of this set."
            )
        own = labels.to(logits.device, non_blocking=True)
        columns = [
            logits.argmax(dim=1),  # exact in float32 up to 16 million classes
            (logits.topk(top, dim=1).indices == own[:, None]).any(dim=1),
            cross_entropy(logits, own, reduction="none"),
            logits.softmax(dim=1).amax(dim=1),
            logits.isnan().any(dim=1),
        ]
        # one copy, and so one wait for the device
        prediction, in_top5, loss, confidence, bad = torch.stack([column.float() for column in columns]).cpu()
        if bad.any():
            raise InputError("NaN logits: training diverged, or the weights overflow; try --precision fp32.")
        labels, prediction = labels.cpu(), prediction.long()
        correct = prediction == labels
        indices = (labels, prediction, labels[correct])
        self.counts += torch.stack([torch.bincount(i, minlength=self.num_classes) for i in indices])
        self.in_top5 += int(in_top5.sum())
        self.loss += loss.double().sum().item()
        edges = torch.arange(1, _BINS) / _BINS
        bins = torch.bucketize(confidence, edges)  # a probability on an edge is in the bin below
        self.overconfidence += torch.bincount(bins, confidence.double() - correct.double(), _BINS)
        groups = list(groups or ())
        self.group_images.update(groups)
        self.group_correct.update(compress(groups, correct.tolist()))

    def merge(self, other: "Tally") -> None:
        """Add the counts of another rank."""
        self.counts += other.counts
        self.in_top5 += other.in_top5
        self.loss += other.loss
        self.overconfidence += other.overconfidence
        self.group_images.update(other.group_images)
        self.group_correct.update(other.group_correct)

    def metrics(self) -> Metrics:
        """All metrics by name. Raises InputError if no image was counted."""
        if not self.counts.any():
            raise InputError("this set has no images to score; check its shards and --image-key.")
        return {name: value for metric in _METRICS for name, value in metric(self).items()}


def metric(function: Callable[[Tally], Metrics]) -> Callable[[Tally], Metrics]:
    """Decorator: report the {name: value} that `function` returns for a Tally along with the other metrics."""
    _METRICS.append(function)
    return function


@metric
def _accuracy(tally: Tally) -> Metrics:
    n, _, correct = tally.counts.sum(dim=1).tolist()
    return {"n": n, "top1": correct / n} | ({"top5": tally.in_top5 / n} if tally.num_classes > 5 else {})


@metric
def _loss(tally: Tally) -> Metrics:
    """The mean cross-entropy of the logits in nats, by which FLYP's few-shot experiments choose an epoch."""
    return {"loss": tally.loss / int(tally.counts[0].sum())}


@metric
def _class_means(tally: Tally) -> Metrics:
    """Means over the classes in the ground truth: of recall, as in scikit-learn's balanced_accuracy_score, and of F1, as
    WILDS (arXiv 2012.07421) scores iWildCam."""
    labelled, predicted, correct = tally.counts[:, tally.counts[0] > 0].double()
    f1 = 2 * correct / (labelled + predicted)
    return {"mean_per_class_recall": (correct / labelled).mean().item(), "macro_f1": f1.mean().item()}


@metric
def _calibration(tally: Tally) -> Metrics:
    """The expected calibration error (Guo et al., arXiv 1706.04599): the mean over images of |accuracy - mean top
    probability| of their bin, in 15 bins of equal width. 0: of the images given 80 %, 80 % are correct."""
    return {"ece": tally.overconfidence.abs().sum().item() / int(tally.counts[0].sum())}


@metric
def _worst_group(tally: Tally) -> Metrics:
    """The lowest accuracy of any group, as in WILDS (arXiv 2012.07421), and the group's name."""
    accuracy = {g: tally.group_correct[g] / number for g, number in sorted(tally.group_images.items()) if g}
    if not accuracy:
        if tally.group_images:
            _log.warning("No image of this set has a group; --group-key names the member that holds it.")
        return {}
    worst = min(accuracy, key=accuracy.__getitem__)
    return {"worst_group_top1": accuracy[worst], "worst_group": worst}


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Run a module in eval mode without gradients, and restore its mode afterwards."""
    training = module.training
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        module.train(training)


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
    """
    module = classifier if isinstance(classifier, nn.Module) else nn.Module()
    device = next((t.device for t in chain(module.parameters(), module.buffers())), torch.device("cpu"))
    with eval_mode(module):
        for batch in loader:
            if not isinstance(batch, Mapping):
                batch = {"images": batch[0], "labels": batch[1]}
            logits = classifier(batch["images"].to(device, non_blocking=True))
            tally = tally or Tally(logits.shape[1])
            tally.update(logits, batch["labels"], batch.get("groups"))
            if on_batch:
                on_batch(batch, logits)
    return tally or Tally(1)


def evaluate(classifier: Callable[[torch.Tensor], torch.Tensor], loader: Iterable, **kwargs: Any) -> Metrics:
    """The metrics of a classifier over a loader; takes the arguments of `score`.

    Returns:
        n; top1; top5 if C > 5; loss (mean cross-entropy of the logits, natural log); mean_per_class_recall and macro_f1
        over the classes in the ground truth; ece (calibration error of the logits' softmax, 15 bins); worst_group_top1
        and worst_group (its name) if there are groups. All in [0, 1] except n, loss and the name. Equal to
        scikit-learn's with labels=np.unique(y), to WILDS' for groups, and to torch's cross_entropy.

    Raises:
        InputError: a label outside 0..C-1, a NaN logit, or no images.
    """
    return score(classifier, loader, **kwargs).metrics()


def best(figures: Mapping[Key, float], metric: str = "top1") -> Key:
    """The key (an alpha, an epoch, a setting) of the highest figure, or of the lowest if the metric is `loss`.

    Of equal ones the smallest key, which changes least.
    """
    sign = -1 if metric == "loss" else 1
    return max(figures, key=lambda key: (sign * figures[key], -key))


def table(rows: Mapping[str, Mapping[str, Any]], corner: str = "") -> str:
    """Rows of metrics as an aligned text table, with fractions as percentages."""
    columns = list(dict.fromkeys(chain.from_iterable(rows.values())))
    lines = [[corner, *columns], *([name, *(row.get(c, "") for c in columns)] for name, row in rows.items())]
    texts = [[_cell(*pair) for pair in zip(lines[0], line)] for line in lines]
    widths = [max(map(len, column)) for column in zip(*texts)]
    padded = ([first.ljust(widths[0]), *map(str.rjust, rest, widths[1:])] for first, *rest in texts)
    return "\n".join("  ".join(cells).rstrip() for cells in padded)


def _cell(column: str, value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.4f}" if column == "loss" else f"{100 * value:.2f}"
