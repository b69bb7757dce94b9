"""`flyp compare`: the paper's comparison on the user's own data. It plans, chooses learning rates and reports.

Each training is train.py's and each alpha sweep merge.py's, in a process and a folder of its own. Every method gets the
same data, epochs and number of learning rates. The rate is chosen by top-1 on the first evaluation set after the last
epoch, on the first seed; all seeds then train with it, and alpha is chosen on the same set. No other set chooses anything.
"""

import argparse
import fcntl
import json
import logging
import math
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from flyp_plugin.errors import InputError
from flyp_plugin.merge import draw_curves
from flyp_plugin.monitor import wiseft_command
from flyp_plugin.report import Sweep, curve, differences, markdown, percent, rows, summary
from flyp_plugin.sources import write_atomically
from flyp_plugin.train import FlypRun
from flyp_plugin.train import parser as train_parser

METHODS: dict[str, list[str]] = {  # and what makes train.py do it
    "flyp": [],
    "ce": ["--objective", "ce"],
    "lp": ["--objective", "lp"],
    "lp-ft": ["--objective", "lp-ft"],
    "flyp-ce": ["--objective", "flyp-ce"],
}
LEARNING_RATES = "1e-6,3e-6,1e-5,3e-5"
_OURS = (
    "--seed",
    "--shots-seed",
    "--objective",
    "--name",
    "--logs",
    "--resume",
    "--demo",
    "--help-open-clip",
)
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Block:
    """What all methods are compared at; a table of its own. None: all images, the templates of the data."""

    name: str
    shots: int | None
    templates: str | None

    @property
    def heading(self) -> str:
        shots = f"{self.shots} shots" if self.shots else ""
        return ", ".join(filter(None, (shots, f"templates {self.templates}" if self.templates else "")))


@dataclass(frozen=True)
class Run:
    """One training."""

    block: Block
    method: str
    lr: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.block.name}{self.method}_lr{self.lr}_seed{self.seed}"


class Comparison:
    """What the flags ask for; made before anything runs.

    Args:
        args: of the command line; `args.train_flags` are those that go through to train.py.

    Raises:
        InputError: whatever is wrong in the flags, or found by train.py in what it is to be given.
    """

    def __init__(self, args: argparse.Namespace):
        self.args, self.out = args, Path(args.out)
        self.methods = _methods(args.methods)
        self.lrs = parse_lrs(args.lr or [LEARNING_RATES], self.methods)
        self.seeds = parse_seeds(args.seeds)
        self.blocks = _blocks(args.shots, args.templates)
        self.id_sets = _id_sets([spec.partition("=")[0] for spec in args.eval_data], args.id_test)
        for flag in _OURS:
            if any(word == flag or word.startswith(f"{flag}=") for word in args.train_flags):
                raise InputError(
                    f"{flag} is what `flyp compare` gives each run itself; leave it out (see --help)."
                )
        if find_spec("matplotlib") is None:
            raise InputError("compare.png needs matplotlib; pip install 'flyp-plugin[plot]'.")
        self.train_args = {
            (block, method): FlypRun(
                *train_parser().parse_known_args(
                    self.flags(Run(block, method, self.lrs[method][0], self.seeds[0]))
                )
            ).args
            for block, method in product(self.blocks, self.methods)
        }

    @property
    def jobs(self) -> dict[str, int]:
        """How many trainings and sweeps there are."""
        rates, seeds, tables = len(self.lrs[self.methods[0]]), len(self.seeds), len(self.train_args)
        return {"training": tables * (rates + seeds - 1), "sweep": tables * seeds}

    def flags(self, run: Run) -> list[str]:
        """The flags of a training, but for those that say where it goes; of equal ones the last is the user's."""
        args, block = self.args, run.block
        flags = ["--model", args.model, "--pretrained", args.pretrained, "--train-data", args.train_data]
        for spec in args.eval_data:
            flags += ["--eval-data", spec]
        flags += ["--templates", block.templates] if block.templates else []
        flags += ["--shots", str(block.shots), "--shots-seed", str(run.seed)] if block.shots else []
        flags += [*METHODS[run.method], "--lr", str(run.lr), "--seed", str(run.seed)]
        return [
            *flags,
            "--eval-frequency",
            "0",
            *args.train_flags,
        ]  # 0: before training and after the last epoch

    def folder(self, run: Run) -> Path:
        return self.out / "runs" / run.name

    def checkpoint(self, run: Run) -> Path:
        return self.folder(run) / "checkpoints" / f"epoch_{self.train_args[run.block, run.method].epochs}.pt"


def _methods(text: str) -> list[str]:
    methods = text.split(",")
    for method in methods:
        if method not in METHODS or methods.count(method) > 1:
            raise InputError(
                f"--methods {text!r} is not a list of different ones of {', '.join(METHODS)}, joined by commas."
            )
    return methods


def parse_lrs(specs: Sequence[str], methods: Sequence[str]) -> dict[str, list[float]]:
    """The learning rates of each method, from LR,LR,... for all and METHOD=LR,LR,... for one.

    Raises:
        InputError: not that, or not as many for one method as for another.
    """
    given: dict[str, list[float]] = {}
    for spec in [LEARNING_RATES, *specs]:
        method, _, text = spec.rpartition("=")
        if method not in ("", *methods):
            raise InputError(f"--lr {spec!r}: {method!r} is not one of --methods {','.join(methods)}.")
        given[method] = _numbers("--lr", text, float, "1e-6,1e-5")
        if not all(0 < lr < math.inf for lr in given[method]):
            raise InputError(
                f"--lr {spec!r} has a learning rate that is not above 0; give such as 1e-6,1e-5."
            )
    lrs = {method: given.get(method, given[""]) for method in methods}
    if len({len(rates) for rates in lrs.values()}) > 1:
        counts = ", ".join(f"{method} {len(rates)}" for method, rates in lrs.items())
        raise InputError(
            f"--lr tries more learning rates for one method than for another ({counts}); give as many."
        )
    return lrs


def parse_seeds(text: str) -> list[int]:
    """A:B (without B) or A,B,...; InputError where it is neither."""
    first, colon, end = text.partition(":")
    if colon and first.isdecimal() and end.isdecimal() and int(first) < int(end):
        return list(range(int(first), int(end)))
    return _numbers("--seeds", text, int, "0:3 or 0,1,2")


def _numbers(flag: str, text: str, kind: Callable, example: str) -> list:
    try:
        numbers = list(dict.fromkeys(map(kind, text.split(","))))
    except ValueError:
        numbers = [-1]
    if min(numbers) < 0:
        raise InputError(
            f"{flag} {text!r} is not numbers of 0 or more joined by commas; give such as {example}."
        )
    return numbers


def _blocks(shots: str | None, templates: Sequence[str] | None) -> list[Block]:
    counts = _numbers("--shots", shots, int, "4,16") if shots else [None]
    if 0 in counts:
        raise InputError(f"--shots {shots!r} has a 0; give 1 or more images a class.")
    return [
        Block(f"shots{count}_" * bool(count) + f"templates{number}_" * bool(text), count, text)
        for count, (number, text) in product(counts, enumerate(templates or [None]))  # type: ignore[list-item]
    ]


def _id_sets(names: Sequence[str], id_test: str | None) -> list[str]:
    """The set that chooses and, where there is one, the ID test set."""
    if id_test is not None and id_test not in names[1:]:
        raise InputError(
            f"--id-test {id_test!r} is not one of the sets after the first of --eval-data ({', '.join(names)})."
        )
    return names[:1] + ([id_test] if id_test else [])  # type: ignore[operator]


# Running


class RunFailed(InputError):
    """A training or sweep ended with an error; the others can still be run."""


class Jobs:
    """Runs commands, each once for all starts of a comparison.

    Args:
        left: how many of each kind there are.
        lock: a file descriptor that commands keep open; see _alone.
        bar: counts them.
    """

    def __init__(self, left: dict[str, int], lock: int, bar: tqdm):
        self.left, self.lock, self.bar, self.total = dict(left), lock, bar, sum(left.values())
        self.seconds: dict[str, list[float]] = {kind: [] for kind in left}

    def run(
        self, kind: str, title: str, folder: Path, command: Sequence[str], result: Callable[[], str]
    ) -> None:
        """Run a command unless `folder` has a finished one, and say what came out.

        Raises:
            RunFailed: it ended with an error.
        """
        done = folder / "finished.json"
        new = not done.exists()
        if new:
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(folder / "command.txt", shlex.join(command) + "\n")
            _log.info(f"{title}, {kind}:\n  {shlex.join(command)}")
            start = time.monotonic()
            self._run(command, folder / "console.log", f"{title}: the {kind}")
            write_atomically(done, json.dumps({"seconds": round(time.monotonic() - start, 1)}) + "\n")
        self.left[kind] -= 1
        self.seconds[kind].append(json.loads(done.read_text())["seconds"])
        self.bar.update()
        if new:
            number, took = self.total - sum(self.left.values()), tqdm.format_interval(self.seconds[kind][-1])
            left = tqdm.format_interval(seconds_left(self.seconds, self.left))
            _log.info(f"[{number}/{self.total}] {title}, {kind}: {result()}, in {took}; about {left} left")

    def _run(self, command: Sequence[str], log: Path, what: str) -> None:
        with (
            log.open("w") as stream,
            subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                pass_fds=[self.lock],
            ) as process,
        ):
            try:
                status = process.wait()
            except BaseException:
                process.terminate()
                raise
        if status:
            last = "\n".join(f"  {line}" for line in log.read_text(errors="replace").splitlines()[-10:])
            raise RunFailed(
                f"{what} in {log.parent} ended with status {status}; the last lines of {log.name}:\n{last}"
            )


def seconds_left(seconds: Mapping[str, Sequence[float]], left: Mapping[str, int]) -> float:
    """From the mean time of each kind of job; a kind not run yet is taken to be like the others."""
    known = [fmean(times) for times in seconds.values() if times]
    return sum(left[kind] * (fmean(times) if times else fmean(known)) for kind, times in seconds.items())


@contextmanager
def _alone(out: Path) -> Iterator[int]:
    """A lock on the comparison, which its commands hold too: one that outlived a killed comparison is still writing."""
    with open(out / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"another `flyp compare`, or a run that one left behind, is writing to {out}; wait for it or end it."
            ) from None
        yield lock.fileno()


def _begin(out: Path, settings: dict[str, Any]) -> None:
    """Make the folder, or find that it is that of the same comparison.

    Raises:
        InputError: it is another's.
    """
    record = out / "settings.json"
    if record.exists():
        before = json.loads(record.read_text())
        for name, value in settings.items():
            if before.get(name) != value:
                raise InputError(
                    f"{out} holds a comparison whose {name} is {before.get(name)!r} and not {value!r}; give "
                    "another --out, or the same settings to go on with it."
                )
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} is there and holds no comparison; give another --out.")
    else:
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(record, json.dumps(settings, indent=1) + "\n")


def compare_command(args: argparse.Namespace) -> None:
    """`flyp compare`: run what --out lacks, then write compare.md, which also goes to stdout, .json and .png.

    Raises:
        InputError: as its parts; or some runs failed, and the others are in the tables.
    """
    comparison = Comparison(args)
    out, jobs = comparison.out, comparison.jobs
    settings = {name: value for name, value in vars(args).items() if name not in ("function", "out")}
    _begin(out, settings)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that `kill` ends the run too
    tuning = len(comparison.lrs[comparison.methods[0]])
    _log.info(
        f"Plan: {len(comparison.blocks)} x {len(comparison.methods)} methods x ({tuning} learning rates on seed "
        f"{comparison.seeds[0]} + {len(comparison.seeds) - 1} more seeds) = {jobs['training']} trainings, and "
        f"{jobs['sweep']} sweeps over alpha; {len(list(out.glob('runs/**/finished.json')))} of them are finished."
    )
    results: dict[Block, dict[str, Any]] = {block: {} for block in comparison.blocks}
    failures = 0
    with (
        _alone(out) as lock,
        logging_redirect_tqdm(),
        tqdm(total=sum(jobs.values()), disable=None, unit="run") as bar,
    ):
        runner = Jobs(jobs, lock, bar)
        for block, method in product(comparison.blocks, comparison.methods):
            try:
                results[block][method] = _compare(comparison, block, method, runner)
            except RunFailed as error:
                _log.error(error)
                failures += 1
    sys.stdout.write(_report(comparison, results, settings))
    _log.info(f"Wrote {out}/compare.md, compare.json and compare.png; the runs are in {out}/runs.")
    if failures:
        raise InputError(
            f"{failures} of {len(comparison.train_args)} methods failed, see above, and are not in {out}/compare.md; "
            "the same command goes on with them."
        )


def _compare(comparison: Comparison, block: Block, method: str, jobs: Jobs) -> dict[str, Any]:
    """Tune, train and sweep one method; its part of compare.json."""
    first, *others = comparison.seeds
    by_lr = {}
    for lr in comparison.lrs[method]:
        _train(comparison, Run(block, method, lr, first), jobs)
        by_lr[lr] = _id_top1(comparison, Run(block, method, lr, first))
    chosen = choose_lr(by_lr)
    for lr in set(by_lr) - {chosen}:  # of these the logs and figures are kept
        comparison.checkpoint(Run(block, method, lr, first)).unlink(missing_ok=True)
    runs = {}
    for seed in comparison.seeds:
        run = Run(block, method, chosen, seed)
        if seed in others:
            _train(comparison, run, jobs)
        runs[str(seed)] = {"folder": str(comparison.folder(run)), **_sweep(comparison, run, jobs)}
    return {"lr": chosen, "id_top1_by_lr": {str(lr): top1 for lr, top1 in by_lr.items()}, "seeds": runs}


def choose_lr(by_lr: Mapping[float, float]) -> float:
    """The learning rate with the best accuracy; of equal ones the smallest."""
    return max(by_lr, key=lambda lr: (by_lr[lr], -lr))


def _train(comparison: Comparison, run: Run, jobs: Jobs) -> None:
    folder = comparison.folder(run)
    command = [
        sys.executable,
        "-m",
        "flyp_plugin.train",
        *comparison.flags(run),
        "--logs",
        str(folder.parent),
    ]
    command += ["--name", folder.name, "--resume", "latest", "--delete-previous-checkpoint"]
    jobs.run("training", _title(run), folder, command, lambda: percent([_id_top1(comparison, run)]))


def _sweep(comparison: Comparison, run: Run, jobs: Jobs) -> Sweep:
    out = comparison.folder(run) / "wiseft"
    words = wiseft_command(comparison.train_args[run.block, run.method], comparison.checkpoint(run), out)
    words += [
        "--force",
        *(["--per-set"] if comparison.args.id_test else []),
    ]  # its mean would have the ID test set

    def read() -> Sweep:
        record = json.loads((out / "wiseft.json").read_text())
        return {name: record[name] for name in ("chosen_alpha", "alphas")}

    command = [sys.executable, "-m", "flyp_plugin.cli", *words]
    jobs.run("sweep", _title(run), out, command, lambda: f"alpha {read()['chosen_alpha']:g}")
    return read()


def _title(run: Run) -> str:
    return ", ".join(filter(None, (run.block.heading, run.method, f"lr {run.lr:g}", f"seed {run.seed}")))


def _id_top1(comparison: Comparison, run: Run) -> float:
    """After the last epoch, on the set that chooses."""
    lines = (comparison.folder(run) / "checkpoints" / "results.jsonl").read_text().splitlines()
    key = f"{comparison.id_sets[0]}/top1"
    rows = {row["epoch"]: row[key] for row in map(json.loads, lines) if key in row}
    return rows[comparison.train_args[run.block, run.method].epochs]


# Reporting


def _report(
    comparison: Comparison, results: Mapping[Block, Mapping[str, Any]], settings: dict[str, Any]
) -> str:
    """Write compare.json, compare.md and compare.png; the text of compare.md."""
    text, blocks, panels = [_introduction(comparison)], [], {}
    alphas: list[float] = []
    for block, methods in results.items():
        if not methods:
            continue
        sweeps = {method: list(record["seeds"].values()) for method, record in methods.items()}
        one = next(iter(sweeps.values()))[0]["alphas"]
        alphas = list(map(float, one))
        table = rows(sweeps, comparison.id_sets)
        difference = differences(table, list(sweeps)) if comparison.methods[0] in sweeps else {}
        columns = {name: _column(comparison, name, one["0.00"]) for name in table["zero-shot"]}
        text += [f"## {block.heading}"] if block.heading else []
        text += [markdown(table, columns, _notes(comparison, methods))]
        if difference:
            text += [
                f"Less {comparison.methods[0]} (with WiSE-FT: less the same with WiSE-FT), paired by seed, in points:"
            ]
            text += [markdown(difference, columns, {}, "+")]
        record = {"shots": block.shots, "templates": block.templates, "methods": methods}
        blocks.append({**record, "rows": summary(table), "differences": summary(difference)})
        panels[block.heading] = {method: curve(some, comparison.id_sets) for method, some in sweeps.items()}
    document = "\n\n".join(text) + "\n"
    out, ood = comparison.out, len(comparison.args.eval_data) > len(comparison.id_sets)
    write_atomically(
        out / "compare.json", json.dumps({"settings": settings, "blocks": blocks}, indent=1) + "\n"
    )
    write_atomically(out / "compare.md", document)
    if panels:
        draw_curves(
            panels, alphas, "alpha chosen", comparison.id_sets[-1] if ood else None, out / "compare.png"
        )
    return document


def _introduction(comparison: Comparison) -> str:
    args, seeds = comparison.args, comparison.seeds
    (epochs,) = {train_args.epochs for train_args in comparison.train_args.values()}
    val, *test = comparison.id_sets
    too_good = (
        ""
        if test
        else ", so that its own figures are a little too good (--id-test names a set that chose nothing)"
    )
    intervals = (
        f"means over seeds {', '.join(map(str, seeds))} ± half of their 95 % interval (Student's t), which is of the "
        "seeds alone: of n test images comes a further standard error of up to 50/√n points that all rows share"
        if len(seeds) > 1
        else f"of seed {seeds[0]} alone"
    )
    return (
        f"# {args.model} ({args.pretrained}) fine-tuned on {args.train_data}\n\nTop-1 in %, {intervals}. Each method is "
        f"taken after its last epoch ({epochs}). `{val}` chose the learning rate of each method (on seed {seeds[0]}) and "
        f"alpha (for each seed){too_good}; no other set chose anything."
    )


def _column(comparison: Comparison, name: str, by_set: Mapping[str, Any]) -> str:
    if name not in by_set:
        return name
    val, *test = comparison.id_sets
    role = " (ID, chose)" if name == val else " (ID test)" if name in test else ""
    return f"{name}{role}, n={by_set[name]['n']}"


def _notes(comparison: Comparison, methods: Mapping[str, Any]) -> dict[str, list[str]]:
    """Learning rate and alpha of each row."""
    rates, alphas = [""], ["0"]
    for method, record in methods.items():
        tried = sorted(comparison.lrs[method])
        end = {tried[0]: ", least", tried[-1]: ", most"}.get(record["lr"], "") if len(tried) > 2 else ""
        rates += [f"{record['lr']:g}{end and f' ({end[2:]} tried)'}"] * 2
        alphas += ["1", f"{fmean(run['chosen_alpha'] for run in record['seeds'].values()):.2f}"]
    return {"lr": rates, "mean alpha": alphas}
