"""Each fault in the data, in a server and in hostile input, in short: the scripts of tests/faults with fewer rows."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flyp_plugin import ClassPrompts
from flyp_plugin.errors import CONTROLS, InputError
from flyp_plugin.samples import label_samples, read_samples
from flyp_plugin.sources import read_counts
from tests import tars
from tests.faults import data, hostile, remote

FAULTS = data.faults()


@pytest.mark.parametrize("fault", FAULTS, ids=[fault.name for fault in FAULTS])
def test_a_fault_in_a_tar_is_skipped_and_counted_or_named(fault, tmp_path):
    _, wrong = data.see(fault, tmp_path / "data", workers=0)
    assert not wrong


@pytest.mark.parametrize("case", [2, 3, 4])
def test_what_a_server_breaks_is_read_again(case):
    for cells, as_stated in remote.rows(remote.CASES[case : case + 1]):
        assert as_stated, cells


def test_what_a_server_never_gives_stops_the_epoch():
    for cells, as_stated in remote.rows(remote.CASES[-1:], retries=1):
        assert as_stated, cells


@pytest.mark.parametrize("attack", hostile.ATTACKS, ids=lambda attack: attack.__name__)
def test_hostile_input_runs_nothing_and_writes_nothing_outside(attack, tmp_path, monkeypatch):
    hostile.see(attack, tmp_path, monkeypatch.chdir)


# Text files and labels, fuzzed: what they say is used, or it is one sentence

TEXT = st.text(max_size=60) | st.binary(max_size=60)


@settings(deadline=None, max_examples=200)
@given(TEXT, TEXT)
def test_any_text_is_class_names_and_templates_or_a_sentence(tmp_path_factory, names, templates):
    folder = tmp_path_factory.getbasetemp() / "text"
    folder.mkdir(exist_ok=True)
    paths = []
    for name, content in (("names.txt", names), ("templates.txt", templates)):
        raw = content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")
        (folder / name).write_bytes(raw)
        paths.append(str(folder / name))
    try:
        prompts = ClassPrompts.from_files(*paths)
    except InputError as error:
        assert not CONTROLS.search(str(error))
        return
    for label in range(len(prompts.classnames)):
        assert prompts.classnames[label] in prompts(label, 0) and not CONTROLS.search(prompts(label, 0))


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=30) | st.integers().map(lambda number: b"%d" % number))
def test_any_label_is_a_class_or_a_sentence(raw):
    sample = {"__key__": "k", "__url__": "0.tar", "__broken__": False, "png": b"", "cls": raw}
    try:
        (found,) = label_samples([sample], 5, pytest.fail)
    except InputError as error:
        assert not CONTROLS.search(str(error))
    else:
        assert int(raw) == found["label"] in range(5)


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.just("0.tar") | st.text(max_size=5), inner, max_size=3)
    ),
)


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=30) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_sizes_json_is_counts_or_a_sentence(tmp_path_factory, raw):
    folder = tmp_path_factory.getbasetemp() / "sizes"
    folder.mkdir(exist_ok=True)
    (folder / "sizes.json").write_bytes(raw)
    try:
        sizes = read_counts(str(folder), "sizes.json")
    except InputError as error:
        assert "sizes.json" in str(error)
    else:
        assert all(size >= 0 for size in sizes.values())


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=3000), st.integers(0, 8000))
def test_any_bytes_in_a_tar_are_skipped(tmp_path_factory, raw, at):
    path = tmp_path_factory.getbasetemp() / "any.tar"
    whole = tars.tar(tars.samples(range(4)))
    path.write_bytes(whole[:at] + raw + whole[at + len(raw) :])
    skipped: list[str] = []
    for sample in read_samples([str(path)], lambda what, lost: skipped.append(what)):
        assert isinstance(sample["__key__"], str)
    assert len(skipped) <= 1 and not any(CONTROLS.search(what) for what in skipped)
