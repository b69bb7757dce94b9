"""`flyp export --format onnx`: the file gives the classifier's logits in onnxruntime, and says how to preprocess."""

import json
import os
import shutil
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from textwrap import dedent
from types import SimpleNamespace

import numpy as np
import onnxruntime
import open_clip
import pytest
import timm
import torch
from PIL import Image

from flyp_plugin import onnx_export
from flyp_plugin.errors import InputError
from flyp_plugin.heads import ImageClassifier, zeroshot_as_learned
from flyp_plugin.learned import HEAD
from flyp_plugin.prompts import ClassPrompts
from flyp_plugin.train import train
from tests.close import assert_close, assert_same_choices
from tests.faults import kills
from tests.helpers_eval import NAMES, TEMPLATES, checkpoint, digits, flyp, root
from tests.naming import naming
from tests.pages import README

STEPS = {"tiny-digits": 80, "tiny-digits-resnet": 1, "tiny-digits-timm": 3}


def export(name, out, *more, weights=None):
    weights = weights or checkpoint(name, STEPS[name])
    flyp(
        "export", weights, "--model", name, "--data", root() / "data", "--format", "onnx", "--out", out, *more
    )


def run(path, images):
    return torch.from_numpy(onnxruntime.InferenceSession(path).run(None, {"images": images.numpy()})[0])


def assert_equal_to(ours, path, n):
    images = torch.stack([ours.preprocess(picture) for picture in digits()[0][1000 : 1000 + n]])
    with torch.no_grad():
        expected = ours(images)
    for size in (n, 1, 7):
        logits = run(path, images[:size])
        assert_close(logits, expected[:size])
        assert_same_choices(logits, expected[:size])
    return expected


@pytest.mark.parametrize("name", list(STEPS))
def test_onnxruntime_gives_the_classifiers_logits(name, tmp_path, capfd):
    export(name, tmp_path / "it.onnx")
    assert "Skipping" not in "".join(capfd.readouterr()) and os.listdir(tmp_path) == ["it.onnx"]
    prompts = ClassPrompts(NAMES, TEMPLATES)
    ours = ImageClassifier.from_checkpoint(name, checkpoint(name, STEPS[name]), prompts)
    assert_equal_to(ours, tmp_path / "it.onnx", 60)


def test_a_learned_head_goes_into_the_onnx_file(tmp_path):
    prompts, path = ClassPrompts(NAMES, TEMPLATES), checkpoint("tiny-digits", 80)
    ours = ImageClassifier.from_checkpoint("tiny-digits", path, prompts)
    head = zeroshot_as_learned(ours.model, open_clip.get_tokenizer("tiny-digits"), prompts)
    head.weight.data += torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(0))
    setattr(ours.model, HEAD, head)
    torch.save({"state_dict": ours.model.state_dict()}, tmp_path / "learned.pt")
    export("tiny-digits", tmp_path / "it.onnx", weights=tmp_path / "learned.pt")
    again = ImageClassifier.from_checkpoint("tiny-digits", tmp_path / "learned.pt", prompts)
    assert_close(again.head.T * again.model.logit_scale.exp(), head.weight)
    assert_equal_to(again, tmp_path / "it.onnx", 20)


@pytest.mark.parametrize("mode", ["shortest", "squash"])
@pytest.mark.parametrize("size", [(41, 67), (50, 33), (20, 31)])
def test_readmes_lines_preprocess_by_the_metadata(mode, size, tmp_path, monkeypatch):
    flags = {"image_resize_mode": mode, "image_mean": [0.5, 0.4, 0.3]}
    ours = ImageClassifier.from_checkpoint(
        "tiny-digits", checkpoint("tiny-digits", 80), ClassPrompts(NAMES, TEMPLATES), **flags
    )
    monkeypatch.chdir(tmp_path)
    onnx_export.write_onnx(ours, "tiny-digits", tmp_path / "birds.onnx")
    noise = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(noise).save("bird.jpg", quality=95)
    lines = dedent(README.partition("<!-- onnx -->\n")[2].partition("\n\n")[0])
    scope = {}
    exec(lines, scope)
    with torch.no_grad():
        expected = ours(ours.preprocess(Image.open("bird.jpg"))[None])
    assert_close(torch.from_numpy(scope["logits"]), expected)
    assert (scope["about"]["model"], scope["names"]) == ("tiny-digits", NAMES)


def test_a_run_folder_needs_no_other_flags(digits, tmp_path):
    assert train([*kills.flags(digits, tmp_path / "run"), "--epochs", "1", "--workers", "0"]) == 0
    flyp("export", tmp_path / "run", "--format", "onnx", "--out", tmp_path / "it.onnx")
    assert_equal_to(ImageClassifier.from_run(tmp_path / "run"), tmp_path / "it.onnx", 60)


def test_another_prediction_is_refused_unless_it_is_a_tie(tmp_path, monkeypatch):
    ours = ImageClassifier.from_checkpoint(
        "tiny-digits",
        checkpoint("tiny-digits", 80),
        ClassPrompts(NAMES, TEMPLATES),
        image_interpolation="random",
    )
    [path] = onnx_export.write_onnx(ours, "tiny-digits", tmp_path / "it.onnx")
    about = onnxruntime.InferenceSession(path).get_modelmeta().custom_metadata_map
    assert json.loads(about["interpolation"]) == "bicubic"  # "random" is of training
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    logits = run(path, images)
    (first, second), (i, j) = (part.tolist() for part in logits[0].topk(2))
    expected, gap = logits.clone(), first - second
    expected[0, i] -= 2 * gap
    expected[0, j] += 2 * gap  # now the best, by three gaps
    for share, refused in ((1.5, "logits"), (2.5, "classes"), (3.5, None)):
        monkeypatch.setattr(onnx_export, "_SHARE", share * gap / expected.abs().max().item())
        with pytest.raises(InputError, match=naming(refused)) if refused else nullcontext():
            onnx_export._check_equal(ours, images, expected, path)


@pytest.mark.parametrize(
    "flags", [{"image_resize_mode": "longest"}, {"force_image_size": (32, 64)}], ids=["longest", "oblong"]
)
def test_readmes_lines_refuse_what_they_cannot_preprocess(flags, tmp_path, monkeypatch):
    ours = ImageClassifier.from_checkpoint(
        "tiny-digits", checkpoint("tiny-digits", 80), ClassPrompts(NAMES, TEMPLATES), **flags
    )
    monkeypatch.chdir(tmp_path)
    onnx_export.write_onnx(ours, "tiny-digits", tmp_path / "birds.onnx")
    digits()[0][0].save("bird.jpg")
    with pytest.raises(AssertionError, match=naming("open_clip")):
        exec(dedent(README.partition("<!-- onnx -->\n")[2].partition("\n\n")[0]), {})


def test_exported_folders_go_to_a_hub_as_readme_says(tmp_path, monkeypatch):
    """Up to the upload: what would be uploaded loads back and computes the same."""
    monkeypatch.chdir(tmp_path)
    weights = ["export", checkpoint("tiny-digits", 80), "--model", "tiny-digits", "--data", root() / "data"]
    flyp(*weights, "--format", "open_clip", "--out", "clip")
    flyp(*weights, "--format", "timm", "--out", "classifier")
    hub, uploaded = sys.modules["open_clip.push_to_hf_hub"], {}

    def upload(repo_id, folder_path, **kwargs):
        uploaded[repo_id] = shutil.copytree(folder_path, tmp_path / repo_id)

    class Tokenizer:  # open_clip downloads one of Hugging Face's in its place
        def __init__(self, name):
            pass

        def save_pretrained(self, folder):
            pass

    replaced = {"create_repo": lambda *_, **__: "https://huggingface.co/me/clip", "upload_folder": upload}
    replaced |= {"list_repo_files": lambda repo: [], "get_hf_file_metadata": lambda url: None}
    replaced |= {
        "repo_type_and_id_from_hf_id": lambda url: (None, "me", "clip")
    }  # missing from huggingface_hub 2, and
    replaced |= {"hf_hub_url": lambda **_: "", "EntryNotFoundError": OSError, "HFTokenizer": Tokenizer}
    for name, stub in replaced.items():  # then open_clip has none of these
        monkeypatch.setattr(hub, name, stub, raising=False)
    api = timm.models._hub.HfApi
    monkeypatch.setattr(api, "create_repo", lambda *_, **__: SimpleNamespace(repo_id="me/birds"))
    monkeypatch.setattr(api, "file_exists", lambda *_, **__: False)
    monkeypatch.setattr(api, "upload_folder", lambda self, **kwargs: upload(**kwargs))
    exec(
        dedent(README.partition("<!-- hub -->\n")[2].partition("\n\n")[0]),
        {"json": json, "open_clip": open_clip, "timm": timm},
    )
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for one, other in (("clip", "me/clip"), ("classifier", "me/birds")):
            load = open_clip.create_model if one == "clip" else partial(timm.create_model, pretrained=True)
            a, b = (load(f"local-dir:{folder}").eval() for folder in (one, other))
            same = [m.encode_image(images) if one == "clip" else m(images) for m in (a, b)]
            assert torch.equal(*same)
    config = json.loads(Path("me/birds/config.json").read_text())
    assert (
        config["label_names"] == NAMES
        and config["pretrained_cfg"]["mean"]
        == json.loads(Path("classifier/config.json").read_text())["pretrained_cfg"]["mean"]
    )


def test_an_onnx_file_replaces_only_one_and_by_force(tmp_path, monkeypatch):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "empty").touch()
    for out, match in (
        ("notes.txt", naming("notes.txt", "ONNX")),
        ("empty", naming("empty", "ONNX")),
        (".", naming("folder", "--out")),
        ("new/", naming("folder", "--out")),
    ):
        with pytest.raises(InputError, match=match):
            export("tiny-digits", f"{tmp_path}/{out}", "--force")
    export("tiny-digits", tmp_path / "it.onnx")
    before = (tmp_path / "it.onnx").read_bytes()
    with pytest.raises(InputError, match="--force"):
        export("tiny-digits", tmp_path / "it.onnx")
    monkeypatch.setattr(onnx_export, "_SHARE", 0)
    with pytest.raises(InputError, match=naming("logits", "--format timm")):
        export("tiny-digits", tmp_path / "it.onnx", "--force")
    assert (tmp_path / "it.onnx").read_bytes() == before
    monkeypatch.undo()
    export("tiny-digits", tmp_path / "it.onnx", "--force")
    assert sorted(os.listdir(tmp_path)) == ["empty", "it.onnx", "notes.txt"]


def test_weights_too_large_for_one_file_go_beside_it(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_export, "MAX_BYTES", 1000)
    export("tiny-digits", tmp_path / "it.onnx")
    assert sorted(os.listdir(tmp_path)) == ["it.onnx", "it.onnx.data"]
    ours = ImageClassifier.from_checkpoint(
        "tiny-digits", checkpoint("tiny-digits", 80), ClassPrompts(NAMES, TEMPLATES)
    )
    assert_equal_to(ours, tmp_path / "it.onnx", 10)
    monkeypatch.undo()
    export("tiny-digits", tmp_path / "it.onnx", "--force")
    assert os.listdir(tmp_path) == ["it.onnx"]
    (tmp_path / "it.onnx.data").write_text("mine")  # of which the file knows nothing
    export("tiny-digits", tmp_path / "it.onnx", "--force")
    assert (tmp_path / "it.onnx.data").read_text() == "mine"
