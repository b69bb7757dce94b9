"""`flyp compare`: a real, small comparison that is interrupted, goes on and is checked figure by figure."""

import dataclasses
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from scipy import stats

from flyp_plugin import commands
from flyp_plugin.commands import compare, grid, plots, wiseft
from flyp_plugin.commands.grid import (
    TRIED,
    parse_blocks,
    parse_methods,
    parse_seeds,
    parse_values,
    with_defaults,
)
from flyp_plugin.commands.jobs import one_gpu, run_jobs, seconds_left
from flyp_plugin.errors import InputError
from flyp_plugin.metrics import best
from flyp_plugin.run_folder import folder_lock
from tests.helpers_eval import checkpoint, flyp, root
from tests.naming import naming, says
from tests.tars import NAMES

MODEL = "tiny-digits"
NEEDED = [
    "compare",
    "--model",
    "M",
    "--pretrained",
    "P",
    "--train-data",
    "D",
    "--eval-data",
    "v=D",
    "--out",
    "O",
]


@pytest.fixture(scope="module")
def argv(digits):
    """The flags of a comparison of one method, two learning rates and two seeds; later flags win."""
    start = checkpoint(MODEL, 15)
    words = [
        "--model",
        MODEL,
        "--pretrained",
        start,
        "--train-data",
        digits,
        "--out",
        "out",
        "--methods",
        "flyp",
    ]
    words += ["--eval-data", f"val={root()}/data/test/0.tar", "--eval-data", f"test={root()}/data/test/1.tar"]
    words += [
        "--eval-data",
        f"odd={root()}/ood",
        "--eval-data",
        f"few={root()}/ood/test/0.tar",
        "--id-test",
        "test",
    ]
    words += [
        "--lr",
        "1e-4,1e-3",
        "--seeds",
        "0:2",
        "--epochs",
        1,
        "--train-num-samples",
        300,
        "--batch-size",
        100,
    ]
    words += ["--model-config", f"{root()}/models/{MODEL}.json", "--workers", 0]
    return lambda *more: ["compare", *map(str, (*words, *more))]


def add_method_that_fails(patch):
    """Make `bad` a method, whose training fails after its flags have been checked."""
    original = compare.Comparison.flags

    def flags(self, run):
        if run.method != "bad":
            return original(self, run)
        return [*original(self, dataclasses.replace(run, method="flyp")), "--opt", "timm/no-such-optimizer"]

    patch.setattr(grid, "METHODS", {"flyp": {}, "bad": {}})
    patch.setattr(compare.Comparison, "flags", flags)


@pytest.fixture(scope="module")
def finished(argv, tmp_path_factory):
    """Its folder, after an interruption in the second training and another start with a method that fails."""
    folder = tmp_path_factory.mktemp("compare")
    second = folder / "out/runs/flyp_lr0.001_seed0/checkpoints/results.jsonl"

    def interrupt():
        while not second.exists():  # written before the first step
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        add_method_that_fails(patch)
        threading.Thread(target=interrupt, daemon=True).start()
        words = argv("--methods", "flyp,bad")
        handler = signal.signal(
            signal.SIGINT, signal.default_int_handler
        )  # a job in the background ignores it
        with pytest.raises(KeyboardInterrupt):
            flyp(*words)
        signal.signal(signal.SIGINT, handler)
        with folder_lock(folder / "out"):  # no child is left
            done = [path.parent.name for path in folder.glob("out/runs/*/finished.json")]
        assert done == ["flyp_lr0.0001_seed0"] and second.exists()
        first = (folder / "out/runs/flyp_lr0.0001_seed0/finished.json").stat().st_mtime_ns
        with pytest.raises(InputError, match=naming("1 of 2", "out/compare.md")) as error:
            flyp(*words)
        assert "\n" not in str(error.value)
        assert (folder / "out/runs/flyp_lr0.0001_seed0/finished.json").stat().st_mtime_ns == first
    return folder / "out"


def read(path):
    return json.loads(path.read_text())


def by_seed(out, lr):
    runs = [out / "runs" / f"flyp_lr{lr}_seed{seed}" for seed in (0, 1)]
    rows = [
        [json.loads(line) for line in (run / "checkpoints/results.jsonl").read_text().splitlines()]
        for run in runs
    ]
    return [{row["epoch"]: row for row in some} for some in rows], [
        read(run / "wiseft/wiseft.json") for run in runs
    ]


def test_every_figure_is_that_of_the_runs(finished):
    record = read(finished / "compare.json")
    (block,) = record["blocks"]
    found = block["methods"]["flyp"]
    tried = {}
    for lr in (1e-4, 1e-3):
        lines = (finished / f"runs/flyp_lr{lr}_seed0/checkpoints/results.jsonl").read_text().splitlines()
        tried[str(lr)] = json.loads(lines[-1])["val/top1"]
    assert found["by_value"] == tried and found["value"] == float(max(tried, key=tried.get))
    results, sweeps = by_seed(finished, found["value"])
    for name, alpha in (("flyp", lambda s: 1.0), ("flyp + WiSE-FT", lambda s: s["chosen_alpha"])):
        chosen = [sweep["alphas"][f"{alpha(sweep):.2f}"] for sweep in sweeps]
        for column, cell in block["rows"][name].items():
            sets = ["odd", "few"] if column == "mean OOD" else [column]
            values = [np.mean([by_set[s]["top1"] for s in sets]) for by_set in chosen]
            assert cell["by_seed"] == pytest.approx(values, abs=1e-12)
            assert cell["mean"] == pytest.approx(np.mean(values))
            half = stats.t.ppf(0.975, 1) * np.std(values, ddof=1) / np.sqrt(2)
            assert cell["half_width_95"] == pytest.approx(half, rel=1e-4, abs=1e-12)
            errors = [np.mean([by_set[s]["ece"] for s in sets]) for by_set in chosen]
            assert block["ece"][name][column]["by_seed"] == pytest.approx(errors, abs=1e-12)
    for seed in (0, 1):  # the sweep scores as the training did, but for ties: its batches have another size
        for name in ("val", "test", "odd", "few"):
            image = 1.001 / results[seed][0][f"{name}/n"]
            for alpha, row in (("0.00", results[seed][0]), ("1.00", results[seed][1])):
                assert abs(sweeps[seed]["alphas"][alpha][name]["top1"] - row[f"{name}/top1"]) <= image
            (zeroshot,) = block["rows"]["zero-shot"][name]["by_seed"]
            assert abs(zeroshot - results[seed][0][f"{name}/top1"]) <= image
    assert sweeps[0]["alphas"]["1.00"] != sweeps[1]["alphas"]["1.00"]  # seeds differ
    assert list(block["rows"]["flyp"]) == ["val", "test", "odd", "few", "mean OOD"]


def test_table_and_picture(finished):
    text = (finished / "compare.md").read_text()
    block = read(finished / "compare.json")["blocks"][0]
    table = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")
    ]
    heads = [
        "",
        "val (ID, chose), n=102",
        "test (ID test), n=101",
        "odd, n=97",
        "few, n=49",
        "mean OOD",
        "setting",
    ]
    assert table[0] == [*heads, "mean alpha"]
    assert len(table) == 10 and table[5] == table[0] and says(text, "ECE", "15 bins", "lower")
    for lines, rows in ((table[2:5], block["rows"]), (table[7:], block["ece"])):
        assert [row[0] for row in lines] == ["zero-shot", "flyp", "flyp + WiSE-FT"] == list(rows)
        cell = rows["flyp"]["mean OOD"]
        assert lines[1][5] == f"{100 * cell['mean']:.1f} ± {100 * cell['half_width_95']:.1f}"
    assert says(text, "seeds 0, 1", "±") and says(text, "epoch (1)", "`val`")
    assert says(text.rstrip().splitlines()[-1], "bad")
    assert PIL.Image.open(finished / "compare.png").size == (900, 675)


def test_runs_keep_commands_and_only_chosen_ones_weights(finished):
    lr = read(finished / "compare.json")["blocks"][0]["methods"]["flyp"]["value"]
    for run in sorted(finished.glob("runs/flyp_*")):
        command = shlex.split((run / "command.txt").read_text())
        assert command[:4] == [sys.executable, "-m", "flyp_plugin", "train"]
        for flag, value in (("--epochs", "1"), ("--train-num-samples", "300"), ("--name", run.name)):
            assert command[command.index(flag) + 1] == value
        assert [path.name for path in run.glob("checkpoints/*.pt")] == ["epoch_1.pt"] * (
            f"lr{lr}_" in run.name
        )
        assert "lr: " + command[command.index("--lr") + 1] in (run / "params.txt").read_text()
    sweep = shlex.split((finished / f"runs/flyp_lr{lr}_seed1/wiseft/command.txt").read_text())
    assert sweep[3] == "wiseft" and sweep[4].endswith(f"/runs/flyp_lr{lr}_seed1")
    assert {"--device", "--batch-size", "--workers"} <= set(sweep) and "--model" not in sweep


def test_a_run_that_fails_is_told_with_its_folder_and_last_lines(finished, argv, monkeypatch, caplog):
    monkeypatch.chdir(finished.parent)
    add_method_that_fails(monkeypatch)
    before = {path: path.stat().st_mtime_ns for path in finished.glob("runs/flyp*/**/*")}
    with pytest.raises(InputError, match=naming("1 of 2", "out/compare.md")):
        flyp(*argv("--methods", "flyp,bad"))
    (error,) = (record.getMessage() for record in caplog.records if record.levelname == "ERROR")
    run = "out/runs/bad_lr0.0001_seed0"
    assert says(error.splitlines()[0], "bad", "lr 0.0001", "seed 0", run, "status 1")
    assert "no-such-optimizer" in error.splitlines()[-1]
    # what had finished was not run again
    assert before == {path: path.stat().st_mtime_ns for path in finished.glob("runs/flyp*/**/*")}


def test_two_workers_resume_it_to_the_same_table(finished, argv, monkeypatch, tmp_path, caplog):
    copy = shutil.copytree(finished, tmp_path / "out")
    runs = [copy / f"runs/flyp_lr{lr}_seed0" for lr in (1e-4, 1e-3)]
    for run in runs:
        shutil.rmtree(run)
    monkeypatch.chdir(tmp_path)
    add_method_that_fails(monkeypatch)
    with pytest.raises(InputError, match=naming("1 of 2", "out/compare.md")):
        flyp(*argv("--methods", "flyp,bad", "--devices", "cpu,cpu"))
    for name in ("compare.json", "compare.md"):
        assert (copy / name).read_text() == (finished / name).read_text()
    (error,) = (record.getMessage() for record in caplog.records if record.levelname == "ERROR")
    assert says(error.splitlines()[0], "bad", "seed 0", "status 1")


def test_a_second_start_runs_nothing_and_gives_the_same_table(finished, argv, monkeypatch, capsys):
    monkeypatch.chdir(finished.parent)
    settings, text = read(finished / "settings.json"), (finished / "compare.md").read_text()
    monkeypatch.setattr(subprocess, "Popen", None)
    (finished / "settings.json").write_text(json.dumps(settings | {"methods": "flyp"}))
    flyp(*argv())
    assert capsys.readouterr().out == (finished / "compare.md").read_text()
    assert (finished / "compare.md").read_text() == text.replace("\nNot finished: bad.\n", "")
    flyp(*argv("--seeds", "0"))  # fewer seeds, or more, with the same first one, go on with what is there
    record = read(finished / "compare.json")
    assert record["seeds"] == [0] and list(record["blocks"][0]["methods"]["flyp"]["seeds"]) == ["0"]
    flyp(*argv())
    assert (finished / "compare.md").read_text() == text.replace("\nNot finished: bad.\n", "")
    (finished / "settings.json").write_text(json.dumps(settings))


def test_other_settings_are_refused_where_a_comparison_is(finished, argv, monkeypatch):
    monkeypatch.chdir(finished.parent)
    (Path("full") / "something").mkdir(parents=True)
    for more, message in [
        (["--seeds", "1:3"], naming("out", "'flyp,bad'", "'flyp'", "--out")),
        (["--out", "full"], naming("full", "--out")),
    ]:
        with pytest.raises(InputError, match=message):
            flyp(*argv(*more))
    busy = pytest.raises(InputError, match=naming(finished, "process"))
    with folder_lock(finished), busy, folder_lock(finished):
        pass


def test_kill_ends_all_workers_with_one_line_and_status_143(argv, tmp_path):
    command = [sys.executable, "-m", "flyp_plugin", *argv("--devices", "cpu,cpu")]
    runs = [tmp_path / f"out/runs/flyp_lr{lr}_seed0" for lr in (1e-4, 1e-3)]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and not all((run / "console.log").exists() for run in runs):
            time.sleep(0.05)
        process.terminate()
        said = process.stderr.read().splitlines()
    assert process.returncode == 143 and said[-1] == "Terminated."
    assert says(said[0], "3 trainings", "2 sweeps", "0", "2 values", "seed 0", "1 more")
    with folder_lock(tmp_path / "out"):  # which a training would hold
        assert not any((run / "finished.json").exists() for run in runs)


@pytest.fixture(scope="module")
def anchored(argv, tmp_path_factory):
    """The folder of a comparison whose method has a teacher, a tuned anchor and Model Stock, and its flags."""
    folder = tmp_path_factory.mktemp("anchored")
    words = ["--methods", "flyp-trajectory", "--lr", "1e-3", "--tune", "anchor=10", "--model-stock"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        flyp(*argv(*words))
    return folder / "out", words


def test_the_anchor_is_tuned_and_unchosen_weights_are_deleted(anchored):
    out, _ = anchored
    (block,) = read(out / "compare.json")["blocks"]
    found = block["methods"]["flyp-trajectory"]
    tried = {}
    for name, weight in (("lr0.001", 3.5), ("lr0.001_anchor10.0", 10.0)):
        run = out / f"runs/flyp-trajectory_{name}_seed0"
        assert says((run / "params.txt").read_text(), f"anchor: {weight}")
        tried[weight] = json.loads((run / "checkpoints/results.jsonl").read_text().splitlines()[-1])[
            "val/top1"
        ]
        kept = {path.name for path in run.glob("checkpoints/epoch_*")}
        chosen = found["then"]["value"] == weight
        assert kept == ({"epoch_1.pt", "epoch_1.teacher.safetensors"} if chosen else set())
    assert {float(value): figure for value, figure in found["then"]["by_value"].items()} == tried
    assert found["by_value"] == {"0.001": tried[3.5]} and found["then"]["value"] == best(tried)
    assert f"| lr 0.001, anchor {best(tried):g} | 1 |" in (out / "compare.md").read_text()


def test_rows_of_teacher_and_model_stock_are_wisefts(anchored):
    out, _ = anchored
    (block,) = read(out / "compare.json")["blocks"]
    found, name = block["methods"]["flyp-trajectory"], "flyp-trajectory"
    sweeps = [
        read(Path(out.parent, s["folder"], "wiseft_teacher/wiseft.json")) for s in found["seeds"].values()
    ]
    stock = read(Path(out.parent, found["model_stock"]["folder"], "wiseft.json"))
    for metric, rows in (("top1", block["rows"]), ("ece", block["ece"])):
        teachers = [sweep["alphas"]["1.00"]["odd"][metric] for sweep in sweeps]
        assert rows[f"{name}, teacher"]["odd"]["by_seed"] == teachers != rows[name]["odd"]["by_seed"]
        assert rows[f"{name}, teacher + WiSE-FT"]["odd"]["by_seed"] == [
            sweep["alphas"][f"{sweep['chosen_alpha']:.2f}"]["odd"][metric] for sweep in sweeps
        ]
        one = stock["sets"]["odd"][metric]
        assert rows[f"{name} + Model Stock"]["odd"] == {"mean": one, "half_width_95": None, "by_seed": [one]}
    assert list(block["differences"]) == [f"{name}, teacher", f"{name}, teacher + WiSE-FT"]
    text = (out / "compare.md").read_text()
    assert says(text, "Model Stock merges", "no interval") and says(text, "1 + 1 tries", "anchor=10")


def test_model_stock_is_merged_again_for_other_seeds_alone(anchored, argv, monkeypatch, caplog):
    caplog.set_level("INFO")
    out, words = anchored
    monkeypatch.chdir(out.parent)
    (merged,) = out.glob("runs/*_model_stock/wiseft.json")
    before = {path: path.stat().st_mtime_ns for path in out.glob("runs/**/finished.json")}
    merged.write_text(merged.read_text().replace("seed1", "seed7"))
    flyp(*argv(*words))
    after = {path: path.stat().st_mtime_ns for path in before}
    assert [path.parent.name for path in before if before[path] != after[path]] == [merged.parent.name]
    assert says(caplog.text, "3 trainings", "4 sweeps", "1 merges", "8 of them finished")
    monkeypatch.setattr(subprocess, "Popen", None)
    text = (out / "compare.md").read_text()
    for same in ("out", out):
        flyp(*argv(*words, "--out", same))
        assert (out / "compare.md").read_text() == text


@pytest.fixture(scope="module")
def selected(argv, tmp_path_factory):
    """The folder of a comparison of a template with descriptions at the epochs of the lowest loss, and its flags."""
    folder = tmp_path_factory.mktemp("selected")
    descriptions = {
        name: [f"a {name}.", *["the number {c}, by hand."] * (i % 3 > 0)] for i, name in enumerate(NAMES)
    }
    (folder / "own.json").write_text(
        json.dumps(descriptions | {"one": ["a stroke.", "a line.", "a single stick."]})
    )
    words = ["--select", "loss", "--lr", "1e-2", "--seeds", "0", "--epochs", "3"]
    words += ["--templates", "the digit {c}.", "--prompts", "own.json"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        flyp(*argv(*words))
    return folder / "out", words


def selected_runs(out):
    blocks = read(out / "compare.json")["blocks"]
    return [
        (out / "runs" / f"{given}0_flyp_lr0.01_seed0", b)
        for given, b in zip(("templates", "prompts"), blocks)
    ]


def test_descriptions_against_templates_in_one_command(selected, capsys, monkeypatch):
    out, _ = selected
    monkeypatch.chdir(out.parent)
    text = (out / "compare.md").read_text()
    assert (
        text.index("## templates the digit {c}.") < text.index("## prompts own.json")
        and text.count("## ") == 2
    )
    rows = []
    for run, block in selected_runs(out):
        epoch = block["methods"]["flyp"]["seeds"]["0"]["epoch"]
        flyp("eval", run, "--epoch", epoch, "--batch-size", 100, "--device", "cpu", "--workers", 0, "--json")
        scored = json.loads(capsys.readouterr().out)["results"]
        rows.append(block["rows"]["flyp"])
        assert {name: rows[-1][name]["by_seed"] for name in scored} == {
            n: [m["top1"]] for n, m in scored.items()
        }
    assert rows[0] != rows[1]
    texts = [read(run / "flyp.json") for run, _ in selected_runs(out)]
    assert [text["templates"] for text in texts] == [["the digit {c}."], []]
    assert texts[1]["descriptions"] == read(out.parent / "own.json")


def test_the_epoch_of_the_lowest_loss_is_scored_and_kept(selected):
    epochs = []
    for run, block in selected_runs(selected[0]):
        lines = map(json.loads, (run / "checkpoints/results.jsonl").read_text().splitlines())
        losses = {row["epoch"]: row["val/loss"] for row in lines}
        epochs.append(min(losses, key=losses.__getitem__))
        found = block["methods"]["flyp"]
        assert found["seeds"]["0"]["epoch"] == epochs[-1] and list(losses) == [0, 1, 2, 3]
        assert found["by_value"] == {"0.01": min(losses.values())} and found["chosen_by"] == "val/loss"
        kept = [f"epoch_{epochs[-1]}.pt"] if epochs[-1] else []
        assert [path.name for path in run.glob("checkpoints/*.pt")] == kept
    assert min(epochs) < 3
    assert all(f"seeds: flyp {epoch}." in (selected[0] / "compare.md").read_text() for epoch in epochs)


def test_where_zeroshot_is_chosen_nothing_is_merged(selected, argv, monkeypatch):
    out, words = selected
    monkeypatch.chdir(out.parent)
    monkeypatch.setattr(subprocess, "Popen", None)
    for run, _ in selected_runs(out):
        file = run / "checkpoints/results.jsonl"
        first, rest = file.read_text().split("\n", 1)
        file.write_text(json.dumps(json.loads(first) | {"val/loss": 0.0}) + "\n" + rest)
    flyp(*argv(*words))
    default_alphas = wiseft._names(commands._parser("wiseft").parse_args(["wiseft"]))
    for run, block in selected_runs(out):
        (seed,) = block["methods"]["flyp"]["seeds"].values()
        assert seed["epoch"] == seed["chosen_alpha"] == 0 and not [*run.glob("checkpoints/*.pt")]
        assert [*seed["alphas"]] == [f"{alpha:.2f}" for alpha in default_alphas]
        zeroshot, *others = block["rows"].values()
        assert len(others) == 2 and all(row == zeroshot for row in others)
    assert (out / "compare.md").read_text().count("Epochs chosen, in the order of the seeds: flyp 0.") == 2


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--methods", "flyp,lora"], ["--methods", "flyp,lora", "lp-ft", "flyp-ce"]),
        (["--methods", "flyp,flyp"], ["--methods", "flyp,flyp"]),
        (["--seeds", "3:1"], ["--seeds", "3:1"]),
        (["--seeds", "0:10000000000"], ["--seeds", "0:10000000000"]),
        (["--lr", "0"], ["--lr", "0"]),
        (["--methods", "flyp,lp", "--lp-c", "1"], ["--lr", "2", "--lp-c", "1"]),
        (["--id-test", "val"], ["--id-test", "val", "--eval-data", "odd"]),
        (["--seed", "4"], ["--seed"]),
        (["--devices", "cpu,cuda:99"], ["--devices", "cpu,cuda:99", "'cuda:99'"]),
        (["--devices", "cpu,"], ["--devices", "cpu,", "''"]),
        (["--name=mine"], ["--name=mine"]),
        (["--see", "4"], ["--seed", "--see"]),  # argparse takes abbreviations
        (["--model-stock", "--methods", "lp", "--lp-c", "1"], ["--model-stock", "lp"]),
        (["--anchor=1"], ["--anchor=1"]),
        (["--anchor-teacher", "trajectory"], ["--anchor-teacher"]),
        (["--tune", "logit-scale=7", "--logit-scale", "9"], ["--logit-scale"]),
        (["--tune", "wd=1,2"], ["--tune", "wd=1,2", "anchor", "logit-scale"]),
        (["--tune", "logit-scale=7,"], ["--tune logit-scale", "7,"]),
        (["--tune", "logit-scale=7,500"], ["--logit-scale", "500"]),
        (["--tune", "logit-scale=7", "--tune", "logit-scale=9"], ["--tune", "logit-scale=9"]),
        (["--methods", "flyp-anchor", "--tune", "anchor=3.5"], ["--tune", "anchor=3.5", "3.5"]),
        (["--methods", "flyp-anchor", "--tune", "anchor=0"], ["--tune anchor", "'0'"]),
        (["--methods", "flyp,lp-ft", "--tune", "anchor=1"], ["--tune", "anchor", "flyp,lp-ft"]),
        (
            ["--methods", "ce-anchor,ce", "--tune", "anchor=1", "--tune", "logit-scale=7,9"],
            ["--tune", "1", "2"],
        ),
        (["--model-stock", "--seeds", "3"], ["--model-stock", "--seeds", "3"]),
        (["--save-frequency", "0"], ["--save-frequency"]),
        (["--select", "best", "--eval-frequency=2"], ["--eval-frequency=2"]),
        (["--train-data", "nowhere"], ["nowhere"]),
        (["--pretrained", "nowhere.pt"], ["nowhere.pt"]),
        (["--eval-data", "val=nowhere"], ["--eval-data", "val", "nowhere"]),
        (["--templates", "nothing.txt"], ["nothing.txt"]),
    ],
)
def test_mistakes_are_one_sentence_before_anything_is_written(argv, tmp_path, monkeypatch, more, named):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=naming(*named)) as error:
        flyp(*argv(*more))
    assert "\n" not in str(error.value) and not os.listdir(tmp_path)


def test_flags_are_not_abbreviated_and_unknown_ones_go_to_training():
    parser = commands._parser("compare")
    args, rest = parser.parse_known_args(
        [*NEEDED, "--pre", "x", "--lr", "1", "--beta1", "-1", "--image-mean", "0", "1"]
    )
    assert rest == ["--pre", "x", "--beta1", "-1", "--image-mean", "0", "1"] and args.lr == "1"
    with pytest.raises(SystemExit):
        commands.call(["shards", "count", "data", "--beta1", "1"])


def test_help_opens_with_an_example_and_needs_no_torch():
    code = "import sys; from flyp_plugin import commands\ntry: commands.call(['compare', '--help'])\nfinally: assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert re.search(r"(?i)example.*\n+ +flyp compare --model ViT-B-16", done.stdout) and "0:3" in done.stdout
    defaults = commands._parser("compare").parse_args(NEEDED)
    assert all(text in done.stdout for text in TRIED.values()) and len(parse_methods(defaults.methods)) == 4
    assert len(parse_values(["flyp", "lp"], TRIED)) == 2


# Pure functions


def test_every_method_gets_equally_many_tries_with_tune():
    tune = grid.parse_tune(list(grid.METHODS), ["anchor=1,10", "logit-scale=7,50"])
    expected = dict.fromkeys(grid.METHODS, "anchor")
    expected |= {
        "flyp": "logit-scale",
        "ce": "logit-scale",
        "flyp-ce": "logit-scale",
        "lp": None,
        "lp-ft": None,
    }
    for method, flag in expected.items():
        own = grid.tuned(method)
        settings = grid.further(((own, 1.0),), [0.1, 1.0, 10.0], method, tune)
        values = tune[flag] if flag else []
        assert len(set(settings)) == 2 and grid.second(method, tune) == flag
        assert all(setting[0][0] == own for setting in settings)
        assert [setting for setting in settings if flag] == [((own, 1.0), (flag, value)) for value in values]
    reverse = dict(reversed(tune.items()))
    assert grid.second("flyp-anchor", reverse) == "logit-scale"  # the first in the order given
    assert grid.further((("lr", 1.0),), [1.0], "flyp", {}) == []


@pytest.mark.parametrize(
    ("chosen", "count", "expected"),
    [
        (1e-3, 2, [5.48e-4, 1.73e-3]),  # the geometric means with 3e-4 and 3e-3
        (3e-3, 2, [1.73e-3, 5.2e-3]),  # as if 9e-3 came next
        (3e-4, 2, [1.64e-4, 5.48e-4]),
        (1e-3, 1, [1.73e-3]),
        (3e-4, 1, [1.64e-4]),
        (1e-3, 3, [5.48e-4, 1.44e-3, 2.08e-3]),
    ],
)
def test_more_values_lie_around_the_best_one(chosen, count, expected):
    assert grid.refine([1e-3, 3e-4, 3e-3], chosen, count) == expected


def test_more_values_of_a_single_or_a_narrow_list_are_new():
    assert grid.refine([10.0], 10.0, 2) == [3.16, 31.6]
    assert len({1.0, 1.001, *grid.refine([1.0, 1.001], 1.0, 2)}) == 4


def test_ties_go_to_the_smaller_value_and_to_the_default():
    low, high, more = (("lr", 1.0),), (("lr", 2.0),), (("lr", 2.0), ("anchor", 1.0))
    assert grid.choose({high: 0.9, low: 0.9}, "top1") == low
    assert grid.choose({more: 0.9, low: 0.8, high: 0.9}, "top1") == high
    assert grid.choose({more: 0.9, low: 0.8, high: 0.9}, "loss") == low


def test_every_method_is_tuned_over_equally_many_values():
    texts = {"lr": "1e-5,1e-4", "lp-c": "1,10"}
    assert parse_values(["flyp", "lp", "ce"], texts) == {
        "flyp": [1e-5, 1e-4],
        "lp": [1, 10],
        "ce": [1e-5, 1e-4],
    }
    assert parse_values(["flyp"], {"lr": "1e-5", "lp-c": "1,10"}) == {"flyp": [1e-5]}
    with pytest.raises(InputError, match=naming("--lr", "1", "--lp-c", "2")):
        parse_values(["flyp", "lp"], {"lr": "1e-5", "lp-c": "1,10"})


@pytest.mark.parametrize(
    ("lr", "lp_c", "expected"),
    [
        (None, None, ("1e-6,3e-6,1e-5,3e-5", "1,10,100,1000")),
        ("1e-4", None, ("1e-4", "100")),
        (None, "5", ("1e-5", "5")),
        ("1e-5,1e-4", None, ("1e-5,1e-4", "10,100")),
        (None, "1,2,3", ("3e-6,1e-5,3e-5", "1,2,3")),
        ("1,2,3,4,5", None, ("1,2,3,4,5", "1,10,100,1000")),  # which parse_values refuses
        ("1e-4", "1,10", ("1e-4", "1,10")),
    ],
)
def test_values_that_are_not_given_are_as_many_as_the_others(lr, lp_c, expected):
    assert tuple(with_defaults({"lr": lr, "lp-c": lp_c}).values()) == expected


def test_parse_seeds_and_blocks():
    assert parse_seeds("2:5") == [2, 3, 4] and parse_seeds("7,1") == [7, 1] and parse_seeds("3") == [3]
    assert [block.title for block in parse_blocks(None, None)] == [""]
    blocks = parse_blocks("4,16", ["one.txt", "many.txt"])
    assert [block.prefix for block in blocks] == [
        "shots4_templates0_", "shots4_templates1_", "shots16_templates0_", "shots16_templates1_",
    ]  # fmt: skip
    assert blocks[3].title == "16 shots, templates many.txt"
    blocks = parse_blocks(None, ["one.txt"], ["a.json", "b.json", "a.json"])
    assert [block.prefix for block in blocks] == ["templates0_", "prompts0_", "prompts1_"]
    assert blocks[2].title == "prompts b.json"
    with pytest.raises(InputError, match=naming("--shots", "0")):
        parse_blocks("0,4", None)


def test_the_plan_counts_runs_and_each_run_has_its_own_flags(argv, monkeypatch, tmp_path):
    monkeypatch.setattr(compare.Comparison, "_checked", lambda self, *pair: None)
    args, rest = commands._parser("compare").parse_known_args(
        argv("--methods", "flyp,ce", "--shots", "4,16", "--templates", "{c}", "--eval-frequency", "1")
    )
    args.train_flags = rest
    comparison = compare.Comparison(args)
    assert comparison.counts == {"training": 2 * 2 * (2 + 1), "sweep": 2 * 2 * 2}
    words = ["--methods", "flyp,ce-trajectory,lp", "--tune", "anchor=1,2,3", "--tune", "logit-scale=7,8,9"]
    tuned_args, rest = commands._parser("compare").parse_known_args(
        argv(*words, "--model-stock", "--lp-c", "1,2")
    )
    tuned_args.train_flags = rest
    tuned = compare.Comparison(tuned_args)  # the teachers have sweeps of their own; lp is not merged
    assert tuned.counts == {"training": 3 * (2 + 3 + 1), "sweep": (3 + 1) * 2, "merge": 2}
    one = grid.Run(tuned.blocks[0], "ce-trajectory", (("lr", 1e-3), ("anchor", 2.0)), 1)
    assert one.name == "ce-trajectory_lr0.001_anchor2.0_seed1"
    flags = " ".join(tuned.flags(one))
    assert "--objective ce --anchor 2.0 --anchor-teacher trajectory --lr 0.001" in flags
    run = grid.Run(comparison.blocks[1], "ce", (("lr", 1e-3),), 1)
    assert comparison.folder(run) == Path("out/runs/shots16_templates0_ce_lr0.001_seed1")
    flags = " ".join(comparison.flags(run))
    for words in ("--shots 16 --shots-seed 1", "--templates {c}", "--objective ce --lr 0.001 --seed 1"):
        assert words in flags
    described = dataclasses.replace(run, block=parse_blocks(None, None, ["own.json"])[0])
    assert described.name == "prompts0_ce_lr0.001_seed1"
    assert "--prompts own.json" in " ".join(comparison.flags(described))
    assert flags.index("--eval-frequency 0") < flags.index(
        "--eval-frequency 1"
    )  # the user's comes last and wins


def test_the_best_value_is_chosen_and_ties_go_to_the_smallest():
    assert best({1e-4: 0.7, 1e-5: 0.9, 1e-3: 0.9, 1e-6: 0.1}) == 1e-5


def test_seconds_left_assumes_a_kind_not_run_yet_is_like_others():
    assert seconds_left({"training": [10, 20], "sweep": []}, {"training": 2, "sweep": 1}) == 45
    assert seconds_left({"training": [10, 20], "sweep": [1]}, {"training": 0, "sweep": 3}) == 3


def test_the_time_left_is_without_what_had_finished_before(tmp_path, caplog):
    caplog.set_level("INFO")
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    (old / "finished.json").write_text('{"seconds": 1000}')
    with run_jobs(tmp_path, {"training": 1}, 2, ["cpu"]) as jobs:
        jobs.run("training", "first", new, [sys.executable, "-c", "pass"], lambda: "fine")
        jobs.run("training", "second", old, [], str)
    assert says(caplog.text, "[1/2]", "first", "fine", "00:00 left")
    assert seconds_left({"training": [10]}, {"training": -1}) == 0  # finished, and not asked for


def test_a_command_sees_its_gpu_alone(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert one_gpu("cuda:1") == ({"CUDA_VISIBLE_DEVICES": "1"}, "cuda")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4, GPU-8a2b")
    assert one_gpu("cuda:1") == ({"CUDA_VISIBLE_DEVICES": "GPU-8a2b"}, "cuda")
    assert all(one_gpu(device) == ({}, device) for device in ("cpu", "cuda", "mps"))


def test_figure_is_scipys_interval():
    values = [0.7, 0.74, 0.71, 0.69]
    cell = plots.figure(values)
    low, high = stats.t.interval(0.95, 3, np.mean(values), stats.sem(values))
    assert cell["mean"] == pytest.approx(np.mean(values)) and cell["by_seed"] == values
    assert cell["half_width_95"] == pytest.approx((high - low) / 2, rel=1e-4)
    assert plots.figure([0.5])["half_width_95"] is None


def scored(id_, ood):
    return {"id": {"top1": id_, "n": 10, "ece": id_ / 10}, "ood": {"top1": ood, "n": 20, "ece": ood / 10}}


def method(value, *seeds):
    """Literal sweeps: for each seed the chosen alpha, and top-1 on id and ood at alpha 0, 0.5 and 1."""
    return {
        "tuned": "lr",
        "value": value,
        "chosen_by": "id/top1",
        "by_value": {1e-5: 0.1, 3e-5: 0.2, 1e-4: 0.3},
        "zero_shot": scored(0.5, 0.4),
        "seeds": {
            seed: {
                "epoch": 3 - seed,
                "chosen_alpha": chosen,
                "alphas": {a: scored(i, o) for a, i, o in zip(("0.00", "0.50", "1.00"), id_, ood)},
            }
            for seed, (chosen, id_, ood) in enumerate(seeds)
        },
    }  # fmt: skip


METHODS = {
    "flyp": method(1e-5, (0.5, (0.5, 0.8, 0.7), (0.4, 0.5, 0.3)), (1.0, (0.5, 0.6, 0.9), (0.4, 0.3, 0.5))),
    "ce": method(1e-4, (0.5, (0.5, 0.7, 0.6), (0.4, 0.5, 0.4)), (0.0, (0.5, 0.4, 0.7), (0.4, 0.3, 0.6))),
}


def record(methods, select="last", **blocks):
    table = plots.rows(methods, ["id"])
    less = plots.differences(table, list(methods))
    ece = plots.rows(methods, ["id"], "ece")
    block = {"title": "", "methods": methods, "rows": table, "ece": ece, "differences": less, **blocks}
    block["ece_differences"] = plots.differences(ece, list(methods))
    settings = {"model": "M", "pretrained": "P", "train_data": "D", "select": select, "tune": ["anchor=1,10"]}
    return {"settings": settings, "epochs": 3, "methods": ["flyp", "ce"], "seeds": [0, 1], "tries": (3, 0),
            "id_sets": ["id"], "blocks": [block]}  # fmt: skip


def test_differences_are_paired_by_seed_and_by_wiseft():
    less = record(METHODS)["blocks"][0]["differences"]
    assert list(less) == ["ce", "ce + WiSE-FT"]
    assert less["ce"]["id"]["by_seed"] == pytest.approx([-0.1, -0.2])
    assert less["ce"]["mean OOD"]["mean"] == pytest.approx(0.1)
    assert less["ce"]["mean OOD"]["half_width_95"] == pytest.approx(
        0, abs=1e-9
    )  # though each method's own is not
    assert less["ce + WiSE-FT"]["id"]["by_seed"] == pytest.approx([0.7 - 0.8, 0.5 - 0.9])


def test_document_shows_rates_at_list_ends_and_signs():
    lines = plots.document(record(METHODS)).splitlines()
    assert "| flyp | 80.0 ± 127.1 | 40.0 ± 127.1 | 40.0 ± 127.1 | lr 1e-05 (least tried) | 1 |" in lines
    assert (
        "| ce + WiSE-FT | 60.0 ± 127.1 | 45.0 ± 63.5 | 45.0 ± 63.5 | lr 0.0001 (most tried) | 0.25 |" in lines
    )
    assert any(line.startswith("| ce | -15.0 ± 63.5 | +10.0 ± 0.0 |") for line in lines)
    assert any(says(line, "`id`", "--id-test") for line in lines)


def test_document_says_what_model_stock_leaves_out():
    stocks = {"flyp": {"seeds": [0, 1], "sets": scored(0.9, 0.6)}, "ce": {"seeds": [1]}}
    methods = {name: {**METHODS[name], "model_stock": stock} for name, stock in stocks.items()}
    made = record({**methods, "lp": METHODS["ce"]})
    lines = plots.document(made).splitlines()
    assert "| flyp + Model Stock | 90.0 | 60.0 | 60.0 | lr 1e-05 (least tried) |  |" in lines
    assert not any(row in made["blocks"][0]["rows"] for row in ("ce + Model Stock", "lp + Model Stock"))
    assert "flyp + Model Stock" not in made["blocks"][0]["differences"]
    (note,) = (line for line in lines if line.startswith("Model Stock"))
    assert says(note, "no interval", "leaves out lp", "Of ce", "fewer than two") and "Of flyp" not in note


@pytest.mark.parametrize(
    ("select", "rule"),
    [
        ("last", ["last epoch (3)"]),
        ("best", ["highest top-1 on `id`", "0 (zero-shot) to 3", "on seed 0) and alpha (for"]),
        ("loss", ["lowest loss", "0 (zero-shot) to 3", "(by loss, on seed 0) and alpha (by top-1, for"]),
    ],
)
def test_document_states_the_rule_and_the_epochs_chosen(select, rule):
    text = plots.document(record(METHODS, select))
    assert all(words in text for words in rule)
    assert ("Epochs chosen, in the order of the seeds: flyp 3, 2; ce 3, 2." in text) == (select != "last")


def test_curve_and_star_are_means_over_seeds():
    curve = plots.curve(list(METHODS["flyp"]["seeds"].values()), ["id"])
    assert curve.across == pytest.approx([50, 70, 80]) and curve.up == pytest.approx([40, 40, 40])
    assert curve.star == pytest.approx((100 * (0.8 + 0.9) / 2, 100 * (0.5 + 0.5) / 2))
    alone = plots.curve(list(METHODS["flyp"]["seeds"].values()), ["id", "ood"])  # no OOD set: alpha is across
    assert alone.across == (0, 0.5, 1) and alone.star == pytest.approx((0.75, 50))


def test_a_panel_for_each_block(tmp_path):
    two = record(METHODS)
    two["blocks"] = [{**two["blocks"][0], "title": title} for title in ("4 shots", "16 shots")]
    plots.draw(two, tmp_path / "compare.png")
    assert PIL.Image.open(tmp_path / "compare.png").size == (1800, 675)
    assert plots.document(two).count("\n## ") == 2
