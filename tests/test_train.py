"""The main job: train_flyp.py through open_clip's own main(), on a CPU, with a small model and real images."""

import inspect
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import open_clip
import pytest
import torch
from open_clip_train import main as open_clip_main

from flyp_plugin import ClassPromptDataset, ClassPrompts, openclip
from flyp_plugin.commands import call as flyp
from flyp_plugin.data import LabelledDataset
from flyp_plugin.errors import InputError, run
from flyp_plugin.metrics import evaluate
from flyp_plugin.sources import expand_source
from flyp_plugin.train import train
from tests import tars
from tests.close import ADAM
from tests.naming import naming, says

REPO = Path(__file__).parents[1]
MODEL = "digits-vit"


@pytest.fixture
def launch(digits, tmp_path):
    """Train on the digits; later flags win. Returns the run's folder."""

    def launch(*flags, name="run", status=0):
        argv = ["--model", MODEL, "--model-config", f"{digits}/{MODEL}.json", "--train-data", str(digits)]
        argv += ["--logs", str(tmp_path), "--name", name, "--device", "cpu", "--workers", "0"]
        argv += ["--lr", "1e-3", "--batch-size", "100", "--log-every-n-steps", "1"]
        assert train([*argv, *map(str, flags)]) == status
        return tmp_path / name

    return launch


def run_of(digits, logs, workers):
    """The command line of a short run, without a name."""
    argv = ["--model", MODEL, "--model-config", f"{digits}/{MODEL}.json", "--train-data", str(digits)]
    return [*argv, "--workers", str(workers), "--logs", str(logs), "--device", "cpu", "--epochs", "1"]


def weights(folder, epoch):
    return torch.load(folder / "checkpoints" / f"epoch_{epoch}.pt", weights_only=True)["state_dict"]


def params(folder):
    return dict(
        line.split(": ", 1) for line in (folder / "params.txt").read_text().splitlines() if ": " in line
    )


def results(folder):
    return [json.loads(line) for line in (folder / "checkpoints" / "results.jsonl").read_text().splitlines()]


def logged_losses(folder):
    return re.findall(r" Loss: (\S+)", (folder / "out.log").read_text())


def assert_equal(a, b):
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def test_digits_are_learned_by_open_clips_own_classifier(launch, digits):
    folder = launch("--epochs", 20, "--warmup", 20, "--save-frequency", 20)
    model, _, preprocess = open_clip.create_model_and_transforms(
        MODEL, pretrained=str(folder / "checkpoints" / "epoch_20.pt")
    )
    prompts = ClassPrompts.from_files(
        f"{digits}/classnames.txt", f"{digits}/zeroshot_classification_templates.txt"
    )
    templates = [lambda c, t=t: t.replace("{c}", c) for t in prompts.templates]
    head = open_clip.build_zero_shot_classifier(
        model.eval(), open_clip.get_tokenizer(MODEL), prompts.classnames, templates
    )
    test = LabelledDataset(expand_source(str(digits), "test"), preprocess, 200, num_classes=10)
    with torch.no_grad():
        top1 = evaluate(lambda images: model.encode_image(images, normalize=True) @ head, test)["top1"]
    assert top1 > 0.80


def plain_flyp(start, batches, lr, warmup, steps):
    """FLYP without the plugin: open_clip's model and loss, torch's optimizer, 20 lines."""
    model = open_clip.create_model(MODEL, pretrained=str(start), output_dict=True).train()
    named = list(model.named_parameters())
    no_decay = [
        p for n, p in named if p.ndim < 2 or "bn" in n or "ln" in n or "bias" in n or "logit_scale" in n
    ]
    decay = [p for _, p in named if not any(p is q for q in no_decay)]
    groups = [{"params": no_decay, "weight_decay": 0.0}, {"params": decay, "weight_decay": 0.1}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.999), eps=1e-8)
    loss, losses = open_clip.ClipLoss(), []
    for step, (images, tokens) in enumerate(batches):
        cosine = 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) * lr
        for group in optimizer.param_groups:
            group["lr"] = lr * (step + 1) / warmup if step < warmup else cosine
        optimizer.zero_grad()
        losses.append(loss(**model(images, tokens)))
        losses[-1].backward()
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
    return [value.item() for value in losses], model.state_dict()


def tensorboard_losses(folder):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = event_accumulator.EventAccumulator(
        str(folder / "tensorboard"), size_guidance={"scalars": 0}
    ).Reload()
    return [event.value for event in events.Scalars("train/loss")]


def test_a_plain_loop_gives_the_same_losses_and_weights(launch, digits, start):
    flags = ["--epochs", 2, "--warmup", 5, "--pretrained", start, "--seed", 3, "--report-to", "tensorboard"]
    exact = launch(*flags, "--full-text", name="full")
    short = launch(*flags, name="short")
    _, preprocess, _ = open_clip.create_model_and_transforms(MODEL, pretrained=str(start))
    batches = [
        batch
        for dataset in [
            ClassPromptDataset(str(digits), preprocess, open_clip.get_tokenizer(MODEL), 100, seed=3)
        ]
        for _ in range(2)
        for batch in dataset
    ]
    losses, state = plain_flyp(start, batches, 1e-3, 5, 20)
    if hasattr(open_clip_main, "create_loss"):
        assert tensorboard_losses(exact) == losses
        assert_equal(weights(exact, 2), state)
    else:  # open_clip 4 does not decay positional embeddings
        assert tensorboard_losses(exact) == pytest.approx(losses, rel=ADAM)
    # one prompt encoded once for all its rows: gradients are sums in another order, of which AdamW takes the signs
    # where they are zero but for rounding; there it moves weights that hardly matter to the loss
    assert tensorboard_losses(short) == pytest.approx(losses, rel=ADAM)
    short, exact = ([float(x) for x in logged_losses(folder)] for folder in (short, exact))
    assert short == pytest.approx(exact, rel=ADAM + 1e-4)  # which is the last of five digits


def test_a_resumed_run_equals_an_uninterrupted_one(launch, tmp_path):
    flags = [
        "--epochs",
        3,
        "--force-patch-dropout",
        0.25,
        "--aug-cfg",
        "use_timm=False",
        "color_jitter=(0.4,0.4,0.4,0.1)",
    ]
    flags += ["color_jitter_prob=0.8", "--workers", 1, "--train-num-samples", 300]
    whole = launch(*flags, name="whole")
    (tmp_path / "stopped").mkdir()
    shutil.copytree(whole, tmp_path / "stopped", dirs_exist_ok=True)
    (tmp_path / "stopped" / "checkpoints" / "epoch_3.pt").unlink()
    resumed = launch(*flags, "--resume", "latest", name="stopped")
    assert_equal(weights(resumed, 3), weights(whole, 3))
    a, b = (torch.load(f / "checkpoints" / "epoch_3.pt")["optimizer"]["state"] for f in (whole, resumed))
    assert all(torch.equal(a[i][name], b[i][name]) for i in a for name in a[i])


def test_a_truncated_checkpoint_is_set_aside_on_resume(launch, caplog):
    folder = launch("--epochs", 2, "--train-num-samples", 100)
    newest = folder / "checkpoints" / "epoch_2.pt"
    newest.write_bytes(newest.read_bytes()[:-5000])
    launch("--epochs", 2, "--train-num-samples", 100, "--resume", "latest")
    assert says(caplog.text, "epoch_2.pt", "epoch_2.pt.incomplete")
    assert (folder / "checkpoints" / "epoch_2.pt.incomplete").exists()
    assert len(weights(folder, 2)) > 10


def test_flyps_defaults_are_in_params_txt_and_flags_win(launch, caplog):
    folder = launch("--epochs", 1, "--train-num-samples", 200, "--eps=1e-7")
    got = params(folder)
    assert {
        name: got[name] for name in ("wd", "beta2", "eps", "precision", "lr", "batch_size", "warmup")
    } == {
        "wd": "0.1",
        "beta2": "0.999",
        "eps": "1e-07",
        "precision": "fp32",
        "lr": "0.001",
        "batch_size": "100",
        "warmup": "0",
    }
    log = (folder / "out.log").read_text()
    assert says(log, "wd 0.1", "warmup 0", "beta1 0.9")
    assert says(log, "10 classes", "3 templates", "30")
    assert says(log, "200", "8 shards")
    assert len(re.findall(r"\|   s\d+: '[^']* \w+\.'", log)) == 3


@pytest.mark.parametrize("precision", ["fp16", "pure_fp16"])
def test_fp16_has_an_eps_of_its_own_and_trains(launch, start, precision):
    """1e-8 is 0 in fp16, and with 1e-6 steps are thousands of times as large as --lr."""
    flags = ["--epochs", 1, "--train-num-samples", 200, "--pretrained", start, "--precision", precision]
    folder = launch(*flags, "--lr", "1e-5")
    before, after = torch.load(start), weights(folder, 1)
    furthest = max((before[name].float() - after[name].float()).abs().max() for name in before)
    assert params(folder)["eps"] == "0.001" and furthest < 1e-3
    log = (folder / "out.log").read_text()
    assert says(log, f"--precision {precision}", "--precision amp")
    assert not says(log, "--eps", "1e-3")
    large = launch(*flags, "--lr", "1e-5", "--eps", "1e-6", name="large")
    assert says((large / "out.log").read_text(), "--eps 1e-06", precision, "1e-3")


def test_what_makes_steps_other_than_they_seem_is_told(launch):
    launched = launch("--epochs", 1, "--train-num-samples", 200, "--warmup", 500, "--precision", "bf16")
    log = (launched / "out.log").read_text()
    assert says(log, "--warmup 500", "2 steps", "0%")
    assert says(log, "--precision bf16", "--lr")


def test_the_optimizers_of_timm_keep_their_own_betas(launch):
    if not hasattr(openclip.parse_args([]), "opt"):
        pytest.skip("this open_clip has no --opt")
    folder = launch("--epochs", 1, "--train-num-samples", 100, "--opt", "timm/lion")
    assert (params(folder)["beta1"], params(folder)["beta2"]) == ("None", "None")
    assert "beta1" not in re.search(".*wd 0.1.*", (folder / "out.log").read_text())[0]


def test_no_flyp_defaults_leaves_open_clips(launch):
    got = params(
        launch("--epochs", 1, "--no-flyp-defaults", "--precision", "fp32", "--train-num-samples", 100)
    )
    assert (got["wd"], got["beta2"], got["warmup"]) == ("0.2", "0.98", "10000")


@pytest.mark.parametrize(
    "flags",
    [
        ["--accum-freq", 2],
        ["--precision", "amp_bf16"],
        ["--grad-checkpointing"],
        ["--lock-text", "--lock-text-freeze-layer-norm"],
        ["--lock-image"],
        ["--dataset-resampled"],
        ["--save-most-recent", "--delete-previous-checkpoint"],
        ["--opt", "timm/lamb"],
        ["--full-text"],
        ["--jpeg-draft"],
    ],
    ids=lambda flags: " ".join(map(str, flags)),
)
def test_open_clips_flags_work_as_there(launch, flags):
    if flags[0] == "--opt" and not hasattr(openclip.parse_args([]), "opt"):
        pytest.skip("this open_clip has no --opt")
    if flags[0] == "--lock-text" and not hasattr(open_clip.CLIP, "lock_text_tower"):
        pytest.skip("this open_clip cannot lock the text tower of a CLIP")
    folder = launch("--epochs", 1, "--train-num-samples", 200, *flags)
    assert all(value.isfinite().all() for value in weights(folder, 1).values())


@pytest.mark.skipif(not hasattr(open_clip.CLIP, "lock_text_tower"), reason="this open_clip cannot lock it")
def test_locked_text_stays_as_it_was(launch, start):
    folder = launch(
        "--epochs",
        1,
        "--lock-text",
        "--lock-text-freeze-layer-norm",
        "--pretrained",
        start,
        "--train-num-samples",
        200,
    )
    before, after = torch.load(start), weights(folder, 1)
    assert all(torch.equal(before[n], after[n]) for n in after if n.startswith("transformer.resblocks"))
    assert not torch.equal(before["visual.proj"], after["visual.proj"])


# torch.compile's, for a CPU
COMPILER = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")


@pytest.mark.skipif(not shutil.which(COMPILER), reason=f"there is no C++ compiler {COMPILER} (see CXX)")
def test_torch_compile_trains_the_same(launch, start):
    flags = ["--epochs", 1, "--train-num-samples", 200, "--pretrained", start]
    compiled = launch(*flags, "--torchcompile", name="compiled")
    eager = launch(*flags, name="eager")
    assert [float(x) for x in logged_losses(compiled)] == pytest.approx(
        [float(x) for x in logged_losses(eager)], ADAM + 1e-4
    )


def test_upsampling_factors_and_several_sources(launch, digits):
    launch("--epochs", 1, "--train-data", f"{digits}/train::{digits}/test", "--train-num-samples", 200,
           "--dataset-resampled", "--train-data-upsampling-factors", "1::0.5")  # fmt: skip


def test_val_data_in_open_clips_form_is_evaluated_by_open_clip(launch, digits, tmp_path):
    import webdataset as wds

    with wds.TarWriter(str(tmp_path / "captions.tar")) as tar:
        for sample in wds.WebDataset(f"{digits}/test/0.tar", shardshuffle=False):
            tar.write({"__key__": sample["__key__"], "png": sample["png"], "txt": b"a digit"})
    flags = [
        "--epochs",
        1,
        "--train-num-samples",
        100,
        "--val-data",
        tmp_path / "captions.tar",
        "--val-num-samples",
        114,
    ]
    if tuple(map(int, wds.__version__.split(".")[:2])) > (0, 2):
        with pytest.raises(InputError, match=naming("--val-data", "--eval-data NAME=SHARDS")):
            launch(*flags)
        return
    (row,) = results(launch(*flags))
    assert row["num_samples"] == json.loads((digits / "test" / "sizes.json").read_text())["0.tar"]


def test_evaluation_sets_are_scored_at_the_start_and_each_epoch(launch, digits, start):
    folder = launch("--epochs", 2, "--pretrained", start, "--eval-data", f"val={digits}",
                    "--eval-data", f"seen={digits}/train/0.tar", "--report-to", "tensorboard")  # fmt: skip
    rows = results(folder)
    assert [row["epoch"] for row in rows] == [0, 1, 2]
    assert {
        "val/top1",
        "val/top5",
        "val/macro_f1",
        "val/mean_per_class_recall",
        "val/ece",
        "val/n",
        "seen/top1",
    } <= rows[0].keys()
    assert (rows[0]["val/n"], rows[0]["seen/n"]) == (797, 125)
    model, _, preprocess = open_clip.create_model_and_transforms(MODEL, pretrained=str(start))
    prompts = ClassPrompts.from_files(
        f"{digits}/classnames.txt", f"{digits}/zeroshot_classification_templates.txt"
    )
    templates = [lambda c, t=t: t.replace("{c}", c) for t in prompts.templates]
    head = open_clip.build_zero_shot_classifier(
        model.eval(), open_clip.get_tokenizer(MODEL), prompts.classnames, templates
    )
    test = LabelledDataset(expand_source(str(digits), "test"), preprocess, 100, num_classes=10)
    with torch.no_grad():
        plain = evaluate(lambda images: model.encode_image(images, normalize=True) @ head, test)
    assert abs(rows[0]["val/top1"] - plain["top1"]) * 797 <= 1.001  # their head is another one by rounding
    log = (folder / "out.log").read_text()
    best = max((1, 2), key=lambda epoch: (rows[epoch]["val/top1"], -epoch))
    assert re.search(rf"(?i)best\b.*\bval\b.*\b{best}\b", log)
    command = re.search(r"flyp (wiseft [^\s`]+)", log)[1].split()
    assert flyp([*command, "--alphas", "0:1:0.5"]) in (None, 0)
    sweep = json.loads((folder / "wiseft" / "wiseft.json").read_text())
    assert sweep["model"] == MODEL


def test_a_resumed_run_compares_with_the_epoch_0_of_the_first(launch, digits):
    flags = ["--train-num-samples", 100, "--eval-data", f"val={digits}/test/0.tar"]
    folder = launch("--epochs", 1, *flags)
    launch("--epochs", 2, "--resume", "latest", *flags)
    assert [row["epoch"] for row in results(folder)] == [0, 1, 2]
    assert re.search(r"val +[\d.]+ \([+-]", (folder / "out.log").read_text().split("resuming", 1)[1])


def test_eval_frequency(launch, digits):
    folder = launch("--epochs", 3, "--train-num-samples", 100, "--eval-data", f"val={digits}/test/0.tar",
                    "--eval-frequency", 2)  # fmt: skip
    assert [row["epoch"] for row in results(folder)] == [0, 2, 3]


def torchrun(digits, logs, *flags):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0"]
    command += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0", "--", str(REPO / "train_flyp.py")]
    command += ["--model", MODEL, "--model-config", f"{digits}/{MODEL}.json", "--train-data", str(digits)]
    command += [
        "--logs",
        str(logs),
        "--device",
        "cpu",
        "--dist-backend",
        "gloo",
        "--workers",
        "1",
        "--lr",
        "1e-3",
    ]
    return subprocess.run(
        [*command, *map(str, flags)], capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def test_two_ranks_train_on_one_batch_and_score_as_one_process(digits, tmp_path):
    done = torchrun(digits, tmp_path, "--name", "two", "--epochs", 1, "--eval-data", f"val={digits}")
    assert done.returncode == 0, done.stderr[-3000:]
    got = params(tmp_path / "two")
    assert (got["batch_size"], got["local_loss"], got["gather_with_grad"]) == ("256", "True", "True")
    assert re.search(r"Train Epoch: 0 \[.*1000 \(100%\)\]", done.stderr)
    after = results(tmp_path / "two")[1]
    checkpoint = str(tmp_path / "two" / "checkpoints" / "epoch_1.pt")
    flyp(["eval", checkpoint, "--model", MODEL, "--model-config", f"{digits}/{MODEL}.json", "--device", "cpu",
          "--eval-data", f"val={digits}", "--predictions", str(tmp_path / "one.csv")])  # fmt: skip
    rows = (tmp_path / "one.csv").read_text().splitlines()[1:]
    right = sum(row.split(",")[2] == row.split(",")[3] for row in rows)
    assert after["val/n"] == len(rows)
    assert (
        abs(after["val/top1"] * len(rows) - right) <= 1.001
    )  # a tie may fall otherwise in batches of another size


def test_more_ranks_than_shards_is_one_sentence_and_no_hang(digits, tmp_path):
    done = torchrun(digits, tmp_path, "--train-data", f"{digits}/train/0.tar")
    assert done.returncode != 0
    assert re.search(r"\b1 shards?\b.*\b2 ranks", done.stderr)


@pytest.fixture
def bad(digits, tmp_path):
    """Data that users have by mistake."""
    with tarfile.open(digits / "train" / "0.tar") as tar:
        png = next(tar.extractfile(m).read() for m in tar if m.name.endswith(".png"))
    (tmp_path / "not-a-tar.tar").write_bytes(b"hello" * 1000)
    tars.write(tmp_path / "captions.tar", {"a.png": png, "a.txt": b"a digit"})
    tars.write(tmp_path / "labels.tar", {"a.png": png, "a.cls": b"12"})
    tars.write(tmp_path / "words.tar", {"a.png": png, "a.cls": b"cat"})
    tars.write(tmp_path / "images.tar", {f"{i}.{ext}": b"3" for i in range(9) for ext in ("png", "cls")})
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "alone").mkdir()
    shutil.copy(digits / "train" / "0.tar", tmp_path / "alone" / "0.tar")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "out.log").write_text("")
    return tmp_path


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--train-data", "{bad}/nowhere"], r"/nowhere\b"),
        (["--train-data", "{bad}/{{0..3}}.tar"], r"/0\.tar\b.*\b3 more.*\b4\b"),
        (
            ["--train-data", "{bad}/not-a-tar.tar", *["--classnames", "{digits}/classnames.txt"]],
            r"not-a-tar\.tar",
        ),
        (
            ["--train-data", "{bad}/captions.tar", *["--classnames", "{digits}/classnames.txt"]],
            r"captions\.tar.*'cls'",
        ),
        (
            ["--train-data", "{bad}/labels.tar", *["--classnames", "{digits}/classnames.txt"]],
            r"labels\.tar.*\b12\b",
        ),
        (
            ["--train-data", "{bad}/words.tar", *["--classnames", "{digits}/classnames.txt"]],
            r"words\.tar.*'cat'",
        ),
        (
            ["--train-data", "{bad}/images.tar", *["--classnames", "{digits}/classnames.txt"]],
            r"\b9 of 9\b.*--max-lost 0\.01",
        ),
        (["--classnames", "{bad}/empty.txt"], r"empty\.txt\b.*empty"),
        (["--classnames", "{bad}/none.txt"], r"none\.txt\b.*--classnames"),
        (["--train-data", "{bad}/alone"], r"classnames\.txt\b.*--classnames"),
        (["--label-key", "label"], r"'label'.*cls, path, png"),
        (["--image-key", "tiff"], r"tiff"),
        (["--name", "taken"], r"/taken\b.*--name"),
        (["--model", "ViT-B-61"], r"ViT-B-61\b.*ViT-B-16"),
        (["--pretrained", "no-such-tag"], r"no-such-tag"),
        (["--model-config", "{bad}/none.json"], r"none\.json\b.*--model-config"),
        (["--templates", "a photo of a cat"], r"a photo of a cat"),
        (["--objective", "CE"], r"^Error: .*--objective: invalid choice: 'CE'.*--help"),
        (["--pretrained", "{digits}"], r"digits0 .*pretrained tag of digits-vit"),
        (["--wd", "-1"], r"--wd\b.*-1\b"),
        (["--epochs", "0"], r"--epochs\b.*\b0\b"),
        (["--log-every-n-steps", "0"], r"--log-every-n-steps\b.*\b0\b"),
        (["--warmup", "-3"], r"--warmup\b.*-3\b"),
        (["--lr", "fast"], r"^Error: .*--lr: invalid float value: 'fast'.*--help"),
        (["--learning-rate", "1"], r"^Error: .*--learning-rate 1.*--help"),
        (
            ["--logs", "{bad}/empty.txt/logs"],
            r"empty\.txt/logs\b.*Not a dir.*--logs",
        ),
        (["--pretrained", "{bad}/empty.txt"], r"empty\.txt\b.*(checkpoint|state_dict)"),
        (["--accum-freq", "50", "--batch-size", "100"], r"--accum-freq 50\b"),
        (["--train-data-upsampling-factors", "1"], r"--train-data-upsampling-factors.*--dataset-resampled"),
        (["--dataset-type", "csv"], r"`flyp shards write`"),
        (["--eval-data", "{digits}"], r"NAME=SHARDS"),
        (["--eval-data", "val={digits}/nowhere"], r"/nowhere\b"),
        (["--grad-clip-norm", "0"], r"--grad-clip-norm\b.*\b0\b"),
        (["--lock-image-unlocked-groups", "1"], r"--lock-image-unlocked-groups\b.*--lock-image\b(?!-)"),
        (["--distill-model", "ViT-B-16"], r"--distill-model\b.*--distill-pretrained"),
        (["--csv-separator", ","], r"--csv-separator"),
        (["--epochs-cooldown", "1"], r"--epochs-cooldown\b.*--lr-scheduler const-cooldown"),
        (["--precision", "fp16", "--eps", "1e-8"], r"--eps 1e-08\b.*--precision fp16\b.*1e-3\b"),
        (["--report-to", "tensorbord"], r"tensorbord\b.*\btensorboard"),
        (["--val-data", "{digits}/test/0.tar"], r"--val-data\b.*--eval-data NAME=SHARDS"),
        (["--val-data", "{digits}"], r"--val-data\b.*--eval-data NAME=SHARDS"),
        (["--imagenet-val", "{digits}/nowhere"], r"--imagenet-val\b.*--eval-data NAME=SHARDS"),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else "",
)
def test_a_users_mistake_is_one_sentence_and_status_1(digits, bad, capfd, flags, sentence):
    argv = run_of(digits, bad, workers=2)
    with pytest.raises(SystemExit) as left:
        run(lambda: train([*argv, *(flag.format(bad=bad, digits=digits) for flag in flags)]))
    error = capfd.readouterr().err
    assert left.value.code == 1
    assert "Traceback" not in error
    assert re.search(sentence, error.strip().splitlines()[-1])


def test_a_siglip_model_wants_the_sigmoid_loss(launch, digits):
    config = json.loads((digits / f"{MODEL}.json").read_text()) | {
        "init_logit_bias": -10,
        "custom_text": True,
    }
    (digits / "digits-sigmoid.json").write_text(json.dumps(config))
    flags = ["--model", "digits-sigmoid", "--model-config", digits / "digits-sigmoid.json", "--epochs", 1]
    flags += ["--train-num-samples", 100]
    with pytest.raises(InputError, match="--siglip"):
        launch(*flags, name="refused")
    launch(*flags, "--siglip", name="sigmoid")
    if "logit_bias" in inspect.signature(open_clip.ClipLoss.forward).parameters:  # not in 2.28
        launch(*flags, "--softmax-loss", name="softmax")


def test_the_seams_are_put_back_and_a_missing_one_is_named(launch, monkeypatch):
    import open_clip_train.train as loop
    from open_clip_train import main

    before = (main.get_data, main.evaluate, main.train_one_epoch, main.create_model_and_transforms, main.parse_args,
              loop.zero_shot_eval, torch.nn.parallel.DistributedDataParallel)  # fmt: skip
    launch("--epochs", 1, "--train-num-samples", 100)
    after = (main.get_data, main.evaluate, main.train_one_epoch, main.create_model_and_transforms, main.parse_args,
             loop.zero_shot_eval, torch.nn.parallel.DistributedDataParallel)  # fmt: skip
    assert before == after
    monkeypatch.delattr(main, "get_data")
    with pytest.raises(InputError, match=naming("open_clip_train.main.get_data", openclip.SUPPORTED)):
        launch(name="missing")
    assert (main.evaluate, main.parse_args) == (before[1], before[4])


def test_a_missing_train_extra_is_named(launch, monkeypatch):
    monkeypatch.delitem(sys.modules, "open_clip_train.main")
    monkeypatch.setitem(sys.modules, "fsspec", None)
    monkeypatch.delitem(sys.modules, "open_clip_train.file_utils")
    with pytest.raises(InputError, match=naming("fsspec", "pip install 'flyp-plugin[train]'")):
        launch()


def test_only_one_module_knows_open_clip_train():
    found = [p.name for p in (REPO / "flyp_plugin").rglob("*.py") if "open_clip_train" in p.read_text()]
    assert found == ["openclip.py"]
    assert "open_clip_train" not in (REPO / "train_flyp.py").read_text()
    assert openclip.SUPPORTED


@pytest.mark.parametrize(
    "command", [["train_flyp.py"], ["-m", "flyp_plugin.train"], ["-m", "flyp_plugin", "train"]]
)
def test_help_shows_flyps_flags_first_with_an_example(command):
    done = subprocess.run(
        [sys.executable, *command, "--help"], cwd=REPO, capture_output=True, text=True, check=True
    )
    assert "--train-data data --batch-size 256" in done.stdout
    assert "--eval-data NAME=SHARDS" in done.stdout
    assert "--help-open-clip" in done.stdout
    assert "Traceback" not in done.stderr


def test_descriptions_score_the_sets_that_they_cover_later_too(launch, digits, tmp_path, capsys):
    """--prompts, and what `flyp eval` of the run and a resumption with other prompts make of its record."""
    names = (digits / "classnames.txt").read_text().split()
    lists = {
        name: [f"{name} drawn in way {way}." for way in range(1 + i % 3)] for i, name in enumerate(names)
    }
    (tmp_path / "own.json").write_text(json.dumps({**lists, "ten": ["not a digit."]}))
    members = {
        f"{i}.{end}": data for i in range(4) for end, data in (("png", tars.png(i)), ("cls", b"%d" % (i % 2)))
    }
    tars.write(tmp_path / "blots" / "test" / "0.tar", members)
    (tmp_path / "blots" / "classnames.txt").write_text("two\na blot\n")
    sets = ["--eval-data", f"val={digits}", "--eval-data", f"blots={tmp_path}/blots"]
    folder = launch(*sets, "--epochs", 1, "--prompts", tmp_path / "own.json")
    record = json.loads((folder / "flyp.json").read_text())
    assert record["descriptions"] == {**lists, "ten": ["not a digit."]} and record["templates"] == []
    assert record["classes_given"] == ["descriptions"]
    trained = results(folder)[-1]
    capsys.readouterr()
    evaluation = ["eval", folder, "--device", "cpu", "--workers", 0, "--json"]
    flyp([*map(str, evaluation)])
    again = json.loads(capsys.readouterr().out)["results"]
    own = ["--prompts", f"{tmp_path}/own.json", "--eval-data", f"val={digits}"]
    flyp([*map(str, evaluation), *own])
    assert json.loads(capsys.readouterr().out)["results"]["val"] == again["val"]
    for name in ("val", "blots"):
        assert again[name]["loss"] == pytest.approx(trained[f"{name}/loss"], rel=1e-5)
        assert again[name]["top1"] == trained[f"{name}/top1"]
    lists["two"] = ["a swan."]
    (tmp_path / "own.json").write_text(json.dumps({**lists, "ten": ["not a digit."]}))
    launch(*sets, "--epochs", 2, "--prompts", tmp_path / "own.json", "--resume", "latest")
    changed = "--prompts {'two': ['a swan.']} ({'two': ['two drawn in way 0.'"
    assert changed in (folder / "out.log").read_text()


def test_a_class_without_descriptions_is_named_with_the_file(launch, tmp_path):
    (tmp_path / "own.json").write_text('{"zero": ["a ring."]}')
    with pytest.raises(InputError, match=naming("own.json", "9 of 10", "'one'")):
        launch("--prompts", tmp_path / "own.json")
