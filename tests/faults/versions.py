"""The main job with other versions of Python and of what the plugin stands on, each in a fresh environment of its own.

    python -m tests.faults.versions [--open-clip-4 FOLDER] [--only N ...]

needs uv (`pip install uv`) and, on the PATH, Pythons 3.10 to 3.13. Of a combination, `MATRIX` names what is pinned; all
else is the newest that goes with it. `--open-clip-4` is a checkout of open_clip's development tree, left out without it.
Environments are made and removed in `--work` (default: a temporary folder): up to 12 GB, as torch comes with CUDA.
One combination of your own: --python 3.12 --pins torch==2.6.0 timm==1.0.20
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPO = Path(__file__).parents[2]
FILES = [f"tests/test_{name}.py" for name in ("train", "data", "objectives", "export")]
JOB = "plain_loop or each_key_once or resumed_run_equals or skipped or defaults or evaluation_sets or timm_reads"
WITH = ["pytest", "scikit-learn", "tensorboard", "requests", "matplotlib"]
DEVELOPMENT = "open_clip_torch 4"
# ordered by torch, whose packages are kept from one to the next
MATRIX = [
    ("3.13", ["torch==2.15.0", "open_clip_torch==3.3.0", "webdataset==0.2.86"]),
    ("3.12", ["torch==2.15.0", DEVELOPMENT, "webdataset==1.0.2"]),
    ("3.10", ["torch==2.14.1", "open_clip_torch==3.3.0", "webdataset==1.0.2", "timm==1.0.17"]),
    ("3.11", ["torch==2.14.1", "open_clip_torch==2.32.0", "webdataset==0.2.86"]),
    ("3.12", ["torch==2.14.1", "open_clip_torch==2.28.0", "webdataset==1.0.2"]),
    ("3.13", ["torch==2.6.0", DEVELOPMENT, "webdataset==0.2.86", "timm==1.0.17"]),
    ("3.10", ["torch==2.4.0", "open_clip_torch==2.28.0", "webdataset==0.2.86", "timm==1.0.17", "numpy<2"]),
    ("3.10", ["torch==2.1.0", "open_clip_torch==3.3.0", "webdataset==0.2.86", "timm==1.0.17", "numpy<2"]),
]
COLUMNS = ["torch", "open_clip_torch", "webdataset", "timm"]


def environment(folder: Path, python: str, pins: list[str], cache: Path) -> Path:
    """Make it anew, with the plugin and what its tests need, and return its interpreter."""
    env = {**os.environ, "UV_CACHE_DIR": str(cache), "UV_PYTHON_DOWNLOADS": "never"}
    overrides = folder.with_suffix(".txt")  # open_clip's own training extra wants an old webdataset
    overrides.write_text("\n".join(pin for pin in pins if pin.startswith("webdataset")))
    made = ["uv", "pip", "install", "-q", "--python", str(folder), "--overrides", str(overrides)]
    subprocess.run(["uv", "venv", "-q", "--clear", "--python", python, str(folder)], env=env, check=True)
    subprocess.run([*made, "-e", f"{REPO}[train]", *WITH, *pins], env=env, check=True)
    return folder / "bin" / "python"


def tried(python: Path) -> tuple[dict[str, str], int, int, str]:
    """What is installed there, how many tests of the main job passed and failed, and what the first failure said."""
    listed = subprocess.run(
        ["uv", "pip", "list", "-q", "--format", "json", "--python", str(python)],
        capture_output=True,
        text=True,
        check=True,
    )
    installed = {p["name"].replace("-", "_"): p["version"] for p in json.loads(listed.stdout)}
    command = [str(python), "-m", "pytest", *FILES, "-k", JOB, "--tb=line", "-p", "no:cacheprovider"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=REPO, env=env, capture_output=True, text=True, check=False)
    last = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else done.stderr.strip()[-300:]
    numbers = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|error|skipped)", last)}
    failed = numbers.get("failed", 0) + numbers.get("error", 0) + (not numbers)
    first = re.search(r"^(?:FAILED|ERROR) tests/\S+?::(.*)", done.stdout, re.MULTILINE)
    what = first[1] if first else "" if numbers else last
    if numbers.get("skipped"):
        what = what or f"{numbers['skipped']} skipped, of what that open_clip cannot do"
    if failed:
        (Path(tempfile.gettempdir()) / "versions-failed.log").write_text(done.stdout + done.stderr)
    return installed, numbers.get("passed", 0), failed, what


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--open-clip-4", metavar="FOLDER", type=Path, help="its development tree")
    parser.add_argument("--only", metavar="N", nargs="+", type=int, help="these of MATRIX, counted from 0")
    parser.add_argument(
        "--work", metavar="DIR", help="where environments are made (default: a temporary one)"
    )
    parser.add_argument("--python", help="with --pins: one combination")
    parser.add_argument("--pins", nargs="+", default=[])
    args = parser.parse_args()
    chosen = [(args.python, args.pins)] if args.python else MATRIX
    if args.only is not None:
        chosen = [MATRIX[i] for i in args.only]
    rows, bad, torch_before = [], 0, ""
    with tempfile.TemporaryDirectory(dir=args.work) as work:
        cache = Path(work, "cache")
        for python, pins in chosen:
            if DEVELOPMENT in pins and not args.open_clip_4:
                rows.append([python, *pins[:1], DEVELOPMENT, *[""] * 5, "no --open-clip-4: left out"])
                continue
            if pins[0] != torch_before:
                shutil.rmtree(cache, ignore_errors=True)
            torch_before, start = pins[0], time.monotonic()
            there = [f"open_clip_torch @ {args.open_clip_4.resolve().as_uri()}" if pin == DEVELOPMENT else pin
                     for pin in pins]  # fmt: skip
            folder = Path(work, "env")
            try:
                installed, passed, failed, what = tried(environment(folder, python, there, cache))
                pixels = f"{installed['pillow']} / {installed['numpy']}"
                row = [python, *(installed[name] for name in COLUMNS), pixels, passed, failed, what]
            except subprocess.CalledProcessError:
                failed = 1
                row = [python, *pins[:3], *[""] * 2, 0, 1, "could not be installed"]
            bad += failed
            rows.append(row)
            print(f"{time.monotonic() - start:.0f} s:", *row, file=sys.stderr)
            shutil.rmtree(folder, ignore_errors=True)
    head = ["python", *COLUMNS, "pillow / numpy", "passed", "failed", "what"]
    for row in (head, ["---"] * len(head), *rows):
        print("|", " | ".join(map(str, row)), "|")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
