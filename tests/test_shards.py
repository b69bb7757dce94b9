"""`flyp shards`: write, subset, count and check, on the digits of scikit-learn."""

import io
import json
import logging
import os
import random
import re
import shutil
import subprocess
import sys
import tarfile
import unicodedata
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from flyp_plugin import shards as shards_module
from flyp_plugin.commands import call as flyp
from flyp_plugin.errors import InputError
from flyp_plugin.labels import few_shot_keys
from flyp_plugin.prompts import resolve_prompts
from flyp_plugin.shards import local_shards, subset, write
from flyp_plugin.sources import count_samples, expand_source
from tests import tars
from tests.naming import naming, says
from tests.tars import NAMES, png

DIGITS = load_digits()


def digit_folder(folder: Path, indices: range) -> Path:
    """A folder of class folders with mixed endings, names with dots, and a folder in a folder."""
    for i in indices:
        name = f"{i}.v1.PNG" if i % 3 else f"more/{i}.jpeg"
        path = folder / NAMES[DIGITS.target[i]] / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(i, "PNG" if i % 3 else "JPEG"))
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return digit_folder(tmp_path_factory.mktemp("photos"), range(200))


@pytest.fixture(scope="module")
def data(photos, tmp_path_factory):
    """A data folder with a train split of 200 images."""
    folder = tmp_path_factory.mktemp("data")
    write(str(photos), str(folder / "train"))
    return folder


def members(split: Path) -> dict[str, bytes]:
    """All members of all tars, by name."""
    found = {}
    for shard in expand_source(str(split), "train"):
        with tarfile.open(shard) as tar:
            for member in tar:
                assert member.name not in found
                found[member.name] = tar.extractfile(member).read()
    return found


def samples(split: Path) -> Counter:
    """(image, label) pairs of a split."""
    found = members(split)
    keys = {name.partition(".")[0] for name in found}
    image = {
        name.partition(".")[0]: raw
        for name, raw in found.items()
        if not name.endswith((".cls", ".group", ".path"))
    }
    return Counter((image[key], int(found[f"{key}.cls"])) for key in keys)


def write_csv(path: Path, header: str, lines: list[str]) -> str:
    path.write_text("\n".join([header, *lines]) + "\n")
    return str(path)


# write


def test_a_folder_becomes_shards_with_the_same_bytes(photos, data):
    order = sorted(NAMES)
    expected = Counter(
        (path.read_bytes(), order.index(path.relative_to(photos).parts[0]))
        for path in photos.rglob("*")
        if path.is_file()
    )
    assert samples(data / "train") == expected
    assert (data / "classnames.txt").read_text().split("\n") == [*order, ""]
    assert (data / "zeroshot_classification_templates.txt").read_text() == "a photo of a {c}.\n"


def test_a_split_folder_says_how_much_is_in_it(data):
    sizes = json.loads((data / "train" / "sizes.json").read_text())
    assert (data / "train" / "nshards.txt").read_text() == f"{len(sizes)}\n"
    assert list(sizes) == [f"{i}.tar" for i in range(16)]
    assert sum(sizes.values()) == count_samples(expand_source(str(data), "train")) == 200
    assert max(sizes.values()) - min(sizes.values()) <= 1


def test_keys_are_running_numbers_and_endings_are_lower_case(data):
    names = members(data / "train")
    assert {name.partition(".")[0] for name in names} == {f"s{i:07d}" for i in range(200)}
    assert {name.partition(".")[2] for name in names} == {"png", "jpeg", "cls", "path"}


def test_shards_are_shuffled(data):
    with tarfile.open(data / "train" / "0.tar") as tar:
        labels = {tar.extractfile(member).read() for member in tar if member.name.endswith(".cls")}
    assert len(labels) > 3


def test_bytes_depend_on_source_and_seed_alone(photos, data, tmp_path):
    def content(split: Path) -> list[bytes]:
        return [Path(shard).read_bytes() for shard in expand_source(str(split), "train")]

    write(str(photos), str(tmp_path / "same" / "train"), workers=2)
    write(str(photos), str(tmp_path / "other" / "train"), seed=1)
    assert content(tmp_path / "same" / "train") == content(data / "train")
    assert content(tmp_path / "other" / "train") != content(data / "train")
    assert samples(tmp_path / "other" / "train") == samples(data / "train")


@pytest.mark.parametrize(
    "number,size,expected", [(3, None, 3), (100, None, 16), (50_000, None, 50), (100, 40, 3), (5, 100, 1)]
)
def test_number_of_shards(number, size, expected):
    sizes = list(shards_module._shard_sizes(number, size).values())
    assert len(sizes) == expected and sum(sizes) == number
    assert max(sizes) <= (size or 1000) and min(sizes) >= 1


def test_a_test_set_gets_the_train_sets_indices(photos, tmp_path, caplog):
    write(str(photos), str(tmp_path / "train"))
    two = digit_folder(tmp_path / "photos", range(200, 230))
    for name in set(NAMES) - {"two", "nine"}:
        for path in (two / name).rglob("*.*"):
            path.unlink()
    caplog.set_level(logging.INFO)
    write(str(two), str(tmp_path / "test"))
    assert says(caplog.text, "order", tmp_path / "classnames.txt")
    assert {label for _, label in samples(tmp_path / "test")} == {
        sorted(NAMES).index(name) for name in ("two", "nine")
    }


def test_a_list_of_class_names_sets_the_order(photos, tmp_path):
    (tmp_path / "names").write_text("\n".join(NAMES))
    write(
        str(photos), str(tmp_path / "data" / "train"), classnames=str(tmp_path / "names"), templates="a {c}."
    )
    assert (tmp_path / "data" / "classnames.txt").read_text().split() == NAMES
    assert Counter(label for _, label in samples(tmp_path / "data" / "train").elements()) == Counter(
        DIGITS.target[:200].tolist()
    )
    assert (tmp_path / "data" / "zeroshot_classification_templates.txt").read_text() == "a {c}.\n"


def test_a_list_that_is_there_is_not_overwritten(photos, tmp_path):
    (tmp_path / "classnames.txt").write_text("\n".join(sorted(NAMES)))
    (tmp_path / "names").write_text("\n".join(NAMES))
    with pytest.raises(InputError, match=naming(tmp_path / "classnames.txt")):
        write(str(photos), str(tmp_path / "train"), classnames=str(tmp_path / "names"))
    assert (tmp_path / "classnames.txt").read_text() == "\n".join(sorted(NAMES))


def test_files_that_are_no_images_are_left_out_and_named(photos, tmp_path, caplog):
    folder = digit_folder(tmp_path / "photos", range(20))
    (folder / "one" / "notes.txt").write_text("")
    (folder / "one" / "._1.png").write_bytes(b"a resource fork")
    (folder / "one" / ".ipynb_checkpoints").mkdir()
    (folder / "one" / ".ipynb_checkpoints" / "1.png").write_bytes(png(1))
    caplog.set_level(logging.INFO)
    write(str(folder), str(tmp_path / "data" / "train"))
    assert len(members(tmp_path / "data" / "train")) == 3 * 20
    assert says(caplog.text, "2", "._1.png")


def test_wilds_metadata_with_indices_splits_and_groups(tmp_path):
    for i in range(30):
        (tmp_path / "train").mkdir(exist_ok=True)
        (tmp_path / "train" / f"{i}.png").write_bytes(png(i))
    (tmp_path / "names").write_text("\n".join(NAMES))
    lines = [f"{i},{'test' if i % 3 == 0 else 'train'},{i % 4},{DIGITS.target[i]},{i}.png" for i in range(30)]
    source = write_csv(tmp_path / "metadata.csv", ",split,location_remapped,y,filename", lines)
    flags = f"--image-col filename --label-col y --group-col location_remapped --split test --root {tmp_path}/train"
    flyp(
        [
            "shards",
            "write",
            source,
            f"{tmp_path}/data/test",
            *flags.split(),
            "--classnames",
            f"{tmp_path}/names",
        ]
    )
    assert samples(tmp_path / "data" / "test") == Counter((png(i), DIGITS.target[i]) for i in range(0, 30, 3))
    found = members(tmp_path / "data" / "test")
    group = {png(i): str(i % 4).encode() for i in range(30)}
    assert all(
        found[name[:-4] + ".group"] == group[raw] for name, raw in found.items() if name.endswith("png")
    )


@pytest.mark.parametrize("separator", [",", "\t", ";"])
def test_a_table_may_hold_class_names(tmp_path, separator):
    lines = []
    for i in range(12):
        (tmp_path / f"{i}.png").write_bytes(png(i))
        lines.append(f"{i}.png{separator}{NAMES[DIGITS.target[i]]}")
    source = write_csv(tmp_path / "list.csv", f"\ufeffpath{separator}class", lines)
    write(source, str(tmp_path / "data" / "train"), image_col="path", label_col="class")
    order = sorted(NAMES)
    assert samples(tmp_path / "data" / "train") == Counter(
        (png(i), order.index(NAMES[DIGITS.target[i]])) for i in range(12)
    )


def test_numbers_as_class_names_are_in_numerical_order(tmp_path, caplog):
    lines = []
    for i in range(12):
        (tmp_path / f"{i}.png").write_bytes(png(i))
        lines.append(f"{i}.png,{i}")
    source = write_csv(tmp_path / "list.csv", "path,y", lines)
    write(source, str(tmp_path / "data" / "train"), image_col="path", label_col="y")
    assert (tmp_path / "data" / "classnames.txt").read_text().split() == [str(i) for i in range(12)]
    assert says(caplog.text, "numbers", "--classnames")


def table(tmp_path, text: str | bytes, **options):
    """Write images 0.png ... 7.png and what a CSV with the columns path and label lists; the class names."""
    for i in range(8):
        (tmp_path / f"{i}.png").write_bytes(png(i))
    (tmp_path / "list.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    columns = {"image_col": "path", "label_col": "label"} | options
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    write(str(tmp_path / "list.csv"), str(tmp_path / "out" / "train"), **columns)
    return (tmp_path / "out" / "classnames.txt").read_text().splitlines()


@pytest.mark.parametrize(
    "text,message",
    [
        (
            "path,label\n0.png,cat\n1.png,crane, bird\n",
            r"line 3\b.*\b3 fields.*\b2\b.*crane, bird",
        ),
        ("path,label\n0.png,cat\n\n1.png\n", r"line 4\b.*\b1 field.*\b2\b"),
        ('path\tlabel\n0.png\t"big" cat\n', r"line 2\b.*CSV.*quot"),
        ('path\tlabel\n0.png\tcat\n1.png\t"odd\n2.png\tdog\n3.png\t"x"\n', r"line 3\b.*\b5\b"),
        ('path,label\n0.png,cat\n1.png,"dog\n2.png,cat\n', r"line 3\b.*\b4\b.*unexpected end of data"),
        ('path,label\n0.png,"cat\n1.png,dog"\n2.png,owl\n', r"line 2\b.*label.*'cat'"),
        ("path,label\n0.png,cat\n1.png,d\0g\n", r"d\\x00g|line 3\b.*NUL"),
        ("path,label,label\n0.png,cat,dog\n", naming("--label-col label", "2")),
        ("path,label\n", r"list\.csv\b.*(no lines|no rows|empty)"),
        ("", naming("--image-col path", "list.csv")),
        ("path,label\n0.png,'cat'\n1.png,'dog'\n", "'cat'.*quot"),
    ],
)
def test_a_line_that_may_be_read_otherwise_is_an_error(tmp_path, text, message):
    with pytest.raises(InputError, match=message):
        table(tmp_path, text)


@pytest.mark.parametrize(
    "text,names",
    [
        ('path,label\n0.png,"crane, bird"\n1.png,"crane, machine"\n', ["crane, bird", "crane, machine"]),
        ("path, label \n0.png,cat\n1.png,dog\n", ["cat", "dog"]),
        ('path, label\n0.png, "crane, bird"\n1.png, "dog"\n', ["crane, bird", "dog"]),
        ("path,label\n0.png,cat\n1.png,dog\n,\n", ["cat", "dog"]),
        ("path,label\r\n0.png,cat\r\n\r\n1.png,dog\r\n", ["cat", "dog"]),
        ("\ufeff\npath;label;note\n0.png;cat;a, b, c\n1.png;dog;\n", ["cat", "dog"]),
        ('"note, and more, or less";path;label\n"x";0.png;cat\ny;1.png;dog\n', ["cat", "dog"]),
        ('path,label,note\n0.png,cat,"two\nlines"\n1.png,dog,\n', ["cat", "dog"]),
        ('path\tlabel\n0.png\t6" plate\n1.png\t"a ""big"" cat"\n', ['6" plate', 'a "big" cat']),
        ("path|label\n0.png|cat\n1.png|dog\n   \n", ["cat", "dog"]),
        ("note,note,path,label\n,,0.png,cat\n,,1.png,dog\n", ["cat", "dog"]),
    ],
)
def test_what_is_csv_is_read(tmp_path, text, names):
    assert table(tmp_path, text) == names


def test_a_column_name_with_blanks_may_be_given_with_or_without(tmp_path):
    text = "path, label\n0.png,cat\n1.png,dog\n"
    assert table(tmp_path, text, label_col=" label") == table(tmp_path, text) == ["cat", "dog"]


@pytest.mark.parametrize(
    "text,labels",
    [
        (
            "path,label\n0.png,0.0\n1.png,1.0\n2.png,2.0\n",
            [0, 1, 2],
        ),  # pandas, of a column with missing values
        (",path,label\n0,0.png,2.0\n1,1.png,1.0\n", [2, 1]),  # its index, without a name
        (
            "\ufeffpath;label;\r\n0.png;0.0;\r\n1.png;1.0;\r\n;;\r\n",
            [0, 1],
        ),  # Excel in Europe, with empty cells
    ],
)
def test_integers_with_a_point_are_class_indices(tmp_path, text, labels, caplog):
    (tmp_path / "names").write_text("cat\ndog\nowl\n")
    caplog.set_level(logging.INFO)
    table(tmp_path, text, classnames=str(tmp_path / "names"))
    assert samples(tmp_path / "out" / "train") == Counter((png(i), label) for i, label in enumerate(labels))
    assert says(caplog.text, "integers", f"{labels[0]}.0")


def test_other_numbers_are_class_names_as_they_are(tmp_path):
    assert table(tmp_path, "path,label\n0.png,2.0\n1.png,1.5\n") == ["1.5", "2.0"]


def test_lines_that_are_there_twice_are_written_once_and_said(tmp_path, caplog):
    table(tmp_path, "path,label\n0.png,cat\n1.png,dog\n0.png,cat\n./0.png,cat\n0.png,dog\n")
    assert samples(tmp_path / "out" / "train") == Counter([(png(0), 0), (png(1), 1), (png(0), 1)])
    assert says(caplog.text, "2 lines", "list.csv", "once") and says(
        caplog.text, "1 images", "several classes"
    )


def test_class_folders_without_images_are_left_out_and_said(tmp_path, caplog):
    for name in ("cat", "dog", "owl", "__MACOSX/cat"):
        (tmp_path / "photos" / name).mkdir(parents=True)
    for name in ("cat/1.png", "owl/1.png", "__MACOSX/cat/._1.png"):
        (tmp_path / "photos" / name).write_bytes(png(ord(name[0])))
    write(str(tmp_path / "photos"), str(tmp_path / "data" / "train"))
    assert (tmp_path / "data" / "classnames.txt").read_text() == "cat\nowl\n"
    assert says(caplog.text, "2 folders", "__MACOSX, dog")
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "classnames.txt").write_text("cat\ndog\nowl\n")
    write(str(tmp_path / "photos"), str(tmp_path / "more" / "val"))
    assert sorted(label for _, label in samples(tmp_path / "more" / "val")) == [0, 2]


def test_each_sample_keeps_the_path_of_its_file(photos, data, tmp_path):
    found = members(data / "train")
    paths = {key: raw.decode() for key, raw in found.items() if key.endswith(".path")}
    assert len(set(paths.values())) == 200
    for key, path in paths.items():
        image = found[f"{key.partition('.')[0]}{Path(path).suffix.lower()}"]
        assert (photos / path).read_bytes() == image
    table(tmp_path, "path,label\n./0.png,cat\n1.png,dog\n", group_col="label")
    found = {raw for name, raw in members(tmp_path / "out" / "train").items() if name.endswith(".path")}
    assert found == {b"./0.png", b"1.png"}
    assert flyp(["shards", "check", f"{tmp_path}/out"]) == 0


SPLIT = ["train", "train", "test", "train ", "Train", "training", "test", "val"]


def split_table(column: str, values=SPLIT) -> str:
    names = "".join(f"{i}.png,{'cat' if i % 2 else 'dog'},{value}\n" for i, value in enumerate(values))
    return f"path,label,{column}\n{names}"


@pytest.mark.parametrize("column", ["split", "Split", " SPLIT "])
def test_a_split_column_without_split_is_refused(tmp_path, column):
    with pytest.raises(
        InputError, match=naming("'train' (2)", "'test' (2)", "--split 'train'", "--split ''")
    ):
        table(tmp_path, split_table(column))
    assert table(tmp_path, split_table(column), split="") == ["cat", "dog"]
    assert count_samples(expand_source(f"{tmp_path}/out", "train")) == 8


@pytest.mark.parametrize("values", [["0", "1"] * 4, ["id_val", "train", "ood_test", "x"] * 2])
def test_a_column_that_looks_like_splits_is_named(tmp_path, values, caplog):
    with caplog.at_level(logging.WARNING, "flyp_plugin"):
        table(tmp_path, split_table("part", values))
    assert says(caplog.text, "list.csv", "--split-col part") == ("train" in values)
    with pytest.raises(InputError, match=naming("list.csv", "part", "--split")):
        table(tmp_path, split_table("part", values), split_col="part")


def test_a_split_of_one_value_needs_no_flag(tmp_path, caplog):
    assert table(tmp_path, split_table("split", ["train"] * 8)) == ["cat", "dog"]
    assert "--split" not in caplog.text


def test_lines_whose_split_is_spelled_otherwise_are_named(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "flyp_plugin"):
        table(tmp_path, split_table("split"), split="train")
    assert says(caplog.text, "6 lines", "'train ' (1), 'Train' (1), 'training' (1)", "--split")
    assert count_samples(expand_source(f"{tmp_path}/out", "train")) == 2


@pytest.mark.parametrize("value", ["0", "valid", "TRAIN"])
def test_a_split_that_no_line_has_names_what_there_is(tmp_path, value):
    text = split_table("split", ["0.0", "1.0", "val", "val", "train", "train", "train", "train"])
    with pytest.raises(InputError, match=naming(f"'{value}'", "'train' (4), 'val' (2)")):
        table(tmp_path, text, split=value)


def test_names_are_compared_by_how_they_look(tmp_path):
    text = "path,label\n0.png,sea  lion\n1.png,polar\u00a0bear\n2.png,cafe\u0301\n"
    (tmp_path / "names").write_text("caf\u00e9\nsea  lion\npolar\u00a0bear\n")
    assert table(tmp_path, text) == ["caf\u00e9", "polar bear", "sea lion"]
    written = table(tmp_path, text, classnames=str(tmp_path / "names"))
    assert written == ["caf\u00e9", "sea  lion", "polar\u00a0bear"]  # as the list has it


def test_folders_of_macos_are_the_classes_of_a_list_from_linux(tmp_path):
    for form in ("NFC", "NFD"):
        for name in ("caf\u00e9", "bar"):
            folder = tmp_path / form / unicodedata.normalize(form, name)
            folder.mkdir(parents=True)
            (folder / "1.png").write_bytes(png(1))
        write(str(tmp_path / form), str(tmp_path / "data" / form))
    assert (tmp_path / "data" / "classnames.txt").read_text() == "bar\ncaf\u00e9\n"
    assert sorted(label for _, label in samples(tmp_path / "data" / "NFD")) == [0, 1]


def test_a_name_of_two_classes_is_no_label_but_an_index_is(tmp_path):
    (tmp_path / "names").write_text("crane\ncat\ncrane\n")
    names = {"classnames": str(tmp_path / "names")}
    with pytest.raises(InputError, match=naming("'crane'", "line 1", "line 3")):
        table(tmp_path, "path,label\n0.png,crane\n1.png,cat\n", **names)
    assert table(tmp_path, "path,label\n0.png,0\n1.png,1\n2.png,2\n", **names) == ["crane", "cat", "crane"]
    assert samples(tmp_path / "out" / "train") == Counter((png(i), i) for i in range(3))
    assert flyp(["shards", "check", f"{tmp_path}/out"]) == 0


def test_mistakes_in_a_folder_are_one_sentence(photos, tmp_path):
    def fails(match: str, source: Path, dest: str = "out/train", **options) -> None:
        with pytest.raises(InputError, match=match):
            write(str(source), str(tmp_path / dest), **options)

    fails(naming(tmp_path / "nothing"), tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    fails(r"empty\b(?!.*jpg).*folder", tmp_path / "empty")
    (tmp_path / "empty" / "cat").mkdir()
    fails(naming("empty", "jpg, jpeg, png, webp"), tmp_path / "empty")
    (tmp_path / "empty" / "cat" / "1.png").write_bytes(png(1))
    fails(naming("one class", "'cat'"), tmp_path / "empty")
    (tmp_path / "splits" / "train").mkdir(parents=True)
    fails(naming(tmp_path / "splits", "train"), tmp_path / "splits")
    for folders, match in (
        (["a  b", "a b"], naming("'a  b'", "'a b'")),
        ([b"caf\xe9"], naming("UTF-8")),
    ):
        same = tmp_path / f"names{len(folders)}"
        for name in map(os.fsdecode, folders):
            (same / name).mkdir(parents=True)
        fails(match, same)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("")
    fails(naming(tmp_path / "full", "empty"), photos, "full")
    fails(naming("full/mine", "file"), photos, "full/mine")
    fails(naming("splits/shards", tmp_path / "splits"), tmp_path / "splits", "splits/shards")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "classnames.txt").write_text("one\ntwo\n")
    fails(naming("'eight'", "7 more", "2"), photos, "data/train")
    fails(naming("a picture", "--templates"), photos, templates="a picture")
    fails("full/mine.*(Not a dir|File exists)", photos, "full/mine/train")
    fails(naming("--image-col", "CSV"), photos, image_col="x")
    assert not (tmp_path / "out").exists() and os.listdir(tmp_path / "data") == ["classnames.txt"]


def test_mistakes_in_a_table_are_one_sentence(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(png(i))
    (tmp_path / "1.tif").write_bytes(b"")
    (tmp_path / "names").write_text("cat\ndog\n")

    def fails(match: str, lines: list[str], header: str = "path,y,split", **options) -> None:
        source = write_csv(tmp_path / "list.csv", header, lines)
        with pytest.raises(InputError, match=match):
            write(
                source, str(tmp_path / "out" / "train"), **({"image_col": "path", "label_col": "y"} | options)
            )

    good = ["0.png,0,train", "1.png,1,train"]
    fails(naming("--label-col label", "list.csv", "path, y, split"), good, label_col="label")
    fails(naming("--image-col"), good, image_col="")
    fails(naming("--group-col place", "path, y, split"), good, group_col="place")
    fails(naming("'val'", "'train' (2)"), good, split="val")
    fails(r"list\.csv\b.*(no lines|no rows|empty)", [])
    fails(naming("line 3", "y"), [good[0], "1.png,,train"])
    fails(r"line 3\b.*\b1 field.*\b3\b", [good[0], "1.png"])
    fails(naming("2 of 3", "7.png", "line 3"), [good[0], "7.png,1,", "8.png,1,"])
    fails(naming("1.tif", "line 2", "jpg"), ["1.tif,1,train"])
    fails(naming("'2'", "2 class"), ["0.png,0,", "1.png,2,"], classnames=str(tmp_path / "names"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_a_run_that_stops_leaves_nothing(photos, tmp_path, monkeypatch, error):
    def stop(shard, found):
        if shard.name == "3.tar":
            raise error
        real(shard, found)

    real = shards_module._write_tar
    monkeypatch.setattr(shards_module, "_write_tar", stop)
    with pytest.raises((KeyboardInterrupt, InputError)) as raised:
        write(str(photos), str(tmp_path / "train"))
    assert isinstance(error, KeyboardInterrupt) or "No space left on device" in str(raised.value)
    assert os.listdir(tmp_path) == []


def test_what_a_killed_run_leaves_is_refused(photos, tmp_path):
    code = f"""if True:
        import os, signal
        from flyp_plugin import shards
        real = shards._write_tar
        def kill(shard, found):
            os.kill(os.getpid(), signal.SIGKILL) if shard.name == "3.tar" else real(shard, found)
        shards._write_tar = kill
        shards.write({str(photos)!r}, {str(tmp_path / "train")!r})"""
    done = subprocess.run([sys.executable, "-c", code], stderr=subprocess.DEVNULL, check=False)
    assert done.returncode == -9
    assert os.listdir(tmp_path) == ["train.part"]
    with pytest.raises(InputError, match=naming(f"{tmp_path}/train", ".tar")):
        expand_source(str(tmp_path), "train")
    with pytest.raises(InputError, match=naming("nshards.txt", "16", "3")):
        expand_source(str(tmp_path / "train.part"), "train")
    with pytest.raises(InputError, match=naming(f"{tmp_path}/train.part")):
        write(str(photos), str(tmp_path / "train"))


def test_an_empty_folder_may_be_written_to(photos, tmp_path):
    (tmp_path / "train").mkdir()
    write(str(photos), str(tmp_path / "train"))
    assert len(samples(tmp_path / "train"))


@pytest.mark.parametrize("flag", ["--shard-size", "--shots", "--workers"])
def test_numbers_out_of_range_are_refused_by_argparse(tmp_path, capsys, flag):
    command = ["subset", "--shots", "1"] if flag == "--shots" else ["write"]
    with pytest.raises(SystemExit):
        flyp(
            [
                "shards",
                *command,
                str(tmp_path),
                f"{tmp_path}/train",
                flag,
                "-1" if flag == "--workers" else "0",
            ]
        )
    assert says(capsys.readouterr().err, flag, "-1" if flag == "--workers" else "0")


# subset


@pytest.mark.parametrize("shots", [1, 4, 16])
def test_a_subset_has_k_images_of_each_class_as_they_are(data, tmp_path, shots):
    flyp(["shards", "subset", str(data), str(tmp_path / "train"), "--shots", str(shots), "--seed", "3"])
    assert members(tmp_path / "train").items() <= members(data / "train").items()
    assert Counter(label for _, label in samples(tmp_path / "train").elements()) == dict.fromkeys(
        range(10), shots
    )
    for name in ("classnames.txt", "zeroshot_classification_templates.txt"):
        assert (tmp_path / name).read_bytes() == (data / name).read_bytes()
    assert flyp(["shards", "check", str(tmp_path)]) == 0


def test_shots_depend_on_the_seed_and_fewer_are_a_part_of_more(data):
    shards = local_shards(str(data), "train")
    assert few_shot_keys(shards, 4, seed=0) == few_shot_keys(shards, 4, seed=0)
    assert few_shot_keys(shards, 4, seed=0) < few_shot_keys(shards, 8, seed=0)
    assert few_shot_keys(shards, 4, seed=0) != few_shot_keys(shards, 4, seed=1)


def test_a_subset_reads_labels_and_the_chosen_images_alone(tmp_path):
    pixels = random.Random(0).randbytes(100_000)
    members = [
        (f"s{i:03d}.{ending}", data)
        for i in range(100)
        for ending, data in (("cls", b"%d" % (i % 2)), ("png", pixels))
    ]
    shard = tars.write(tmp_path / "0.tar", members)

    def bytes_read():
        return int(Path("/proc/self/io").read_text().split()[1])

    before = bytes_read()
    subset(shard, str(tmp_path / "few"), shots=2, classnames=["cat", "dog"])
    assert bytes_read() - before < 20 * len(pixels)  # of 200: twice 100
    with tarfile.open(tmp_path / "few" / "0.tar") as tar:
        assert {len(tar.extractfile(member).read()) for member in tar} <= {1, len(pixels)}


def test_a_sample_that_is_cut_off_is_not_chosen(tmp_path):
    whole = tars.tar(tars.samples(range(20)))
    for end in range(len(whole) // 2, len(whole) // 2 + 2000, 100):
        folder = tmp_path / str(end)
        shard = tars.write(folder / "0.tar", whole[:end])
        sizes = subset(shard, str(folder / "few"), shots=20, classnames=tars.NAMES)
        written = sum(count_samples([str(path)]) for path in (folder / "few").glob("*.tar"))
        assert written == sum(sizes.values())


def test_classes_with_fewer_images_give_all_and_are_named(tmp_path, caplog):
    (tmp_path / "classnames.txt").write_text("cat\ndog\nowl\n")
    tars.write(
        tmp_path / "a.tar", {f"{i}.{end}": b"1" if i else b"0" for i in range(4) for end in ("png", "cls")}
    )
    keys = few_shot_keys([str(tmp_path / "a.tar")], 2, 0, classnames=["cat", "dog", "owl"])
    assert len(keys) == 3 and (str(tmp_path / "a.tar"), "0") in keys
    assert says(caplog.text, "2 classes", "2 images", "cat (1), owl (0)")


def test_a_label_may_be_in_a_json_member(tmp_path):
    files = {f"{i}.{end}": json.dumps({"y": i % 3}).encode() for i in range(9) for end in ("jpg", "json")}
    tars.write(tmp_path / "a.tar", files)
    assert len(few_shot_keys([str(tmp_path / "a.tar")], 2, 0, "json:y")) == 6


def test_labels_may_be_class_names(tmp_path, capsys):
    names = ["cat", "crane", "d\u00e9j\u00e0", "crane"]
    files = {
        f"{i}.{end}": png(i) if end == "png" else names[i % 3].encode()
        for i in range(9)
        for end in ("png", "cls")
    }
    tars.write(
        tmp_path / "train" / "0.tar",
        files | {"2.cls": "de\u0301ja\u0300 ".encode(), "4.cls": b"1", "1.cls": b"3"},
    )
    (tmp_path / "classnames.txt").write_text("\n".join(names))
    assert flyp(["shards", "check", str(tmp_path), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)[f"{tmp_path}/train"]
    (wrong,) = report["problems"]["labels that are missing or wrong"]
    assert says(wrong, "sample 7", "'crane'", "several") and report["images a class"] == [1, 2, 3]
    with pytest.raises(InputError, match=naming("sample 7", "'crane'")):
        few_shot_keys(local_shards(str(tmp_path), "train"), 1, 0, classnames=names)
    assert len(few_shot_keys(local_shards(str(tmp_path), "train"), 1, 0, classnames=[*names[:3], "owl"])) == 4


def test_joined_sets_may_have_the_same_keys(data, tmp_path):
    shutil.copytree(data / "train", tmp_path / "copy")
    flyp(["shards", "subset", f"{data}::{tmp_path}/copy", str(tmp_path / "train"), "--shots", "30"])
    found = samples(tmp_path / "train")
    assert Counter(label for _, label in found.elements()) == dict.fromkeys(range(10), 30)
    assert flyp(["shards", "check", f"{tmp_path}/train"]) == 0


def test_mistakes_in_a_subset_are_one_sentence(data, tmp_path):
    def fails(match: str, *args: str) -> None:
        with pytest.raises(InputError, match=match):
            flyp(["shards", "subset", *args])

    dest = str(tmp_path / "few" / "train")
    fails(naming("http://localhost/{0..3}.tar"), "http://localhost/{0..3}.tar", dest, "--shots", "1")
    fails(naming(tmp_path / "nothing"), str(tmp_path / "nothing"), dest, "--shots", "1")
    fails(naming(data / "train", "empty"), str(data), str(data / "train"), "--shots", "1")
    tars.write(tmp_path / "a.tar", {"1.png": png(1), "1.cls": b"cat"})
    fails(naming("a.tar", "'cat'", "integer"), str(tmp_path / "a.tar"), dest, "--shots", "1")
    tars.write(tmp_path / "b.tar", {"1.txt": b""})
    fails(naming("b.tar", "samples"), str(tmp_path / "b.tar"), dest, "--shots", "1")
    (tmp_path / "classnames.txt").write_text("cat\ndog\n")
    fails(naming(tmp_path / "classnames.txt"), str(data), str(tmp_path / "train"), "--shots", "1")
    assert not (tmp_path / "few").exists()


# count and check


def test_count_gives_samples_by_shard_and_in_all(data, capsys):
    flyp(["shards", "count", str(data)])
    assert capsys.readouterr().out.split("\n")[-2].split() == ["200", "in", "16", "shards"]
    flyp(["shards", "count", str(data), f"{data}/train/{{0..1}}.tar", "--json"])
    counted = json.loads(capsys.readouterr().out)
    assert counted["shards"][f"{data}/train/0.tar"] == 12 and counted["total"] == 200


def test_check_describes_a_good_set(data, capsys):
    assert flyp(["shards", "check", str(data), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)[f"{data}/train"]
    per_class = np.bincount(DIGITS.target[:200])
    assert (report["samples"], report["shards"], report["classes"], report["problems"]) == (200, 16, 10, {})
    assert report["images a class"] == [per_class.min(), np.median(per_class), per_class.max()]
    assert report["formats"] == {"PNG": 133, "JPEG": 67} and report["sizes"] == ["8x8"] * 3
    assert report["prompts"][0] == "a photo of a eight." and len(set(report["prompts"])) == 5
    assert flyp(["shards", "check", str(data)]) == 0
    assert "200 samples in 16 shards" in capsys.readouterr().out


@pytest.mark.parametrize("other", ["test", "val"])
def test_check_looks_at_all_splits_train_first(photos, tmp_path, capsys, other):
    write(str(photos), f"{tmp_path}/{other}", hold_out=[("train", Fraction("0.5"))])
    assert flyp(["shards", "check", str(tmp_path), "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)) == [f"{tmp_path}/train", f"{tmp_path}/{other}"]


@pytest.mark.parametrize("workers", ["1", "2"])
def test_check_lists_all_that_is_wrong(tmp_path, capsys, workers):
    (tmp_path / "classnames.txt").write_text("cat\ndog\nowl\n")
    bad = {
        "ok.png": png(0), "ok.cls": b"0",
        "cut.png": png(1)[:60], "cut.cls": b"1",
        "text.jpg": b"<html>", "text.cls": b"1",
        "high.png": png(2), "high.cls": b"3",
        "low.png": png(2), "low.cls": b"-1",
        "word.png": png(2), "word.cls": b"bird",
        "name.png": png(6), "name.cls": b"dog",
        "image_only.png": png(3),
        "label_only.cls": b"1",
        "a.b.png": png(4), "a.b.cls": b"1",
    }  # fmt: skip
    tars.write(tmp_path / "test" / "0.tar", bad)
    tars.write(tmp_path / "test" / "1.tar", {"ok.png": png(5), "ok.cls": b"1"})
    (tmp_path / "test" / "2.tar").write_bytes((tmp_path / "test" / "0.tar").read_bytes()[:1600])
    (tmp_path / "test" / "sizes.json").write_text('{"0.tar": 8, "1.tar": 5}')
    assert flyp(["shards", "check", str(tmp_path), "--workers", workers, "--json"]) == 1
    report = json.loads(capsys.readouterr().out)[f"{tmp_path}/test"]
    shard = f"{tmp_path}/test/0.tar"

    def keys(kind: str) -> list[str]:
        problems = [problem for problem in report["problems"][kind] if shard in problem]
        return [problem.partition("sample ")[2].replace(":", ",").partition(",")[0] for problem in problems]

    assert keys("unreadable images") == ["cut", "text"]
    assert keys("labels that are missing or wrong") == ["high", "low", "word", "image_only"]
    assert keys("samples without image") == ["label_only", "a"]
    assert [p.partition(":")[0] for p in report["problems"]["unreadable shards"]] == [
        f"{tmp_path}/test/2.tar"
    ]
    assert f"{tmp_path}/test/1.tar, sample ok, also in {shard}" in report["problems"]["repeated keys"]
    (wrong,) = report["problems"]["wrong sizes.json"]
    assert says(wrong, f"{tmp_path}/test/1.tar", "1 images", "5")
    assert report["classes without images"] == ["owl"]


def test_check_shows_the_first_few_of_a_kind_and_their_number(tmp_path, capsys):
    (tmp_path / "classnames.txt").write_text("cat\ndog\n")
    tars.write(tmp_path / "train" / "0.tar", {f"{i}.{end}": b"0" for i in range(9) for end in ("png", "cls")})
    assert flyp(["shards", "check", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert says(out, "9 unreadable images") and says(out, "4 more") and out.count("0.tar, sample") == 5


def test_check_notes_what_is_no_mistake(tmp_path, capsys):
    (tmp_path / "classnames.txt").write_text("Dog\ndog\nowl\n")
    deep = io.BytesIO()
    Image.fromarray(np.full((8, 8), 40000, dtype=np.uint16)).save(deep, "PNG")
    files = {
        "0.png": deep.getvalue(),
        "0.cls": b"0",
        "1.png": png(1),
        "1.cls": b"1",
        "2.png": png(2),
        "2.cls": b"2",
    }
    tars.write(tmp_path / "train" / "0.tar", files)
    assert flyp(["shards", "check", str(tmp_path), "--json"]) == 0
    tokens, bits = json.loads(capsys.readouterr().out)[f"{tmp_path}/train"]["notes"]
    assert says(tokens, "'Dog' (class 0)", "'dog' (class 1)")
    assert re.search(r"\b1 image.*\b16.bit.*\b8\b", bits)


def test_check_and_count_name_a_tar_that_is_not_sorted(tmp_path, capsys, caplog):
    (tmp_path / "classnames.txt").write_text("cat\ndog\n")
    files = {"1.png": png(1), "2.png": png(2), "1.cls": b"1", "2.cls": b"0"}
    tars.write(tmp_path / "train" / "0.tar", files)
    assert flyp(["shards", "check", str(tmp_path), "--json"]) == 1
    problems = json.loads(capsys.readouterr().out)[f"{tmp_path}/train"]["problems"]
    assert "tar --sort=name" in problems["shards that are not sorted by name"][0]
    assert "labels that are missing or wrong" not in problems
    flyp(["shards", "count", str(tmp_path)])
    assert says(caplog.text, "0.tar", "sample 1")


def test_count_counts_other_images_where_asked_and_names_them(tmp_path, capsys, caplog):
    tars.write(tmp_path / "train" / "0.tar", {f"{i}.{end}": b"0" for i in range(3) for end in ("cls", "tif")})
    flyp(["shards", "count", str(tmp_path), "--json"])
    assert says(caplog.text, "0.tar", "cls, tif", "--image-key")
    flyp(["shards", "count", str(tmp_path), "--json", "--image-key", "tif"])
    assert [json.loads(line)["total"] for line in capsys.readouterr().out.splitlines()] == [0, 3]


def test_check_compares_a_len_with_the_whole_folder_it_is_of(tmp_path, capsys):
    (tmp_path / "classnames.txt").write_text("cat\ndog\n")
    for i in range(2):
        tars.write(tmp_path / "train" / f"{i}.tar", {f"{i}.png": png(i), f"{i}.cls": b"0"})
    (tmp_path / "train" / "__len__").write_text("7")
    assert flyp(["shards", "check", f"{tmp_path}/train/0.tar", "--json"]) == 0
    assert flyp(["shards", "check", str(tmp_path), "--json"]) == 1
    assert says(capsys.readouterr().out, "2 images", "7")


def test_check_needs_class_names(tmp_path):
    tars.write(tmp_path / "train" / "0.tar", {"1.png": png(1), "1.cls": b"1"})
    with pytest.raises(InputError, match=naming("classnames.txt")):
        flyp(["shards", "check", str(tmp_path)])


def test_a_file_that_is_no_tar_is_one_sentence(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"no tar")
    with pytest.raises(InputError, match=naming(tmp_path / "a.tar")):
        flyp(["shards", "count", str(tmp_path / "a.tar")])


# with others


def test_clip_benchmark_reads_what_is_written_here(photos, data):
    from clip_benchmark.datasets.builder import build_wds_dataset

    dataset = build_wds_dataset("wds/digits", np.asarray, split="train", data_dir=str(data))
    read = Counter((image.tobytes(), label) for image, label in dataset)
    assert dataset.classes == sorted(NAMES) and dataset.templates == ["a photo of a {c}."]
    decoded = Counter()
    for (raw, label), number in samples(data / "train").items():
        decoded[np.asarray(Image.open(io.BytesIO(raw)).convert("RGB")).tobytes(), label] += number
    assert read == decoded


class _Digits(list):
    classes = NAMES
    templates = ("a photo of the number {c}.",)


def test_what_clip_benchmark_writes_is_read_here(tmp_path, capsys):
    from clip_benchmark.webdataset_builder import convert_dataset

    dataset = _Digits((png(i), int(DIGITS.target[i])) for i in range(60))
    convert_dataset(dataset, "test", str(tmp_path), image_format="png", max_count=25, verbose=False)
    capsys.readouterr()
    flyp(["shards", "count", str(tmp_path), "--json"])
    assert json.loads(capsys.readouterr().out)["total"] == 60
    assert flyp(["shards", "check", str(tmp_path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)[f"{tmp_path}/test"]
    assert report["samples"] == 60 and report["prompts"][0] == "a photo of the number zero."
    flyp(["shards", "subset", str(tmp_path), str(tmp_path / "few"), "--split", "test", "--shots", "2"])
    assert len(samples(tmp_path / "few")) == 20


def test_help_needs_neither_torch_nor_fsspec():
    code = "import sys; from flyp_plugin import shards; from flyp_plugin.commands import check; sys.exit(bool({'torch', 'fsspec'} & sys.modules.keys()))"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(SystemExit) as done:
        flyp(["shards", "write", "--help"])
    assert done.value.code == 0


def test_templates_that_descriptions_would_hide_are_refused(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        (tmp_path / "photos" / name / "1.png").write_bytes(tars.png(1))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "prompts.json").write_text('{"cat": ["a pet."], "dog": ["a pet."]}')
    with pytest.raises(InputError, match=naming("prompts.json", "--templates")):
        write(str(tmp_path / "photos"), str(tmp_path / "data" / "train"), templates="a {c}.")
    write(str(tmp_path / "photos"), str(tmp_path / "data" / "train"))
    assert resolve_prompts([str(tmp_path / "data" / "train" / "0.tar")]).texts(0) == ["a pet."]
