"""`flyp demo`, whole, with one epoch of each training: what it writes, what it says, how it goes on."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from scipy.stats import binomtest

from flyp_plugin import commands, flags, openclip
from flyp_plugin.commands import demo
from flyp_plugin.errors import InputError

REPO = Path(__file__).parents[1]
SHORT = ("--pretrain-epochs", "1", "--epochs", "1")


def run(folder, *argv):
    command = [sys.executable, str(REPO / "train_flyp.py"), "--demo", *SHORT, *argv]
    env = {**os.environ, "PYTHONPATH": str(REPO)}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stderr


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("here")
    return folder, run(folder)


def test_all_that_it_writes_is_in_its_folder(finished):
    folder, _ = finished
    assert [path.name for path in folder.iterdir()] == ["flyp-demo"]
    assert (folder / "flyp-demo/logs/flyp/wiseft/frontier.png").exists()
    assert (folder / "flyp-demo/classifier/model.safetensors").exists()
    assert not list(folder.rglob("*.part"))


def test_it_ends_with_the_table_and_the_classifier_read_back(finished):
    folder, said = finished
    said = said.partition("== Done\n")[2].splitlines()
    record = json.loads((folder / "flyp-demo/logs/flyp/wiseft/wiseft.json").read_text())
    assert [line[:9].strip() for line in said[1:4]] == ["zero-shot", "FLYP", "FLYP + Wi"]
    for line, alpha in zip(said[1:], ("0.00", "1.00", f"{record['chosen_alpha']:.2f}")):
        figures = [float(cell.split()[0]) for cell in line[27:].split("]") if cell.strip()]
        exact = [100 * record["alphas"][alpha][name]["top1"] for name in demo.SETS]
        assert [figures[0], *figures[2:]] == pytest.approx(exact, abs=0.051)
    of_test = said[3].split("]")[1].split()[0]
    of_twin = re.search(r"has top-1 ([\d.]+) on ID test\.$", said[5])[1]
    assert (
        abs(float(of_twin) - float(of_test)) <= 0.3
    )  # timm's logits are equal to rounding: of 497 one may be a tie


def test_each_step_says_the_command_that_it_runs(finished):
    lines = [shlex.split(line.partition(" > ")[0]) for line in finished[1].splitlines() if line[:3] == "   "]
    commands = [words for words in lines if words[0] == "flyp"]
    assert [" ".join(words[1:3]) for words in commands[:5]] == ["shards write"] * 5
    assert [words[1] for words in commands[5:]] == ["train", "wiseft", "eval", "eval", "eval", "export"]
    for words in commands:
        if words[1] == "train":
            openclip.parse_args(flags.parser().parse_known_args(words[2:])[1])
        else:
            commands._parser(words[1]).parse_args(words[1:])


def test_a_second_start_runs_what_is_missing_alone(finished):
    folder, first = finished
    root = folder / "flyp-demo"
    before = (root / "logs/flyp/checkpoints/epoch_1.pt").stat().st_mtime_ns
    (root / "logs/flyp/wiseft/frontier.png").unlink()
    second = run(folder)
    assert second.count("is there") == 11 and "flyp wiseft" in second
    assert (root / "logs/flyp/wiseft/frontier.png").exists()
    assert (root / "logs/flyp/checkpoints/epoch_1.pt").stat().st_mtime_ns == before
    assert second.partition("== Done")[2] == first.partition("== Done")[2]


def test_another_demos_or_somebody_elses_folder_is_left_alone(finished, tmp_path):
    with pytest.raises(InputError, match="was begun with epochs 1 and not 2; give another --demo-dir"):
        commands.call(
            ["demo", "--demo-dir", str(finished[0] / "flyp-demo"), "--pretrain-epochs", "1", "--epochs", "2"]
        )
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(InputError, match="holds something else; give another --demo-dir"):
        commands.call(["demo", "--demo-dir", str(tmp_path)])
    with pytest.raises(InputError, match="cannot be written to"):
        commands.call(["demo", "--demo-dir", str(tmp_path / "thesis.tex" / "demo")])
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_the_interval_is_wilsons():
    low, high = binomtest(277, 300).proportion_ci(method="wilson")
    assert demo._interval(277 / 300, 300) == f"92.3 [{100 * low:.1f}, {100 * high:.1f}]"
