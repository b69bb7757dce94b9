"""Whether the methods gain more where pretraining has seldom seen the name of a class: reads icon_shift.py's `main`.

    python tests/bench/icon_names.py          # 8 minutes on two busy cores, after `icon_shift.py compare main`

Classes are ranked by the number of pretraining's captions that hold their name, as whole words, and cut into thirds. Of
each third: top-1 in %, zero-shot, and of each method + WiSE-FT (the merged weights that `flyp compare` has chosen) the
points above zero-shot, mean over seeds with half of its 95 % interval. Predictions are `flyp eval`'s.
"""

import csv
import json
import re
import subprocess
import sys
import tarfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

from flyp_plugin.commands.plots import figure, percent

CACHE = Path("~/.cache/flyp-icons").expanduser()
MAIN = CACHE / "compare8/main"
ID, OOD = ["id"], ["filled", "pixel", "emoji", "colour"]


def times_seen(names: list[str]) -> list[int]:
    """How many captions hold each name."""
    most, seen, wanted = max(len(name.split()) for name in names), Counter(), set(names)
    for path in sorted((CACHE / "captions").glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".txt"):
                    words = re.findall(r"\w+", tar.extractfile(member).read().decode().lower())
                    runs = {" ".join(words[i : i + n]) for n in range(1, most + 1) for i in range(len(words))}
                    seen.update(runs & wanted)
    return [seen[name] for name in names]


def hits(weights: Path, table: Path) -> Iterator[tuple[str, int, bool]]:
    """Set, label and whether it was found, of each image."""
    if not table.exists():
        command = ["eval", str(weights), "--model", "icon-clip", "--model-config", f"{CACHE}/icon-clip.json"]
        for name in (*ID, *OOD):
            command += ["--eval-data", f"{name}={CACHE / name}"]
        command += ["--device", "cpu", "--precision", "amp_bf16", "--predictions", str(table)]
        subprocess.run([sys.executable, "-m", "flyp_plugin", *command], check=True, stdout=sys.stderr)
    with table.open(newline="") as lines:
        for row in csv.DictReader(lines):
            yield row["set"], int(row["label"]), row["label"] == row["prediction"]


def accuracy(weights: Path, table: Path, third_of: list[int]) -> dict[tuple[str, int], float]:
    """By ID or mean OOD, and third."""
    found = defaultdict(list)
    for name, label, hit in hits(weights, table):
        found[name, third_of[label]].append(hit)
    mean = {of: sum(some) / len(some) for of, some in found.items()}
    return {
        (title, third): sum(mean[name, third] for name in names) / len(names)
        for title, names in (("ID", ID), ("OOD", OOD))
        for third in range(3)
    }


def main() -> None:
    names = (CACHE / "id/classnames.txt").read_text().splitlines()
    counts = times_seen(names)
    ranked = sorted(range(len(names)), key=counts.__getitem__)
    third_of = [ranked.index(number) * 3 // len(names) for number in range(len(names))]
    record = json.loads((MAIN / "compare.json").read_text())["blocks"][0]["methods"]
    pretrained = accuracy(CACHE / "logs/pretrain8/checkpoints/epoch_8.pt", MAIN / "zero-shot.csv", third_of)
    cells = list(pretrained)
    lines = {"zero-shot": [f"{100 * pretrained[cell]:.1f}" for cell in cells]}
    for method, about in record.items():
        gains = []
        for of in about["seeds"].values():
            merged = Path(of["folder"], "wiseft")
            (weights,) = merged.glob("*.pt")
            gains.append(accuracy(weights, merged / "predictions.csv", third_of))
        gained = ([gain[cell] - pretrained[cell] for gain in gains] for cell in cells)
        lines[f"{method} + WiSE-FT"] = [percent(figure(some), "+") for some in gained]
    for third in range(3):
        some = sorted(counts[number] for number in ranked if third_of[number] == third)
        print(f"third {third + 1}: {len(some)} classes whose names are in {some[0]} to {some[-1]} captions")
    print("| |", " | ".join(f"{title}, third {third + 1}" for title, third in cells), "|")
    print("|---" * (len(cells) + 1) + "|")
    for title, line in lines.items():
        print(f"| {title} | {' | '.join(line)} |")


if __name__ == "__main__":
    main()
