"""The cases of a step, each in a process of its own, several at a time; what they find is one table."""

import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import redirect_stdout
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import open_clip
import torch

from flyp_plugin import evaluate
from flyp_plugin.commands import call
from flyp_plugin.data import LabelledDataset
from tests import digits
from tests.gpu.report import Report, parser

MODEL = "digits-vit"
AT_ONCE = 6  # on 16 cores


class Case:
    """A case as its functions see it: a folder with data/, start.pt and digits-vit.json that all cases share, and rows."""

    def __init__(self, name: str, root: Path, device: str, small: bool):
        self.name, self.root, self.device, self.small = name, root, device, small
        self.cuda = device.startswith("cuda")
        self.model = ["--model", MODEL, "--model-config", root / f"{MODEL}.json", "--device", device]
        self.scored = ["--eval-data", f"v={root}/data"]

    def row(self, what: str, figure: str, limit: str = "", verdict: str = "") -> None:
        with (self.root / f"{self.name}.rows").open("a") as stream:
            stream.write(json.dumps([self.name, what, figure, limit, verdict]) + "\n")

    def check(self, what: str, figure: float, limit: float = 0.0) -> None:
        self.row(what, f"{figure:.1e}", f"{limit:.1e}", "PASS" if figure <= limit else "FAIL")  # NaN: FAIL

    def flyp(self, *argv: object) -> str:
        """Run a command in this process; its stdout."""
        with redirect_stdout(io.StringIO()) as out:
            status = call([str(arg) for arg in argv])
        for worker in active_children():  # torch would wait seconds for each
            worker.terminate()
        assert not status, f"flyp {argv[0]} ended with status {status}"
        return out.getvalue()

    def train(self, name: str, *more: object) -> Path:
        """A run on digits from start.pt; its last checkpoint."""
        given = ["--pretrained", self.root / "start.pt", "--train-data", self.root / "data", "--name", name]
        given += ["--logs", self.root / "logs", "--batch-size", 100, "--lr", "1e-3", "--warmup", 5]
        small = ["--epochs", 2, "--workers", 0, "--train-num-samples", 300]
        given += small if self.small else ["--epochs", 6, "--workers", 2]
        self.flyp("train", *self.model, *given, *more)
        return max((self.root / "logs" / name / "checkpoints").glob("epoch_*.pt"))

    def top1(self, classifier: Callable, preprocess: Callable) -> float:
        shards = [str(path) for path in (self.root / "data/test").glob("*.tar")]
        loaded = LabelledDataset(shards, preprocess, 100, num_classes=10)
        batches = ((b["images"].to(self.device), b["labels"].to(self.device)) for b in loaded)
        return evaluate(classifier, batches)["top1"]


Cases = Mapping[str, Callable[[Case], None]]


def run_cases(description: str | None, cases: Cases, small: Sequence[str], exact: Collection[str]) -> None:
    """The main function of a step; exits the process, with 1 where a case failed.

    Args:
        small: the names of those that --small does, all in one process.
        exact: those without TF32.
    """
    flags = parser(description)
    flags.add_argument("--only", nargs="+", metavar="CASE", choices=list(cases), help=", ".join(cases))
    flags.add_argument("--work", type=Path, help="for the processes of the cases: the folder they share")
    args = flags.parse_args()
    names = args.only or list(small if args.small else cases)
    if args.work:
        return do({name: cases[name] for name in names}, args)
    report, verdicts = Report(args.out, "check", args.device), []
    groups = [names] if args.small else [[name] for name in names]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(AT_ONCE) as pool:
        args.work = Path(folder)
        digits.write(args.work / "data")
        shutil.copy(args.work / f"data/{MODEL}.json", args.work)
        open_clip.add_model_config(args.work / f"{MODEL}.json")
        torch.manual_seed(0)
        torch.save(open_clip.create_model(MODEL).state_dict(), args.work / "start.pt")
        report.header("case", "what", "figure", "at most", "")
        started = [
            pool.submit(start, group, args, report, not exact.isdisjoint(group) and not args.small)
            for group in groups
        ]
        for future in as_completed(started):
            for row in future.result():
                report.row([cell.replace("|", "/") for cell in row])
                verdicts.append(row[-1])
    report(f"\n{verdicts.count('PASS')} PASS, {verdicts.count('FAIL')} FAIL.")
    sys.exit("FAIL" in verdicts)


def do(cases: Cases, args: Any) -> None:
    """One case after another, in this process."""
    open_clip.add_model_config(args.work / f"{MODEL}.json")
    for name, function in cases.items():
        case, start = Case(name, args.work, args.device, args.small), time.monotonic()
        try:
            function(case)
        except Exception as error:  # noqa: BLE001 (the others go on)
            traceback.print_exc()
            case.row("ended early", f"{type(error).__name__}: {str(error)[:300]}", "", "FAIL")
        case.row("seconds", f"{time.monotonic() - start:.0f}")


def start(names: Sequence[str], args: Any, report: Report, without_tf32: bool) -> list[list[str]]:
    """`do` in another process; the rows, also of one that dies or has to be ended."""
    # the second lets cuBLAS be deterministic; the third overrules main(), which allows TF32
    env = {"OMP_NUM_THREADS": "2", **os.environ, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    env |= {"NVIDIA_TF32_OVERRIDE": "0"} if without_tf32 else {}
    command = [sys.executable, "-m", "tests.gpu.check", "--device", args.device, "--work", str(args.work)]
    command += ["--small"] * args.small + ["--only", *names]
    log, seconds, ended = args.work / f"{names[0]}.log", max(1, report.left()), ""
    try:
        with log.open("w") as stream:
            done = subprocess.run(
                command, env=env, stdout=stream, stderr=stream, timeout=seconds, check=False
            )
        ended = f"with status {done.returncode}" if done.returncode else ""
    except subprocess.TimeoutExpired:
        ended = f"after {seconds:.0f} seconds"
    files = [path for name in names if (path := args.work / f"{name}.rows").exists()]
    rows = [json.loads(line) for path in files for line in path.read_text().splitlines()]
    end = " / ".join(log.read_text(errors="replace").splitlines()[-3:])[-300:]
    return rows + ([[names[0], "ended", f"{ended}: {end}", "", "FAIL"]] if ended else [])
