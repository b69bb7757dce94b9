"""Class names x templates: what is filled in, what is an error and where, and the table of tokens."""

import json
import logging
import multiprocessing
import pickle
from pathlib import Path

import clip_benchmark
import numpy as np
import open_clip
import pytest
import torch
from clip_benchmark.metrics.zeroshot_classification import zero_shot_classifier
from torch.utils.data import DataLoader, Dataset

from flyp_plugin import ClassPrompts
from flyp_plugin.errors import InputError
from flyp_plugin.heads import build_zeroshot_head
from flyp_plugin.names import normalize_name, same_names, to_unique_keys
from flyp_plugin.prompts import fill, resolve_prompts
from flyp_plugin.tokens import PromptTokens
from tests.naming import naming, says


@pytest.fixture(scope="module")
def tokenizer():
    return open_clip.get_tokenizer("ViT-B-32")


@pytest.fixture
def lists(tmp_path):
    """Write the two lists as bytes, and read them as ClassPrompts."""

    def read(classnames: bytes, templates: bytes = b"a photo of a {c}.\n") -> ClassPrompts:
        (tmp_path / "names.txt").write_bytes(classnames)
        (tmp_path / "templates.txt").write_bytes(templates)
        return ClassPrompts.from_files(str(tmp_path / "names.txt"), str(tmp_path / "templates.txt"))

    return read


# filling in


@pytest.mark.parametrize(
    "template,name,prompt",
    [
        ("a photo of a {c}.", "cat", "a photo of a cat."),
        ("a photo of a {}.", "cat", "a photo of a cat."),
        ("{c}, or {}, or {c}", "cat", "cat, or cat, or cat"),
        ("{c} {0} {c.__class__} {name} { {{}}", "cat", "cat {0} {c.__class__} {name} { {cat}"),
        ("a {c}.", "{c}", "a {c}."),
        ("a {c} and a {}.", "{} {0} \\1 %s", "a {} {0} \\1 %s and a {} {0} \\1 %s."),
        ("{c}", "naïve café 猫", "naïve café 猫"),
    ],
)
def test_only_the_place_of_the_class_is_filled(template, name, prompt):
    assert fill(template, name) == prompt
    assert ClassPrompts([name], [template])(0, 0) == prompt


@pytest.mark.parametrize(
    "template", ["{0}", "{c.__class__}", "{c!r}", "{c:>9}", "{ c }", "{C}", "a photo", ""]
)
def test_a_template_without_a_place_for_the_class_is_an_error(template):
    with pytest.raises(InputError, match=naming("2", "{c}")):
        ClassPrompts(["cat"], ["a {c}.", template])


def test_every_class_comes_in_every_template():
    prompts = ClassPrompts(["cat", "dog"], ["a {c}.", "the {}.", "{c}"])
    assert len(prompts) == 6
    assert [[prompts(label, t) for t in range(3)] for label in range(2)] == [
        ["a cat.", "the cat.", "cat"],
        ["a dog.", "the dog.", "dog"],
    ]


def test_an_empty_list_is_an_error():
    with pytest.raises(InputError, match=naming("class names", "empty")):
        ClassPrompts([], ["{c}"])
    with pytest.raises(InputError, match=naming("templates", "empty")):
        ClassPrompts(["cat"], [])


# lists by name and from files


def test_built_in_lists_are_open_clips():
    prompts = ClassPrompts.from_files("imagenet", "openai")
    assert (len(prompts.classnames), len(prompts.templates)) == (1000, 80)
    assert prompts.classnames == list(open_clip.IMAGENET_CLASSNAMES)
    for ours, theirs in zip(prompts.templates, open_clip.OPENAI_IMAGENET_TEMPLATES):
        assert fill(ours, "great white shark") == theirs("great white shark")
    simple = ClassPrompts.from_files("imagenet", "simple")
    assert simple(0, 0) == open_clip.SIMPLE_IMAGENET_TEMPLATES[0](simple.classnames[0])
    assert len(simple.templates) == len(open_clip.SIMPLE_IMAGENET_TEMPLATES)


def test_a_template_may_be_given_literally():
    assert ClassPrompts.from_files("imagenet", "a bad {}.")(2, 0) == "a bad great white shark."


@pytest.mark.parametrize(
    "raw", [b"cat\ndog", b"cat\ndog\n", b"cat\ndog\n\n \n", b"cat\r\ndog\r\n", b"\xef\xbb\xbfcat\ndog\n"]
)
def test_trailing_newlines_crlf_and_bom_are_no_part_of_a_name(lists, raw):
    assert lists(raw).classnames == ["cat", "dog"]
    assert lists(b"cat", raw.replace(b"cat", b"a {c}").replace(b"dog", b"{}")).templates == ["a {c}", "{}"]


@pytest.mark.parametrize(
    "raw,named",
    [
        (b"", ["names.txt", "empty"]),
        (b"\n \n", ["names.txt", "empty"]),
        (b"cat\n\ndog\n", ["names.txt", "line 2"]),
        (b"\ncat\n", ["names.txt", "line 1"]),
        (b"cat\nna\xefve\n", ["names.txt", "line 2", "UTF-8"]),
    ],
)
def test_a_mistake_in_the_class_names_is_told_with_file_and_line(lists, raw, named):
    with pytest.raises(InputError, match=naming(*named)):
        lists(raw)


@pytest.mark.parametrize(
    "raw,named",
    [
        (b"", ["templates.txt", "empty"]),
        (b"a {c}\n\nb {c}\n", ["templates.txt", "line 2"]),
        (b"a {c}\nb {0}\n", ["templates.txt", "line 2", "b {0}", "{c}"]),
        (b"{c.__class__}\n", ["templates.txt", "line 1", "{c.__class__}", "{c}"]),
        (b"a {c}\nb {c}\n\xff {c}\n", ["templates.txt", "line 3", "UTF-8"]),
    ],
)
def test_a_mistake_in_the_templates_is_told_with_file_and_line(lists, raw, named):
    with pytest.raises(InputError, match=naming(*named)):
        lists(b"cat\n", raw)


def test_a_file_that_is_not_there_is_told_with_its_flag(lists, tmp_path):
    with pytest.raises(InputError, match=naming("gone.txt", "--classnames", "imagenet")):
        ClassPrompts.from_files(str(tmp_path / "gone.txt"), "simple")
    with pytest.raises(InputError, match=naming("a photo of a {0}", "--templates")):
        ClassPrompts.from_files("imagenet", "a photo of a {0}")
    with pytest.raises(InputError, match=naming(tmp_path, "Is a directory")):
        ClassPrompts.from_files(str(tmp_path), "simple")


def test_a_name_given_twice_is_a_warning_that_names_both_lines(lists, caplog):
    with caplog.at_level(logging.WARNING, "flyp_plugin"):
        assert lists(b"cat\nsea lion\n sea\xc2\xa0lion\n").classnames[2] == "sea\u00a0lion"
        lists(b"cat\nsea lion\n sea\xc2\xa0lion\n")
    (record,) = caplog.records  # once, however often the list is read
    assert says(record.getMessage(), "names.txt", "line 3", "'sea lion'", "line 2")


def test_one_text_in_place_of_a_list_is_an_error():
    with pytest.raises(InputError, match=naming("lists")):
        ClassPrompts("cat", ["{c}"])
    with pytest.raises(InputError, match=naming("lists")):
        ClassPrompts(["cat"], "a {c}.")


@pytest.mark.parametrize(
    "names,form",
    [
        ('"cat",\n"dog",\n', "quot"),
        ("'cat'\n'dog'\n", "quot"),
        ('["cat", "dog"]', "quot"),
        ("classes = [\n    'cat',  \n    # pets\n    'dog',\n]\n", "quot"),
        ('{"classes": [\n "cat",\n "dog"\n]}\n', "quot"),
        ("{0: 'tench, Tinca tinca',\n 1: 'goldfish'}\n", "quot"),
        ("lambda c: f'a {c}',\nlambda c: f'the {c}',\n", "Python"),
        ("- cat\n- dog\n", "list"),
        ("0,cat\n1,dog\n", "numbered"),
        ("index,name\n0,cat\n1,dog\n", "numbered"),
        ("names:\n0: cat\n1: dog\n", "numbered"),
        ("cat, dog, owl\n", "one line"),
    ],
)
def test_class_names_in_another_syntax_are_refused(lists, names, form):
    with pytest.raises(InputError, match=rf"names\.txt.*{form}"):
        lists(names.encode())


@pytest.mark.parametrize(
    "names",
    [
        ["black-footed ferret, polecat, Mustela nigripes", "crane"],
        ['"big" cat', "6' tall", "don't walk", "rock 'n' roll"],
        ["'n' or 'm'", '"x" sign', "[SIC]", "f(x)", "lambda", "{c}", "()", "-"],
        ["001.Black footed Albatross", "002.Laysan Albatross"],
        ["0", "1", "2"],
        ["7, 8", "9, 10"],
        ['"quoted"', "cat"],
    ],
)
def test_quotes_commas_and_numbers_in_class_names_are_text(lists, names):
    assert lists("\n".join(names).encode()).classnames == names


@pytest.mark.parametrize(
    "templates",
    [
        "    'a photo of a {}.',\n    'a blurry photo of a {}.',\n",
        "templates = [\n    lambda c: f'a {c}.',\n]\n",
        '["a photo of a {c}.", "the {c}."]\n',
        '"a photo of a {c}."\n',
    ],
)
def test_templates_in_another_syntax_are_refused(lists, templates):
    with pytest.raises(InputError, match=naming("templates.txt", "a photo of a {c}.")):
        lists(b"cat\ndog\n", templates.encode())
    with pytest.raises(InputError, match=naming("template", "a photo of a {c}.")):
        ClassPrompts.from_files("imagenet", templates)


def test_templates_may_have_quotes_and_braces(lists):
    templates = ['"{c}" written on a sign.', "{}", "a {c}, in 'art'"]
    assert lists(b"cat\ndog\n", "\n".join(templates).encode()).templates == templates


# names that look alike


@pytest.mark.parametrize(
    "one,other",
    [
        ("sea  lion", "sea lion"),
        ("polar\u00a0bear", "polar bear"),
        ("cafe\u0301", "caf\u00e9"),
        (" cat\t", "cat"),
        ("zero\u200bwidth\ufeff", "zerowidth"),
    ],
)
def test_names_that_look_alike_are_one_name(one, other):
    assert normalize_name(one) == normalize_name(other) == other
    assert same_names([one, "x"], [other, "x"]) and not same_names([one, "x"], ["x", other])
    assert to_unique_keys([one, "x", other]) == [(other, 1), ("x", 1), (other, 2)]
    assert normalize_name("Dog") != normalize_name("dog")  # other words, perhaps: their tokens are looked at


def test_lists_that_differ_in_what_is_not_seen_go_together(tmp_path):
    for name, names in (
        ("a", "sea lion\ncaf\u00e9\nsea lion\n"),
        ("b", "sea\u00a0lion\ncafe\u0301\nsea  lion\n"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "classnames.txt").write_text(names)
    shards = [str(tmp_path / name / "0.tar") for name in "ab"]
    assert len(resolve_prompts(shards, templates="{c}").classnames) == 3
    given = str(tmp_path / "b" / "classnames.txt")
    assert resolve_prompts(shards, given, "{c}").classnames[0] == "sea\u00a0lion"
    (tmp_path / "c.txt").write_text("sea lion\nsea lion\ncaf\u00e9\n")
    with pytest.raises(InputError, match=naming("'caf\u00e9'", "line 3", "c.txt", "line 2")):
        resolve_prompts(shards, str(tmp_path / "c.txt"), "{c}")


def test_imagenets_own_repetitions_are_tolerated_in_a_file(lists):
    names = "\n".join(open_clip.IMAGENET_CLASSNAMES).encode()
    assert lists(names).classnames == list(open_clip.IMAGENET_CLASSNAMES)


# the files that belong to shards


@pytest.mark.parametrize("place", ["data/train", "data"])
def test_prompts_are_found_beside_the_shards_or_one_folder_above(tmp_path, place):
    (tmp_path / "data" / "train").mkdir(parents=True)
    (tmp_path / place / "classnames.txt").write_text("cat\ndog\n")
    (tmp_path / place / "zeroshot_classification_templates.txt").write_text("one {c}\n")
    prompts = resolve_prompts([str(tmp_path / "data" / "train" / "0.tar")])
    assert (prompts.classnames, prompts.templates) == (["cat", "dog"], ["one {c}"])


def test_what_is_given_comes_before_what_is_found(tmp_path):
    (tmp_path / "classnames.txt").write_text("cat\ndog\n")
    (tmp_path / "other.txt").write_text("bird\n")
    prompts = resolve_prompts([str(tmp_path / "0.tar")], str(tmp_path / "other.txt"), "my {c}")
    assert (prompts.classnames, prompts.templates) == (["bird"], ["my {c}"])
    (tmp_path / "other.txt").write_text("dog\ncat\n")
    with pytest.raises(InputError, match=naming("'cat'", "line 2", "other.txt", "line 1", "classnames.txt")):
        resolve_prompts([str(tmp_path / "0.tar")], str(tmp_path / "other.txt"))
    (tmp_path / "other.txt").write_text("cat\nwolf\nowl\n")
    assert resolve_prompts([str(tmp_path / "0.tar")], str(tmp_path / "other.txt")).classnames[1] == "wolf"


def test_sets_that_are_joined_have_one_list_of_class_names(tmp_path):
    for name, names in (("a", "cat\ndog\n"), ("b", "dog\ncat\n"), ("c", "cat\r\ndog")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "classnames.txt").write_text(names)
    a, b, c = (str(tmp_path / name / "0.tar") for name in "abc")
    assert resolve_prompts([a, a, c], templates="{c}").classnames == ["cat", "dog"]
    with pytest.raises(InputError, match=naming("b/classnames.txt", "a/classnames.txt", "--classnames")):
        resolve_prompts([a, c, b], templates="{c}")
    with pytest.raises(
        InputError, match=naming("'dog'", "line 2", "a/classnames.txt", "line 1", "b/classnames.txt")
    ):
        resolve_prompts([a, b], str(tmp_path / "a" / "classnames.txt"), "{c}")


def test_without_templates_the_prompt_is_a_photo_of_a(tmp_path):
    (tmp_path / "classnames.txt").write_text("cat\n")
    assert resolve_prompts([str(tmp_path / "0.tar")])(0, 0) == "a photo of a cat."


@pytest.mark.parametrize("shard", ["0.tar", "pipe:cat 0.tar"])
def test_without_class_names_the_flag_is_named(tmp_path, monkeypatch, shard):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=naming("classnames.txt", shard, "--classnames")):
        resolve_prompts([shard])


# tokens


def test_take_gives_what_the_tokenizer_gives(tokenizer):
    prompts = ClassPrompts(
        ["cat", "great white shark", "naïve {} café 猫"], ["a {c}.", "itap of my {}!", "{c}"]
    )
    labels, templates = [2, 0, 1, 1, 2], [1, 0, 2, 1, 2]
    tokens = prompts.tokenize(tokenizer).take(labels, templates)
    assert tokens.dtype == torch.int64
    assert torch.equal(tokens, tokenizer([prompts(*pair) for pair in zip(labels, templates)]))


def test_tokens_take_two_bytes_each_without_padding(tokenizer):
    prompts = ClassPrompts(["cat", "great white shark"], ["a photo of a {c}.", "{c}"])
    tokens = prompts.tokenize(tokenizer)
    longest = len(tokenizer.encode("a photo of a great white shark.")) + 2  # with start and end of text
    assert tokens.length == longest
    used = sum(len(tokenizer.encode(text)) + 2 for label in range(2) for text in prompts.texts(label))
    assert tokens._tokens.nbytes == 2 * used  # no padding, two bytes each


def test_a_small_vocabulary_takes_one_byte_and_a_large_one_four():
    def tokenizer_up_to(highest):
        def tokenize(texts, context_length=8):
            rows = [
                ([1, highest] + [0] * context_length)[:context_length] if t else [0] * context_length
                for t in texts
            ]
            return torch.tensor(rows)

        return tokenize

    prompts = ClassPrompts(["cat"], ["{c}"])
    for highest, dtype in ((255, np.uint8), (256, np.uint16), (65536, np.uint32)):
        tokens = PromptTokens(prompts, tokenizer_up_to(highest))
        assert (tokens._tokens.dtype, tokens.length) == (dtype, 2)
        assert tokens.take([0], [0]).tolist() == [[1, highest, 0, 0, 0, 0, 0, 0]]


def test_padding_may_be_another_token_than_zero():
    def tokenize(texts, context_length=6):
        return torch.tensor([([5, len(t), 2] + [1] * context_length)[:context_length] for t in texts])

    prompts = ClassPrompts(["cat", "mouse"], ["{c}"])
    tokens = PromptTokens(prompts, tokenize)
    assert tokens.length == 3
    assert tokens.take([1], [0]).tolist() == [[5, 5, 2, 1, 1, 1]]


def test_several_processes_give_the_same_table(tokenizer, monkeypatch):
    prompts = ClassPrompts(
        [f"class {i}" + " long" * (i % 7) for i in range(40)], ["a {c}.", "some {c} of mine"]
    )
    alone = prompts.tokenize(tokenizer)
    monkeypatch.setattr("flyp_plugin.tokens._CHUNK", 16)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    several = prompts.tokenize(tokenizer)
    assert np.array_equal(several._tokens, alone._tokens) and np.array_equal(several._ends, alone._ends)


def test_ragged_prompts_of_21000_classes_fit_in_300_mb(tokenizer):
    names = [f"species number {i}" for i in range(420)]  # a fiftieth, of 40 to 120 prompts each
    own = {
        name: [f"{name} seen from view {k}, in the rain." for k in range(40 + 80 * (i % 2))]
        for i, name in enumerate(names)
    }
    tokens = ClassPrompts(names, [], own).tokenize(tokenizer)
    assert tokens.counts.tolist() == [40, 120] * 210
    held = sum(array.nbytes for array in vars(tokens).values() if isinstance(array, np.ndarray))
    assert 50 * held < 300 * 2**20
    labels, numbers = [0, 419, 7, 1], [39, 119, 0, 80]
    texts = [own[names[label]][number] for label, number in zip(labels, numbers)]
    assert torch.equal(tokens.take(labels, numbers), tokenizer(texts))


def test_tokenizing_leaves_the_global_generator_alone(tokenizer):
    before = torch.get_rng_state()
    ClassPrompts(["cat"], ["{c}"]).tokenize(tokenizer)
    assert torch.equal(torch.get_rng_state(), before)


def test_cut_prompts_are_one_warning_with_number_and_first(tokenizer, caplog):
    long, longer = "word " * 76, "word " * 90
    with caplog.at_level(logging.WARNING, "flyp_plugin"):
        tokens = ClassPrompts(["cat", long, longer], ["{c}", "my {c}"]).tokenize(tokenizer)
    cut, same = (record.getMessage() for record in caplog.records)
    assert says(cut, "4 of 6", "77 tokens", repr(long[:80]))
    assert says(same, f"{long[:80]!r} (class 1)", f"{longer[:80]!r} (class 2)")  # cut to the same 77 tokens
    assert torch.equal(tokens.take([2], [1]), tokenizer(["my " + longer]))


def test_classes_of_the_same_tokens_are_named(tokenizer, caplog):
    pairs = [
        ("Dog", "dog"),
        ("caf\u00e9", "cafe\u0301"),
        ("salt & pepper", "salt &amp; pepper"),
        ("don\u2019t walk", "don't walk"),
    ]
    names = ["cat", *(name for pair in pairs for name in pair), "dogs"]
    with caplog.at_level(logging.WARNING, "flyp_plugin"):
        tokens = ClassPrompts(names, ["{c}", "a photo of a {c}."]).tokenize(tokenizer)
    assert tokens.same == [[1, 2], [3, 4], [5, 6], [7, 8]]
    told = caplog.records[-1].getMessage()
    assert says(told, "3 groups", "'Dog' (class 1)", "'dog' (class 2)", "'salt & pepper' (class 5)")
    assert "caf" not in told  # the accents are one name


def test_classes_that_one_template_tells_apart_are_not_named(tokenizer, caplog):
    long = "word " * 80
    with caplog.at_level(logging.WARNING, "flyp_plugin"):
        tokens = ClassPrompts(["cat", "dog"], [long + "{c}", "{c}"]).tokenize(tokenizer)
    assert tokens.same == [] and [
        says(record.getMessage(), "2 of 4", "77 tokens") for record in caplog.records
    ] == [True]


def test_a_prompt_that_just_fits_is_not_reported(tokenizer, caplog):
    with caplog.at_level(logging.WARNING, "flyp_plugin"):
        tokens = ClassPrompts(["cat", "word " * 75], ["{c}"]).tokenize(
            tokenizer
        )  # 75 words, start and end: 77
    assert tokens.length == 77
    assert not caplog.records


class _Peeks(Dataset):
    """The address of the tokens' memory, and whether it lies in a file, such as one in /dev/shm."""

    def __init__(self, tokens):
        self.tokens = tokens

    def __len__(self):
        return 1

    def __getitem__(self, item):
        address = self.tokens._tokens.ctypes.data
        for line in Path("/proc/self/maps").read_text().splitlines():
            start, end = (int(part, 16) for part in line.split()[0].split("-"))
            if start <= address < end:
                return address, "/" in line


def test_forked_workers_share_the_tokens_without_dev_shm(tokenizer):
    tokens = ClassPrompts(["cat"], ["{c}"]).tokenize(tokenizer)
    loader = DataLoader(
        _Peeks(tokens), num_workers=1, multiprocessing_context=multiprocessing.get_context("fork")
    )
    (address, shared) = next(iter(loader))
    assert (int(address), bool(shared)) == (tokens._tokens.ctypes.data, False)


def test_spawned_workers_get_the_tokens(tokenizer):
    tokens = ClassPrompts(["cat"], ["{c}"]).tokenize(tokenizer)
    assert torch.equal(pickle.loads(pickle.dumps(tokens)).take([0], [0]), tokens.take([0], [0]))


# class descriptions


def write_json(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


OWN = {
    "cat": ["a purring pet.", "whiskers\nand a tail", "a {c} asleep"],
    "dog": ["it barks."],
    "owl": ["it hoots."],
}


def test_each_class_has_its_own_prompts(tmp_path):
    path = write_json(tmp_path / "own.json", OWN)
    prompts = ClassPrompts.from_json(path, ["dog", "cat"])
    assert [prompts.texts(label) for label in (0, 1)] == [
        ["it barks."],
        ["a purring pet.", "whiskers\nand a tail", "a cat asleep"],
    ]
    assert (len(prompts), prompts.counts(), prompts(1, 2)) == (4, [1, 3], "a cat asleep")
    both = ClassPrompts.from_json(path, ["dog", "cat"], "the {c}.")
    assert both.texts(0) == ["the dog.", "it barks."]
    assert ClassPrompts(**both.lists()).texts(1) == both.texts(1)
    assert ClassPrompts.from_json(path).classnames == ["cat", "dog", "owl"]
    nested = write_json(tmp_path / "nested.json", {"pets": OWN})
    assert ClassPrompts.from_json(nested).texts(2) == ["it hoots."]


def test_names_of_descriptions_are_compared_by_how_they_look():
    prompts = ClassPrompts(
        ["caf\u00e9", "sea lion", "sea lion"], [], {"cafe\u0301": ["x"], "sea\u00a0 lion": ["y", "z"]}
    )
    assert [prompts.texts(label) for label in range(3)] == [["x"], ["y", "z"], ["y", "z"]]


@pytest.mark.parametrize(
    "content,named",
    [
        ({"cat": ["x"]}, ["own.json", "1 of 2", "'dog'", "'cat'"]),
        ({"cat": ["x"], "dog": []}, ["own.json", "'dog'", "empty"]),
        ({"cat": ["x"], "dog": "it barks"}, ["own.json", "'dog'", "it barks", "list"]),
        ({"cat": ["x"], "dog": ["y", 3]}, ["own.json", "'dog'", "prompt 2", "3"]),
        ({"cat": ["x"], "dog": [" "]}, ["own.json", "'dog'", "prompt 1"]),
        ({"cat": ["x"], "dog": ["\x1b[2J"]}, ["own.json", "'dog'", "prompt 1", "control"]),
        ({"cat": ["x"], "dog": None}, ["own.json", "'dog'", "None"]),
        (["cat", "dog"], ["own.json", "list", "--prompts"]),
        ("3", ["own.json", "int", "--prompts"]),
        ("{}", ["own.json", "2 of 2"]),
        ("a photo of a {c}.", ["own.json", "JSON", "--prompts"]),
        ('{"cat": ["x"], "dog": ["y"], "cat": ["z"]}', ["own.json", "'cat'", "twice"]),
        ({"pets": OWN, "birds": OWN}, ["own.json", "'pets'", "'birds'"]),
        ({"cat": ["x"], "dog": ["y"], "do\u200bg": ["z"]}, ["own.json", "'dog'", "twice"]),
    ],
)
def test_other_json_is_one_sentence(tmp_path, content, named):
    path = write_json(tmp_path / "own.json", content)
    with pytest.raises(InputError, match=naming(*named)) as error:
        ClassPrompts.from_files(["cat", "dog"], None, path)
    assert "\n" not in str(error.value)


def test_a_missing_descriptions_file_is_named(tmp_path):
    with pytest.raises(InputError, match=naming("gone.json", "--prompts")):
        ClassPrompts.from_json(str(tmp_path / "gone.json"))


def test_descriptions_beside_shards_replace_the_templates(tmp_path):
    (tmp_path / "classnames.txt").write_text("cat\ndog\n")
    (tmp_path / "zeroshot_classification_templates.txt").write_text("one {c}\n")
    shards = [str(tmp_path / "train" / "0.tar")]
    assert resolve_prompts(shards).texts(1) == ["one dog"]
    write_json(tmp_path / "prompts.json", OWN)
    assert resolve_prompts(shards).texts(1) == ["it barks."]
    assert resolve_prompts(shards, templates="my {c}").texts(1) == ["my dog"]  # what is given wins
    other = write_json(tmp_path / "other.json", {"cat": ["x"], "dog": ["y"]})
    assert resolve_prompts(shards, descriptions=other).texts(1) == ["y"]
    assert resolve_prompts(shards, None, "my {c}", other).texts(1) == ["my dog", "y"]


@pytest.fixture(scope="module")
def cupl():
    """CLIP_benchmark's file of GPT-3's descriptions of ImageNet: 998 names for 1,000 classes, 150 prompts each."""
    return str(Path(clip_benchmark.__file__).parent / "datasets" / "cupl_prompts.json")


def test_cupls_file_is_read_as_it_is(cupl):
    prompts = ClassPrompts.from_files("imagenet", None, cupl)
    content = json.loads(Path(cupl).read_text())["imagenet1k"]
    assert len(prompts) == 150_000 and prompts.descriptions == content
    assert all(prompts.texts(i) == content[name] for i, name in enumerate(prompts.classnames))


def test_the_head_of_descriptions_is_clip_benchmarks(cupl):
    torch.manual_seed(0)
    config = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
    model = open_clip.CLIP(
        16, {"image_size": 16, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8}, config
    ).eval()
    content, tokenizer = json.loads(Path(cupl).read_text())["imagenet1k"], open_clip.get_tokenizer("ViT-B-32")
    names = ["tench", "missile", "sunglasses", "goldfish", "sunglasses"]
    ragged = {name: content[name][: 10 + 35 * i] for i, name in enumerate(names[:4])}
    for own in (content, ragged):
        theirs = zero_shot_classifier(model, tokenizer, names, own, "cpu", amp=False)
        ours = build_zeroshot_head(model, tokenizer, ClassPrompts(names, [], own))
        assert ours.shape == (16, 5) and torch.allclose(ours, theirs, rtol=0, atol=1e-6)
