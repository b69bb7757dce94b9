"""ClassPromptDataset and LabelledDataset on real shards: what an epoch is."""

import io
import multiprocessing
import random
import tarfile
import threading
from collections import Counter
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms

from flyp_plugin import ClassPromptDataset, ClassPrompts
from flyp_plugin.data import LabelledDataset, peek, rebatch
from flyp_plugin.errors import InputError

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


def png(number):
    stream = io.BytesIO()
    Image.new("RGB", (2, 2), (number % 256, number // 256, 0)).save(stream, "PNG")
    return stream.getvalue()


def write_tar(path, samples):
    with tarfile.open(path, "w") as tar:
        for name, data in samples:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


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
        write_tar(folder / f"{shard}.tar", members)
    return [str(folder / f"{shard}.tar") for shard in range(SHARDS)]


@pytest.fixture
def dataset(shards, tokenizer):
    def dataset(batch_size=512, shards=shards, **kwargs):
        return ClassPromptDataset(shards, Augment(), tokenizer, batch_size, **{"prompts": PROMPTS, **kwargs})

    return dataset


def numbers(images):
    pixels = (images[:, :, 0, 0] * 255).round().long()
    return (pixels[:, 0] + 256 * pixels[:, 1]).tolist()


def samples(batches):
    """(image number, random numbers, tokens) of each sample, in order."""
    return [
        (number, tuple(image[:, 0, 1].tolist()), tuple(row.tolist()))
        for images, tokens in batches
        for number, image, row in zip(numbers(images), images, tokens)
    ]


@pytest.mark.parametrize("workers", [0, 1, 2, 4])
def test_an_epoch_is_each_key_once_in_the_fewest_batches_at_any_number_of_workers(dataset, workers):
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
def test_more_samples_than_there_are_repeat_the_set_with_other_pairs(dataset, shards, workers):
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


def test_fewer_shards_than_workers_start_fewer_and_than_ranks_are_an_error(dataset, shards):
    assert dataset(shards=shards[:3], num_workers=4).num_workers == 3
    with pytest.raises(InputError, match="3 shards cannot be shared by 4 ranks"):
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
    write_tar(tmp_path / "bad.tar", bad)
    whole = [m for i in range(10) for m in ((f"t{i}.png", png(i)), (f"t{i}.cls", b"1"))]
    write_tar(tmp_path / "cut.tar", whole)
    content = (tmp_path / "cut.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(content[: 512 * 2 * 2 * 5 + 700])
    (tmp_path / "text.tar").write_bytes(b"hello " * 999)
    return [shards[0], *(str(tmp_path / f"{name}.tar") for name in ("bad", "cut", "text"))]


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_and_tars_are_skipped_counted_and_reported(dataset, broken, workers, caplog):
    data = dataset(batch_size=20, shards=broken, num_samples=62, num_workers=workers)
    assert [len(images) for images, _ in data] in ([20, 20, 20, 2], [20, 20, 20, 1])
    assert "skipped 5 unreadable images or tars, the first: " in caplog.text
    caplog.clear()
    list(dataset(batch_size=20, shards=broken[:2], num_samples=60))
    assert "epoch 0: skipped 3 unreadable images or tars" in caplog.text
    assert "bad.tar, sample b" in caplog.text


def test_skipped_images_make_the_last_batch_smaller_but_ranks_stay_equal(dataset, broken, shards):
    assert [len(images) for images, _ in dataset(batch_size=20, shards=broken[:2], num_samples=60)] == [
        20,
        20,
        17,
    ]
    ranks = [
        dataset(batch_size=20, shards=broken[:2], num_samples=60, rank=r, world_size=2) for r in range(2)
    ]
    assert [[len(images) for images, _ in data] for data in ranks] == [[20, 10]] * 2


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("label", "sentence"),
    [
        (b"7", "sample x: label 7 is outside 0..3, for there are 4 class names"),
        (b"cat", "the label 'cat' is not an integer"),
    ],
)
def test_a_bad_label_stops_with_a_plain_sentence(dataset, shards, tmp_path, workers, label, sentence):
    write_tar(tmp_path / "wrong.tar", [("x.png", png(1)), ("x.cls", label)])
    with pytest.raises(InputError) as error:
        list(dataset(shards=[shards[0], str(tmp_path / "wrong.tar")], num_workers=workers))
    assert sentence in str(error.value)
    assert "Traceback" not in str(error.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_nothing_readable_ends_in_an_error(dataset, broken, tmp_path, workers):
    write_tar(tmp_path / "none.tar", [(f"{i}.{ext}", b"1") for i in range(5) for ext in ("png", "cls")])
    data = dataset(shards=[str(tmp_path / "none.tar"), broken[3]], num_samples=5, num_workers=workers)
    with pytest.raises(InputError, match="not one sample of .* can be used; the first problem is"):
        list(data)


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
    data = dataset(shards=urls, batch_size=100, num_samples=80, num_workers=1)
    images = [number for images, _ in data for number in numbers(images)]
    assert set(range(50)) <= set(images)
    assert "unreadable images or tars" in caplog.text
    with pytest.raises(InputError, match="not one sample of"):
        list(dataset(shards=[f"{server}/missing.tar"], num_samples=10))


def test_pipes_are_read(dataset, shards):
    data = dataset(shards=[f"pipe:cat {shards[0]}"], num_samples=50)
    assert sorted(number for images, _ in data for number in numbers(images)) == list(range(50))


def test_batches_as_dicts(dataset):
    batch = next(iter(dataset(as_dict=True)))
    assert batch.keys() == {"image", "text"}
    assert batch["text"].dtype == torch.int64
    assert batch["text"].shape == (512, 77)


def test_it_is_not_for_a_data_loader_with_workers(dataset):
    with pytest.raises(RuntimeError, match="starts its own workers"):
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


def test_rebatch_passes_full_batches_and_joins_the_rest():
    passes = [[part(1, 2, 3), part(4), part(5, 6, 7), part(8, 9)], [part(11, 12, 13), part(14, 15, 16)]]
    batches = [images.tolist() for images, _ in rebatch(passes, 3, 15)]
    assert batches == [[1, 2, 3], [5, 6, 7], [4, 8, 9], [11, 12, 13], [14, 15, 16]]
    passes = [[part(1, 2)], [part(3, 4, 5), part(6)], [part(7, 8)]]
    assert [images.tolist() for images, _ in rebatch(passes, 3, 7)] == [[1, 2, 3], [4, 5, 6], [7]]
    assert [images.tolist() for images, _ in rebatch([[part(1, 2, 3), part(4)]], 3, 5, lambda: 1)] == [
        [1, 2, 3],
        [4],
    ]


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


def test_labelled_groups_and_skipped_images(broken, tmp_path, caplog):
    write_tar(tmp_path / "groups.tar", [("a.png", png(1)), ("a.cls", b"1"), ("a.json", b'{"site": "north"}')])
    data = LabelledDataset([str(tmp_path / "groups.tar")], Augment(), 4, num_classes=2, group_key="json:site")
    assert next(iter(data))["groups"] == ["north"]
    data = LabelledDataset(broken, Augment(), 64, num_classes=CLASSES, num_workers=3)
    assert sum(len(batch["labels"]) for batch in data) == 62
    assert "skipped 5 unreadable" in caplog.text
