"""Each stage of a sample's way, on literals: read, labelled, prompted, decoded."""

import gzip
import io
import json
import random

import numpy as np
import pytest
import torch
import webdataset as wds
from PIL import Image
from torchvision.transforms import ColorJitter, Compose, RandomResizedCrop, ToTensor

from flyp_plugin.errors import InputError
from flyp_plugin.images import to_rgb
from flyp_plugin.names import index_names
from flyp_plugin.samples import (
    decode_images,
    draw_prompts,
    label_samples,
    read_samples,
    sample_seed,
    shuffle,
)
from flyp_plugin.workers import Skipped, preserve_random_states
from tests import tars
from tests.naming import naming, says

BLOCK = 512  # of a tar; a test sample is header, image, header, label: four of them
WHOLE = tars.tar(tars.samples(range(4)))


def sample(key: str = "k", **members) -> dict:
    """A sample as read_samples gives it."""
    return {"__key__": key, "__url__": "0.tar", "__broken__": False, **members}


def read(*shards: str, **kwargs):
    """(keys, labels, what was skipped) of shards, through read_samples and label_samples."""
    skipped: list[str] = []
    read = read_samples(shards, lambda what, lost: skipped.append(what), retries=1)
    found = list(label_samples(read, 10, skipped.append, **kwargs))
    return [s["key"] for s in found], [s["label"] for s in found], skipped


# read_samples


def test_the_test_samples_are_four_blocks():
    assert all(len(tars.png(number)) <= BLOCK for number in range(4))


def test_a_sample_is_its_members_and_where_it_is_from(tmp_path):
    shard = tars.write(
        tmp_path / "0.tar", {"a.PNG": b"image", "a.cls": b"3", "b.png": b"other", "b.cls": b"4"}
    )
    assert list(read_samples([shard], pytest.fail)) == [
        sample("a", png=b"image", cls=b"3") | {"__url__": shard},
        sample("b", png=b"other", cls=b"4") | {"__url__": shard},
    ]


def test_keys_with_folders_and_the_same_key_in_two_shards(tmp_path):
    shards = [
        tars.write(tmp_path / f"{i}.tar", {"x/y.png": b"image", "x/y.cls": b"%d" % i}) for i in range(2)
    ]
    assert read(*shards) == (["x/y", "x/y"], [0, 1], [])


def test_a_tar_that_breaks_in_an_image_is_read_up_to_there(tmp_path):
    shard = tars.write(tmp_path / "0.tar", WHOLE[: 9 * BLOCK + 50])  # in the third sample's image
    keys, labels, (skipped,) = read(shard)
    assert (keys, labels) == (["s0000", "s0001"], [0, 1])
    assert skipped == f"{shard}: ReadError: unexpected end of data" or skipped.startswith(
        f"{shard}: ReadError"
    )


def test_a_tar_that_breaks_in_a_label_is_counted_once(tmp_path):
    shard = tars.write(
        tmp_path / "0.tar", WHOLE[: 11 * BLOCK]
    )  # the third label's header is there, its block is not
    keys, _, skipped = read(shard)
    assert (keys, len(skipped)) == (["s0000", "s0001"], 1)


@pytest.mark.parametrize("end", [8 * BLOCK, 10 * BLOCK, 10 * BLOCK + 77])
def test_a_tar_that_ends_between_two_members_is_no_wrong_label(tmp_path, end):
    """tarfile takes such an end for a good one."""
    shard = tars.write(tmp_path / "0.tar", WHOLE[:end])
    keys, labels, (skipped,) = read(shard)
    assert (keys, labels) == (["s0000", "s0001"], [0, 1])
    assert says(skipped, shard, "truncated header" if end % BLOCK else "end")


def test_a_broken_tar_loses_what_was_not_read_of_it(tmp_path):
    shard, lost = tars.write(tmp_path / "0.tar", WHOLE[: 9 * BLOCK]), []
    read = read_samples([shard], lambda what, number: lost.append(number), sizes={shard: 4})
    assert [(sample["__key__"], sample["__broken__"]) for sample in read] == [
        ("s0000", False),
        ("s0001", True),
    ]
    assert lost == [3]  # at most: the one that the break follows is taken for incomplete


@pytest.mark.parametrize("retries", [0, 1, 3])
def test_a_remote_tar_that_breaks_is_read_on_from_there(tmp_path, retries, caplog):
    """The command gives two samples more at each try."""
    shard = tars.write(tmp_path / "0.tar", WHOLE)
    count = tmp_path / "count"
    command = f"pipe:echo >> {count}; head -c $((`wc -l < {count}` * {4 * BLOCK} + 90)) {shard}"
    skipped: list[str] = []
    read = read_samples([command], lambda what, lost: skipped.append(what), retries)
    assert [s["__key__"] for s in read] == [f"s{i:04d}" for i in range(retries + 1)]
    assert len(count.read_text()) == retries + 1
    assert len(skipped) == 1 and len(caplog.records) == retries


def test_missing_files_and_addresses_are_not_read_again(tmp_path, caplog):
    with tars.served({}) as (url, asked):
        assert read(str(tmp_path / "gone.tar"), f"{url}/gone.tar")[2][1].endswith("HTTP Error 404: Not Found")
        assert asked == ["/gone.tar"] and not caplog.records


def test_the_order_of_members_does_not_matter_where_a_tar_ends(tmp_path):
    members = dict(sorted(tars.samples(range(4)).items()))
    assert list(members)[:2] == ["s0000.cls", "s0000.png"]
    for end in (10 * BLOCK, 11 * BLOCK, 11 * BLOCK + 50):
        shard = tars.write(tmp_path / "0.tar", tars.tar(members)[:end])
        keys, _, skipped = read(shard)
        assert (keys, len(skipped)) == (["s0000", "s0001"], 1)


def test_bad_and_missing_tars_are_counted_and_others_are_read(tmp_path):
    bad = tars.write(tmp_path / "bad.tar", b"<html>moved</html>" * 100)
    empty = tars.write(tmp_path / "empty.tar", b"")
    gone = str(tmp_path / "gone.tar")
    good = [tars.write(tmp_path / f"{i}.tar", tars.samples([i])) for i in range(2)]
    keys, _, skipped = read(good[0], bad, empty, gone, good[1])
    assert keys == ["s0000", "s0001"]
    assert [text.split(":")[0] for text in skipped] == [bad, empty, gone]
    assert skipped[2] == f"{gone}: FileNotFoundError: No such file or directory"


def test_a_tar_without_members_is_nothing_and_no_error(tmp_path):
    assert read(tars.write(tmp_path / "0.tar", {})) == ([], [], [])


def test_compressed_tars_and_pipes_are_read(tmp_path):
    packed = tars.write(tmp_path / "0.tar.gz", gzip.compress(WHOLE))
    plain = tars.write(tmp_path / "0.tar", WHOLE)
    assert read(packed) == read(plain) == read(f"pipe:cat {plain}")
    keys, _, (skipped,) = read(f"pipe:cat {tmp_path}/gone.tar 2>/dev/null")
    assert keys == [] and skipped.startswith("pipe:cat ")


def test_shards_are_opened_one_after_another_as_they_are_needed(tmp_path):
    def shards():
        yield tars.write(tmp_path / "0.tar", tars.samples([0, 1]))
        pytest.fail("the second is not needed yet")

    assert next(read_samples(shards(), pytest.fail))["__key__"] == "s0000"


# label_samples


def test_a_labelled_sample_has_key_shard_image_and_label():
    found = list(label_samples([sample(png=b"image", cls=b"3\n", txt=b"x")], 4, pytest.fail))
    assert found == [{"key": "k", "shard": "0.tar", "image": b"image", "label": 3}]


@pytest.mark.parametrize("ending", ["jpg", "jpeg", "png", "webp"])
def test_an_image_may_have_each_of_the_endings(ending):
    assert (
        next(label_samples([sample(**{ending: b"image", "cls": b"0"})], 1, pytest.fail))["image"] == b"image"
    )


def test_image_and_label_keys_can_be_chosen():
    one = sample(**{"seg.png": b"mask", "png": b"image", "class.txt": b" 1 "})
    found = next(label_samples([one], 2, pytest.fail, image_key="seg.png", label_key="class.txt"))
    assert (found["image"], found["label"]) == (b"mask", 1)


def test_a_label_may_be_a_field_of_a_json_member():
    one = sample(png=b"", json=b'{"label": 7, "text": "8", "place": {"x": 1}}')
    assert next(label_samples([one], 10, pytest.fail, label_key="json:label"))["label"] == 7
    assert next(label_samples([one], 10, pytest.fail, label_key="json:text"))["label"] == 8


@pytest.mark.parametrize("content", [b"{}", b"[7]", b"{", b"7", b'{"lab": 7}'])
def test_a_json_member_without_the_field_has_no_label(content):
    with pytest.raises(InputError, match=naming("0.tar", "k", "'json:label'", "png, json")):
        list(label_samples([sample(png=b"", json=content)], 10, pytest.fail, label_key="json:label"))


def test_groups_are_given_where_asked_for():
    some = [
        sample(png=b"", cls=b"0", group=b"left\n"),
        sample(png=b"", cls=b"0"),
        sample(png=b"", cls=b"0", json=b'{"g": 4}'),
    ]
    assert [s["group"] for s in label_samples(some, 1, pytest.fail, group_key="group")] == ["left", "", ""]
    assert [s["group"] for s in label_samples(some, 1, pytest.fail, group_key="json:g")] == ["", "", "4"]


@pytest.mark.parametrize(
    "text,named",
    [
        (b"4", ["label 4", "3", "--classnames"]),
        (b"-1", ["label -1", "3", "--classnames"]),
        (b"cat", ["'cat'", "integer", "--label-key"]),
        (b"1.0", ["'1.0'", "integer"]),
        (b"1 2", ["'1 2'", "integer"]),
        (b"1_0", ["'1_0'", "integer"]),
        (b"", ["''", "integer"]),
        (b"\xff", ["integer"]),
        (b"x" * 999, [f"'{'x' * 40}'", "integer"]),
    ],
)
def test_a_wrong_label_stops_with_shard_key_and_value(text, named):
    with pytest.raises(InputError, match=naming("0.tar", "k", *named)):
        list(label_samples([sample(png=b"", cls=text)], 4, pytest.fail))


@pytest.mark.parametrize(
    "text",
    ["café au lait", "café au lait\n", " café  au lait\t", "cafe\u0301 au\u00a0lait", "\ufeffcafé au lait"],
)
@pytest.mark.parametrize("key", ["cls", "json:class"])
def test_a_label_may_be_a_class_name(text, key):
    members = {"cls": text.encode(), "json": json.dumps({"class": text}).encode()}
    indices = index_names(["tea", "café au lait", "7"])
    found = label_samples([sample(png=b"", **members)], 3, pytest.fail, label_key=key, indices=indices)
    assert next(found)["label"] == 1


def test_an_integer_is_a_class_index_whatever_the_names_are():
    indices = index_names(["1", "0", "2"])
    some = [sample(png=b"", cls=b"%d\n" % i) for i in range(3)]
    assert [s["label"] for s in label_samples(some, 3, pytest.fail, indices=indices)] == [0, 1, 2]


@pytest.mark.parametrize(
    "text,named", [("Crane", ["'Crane'", "3 class names"]), ("crane", ["'crane'", "several"])]
)
def test_a_name_that_is_unknown_or_of_two_classes_stops(text, named):
    indices = index_names(["crane", "tea", "crane"])
    one = sample(png=b"", cls=text.encode(), path=b"birds/1.jpg")
    with pytest.raises(InputError, match=naming("0.tar", "sample k (birds/1.jpg)", *named)):
        list(label_samples([one], 3, pytest.fail, indices=indices))


def test_the_path_of_the_users_file_is_passed_on_and_named():
    bad, good = (
        sample("a", cls=b"0", path="tür/1.jpg".encode()),
        sample("b", png=b"x", cls=b"0", path=b"\x1b[2J.jpg"),
    )
    skipped: list[str] = []
    (labelled,) = label_samples([bad, good], 1, skipped.append)
    assert labelled["path"] == "\x1b[2J.jpg"
    assert skipped[0].startswith("0.tar, sample a (tür/1.jpg), has no")
    assert not list(decode_images([labelled], ToTensor(), skipped.append))
    assert skipped[1].startswith(r"0.tar, sample b (\x1b[2J.jpg): UnidentifiedImageError")


def test_a_missing_label_stops_with_the_members_that_are_there():
    with pytest.raises(InputError, match=naming("'cls'", "png, txt", "--label-key")):
        list(label_samples([sample(png=b"", txt=b"3")], 4, pytest.fail))


def test_the_member_that_holds_an_integer_is_proposed():
    with pytest.raises(InputError, match=naming("'label'", "--label-key label")):
        list(label_samples([sample(png=b"", label=b"3\n", txt=b"a cat")], 4, pytest.fail))


@pytest.mark.parametrize("labels_first", [False, True])
def test_a_tar_not_sorted_by_name_is_named_as_the_cause(tmp_path, labels_first):
    members = sorted(
        tars.samples(range(4)).items(), key=lambda member: member[0].endswith("cls") != labels_first
    )
    shard = tars.write(tmp_path / "0.tar", tars.tar_of(members))
    with pytest.raises(InputError, match=naming("'cls'", "s0000", "tar --sort=name")):
        read(shard)


def test_a_remote_tar_with_lone_images_is_perhaps_not_sorted():
    with pytest.raises(InputError, match=naming("tar --sort=name", "--label-key")):
        list(label_samples([sample(png=b"") | {"__url__": "pipe:cat x"}], 4, pytest.fail))


@pytest.mark.parametrize("hidden", ["._s0000.cls", ".DS_Store", "t/._x.png"])
def test_hidden_members_do_not_part_a_sample(tmp_path, hidden):
    (first, *rest) = tars.samples([0]).items()
    shard = tars.write(tmp_path / "0.tar", tars.tar_of([first, (hidden, b"\0\5\x16\7"), *rest]))
    assert read(shard) == (["s0000"], [0], [])


@pytest.mark.parametrize(
    "members,why",
    [
        ({"tif": b""}, ["'tif'", "--image-key tif"]),
        ({"v2.0001.png": b"", "v2.0002.png": b""}, ["'v2.0001.png'", "dot"]),
    ],
)
def test_why_a_sample_has_no_image_is_told(members, why):
    skipped: list[str] = []
    assert not list(label_samples([sample(cls=b"0", **members)], 1, skipped.append))
    assert says(skipped[0], *why)


def test_a_sample_without_an_image_is_skipped_and_counted():
    skipped: list[str] = []
    found = label_samples([sample("a", cls=b"0"), sample("b", cls=b"0", png=b"")], 1, skipped.append)
    assert [s["key"] for s in found] == ["b"]
    (one,) = skipped
    assert says(one, "0.tar", "sample a", "jpg/jpeg/png/webp")


# draw_prompts


def test_template_and_augmentation_depend_only_on_seed_and_key():
    keys = [f"k{i}" for i in range(50)]
    drawn = {s["key"]: s for s in draw_prompts([{"key": key, "label": 0} for key in keys], [3], 0, 1, 0)}
    random.Random(0).shuffle(keys)
    again = draw_prompts([{"key": key, "label": 0} for key in keys[:20]], [3], 0, 1, 0)
    assert {s["key"]: s for s in again}.items() <= drawn.items()
    assert {s["prompt"] for s in drawn.values()} == {0, 1, 2}
    assert len({s["seed"] for s in drawn.values()}) == 50
    assert all(0 <= s["seed"] < 2**63 for s in drawn.values())


@pytest.mark.parametrize("other", [(1, 1, 0), (0, 2, 0), (0, 1, 1), (0, 11, 0)])
def test_another_seed_epoch_or_repeat_draws_anew(other):
    def drawn(*seed):
        samples = [{"key": f"k{i}", "label": 0} for i in range(50)]
        return [(s["prompt"], s["seed"]) for s in draw_prompts(samples, [3], *seed)]

    assert not {seed for _, seed in drawn(0, 1, 0)} & {seed for _, seed in drawn(*other)}
    assert [number for number, _ in drawn(0, 1, 0)] != [number for number, _ in drawn(*other)]


def test_a_sample_seed_is_the_same_on_every_machine():
    assert sample_seed(0, 1, 2, "key") == 163791574906666548


def test_prompting_leaves_what_it_is_given_alone():
    given = {"key": "k", "label": 3}
    assert next(draw_prompts([given], [1] * 4, 0, 0, 0))["label"] == 3
    assert given == {"key": "k", "label": 3}


@pytest.mark.parametrize("passes", [1, 3])
def test_in_table_order_no_pair_repeats_before_all_were_seen(passes):
    counts = [5, 1, 12]
    samples = [{"key": f"k{i}", "label": i % 3} for i in range(30)]
    met = {sample["key"]: [] for sample in samples}
    times = [(epoch, repeat) for epoch in range(8) for repeat in range(passes)]
    for epoch, repeat in times:
        for sample in draw_prompts(samples[:: 1 - 2 * (epoch % 2)], counts, 0, epoch, repeat, passes):
            met[sample["key"]].append(sample["prompt"])
    for sample in samples:
        count, numbers = counts[sample["label"]], met[sample["key"]]
        cycles = [numbers[start : start + count] for start in range(0, len(times), count)]
        assert all(len(set(cycle)) == len(cycle) for cycle in cycles)
        assert sorted(cycles[0]) == list(range(count)) or len(times) < count
    assert len({tuple(met[f"k{i}"]) for i in range(2, 30, 3)}) == 10  # each image in an order of its own
    assert met["k0"][:5] != met["k0"][5:10] or met["k3"][:5] != met["k3"][5:10]


def test_table_order_leaves_the_augmentation_as_it_is():
    samples = [{"key": f"k{i}", "label": 0} for i in range(20)]
    both = [list(draw_prompts(samples, [7], 0, 2, 0, passes)) for passes in (0, 1)]
    assert [one["seed"] for one in both[0]] == [one["seed"] for one in both[1]]


# decode_images


def numbers(image):
    """Three numbers, from each of the generators that a transform may use."""
    return torch.tensor([torch.rand(()).item(), random.random(), np.random.rand()])


def fail(image):
    raise OSError("a bug of the transform")


def test_transforms_draw_from_the_samples_seed_alone():
    some = [{"key": "k", "shard": "0.tar", "image": tars.png(i), "seed": i % 2} for i in range(4)]
    first = [s["image"].tolist() for s in decode_images(some, numbers, pytest.fail)]
    torch.manual_seed(5)
    again = [s["image"].tolist() for s in decode_images(some, numbers, pytest.fail)]
    assert first == again
    assert first[0] == first[2] != first[1] == first[3]


def test_random_states_are_kept_also_where_a_transform_fails():
    preprocess = Compose([RandomResizedCrop(8), ColorJitter(0.4, 0.4, 0.4), ToTensor()])
    some = [{"key": "k", "shard": "0.tar", "image": tars.png(i), "seed": i} for i in range(4)]
    before = torch.get_rng_state(), random.getstate(), repr(np.random.get_state())
    with preserve_random_states():
        list(decode_images(some, preprocess, pytest.fail))
        list(decode_images(some, numbers, pytest.fail))
    with pytest.raises(OSError, match="a bug"), preserve_random_states():
        list(decode_images(some, fail, pytest.fail))
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (random.getstate(), repr(np.random.get_state()))


def test_a_failing_transform_is_not_taken_for_a_broken_image():
    with pytest.raises(OSError, match="a bug"):
        list(decode_images([{"key": "k", "shard": "0.tar", "image": tars.png(0)}], fail, pytest.fail))


def test_without_a_seed_the_transform_is_left_to_itself():
    torch.manual_seed(3)
    expected = torch.rand(())
    torch.manual_seed(3)
    some = [{"key": "k", "shard": "0.tar", "image": tars.png(0)}]
    assert next(decode_images(some, lambda _: torch.rand(()), pytest.fail))["image"] == expected


def test_images_come_to_the_transform_as_rgb():
    for mode in ("L", "RGBA", "P", "1", "LA", "I;16"):
        raw = io.BytesIO()
        Image.new(mode, (4, 3)).save(raw, "png")
        one = {"key": "k", "shard": "0.tar", "image": raw.getvalue()}
        assert next(decode_images([one], lambda image: (image.mode, image.size), pytest.fail))["image"] == (
            "RGB",
            (4, 3),
        )


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_of_16_bits_of_grey_the_upper_8_are_taken(dtype):
    deep = Image.fromarray(np.array([[0, 255, 256, 65535]], dtype=dtype))
    assert [pixel[0] for pixel in to_rgb(deep).getdata()] == [0, 0, 1, 255]


def test_other_modes_become_rgb_as_pillow_converts_them():
    grey = Image.fromarray(np.arange(12, dtype=np.uint8).reshape(3, 4) * 20)
    for mode in ("L", "RGBA", "P", "1", "LA", "CMYK", "F"):
        image = grey.convert(mode)
        assert to_rgb(image).tobytes() == image.convert("RGB").tobytes()


def test_an_unreadable_image_is_skipped_and_named():
    raws = {"empty": b"", "text": b"<html>", "cut": tars.png(1)[:-60], "good": tars.png(1)}
    skipped: list[str] = []
    some = [{"key": key, "shard": "0.tar", "image": raw, "seed": 1} for key, raw in raws.items()]
    assert [s["key"] for s in decode_images(some, numbers, skipped.append)] == ["good"]
    assert [text.split(":")[0] for text in skipped] == [
        f"0.tar, sample {key}" for key in ("empty", "text", "cut")
    ]


# Skipped


def test_skipped_counts_and_keeps_the_first(caplog):
    skipped = Skipped()
    skipped.report("epoch 1")
    assert not caplog.records
    skipped("a.tar: broken")
    skipped.report("epoch 1")
    skipped.add(Skipped(2, 9, "b"))
    taken = skipped.drain()
    taken.report("epoch 2")
    assert (skipped, taken) == (Skipped(), Skipped(3, 10, "a.tar: broken"))
    first, second = (record.getMessage() for record in caplog.records)
    assert says(first, "epoch 1", "skipped 1", "a.tar: broken")
    assert says(second, "epoch 2", "skipped 3", "a.tar: broken")


def test_a_jpeg_draft_is_never_smaller_than_the_target():
    sizes = []

    def preprocess(image):
        sizes.append(image.size)
        return torch.zeros(3, 1, 1)

    for image_format, size in (
        ("JPEG", (900, 700)),
        ("JPEG", (400, 300)),
        ("PNG", (900, 700)),
        ("JPEG", (8000, 500)),
    ):
        stream = io.BytesIO()
        Image.new("RGB", size).save(stream, image_format)
        sample = {"image": stream.getvalue(), "shard": "0.tar", "key": "a"}
        list(decode_images([sample], preprocess, Skipped(), jpeg_draft=224))
    assert sizes == [(450, 350), (400, 300), (900, 700), (4000, 250)]


# the shuffle buffer


@pytest.mark.parametrize("number", [0, 1, 500, 1001, 12_000])
def test_small_images_are_shuffled_as_webdataset_does(number):
    numbered = [{"image": b"", "number": i} for i in range(number)]
    theirs = wds.shuffle(5000, initial=1000, rng=random.Random(1))(iter(numbered))
    assert list(shuffle(numbered, random.Random(1))) == list(theirs)


def test_large_images_fill_the_shuffle_buffer_by_bytes():
    read = []

    def images():
        for i in range(400):
            read.append(i)
            yield {"image": bytes(100 if i < 390 else 5000), "number": i}

    left, most = [], 0
    for sample in shuffle(images(), random.Random(1), most_bytes=3000):
        left.append(sample["number"])
        held = set(read) - set(left)
        most = max(most, sum(100 if i < 390 else 5000 for i in held))
        assert most <= 3000 + 2 * 5000
    assert sorted(left) == list(range(400)) != left
    assert most > 2000
