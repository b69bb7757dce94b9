import json
import os
import shutil

import numpy as np
import open_clip
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

from flyp_plugin.errors import InputError
from flyp_plugin.heads import ImageClassifier
from flyp_plugin.prompts import ClassPrompts
from tests.close import assert_close, assert_same_choices
from tests.helpers_eval import CONFIGS, NAMES, TEMPLATES, checkpoint, digits, flyp, root
from tests.naming import naming

STEPS = {"tiny-digits": 80, "tiny-digits-quickgelu": 20, "tiny-digits-timm": 3}


def export(name, out, form, *more):
    ours = [checkpoint(name, STEPS.get(name, 1)), "--model", name, "--data", root() / "data"]
    flyp("export", *ours, "--format", form, "--out", out, *more)


@pytest.mark.skipif(
    tuple(int(part) for part in timm.__version__.split(".")[:3]) < (1, 0, 26),
    reason="this timm reads safetensors of a folder only if torch.load does",
)
@pytest.mark.parametrize("name", list(STEPS))
def test_timm_reads_our_predictions_labels_and_pixels(name, tmp_path):
    export(name, tmp_path / "it", "timm")
    model = timm.create_model(f"local-dir:{tmp_path}/it", pretrained=True).eval()
    assert model.pretrained_cfg["label_names"] == NAMES and model.num_classes == 10
    ours = ImageClassifier.from_checkpoint(
        name, checkpoint(name, STEPS[name]), ClassPrompts(NAMES, TEMPLATES)
    ).eval()
    transform = create_transform(**resolve_model_data_config(model))
    pictures = digits()[0][1000:1300]
    pictures += [
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (70, 41 + i, 3), dtype="uint8"))
        for i in (1, 90)
    ]
    images = torch.stack([transform(picture) for picture in pictures])
    assert torch.equal(images, torch.stack([ours.preprocess(picture) for picture in pictures]))
    with torch.no_grad():
        logits, expected = model(images), ours.model.encode_image(images) @ ours.head
        our_logits = ours(images)
    assert_close(logits, expected)
    assert_same_choices(logits, our_logits)
    if name == "tiny-digits":
        assert len(our_logits.argmax(1).unique()) > 5


@pytest.mark.parametrize("name", [*STEPS, "tiny-digits-resnet"])
def test_open_clip_reads_the_same_features_to_the_last_bit(name, tmp_path):
    if not hasattr(open_clip.factory, "parse_model_name"):
        pytest.skip("local-dir: came with open_clip 3.0")
    export(name, tmp_path / "it", "open_clip")
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}/it")
    tokens = open_clip.get_tokenizer(f"local-dir:{tmp_path}/it")(NAMES)
    ours, _, our_preprocess = open_clip.create_model_and_transforms(
        name, str(checkpoint(name, STEPS.get(name, 1)))
    )
    images = torch.stack([preprocess(picture) for picture in digits()[0][:20]])
    assert torch.equal(images, torch.stack([our_preprocess(picture) for picture in digits()[0][:20]]))
    with torch.no_grad():
        assert torch.equal(model.eval().encode_image(images), ours.eval().encode_image(images))
        assert torch.equal(model.encode_text(tokens), ours.encode_text(tokens))


def test_preprocessing_flags_go_into_the_folder(tmp_path):
    flags = ["--image-mean", 0.5, 0.4, 0.3, "--image-std", 0.2, 0.2, 0.1, "--image-interpolation", "bilinear",
             "--image-resize-mode", "squash"]  # fmt: skip
    export("tiny-digits", tmp_path / "timm", "timm", *flags)
    export("tiny-digits", tmp_path / "open_clip", "open_clip", *flags)
    config = json.loads((tmp_path / "timm" / "config.json").read_text())["pretrained_cfg"]
    assert (config["mean"], config["crop_mode"], config["interpolation"]) == (
        [0.5, 0.4, 0.3],
        "squash",
        "bilinear",
    )
    config = json.loads((tmp_path / "open_clip" / "open_clip_config.json").read_text())["preprocess_cfg"]
    assert (config["std"], config["resize_mode"], config["interpolation"]) == (
        [0.2, 0.2, 0.1],
        "squash",
        "bilinear",
    )


def test_force_quick_gelu_goes_into_the_folder(tmp_path):
    export("tiny-digits", tmp_path / "it", "open_clip", "--force-quick-gelu")
    assert (
        json.loads((tmp_path / "it" / "open_clip_config.json").read_text())["model_cfg"]["quick_gelu"] is True
    )
    export("tiny-digits", tmp_path / "timm", "timm", "--force-quick-gelu")
    assert (
        json.loads((tmp_path / "timm" / "config.json").read_text())["model_args"]["act_layer"] == "quick_gelu"
    )


def test_the_classes_of_a_set_to_train_on_will_do(tmp_path):
    (tmp_path / "data").mkdir()
    shutil.copytree(root() / "data" / "test", tmp_path / "data" / "train")
    shutil.copy(root() / "data" / "classnames.txt", tmp_path / "data")
    argv = ["export", checkpoint("tiny-digits", 15), "--model", "tiny-digits", "--format", "timm"]
    flyp(*argv, "--data", tmp_path / "data", "--out", tmp_path / "it")
    assert json.loads((tmp_path / "it" / "config.json").read_text())["label_names"] == NAMES


def test_a_place_that_cannot_be_one_is_a_sentence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    argv = [
        "export",
        checkpoint("tiny-digits", 15),
        "--model",
        "tiny-digits",
        "--format",
        "open_clip",
        "--force",
    ]
    for out, match in (
        (".", naming("file", "export")),
        ("file/it", naming("file/it") + ".*(Not a dir|File exists)"),
    ):
        with pytest.raises(InputError, match=match):
            flyp(*argv, "--out", out)
    assert os.listdir(tmp_path) == ["file"]


def variant(**vision):
    name = "tiny-digits-" + "-".join(vision)
    config = {**CONFIGS["tiny-digits"], "vision_cfg": {**CONFIGS["tiny-digits"]["vision_cfg"], **vision}}
    (root() / "models" / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(root() / "models" / f"{name}.json")
    return name


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: "tiny-digits-resnet", "ModifiedResNet"),
        (lambda: variant(ls_init_value=0.1), "ls"),
        (lambda: variant(attentional_pool=True), "VisionTransformer"),
        (lambda: variant(pool_type="avg"), "options"),
        (lambda: variant(norm_kwargs={"eps": 0.5}), "options"),
    ],
)
def test_towers_without_a_timm_twin_are_refused(make, reason, tmp_path):
    with pytest.raises(InputError, match=f"(?=.*timm)(?=.*{reason})(?=.*--format open_clip)") as error:
        export(make(), tmp_path / "it", "timm")
    assert "\n" not in str(error.value) and not os.listdir(tmp_path)


def test_preprocessing_that_timm_has_not_is_refused(tmp_path):
    with pytest.raises(InputError, match=naming("longest", "--format open_clip")):
        export("tiny-digits", tmp_path / "it", "timm", "--image-resize-mode", "longest")


def test_a_folder_is_replaced_only_by_force_and_by_a_whole_one(tmp_path, monkeypatch):
    out = tmp_path / "it"
    export("tiny-digits", out, "timm")
    before = (out / "config.json").read_text()
    with pytest.raises(InputError, match="--force"):
        export("tiny-digits", out, "open_clip")

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("safetensors.torch.save_file", full)
        with pytest.raises(InputError, match="No space left on device"):
            export("tiny-digits", out, "open_clip", "--force")
    assert (out / "config.json").read_text() == before and os.listdir(tmp_path) == ["it"]
    export("tiny-digits", out, "open_clip", "--force")
    assert sorted(os.listdir(out)) == ["flyp.json", "open_clip_config.json", "open_clip_model.safetensors"]
    assert os.listdir(tmp_path) == ["it"]


def test_a_classifier_needs_classes(tmp_path):
    with pytest.raises(InputError, match=naming("--data", "--classnames")):
        flyp(
            "export",
            checkpoint("tiny-digits", 80),
            "--model",
            "tiny-digits",
            "--format",
            "timm",
            "--out",
            tmp_path / "a",
        )
