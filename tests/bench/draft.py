"""What --jpeg-draft costs in accuracy: the same runs with and without it, on icons rendered as large JPEGs.

    python tests/bench/draft.py --icons package [--seeds 5] [--out FOLDER]      # for package see icons.py

The 50 names that most sets have are the classes; half of the sets train, the other half test. A small ViT at 48 pixels
learns them on JPEGs of 384 pixels, decoded in full. From there it is trained on, with FLYP, with and without drafts, which
decode these at 48 pixels: the most that a draft does, every line of an icon then went through the decoder's scaling alone.
Scores are of test images decoded in full. Prints top-1 a seed, and the mean difference with its 95 % interval (Student's
t over the seeds).
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


def top1(root: Path, name: str, *flags: str) -> float:
    """Of a run, on the test images; a finished one is not run again."""
    results = root / "logs" / name / "checkpoints/results.jsonl"
    if not results.exists() or len(results.read_text().splitlines()) < 2:
        command = [sys.executable, "-m", "flyp_plugin.train", "--model", "icons-vit"]
        command += ["--model-config", f"{root}/icons-vit.json", "--train-data", f"{root}/data"]
        command += ["--eval-data", f"test={root}/data", "--eval-frequency", "0", "--batch-size", "128"]
        command += ["--device", "cpu", "--workers", "2", "--logs", f"{root}/logs", "--name", name]
        subprocess.run([*command, "--resume", "latest", *flags], check=True, capture_output=True)
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
        before = top1(root, "start", "--lr", "1e-3", "--epochs", "20")
        print(f"Start: {100 * before:.2f}\n\n| seed | top-1 | with --jpeg-draft |\n|---|---|---|")
        differences, start = [], root / "logs/start/checkpoints/epoch_20.pt"
        for seed in range(args.seeds):
            tune = ["--pretrained", str(start), "--lr", "3e-4", "--epochs", "10", "--seed", str(seed)]
            plain = top1(root, f"plain{seed}", *tune)
            draft = top1(root, f"draft{seed}", *tune, "--jpeg-draft")
            differences.append(100 * (draft - plain))
            print(f"| {seed} | {100 * plain:.2f} | {100 * draft:.2f} |", flush=True)
    mean, half = statistics.mean(differences), float("nan")
    if len(differences) > 1:
        spread = statistics.stdev(differences) / len(differences) ** 0.5
        half = float(t.ppf(0.975, len(differences) - 1)) * spread
    print(f"\nDifference: {mean:+.2f} points, 95 % interval {mean - half:+.2f} to {mean + half:+.2f}")


if __name__ == "__main__":
    main()
