"""flyp.json: a run is one thing, and every command reads it as it was trained."""

import functools
import json
import re
import shutil

import numpy as np
import open_clip
import pytest
import timm
import torch
from open_clip import pretrained as registry
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

from flyp_plugin import ImageClassifier, commands, evaluate, record
from flyp_plugin.data import LabelledDataset
from flyp_plugin.errors import InputError
from flyp_plugin.sources import expand_source
from flyp_plugin.train import FlypRun, train
from tests import digits as digits_module
from tests.naming import naming, says

ODD = {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7), "interpolation": "bilinear", "resize_mode": "squash"}
QUICK = {"quick_gelu": True}
OPENAI = {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD, "interpolation": "bicubic",
          "resize_mode": "shortest"}  # fmt: skip
TAGS = {"odd": ODD, "quick": {**OPENAI, **QUICK}, "both": {**ODD, **QUICK}, "plain": OPENAI}


@pytest.fixture(scope="module", autouse=True)
def tags(start):
    """Tags of the digits' model, as open_clip's registry has them, whose weights are a local file."""
    registry._PRETRAINED["digits-vit"] = TAGS
    with pytest.MonkeyPatch.context() as patch:
        for place in (open_clip, open_clip.factory):
            patch.setattr(place, "download_pretrained", lambda *args, **kwargs: str(start))
        yield
    del registry._PRETRAINED["digits-vit"]


def flags(digits, folder, *more):
    return ["--model", "digits-vit", "--model-config", f"{digits}/digits-vit.json", "--train-data", str(digits),
            "--eval-data", f"val={digits}", "--logs", str(folder.parent), "--name", folder.name, "--device", "cpu",
            "--batch-size", "50", "--train-num-samples", "500", "--workers", "0", "--lr", "2e-3", "--warmup", "5", *more]  # fmt: skip


@pytest.fixture(scope="module")
def runs(digits, tmp_path_factory):
    """Runs of three epochs by tag, made when they are asked for; not to be changed."""
    folder, made = tmp_path_factory.mktemp("logs"), {}

    def run(tag):
        if tag not in made:
            made[tag] = folder / tag
            assert train(flags(digits, made[tag], "--pretrained", tag, "--epochs", "3")) == 0
        return made[tag]

    return run


@pytest.fixture
def run(runs, tmp_path):
    """A copy of the run of the tag 'both'."""
    return shutil.copytree(runs("both"), tmp_path / "run")


def flyp(*argv):
    commands.call([str(word) for word in argv])


def figures(folder):
    return [json.loads(line) for line in (folder / "checkpoints/results.jsonl").read_text().splitlines()]


def top1(capsys, *argv):
    capsys.readouterr()
    flyp("eval", *argv, "--json", "--workers", 0, "--device", "cpu")
    return next(iter(json.loads(capsys.readouterr().out)["results"].values()))["top1"]


def test_the_record_has_everything_as_resolved(runs, digits, start):
    content = json.loads((runs("both") / "flyp.json").read_text())
    assert list(content) == sorted(content) and content["format"] == record.FORMAT
    assert content["model"] == "digits-vit" and content["model_cfg"] == {
        **digits_module.MODEL,
        "quick_gelu": True,
    }
    preprocess = {name: list(value) if isinstance(value, tuple) else value for name, value in ODD.items()}
    assert preprocess.items() <= content["preprocess_cfg"].items() and content["preprocess_cfg"]["size"] == 16
    assert content["pretrained"] == {"given": "both", "sha256": None} and content["objective"] == "flyp"
    assert content["classnames"] == digits_module.NAMES and content["templates"] == digits_module.TEMPLATES
    assert content["eval_data"] == [f"val={digits}"] and content["precision"] == "fp32"
    assert content["keys"] == {"image_key": "jpg;jpeg;png;webp", "label_key": "cls", "group_key": None}
    assert content["training"]["lr"] == 2e-3 and content["training"]["ranks"] == 1
    assert content["versions"]["open_clip"] == open_clip.__version__


def test_it_is_written_before_the_first_step(digits, tmp_path, monkeypatch):
    def stop(*args, **kwargs):
        raise InterruptedError

    monkeypatch.setattr(FlypRun, "before_epoch", stop)
    with pytest.raises(InterruptedError):
        train(flags(digits, tmp_path / "run", "--pretrained", "odd", "--epochs", "1"))
    assert record.read(tmp_path / "run").spec.preprocess_cfg["mean"] == [0.1, 0.2, 0.3]


@pytest.mark.parametrize("tag", TAGS)
def test_one_figure_whoever_computes_it(runs, digits, tag, tmp_path, capsys):
    folder = runs(tag)
    # one of 797 images may be a tie: another size of batch, or number of threads, adds up in another order
    trained = pytest.approx(figures(folder)[-1]["val/top1"], abs=1.001 / 797)
    assert top1(capsys, folder, "--epoch", "last") == trained
    assert top1(capsys, folder / "checkpoints/epoch_3.pt", "--eval-data", f"other={digits}") == trained
    flyp("wiseft", folder, "--alphas", "0,0.5,1", "--out", tmp_path / "merged", "--save-all", "--workers", 0)
    sweep = json.loads((tmp_path / "merged/wiseft.json").read_text())["alphas"]
    assert sweep["1.00"]["val"]["top1"] == trained and sweep["0.00"]["val"]["top1"] == pytest.approx(
        figures(folder)[0]["val/top1"], abs=1.001 / 797
    )
    assert (
        top1(capsys, tmp_path / "merged/wise_ft_alpha=0.50.pt", "--eval-data", f"val={digits}")
        == (sweep["0.50"]["val"]["top1"])
    )
    classifier = ImageClassifier.from_run(folder / "checkpoints/epoch_3.pt")
    shards = expand_source(str(digits), "test")
    loader = LabelledDataset(shards, classifier.preprocess, 64, num_classes=10)
    assert evaluate(classifier, loader)["top1"] == trained
    flyp("export", folder, "--epoch", "3", "--format", "timm", "--out", tmp_path / "timm")
    model = timm.create_model(f"local-dir:{tmp_path}/timm", pretrained=True).eval()
    transform = create_transform(**resolve_model_data_config(model))
    assert evaluate(model, LabelledDataset(shards, transform, 64, num_classes=10))["top1"] == trained
    flyp("export", folder, "--epoch", "3", "--format", "open_clip", "--out", tmp_path / "clip")
    assert top1(capsys, tmp_path / "clip", "--eval-data", f"val={digits}") == trained
    assert record.find(tmp_path / "clip").spec == record.find(folder).spec


def test_flags_override_the_record_and_say_so(run, capsys, caplog):
    caplog.set_level("INFO")
    assert (
        top1(capsys, run) == pytest.approx(figures(run)[-1]["val/top1"], abs=1.001 / 797)
        and f"{run}/flyp.json" not in caplog.text
    )
    top1(capsys, run, "--image-mean", 0.5, 0.5, 0.5, "--image-resize-mode", "longest")
    changed = ("mean 0.5 0.5 0.5", "0.1 0.2 0.3", "resize_mode longest", "squash")
    assert says(caplog.text, f"{run}/flyp.json", *changed)
    flyp("wiseft", run, "--alpha", 0.5, "--image-mean", 0.5, 0.5, 0.5)
    assert record.read(run / "wiseft").spec.preprocess_cfg["mean"] == [0.5, 0.5, 0.5]


def test_a_changed_configuration_is_not_read_instead(run, digits, tmp_path, capsys):
    """open_clip's registry may have another model of that name, or none."""
    config = {**digits_module.MODEL, "vision_cfg": {**digits_module.MODEL["vision_cfg"], "head_width": 32}}
    (tmp_path / "digits-vit.json").write_text(json.dumps(config))
    try:
        assert top1(capsys, run, "--model-config", tmp_path / "digits-vit.json") == pytest.approx(
            figures(run)[-1]["val/top1"], abs=1.001 / 797
        )
        with pytest.raises(
            InputError, match=naming("digits-vit", "head_width", "32", "16", "--model-config")
        ):
            resume = [
                "--resume",
                "latest",
                "--epochs",
                "4",
                "--model-config",
                str(tmp_path / "digits-vit.json"),
            ]
            train(flags(digits, run, *resume))
    finally:
        open_clip.add_model_config(digits / "digits-vit.json")


def test_epochs_are_chosen_by_name_or_by_the_first_set(run, capsys, caplog):
    caplog.set_level("INFO")
    rows = figures(run)
    rows[0]["val/top1"], rows[2]["val/top1"], rows[1]["val/loss"] = 1.0, 0.999, 0.0
    (run / "checkpoints/results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    expected = {"best": "epoch_2", "loss": "epoch_1", "last": "epoch_3", "1": "epoch_1", None: "epoch_3"}
    for epoch, path in expected.items():
        caplog.clear()
        top1(capsys, run, *(["--epoch", epoch] if epoch else []))
        assert says(caplog.text, run, f"checkpoints/{path}.pt")
        assert says(caplog.text, "val", "zero-shot", "epoch 2", "1.0000", "0.9990") == (epoch == "best")
    (run / "checkpoints/epoch_2.pt").unlink()
    for command in (["wiseft"], ["export", "--format", "timm", "--out", str(run / "out")]):
        with pytest.raises(InputError, match=naming("epoch 2", "val", "1, 3")):
            flyp(*command, run, "--epoch", "best")
    with pytest.raises(InputError, match=naming("epoch 9", "1, 3")):
        flyp("eval", run, "--epoch", 9)
    with pytest.raises(InputError, match=naming("--epoch", "first", "best", "last")):
        flyp("eval", run, "--epoch", "first")
    with pytest.raises(InputError, match=naming("--epoch", "epoch_3.pt")):
        flyp("eval", run / "checkpoints/epoch_3.pt", "--epoch", "last")


def test_merged_weights_come_first_and_stale_ones_are_told_of(run, capsys, caplog):
    caplog.set_level("INFO")
    flyp("wiseft", run, "--alphas", "0,0.5")
    chosen = json.loads((run / "wiseft/wiseft.json").read_text())
    merged = f"wiseft/wise_ft_alpha={chosen['chosen_alpha']:.2f}.pt"
    assert top1(capsys, run) == chosen["alphas"][f"{chosen['chosen_alpha']:.2f}"]["val"]["top1"]
    assert says(caplog.text, run, merged) and "--epoch last" not in caplog.text
    flyp("export", run, "--format", "timm", "--out", run / "classifier")
    assert says(caplog.text, run, merged)
    assert ImageClassifier.from_run(run).head.shape == (64, 10)
    shutil.copy(run / "checkpoints/epoch_3.pt", run / "checkpoints/epoch_4.pt")
    top1(capsys, run)
    assert says(caplog.text, run, merged, f"flyp wiseft {run} --force", "--epoch last")


def test_resuming_keeps_what_the_weights_mean(run, digits, caplog):
    train(flags(digits, run, "--epochs", "4", "--resume", "latest"))  # without --pretrained both
    known = record.read(run)
    assert known.spec.quick_gelu and known.spec.preprocess_cfg["std"] == [0.5, 0.6, 0.7]
    assert known.pretrained == "both" and figures(run)[-1]["epoch"] == 4
    assert says((run / "out.log").read_text(), "--epochs 4 (3)")
    for other, named in ((["--image-mean", "0", "0", "0"], ("mean 0 0 0", "0.1 0.2 0.3")),
                         (["--force-image-size", "24"], ("vision_cfg.image_size 24", "16"))):  # fmt: skip
        with pytest.raises(InputError, match=naming(run, *named)):
            train(flags(digits, run, "--epochs", "5", "--resume", "latest", *other))


def test_training_goes_on_from_a_run_as_it_was_trained(run, digits, tmp_path, caplog):
    checkpoint = str(run / "checkpoints/epoch_3.pt")
    train(flags(digits, tmp_path / "second", "--pretrained", checkpoint, "--epochs", "1"))
    second = record.read(tmp_path / "second")
    assert second.spec == record.read(run).spec and len(second.get("pretrained")["sha256"]) == 64
    assert figures(tmp_path / "second")[0]["val/top1"] == pytest.approx(
        figures(run)[-1]["val/top1"], abs=1.001 / 797
    )


def test_a_start_that_changed_or_is_gone_is_a_sentence(run, digits, tmp_path):
    checkpoint = shutil.copy(run / "checkpoints/epoch_3.pt", tmp_path / "start.pt")
    train(flags(digits, tmp_path / "second", "--pretrained", str(checkpoint), "--epochs", "1"))
    shutil.copy(run / "checkpoints/epoch_1.pt", checkpoint)
    with pytest.raises(InputError, match=naming("start.pt", "second", "SHA-256")):
        flyp("wiseft", tmp_path / "second", "--alpha", 0.5)
    checkpoint.unlink()
    with pytest.raises(InputError, match="^(?!.*SHA-256)" + naming("start.pt", "second")[4:]):
        flyp("wiseft", tmp_path / "second", "--alpha", 0.5)
    assert not (tmp_path / "second/wiseft").exists()


def test_runs_of_models_that_differ_are_not_merged(runs, tmp_path):
    with pytest.raises(InputError, match=naming("QuickGELU", "GELU")):
        flyp("wiseft", "--average", runs("odd"), runs("both"), "--alpha", 1, "--out", tmp_path / "out")
    with pytest.raises(InputError, match=naming(runs("odd"), runs("plain"))):
        pretrained = runs("plain") / "checkpoints/epoch_1.pt"
        flyp("wiseft", runs("odd"), "--pretrained", pretrained, "--alpha", 1, "--out", tmp_path / "out")


def test_of_loose_weights_the_assumption_is_told(run, digits, tmp_path, capsys, caplog):
    loose = shutil.copy(run / "checkpoints/epoch_3.pt", tmp_path / "loose.pt")
    model = ["--model", "digits-vit", "--eval-data", f"val={digits}"]
    with pytest.raises(InputError, match=naming("flyp.json", "loose.pt", "--model")):
        flyp("eval", loose, "--eval-data", f"val={digits}")
    wrong = top1(capsys, loose, *model)
    assert says(caplog.text, "loose.pt", "flyp.json", "digits-vit", "GELU")
    assert "quick, both (QuickGELU: --force-quick-gelu)" in caplog.text
    assert re.search(r"odd, both \([^)]*--image-mean", caplog.text)
    caplog.clear()
    every = ["--image-mean", *ODD["mean"], "--image-std", *ODD["std"], "--image-interpolation", "bilinear"]
    right = top1(capsys, loose, *model, *every, "--image-resize-mode", "squash", "--force-quick-gelu")
    assert right == pytest.approx(figures(run)[-1]["val/top1"], abs=1.001 / 797) != wrong and not says(
        caplog.text, "loose.pt", "flyp.json"
    )


def test_where_open_clip_alone_would_misread_it_is_told(runs):
    said = "flyp export --format open_clip"
    assert [said in (runs(tag) / "out.log").read_text() for tag in TAGS] == [True, True, True, False]


def test_a_path_that_is_nothing_is_a_sentence(tmp_path):
    with pytest.raises(InputError, match=naming(tmp_path / "bird", "--model")):
        flyp("eval", tmp_path / "bird")


def test_contradicting_a_tag_is_refused_everywhere(digits, tmp_path):
    quick = ["--model", "digits-vit", "--force-quick-gelu"]
    finetuned = tmp_path / "x.pt"
    finetuned.touch()
    for command in (
        ["eval", "odd", *quick, "--eval-data", f"val={digits}"],
        [
            "wiseft",
            *quick,
            "--pretrained",
            "odd",
            "--finetuned",
            finetuned,
            "--alpha",
            1,
            "--out",
            tmp_path / "out",
        ],
        ["export", "odd", *quick, "--format", "open_clip", "--out", tmp_path / "out"],
        ["train", *flags(digits, tmp_path / "run", "--pretrained", "odd", "--force-quick-gelu")],
    ):
        with pytest.raises(InputError, match=naming("odd", "digits-vit", "GELU", "--force-quick-gelu")):
            flyp(*command)
    assert list(tmp_path.iterdir()) == [finetuned]


def test_a_teacher_has_its_tags_activation(digits, tmp_path, monkeypatch):
    made = []
    original = open_clip.create_model_and_transforms

    @functools.wraps(original)  # the names of parameters are checked
    def create(*args, **kwargs):
        made.append(original(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr("open_clip_train.main.create_model_and_transforms", create)
    teacher = ["--distill-model", "digits-vit", "--distill-pretrained", "quick"]
    train(flags(digits, tmp_path / "run", "--pretrained", "plain", "--epochs", "1", *teacher))
    quick = [any(type(m).__name__ == "QuickGELU" for m in model.modules()) for model, *_ in made]
    assert quick == [False, True]


def test_a_record_that_cannot_be_read_is_a_sentence(run, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=naming(tmp_path / "empty", "flyp.json")):
        flyp("eval", tmp_path / "empty")
    with pytest.raises(InputError, match=naming(tmp_path / "empty", "flyp.json")):
        ImageClassifier.from_run(tmp_path / "empty")
    content = json.loads((run / "flyp.json").read_text())
    neither = "(?!.*(Expecting|format))"
    for text, what in (("{", ".*Expecting"), ("[1]", neither), ("{}", neither),
                       (json.dumps({**content, "format": 2}), ".*format 2.*1")):  # fmt: skip
        (run / "flyp.json").write_text(text)
        with pytest.raises(InputError, match=rf"flyp\.json{what}") as error:
            flyp("eval", run)
        assert "\n" not in str(error.value)


def test_a_set_without_lists_takes_those_given_in_training(digits, start, tmp_path, capsys):
    bare = tmp_path / "bare"
    shutil.copytree(digits / "test", bare / "test")
    lists = ["--classnames", str(digits / "classnames.txt"), "--templates", "zebra {c} {c} lamp"]
    more = ["--eval-data", f"bare={bare}", "--pretrained", str(start), "--epochs", "1", *lists]
    train(flags(digits, tmp_path / "run", *more))
    flyp("eval", tmp_path / "run", "--json", "--workers", 0)
    results = json.loads(capsys.readouterr().out)["results"]
    row = figures(tmp_path / "run")[-1]
    assert {name: metrics["top1"] for name, metrics in results.items()} == (
        {"val": row["val/top1"], "bare": row["bare/top1"]}
    )
    assert results["val"] != results["bare"]


def test_the_classifier_of_a_run_predicts(runs):
    classifier = ImageClassifier.from_run(runs("both"), epoch="last")
    name, probability = classifier.predict([Image.fromarray(np.zeros((20, 20, 3), "uint8"))])[0]
    assert name in digits_module.NAMES and 0 < probability <= 1
    assert isinstance(classifier.head, torch.Tensor)
