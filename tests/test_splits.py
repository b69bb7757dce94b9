"""Disjoint splits of one source (`flyp shards write --hold-out`), and images that several splits or classes have."""

import json
import logging
import os
import random
import re
import shutil
from collections import Counter, defaultdict
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from flyp_plugin import shards as shards_module
from flyp_plugin.commands import call as flyp
from flyp_plugin.errors import InputError
from flyp_plugin.samples import read_samples
from flyp_plugin.shards import local_shards
from flyp_plugin.splits import divide, join_units
from tests import tars
from tests.naming import naming, says
from tests.tars import NAMES, label, png

SPLITS = ["train", "val", "test"]
HOLD_OUT = ["--hold-out", "val=0.2", "--hold-out", "test=0.1"]
SHARES = {"train": Fraction("0.7"), "val": Fraction("0.2"), "test": Fraction("0.1")}


def read_split(folder: Path) -> list[tuple[str, int, bytes]]:
    """(path, label, image) of each sample of a split folder."""
    return [
        (sample["path"].decode(), int(sample["cls"]), sample["png"])
        for sample in read_samples(local_shards(str(folder), ""), pytest.fail)
    ]


def contents(data: Path) -> dict[str, bytes]:
    return {str(path.relative_to(data)): path.read_bytes() for path in data.rglob("*.*")}


def write_photos(folder: Path, numbers=range(200)) -> Path:
    for number in numbers:
        path = folder / NAMES[label(number)] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(number))
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """200 digits in class folders, and copies of 20 of them."""
    folder = write_photos(tmp_path_factory.mktemp("photos"))
    for number in range(20):
        (folder / NAMES[label(number)] / f"copy of {number}.png").write_bytes(png(number))
    return folder


def write_patients(folder: Path, order=lambda lines: lines) -> str:
    """A CSV of 200 digits of 25 patients, three of whom have one image in common."""
    write_photos(folder)
    lines = [f"{NAMES[label(i)]}/{i}.png,{NAMES[label(i)]},p{i % 25}" for i in range(200)]
    lines += [f"{NAMES[label(7)]}/7.png,{NAMES[label(7)]},p{i}" for i in (3, 4)]
    (folder / "list.csv").write_text("\n".join(["path,digit,patient", *order(lines)]) + "\n")
    return str(folder / "list.csv")


CSV = ["--image-col", "path", "--label-col", "digit", *HOLD_OUT]


# divide


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=12),
    held=st.tuples(st.integers(1, 45), st.integers(1, 45)),
    seed=st.integers(0, 9),
)
def test_each_class_is_within_one_image_of_the_shares(sizes, held, seed):
    labels = [str(c) for c, size in enumerate(sizes) for _ in range(size)]
    names = [b"%d" % i for i in range(len(labels))]
    val, test = (Fraction(percent, 100) for percent in held)
    shares = {"train": 1 - val - test, "val": val, "test": test}
    splits = divide(join_units(names), names, labels, shares, seed)
    found, total = Counter(zip(splits, labels)), Counter(labels)
    assert all(abs(found[s, c] - shares[s] * total[c]) < 1 for s in shares for c in total)
    assert all(found["train", c] for c in total)


def test_small_classes_together_come_to_the_shares():
    """No class of 3 has room for a whole image in a tenth; 300 of them do."""
    labels = [str(i // 3) for i in range(900)]
    shares = {"train": Fraction("0.8"), "val": Fraction("0.1"), "test": Fraction("0.1")}
    total = Counter(divide(range(900), [b"%d" % i for i in range(900)], labels, shares, 0))
    assert all(abs(total[split] - share * 900) <= 9 for split, share in shares.items())


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30), st.integers(0, 3)), min_size=1))
def test_units_are_whole_and_the_order_does_not_matter(images):
    """An image is (its hash, its patient, its class); equal hashes and equal patients stay together."""

    def split_of(images):
        units = join_units(*zip(*(image[:2] for image in images)))
        names, labels = [b"%d" % image[0] for image in images], [str(image[2]) for image in images]
        splits = divide(units, names, labels, SHARES, 0)
        for column in zip(*(image[:2] for image in images)):
            assert len(set(zip(column, splits))) == len(set(column))
        return sorted(zip(images, splits))

    assert split_of(images) == split_of(sorted(images)) == split_of(images[::-1])


def test_groups_of_several_classes_come_near_the_shares():
    rng = random.Random(0)
    places = [place for place in range(60) for _ in range(rng.randint(5, 30))]
    labels = [str(rng.choice([0, 0, 0, 1, 1, 2, place % 4])) for place in places]
    names = [b"%d" % i for i in range(len(places))]
    splits = divide(places, names, labels, SHARES, 0)
    found, total = Counter(zip(splits, labels)), Counter(labels)
    for split, share in SHARES.items():
        assert abs(splits.count(split) / len(splits) - share) < 0.02
        assert all(abs(found[split, c] - share * total[c]) < 10 for c in total)


# write --hold-out


def test_hold_outs_are_disjoint_and_together_the_source(photos, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    flyp(["shards", "write", str(photos), f"{tmp_path}/train", *HOLD_OUT])
    found = {split: read_split(tmp_path / split) for split in SPLITS}
    assert {split: len(samples) for split, samples in found.items()} == {"train": 154, "val": 44, "test": 22}
    images = {split: {image for _, _, image in samples} for split, samples in found.items()}
    assert sum(map(len, images.values())) == 200  # so that copies are together
    order = (tmp_path / "classnames.txt").read_text().split()
    paths = {path.relative_to(photos).as_posix() for path in photos.rglob("*.png")}
    assert {path for samples in found.values() for path, _, _ in samples} == paths
    for path, index, image in found["train"] + found["val"] + found["test"]:
        assert path.partition("/")[0] == order[index] and (photos / path).read_bytes() == image
    for split, number in (("train", 154), ("val", 44), ("test", 22)):
        assert says(caplog.text, f"{number} images", "10 of 10 classes", split)
        assert Counter(index for _, index, _ in found[split]).keys() == set(range(10))
    assert says(caplog.text, "20 images", "copy of")
    assert flyp(["shards", "check", str(tmp_path)]) == 0


def test_a_hold_out_depends_on_images_and_seed_alone(photos, tmp_path):
    for name, seed in (("one", "0"), ("other", "1")):
        flyp(["shards", "write", str(photos), f"{tmp_path}/{name}/train", *HOLD_OUT, "--seed", seed])
    shutil.copytree(photos, tmp_path / "moved")
    flyp(["shards", "write", f"{tmp_path}/moved", f"{tmp_path}/two/train", *HOLD_OUT, "--workers", "2"])
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert contents(tmp_path / "one").keys() == contents(tmp_path / "other").keys()
    assert contents(tmp_path / "one") != contents(tmp_path / "other")


def test_by_keeps_all_images_of_a_value_in_one_split(tmp_path):
    source = write_patients(tmp_path / "photos")
    flyp(["shards", "write", source, f"{tmp_path}/data/train", *CSV, "--by", "patient"])
    splits = defaultdict(set)
    numbers = Counter()
    for split in SPLITS:
        for path, _, _ in read_split(tmp_path / "data" / split):
            splits[int(re.findall(r"\d+", path)[0]) % 25].add(split)
            numbers[split] += 1
    assert all(len(of_patient) == 1 for of_patient in splits.values())
    assert splits[3] == splits[4] == splits[7]  # by the image that they have in common
    assert numbers.total() == 202 and abs(numbers["val"] - 40) <= 8 and abs(numbers["test"] - 20) <= 8


def test_the_order_of_a_tables_lines_does_not_matter(tmp_path):
    for name, order in (("one", lambda lines: lines), ("two", lambda lines: sorted(lines)[::-1])):
        source = write_patients(tmp_path / name, order)
        flyp(["shards", "write", source, f"{tmp_path}/{name}/data/train", *CSV, "--by", "patient"])
    assert contents(tmp_path / "one" / "data") == contents(tmp_path / "two" / "data")


def test_classes_that_a_hold_out_lacks_are_named(tmp_path, caplog):
    folder = write_photos(tmp_path / "photos", range(100))
    for rare in ("auk", "emu"):
        (folder / rare).mkdir()
        (folder / rare / "1.png").write_bytes(png(100 + ord(rare[0])))
    flyp(["shards", "write", str(folder), f"{tmp_path}/data/train", "--hold-out", "val=0.3"])
    assert says(caplog.text, "2 classes", "data/val", "auk, emu") and not says(
        caplog.text, "data/train", "auk"
    )


@pytest.mark.parametrize(
    "value", ["val", "val=", "val=0", "val=1", "val=10%", "=0.1", "../val=0.1", "v.part=0.1"]
)
def test_a_hold_out_that_is_no_name_and_share_is_refused(tmp_path, capsys, value):
    with pytest.raises(SystemExit):
        flyp(["shards", "write", "photos", f"{tmp_path}/train", "--hold-out", value])
    assert says(capsys.readouterr().err, "--hold-out", "NAME=SHARE", value)


def test_mistakes_in_hold_outs_are_one_sentence(photos, tmp_path):
    def fails(match: str, *flags: str, source: object = tmp_path / "nothing") -> None:
        with pytest.raises(InputError, match=match):
            flyp(["shards", "write", str(source), f"{tmp_path}/data/train", *flags])
        assert not (tmp_path / "data" / "train").exists()

    held = ("--hold-out", "val=0.5")
    fails(naming("--hold-out", "less than 1"), *held, "--hold-out", "test=0.5")
    fails(naming("--hold-out train"), "--hold-out", "train=0.5")
    fails(naming("--hold-out val"), *held, *held)
    fails(naming("--by", "--hold-out"), "--by", "patient", source=photos)
    fails(naming("--by", "CSV"), *held, "--by", "patient", source=photos)
    source = write_patients(tmp_path / "photos")
    fails(naming("--by place", "path, digit, patient"), *CSV, "--by", "place", source=source)
    one = write_photos(tmp_path / "few", range(2))
    fails(naming("val", "no images", "1 of 2"), "--hold-out", "val=0.1", source=one)
    assert not (tmp_path / "data").exists()
    (tmp_path / "data" / "val").mkdir(parents=True)
    (tmp_path / "data" / "val" / "mine").write_text("")
    fails(naming(tmp_path / "data" / "val", "empty"), *held)
    assert os.listdir(tmp_path / "data") == ["val"]


def test_all_splits_appear_or_none(photos, tmp_path, monkeypatch):
    def stop(shard, found):
        if shard.parent.name == "test.part":
            raise OSError(28, "No space left on device")
        real(shard, found)

    def occupy(folder, sizes):
        (tmp_path / "train").mkdir(exist_ok=True)
        (tmp_path / "train" / "mine").write_text("")

    command = ["shards", "write", str(photos), f"{tmp_path}/train", *HOLD_OUT, "--workers", "1"]
    real = shards_module._write_tar
    with monkeypatch.context() as patch:
        patch.setattr(shards_module, "_write_tar", stop)
        with pytest.raises(InputError, match=naming("No space left on device")):
            flyp(command)
    assert os.listdir(tmp_path) == []
    monkeypatch.setattr(shards_module, "write_sizes", occupy)
    with pytest.raises(InputError, match=naming(tmp_path / "train")):
        flyp(command)
    assert not (tmp_path / "val").exists() and os.listdir(tmp_path / "train") == ["mine"]


# images that are there several times


def test_planted_copies_among_3000_images_are_all_found(tmp_path, capsys):
    pairs: dict[str, set[frozenset[str]]] = defaultdict(set)  # of file names, by kind
    free = defaultdict(list)  # by (split, class)
    for i in range(2740):
        path = tmp_path / ("train", "val", "test")[i % 5 % 3] / NAMES[i % 10] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (i // 256, i % 256, 0)).save(path)
        free[path.parts[-3], i % 10].append(path)

    def plant(kind: str, number: int, split: str, other: str, shift: int = 0) -> None:
        classes = [c for of_split, c in free if of_split == split]
        for n in range(number):
            digit = classes[n % len(classes)]
            original = free[split, digit].pop()
            copy = tmp_path / other / NAMES[(digit + shift) % 10] / f"{split} {shift} {n}.png"
            copy.parent.mkdir(exist_ok=True)
            shutil.copy(original, copy)
            pairs[kind].add(frozenset((original.name, copy.name)))

    plant("images that are also in another split", 70, "train", "val")
    plant("images that are also in another split", 50, "val", "test", 3)
    plant("images that are also in another split", 30, "test", "train", 1)
    plant("images in several classes", 60, "train", "train", 5)
    plant("copies", 50, "train", "train")
    for split in SPLITS:
        names = ["--classnames", f"{tmp_path}/names"]
        (tmp_path / "names").write_text("\n".join(NAMES))
        flyp(["shards", "write", f"{tmp_path}/{split}", f"{tmp_path}/data/{split}", *names])
    assert flyp(["shards", "check", f"{tmp_path}/data", "--json"]) == 1
    reports = json.loads(capsys.readouterr().out)
    assert sum(report["samples"] for report in reports.values()) == 3000
    found = defaultdict(list)
    for report in reports.values():
        for kind, problems in report["problems"].items():
            found[kind] += [frozenset(re.findall(r"\(\w+/([^)]*)\)", problem)) for problem in problems]
    copies = pairs.pop("copies")
    assert {kind: set(some) for kind, some in found.items()} == pairs
    assert sum(map(len, found.values())) == 70 + 50 + 30 + 60
    (note,) = reports[f"{tmp_path}/data/train"]["notes"]
    assert says(note, "50 images") and frozenset(re.findall(r"\(\w+/([^)]*)\)", note)) in copies
    assert flyp(["shards", "check", f"{tmp_path}/data"]) == 1
    out = capsys.readouterr().out
    assert says(out, "60 images in several classes") and says(out, "55 more")


def test_an_image_in_several_splits_or_classes_is_named_with_both_places(tmp_path, capsys):
    (tmp_path / "classnames.txt").write_text("cat\ndog\n")
    for split, images in {"train": "abca", "val": "dae"}.items():
        members = {}
        for i, image in enumerate(images):
            members |= {
                f"{i}.png": png(ord(image)),
                f"{i}.cls": b"%d" % (i // 2),
                f"{i}.path": b"x/%d.png" % i,
            }
        tars.write(tmp_path / split / "0.tar", members)
    assert flyp(["shards", "check", str(tmp_path), "--json"]) == 1
    train, val = (report["problems"] for report in json.loads(capsys.readouterr().out).values())
    (classes,), (splits,) = (
        train.pop("images in several classes"),
        val.pop("images that are also in another split"),
    )
    assert not train and not val
    assert says(classes, "sample 3 (x/3.png)", "'dog'", "sample 0 (x/0.png)", "'cat'")
    for place in (f"{tmp_path}/train/0.tar, sample 0 (x/0.png)", f"{tmp_path}/val/0.tar, sample 1 (x/1.png)"):
        assert says(splits, place)
    assert flyp(["shards", "check", str(tmp_path), "--split", "val"]) == 0
