"""From what a user types to tar URLs, the text beside them and the number of samples; local and from a server."""

import json
import logging
import os
import re
import shutil
import socket
import time
from collections import Counter
from typing import ClassVar
from urllib.parse import unquote

import fsspec
import numpy as np
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.spec import AbstractBufferedFile

from flyp_plugin import ClassPromptDataset, sources
from flyp_plugin.commands import call as flyp
from flyp_plugin.errors import InputError
from flyp_plugin.prompts import resolve_prompts
from flyp_plugin.sources import (
    IMAGE_KEY,
    count_samples,
    expand_source,
    expand_sources,
    find_beside,
    read_text,
)
from flyp_plugin.tars import find_scattered_sample, keys_with_image
from tests import tars
from tests.naming import naming, says


@pytest.fixture
def empty(tmp_path):
    """Touch files in a folder."""

    def touch(folder: str, *names: str) -> str:
        for name in names:
            (tmp_path / folder / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / folder / name).touch()
        return str(tmp_path / folder)

    return touch


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def raised(function, *args) -> str:
    with pytest.raises(InputError) as info:
        function(*args)
    return str(info.value)


# local sources


def test_a_data_folder_is_its_split_and_a_split_folder_is_itself(empty):
    train, test = empty("data/train", "0.tar", "1.tar"), empty("data/test", "0.tar")
    data = os.path.dirname(train)
    assert expand_source(data, "train") == [f"{train}/0.tar", f"{train}/1.tar"]
    assert expand_source(f"{data}/", "test") == [f"{test}/0.tar"]
    assert expand_source(test, "train") == [f"{test}/0.tar"]


def test_shards_come_in_the_order_of_their_numbers(empty):
    folder = empty("data", *(f"{i}.tar" for i in range(12)))
    assert expand_source(folder, "train") == [f"{folder}/{i}.tar" for i in range(12)]
    folder = empty("other", "b-10.tar", "b-9.tar", "a-2-1.tar", "a-10-1.tar", "x.tar")
    names = [os.path.basename(shard) for shard in expand_source(folder, "train")]
    assert names == ["a-2-1.tar", "a-10-1.tar", "b-9.tar", "b-10.tar", "x.tar"]


def test_hidden_files_are_no_shards(empty):
    folder = empty("data", "0.tar", "._0.tar", ".1.tar")
    assert expand_source(folder, "train") == [f"{folder}/0.tar"]


def test_a_brace_pattern_is_its_shards(empty):
    folder = empty("data", *(f"{i:03d}.tar" for i in range(3)), "a.tgz", "b.tar.gz")
    assert expand_source(f"{folder}/{{000..002}}.tar", "train") == [f"{folder}/{i:03d}.tar" for i in range(3)]
    assert expand_source(f"{folder}/{{a.tgz,b.tar.gz}}", "train") == [f"{folder}/a.tgz", f"{folder}/b.tar.gz"]
    assert expand_source(f" {folder}/001.tar ", "train") == [f"{folder}/001.tar"]


def test_sources_are_joined_by_colons(empty):
    one, two = empty("one", "0.tar", "1.tar"), empty("two/train", "0.tar")
    joined = f"{one}/{{0..1}}.tar::{os.path.dirname(two)}"
    assert expand_sources(joined, "train") == [[f"{one}/0.tar", f"{one}/1.tar"], [f"{two}/0.tar"]]


def test_a_pipe_is_expanded_and_not_looked_for():
    assert expand_source("pipe:cat gone/{0..1}.tar", "train") == [
        "pipe:cat gone/0.tar",
        "pipe:cat gone/1.tar",
    ]
    assert expand_source("pipe:cat gone*", "train") == ["pipe:cat gone*"]


def test_a_pattern_of_urls_is_expanded_and_not_asked_for():
    urls = [f"http://127.0.0.1:9/{i}.tar" for i in range(2)]
    assert expand_source("http://127.0.0.1:9/{0..1}.tar", "train") == urls


@pytest.mark.parametrize(
    "source,named",
    [
        ("", ["empty", "'::'"]),
        ("  ", ["empty", "'::'"]),
        ("DIR/*.tar", ["DIR/*.tar", "braces"]),
        ("DIR/7.tar", ["DIR/7.tar"]),
        ("DIR/{0..4}.tar", ["DIR/2.tar", "2 more", "5", "DIR/{0..4}.tar"]),
        ("DIR/{0..1.tar", ["DIR/{0..1.tar", "braces"]),
        ("DIR/gone", ["DIR/gone"]),
        ("DIR/notes.txt", ["DIR/notes.txt", "flyp shards write"]),
        ("DIR/sub", ["DIR/sub", "DIR/sub/train", ".tar"]),
    ],
)
def test_a_source_that_is_not_there_is_an_error(empty, source, named):
    folder = empty("data", "0.tar", "1.tar", "notes.txt", "sub/notes.txt")
    with pytest.raises(InputError, match=naming(*(word.replace("DIR", folder) for word in named))):
        expand_sources(source.replace("DIR", folder), "train")


def test_an_empty_part_between_colons_is_an_error(empty):
    with pytest.raises(InputError, match=naming("empty", "'::'")):
        expand_sources(empty("data", "0.tar") + "::", "train")


def test_another_number_of_shards_than_stated_is_an_error(empty, tmp_path):
    folder = empty("data", "0.tar", "1.tar")
    (tmp_path / "data" / "nshards.txt").write_text("2\n")
    assert len(expand_source(folder, "train")) == 2
    (tmp_path / "data" / "nshards.txt").write_text("3\n")
    with pytest.raises(InputError, match=naming("nshards.txt", "3", "2")):
        expand_source(folder, "train")


def test_text_beside_the_shards_precedes_the_folder_above(empty, tmp_path, monkeypatch):
    train = empty("data/train", "0.tar")
    above = empty("data", "classnames.txt")
    assert find_beside([f"{train}/0.tar"], "classnames.txt") == f"{above}/classnames.txt"
    empty("data/train", "classnames.txt")
    assert find_beside([f"{train}/0.tar"], "classnames.txt") == f"{train}/classnames.txt"
    assert find_beside([f"{train}/0.tar"], "other.txt") is None
    assert find_beside(["pipe:cat 0.tar"], "classnames.txt") is None
    monkeypatch.chdir(above)
    assert find_beside(["0.tar"], "classnames.txt") == "classnames.txt"
    assert find_beside(["train/0.tar"], "classnames.txt") == "train/classnames.txt"


def test_text_that_is_not_utf8_is_told_with_its_line(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\ntwo\nthr\xe9e\n")
    with pytest.raises(InputError, match=naming("a.txt", "line 3", "UTF-8")):
        read_text(str(tmp_path / "a.txt"))
    assert read_text(str(tmp_path / "gone.txt")) is None
    assert read_text(str(tmp_path / "a.txt" / "b.txt")) is None


# counts


def state(path, text: str) -> None:
    """Write a file of counts that is newer than the tars beside it also where clocks tick slowly."""
    path.write_text(text)
    os.utime(path, ns=(time.time_ns() + 10**9,) * 2)


def age(path, seconds: float = 60) -> None:
    os.utime(path, ns=(time.time_ns() - int(seconds * 1e9),) * 2)


def test_samples_are_counted_from_headers_and_remembered(tmp_path, caplog):
    shards = tars.shards(tmp_path, 10, 3)
    with caplog.at_level(logging.INFO, "flyp_plugin"):
        assert count_samples(shards) == 10
    assert json.loads((tmp_path / "sizes.json").read_text()) == {"0.tar": 4, "1.tar": 3, "2.tar": 3}
    assert says(caplog.text, "10 samples", "3 shards")
    assert sorted(os.listdir(tmp_path)) == ["0.tar", "1.tar", "2.tar", "sizes.json"]


def test_sizes_json_is_believed_and_not_overwritten(tmp_path):
    shards = tars.shards(tmp_path, 10, 2)
    text = '{"0.tar": 100, "1.tar": 11}'
    state(tmp_path / "sizes.json", text)
    assert count_samples(shards) == 111
    assert count_samples(shards[:1]) == 100
    assert count_samples([*shards, *shards]) == 222


def test_a_sizes_json_without_some_shard_is_not_used(tmp_path):
    shards = tars.shards(tmp_path, 10, 2)
    state(tmp_path / "sizes.json", '{"0.tar": 100}')
    assert count_samples(shards) == 10
    assert (tmp_path / "sizes.json").read_text() == '{"0.tar": 100}'


def test_len_is_the_whole_folders(tmp_path):
    shards = tars.shards(tmp_path, 10, 2)
    state(tmp_path / "__len__", "77\n")
    assert count_samples(shards) == 77
    assert count_samples(shards[:1]) == 5
    shutil.rmtree(tmp_path)
    shards = tars.shards(tmp_path, 10, 2)
    state(tmp_path / "__len__", "77\n")
    assert count_samples([*shards, *shards]) == 20  # not 77: it is twice the folder


@pytest.mark.parametrize("stated", ['{"0.tar": 99, "1.tar": 5}', '{"0.tar": 5, "1.tar": 5, "gone.tar": 7}'])
def test_a_count_older_than_its_tars_is_counted_again(tmp_path, caplog, stated):
    shards = tars.shards(tmp_path, 10, 2)
    (tmp_path / "sizes.json").write_text(stated)
    age(tmp_path / "sizes.json")
    assert sources.shard_sizes(shards) == {}
    with caplog.at_level(logging.INFO, "flyp_plugin"):
        assert count_samples(shards) == count_samples(shards) == 10
    assert len(re.findall("10 samples.*(?:newer|older)", caplog.text)) == 1  # then it is remembered
    assert json.loads((tmp_path / "sizes.json").read_text()) == {"0.tar": 5, "1.tar": 5}
    assert sources.shard_sizes(shards) == dict.fromkeys(shards, 5)


def test_tars_written_again_at_once_are_counted_again(tmp_path):
    shards = tars.shards(tmp_path, 10, 2)
    assert count_samples(shards) == 10
    tars.shards(tmp_path, 30, 2)  # in the same second
    assert count_samples(shards) == 30


@pytest.mark.parametrize("put", [os.replace, os.link, shutil.copy2, os.symlink])
def test_an_older_tar_put_in_place_is_counted_again(tmp_path, put):
    (shard,) = tars.shards(tmp_path / "set", 4, 1)
    (other,) = tars.shards(tmp_path / "other", 9, 1)
    age(other)
    assert count_samples([shard]) == 4
    time.sleep(0.02)
    os.remove(shard)
    put(other, shard)  # which keeps the time at which it was written
    assert count_samples([shard]) == 9


def test_a_part_counted_again_does_not_vouch_for_the_rest(tmp_path):
    shards = tars.shards(tmp_path, 10, 2)
    stated = '{"0.tar": 99, "1.tar": 98}'
    (tmp_path / "sizes.json").write_text(stated)
    age(tmp_path / "sizes.json")
    assert count_samples(shards[:1]) == 5
    assert (tmp_path / "sizes.json").read_text() == stated
    assert count_samples(shards) == 10


def test_an_old_len_is_counted_again_and_sizes_json_precedes_it(tmp_path):
    shards = tars.shards(tmp_path, 10, 2)
    (tmp_path / "__len__").write_text("77\n")
    age(tmp_path / "__len__")
    assert sources.shard_sizes(shards) == {}
    assert count_samples(shards) == sum(sources.shard_sizes(shards).values()) == 10


def test_another_image_key_neither_uses_nor_changes_the_counts(tmp_path):
    members = {"a.png": b"", "a.depth": b"", "b.depth": b"", "c.depth": b""}
    shard = tars.write(tmp_path / "0.tar", members)
    assert count_samples([shard], "depth") == 3
    assert not (tmp_path / "sizes.json").exists()
    assert count_samples([shard]) == 1
    assert count_samples([shard], "depth") == 3
    assert sources.shard_sizes([shard], "depth") == {} and sources.shard_sizes([shard]) == {shard: 1}
    os.remove(tmp_path / "sizes.json")
    state(tmp_path / "__len__", "1")
    assert (count_samples([shard]), count_samples([shard], "depth")) == (1, 3)


def test_remote_counts_are_believed_but_no_len_for_a_part():
    with tars.served({"/a/sizes.json": b'{"0.tar": 8}', "/b/__len__": b"9", "/b/nshards.txt": b"2"}) as (
        url,
        _,
    ):
        assert count_samples([f"{url}/a/0.tar"]) == 8
        assert count_samples([f"{url}/b/0.tar", f"{url}/b/1.tar"]) == 9
        assert "--train-num-samples" in raised(count_samples, [f"{url}/b/0.tar"])


def test_hidden_members_are_not_part_of_samples(tmp_path):
    members = {"t/._1.cls": b"", "t/1.cls": b"0", "t/._1.png": b"", "t/1.png": b"", "t/.DS_Store": b""}
    shard = tars.write(tmp_path / "0.tar", members | {"__meta__/x.png": b"", "._2.png": b""})
    assert list(keys_with_image(shard, IMAGE_KEY)) == ["t/1"] and find_scattered_sample(shard) is None


def test_members_apart_are_told_from_keys_that_come_twice(tmp_path):
    apart = tars.write(tmp_path / "a.tar", {"1.png": b"", "2.png": b"", "1.cls": b"", "2.cls": b""})
    assert says(find_scattered_sample(apart), "sample 1", "cls, png", f"tar --sort=name -cf {apart}")
    twice = [("1.png", b""), ("1.cls", b""), ("2.png", b""), ("2.cls", b""), ("1.png", b""), ("1.cls", b"")]
    assert find_scattered_sample(tars.write(tmp_path / "b.tar", tars.tar_of(twice))) is None
    assert (
        find_scattered_sample("pipe:cat x.tar") is find_scattered_sample(str(tmp_path / "gone.tar")) is None
    )


@pytest.mark.parametrize(
    "name,text", [("sizes.json", "{"), ("sizes.json", '{"0.tar": null}'), ("__len__", "many")]
)
def test_counts_that_are_none_are_an_error_naming_the_file(tmp_path, name, text):
    shards = tars.shards(tmp_path, 2, 1)
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=naming(tmp_path / name, "counts")):
        count_samples(shards)


def test_a_sample_is_counted_once_and_only_with_an_image(tmp_path):
    names = [
        "a.png",
        "a.cls",
        "a.jpg",
        "b.CLS",
        "b.WEBP",
        "c.cls",
        "d/e.f/g.jpeg",
        "d/e.f/g.seg.png",
        "h.v1.png",
    ]
    shard = tars.write(tmp_path / "0.tar", dict.fromkeys(names, b"0"))
    assert list(keys_with_image(shard, IMAGE_KEY)) == [
        "a",
        "b",
        "d/e.f/g",
    ]  # webdataset ends a key at the first dot
    assert list(keys_with_image(shard, "cls")) == ["a", "b", "c"]


def test_a_shard_given_twice_counts_twice(tmp_path):
    shards = tars.shards(tmp_path, 10, 2)
    assert count_samples([*shards, *shards]) == 20
    assert count_samples([*shards, *shards]) == 20  # now from sizes.json


def test_several_folders_are_counted_each(tmp_path):
    shards = tars.shards(tmp_path / "a", 4, 2) + tars.shards(tmp_path / "b", 5, 1)
    assert count_samples(shards) == 9
    assert json.loads((tmp_path / "b" / "sizes.json").read_text()) == {"0.tar": 5}


def test_a_broken_tars_count_is_not_remembered(tmp_path, caplog):
    whole = tars.tar(tars.samples(range(4)))
    good = tars.write(tmp_path / "0.tar", whole)
    # a sample is two blocks of 512 bytes, twice: header and image, header and label
    cut = tars.write(tmp_path / "1.tar", whole[: 2 * 2048 + 512 + 50])
    none = tars.write(tmp_path / "2.tar", b"<html>not a tar</html>" * 100)
    with caplog.at_level(logging.WARNING, "flyp_plugin"):
        counted = count_samples([good, cut, none])
    assert counted == 4 + 3  # the third image begins before the break
    warned = [record.getMessage() for record in caplog.records]
    assert [shard for said in warned for shard in (good, cut, none) if says(said, shard)] == [cut, none]
    assert not (tmp_path / "sizes.json").exists()


def test_a_count_of_nothing_is_not_remembered(tmp_path):
    shards = tars.shards(tmp_path, 4, 1)
    assert count_samples(shards, "tif") == 0
    assert count_samples(shards) == 4


def test_a_read_only_folder_is_counted_all_the_same(tmp_path, monkeypatch, caplog):
    def refuse(path, text):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(sources, "write_atomically", refuse)  # as root, no folder is read-only
    with caplog.at_level(logging.INFO, "flyp_plugin"):
        assert count_samples(tars.shards(tmp_path, 4, 1)) == 4
    assert re.search("4 samples.*writ", caplog.text)


@pytest.mark.parametrize("shard", ["pipe:cat 0.tar", "http://127.0.0.1:PORT/0.tar"])
def test_remote_shards_of_unknown_size_name_the_flag(shard):
    with tars.served({}) as (url, _):
        shard = shard.replace("http://127.0.0.1:PORT", url)
        with pytest.raises(InputError, match=naming(shard, "--train-num-samples")):
            count_samples([shard])


# from a server

SET = {
    "classnames.txt": b"cat\ndog\n",
    "zeroshot_classification_templates.txt": b"a {c}.\n",
    "train/nshards.txt": b"11\n",
    "test/nshards.txt": b"1",
    "train/sizes.json": json.dumps({f"{i}.tar": 3 for i in range(11)}).encode(),
}


@pytest.mark.parametrize("place", ["", "/some/tree/with/datasets", "/datasets"])
def test_a_folder_on_a_server_is_read_like_a_local_one(place):
    with tars.served({f"{place}/{name}": text for name, text in SET.items()}) as (url, _):
        url += place
        shards = expand_source(f"{url}/", "train")
        assert shards == expand_source(f"{url}/train", "test") == [f"{url}/train/{i}.tar" for i in range(11)]
        assert expand_source(url, "test") == [f"{url}/test/0.tar"]
        assert count_samples(shards) == 33
        prompts = resolve_prompts(shards)
        assert (prompts.classnames, prompts.templates) == (["cat", "dog"], ["a {c}."])


@pytest.mark.parametrize("given", ["tree/main", "tree/main/train", "resolve/main"])
def test_a_data_hub_gives_text_under_raw_and_tars_under_resolve(given):
    repo = "/datasets/clip-benchmark/wds_tree"
    with tars.served({f"{repo}/raw/main/{name}": text for name, text in SET.items()}) as (url, asked):
        shards = expand_source(f"{url}{repo}/{given}", "train")
        assert shards == [f"{url}{repo}/resolve/main/train/{i}.tar" for i in range(11)]
        assert count_samples(shards) == 33
        assert resolve_prompts(shards).classnames == ["cat", "dog"]
    assert all(path.startswith(f"{repo}/raw/main/") for path in asked)


def test_a_class_list_may_be_a_url():
    with tars.served({"/names.txt": b"cat\n\ndog\n", "/good.txt": b"cat\n"}) as (url, _):
        assert resolve_prompts(["pipe:x"], f"{url}/good.txt", "{c}").classnames == ["cat"]
        with pytest.raises(InputError, match=naming(f"{url}/names.txt", "line 2")):
            resolve_prompts(["pipe:x"], f"{url}/names.txt", "{c}")
        with pytest.raises(InputError, match=naming(f"{url}/gone.txt", "--classnames")):
            resolve_prompts(["pipe:x"], f"{url}/gone.txt", "{c}")


def test_a_server_without_the_set_is_an_error():
    with tars.served({}) as (url, _):
        error = raised(expand_source, f"{url}/set", "train")
    assert says(error, f"{url}/set/nshards.txt", f"{url}/set/train/nshards.txt")


@pytest.mark.parametrize("text", [b"0", b"many", b"<html>", b""])
def test_a_number_of_shards_that_is_none_is_an_error(text):
    with tars.served({"/nshards.txt": text}) as (url, _):
        error = raised(expand_source, url, "train")
    assert says(error, f"{url}/nshards.txt", repr(text.decode()))


@pytest.mark.parametrize("status", [401, 500, 503])
def test_a_server_that_refuses_is_an_error_with_its_status(status):
    with tars.served({"/nshards.txt": status}) as (url, _):
        error = raised(expand_source, url, "train")
    assert says(error, f"{url}/nshards.txt", status)


def test_text_that_breaks_off_is_an_error():
    with tars.served({"/names.txt": b"cat\ndog\nbird\n"}, cut={"/names.txt": 6}) as (url, _):
        error = raised(read_text, f"{url}/names.txt")
    assert says(error, f"{url}/names.txt", "IncompleteRead(6 bytes read, 7 more expected)")


def test_a_server_that_is_not_there_is_an_error():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound, but not listening
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/set"
        with pytest.raises(InputError, match=naming(f"{url}/nshards.txt", "refused")):
            expand_source(url, "train")


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:port/set", "nothing://host/set", "http://a b/set", "://set"]
)
def test_an_address_that_is_none_is_an_error(url):
    with pytest.raises(InputError, match=naming(url, "address")):
        expand_source(url, "train")


# from object stores and data hubs, through fsspec


class Store(MemoryFileSystem):
    """An object store that reads in ranges, as s3fs does, and fails as told: {path: errors, one for each request}."""

    protocol = "store"
    faults: ClassVar[dict[str, list[Exception]]] = {}
    asked: ClassVar[Counter[str]] = Counter()

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("store://"))

    def ask(self, path):
        self.asked[path] += 1
        if errors := self.faults.get(path):
            raise errors.pop(0)

    def ls(self, path, detail=True, **kwargs):
        self.ask(self._strip_protocol(path))
        return super().ls(path, detail, **kwargs)

    def _open(self, path, mode="rb", block_size=None, **kwargs):
        if mode != "rb":
            return super()._open(path, mode, block_size, **kwargs)
        if path not in self.store:
            self.ask(path)
            raise FileNotFoundError(path)
        return Ranges(self, path, mode, 4096)


class Ranges(AbstractBufferedFile):
    def _fetch_range(self, start, end):
        self.fs.ask(self.path)
        return self.fs.store[self.path].getvalue()[start:end]


class DriverError(Exception):
    """Of botocore, aiohttp and httpx: not an OSError."""


class NoCredentialsError(DriverError):
    pass


@pytest.fixture
def store(tmp_path):
    """Put a data folder of 40 digits in 3 shards into a store. Returns its address and the local folder."""
    fsspec.register_implementation("store", Store, clobber=True)
    data = tars.data_folder(tmp_path / "data", 40, 3)
    (data / "train" / "sizes.json").write_text(json.dumps({"0.tar": 14, "1.tar": 13, "2.tar": 13}))
    fsspec.filesystem("store").put(str(data), "store://bucket/data", recursive=True)
    Store.asked.clear()
    yield "store://bucket/data", data
    Store.faults.clear()
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


def epoch_of(source, **settings):
    """Images and tokens of an epoch, as bytes, in their order."""

    def pixels(image):
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float()

    def tokens(texts):
        return torch.tensor([[1, *text.encode()[:70], 255] + [0] * (70 - len(text)) for text in texts])

    data = ClassPromptDataset(source, pixels, tokens, 10, **settings)
    return [(images.numpy().tobytes(), text.numpy().tobytes()) for images, text in data]


def test_an_object_store_is_a_folder(store):
    url, data = store
    shards = expand_source(f"{url}/", "train")
    assert shards == expand_source(f"{url}/train", "test") == [f"{url}/train/{i}.tar" for i in range(3)]
    assert expand_source(f"{url}/train/{{0..2}}.tar", "train") == shards
    assert expand_sources(f"{url}::{data}", "train")[1] == [f"{data}/train/{i}.tar" for i in range(3)]
    assert count_samples(shards) == 40
    prompts = resolve_prompts(shards)
    assert (prompts.classnames, prompts.templates) == (tars.NAMES, ["a photo of a {c}."])


def test_an_object_store_is_listed_without_nshards(store):
    files, (url, _) = fsspec.filesystem("store"), store
    for name in ("x-10.tar", "x-9.tar", "._x-9.tar", "y.txt"):
        files.pipe(f"{url}/other/{name}", b"")
    assert expand_source(url, "other") == [f"{url}/other/x-9.tar", f"{url}/other/x-10.tar"]
    files.pipe(f"{url}/other/nshards.txt", b"3")
    assert says(raised(expand_source, url, "other"), f"{url}/other/nshards.txt", "'3'", "2")
    assert "--train-num-samples" in raised(count_samples, [f"{url}/other/x-9.tar"])


def test_a_bucket_itself_may_be_the_folder(store):
    fsspec.filesystem("store").pipe("store://flat/0.tar", b"")
    assert expand_source("store://flat", "train") == ["store://flat/0.tar"]
    assert find_beside(["store://flat/0.tar"], "classnames.txt") is None


def test_only_a_hubs_web_address_has_raw_and_resolve(store):
    fsspec.filesystem("store").pipe("store://bucket/datasets/a/b/tree/c/0.tar", b"")
    (shard,) = expand_source("store://bucket/datasets/a/b/tree/c", "train")
    assert shard == "store://bucket/datasets/a/b/tree/c/0.tar"


def test_what_a_store_does_not_have_is_named_with_its_reason(store):
    url = "store://bucket/gone"
    assert says(raised(expand_source, url, "train"), f"{url}/*.tar", f"{url}/train/*.tar", "bucket/gone")
    Store.faults["/nobucket"] = [FileNotFoundError("The specified bucket does not exist")]
    assert says(raised(expand_source, "store://nobucket", "train"), "bucket does not exist")


@pytest.mark.parametrize(
    "error", [PermissionError("Forbidden"), NoCredentialsError("Unable to locate credentials")]
)
def test_a_store_that_denies_is_not_asked_again(store, error):
    url, _ = store
    Store.faults["/bucket/data"] = [error]
    assert says(raised(expand_source, url, "train"), url, error, "credentials", "listing")
    assert Store.asked["/bucket/data"] == 1


@pytest.mark.parametrize("error", [DriverError("broken pipe"), TimeoutError(), OSError(16, "Reduce rate")])
def test_a_store_that_fails_for_a_while_is_asked_again(store, error, caplog):
    url, _ = store
    Store.faults |= {"/bucket/data": [error] * 2, "/bucket/data/train/nshards.txt": [error] * 2}
    assert len(expand_source(url, "train")) == 3
    assert says(caplog.text, url, f"{url}/train/nshards.txt", str(error) or "TimeoutError")
    Store.faults["/bucket/data"] = [error] * 9
    assert says(raised(expand_source, url, "train"), url, str(error) or "TimeoutError")


def test_a_driver_that_is_missing_is_named_with_its_command():
    fsspec.register_implementation(
        "far", "nobodys_driver.Far", errtxt="Install nobodys_driver to read far://"
    )
    for source in ("far://a/b", "far://a/{0..3}.tar"):
        error = raised(expand_source, source, "train")
        assert says(error, source, "Install nobodys_driver to read far://", "pip install nobodys_driver")
    assert "pip install nobodys_driver" in raised(read_text, "far://a/names.txt")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_store_trains_as_the_disk_does(store, workers):
    url, data = store
    assert count_samples(expand_source(url, "train")) == 40  # so the workers inherit an open file system
    assert epoch_of(url, num_workers=workers) == epoch_of(str(data), num_workers=workers)


def test_a_stores_tar_that_breaks_off_is_read_from_there(store):
    url, data = store
    for number in range(3):  # in each worker its own copy: the first request succeeds, two others do not
        Store.faults[f"/bucket/data/train/{number}.tar"] = Failing([3, 9])
    assert epoch_of(url, num_workers=2) == epoch_of(str(data), num_workers=2)
    Store.faults["/bucket/data/train/1.tar"] = Failing(range(3, 99))
    error = raised(lambda: epoch_of(url, num_workers=2, retries=1))
    assert says(error, f"{url}/train/1.tar", "of 40 samples", "broken off")


class Failing(list):
    """Errors for the requests of these numbers."""

    def __init__(self, numbers):
        self.numbers, self.seen = set(numbers), 0

    def __bool__(self):
        self.seen += 1
        return self.seen in self.numbers

    def pop(self, _):
        return DriverError("broken off")


def test_flyp_shards_reads_and_writes_local_files_only(store, tmp_path):
    url, data = store
    local = str(tmp_path / "new" / "train")
    for argv in (
        ["count", url],
        ["check", url],
        ["subset", url, local, "--shots", "1"],
        ["write", url, local],
    ):
        with pytest.raises(InputError, match=naming(url, "local")):
            flyp(["shards", *argv])
    with pytest.raises(InputError, match=naming("store://b/new", "local")):
        flyp(["shards", "subset", str(data), "store://b/new", "--shots", "1"])
    assert not Store.asked and not os.path.exists("store:")


# what huggingface_hub's HfFileSystem asks a hub for


@pytest.fixture
def hub(store, monkeypatch):
    """A hub on the loopback with the private data set team/digits. Returns the paths it was asked for."""
    data, asked = store[1], []
    files = {str(path.relative_to(data)): path.read_bytes() for path in data.rglob("*.*")}
    prefix = "/api/datasets/team/digits"

    def answer(request):
        path, _, _ = unquote(request.path).partition("?")
        asked.append(path)
        token = request.headers["Authorization"]
        if token not in ("Bearer hf_good", "Bearer hf_guest") or "team/digits" not in path:
            return 401, {"X-Error-Code": "RepoNotFound"}, b"{}"
        if path == f"{prefix}/revision/main" or path == prefix:
            return 200, {}, b'{"id": "team/digits", "sha": "1", "siblings": []}'
        if path.startswith(f"{prefix}/tree/main"):
            folder = path.removeprefix(f"{prefix}/tree/main").strip("/")
            names = [name for name in files if os.path.dirname(name) == folder]
            found = [{"type": "file", "path": n, "size": len(files[n]), "oid": "1"} for n in names]
            found += [] if folder else [{"type": "directory", "path": "train", "size": 0, "oid": "1"}]
            return (
                (200, {}, json.dumps(found).encode())
                if names
                else (404, {"X-Error-Code": "EntryNotFound"}, b"{}")
            )
        if token == "Bearer hf_guest":
            return 403, {"X-Error-Code": "GatedRepo"}, b"{}"
        content = files[path.removeprefix("/datasets/team/digits/resolve/main/")]
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers["Range"] or ""):
            start, end = int(wanted[1]), min(int(wanted[2] or len(content)), len(content) - 1)
            return 206, {"Content-Range": f"bytes {start}-{end}/{len(content)}"}, content[start : end + 1]
        return 200, {}, content

    monkeypatch.setenv("HF_TOKEN", "hf_good")
    with tars.answering(answer) as url:
        monkeypatch.setitem(fsspec.config.conf, "hf", {"endpoint": url})
        yield asked


def test_a_hubs_data_set_trains_as_the_disk_does(hub, store):
    shards = expand_source("hf://datasets/team/digits", "train")
    assert shards == [f"hf://datasets/team/digits/train/{i}.tar" for i in range(3)]
    assert count_samples(shards) == 40 and resolve_prompts(shards).classnames == tars.NAMES
    expected = epoch_of(str(store[1]), num_workers=2)
    assert epoch_of("hf://datasets/team/digits", num_workers=2) == expected
    assert len([path for path in hub if path.endswith(".tar")]) == 3


@pytest.mark.parametrize(
    "token,named",
    [("hf_bad", ["repository not found", "private", "token"]), ("hf_guest", ["403", "credentials"])],
)
def test_a_private_data_set_needs_the_users_token(hub, monkeypatch, token, named):
    monkeypatch.setenv("HF_TOKEN", token)
    assert says(
        raised(expand_source, "hf://datasets/team/digits", "train"), "hf://datasets/team/digits", *named
    )
