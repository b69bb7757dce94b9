"""What open_clip's registry says of a tag, its activation and its preprocessing, holds in every command.

Every entry without training, and from training to export one of each kind; `python -m tests.registry --all` does that
with all of them.
"""

import shutil

import pytest
import torch
from open_clip import factory
from open_clip.timm_model import TimmModel

from flyp_plugin import record
from flyp_plugin.errors import InputError
from flyp_plugin.model_spec import ModelSpec
from tests import registry
from tests.naming import naming
from tests.registry import Entry

# an entry of each kind, flags of flyp train, and the formats of export that cannot hold it
SAMPLE = [
    ("ViT-B-32", "laion2b_s34b_b79k", "", ""),
    ("ViT-B-16", "openai", "", ""),
    ("ViT-B-32-quickgelu", "metaclip_400m", "", ""),
    ("ViT-L-14", "laion2b_s32b_b82k", "", ""),  # mean and std
    ("ViT-H-14-quickgelu", "dfn5b", "", ""),  # squash
    ("ViT-B-32", "datacomp_xl_s13b_b90k", "--force-image-size 96 --force-custom-text", ""),
    ("RN50", "yfcc15m", "", "timm"),
    ("coca_ViT-B-32", "laion2b_s13b_b90k", "", "timm"),
    ("ViT-L-14-CLIPA", "datacomp1b", "", "timm"),  # mean, std, bilinear, squash, a tokenizer of its own
    ("roberta-ViT-B-32", "laion2b_s12b_b32k", "", ""),
    ("convnext_base", "laion400m_s13b_b51k", "", ""),
    ("EVA02-B-16", "merged2b_s8b_b131k", "", ""),
    ("ViT-B-16-SigLIP", "webli", "", ""),  # mean, std, squash, a tokenizer of its own
    ("PE-Core-B-16", "meta", "", ""),  # mean, std, bilinear, squash
]
SAMPLE = [sample for sample in SAMPLE if Entry(*sample[:2]) in registry.entries()]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Small models by the registry's names; the folder for their weights."""
    folder, threads = tmp_path_factory.mktemp("registry"), torch.get_num_threads()
    torch.set_num_threads(1)  # the models are too small for more
    with registry.small_models(folder):
        yield folder
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data(models):
    return registry.write_data(models)


def test_every_entry_means_what_open_clip_says(models, tmp_path):
    wrong, built = [], set()
    for number, entry in enumerate(registry.entries()):
        meaning = (entry.name, entry.quick_gelu, str(entry.images))
        (tmp_path / str(number)).mkdir()
        try:
            with registry.downloads(entry, models):
                registry.check_meaning(entry, tmp_path / str(number), build=meaning not in built)
        except AssertionError as error:
            wrong.append(str(error))
        built.add(meaning)
        shutil.rmtree(tmp_path / str(number))  # megabytes each
    assert number > 100 and wrong == []


@pytest.mark.parametrize(("name", "tag", "flags", "refusing"), SAMPLE)
def test_one_meaning_from_training_to_export(name, tag, flags, refusing, models, data, tmp_path):
    entry = Entry(name, tag)
    with registry.downloads(entry, models):
        refused = registry.check_whole(entry, data, tmp_path, *flags.split())
    shutil.rmtree(tmp_path)
    assert list(refused) == refusing.split(), refused


def test_a_timm_tower_at_another_size_has_one_meaning(models, data, tmp_path):
    entry = Entry("ViT-B-16-SigLIP", "webli")
    with registry.downloads(entry, models):
        if hasattr(TimmModel, "set_input_size"):
            refused = registry.check_whole(entry, data, tmp_path, "--force-image-size", "96")
            assert list(refused) == ["open_clip"] and "--format timm" in refused["open_clip"]
        else:  # open_clip before 3.0
            with pytest.raises(InputError, match=naming("224", "96")):
                registry.check_whole(entry, data, tmp_path, "--force-image-size", "96")
    shutil.rmtree(tmp_path)


@pytest.mark.parametrize("tokenizer", [False, True], ids=["", "own-tokenizer"])
@pytest.mark.parametrize("kind", ["hf-hub", "local-dir"])
def test_a_place_has_one_meaning_from_training_to_export(kind, tokenizer, models, data, tmp_path):
    if kind == "local-dir" and not hasattr(factory, "parse_model_name"):
        pytest.skip("local-dir: came with open_clip 3.0")
    (tmp_path / "it").mkdir()
    place = registry.make_place(tmp_path / "it", kind, tokenizer)
    with registry.hub(tmp_path / "it"):
        assert registry.check_whole(place, data, tmp_path) == {}
    shutil.rmtree(tmp_path)


def test_a_places_weights_have_no_record_in_this_folder(tmp_path, monkeypatch):
    record.Record(record.describe_model(ModelSpec.of("ViT-B-32"))).write(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert record.find(".") is not None and record.find("") is None


def test_a_model_of_sounds_is_refused():
    name = "CLAP-HTSAT-tiny"
    if name not in factory.list_models():
        pytest.skip("came with open_clip 4")
    with pytest.raises(InputError, match=naming(name, "--model")):
        ModelSpec.of(name)
