"""When two results of the same formula are the same: limits from the scale of what is compared.

float32 rounds each operation to EPS of its result. In which order a sum is added up, in how many parts, and with which
instructions is the choice of a kernel: it depends on the processor, the number of threads and of ranks, and the size of
the batch. So results that are equal on one machine are not on another, and the limits here are argued, not observed:

- A sum of n terms has an error of sqrt(n) EPS of its terms, if the roundings are independent, as they nearly are. The
  sums in our small models have 16 to 1,000 terms, so it is at most 32 EPS an operation.
- It is the *largest* terms that count: where terms cancel, a small result has the error of large ones. So a limit is a
  share of the largest entry of a tensor, not of each.

Equality to the last bit is for the same computation in the same process, or in two with the same settings.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

EPS = torch.finfo(torch.float32).eps  # 1.2e-7

# Features, logits, losses: a dozen operations after one another, whose errors add up as a random walk; 3.1e-5
FORWARD = 256 * EPS
# Gradients, and what plain SGD moves by in a few steps: twice as many operations, sums over the batch in which terms of
# either sign cancel to a tenth and less of their size, and steps that start from what the ones before differ by; 4.9e-4
BACKWARD = 4096 * EPS
# Losses after some steps of AdamW, whose weights are not to be compared (`assert_moved_alike` says why): weights that
# went other ways by chance are those to which the loss has no gradient, so that it hardly differs
ADAM = 1e-3


def assert_close(got: Tensor, expected: Tensor, share: float = FORWARD, name: str = "") -> None:
    """Every entry within `share` of the largest of `expected`, which is finite."""
    assert got.shape == expected.shape, name
    largest, far = expected.abs().max().item(), (got.double() - expected.double()).abs().max().item()
    assert far <= share * largest, f"{name}: off by {far:.1e}, more than {share:.1e} of {largest:.1e}"


def assert_moved_alike(
    got: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    start: Mapping[str, Tensor],
    share: float = BACKWARD,
) -> None:
    """Weights after a few steps of plain SGD: each tensor within `share` of its longest way from `start`.

    Storing a weight rounds it to EPS of its own size, once a step: 4 EPS of the largest are allowed for that. Not for
    Adam, which divides a gradient by its size: of one that is zero but for rounding (a key's bias) it makes a step of
    the whole learning rate, in a direction that is chance.
    """
    for name, before in start.items():
        a, b = got[name].double(), expected[name].double()
        way, largest = (b - before.double()).abs().max().item(), b.abs().max().item()
        far = (a - b).abs().max().item()
        assert far <= share * way + 4 * EPS * largest, f"{name}: off by {far:.1e} on a way of {way:.1e}"


def assert_same_choices(logits: Tensor, expected: Tensor, share: float = FORWARD) -> None:
    """The best class of each row is that of `expected`, (N, C), or as good as that to rounding."""
    best, chosen = expected.max(dim=1).values, expected.gather(1, logits.argmax(dim=1, keepdim=True))[:, 0]
    worse = ((best - chosen) > share * expected.abs().max()).nonzero()[:, 0].tolist()
    assert not worse, f"another class in rows {worse}"


def assert_same_figures(got: Mapping[str, object], expected: Mapping[str, object], images: int = 1) -> None:
    """Metrics of two evaluations, of which the logits are equal to rounding: one image may be a tie.

    That moves top-1 by 1/n, and means over classes of about equal size by up to three times that: an image has one
    class fewer of its own, and one more of another's. Figures of the worst group, which may be small, are not looked at.
    """
    assert got.keys() == expected.keys() and got["n"] == expected["n"]
    for name, value in expected.items():
        if name not in ("n", "worst_group", "worst_group_top1"):
            assert abs(got[name] - value) <= 3 * images / expected["n"], (name, got[name], value)
