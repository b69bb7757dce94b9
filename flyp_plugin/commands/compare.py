"""`flyp compare`: the paper's comparison of fine-tuning methods on the user's own data.

It runs `flyp train` and `flyp wiseft` for each method and seed, each in a process and a folder of its own (jobs.py), and
turns their results into tables and a picture (plots.py). What makes the comparison fair is said in its --help, below.
"""

import argparse
import json
import logging
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

from flyp_plugin.commands import plots
from flyp_plugin.commands.jobs import DONE, JobFailed, Jobs, claim_folder, run_jobs
from flyp_plugin.errors import InputError
from flyp_plugin.flags import to_argv
from flyp_plugin.sources import write_atomically

METHODS = ("flyp", "ce", "lp", "lp-ft", "flyp-ce")  # objectives of `flyp train`
TRIED = {"lr": "1e-6,3e-6,1e-5,3e-5", "lp-c": "1,10,100,1000"}  # the default values
# flags of `flyp train` that this command sets for each run
_RESERVED = re.compile("--(seed|shots-seed|objective|name|logs|resume|demo|help-open-clip)(=.*)?")
_FLYP = (sys.executable, "-m", "flyp_plugin")
_log = logging.getLogger(__name__)
EXAMPLE = """  flyp compare --model ViT-B-16 --pretrained openai --train-data data \\
      --eval-data val=data --eval-data sketch=other --methods flyp,ce,lp,lp-ft --epochs 10 --out comparison"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    # fmt: off
    parser.set_defaults(passes_on=True)
    parser.epilog = """All other flags go to each training (see train_flyp.py --help and --help-open-clip): --epochs, --batch-size,
--device, --model-config, ... Every method gets the same data, epochs and number of values of its one tuned setting: the
learning rate or, for lp, C. The first set chooses the value, by top-1 after the last epoch on the first seed (the other
seeds train with it), and alpha; no other set chooses anything. Each run is a folder in DIR/runs with its own command.txt.
Finished runs are skipped, so the same command resumes an interrupted comparison."""
    add = parser.add_argument
    add("--model", required=True, metavar="NAME", help="open_clip's name of the architecture")
    add("--pretrained", required=True, metavar="TAG|PATH", help="what each fine-tuning starts from")
    add("--train-data", required=True, metavar="SHARDS", help="data folder (its train split) or tars")
    add("--eval-data", action="append", required=True, metavar="NAME=SHARDS", help="a labelled set (a data folder: its "
        "test split); repeatable; the first is the ID validation set, which chooses")
    add("--id-test", metavar="NAME", help="the set of --eval-data that is an ID test set, so not part of mean OOD")
    add("--methods", default="flyp,ce,lp,lp-ft", metavar="A,B,...",
        help=f"some of {', '.join(METHODS)}; the others are compared with the first (default: %(default)s)")
    add("--lr", metavar="A,B,...", help=f"learning rates to choose from (default: {TRIED['lr']}, or the middle ones of "
        "these, as many as there are of --lp-c)")
    add("--lp-c", metavar="A,B,...", help="for lp, as many values of its inverse regularisation strength "
        f"(default: {TRIED['lp-c']}, or the middle ones of these, as many as there are of --lr)")
    add("--seeds", default="0:3", metavar="A:B|A,B,...", help="A:B excludes B (default: %(default)s)")
    add("--shots", metavar="K,L,...", help="images per class, drawn by the seed; one table for each")
    add("--templates", action="append", metavar="FILE", help="templates to train with (a file, openai, simple, fmow, ..., "
        "or one template); repeatable, one table for each. Sets that have a templates file are scored with it")
    add("--out", required=True, metavar="DIR", help="folder for compare.md, compare.json, compare.png and runs/")
    # fmt: on


@dataclass(frozen=True)
class Block:
    """One table: the shots (None: all images) and templates (None: the data's) at which the methods are compared."""

    prefix: str  # of the names of its runs
    shots: int | None
    templates: str | None

    @property
    def title(self) -> str:
        shots = f"{self.shots} shots" if self.shots else ""
        return ", ".join(filter(None, (shots, self.templates and f"templates {self.templates}")))


@dataclass(frozen=True)
class Run:
    """One training."""

    block: Block
    method: str
    value: float  # of the tuned flag
    seed: int

    @property
    def name(self) -> str:
        return f"{self.block.prefix}{self.method}_{tuned(self.method)}{self.value}_seed{self.seed}"

    @property
    def title(self) -> str:
        parts = (self.block.title, self.method, f"{tuned(self.method)} {self.value:g}", f"seed {self.seed}")
        return ", ".join(filter(None, parts))


def tuned(method: str) -> str:
    """The flag that is tuned for a method."""
    return "lp-c" if method == "lp" else "lr"


class Comparison:
    """What the flags ask for, checked before anything runs: InputError for whatever `flyp train` would refuse.

    Args:
        args: the flags of `flyp compare`; args.train_flags are those for `flyp train`.
    """

    def __init__(self, args: argparse.Namespace):
        self.args, self.out = args, Path(args.out)
        self.methods, self.seeds = parse_methods(args.methods), parse_seeds(args.seeds)
        args.lr, args.lp_c = with_defaults({"lr": args.lr, "lp-c": args.lp_c}).values()
        self.values = parse_values(self.methods, {"lr": args.lr, "lp-c": args.lp_c})
        self.blocks = parse_blocks(args.shots, args.templates)
        names = [spec.partition("=")[0] for spec in args.eval_data]
        if args.id_test not in (None, *names[1:]):
            what = f"a set of --eval-data after the first ({', '.join(names)})"
            raise InputError(f"--id-test {args.id_test} must be {what}.")
        self.id_sets = [
            *names[:1],
            *filter(None, [args.id_test]),
        ]  # the set that chooses, and the ID test set
        for word in args.train_flags:
            if _RESERVED.fullmatch(word):
                raise InputError(f"{word} is set by `flyp compare` for each run; leave it out (see --help).")
        if not (find_spec("matplotlib") and find_spec("scipy")):
            raise InputError("matplotlib and scipy are missing: pip install 'flyp-plugin[train,compare]'.")
        self.train_args = {
            (block, method): self._checked(Run(block, method, self.values[method][0], self.seeds[0]))
            for block, method in product(self.blocks, self.methods)
        }

    def _checked(self, run: Run) -> argparse.Namespace:
        """The run's flags as `flyp train` parses and checks them."""
        from flyp_plugin.train import FlypRun

        all_images = replace(run.block, shots=None)  # drawing shots would read all the data
        return FlypRun(self.flags(replace(run, block=all_images))).args

    def flags(self, run: Run) -> list[str]:
        """The flags of a training, except where it goes. The user's come last, so that they win."""
        args, block = self.args, run.block
        flags = {name: getattr(args, name) for name in ("model", "pretrained", "train_data")}
        flags |= {"templates": block.templates, "shots": block.shots, "shots_seed": block.shots and run.seed}
        flags |= {"objective": run.method if run.method != "flyp" else None, tuned(run.method): run.value}
        flags |= {"seed": run.seed, "eval_frequency": 0}  # only before training and after the last epoch
        sets = [word for spec in args.eval_data for word in ("--eval-data", spec)]
        return [*to_argv(flags), *sets, *args.train_flags]

    @property
    def counts(self) -> dict[str, int]:
        """The number of trainings and of sweeps."""
        tables, values, seeds = len(self.train_args), len(self.values[self.methods[0]]), len(self.seeds)
        return {"training": tables * (values + seeds - 1), "sweep": tables * seeds}

    def folder(self, run: Run) -> Path:
        return self.out / "runs" / run.name

    def epochs(self, run: Run) -> int:
        return self.train_args[run.block, run.method].epochs

    def metrics(self, run: Run, epoch: int) -> dict[str, dict[str, Any]]:
        """The metrics of a run on each set; epoch 0 is zero-shot."""
        lines = self.read(run, "checkpoints/results.jsonl").splitlines()
        rows = [row for row in map(json.loads, lines) if row["epoch"] == epoch]
        by_set: dict[str, dict[str, Any]] = {}
        for key, value in rows[-1].items():  # a resumed run may have it twice
            name, slash, metric = key.partition("/")
            if slash:
                by_set.setdefault(name, {})[metric] = value
        return by_set

    def read(self, run: Run, name: str) -> str:
        """A text file of a finished run. Raises InputError if it was deleted."""
        folder = self.folder(run)
        if not (folder / name).exists():
            raise InputError(f"{folder / name} of a finished run is missing; delete {folder} to rerun it.")
        return (folder / name).read_text()

    def id_top1(self, run: Run) -> float:
        """Top-1 after the last epoch on the set that chooses."""
        return self.metrics(run, self.epochs(run))[self.id_sets[0]]["top1"]


def parse_methods(text: str) -> list[str]:
    methods = text.split(",")
    if not set(methods) <= set(METHODS) or len(set(methods)) < len(methods):
        raise InputError(f"--methods must be different ones of {', '.join(METHODS)}, got {text!r}.")
    return methods


def with_defaults(texts: Mapping[str, str | None]) -> dict[str, str]:
    """The values to try for each flag, A,B,...; for a flag not given, the middle ones of its defaults.

    Every flag gets as many values as the one that is given, so that no method is tuned more than another.
    """
    counts = [len(set(text.split(","))) for text in texts.values() if text is not None]
    filled = {}
    for flag, text in texts.items():
        defaults = TRIED[flag].split(",")
        count = min(*counts, len(defaults)) if counts else len(defaults)
        start = (len(defaults) - count + 1) // 2
        filled[flag] = ",".join(defaults[start : start + count]) if text is None else text
    return filled


def parse_values(methods: Sequence[str], texts: Mapping[str, str]) -> dict[str, list[float]]:
    """The values to try for each method, from A,B,... for each flag; InputError if one method has more than another."""
    values = {}
    for flag in dict.fromkeys(map(tuned, methods)):
        values[flag] = _numbers(f"--{flag}", texts[flag], float, "1e-6,1e-5")
        if not all(0 < value < math.inf for value in values[flag]):
            raise InputError(f"--{flag} must be positive numbers such as 1e-6,1e-5, got {texts[flag]!r}.")
    if len({len(some) for some in values.values()}) > 1:
        counts = " and ".join(f"--{flag} {len(some)}" for flag, some in values.items())
        raise InputError(f"methods would be tuned unequally ({counts} values); pass as many of each.")
    return {method: values[tuned(method)] for method in methods}


def parse_seeds(text: str) -> list[int]:
    """A:B (excluding B, at most 1,000 seeds) or A,B,...; InputError if it is neither."""
    start, colon, end = text.partition(":")
    if colon and start.isdecimal() and end.isdecimal() and int(start) < int(end) <= int(start) + 1000:
        return list(range(int(start), int(end)))
    return _numbers("--seeds", text, int, "0:3 or 0,1,2")


def parse_blocks(shots: str | None, templates: Sequence[str] | None) -> list[Block]:
    """One block for each number of shots and each templates."""
    counts: Sequence[int | None] = _numbers("--shots", shots, int, "4,16") if shots else [None]
    if 0 in counts:
        raise InputError(f"--shots must be >= 1, got {shots!r}.")
    texts: Sequence[str | None] = list(dict.fromkeys(templates or [])) or [None]
    blocks = []
    for count, (number, text) in product(counts, enumerate(texts)):
        prefix = (f"shots{count}_" if count else "") + (f"templates{number}_" if text else "")
        blocks.append(Block(prefix, count, text))
    return blocks


def _numbers(flag: str, text: str, kind: Callable, example: str) -> list:
    try:
        numbers = list(dict.fromkeys(map(kind, text.split(","))))
    except ValueError:
        numbers = [-1]
    if min(numbers) < 0:
        raise InputError(f"{flag} must be numbers >= 0 joined by commas, such as {example}, got {text!r}.")
    return numbers


def run(args: argparse.Namespace) -> None:
    """Run what --out lacks, then write compare.md (also to stdout), compare.json and compare.png.

    Raises:
        InputError: a mistake in the flags; or a method failed, in which case the tables have the others.
    """
    comparison = Comparison(args)
    out, counts, first = comparison.out, comparison.counts, comparison.seeds[0]
    tried, others = len(comparison.values[comparison.methods[0]]), len(comparison.seeds) - 1
    settings = {name: value for name, value in vars(args).items() if name not in ("run", "out")}
    # only the first seed chooses: others may be added and left out
    claim_folder(out, {**settings, "seeds": first})
    finished = len(list(out.glob(f"runs/**/{DONE}")))
    _log.info(
        f"Plan: {counts['training']} trainings and {counts['sweep']} sweeps over alpha, {finished} of them finished. In each "
        f"table each method is trained with {tried} values on seed {first}, and with the best on {others} more seeds."
    )
    results: dict[Block, dict[str, Any]] = {block: {} for block in comparison.blocks}
    failed = 0
    with run_jobs(out, counts) as jobs:
        for block, method in product(comparison.blocks, comparison.methods):
            try:
                results[block][method] = _run_method(comparison, block, method, jobs)
            except JobFailed as error:
                _log.error(error)
                failed += 1
    _write(comparison, settings, results)
    if failed:
        what = f"{failed} of {len(comparison.train_args)} methods and settings failed (see above)"
        raise InputError(f"{what} and are missing in {out}/compare.md; the same command tries them again.")


def _run_method(comparison: Comparison, block: Block, method: str, jobs: Jobs) -> dict[str, Any]:
    """Tune a method, train it on all seeds and sweep alpha; returns its part of compare.json."""
    from flyp_plugin.metrics import best

    first, *others = comparison.seeds
    tuning = {value: Run(block, method, value, first) for value in comparison.values[method]}
    for run in tuning.values():
        _train(comparison, run, jobs)
    top1 = {value: comparison.id_top1(run) for value, run in tuning.items()}
    chosen = best(top1)
    for value, run in tuning.items():
        if value != chosen:  # its log and figures stay
            checkpoint = f"checkpoints/epoch_{comparison.epochs(run)}.pt"
            (comparison.folder(run) / checkpoint).unlink(missing_ok=True)
    seeds = {first: _sweep(comparison, tuning[chosen], jobs)}
    for seed in others:
        run = Run(block, method, chosen, seed)
        _train(comparison, run, jobs)
        seeds[seed] = _sweep(comparison, run, jobs)
    found = {"tuned": tuned(method), "value": chosen, "id_top1_by_value": top1}
    return {**found, "zero_shot": comparison.metrics(tuning[chosen], 0), "seeds": seeds}


def _train(comparison: Comparison, run: Run, jobs: Jobs) -> None:
    folder = comparison.folder(run)
    command = [*_FLYP, "train", *comparison.flags(run), "--logs", str(folder.parent), "--name", folder.name]
    command += ["--resume", "latest", "--delete-previous-checkpoint"]
    val = comparison.id_sets[0]
    jobs.run("training", run.title, folder, command, lambda: f"{val} {100 * comparison.id_top1(run):.1f}")


def _sweep(comparison: Comparison, run: Run, jobs: Jobs) -> dict[str, Any]:
    out = comparison.folder(run) / "wiseft"
    args = vars(comparison.train_args[run.block, run.method])
    command = [*_FLYP, "wiseft", str(comparison.folder(run)), "--force"]
    command += to_argv({name: args[name] for name in ("device", "batch_size", "workers")})
    if comparison.args.id_test:
        command += ["--per-set"]  # a mean OOD would include the ID test set

    def record() -> dict[str, Any]:
        return json.loads(comparison.read(run, "wiseft/wiseft.json"))

    jobs.run("sweep", run.title, out, command, lambda: f"alpha {record()['chosen_alpha']:g}")
    return {"folder": str(out.parent), **{key: record()[key] for key in ("chosen_alpha", "alphas")}}


def _write(comparison: Comparison, settings: dict[str, Any], results: Mapping[Block, dict[str, Any]]) -> None:
    """Write compare.json, compare.md and compare.png."""
    from flyp_plugin.checkpoints import atomic_write

    blocks = []
    for block, methods in results.items():
        table = plots.rows(methods, comparison.id_sets)
        differences = plots.differences(table, list(methods)) if comparison.methods[0] in methods else {}
        entry = {"title": block.title, "shots": block.shots, "templates": block.templates, "methods": methods}
        blocks.append({**entry, "rows": table, "differences": differences})
    epochs = max(args.epochs for args in comparison.train_args.values())  # a linear probe has 1
    parts = {name: getattr(comparison, name) for name in ("methods", "seeds", "id_sets")}
    record = {"settings": settings, "epochs": epochs, **parts, "blocks": blocks}
    out, text = comparison.out, plots.document(record)
    write_atomically(out / "compare.json", json.dumps(record, indent=1) + "\n")
    write_atomically(out / "compare.md", text)
    if any(results.values()):
        with atomic_write(out / "compare.png") as part:
            plots.draw(record, part)
    sys.stdout.write(text)
    _log.info(f"Wrote compare.md, compare.json and a picture to {out}; the runs are in {out}/runs.")
