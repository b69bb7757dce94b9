"""What is found in a run's folder: nothing of it is written over, and a run goes on as the one that it was."""

import json
import os
import re
import shlex
import shutil

import pytest
import torch

from flyp_plugin import commands, record
from flyp_plugin.errors import InputError
from flyp_plugin.train import train
from tests.faults import kills
from tests.naming import naming, says


@pytest.fixture(scope="module")
def once(digits, tmp_path_factory):
    """The folder of a run of an epoch, with a checkpoint and figures."""
    folder = tmp_path_factory.mktemp("logs") / "run"
    assert train([*kills.flags(digits, folder), "--epochs", "1"]) == 0
    return folder


@pytest.fixture
def again(digits, once, tmp_path):
    """Start the run again, in a copy of its folder; returns the folder and what out.log has got."""
    folder = tmp_path / "run"
    shutil.copytree(once, folder)

    def again(*flags):
        before = (folder / "out.log").read_text() if (folder / "out.log").exists() else ""
        assert train([*kills.flags(digits, folder), "--epochs", "1", *flags]) == 0
        return (folder / "out.log").read_text()[len(before) :]

    again.folder = folder
    return again


def content(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_used_folder_is_refused_even_without_its_log(again):
    folder = again.folder
    for gone in (None, "out.log", "params.txt", "checkpoints/epoch_1.pt"):
        if gone:
            (folder / gone).unlink()
        before = content(folder)
        with pytest.raises(InputError, match=naming(folder, "--name", "--resume latest")):
            again()
        assert content(folder) == before


def test_a_resumed_run_says_where_it_starts_and_keeps_figures(again):
    figures = again.folder / "checkpoints" / "results.jsonl"
    rows = figures.read_text()
    assert says(again("--resume", "latest"), again.folder, "finished", "--epochs")
    assert figures.read_text() == rows
    (again.folder / "checkpoints" / "epoch_1.pt").unlink()
    said = again("--resume", "latest")
    assert says(said, "No latest resume checkpoint", again.folder)  # open_clip's
    assert says(said, figures.with_name("results.1.jsonl"))
    assert figures.with_name("results.1.jsonl").read_text() == rows


def test_a_run_resumes_from_its_own_checkpoints_alone(again, digits):
    """open_clip takes the last .pt by name, whatever it is."""
    folder = again.folder / "checkpoints"
    model = ["--model", "digits-vit", "--model-config", f"{digits}/digits-vit.json", "--alpha", "0.5"]
    ends = ["--pretrained", f"{folder}/epoch_1.pt", "--finetuned", f"{folder}/epoch_1.pt"]
    with pytest.raises(InputError, match=naming(folder, "checkpoints", "--out")):
        commands.call(["wiseft", *model, *ends, "--out", str(folder)])
    (folder / "epoch_1.pt").rename(folder / "my_best.pt")
    with pytest.raises(InputError, match=naming("my_best.pt", "--resume latest")):
        again("--resume", "latest")
    (folder / "my_best.pt").rename(folder / "epoch_1.pt")
    assert says(again("--resume", "latest"), "finished")


@pytest.mark.parametrize(
    ("epochs", "newest"),
    [
        ({}, None),
        ({"latest": 3}, "epoch_latest.pt"),
        ({"latest": 2, "5": 5}, "epoch_5.pt"),
        ({"latest": 7, "5": 5}, "epoch_latest.pt"),
        ({"latest": 5, "5": 5}, "epoch_latest.pt"),
        ({"9": 9, "10": 10}, "epoch_10.pt"),
        ({"latest": 6, "9": 9, "10": 10}, "epoch_10.pt"),
    ],
)
def test_the_newest_checkpoint_is_that_of_the_most_epochs(tmp_path, epochs, newest):
    (tmp_path / "checkpoints").mkdir()
    for name, epoch in epochs.items():
        torch.save({"epoch": epoch}, tmp_path / "checkpoints" / f"epoch_{name}.pt")
    found = record.newest_checkpoint(tmp_path)
    assert (found and found.name) == newest
    parts = tmp_path / "checkpoints" / "epoch_11"  # open_clip 4's, of --fsdp-checkpoint sharded
    parts.mkdir()
    torch.save({"epoch": 11}, parts / "_metadata_extra.pt")
    assert record.newest_checkpoint(tmp_path) == parts
    torch.save({"state_dict": {}}, tmp_path / "checkpoints" / "epoch_12.pt")
    with pytest.raises(InputError, match=naming("epoch_12.pt", "--resume latest")):
        record.newest_checkpoint(tmp_path)


def test_a_stale_epoch_latest_does_not_win_over_newer_epochs(again):
    checkpoints = again.folder / "checkpoints"
    shutil.copy(checkpoints / "epoch_1.pt", checkpoints / "epoch_latest.pt")
    assert "epoch_latest.pt' (epoch 1)" in again("--resume", "latest", "--epochs", "2")
    before = (checkpoints / "epoch_2.pt").read_bytes()
    said = again("--resume", "latest", "--epochs", "3", "--save-most-recent")
    assert says(said, "newest", f"{checkpoints}/epoch_2.pt")
    assert "epoch_2.pt' (epoch 2)" in said and (checkpoints / "epoch_2.pt").read_bytes() == before
    rows = (checkpoints / "results.jsonl").read_text().splitlines()
    assert [json.loads(row)["epoch"] for row in rows] == [0, 1, 2, 3]
    (checkpoints / "epoch_latest.pt").unlink()  # without which open_clip would start from the beginning
    said = again("--resume", "latest", "--epochs", "3", "--save-most-recent", "--delete-previous-checkpoint")
    assert says(said, "finished", "3")
    assert sorted(path.name for path in checkpoints.glob("*.pt")) == [
        "epoch_1.pt",
        "epoch_2.pt",
        "epoch_3.pt",
    ]


def test_other_settings_are_named_and_another_model_is_refused(again):
    before = content(again.folder)
    folder = again.folder
    for flag, value, was in (("--objective", "ce", "flyp"), ("--model", "ViT-S-32", "digits-vit")):
        with pytest.raises(InputError, match=naming(folder, f"{flag} {was}", value)):
            again("--resume", "latest", flag, value)
    kept = {path: text for path, text in content(again.folder).items() if path.name != "out.log"}
    assert kept == {path: text for path, text in before.items() if path.name != "out.log"}
    said = again("--resume", "latest", "--epochs", "2", "--seed", "7", "--log-every-n-steps", "3")
    kept = again.folder / "flyp.1.json"
    assert (
        says(said, kept, "--epochs 2 (1)", "--seed 7 (0)")
        and json.loads(kept.read_text())["training"]["seed"] == 0
    )
    said = again("--resume", "latest", "--epochs", "2", "--seed", "7", "--workers", "0")  # is finished
    assert "--workers 0 (" not in said
    said = again("--resume", "latest", "--epochs", "3", "--seed", "7", "--workers", "0")
    assert says(said, "--epochs 3 (2)", "--workers 0 (2)") and says(
        said, "batches", "weights", "uninterrupted"
    )


def test_a_run_of_an_open_clip_on_the_other_side_of_4_is_not_resumed(again):
    path = again.folder / record.FILE
    content = json.loads(path.read_text())
    here = content["versions"]["open_clip"]
    content["versions"]["open_clip"] = other = "3.3.0" if here.startswith("4") else "4.2.0"
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=naming("run", other, here, "--pretrained")):
        again("--resume", "latest")


def test_a_checkpoint_that_cannot_be_resumed_from_is_a_sentence(digits, once, start, tmp_path):
    flags = kills.flags(digits, tmp_path / "run")
    trained = str(once / "checkpoints" / "epoch_1.pt")
    for resume, more, match in (
        (str(tmp_path / "none.pt"), [], naming(tmp_path / "none.pt")),
        (
            trained,
            ["--force-context-length", "30"],
            naming("text_cfg.context_length 30", "77"),
        ),
    ):
        with pytest.raises(InputError, match=match) as error:
            train([*flags, *more, "--resume", resume])
        assert "\n" not in str(error.value) and not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="parameter group"):  # torch's own
        train([*flags, "--lock-image", "--resume", trained])
    assert not (tmp_path / "run").exists()
    assert train([*flags, "--epochs", "2", "--resume", trained]) == 0


def test_a_start_that_fails_leaves_its_name_free(digits, tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(AssertionError, match="LayerNorm"):  # open_clip's
        train([*kills.flags(digits, folder), "--lock-text"])
    assert os.listdir(tmp_path) == []
    folder.mkdir()
    (folder / "params.txt").write_text("of a run that lost its log")
    with pytest.raises(InputError, match=naming(folder, "--name", "--resume latest")):
        train(kills.flags(digits, folder))
    with pytest.raises(AssertionError, match="LayerNorm"):
        train([*kills.flags(digits, folder), "--resume", "latest", "--lock-text"])
    assert (folder / "params.txt").read_text() == "of a run that lost its log"
    shutil.rmtree(folder)
    assert train([*kills.flags(digits, folder), "--epochs", "1"]) == 0


def test_training_that_diverges_stops_before_it_is_saved(digits, tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(InputError, match=naming("epoch 1", "diverged", "--lr", "1e+30")):
        train([*kills.flags(digits, folder), "--lr", "1e30"])
    rows = [json.loads(line) for line in (folder / "checkpoints/results.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [0] and not list(folder.glob("checkpoints/*.pt"))


def test_random_weights_are_told_of_at_the_start_and_at_the_end(digits, tmp_path):
    folder = tmp_path / "run"
    train([*kills.flags(digits, folder), "--epochs", "1", "--pretrained", ""])
    lines = (folder / "out.log").read_text().splitlines()
    assert sum(says(line, "--pretrained", "random") for line in lines) == 2


def test_a_run_of_another_size_needs_only_its_size_flags(digits, start, tmp_path):
    folder = tmp_path / "run"
    flags = [*kills.flags(digits, folder), "--epochs", "1", "--eval-data", f"val={digits}"]
    size = ["--force-image-size", "24", "--force-context-length", "40"]
    assert train([*flags, "--pretrained", str(start), *size]) == 0
    log = (folder / "out.log").read_text()
    command = shlex.split(re.findall(r"flyp (wiseft [^`\n]+)", log)[-1])
    assert command == ["wiseft", str(folder)]
    commands.call([*command, "--alphas", "0,1"])
    last = json.loads((folder / "wiseft/wiseft.json").read_text())["alphas"]["1.00"]["val"]
    trained = json.loads((folder / "checkpoints/results.jsonl").read_text().splitlines()[-1])
    # but for a tie, which may fall otherwise in batches of another size
    assert abs(last["top1"] - trained["val/top1"]) <= 1.001 / last["n"]
    assert abs(last["macro_f1"] - trained["val/macro_f1"]) <= 2.002 / last["n"]

    checkpoint = str(folder / "checkpoints" / "epoch_1.pt")
    for form in ("timm", "open_clip"):
        commands.call(["export", checkpoint, "--format", form, "--out", str(tmp_path / f"of-run-{form}")])
    loose = str(shutil.copy(checkpoint, tmp_path / "loose.pt"))
    model = ["--model", "digits-vit", "--model-config", f"{digits}/digits-vit.json", "--device", "cpu"]
    for some, missing in ((size[:2], "context-length"), (size[2:], "image-size")):
        with pytest.raises(InputError, match=naming(loose, f"--force-{missing}")):
            commands.call(["eval", loose, *model, *some, "--eval-data", f"val={digits}"])
    for form in ("timm", "open_clip"):
        more = ["--data", str(digits)] if form == "timm" else []
        commands.call(
            ["export", loose, *model, *size, *more, "--format", form, "--out", str(tmp_path / form)]
        )
        assert (tmp_path / form / "config.json").exists() == (form == "timm")
    for before in ("", "of-run-"):
        config = json.loads((tmp_path / f"{before}open_clip/open_clip_config.json").read_text())["model_cfg"]
        assert config["vision_cfg"]["image_size"] == 24 and config["text_cfg"]["context_length"] == 40
        assert (
            json.loads((tmp_path / f"{before}timm/config.json").read_text())["model_args"]["img_size"] == 24
        )


def test_weights_that_are_nan_are_refused_by_every_command(digits, start, tmp_path):
    bad = tmp_path / "bad.pt"
    weights = torch.load(start)
    weights["visual.conv1.weight"][0] = float("nan")
    torch.save(weights, bad)
    model = ["--model", "digits-vit", "--model-config", f"{digits}/digits-vit.json"]
    val = ["--eval-data", f"val={digits}"]
    merge = ["wiseft", *model, "--alpha", "0.5", "--out", str(tmp_path / "out")]
    for words in (
        ["eval", str(bad), *model, *val],
        [*merge, "--pretrained", str(start), "--finetuned", str(bad)],
        [*merge, "--pretrained", str(bad), "--finetuned", str(start)],
        ["export", str(bad), *model, "--format", "open_clip", "--out", str(tmp_path / "out")],
        ["train", *model, "--train-data", str(digits), "--pretrained", str(bad), "--logs", str(tmp_path)],
        ["compare", *model, "--train-data", str(digits), "--pretrained", str(bad), *val, "--out", str(tmp_path / "out")],
    ):  # fmt: skip
        with pytest.raises(InputError, match=naming("bad.pt", "NaN", "1 of 74", "visual.conv1.weight")):
            commands.call(words)
    assert sorted(os.listdir(tmp_path)) == ["bad.pt"]
