"""`flyp export --format onnx`: the file gives the classifier's logits in onnxruntime, and says how to preprocess."""

import json
import os

import numpy as np
import onnxruntime
import open_clip
import pytest
import torch
from PIL import Image

from flyp_plugin import onnx_export
from flyp_plugin.errors import InputError
from flyp_plugin.heads import ImageClassifier, zeroshot_as_learned
from flyp_plugin.learned import HEAD
from flyp_plugin.prompts import ClassPrompts
from tests.close import assert_close, assert_same_choices
from tests.helpers_eval import NAMES, TEMPLATES, checkpoint, digits, flyp, root
from tests.naming import naming

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


def test_numpy_preprocesses_from_the_metadata_of_the_file(tmp_path):
    export(
        "tiny-digits", tmp_path / "it.onnx", "--image-resize-mode", "squash", "--image-mean", 0.5, 0.4, 0.3
    )
    session = onnxruntime.InferenceSession(tmp_path / "it.onnx")
    about = session.get_modelmeta().custom_metadata_map
    assert about["model"] == "tiny-digits" and {"flyp_plugin", "open_clip"} <= set(about)
    mean, std, size, names = (json.loads(about[key]) for key in ("mean", "std", "size", "classnames"))
    assert (names, size, json.loads(about["resize_mode"])) == (NAMES, [32, 32], "squash")
    picture = digits()[0][0]
    image = picture.convert("RGB").resize(size[::-1], Image.Resampling.BICUBIC)
    pixels = (np.asarray(image, np.float32) / 255 - np.float32(mean)) / np.float32(std)
    logits = session.run(None, {"images": pixels.transpose(2, 0, 1)[None]})[0]
    flags = {"image_resize_mode": "squash", "image_mean": [0.5, 0.4, 0.3]}
    ours = ImageClassifier.from_checkpoint(
        "tiny-digits", checkpoint("tiny-digits", 80), ClassPrompts(NAMES, TEMPLATES), **flags
    )
    with torch.no_grad():
        assert_close(torch.from_numpy(logits), ours(ours.preprocess(picture)[None]))


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
