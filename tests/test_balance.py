"""--balance: rare classes are drawn more often, by a pure function of seed, epoch and key."""

from collections import Counter

import numpy as np
import open_clip
import pytest
from torchvision.transforms.functional import pil_to_tensor

from flyp_plugin import ClassPromptDataset, ClassPrompts
from flyp_plugin.commands import call
from flyp_plugin.errors import InputError
from flyp_plugin.labels import count_labels
from flyp_plugin.samples import balance_classes, balance_weights, draw_prompts
from tests import tars
from tests.naming import naming

COUNTS = [200, 40, 8, 0]  # images of each class
PROMPTS = ClassPrompts(["zero", "one", "two", "three"], ["a {c}.", "the {c}."])
KEYS = ("cls", "png", PROMPTS.classnames)


@pytest.fixture(scope="module")
def rare(tmp_path_factory):
    """248 images in 4 tars, of classes as rare as COUNTS says."""
    labels = np.random.default_rng(0).permutation(np.repeat(range(4), COUNTS)).tolist()
    folder = tmp_path_factory.mktemp("rare")
    changed = [{f"s{i:04d}_cls": str(label).encode()} for i, label in enumerate(labels)]
    parts = [
        {key: value for i in range(248)[part::4] for key, value in tars.samples([i], **changed[i]).items()}
        for part in range(4)
    ]
    return [tars.write(folder / f"{part}.tar", members) for part, members in enumerate(parts)], labels


def drawn(shards, epochs=1, workers=0, power=1.0, batch_size=31, **options):
    """For each epoch, how often each (image, prompt's tokens) is drawn, and the sizes of the batches."""
    weights = balance_weights(count_labels(shards, *KEYS), power)
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    dataset = ClassPromptDataset(
        shards,
        pil_to_tensor,
        tokenizer,
        batch_size,
        prompts=PROMPTS,
        num_workers=workers,
        class_weights=weights,
        **options,
    )
    for _ in range(epochs):
        batches = list(dataset)
        numbers = [
            int(image[0, 0, 0]) * 256 + int(image[1, 0, 0]) for images, _ in batches for image in images
        ]
        yield Counter(numbers), [len(images) for images, _ in batches]


def test_weights_are_the_shares_of_the_power():
    for power in (0, 0.3, 0.5, 1):
        weights = balance_weights(COUNTS, power)
        shares = [n * w for n, w in zip(COUNTS, weights)]
        assert sum(shares) == pytest.approx(248) and weights[3] == 0
        assert shares[0] / shares[2] == pytest.approx((200 / 8) ** (1 - power))
    assert balance_weights(COUNTS, 0)[:3] == pytest.approx([1, 1, 1])


@pytest.mark.parametrize("power,shares", [(1, [1 / 3] * 3), (0.5, [0.5975, 0.2672, 0.1195])])
def test_classes_have_their_shares_in_epochs_of_n_images(rare, power, shares):
    shards, labels = rare
    totals = Counter()
    for counts, sizes in drawn(shards, epochs=12, power=power):
        assert sizes == [31] * 8  # 248 images, as many as there are
        for number, times in counts.items():
            totals[labels[number]] += times
    for label, share in enumerate(shares):
        assert totals[label] / (12 * 248) == pytest.approx(share, abs=0.03)


def test_an_image_is_drawn_as_often_as_its_weight_says_give_or_take_one():
    samples = [{"key": f"k{i}", "label": i % 2} for i in range(1000)]
    copies = Counter(sample["key"] for sample in balance_classes(samples, [2.3, 0.4], 0, 5, 0))
    assert {copies[f"k{i}"] for i in range(0, 1000, 2)} == {2, 3}
    assert {copies[f"k{i}"] for i in range(1, 1000, 2)} == {0, 1}
    assert copies.total() == pytest.approx(500 * 2.7, rel=0.05)
    assert copies == Counter(s["key"] for s in balance_classes(samples[::-1], [2.3, 0.4], 0, 5, 0))
    assert copies != Counter(s["key"] for s in balance_classes(samples, [2.3, 0.4], 0, 6, 0))


def test_copies_are_prompted_and_cropped_anew():
    copies = list(balance_classes([{"key": "k", "label": 0}], [50.0], 0, 0, 0))
    seeds = [sample["seed"] for sample in draw_prompts(copies, [80], 0, 0, 0)]
    assert len(set(seeds)) == 50
    (alone,) = draw_prompts([{"key": "k", "label": 0}], [80], 0, 0, 0)
    assert alone["seed"] == seeds[0]  # the first is what it is without balance


def test_what_is_drawn_depends_on_neither_workers_nor_run(rare):
    shards, labels = rare
    one, two = (
        next(drawn(shards, workers=workers, num_samples=120, batch_size=120))[0] for workers in (2, 2)
    )
    assert one == two
    weights = balance_weights(COUNTS, 1)
    samples = [{"key": f"s{i:04d}", "label": label} for i, label in enumerate(labels)]
    expected = Counter(int(sample["key"][1:]) for sample in balance_classes(samples, weights, 0, 0, 0))
    for workers in (0, 2):
        ((counts, _),) = drawn(shards, workers=workers, num_samples=expected.total())
        assert counts == expected


def test_a_run_is_balanced_and_says_so(digits, start, tmp_path, caplog):
    flags = [
        "--model",
        "digits-vit",
        "--model-config",
        str(digits / "digits-vit.json"),
        "--pretrained",
        str(start),
    ]
    flags += [
        "--train-data",
        str(digits),
        "--logs",
        str(tmp_path),
        "--batch-size",
        "500",
        "--epochs",
        "1",
        "--workers",
        "0",
    ]
    with caplog.at_level("INFO"):
        assert call(["train", *flags, "--name", "run", "--balance", "0.5", "--seed", "3"]) == 0
    assert "Balance 0.5" in (tmp_path / "run" / "out.log").read_text()
    for more, named in (
        (["--template-order", "table"], ["--template-order", "--balance"]),
        (["--objective", "lp"], ["--balance", "--objective lp"]),
        (["--balance", "1.5"], ["--balance", "1.5"]),
    ):
        with pytest.raises(InputError, match=naming(*named)):
            call(["train", *flags, "--balance", "0.5", *more])
    remote = ["--classnames", str(digits / "classnames.txt"), "--train-num-samples", "10"]
    with pytest.raises(InputError, match=naming("pipe:cat", "local")):
        call(["train", *flags, "--balance", "0.5", *remote, "--train-data", f"pipe:cat {digits}/train/0.tar"])
