"""ClassPromptDataset and LabelledDataset on real shards: what an epoch is."""

import gc
import math
import multiprocessing
import random
import re
import threading
from collections import Counter
from contextlib import suppress
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from multiprocessing import active_children
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from torch.utils.data import DataLoader
from torchvision import transforms

from flyp_plugin import ClassPromptDataset, ClassPrompts
from flyp_plugin.data import LabelledDataset, peek, rebatch
from flyp_plugin.errors import InputError
from flyp_plugin.samples import sample_seed
from tests import tars
from tests.naming import naming, says
from tests.tars import NAMES, png

CLASSES, IMAGES, SHARDS = 4, 1000, 8
PROMPTS = ClassPrompts(
    [f"class {c}" for c in range(CLASSES)], [f"template {t} of a {{c}}." for t in range(5)]
)


class Augment:
    """The pixel that names the image, and what each random generator gives: float (3, 1, 2)."""

    def __call__(self, image):
        drawn = torch.tensor([torch.rand(()).item(), random.random(), np.random.rand()])
        return torch.stack([transforms.functional.to_tensor(image)[:, 0, 0], drawn], dim=1)[:, None]


@pytest.fixture(scope="session")
def tokenizer():
    return open_clip.get_tokenizer("ViT-B-32")


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    """1,000 images that name themselves by a pixel, in 8 shards of different sizes."""
    folder = tmp_path_factory.mktemp("shards")
    bounds = [0, 50, 200, 300, 420, 600, 700, 850, IMAGES]
    for shard, (first, last) in enumerate(pairwise(bounds)):
        members = [
            m
            for i in range(first, last)
            for m in ((f"s{i}.png", png(i)), (f"s{i}.cls", b"%d" % (i % CLASSES)))
        ]
        tars.write(folder / f"{shard}.tar", members)
    return [str(folder / f"{shard}.tar") for shard in range(SHARDS)]


@pytest.fixture
def dataset(shards, tokenizer):
    made = []

    def dataset(batch_size=512, shards=shards, **kwargs):
        made.append(
            ClassPromptDataset(shards, Augment(), tokenizer, batch_size, **{"prompts": PROMPTS, **kwargs})
        )
        return made[-1]

    yield dataset
    for data in made:  # else pytest's error info may hold it, and a worker freed late is waited for 5 seconds
        data._loader._iterator = None


def numbers(images):
    pixels = (images[:, :, 0, 0] * 255).round().long()
    return (256 * pixels[:, 0] + pixels[:, 1]).tolist()


def samples(batches):
    """(image number, random numbers, tokens) of each sample, in order."""
    return [
        (number, tuple(image[:, 0, 1].tolist()), tuple(row.tolist()))
        for images, tokens in batches
        for number, image, row in zip(numbers(images), images, tokens)
    ]


@pytest.mark.parametrize("workers", [0, 1, 2, 4])
def test_an_epoch_is_each_key_once_at_any_number_of_workers(dataset, workers):
    data = dataset(num_workers=workers)
    for _ in range(2):
        batches = list(data)
        assert [len(images) for images, _ in batches] == [512, 488]
        assert sorted(number for images, _ in batches for number in numbers(images)) == list(range(IMAGES))
    assert (len(data), data.num_batches, data.num_samples) == (2, 2, IMAGES)


def test_image_and_prompt_depend_only_on_seed_epoch_and_key(dataset):
    reference = sorted(samples(dataset(seed=1)))
    assert sorted(samples(dataset(seed=1, num_workers=2, batch_size=7))) == reference
    assert sorted(samples(dataset(seed=1, num_workers=4))) == reference
    by_rank = [
        s for rank in range(2) for s in samples(dataset(seed=1, rank=rank, world_size=2, num_workers=1))
    ]
    assert set(by_rank) & set(reference) == {s for s in by_rank if s in set(reference)}
    firsts = {}
    for rank in range(2):
        for number, *what in samples(dataset(seed=1, rank=rank, world_size=2)):
            firsts.setdefault(number, tuple(what))
    assert all(what in {r[1:] for r in reference if r[0] == number} for number, what in firsts.items())
    other = sorted(samples(dataset(seed=2)))
    assert [s[0] for s in other] == [s[0] for s in reference]
    assert not {s[1] for s in other} & {s[1] for s in reference}


def test_the_order_is_one_of_seed_epoch_and_workers(dataset):
    data = dataset(num_workers=2)
    first, second = samples(data), samples(data)
    assert [s[0] for s in first] != [s[0] for s in second]
    again = dataset(num_workers=2)
    again.set_epoch(1)
    assert samples(again) == second
    again.set_epoch(0)
    assert samples(again) == first


@pytest.mark.parametrize("workers", [0, 2])
def test_table_order_shows_an_image_all_its_prompts_first(shards, tokenizer, workers):
    """Over as many epochs as its class has prompts, and then in another order; also where a run goes on in between."""
    lists = {f"class {c}": [f"{c} as {number}" for number in "abcd"[: c + 1]] for c in range(CLASSES)}
    prompts = ClassPrompts(list(lists), descriptions=lists)
    own = [text for texts in lists.values() for text in texts]
    texts = dict(zip(map(tuple, tokenizer(own).tolist()), own))

    def seen(epochs, **kwargs):
        """{image number: its prompts}, in the order of the epochs."""
        kwargs = {"prompts": prompts, "num_workers": workers, "template_order": "table", **kwargs}
        data = ClassPromptDataset(shards, Augment(), tokenizer, 512, **kwargs)
        found = {number: [] for number in range(IMAGES)}
        for epoch in epochs:
            data.set_epoch(epoch)
            for number, _, tokens in samples(data):
                found[number].append(texts[tokens])
        return found

    table = seen(range(8))
    for number, drawn in table.items():
        own = lists[f"class {number % CLASSES}"]
        for first in range(0, 8 - len(own) + 1, len(own)):
            assert sorted(drawn[first : first + len(own)]) == own
    assert any(drawn[:4] != drawn[4:] for drawn in table.values())
    resumed = seen(range(3, 6), num_workers=1)
    assert resumed == {number: drawn[3:6] for number, drawn in table.items()}
    assert seen(range(1), seed=1) != seen(range(1))


def test_random_order_is_not_touched_by_the_table(dataset, shards):
    drawn = samples(dataset(seed=3))
    assert drawn == samples(dataset(seed=3, template_order="random"))
    assert sorted(drawn) != sorted(samples(dataset(seed=3, template_order="table")))
    numbers = [sample_seed(0, 0, 0, f"s{i}") % 5 for i in range(3)]
    pairs = [(f"s{i}", f"template {number} of a class {i}.") for i, number in enumerate(numbers)]
    assert peek(shards, PROMPTS, seed=0) == pairs


def test_tokens_are_those_of_a_prompt_of_the_label(dataset, tokenizer):
    allowed = [{tuple(tokenizer([PROMPTS(c, t)])[0].tolist()) for t in range(5)} for c in range(CLASSES)]
    seen = samples(dataset())
    assert all(tokens in allowed[number % CLASSES] for number, _, tokens in seen)
    drawn = Counter(tokens for _, _, tokens in seen)
    assert len(drawn) == len(PROMPTS)
    assert max(drawn.values()) < 2.5 * min(drawn.values())


def test_iterating_leaves_the_random_states_as_they_were(dataset):
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    expected = torch.rand(3).tolist(), random.random(), np.random.rand()
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    for workers in (0, 1):
        list(dataset(num_workers=workers))
    assert (torch.rand(3).tolist(), random.random(), np.random.rand()) == expected


@pytest.mark.parametrize("workers", [0, 2])
def test_more_samples_than_exist_repeat_the_set_with_new_pairs(dataset, shards, workers):
    data = dataset(batch_size=64, shards=shards[:2], num_samples=450, num_workers=workers)
    batches = list(data)
    assert [len(images) for images, _ in batches] == [64] * 7 + [2]
    seen = samples(batches)
    order = [number for number, _, _ in seen]
    assert sorted(order[:200]) == sorted(order[200:400]) == list(range(200))
    assert order[:200] != order[200:400]
    assert len({drawn for _, drawn, _ in seen}) == 450


def test_fewer_samples_cut_the_set_and_a_small_set_is_one_batch(dataset, shards):
    assert [len(images) for images, _ in dataset(batch_size=64, num_samples=100, num_workers=2)] == [64, 36]
    assert [len(images) for images, _ in dataset(shards=shards[:1], num_workers=2)] == [50]


def test_ranks_make_equal_batches_and_a_small_share_starts_again(dataset):
    per_rank = [list(dataset(batch_size=64, rank=rank, world_size=3, num_workers=1)) for rank in range(3)]
    sizes = [[len(images) for images, _ in batches] for batches in per_rank]
    assert sizes == [[64] * 5 + [14]] * 3
    orders = [[number for images, _ in batches for number in numbers(images)] for batches in per_rank]
    shares = [set(order) for order in orders]
    assert not shares[0] & shares[1] | shares[1] & shares[2] | shares[0] & shares[2]
    for order, share in zip(orders, shares):
        assert len(set(order[: len(share)])) == len(share)  # all of it before anything twice


def test_fewer_shards_than_workers_or_than_ranks(dataset, shards):
    assert dataset(shards=shards[:3], num_workers=4).num_workers == 3
    with pytest.raises(InputError, match=naming("3 shards", "4 ranks")):
        dataset(shards=shards[:3], rank=0, world_size=4)


def test_an_abandoned_epoch_does_not_touch_the_next(dataset):
    for workers in (0, 2):
        data = dataset(batch_size=100, num_workers=workers)
        next(iter(data))
        data.set_epoch(0)
        assert sorted(samples(data)) == sorted(samples(dataset(batch_size=100)))


def test_resampling_follows_the_weights(dataset, shards):
    data = dataset(batch_size=100, shard_weights=[1, 1, 0, 0, 0, 0, 0, 0], num_samples=1000, num_workers=2)
    batches = list(data)
    assert [len(images) for images, _ in batches] == [100] * 10
    assert {number for images, _ in batches for number in numbers(images)} <= set(range(200))


@pytest.fixture
def broken(shards, tmp_path):
    """A good shard of 50, one with 3 bad images of 10, one that ends in the middle, and one that is no tar."""
    bad = [m for i in range(10) for m in ((f"b{i}.png", b"no" if i < 3 else png(i)), (f"b{i}.cls", b"1"))]
    tars.write(tmp_path / "bad.tar", bad)
    whole = [m for i in range(10) for m in ((f"t{i}.png", png(i)), (f"t{i}.cls", b"1"))]
    tars.write(tmp_path / "cut.tar", whole)
    content = (tmp_path / "cut.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(content[: 512 * 2 * 2 * 5 + 700])
    (tmp_path / "text.tar").write_bytes(b"hello " * 999)
    return [shards[0], *(str(tmp_path / f"{name}.tar") for name in ("bad", "cut", "text"))]


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_and_tars_are_skipped_and_reported(dataset, broken, workers, caplog):
    data = dataset(batch_size=20, shards=broken, num_samples=62, num_workers=workers, max_lost=1)
    assert [len(images) for images, _ in data] in ([20, 20, 20, 2], [20, 20, 20, 1])
    assert "skipped 5" in caplog.text
    caplog.clear()
    list(dataset(batch_size=20, shards=broken[:2], num_samples=60, max_lost=0.05))
    assert re.search(r"epoch 0: skipped 3\b.*bad\.tar.*\bb[012]\b", caplog.text)


def test_skipped_images_shrink_the_last_batch_and_ranks_stay_equal(dataset, broken, shards):
    settings = {"batch_size": 20, "shards": broken[:2], "num_samples": 60, "max_lost": 0.1}
    assert [len(images) for images, _ in dataset(**settings)] == [20, 20, 17]
    settings["max_lost"] = 0.5  # the rank that has the small shard reads it several times
    ranks = [dataset(**settings, rank=r, world_size=2) for r in range(2)]
    assert [[len(images) for images, _ in data] for data in ranks] == [[20, 10]] * 2


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("label", "named"),
    [
        (b"7", ["label 7", "3", "--classnames"]),
        (b"cat", ["'cat'", "integer", "--label-key"]),
    ],
)
def test_a_bad_label_stops_with_a_plain_sentence(dataset, shards, tmp_path, workers, label, named):
    tars.write(tmp_path / "wrong.tar", [("x.png", png(1)), ("x.cls", label)])
    with pytest.raises(InputError, match=naming("wrong.tar", "x", *named)) as error:
        list(dataset(shards=[shards[0], str(tmp_path / "wrong.tar")], num_workers=workers))
    assert "Traceback" not in str(error.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_nothing_readable_ends_in_an_error(dataset, broken, tmp_path, workers):
    tars.write(tmp_path / "none.tar", [(f"{i}.{ext}", b"1") for i in range(5) for ext in ("png", "cls")])
    data = {"shards": [str(tmp_path / "none.tar"), broken[3]], "num_samples": 5, "num_workers": workers}
    with pytest.raises(InputError, match=r"^(?!.*--max-lost).*none\.tar"):
        list(dataset(**data, max_lost=9))
    with pytest.raises(InputError, match=naming("epoch 0", "of 5", "--max-lost 0.01")):
        list(dataset(**data))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_ends_where_more_is_lost_than_may_be(dataset, broken, workers, caplog):
    """3 of 60: 5 %."""
    settings = {"shards": broken[:2], "num_samples": 60, "num_workers": workers}
    assert sum(len(images) for images, _ in dataset(**settings, max_lost=0.05)) == 57
    with pytest.raises(
        InputError, match=naming("epoch 0", "3 of 60", "--max-lost 0.049") + r".*bad\.tar.*\bb[012]\b"
    ):
        list(dataset(**settings, max_lost=0.049))


def test_classes_without_an_image_are_named_once(dataset, shards, caplog):
    more = ClassPrompts([*PROMPTS.classnames, "unicorn"], PROMPTS.templates)
    whole = dataset(prompts=more, num_workers=1)
    for _ in range(2):
        list(whole)
        assert caplog.text.count("unicorn") == 1 and says(caplog.text, "1 of 5", "unicorn")
    for part in ({"num_samples": 20}, {"rank": 0, "world_size": 2}, {"shard_weights": [1.0] * len(shards)}):
        list(dataset(prompts=more, **part))
    assert caplog.text.count("unicorn") == 1


class _Server(SimpleHTTPRequestHandler):
    def do_GET(self):
        if "missing" in self.path:
            return self.send_error(404)
        if "broken" in self.path:  # the connection ends in the middle of the tar
            data = Path(self.translate_path(self.path.replace("broken", "0"))).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            return self.wfile.write(data[: len(data) // 2])
        return super().do_GET()

    def log_message(self, *args):
        pass


@pytest.fixture
def server(shards):
    folder = shards[0].rsplit("/", 1)[0]
    server = ThreadingHTTPServer(("127.0.0.1", 0), lambda *args: _Server(*args, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_shards_over_http_and_what_breaks_there(dataset, server, caplog):
    urls = [f"{server}/0.tar", f"{server}/missing.tar", f"{server}/broken.tar"]
    data = dataset(shards=urls, batch_size=100, num_samples=80, num_workers=1, max_lost=1)
    images = [number for images, _ in data for number in numbers(images)]
    assert set(range(50)) <= set(images)
    assert re.search(r"skipped \d+ unreadable", caplog.text)
    with pytest.raises(InputError, match=naming(f"{server}/missing.tar")):
        list(dataset(shards=[f"{server}/missing.tar"], num_samples=10, max_lost=1))


def test_pipes_are_read(dataset, shards):
    data = dataset(shards=[f"pipe:cat {shards[0]}"], num_samples=50)
    assert sorted(number for images, _ in data for number in numbers(images)) == list(range(50))


def test_batches_as_dicts(dataset):
    batch = next(iter(dataset(as_dict=True)))
    assert batch.keys() == {"image", "text"}
    assert batch["text"].dtype == torch.int64
    assert batch["text"].shape == (512, 77)


def test_labels_are_a_part_of_their_own_in_a_dict(dataset):
    images, tokens = next(iter(dataset(with_labels=True)))
    batch = next(iter(dataset(with_labels=True, as_dict=True)))
    assert batch.keys() == {"image", "text", "labels"}
    assert torch.equal(torch.cat([batch["text"], batch["labels"][:, None]], dim=1), tokens)
    assert torch.equal(batch["image"], images)


def test_it_is_not_for_a_data_loader_with_workers(dataset):
    with pytest.raises(RuntimeError, match=naming("DataLoader", "workers")):
        next(iter(DataLoader(dataset(), batch_size=None, num_workers=1)))


def test_workers_may_be_spawned(dataset):
    data = dataset(num_workers=1, batch_size=300)
    data._loader.multiprocessing_context = multiprocessing.get_context("spawn")
    assert sorted(samples(data)) == sorted(samples(dataset(batch_size=300)))


def test_peek_shows_the_pairs_of_epoch_0(dataset, shards):
    pairs = peek(shards, PROMPTS, seed=3)
    assert [key for key, _ in pairs] == ["s0", "s1", "s2"]
    tokens = {number: row for number, _, row in samples(dataset(seed=3))}
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    assert all(tokens[int(key[1:])] == tuple(tokenizer([prompt])[0].tolist()) for key, prompt in pairs)


def part(*values):
    return torch.tensor(values), torch.tensor(values)


def test_rebatch_stops_where_as_many_are_skipped():
    batches = rebatch([[part(1, 2, 3), part(4)]], 3, 5, lambda: 1)
    assert [images.tolist() for images, _ in batches] == [[1, 2, 3], [4]]


@pytest.mark.parametrize(("workers", "ranks"), [(0, 1), (2, 1), (4, 3), (1, 5)])
def test_labelled_images_come_once_at_any_workers_and_ranks(shards, workers, ranks):
    keys = []
    for rank in range(ranks):
        data = LabelledDataset(shards[:3], Augment(), 64, num_classes=CLASSES, num_workers=workers, rank=rank,
                               world_size=ranks)  # fmt: skip
        for batch in data:
            assert batch["labels"].tolist() == [n % CLASSES for n in numbers(batch["images"])]
            keys += batch["keys"]
    assert sorted(keys) == sorted(f"s{i}" for i in range(300))


def test_labels_that_are_class_names_give_the_same_batches(tmp_path, tokenizer):
    files = tars.samples(range(20))
    named = files | {
        name: f"{NAMES[int(raw)].title()}\n".encode() for name, raw in files.items() if raw.isdigit()
    }
    prompts = ClassPrompts([name.title() for name in NAMES], ["the digit {c}."])
    shards = [
        tars.write(tmp_path / f"{name}.tar", raw) for name, raw in (("by index", files), ("by name", named))
    ]
    batches = []
    for shard in shards:
        names = {"num_classes": 10, "classnames": prompts.classnames}
        (labelled,) = LabelledDataset([shard], Augment(), 20, num_workers=1, **names)
        (batch,) = ClassPromptDataset([shard], Augment(), tokenizer, 20, prompts=prompts, with_labels=True)
        batches.append((labelled["labels"].tolist(), *map(torch.Tensor.tolist, batch)))
        assert labelled["paths"] == [""] * 20
    assert batches[0] == batches[1] and batches[0][0] == [tars.label(i) for i in range(20)]
    assert peek(shards[:1], prompts, 0)[0] == peek(shards[1:], prompts, 0)[0] == ("s0000", "the digit Zero.")


def test_labelled_groups_and_skipped_images(broken, tmp_path, caplog):
    tars.write(
        tmp_path / "groups.tar", [("a.png", png(1)), ("a.cls", b"1"), ("a.json", b'{"site": "north"}')]
    )
    data = LabelledDataset([str(tmp_path / "groups.tar")], Augment(), 4, num_classes=2, group_key="json:site")
    assert next(iter(data))["groups"] == ["north"]
    data = LabelledDataset(broken, Augment(), 64, num_classes=CLASSES, num_workers=3)
    assert sum(len(batch["labels"]) for batch in data) == 62
    assert "skipped 5" in caplog.text


# on small shards of numbered digits, see tars.py

DIGITS = ClassPrompts(tars.NAMES, ["the digit {c}.", "{c}", "a handwritten {c}."])
CROPS = transforms.Compose(
    [
        transforms.RandomResizedCrop(8, scale=(0.5, 1.0)),
        transforms.RandomHorizontalFlip(),
        transforms.ColorJitter(0.4, 0.4, 0.4, 0.1),
        transforms.ToTensor(),
    ]
)


def number_and_crop(image):
    """A crop whose first pixel is the image's number."""
    crop = CROPS(image)
    crop[:, 0, 0] = tars.number_of(image)
    return crop


def drawn(batches):
    """The bits of (crop, tokens) by the image's number; a number that comes twice comes with the same bits."""
    found = {}
    for images, texts in batches:
        for crop, tokens in zip(images, texts):
            bits = crop.numpy().tobytes(), tokens.numpy().tobytes()
            assert found.setdefault(int(crop[0, 0, 0]), bits) == bits
    return found


@pytest.fixture
def digits_of(tokenizer):
    def digits_of(shards, batch_size=20, **kwargs):
        return ClassPromptDataset(
            shards, number_and_crop, tokenizer, batch_size, **{"prompts": DIGITS, **kwargs}
        )

    return digits_of


def order_of(batches):
    return [int(number) for images, _ in batches for number in images[:, 0, 0, 0]]


def test_crops_are_the_same_bits_at_any_workers_and_ranks(tmp_path, digits_of):
    shards = tars.shards(
        tmp_path, 60, 12
    )  # 5 a shard: equal shares for 1, 2 and 3 ranks, a shard for each of 4 workers
    expected = drawn(digits_of(shards))
    assert sorted(expected) == list(range(60))
    for world_size in (1, 2, 3):
        for workers in (0, 1, 2, 4):
            found = {}
            for rank in range(world_size):
                part = drawn(digits_of(shards, 7, num_workers=workers, rank=rank, world_size=world_size))
                assert not found.keys() & part.keys()
                found |= part
            assert found == expected, f"{world_size} ranks, {workers} workers"
    later = digits_of(shards)
    later.set_epoch(1)
    for other in (digits_of(shards, seed=1), later):
        assert all(expected[number][0] != crop for number, (crop, _) in drawn(other).items())


def test_ranks_share_the_samples_anew_each_epoch(tmp_path, digits_of):
    one = digits_of(tars.shards(tmp_path, 60, 12), rank=0, world_size=2)
    first, second = set(order_of(one)), set(order_of(one))
    assert len(first) == len(second) == 30
    assert first != second


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_has_its_announced_batches_despite_skipped_ones(tmp_path, digits_of, workers, world_size):
    bad = {f"s{i:04d}_png": b"no image" for i in range(0, 32, 2)}
    shards = [
        tars.write(tmp_path / f"{i}.tar", tars.samples(range(8 * i, 8 * i + 8), **bad)) for i in range(4)
    ]
    for rank in range(world_size):
        one = digits_of(shards, 5, num_workers=workers, rank=rank, world_size=world_size, max_lost=1)
        batches = list(one)
        assert len(batches) == len(one) == math.ceil(32 / world_size / 5)
        assert world_size == 1 or [len(images) for images, _ in batches] == [5, 5, 5, 1]
        order, share = order_of(batches), 16 // world_size
        assert len(set(order[:share])) == share  # all that is good, before anything twice
        assert all(number % 2 for number in order)


def test_resampling_needs_no_shard_a_rank_and_repeats_itself(tmp_path, digits_of):
    settings = {"shard_weights": [1.0, 2.0], "num_samples": 24, "world_size": 3}
    shards = tars.shards(tmp_path, 8, 2)
    ranks = [digits_of(shards, rank=rank, **settings) for rank in range(3)]
    assert [[len(images) for images, _ in rank] for rank in ranks] == [[8]] * 3
    first = digits_of(shards, rank=0, **settings)
    assert order_of(first) == order_of(digits_of(shards, rank=0, **settings))


def test_mistakes_in_the_arguments_are_errors(tmp_path, digits_of):
    with pytest.raises(InputError, match=r"shards.*empty|no shards"):
        digits_of([])
    with pytest.raises(InputError, match=r"shards.*empty|no shards"):
        LabelledDataset([], CROPS, 8, num_classes=10)
    with pytest.raises(InputError, match=r"(?=.*batch.size)(?=.*\b0\b)"):
        digits_of(tars.shards(tmp_path, 2, 1), 0)
    shard = tars.write(tmp_path / "none.tar", {"a.cls": b"0", "a.txt": b"x"})
    with pytest.raises(InputError, match=naming("none.tar", "images")):
        digits_of([shard])


def test_a_data_folder_brings_its_prompts_and_its_count(tmp_path, tokenizer):
    data = tars.data_folder(tmp_path / "data", 10, 2)
    tars.shards(tmp_path / "more", 7, 1, first=10)
    for source, count in (
        (f"{data}", 10),
        (f"{data}/train/{{0..1}}.tar", 10),
        (f"{data}::{tmp_path}/more", 17),
    ):
        one = ClassPromptDataset(source, number_and_crop, tokenizer, 8)
        assert (one.prompts.classnames, one.prompts.templates) == (tars.NAMES, ["a photo of a {c}."])
        assert sorted(order_of(one)) == list(range(count))


def test_a_data_hubs_set_is_read_as_it_is(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    folder, repo, files = tars.data_folder(tmp_path, 12, 2), "/datasets/clip-benchmark/wds_digits", {}
    for path in folder.rglob("*.*"):
        part = "resolve" if path.suffix == ".tar" else "raw"
        files[f"{repo}/{part}/main/{path.relative_to(folder)}"] = path.read_bytes()
    with tars.served(files) as (url, _):
        one = ClassPromptDataset(f"{url}{repo}/tree/main", number_and_crop, tokenizer, 8, num_samples=12)
        assert sorted(order_of(one)) == list(range(12))
        with pytest.raises(InputError, match="--train-num-samples"):
            ClassPromptDataset(f"{url}{repo}/tree/main", number_and_crop, tokenizer, 8)


def _one_rank(shards, rank, found):
    dist_file = f"file://{found}-init"
    torch.distributed.init_process_group("gloo", init_method=dist_file, rank=rank, world_size=2)
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    one = ClassPromptDataset(shards, number_and_crop, tokenizer, 8, prompts=DIGITS)
    torch.save((one.rank, one.world_size, order_of(one)), f"{found}-{rank}")


def test_rank_and_world_size_are_torch_distributeds(tmp_path):
    shards, context = tars.shards(tmp_path, 20, 4), multiprocessing.get_context("fork")
    ranks = [context.Process(target=_one_rank, args=(shards, rank, tmp_path / "r")) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(60)
    found = [torch.load(f"{tmp_path}/r-{rank}") for rank in range(2)]
    assert [one[:2] for one in found] == [(0, 2), (1, 2)]
    assert sorted(found[0][2] + found[1][2]) == list(range(20))


def test_without_workers_a_users_data_loader_changes_nothing(tmp_path, digits_of):
    shards = tars.shards(tmp_path, 20, 2)
    assert order_of(DataLoader(digits_of(shards), batch_size=None)) == order_of(digits_of(shards))


def test_a_plain_loop_as_in_the_docstring_lowers_the_loss(tmp_path):
    torch.manual_seed(0)
    vision = open_clip.model.CLIPVisionCfg(image_size=8, layers=1, width=32, patch_size=4, head_width=16)
    text = open_clip.model.CLIPTextCfg(context_length=16, width=32, heads=2, layers=1)
    model = open_clip.CLIP(32, vision, text, output_dict=True)
    tokenizer = open_clip.get_tokenizer("ViT-B-32", context_length=16)
    prompts = ClassPrompts(tars.NAMES, ["the digit {c}."])
    shards = tars.shards(tmp_path, 60, 2)
    dataset = ClassPromptDataset(shards, transforms.ToTensor(), tokenizer, 20, prompts=prompts, num_workers=1)
    loss, optimizer = open_clip.ClipLoss(), torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(20):
        for images, tokens in dataset:
            optimizer.zero_grad()
            one = loss(**model(images, tokens))
            one.backward()
            optimizer.step()
            losses.append(one.item())
    assert len(losses) == 60
    # far from zero: images of one class in a batch stay each other's negatives
    assert sum(losses[-3:]) < 0.85 * sum(losses[:3])


@pytest.mark.parametrize(
    ("passes", "total", "expected"),
    [
        (["abc def"], 6, "abc def"),
        (["ab"], 2, "ab"),
        (["abc ABC de DE"], 10, "abc ABC deD E"),  # two workers
        (["ab ABC DE"], 7, "ABC abD E"),  # a full batch does not wait for a smaller one
        (["abc de"], 4, "abc d"),
        (["abc def"], 2, "ab"),
        (["abc d", "xyz w"], 8, "abc dxy zw"),
        (["abc d", "xyz w"], 5, "abc dx"),
        (["ab", "xy", "vw", "st"], 8, "abx yvw st"),  # a set smaller than a batch
        (["abc d", "uvw xyz t"], 9, "abc duv xyz"),
        (["abc d efg hi", "klm nop"], 15, "abc efg dhi klm nop"),
        (["ab", "cde f", "gh"], 7, "abc def g"),
    ],
)
def test_batches_are_joined_only_where_they_are_small(passes, total, expected):
    batches = ([part(*map(ord, batch)) for batch in one.split()] for one in passes)
    assert " ".join("".join(map(chr, images)) for images, _ in rebatch(batches, 3, total)) == expected


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_stops_at_wrong_labels_and_unreadable_sets(tmp_path, workers):
    with pytest.raises(InputError, match=r"(?=.*label [3-9]\b)(?=.*\b3 class)(?=.*--classnames)"):
        list(LabelledDataset(tars.shards(tmp_path, 20, 2), CROPS, 4, num_classes=3, num_workers=workers))
    bad = tars.write(tmp_path / "bad.tar", b"no tar" * 100)
    with pytest.raises(InputError, match=r"bad\.tar.*bad\.tar: "):
        list(LabelledDataset([bad], CROPS, 4, num_classes=3, num_workers=workers))


def test_a_rank_without_a_sample_of_its_own_is_no_error(tmp_path):
    settings = {"num_classes": 10, "world_size": 2}
    parts = [LabelledDataset(tars.shards(tmp_path, 1, 1), CROPS, 4, rank=r, **settings) for r in range(2)]
    assert [len(list(part)) for part in parts] == [1, 0]


def test_evaluation_comes_in_the_order_of_the_shards(tmp_path):
    batches = list(LabelledDataset(tars.shards(tmp_path, 20, 3), CROPS, 8, num_classes=10))
    order = [number for start in range(3) for number in range(start, 20, 3)]
    assert [key for batch in batches for key in batch["keys"]] == [f"s{number:04d}" for number in order]
    assert [label for batch in batches for label in batch["labels"].tolist()] == list(map(tars.label, order))


def test_training_keeps_its_workers_and_evaluation_does_not(tmp_path, tokenizer):
    """Left to the garbage collector, torch waits 5 seconds for each of them."""
    shards, others = tars.shards(tmp_path, 20, 2), set(active_children())
    gc.collect()
    gc.disable()
    try:
        training = ClassPromptDataset(shards, CROPS, tokenizer, 4, prompts=DIGITS, num_workers=2)
        list(training)
        workers = set(active_children()) - others
        assert len(workers) == 2
        list(training)
        assert set(active_children()) - others == workers
        del training
        assert set(active_children()) <= others
        for classes in (10, 3):
            with suppress(InputError):  # with 3, a label is wrong
                list(LabelledDataset(shards, CROPS, 4, num_classes=classes, num_workers=2))
            assert set(active_children()) <= others
    finally:
        gc.enable()
