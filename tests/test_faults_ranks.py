"""Several ranks and long runs: the short forms of tests/faults/ranks.py and tests/faults/long.py."""

import gc
from collections import Counter
from itertools import pairwise

import pytest
import torch

from flyp_plugin.data import LabelledDataset
from flyp_plugin.train import train
from tests import tars
from tests.close import assert_same_figures
from tests.faults import long, ranks


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with data/: five shards of 1, 17, 40, 3 and 64 digits, as training and as test set; models and weights."""
    folder = tmp_path_factory.mktemp("ranks")
    ranks.write(folder / "data", ranks.UNEVEN)
    return folder


@pytest.mark.parametrize("number", [2, 3, 4])
def test_no_image_is_lost_or_scored_twice(root, number):
    shards = [str(root / "data" / "test" / f"{i}.tar") for i in range(5)]
    broken = tars.write(root / "broken.tar", b"no tar" * 100)
    for some in (shards, shards[1:3], [*shards[:2], broken]):
        assert ranks.keys_of(some, number, 0) == Counter(ranks.keys_of(some, 1, 0).keys())


@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize("sizes", [ranks.UNEVEN, (10,) * 6], ids=["uneven", "equal"])
def test_ranks_take_equal_steps_and_equal_shards_omit_nothing(tmp_path, sizes, number):
    bounds = [0, *(sum(sizes[: i + 1]) for i in range(len(sizes)))]
    shards = [
        tars.write(tmp_path / f"{i}.tar", tars.samples(range(*two))) for i, two in enumerate(pairwise(bounds))
    ]
    found, views = ranks.coverage(shards, sizes, number, 8)  # which checks the steps itself
    if number == 1 or len(set(sizes)) == 1:
        assert found == [{"left out": 0, "repeated": 0, "most": 1}] * 8
    assert all(views.values())  # shares are dealt anew


def test_two_ranks_equal_one_process_and_flyp_eval(root):
    """Losses and gradients of one step; and a ResNet, whose statistics are of each rank's own images while it trains."""
    objectives = ["flyp", "--collisions soft", "ce"]
    resnet = ["--epochs", 2, "--batch-size", 4, "--lr", "3e-3", "--warmup", 5, "--eval-frequency", 0]
    resnet += ["--eval-data", f"val={root / 'data'}", "--group-key", "hand"]
    more = ranks.words(root / "data", root / "logs", "resnet", *resnet, model="digits-rn")
    for _, _, far in ranks.differences(root, [2], objectives, {2: [more]}):
        assert all(far[name] <= limit for name, limit in ranks.LIMITS.items()), far
    checkpoints = root / "logs" / "resnet" / "checkpoints"
    single = ranks.figures(checkpoints / "epoch_2.pt", root / "data", "digits-rn")
    logged = ranks.results(checkpoints)[-1]
    assert logged.pop("epoch") == 2
    assert_same_figures({name.removeprefix("val/"): value for name, value in logged.items()}, single)


def test_a_rank_killed_in_a_checkpoint_ends_the_other(root):
    argv = ranks.words(root / "data", root / "logs", "killed", "--epochs", 2)
    death = ranks.Death(
        "killed", 2, 0, "hand", ranks.__file__, "--doomed", 0, "checkpoint", 1, "SIGKILL", 60, *argv
    )
    death(root / "said-killed")
    assert death.wrong == []


def test_a_rank_with_a_bad_label_ends_the_other(root):
    assert ranks.bad_label(root, root / "data", "train", "hand").wrong == []


def test_samples_by_the_thousand_and_epochs_leave_nothing_behind(tmp_path):
    row = long.judged("samples", long.million(tmp_path / "samples", 6_000, 2_000, 2_000))
    assert row.survived, row.seen
    row = long.judged("epochs", long.epochs(tmp_path / "epochs", 30, (5, 20, 30)))
    assert row.survived, row.seen


def frozen(image):
    return torch.tensor([gc.get_freeze_count()])


def test_garbage_collection_in_workers_keeps_memory_shared(tmp_path):
    (batch,) = LabelledDataset(tars.shards(tmp_path, 4, 1), frozen, 4, num_classes=10, num_workers=1)
    assert batch["images"].min() > len(gc.get_objects()) // 2


def test_a_collective_that_breaks_is_told_from_a_bug(root, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(ranks.open_clip.ClipLoss, "forward", broken)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        train(ranks.words(root / "data", root / "logs", "bug", "--epochs", 1))
