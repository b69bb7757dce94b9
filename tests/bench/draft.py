"""What --jpeg-draft costs in accuracy: the same runs with and without it, on icons rendered as large JPEGs.

    python tests/bench/draft.py --icons package [--seeds 5] [--out FOLDER]      # for package see icons.py

The 50 names that most sets have are the classes; half of the sets train, the other half test. A small ViT at 48 pixels
learns them with FLYP from random weights on JPEGs of 384 pixels, which a draft decodes at 48: the most that a draft does,
every line of an icon then went through the decoder's scaling alone. Scores are of test images decoded in full. Prints top-1 a seed, and the mean
difference with its 95 % interval (Student's t over the seeds).
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

from icons import icons, render
from scipy.stats import t

from flyp_plugin import shards

MODEL = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 48, "layers": 4, "width": 96, "patch_size": 8, "head_width": 24},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 4, "layers": 2},
}
CLASSES, PIXELS = 50, 384


def write(package: str, root: Path) -> None:
    by_name: dict[str, dict[str, str]] = defaultdict(dict)
    for icon in icons(package):
        by_name[icon.base].setdefault(icon.set, icon.svg)
    names = sorted(sorted(by_name), key=lambda name: -len(by_name[name]))[:CLASSES]
    sets = sorted({one for name in names for one in by_name[name]})
    test = set(random.Random(0).sample(sets, len(sets) // 2))
    with tempfile.TemporaryDirectory() as photos:
        for name in names:
            for one, svg in by_name[name].items():
                path = Path(photos, "test" if one in test else "train", name, f"{one}.jpg")
                path.parent.mkdir(parents=True, exist_ok=True)
                render(svg, PIXELS).save(path, quality=90)
        for split in ("train", "test"):
            shards.write(f"{photos}/{split}", str(root / "data" / split))
    (root / "icons-vit.json").write_text(json.dumps(MODEL))


def top1(root: Path, seed: int, *flags: str) -> float:
    name = "-".join([f"seed{seed}", *(flag.strip("-") for flag in flags)])
    results = root / "logs" / name / "checkpoints/results.jsonl"
    if not results.exists():
        command = [sys.executable, "-m", "flyp_plugin.train", "--model", "icons-vit"]
        command += ["--model-config", f"{root}/icons-vit.json", "--train-data", f"{root}/data"]
        command += ["--eval-data", f"test={root}/data", "--eval-frequency", "0", "--lr", "1e-3"]
        command += ["--batch-size", "128", "--epochs", "20", "--seed", str(seed), "--workers", "2"]
        command += ["--device", "cpu", "--logs", f"{root}/logs", "--name", name, *flags]
        subprocess.run(command, check=True, capture_output=True)
    return json.loads(results.read_text().splitlines()[-1])["test/top1"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--icons", required=True, metavar="FOLDER", help="the unpacked npm package")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="keep all there; finished runs are not run again")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root = args.out or Path(temporary)
        if not (root / "icons-vit.json").exists():
            write(args.icons, root)
        print("| seed | top-1 | with --jpeg-draft |\n|---|---|---|")
        differences = []
        for seed in range(args.seeds):
            plain, draft = top1(root, seed), top1(root, seed, "--jpeg-draft")
            differences.append(100 * (draft - plain))
            print(f"| {seed} | {100 * plain:.2f} | {100 * draft:.2f} |", flush=True)
    mean, half = statistics.mean(differences), float("nan")
    if len(differences) > 1:
        spread = statistics.stdev(differences) / len(differences) ** 0.5
        half = float(t.ppf(0.975, len(differences) - 1)) * spread
    print(f"\nDifference: {mean:+.2f} points, 95 % interval {mean - half:+.2f} to {mean + half:+.2f}")


if __name__ == "__main__":
    main()
