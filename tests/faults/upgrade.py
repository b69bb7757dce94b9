"""Runs that are begun with one version of the plugin, or of open_clip, and resumed with another; old checkpoints read today.

    python -m tests.faults.upgrade [--open-clip-4 FOLDER]

Of each pair: a run of two epochs with the first version, the same with the second, and one whose first epoch is the first
version's and whose second epoch, by --resume latest, the second's. All start from the same weights. Earlier plugins are
commits of this repository, other open_clips are installed beside the one that is there (pip, --no-deps).
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import open_clip
import torch

from flyp_plugin.checkpoints import read_state_dict
from tests import digits

REPO = Path(__file__).parents[2]
FIRST = "58e2170"  # the first whose train_flyp.py trains
HEADS = "402a7ab"  # the first with learned heads
OLDER = ["2.28.0", "2.32.0"]


class Place:
    """Where runs of one version of everything are made: `paths` go in front of what is installed."""

    def __init__(self, name: str, *paths: Path):
        self.name, self.paths = name, paths

    def call(self, module: str, *flags: object) -> str:
        """Its stdout and stderr; raises an error that shows the last lines."""
        command = [sys.executable, "-m", module, *map(str, flags)]
        path = os.pathsep.join(map(str, self.paths))
        done = subprocess.run(
            command, cwd=tempfile.gettempdir(), env={**os.environ, "PYTHONPATH": path},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"{self.name}: {(done.stderr or done.stdout).strip()[-500:]}")
        return done.stdout + done.stderr


def train(place: Place, data: Path, logs: Path, name: str, *flags: object) -> Path:
    """Train for two epochs, or on to the second, and return the run's folder."""
    argv = ["--model", "digits-vit", "--model-config", data / "digits-vit.json", "--train-data", data]
    argv += ["--pretrained", data / "start.pt", "--eval-data", f"val={data}", "--logs", logs, "--name", name]
    argv += ["--device", "cpu", "--workers", 1, "--lr", "1e-3", "--batch-size", 100, "--epochs", 2]
    place.call("flyp_plugin.train", *argv, *flags)
    return logs / name


def difference(one: Path, other: Path) -> str:
    """`equal`, or the largest difference of a weight."""
    a, b = (read_state_dict(folder / "checkpoints" / "epoch_2.pt") for folder in (one, other))
    if a.keys() != b.keys():
        return f"other tensors: {sorted(a.keys() ^ b.keys())[:3]}"
    most = max((a[key].double() - b[key].double()).abs().max().item() for key in a)
    return f"{most:.0e}" if most else "equal"


def epochs(folder: Path) -> list[int]:
    lines = (folder / "checkpoints" / "results.jsonl").read_text().splitlines()
    return [json.loads(line)["epoch"] for line in lines]


def resumed(first: Place, second: Place, data: Path, logs: Path, *flags: object) -> list[object]:
    """One row of the table."""
    row: list[object] = [first.name, second.name, " ".join(map(str, flags)) or "FLYP"]
    try:
        whole = train(first, data, logs, "first", *flags)
        (logs / "resumed").mkdir()
        shutil.copytree(whole, logs / "resumed", dirs_exist_ok=True)
        (logs / "resumed" / "checkpoints" / "epoch_2.pt").unlink()
        lines = logs / "resumed" / "checkpoints" / "results.jsonl"
        lines.write_text("".join(lines.read_text().splitlines(True)[:2]))
        on = train(second, data, logs, "resumed", *flags, "--resume", "latest")
        alone = train(second, data, logs, "second", *flags)
        seen = f"epochs {epochs(on)}" + ("" if epochs(on) == [0, 1, 2] else "!")
        return [*row, 1, int(seen[-1] != "!"), difference(on, whole), difference(on, alone), seen]
    except RuntimeError as error:
        return [*row, 1, 0, "", "", str(error).splitlines()[-1][:300]]


def read_today(first: Place, second: Place, data: Path, run: Path, out: Path) -> list[object]:
    """`flyp eval` of an old run's checkpoint with a learned head, by both plugins."""
    tables, row = [], [first.name, second.name, "flyp eval of its learned head", 1]
    for place in (first, second):
        table = out / f"{len(tables)}.csv"
        argv = ["eval", run / "checkpoints" / "epoch_1.pt", "--model", "digits-vit", "--model-config",
                data / "digits-vit.json", "--eval-data", f"val={data}", "--device", "cpu"]  # fmt: skip
        try:
            place.call("flyp_plugin", *argv, "--predictions", table)
        except RuntimeError as error:
            return [*row, 0, "", "", str(error).splitlines()[-1][:300]]
        tables.append(table.read_text().splitlines())
    same = tables[0] == tables[1]
    return [*row, int(same), "", "", f"{len(tables[1]) - 1} predictions {'equal' if same else 'differ'}"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--open-clip-4", metavar="FOLDER", type=Path, help="its development tree")
    parser.add_argument("--only", metavar="N", nargs="+", type=int, help="these pairs, counted from 0")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        data = digits.write(root / "data")
        open_clip.add_model_config(data / "digits-vit.json")
        torch.manual_seed(0)
        torch.save(open_clip.create_model("digits-vit").state_dict(), data / "start.pt")
        here = version("open_clip_torch")
        now = Place("this plugin", REPO)
        plain = Place(f"open_clip {here}", REPO)
        plugins, rows = {}, []
        for commit in (FIRST, HEADS):
            archive = subprocess.run(
                ["git", "archive", commit, "flyp_plugin"], cwd=REPO, capture_output=True, check=True
            )
            (root / commit).mkdir()
            subprocess.run(["tar", "x", "-C", str(root / commit)], input=archive.stdout, check=True)
            plugins[commit] = Place(f"plugin {commit}", root / commit)
        pairs = [(plugins[FIRST], now, []), (plugins[HEADS], now, ["--objective", "ce"])]
        for number in OLDER:
            target = root / number
            install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(target)]
            subprocess.run([*install, f"open_clip_torch=={number}"], check=True)
            pairs.append((Place(f"open_clip {number}", REPO, target), plain, []))
        pairs.append((plain, pairs[-1][0], []))
        if args.open_clip_4:
            pairs.append((plain, Place("open_clip 4", REPO, args.open_clip_4.resolve() / "src"), []))
        for i, (first, second, flags) in enumerate(pairs):
            if args.only is not None and i not in args.only:
                continue
            logs = root / f"logs{i}"
            logs.mkdir()
            rows.append(resumed(first, second, data, logs, *flags))
            print(*rows[-1], file=sys.stderr)
            if flags:
                rows.append(read_today(first, second, data, logs / "first", logs))
    head = ["begun with", "resumed with", "what", "times", "survived", "to the first alone", "to the second alone", "what is seen"]  # fmt: skip
    for row in (head, ["---"] * len(head), *rows):
        print("|", " | ".join(map(str, row)), "|")
    return any(not row[4] for row in rows)


if __name__ == "__main__":
    sys.exit(main())
