"""Anchored training against a plain PyTorch loop, in open_clip's own loop; and the teacher as a model of its own."""

import json
from argparse import Namespace

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.stats import beta
from torch.nn.functional import cross_entropy, mse_loss

from flyp_plugin import ClassPromptDataset, ImageClassifier, openclip
from flyp_plugin.anchor import TEACHERS, trajectory_weights
from flyp_plugin.commands import call as flyp
from flyp_plugin.errors import InputError
from flyp_plugin.objectives import OBJECTIVES
from flyp_plugin.record import teacher_path
from tests.close import FORWARD, assert_moved_alike
from tests.naming import naming, says
from tests.test_objectives import (  # noqa: F401
    MODEL,
    SGD,
    TEMPLATE,
    launch,
    loaded,
    needs_sgd,
    prompts,
    start,
    text_head,
)
from tests.test_train import assert_equal, results, tensorboard_losses, weights

TRAJECTORY = ["--anchor", 3.5, "--anchor-teacher", "trajectory"]


def teacher_of(folder, epoch):
    return load_file(teacher_path(folder / "checkpoints", epoch))


@pytest.mark.parametrize("steps", [1, 7, 100])
def test_the_weights_are_those_of_beta_one_half(steps):
    density = beta.pdf((np.arange(steps + 1) + 0.5) / (steps + 1), 0.5, 0.5)
    assert trajectory_weights(steps) == pytest.approx(density / density.cumsum())


@needs_sgd
@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("objective", ["flyp", "ce"])
def test_a_plain_loop_has_the_same_losses_weights_and_teacher(launch, start, digits, objective, teacher):  # noqa: F811
    flags = ["--objective", objective, "--anchor", 2, "--anchor-teacher", teacher, *SGD, "--lr", 0.01]
    folder = launch(*flags, "--pretrained", start, "--batch-size", 10, "--full-text", "--seed", 3,
                    "--report-to", "tensorboard", name=f"{objective}-{teacher}")  # fmt: skip
    model, other = loaded(start), loaded(start).eval()
    preprocess = open_clip.create_model_and_transforms(MODEL)[1]
    with torch.no_grad():
        head = torch.nn.Parameter(model.logit_scale.exp() * text_head(model.eval(), [TEMPLATE]).T)

    def state():
        return {**model.state_dict(), "class_head.weight": head.detach()}

    before = {key: tensor.clone() for key, tensor in state().items()}
    average = {key: tensor.double() for key, tensor in before.items()}
    optimizer = torch.optim.SGD([*model.train().parameters(), head], lr=0.01, momentum=0.9, nesterov=True)
    dataset = ClassPromptDataset(str(digits), preprocess, open_clip.get_tokenizer(MODEL), 10, seed=3,
                                 prompts=prompts(TEMPLATE), num_samples=200, with_labels=True)  # fmt: skip
    density, losses = beta.pdf((np.arange(21) + 0.5) / 21, 0.5, 0.5), []
    for step, (images, texts) in enumerate(dataset, 1):
        tokens, labels, own = texts[:, :-1], texts[:, -1], torch.arange(len(images))
        f, g = model.encode_image(images, normalize=True), model.encode_text(tokens, normalize=True)
        with torch.no_grad():
            kept = other.encode_image(images, normalize=True), other.encode_text(tokens, normalize=True)
        logits, width = model.logit_scale.exp() * f @ g.T, f.shape[1]
        loss = (cross_entropy(logits, own) + cross_entropy(logits.T, own)) / 2
        distance = width * (mse_loss(f, kept[0]) + mse_loss(g, kept[1]))
        if objective == "ce":
            loss, distance = cross_entropy(f @ head.T, labels), width * mse_loss(f, kept[0])
        optimizer.zero_grad()
        losses.append(loss + 2 * distance)
        losses[-1].backward()
        optimizer.step()
        for key, tensor in state().items() if teacher == "trajectory" else ():
            average[key] += density[step] / density[: step + 1].sum() * (tensor.double() - average[key])
        other.load_state_dict({key: average[key].float() for key in other.state_dict()})
    assert step == 20
    assert tensorboard_losses(folder) == pytest.approx([loss.item() for loss in losses], rel=FORWARD)
    got = weights(folder, 1)
    before = {key: tensor for key, tensor in before.items() if key in got}
    assert_moved_alike(got, state(), before)
    if teacher == "trajectory":
        assert_moved_alike(teacher_of(folder, 1), average, before)


@needs_sgd
def test_accumulation_equals_one_batch(launch, start):  # noqa: F811
    flags = [*SGD, *TRAJECTORY, "--pretrained", start, "--train-num-samples", 100, "--epochs", 2]
    flags += ["--logit-scale", 100]  # open_clip adds up its gradient once a part; it is clamped at 100
    whole = launch(*flags, "--lr", 0.01, name="whole")
    parts = launch(*flags, "--lr", 0.01, "--batch-size", 50, "--accum-freq", 2, name="parts")
    before = {key: tensor for key, tensor in loaded(start).state_dict().items() if key != "logit_scale"}
    assert_moved_alike(weights(parts, 2), weights(whole, 2), before)
    assert_moved_alike(teacher_of(parts, 2), teacher_of(whole, 2), before)


@pytest.mark.skipif(
    not hasattr(openclip.parse_args([]), "torchcompile_strategy"),
    reason="this open_clip has one strategy (before 4)",
)
@pytest.mark.parametrize("strategy", ["task", "model", "step"])
def test_each_way_of_compiling_trains_the_same(launch, start, strategy):  # noqa: F811
    flags = [*SGD[2:], "--lr", 0.01, *TRAJECTORY, "--pretrained", start]
    how = ["--torchcompile", "--torchcompile-strategy", strategy, "--torchcompile-backend", "aot_eager"]
    eager, compiled = launch(*flags, name=f"eager-{strategy}"), launch(*flags, *how, name=f"with-{strategy}")
    before = loaded(start).state_dict()
    assert_moved_alike(teacher_of(compiled, 1), teacher_of(eager, 1), before)


@pytest.fixture(scope="module")
def run(launch, start, digits):  # noqa: F811
    """A finished run with a teacher, of three epochs."""
    flags = [*TRAJECTORY, "--epochs", 3, "--pretrained", start, "--eval-data", f"val={digits}"]
    return launch(*flags, name="run")


def test_a_resumed_run_equals_an_uninterrupted_one(launch, start, run, digits):  # noqa: F811
    flags = [*TRAJECTORY, "--epochs", 3, "--pretrained", start, "--eval-data", f"val={digits}"]
    folder = launch(*flags, name="stopped")
    for file in ("epoch_2.pt", "epoch_3.pt", "epoch_3.teacher.safetensors"):
        (folder / "checkpoints" / file).unlink()
    resumed = launch(*flags, "--resume", "latest", name="stopped")
    assert_equal(weights(resumed, 3), weights(run, 3))
    assert_equal(teacher_of(resumed, 3), teacher_of(run, 3))
    # a checkpoint's teacher is missing, and of another model
    path = teacher_path(folder / "checkpoints", 2)
    for file in ("epoch_3.pt", "epoch_3.teacher.safetensors"):
        (folder / "checkpoints" / file).unlink()
    state = load_file(path)
    path.unlink()
    record = (folder / "flyp.json").read_text()
    with pytest.raises(
        InputError, match=naming("epoch_2.pt", path.name, "--anchor-teacher trajectory", "restore")
    ):
        launch(*flags, "--resume", "latest", "--epochs", 4, name="stopped")
    save_file({**state, "visual.proj": torch.zeros(2, 2)}, path)
    with pytest.raises(InputError, match=naming(str(path), "another architecture", "visual.proj", "(2, 2)")):
        launch(*flags, "--resume", "latest", "--epochs", 4, name="stopped")
    save_file({**state, "visual.proj": state["visual.proj"] * torch.nan}, path)
    with pytest.raises(InputError, match=naming(str(path), "visual.proj", "NaN")):
        launch(*flags, "--resume", "latest", "--epochs", 4, name="stopped")
    assert (folder / "flyp.json").read_text() == record


def test_the_pretrained_teacher_is_given_again_on_resume(launch, start, run):  # noqa: F811
    folder = launch("--anchor", 1, "--pretrained", start, name="kept")
    for flags in ([], ["--pretrained", run / "checkpoints/epoch_1.pt"]):
        with pytest.raises(InputError, match=naming("teacher of --anchor", folder, start, "--pretrained")):
            launch("--anchor", 1, "--epochs", 2, "--resume", "latest", *flags, name="kept")
    resume = ["--anchor", 1, "--epochs", 2, "--resume", "latest", "--pretrained", start]
    uninterrupted = weights(launch(*resume, name="resumed"), 2)
    (folder.parent / "resumed/checkpoints/epoch_2.pt").unlink()
    assert_equal(weights(launch(*resume, name="resumed"), 2), uninterrupted)
    launch(*resume, name="kept")
    loose = folder.parent / "epoch_1.pt"  # has no record
    loose.write_bytes((folder / "checkpoints/epoch_1.pt").read_bytes())
    with pytest.raises(InputError, match=naming("teacher of --anchor", "not given", "--pretrained")):
        launch("--anchor", 1, "--resume", loose, name="unknown")


def test_a_start_that_has_changed_is_to_be_restored(launch, start, tmp_path):  # noqa: F811
    path = tmp_path / "start.pt"
    path.write_bytes(start.read_bytes())
    launch("--anchor", 1, "--pretrained", path, name="changed")
    path.write_bytes((start.parent / "epoch_1.pt").read_bytes())
    with pytest.raises(InputError, match=naming(path, "SHA-256", "restore")):
        launch("--anchor", 1, "--pretrained", path, "--epochs", 2, "--resume", "latest", name="changed")


def test_a_run_goes_on_with_another_batch_size(launch, start):  # noqa: F811
    launch(*TRAJECTORY, "--pretrained", start, "--epochs", 2, "--batch-size", 50, name="batch")
    launch(*TRAJECTORY, "--pretrained", start, "--epochs", 4, "--resume", "latest", name="batch")


@pytest.mark.parametrize("objective, share", [("flyp", 0.5), ("ce", 1)])
def test_the_anchor_weighs_the_same_on_ranks_of_every_kind(objective, share):
    ranks = {"world_size": 2, "rank": 0, "collisions": "keep", "ce_weight": 0.0}
    for local, gathered in ((False, False), (True, True), (False, True)):
        args = Namespace(**ranks, anchor=2.0, local_loss=local, gather_with_grad=gathered)
        expected = 2.0 if local or gathered else 2.0 * share  # as ClipLoss's gradient, which is half then
        assert OBJECTIVES[objective].create_loss(args).weight == expected


def test_checkpoints_are_those_of_plain_flyp(launch, start, run):  # noqa: F811
    model = open_clip.create_model(MODEL, pretrained=str(run / "checkpoints/epoch_3.pt"))
    assert teacher_of(run, 3).keys() == model.state_dict().keys() == weights(run, 3).keys()


def test_teachers_are_kept_as_long_as_their_checkpoints(launch, start):  # noqa: F811
    flags = [*TRAJECTORY, "--pretrained", start, "--epochs", 4, "--train-num-samples", 100]
    last = launch(*flags, "--delete-previous-checkpoint", name="last")
    assert [path.name for path in sorted(last.glob("checkpoints/epoch_*"))] == [
        "epoch_4.pt",
        "epoch_4.teacher.safetensors",
    ]
    recent = launch(*flags, "--save-frequency", 0, "--save-most-recent", name="recent")
    newest = recent / "checkpoints/epoch_latest.pt"
    (recent / "checkpoints/epoch_4.pt").unlink()
    launch(
        *flags, "--save-frequency", 0, "--save-most-recent", "--resume", newest, "--epochs", 5, name="more"
    )


def test_eval_and_wiseft_take_the_teacher_for_a_model(run, start, digits, capsys, caplog):  # noqa: F811
    caplog.set_level("INFO")
    path = teacher_path(run / "checkpoints", 2)
    flyp(["eval", str(run), "--teacher", "--epoch", "2", "--json"])
    flyp(["eval", str(path), "--json"])
    found = [json.loads(text) for text in capsys.readouterr().out.replace("}\n{", "}\0{").split("\0")]
    assert found[0] == found[1] and found[0]["checkpoint"] == str(path)
    flyp(["wiseft", str(run), "--teacher", "--alphas", "0,0.5,1", "--json"])
    swept = json.loads(capsys.readouterr().out)
    assert swept["inputs"]["finetuned"][0]["given"] == str(teacher_path(run / "checkpoints", 3))
    flyp(["eval", str(run / "wiseft_teacher"), "--json"])
    merged = json.loads(capsys.readouterr().out)["results"]["val"]
    assert merged["top1"] == swept["alphas"][f"{swept['chosen_alpha']:.2f}"]["val"]["top1"]
    flyp(["wiseft", str(path), "--alpha", "1", "--force"])
    assert (run / "wiseft_teacher/wise_ft_alpha=1.00.pt").exists() and not (run / "wiseft").exists()
    assert says(caplog.messages[-1], "Next", run / "wiseft_teacher")
    classifier = ImageClassifier.from_run(run / "wiseft_teacher")
    assert classifier.predict(torch.zeros(1, 3, 16, 16))


def test_a_teacher_that_is_not_there_is_one_sentence(run, launch, start, tmp_path):  # noqa: F811
    plain = launch("--pretrained", start, name="plain")
    for command in (["eval"], ["wiseft"], ["export", "--format", "timm", "--out", str(tmp_path / "out")]):
        with pytest.raises(InputError, match=naming(str(plain), "no teacher", "--anchor-teacher trajectory")):
            flyp([*command, str(plain), "--teacher"])
        with pytest.raises(InputError, match=naming("--teacher", "epoch_3.pt", "not a run's folder")):
            flyp([*command, str(run / "checkpoints/epoch_3.pt"), "--teacher"])


@pytest.mark.parametrize("precision", ["amp_bf16", "pure_bf16"])
def test_averages_are_in_float32_in_every_precision(launch, start, precision):  # noqa: F811
    folder = launch(*TRAJECTORY, "--pretrained", start, "--precision", precision, name=precision)
    states = loaded(start).state_dict(), teacher_of(folder, 1)
    assert {tensor.dtype for tensor in states[1].values()} == {torch.float32}
    moved = [key for key in states[0] if not torch.equal(states[0][key], states[1][key])]
    assert len(moved) > len(states[0]) / 2


def test_training_starts_from_another_temperature(launch, start, digits):  # noqa: F811
    plain = launch("--pretrained", start, "--eval-data", f"val={digits}", name="own-scale")
    for objective in ("flyp", "ce"):
        flags = ["--objective", objective, "--logit-scale", 50, "--pretrained", start, "--lr", 1e-9]
        folder = launch(*flags, "--eval-data", f"val={digits}", name=f"scale-{objective}")
        assert weights(folder, 1)["logit_scale"].exp().item() == pytest.approx(50, rel=1e-4)
        rows = results(folder)
        assert rows[0] == results(plain)[0]  # zero-shot is the pretrained model's
        assert rows[1]["val/top1"] == rows[0]["val/top1"] and rows[1]["val/loss"] != rows[0]["val/loss"]
    flyp(["wiseft", str(folder), "--alpha", "0"])  # a head as it was when its training started
    merged = torch.load(folder / "wiseft/wise_ft_alpha=0.00.pt", weights_only=True)
    assert merged["class_head.weight"].norm(dim=1).tolist() == pytest.approx([50] * 10, rel=1e-3)


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--objective", "lp", "--anchor", 1], ["--anchor", "flyp and ce", "--objective lp"]),
        (["--objective", "flyp-ce", "--anchor", 1], ["--anchor", "flyp and ce", "flyp-ce"]),
        (["--siglip", "--anchor", 1], ["--anchor 1", "--siglip"]),
        (["--anchor-teacher", "trajectory"], ["--anchor-teacher trajectory", "without --anchor"]),
        (["--anchor", "nan"], ["--anchor", "nan"]),
        (["--anchor", -1], ["--anchor", ">= 0"]),
        (["--logit-scale", 101], ["--logit-scale", "<= 100"]),
        (["--logit-scale", 0.5], ["--logit-scale", ">= 1"]),
        (["--logit-scale", 7, "--objective", "lp-ft"], ["--logit-scale", "lp-ft"]),
    ],
)
def test_what_does_not_go_together_is_one_sentence(launch, start, flags, named):  # noqa: F811
    with pytest.raises(InputError, match=naming(*named)):
        launch(*flags, "--pretrained", start, name="refused")
