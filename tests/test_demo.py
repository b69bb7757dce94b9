"""All of `flyp demo`, with one epoch of each training: what it writes, what it prints, how it resumes."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from flyp_plugin import commands, flags, openclip
from flyp_plugin.commands import demo
from flyp_plugin.errors import InputError

REPO = Path(__file__).parents[1]
SHORT = ("--pretrain-epochs", "1", "--epochs", "1")


def run(folder, *argv):
    command = [sys.executable, str(REPO / "train_flyp.py"), "--demo", *SHORT, *argv]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPO), *sys.path])}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stderr


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("here")
    return folder, run(folder)


def test_it_writes_only_to_its_folder(finished):
    folder, _ = finished
    assert [path.name for path in folder.iterdir()] == ["flyp-demo"]
    assert (folder / "flyp-demo/logs/flyp/wiseft/frontier.png").exists()
    assert (folder / "flyp-demo/classifier/model.safetensors").exists()
    assert not list(folder.rglob("*.part"))


def test_it_ends_with_the_table_and_timm_agrees(finished):
    folder, printed = finished
    lines = printed.partition("== Done\n")[2].splitlines()
    sweep = json.loads((folder / "flyp-demo/logs/flyp/wiseft/wiseft.json").read_text())
    assert [line[:9].strip() for line in lines[1:4]] == ["zero-shot", "FLYP", "FLYP + Wi"]
    for line, alpha in zip(lines[1:], ("0.00", "1.00", f"{sweep['chosen_alpha']:.2f}")):
        figures = [float(cell.split()[0]) for cell in line[27:].split("]") if cell.strip()]
        exact = [100 * sweep["alphas"][alpha][name]["top1"] for name in demo.SETS]
        assert [figures[0], *figures[2:]] == pytest.approx(exact, abs=0.051)
    merged = lines[3].split("]")[1].split()[0]
    with_timm = re.search(r"has top-1 ([\d.]+) on ID test\.$", lines[5])[1]
    # the logits are equal up to rounding: of 497 images, one may be a tie
    assert abs(float(with_timm) - float(merged)) <= 0.3


def test_each_step_prints_a_command_that_parses(finished):
    lines = [shlex.split(line.partition(" > ")[0]) for line in finished[1].splitlines() if line[:3] == "   "]
    steps = [words for words in lines if words[0] == "flyp"]
    assert [" ".join(words[1:3]) for words in steps[:6]] == ["shards write"] * 6
    after = ["train", "train", "wiseft", "eval", "eval", "eval", "export"]
    assert [words[1] for words in steps[6:]] == after
    for words in steps:
        if words[1] == "train":
            openclip.parse_args(flags.parser().parse_known_args(words[2:])[1])
        else:
            commands._parser(words[1]).parse_args(words[1:])


def test_training_shows_each_epoch_and_little_else(finished):
    folder, printed = finished
    assert len(re.findall(r"^epoch [01] .*top-1", printed, re.MULTILINE)) == 4  # two trainings
    assert "Start epoch 0" not in printed
    for name in ("pretrain", "flyp"):
        assert "Start epoch 0" in (folder / f"flyp-demo/logs/{name}/out.log").read_text()


def test_a_second_start_runs_only_what_is_missing(finished):
    folder, first = finished
    root = folder / "flyp-demo"
    before = (root / "logs/flyp/checkpoints/epoch_1.pt").stat().st_mtime_ns
    (root / "logs/flyp/wiseft/frontier.png").unlink()
    second = run(folder)
    assert second.count("already exists") == 12 and "flyp wiseft" in second
    assert (root / "logs/flyp/wiseft/frontier.png").exists()
    assert (root / "logs/flyp/checkpoints/epoch_1.pt").stat().st_mtime_ns == before
    assert second.partition("== Done")[2] == first.partition("== Done")[2]


def test_it_refuses_another_demos_or_any_other_folder(finished, tmp_path):
    with pytest.raises(InputError, match=r"epochs 1\b.*2.*--demo-dir"):
        commands.call(
            ["demo", "--demo-dir", str(finished[0] / "flyp-demo"), "--pretrain-epochs", "1", "--epochs", "2"]
        )
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(InputError, match=rf"{tmp_path} .*--demo-dir"):
        commands.call(["demo", "--demo-dir", str(tmp_path)])
    with pytest.raises(InputError, match="thesis.tex"):
        commands.call(["demo", "--demo-dir", str(tmp_path / "thesis.tex" / "demo")])
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
