"""Other versions of Python, torch and open_clip, older versions of the plugin, and an open_clip whose insides have changed.

    python -m tests.faults.versions matrix [--open-clip-4 FOLDER]     # the main job in fresh environments
    python -m tests.faults.versions upgrade [--open-clip-4 FOLDER]    # begun with one version, resumed with another
    python -m tests.faults.versions changes                           # functions that the plugin replaces are changed

matrix needs uv (`pip install uv`) and, on the PATH, Pythons 3.10 to 3.13. `MATRIX` names what is pinned; all else is the
newest that goes with it. Environments are made and removed in `--work` (default: a temporary folder): up to 12 GB, as
torch comes with CUDA. One combination of your own: --python 3.12 --pins torch==2.6.0 timm==1.0.20

upgrade makes three runs of each pair: two epochs with the first version, the same with the second, and one whose first
epoch is the first version's and whose second epoch, by --resume latest, the second's. All start from the same weights.
Earlier plugins are commits of this repository; other open_clips are installed beside the one in use (pip, --no-deps).

changes simulates each change in the installed open_clip_train, one at a time, and starts a small run. Survived: one
sentence that names open_clip's version and the supported ones, no traceback, nothing trained without the plugin, and
open_clip_train as it was afterwards.
"""

import argparse
import contextlib
import io
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import open_clip
import torch
from pytest import MonkeyPatch

from flyp_plugin import openclip
from flyp_plugin.checkpoints import read_state_dict
from flyp_plugin.errors import run
from flyp_plugin.train import train
from tests import digits

REPO = Path(__file__).parents[2]


def print_table(head: list[str], rows: Iterable[list[object]]) -> None:
    for row in (head, ["---"] * len(head), *rows):
        print("|", " | ".join(map(str, row)), "|")


# matrix

FILES = [f"tests/test_{name}.py" for name in ("train", "data", "objectives", "export", "fsdp")]
JOB = "plain_loop or each_key_once or resumed_run_equals or skipped or defaults or evaluation_sets or timm_reads"
JOB += " or fsdp_equals or an_uninterrupted_one or joined or compiling"
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


def matrix(args: Namespace) -> int:
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
    print_table(head, rows)
    return bool(bad)


# upgrade

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


def train_by(place: Place, data: Path, logs: Path, name: str, *flags: object) -> Path:
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
        whole = train_by(first, data, logs, "first", *flags)
        (logs / "resumed").mkdir()
        shutil.copytree(whole, logs / "resumed", dirs_exist_ok=True)
        (logs / "resumed" / "checkpoints" / "epoch_2.pt").unlink()
        lines = logs / "resumed" / "checkpoints" / "results.jsonl"
        lines.write_text("".join(lines.read_text().splitlines(True)[:2]))
        on = train_by(second, data, logs, "resumed", *flags, "--resume", "latest")
        alone = train_by(second, data, logs, "second", *flags)
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
            place.call(
                "flyp_plugin.cli" if (place.paths[0] / "flyp_plugin/cli.py").exists() else "flyp_plugin",
                *argv,
                "--predictions",
                table,
            )
        except RuntimeError as error:
            return [*row, 0, "", "", str(error).splitlines()[-1][:300]]
        tables.append(table.read_text().splitlines())
    same = tables[0] == tables[1]
    return [*row, int(same), "", "", f"{len(tables[1]) - 1} predictions {'equal' if same else 'differ'}"]


def upgrade(args: Namespace) -> int:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        data = digits.write(root / "data")
        open_clip.add_model_config(data / "digits-vit.json")
        torch.manual_seed(0)
        torch.save(open_clip.create_model("digits-vit").state_dict(), data / "start.pt")
        here = open_clip.__version__
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
    print_table(head, rows)
    return any(not row[4] for row in rows)


# changes

REPLACED = {name: place[0] for name, place in openclip.SEAMS.items()}


def module(name: str) -> Any:
    return import_module(f"open_clip_train.{name}")


def gone(place: str, name: str) -> Callable[[MonkeyPatch], None]:
    return lambda patch: patch.delattr(module(place), name)


def module_gone(name: str) -> Callable[[MonkeyPatch], None]:
    return lambda patch: patch.setitem(sys.modules, f"open_clip_train.{name}", None)


def becomes(place: str, name: str, made: Callable[[Callable], Callable]) -> Callable[[MonkeyPatch], None]:
    """`made` from the function that it was."""
    return lambda patch: patch.setattr(module(place), name, made(getattr(module(place), name)))


def passed_by(name: str) -> Callable[[MonkeyPatch], None]:
    """main() calls a copy of its own in place of the function of this name."""

    def change(patch: MonkeyPatch) -> None:
        main = module("main")
        code = main.main.__code__
        names = tuple(f"_{name}" if other == name else other for other in code.co_names)
        patch.setattr(main, f"_{name}", getattr(main, name), raising=False)
        patch.setattr(main.main, "__code__", code.replace(co_names=names))

    return change


def called_with(name: str, change: Callable[..., tuple[tuple, dict]]) -> Callable[[MonkeyPatch], None]:
    """main() calls the function of this name otherwise: `change` gives the new arguments and keywords."""

    def changed(patch: MonkeyPatch) -> None:
        main = module("main")
        passed_by(name)(patch)

        def call(*args: Any, **kwargs: Any) -> Any:
            new, words = change(*args, **kwargs)
            return getattr(main, name)(*new, **words)

        patch.setattr(main, f"_{name}", call)

    return changed


CHANGES: dict[str, Callable[[MonkeyPatch], None]] = {
    **{f"{place}.{name} is gone": gone(place, name) for name, place in REPLACED.items()},
    "params.parse_args is gone": gone("params", "parse_args"),
    "distributed.is_using_distributed is gone": gone("distributed", "is_using_distributed"),
    "data.DataInfo is gone": gone("data", "DataInfo"),
    "main.main is gone": gone("main", "main"),
    "the module train is gone": module_gone("train"),
    "the module main is gone": module_gone("main"),
    "train_one_epoch without epoch and state": becomes(
        "main", "train_one_epoch", lambda was: lambda model, data, loss, optimizer, args: None
    ),
    "get_data without tokenizer": becomes(
        "main", "get_data", lambda was: lambda args, preprocess_fns, epoch=0: was(args, preprocess_fns, epoch)
    ),
    "create_model_and_transforms takes a configuration": becomes(
        "main", "create_model_and_transforms", lambda was: lambda config: was(config.model)
    ),
    "evaluate takes a state": becomes("main", "evaluate", lambda was: lambda state, data, args: {}),
    "evaluate logs no zero-shot metrics": becomes("main", "evaluate", lambda was: lambda *args, **kwargs: {}),
    "zero_shot_eval takes two": becomes("train", "zero_shot_eval", lambda was: lambda model, data: {}),
    **{
        f"main() no longer calls {name}": passed_by(name)
        for name, place in REPLACED.items()
        if place == "main" and name != "get_data"  # open_clip's own then fails on our --train-data by itself
    },
    "main() calls train_one_epoch without data": called_with(
        "train_one_epoch", lambda model, data, *more, **words: ((model, {}, *more), words)
    ),
}  # fmt: skip


@contextlib.contextmanager
def changed(name: str) -> Iterator[None]:
    with MonkeyPatch.context() as patch:
        CHANGES[name](patch)
        yield


def started(data: Path, logs: Path) -> tuple[int, str]:
    """Exit status and what was written to stderr by a run of one epoch, evaluated."""
    argv = ["--model", "digits-vit", "--model-config", f"{data}/digits-vit.json", "--train-data", f"{data}"]
    argv += ["--eval-data", f"val={data}/test/0.tar", "--logs", f"{logs}", "--name", "run", "--device", "cpu"]
    argv += ["--workers", "0", "--epochs", "1", "--batch-size", "50", "--train-num-samples", "100"]
    written = io.StringIO()
    with contextlib.redirect_stderr(written):
        try:
            run(lambda: train(argv))
        except SystemExit as left:
            status = int(left.code or 0)
        except Exception as error:  # noqa: BLE001 (what a user would see as a traceback)
            status = -1
            written.write(f"Traceback: {error!r}")
    return status, written.getvalue()


def verdict(status: int, written: str) -> str | None:
    """What is wrong with how a run ended that could not be; None: nothing."""
    last = written.strip().splitlines()[-1] if written.strip() else ""
    if "Traceback" in written:
        return f"a traceback: {last}"
    if status != 1:
        return f"status {status}"
    here = re.escape(f"open_clip_torch {open_clip.__version__} ")
    if not re.fullmatch(rf"Error: {here}.*{re.escape(openclip.SUPPORTED)}.*", last):
        return f"another sentence: {last}"
    return None


def state() -> list[object]:
    return [getattr(module(place), name) for name, place in REPLACED.items()]


def changes(args: Namespace) -> int:
    rows, bad = [], 0
    with tempfile.TemporaryDirectory() as folder:
        data = digits.write(Path(folder, "data"))
        logging.disable(logging.INFO)
        for i, name in enumerate(CHANGES):
            before = state()
            with changed(name):
                status, written = started(data, Path(folder, str(i)))
            wrong = verdict(status, written)
            if state() != before:
                wrong = "open_clip_train is not as it was"
            bad += bool(wrong)
            seen = wrong or written.strip().splitlines()[-1].removeprefix("Error: ")
            rows.append([name, 1, int(not wrong), seen])
    print_table(["fault", "times", "survived", "what is seen"], rows)
    return bool(bad)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=["matrix", "upgrade", "changes"])
    parser.add_argument(
        "--open-clip-4", metavar="FOLDER", type=Path, help="a checkout of its development tree"
    )
    parser.add_argument(
        "--only", metavar="N", nargs="+", type=int, help="these rows of the table, counted from 0"
    )
    parser.add_argument("--work", metavar="DIR", help="matrix: where environments are made")
    parser.add_argument("--python", help="matrix, with --pins: one combination")
    parser.add_argument("--pins", nargs="+", default=[])
    args = parser.parse_args()
    return {"matrix": matrix, "upgrade": upgrade, "changes": changes}[args.what](args)


if __name__ == "__main__":
    sys.exit(main())
