"""`flyp compare`: the paper's comparison on the user's own data. It plans, chooses learning rates and has them reported.

Each training is train.py's and each sweep over alpha merge.py's, in a process and a folder of its own. Every method gets
the same data, epochs and number of values of its one tuned setting (the learning rate, or a linear probe's
regularisation). The value is chosen by top-1 on the first evaluation set after the last epoch, on the first seed; the
other seeds train with it. Alpha is chosen on that set too, and no other set chooses.
"""

import argparse
import json
import logging
import math
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
from flyp_plugin.metrics import best
from flyp_plugin.sources import write_atomically
from flyp_plugin.train import FlypRun

METHODS: dict[str, list[str]] = {  # and what makes train.py do it
    "flyp": [],
    "ce": ["--objective", "ce"],
    "lp": ["--objective", "lp"],
    "lp-ft": ["--objective", "lp-ft"],
    "flyp-ce": ["--objective", "flyp-ce"],
}
TRIED = {"lr": "1e-6,3e-6,1e-5,3e-5", "lp-c": "1,10,100,1000"}  # the default values of what is tuned
TUNED = {"lp": "lp-c"}  # the flag that is tuned, where it is not lr: a fit has none
# flags of train.py that each run is given here; with them a user would undo the comparison
_OURS = ("--seed", "--shots-seed", "--objective", "--name", "--logs", "--resume", "--demo", "--help-open-clip")  # fmt: skip
MOST_SEEDS = 1000
_log = logging.getLogger(__name__)
EXAMPLE = """  flyp compare --model ViT-B-16 --pretrained openai --train-data data \\
      --eval-data val=data --eval-data sketch=other --methods flyp,ce,lp,lp-ft --epochs 10 --out comparison"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    # fmt: off
    parser.set_defaults(passes_on=True)
    parser.epilog = """All other flags go to each training as they are (train_flyp.py --help, --help-open-clip): --epochs,
--batch-size, --device, --model-config, ... Every method gets the same data, epochs and number of values of its one tuned
setting, the learning rate or, for lp, C. The value is chosen by top-1 on the first set after the last epoch, on the first
seed; the other seeds train with it. The first set also chooses alpha; no other set chooses anything. Each run is a folder in DIR/runs with its own command.txt;
finished ones are skipped, so that the same command goes on with a comparison that was interrupted."""
    add = parser.add_argument
    add("--model", required=True, metavar="NAME", help="open_clip's name of the architecture")
    add("--pretrained", required=True, metavar="TAG|PATH", help="what each fine-tuning starts from")
    add("--train-data", required=True, metavar="SHARDS", help="data folder (its train split) or tars")
    add("--eval-data", action="append", required=True, metavar="NAME=SHARDS", help="a labelled set (a data folder: its "
        "test split); repeatable, first the ID validation set, which chooses")
    add("--id-test", metavar="NAME", help="the set of --eval-data that is an ID test set, and so not in mean OOD")
    add("--methods", default="flyp,ce,lp,lp-ft", metavar="A,B,...",
        help="of flyp, ce, lp, lp-ft, flyp-ce; others are compared with the first (default: %(default)s)")
    add("--lr", metavar="A,B,...", help=f"to choose from (default: {TRIED['lr']}, or the middle ones of these, as many as "
        "there are of --lp-c)")
    add("--lp-c", metavar="A,B,...", help="as many, in place of learning rates, for lp: its inverse strength of "
        f"regularisation (default: {TRIED['lp-c']}, or the middle ones of these, as many as there are of --lr)")
    add("--seeds", default="0:3", metavar="A:B|A,B,...", help="without B (default: %(default)s)")
    add("--shots", metavar="K,L,...", help="so many images a class, drawn by the seed; a table for each")
    add("--templates", action="append", metavar="FILE", help="to train with (a file, openai, simple, or one template); "
        "repeatable, a table for each. Sets with a templates file of their own are scored with that")
    add("--out", required=True, metavar="DIR", help="for compare.md, compare.json, compare.png and runs/")
    # fmt: on


@dataclass(frozen=True)
class Block:
    """What all methods are compared at, in a table of its own. None: all images; the templates of the data."""

    prefix: str  # of the runs' names
    shots: int | None
    templates: str | None

    @property
    def title(self) -> str:
        shots = f"{self.shots} shots" if self.shots else ""
        return ", ".join(filter(None, (shots, f"templates {self.templates}" if self.templates else "")))


@dataclass(frozen=True)
class Run:
    """One training."""

    block: Block
    method: str
    value: float  # of what is tuned
    seed: int

    @property
    def name(self) -> str:
        return f"{self.block.prefix}{self.method}_{tuned(self.method)}{self.value}_seed{self.seed}"

    @property
    def title(self) -> str:
        parts = (self.block.title, self.method, f"{tuned(self.method)} {self.value:g}", f"seed {self.seed}")
        return ", ".join(filter(None, parts))


def tuned(method: str) -> str:
    return TUNED.get(method, "lr")


class Comparison:
    """What the flags ask for; made before anything runs.

    Args:
        args: those of `flyp compare`; args.train_flags are the others, which go through to train.py.

    Raises:
        InputError: whatever is wrong in the flags, or what train.py finds wrong in those that it is to be given.
    """

    def __init__(self, args: argparse.Namespace):
        self.args, self.out = args, Path(args.out)
        self.methods = parse_methods(args.methods)
        args.lr, args.lp_c = with_defaults({"lr": args.lr, "lp-c": args.lp_c}).values()
        self.values = parse_values(self.methods, {"lr": args.lr, "lp-c": args.lp_c})
        self.seeds = parse_seeds(args.seeds)
        self.blocks = parse_blocks(args.shots, args.templates)
        self.id_sets = _id_sets([spec.partition("=")[0] for spec in args.eval_data], args.id_test)
        for word in args.train_flags:
            if word.partition("=")[0] in _OURS:
                raise InputError(
                    f"{word} is for `flyp compare` to give to each run; leave it out (see --help)."
                )
        if find_spec("matplotlib") is None:
            raise InputError("compare.png needs matplotlib; pip install 'flyp-plugin[plot]'.")
        self.train_args = {
            (block, method): self._checked(Run(block, method, self.values[method][0], self.seeds[0]))
            for block, method in product(self.blocks, self.methods)
        }

    def _checked(self, run: Run) -> argparse.Namespace:
        """What train.py makes of a run's flags; without its shots, which it would look for in all the data."""
        run = replace(run, block=replace(run.block, shots=None))
        return FlypRun(self.flags(run)).args

    def flags(self, run: Run) -> list[str]:
        """The flags of a training, but for those that say where it goes; of equal ones the last, the user's, wins."""
        args, block = self.args, run.block
        flags = ["--model", args.model, "--pretrained", args.pretrained, "--train-data", args.train_data]
        for spec in args.eval_data:
            flags += ["--eval-data", spec]
        flags += ["--templates", block.templates] if block.templates else []
        flags += ["--shots", str(block.shots), "--shots-seed", str(run.seed)] if block.shots else []
        flags += [*METHODS[run.method], f"--{tuned(run.method)}", str(run.value), "--seed", str(run.seed)]
        flags += ["--eval-frequency", "0"]  # before training and after the last epoch: no other counts
        return flags + args.train_flags

    @property
    def counts(self) -> dict[str, int]:
        """How many trainings and sweeps there are."""
        tables, values, seeds = len(self.train_args), len(self.values[self.methods[0]]), len(self.seeds)
        return {"training": tables * (values + seeds - 1), "sweep": tables * seeds}

    def folder(self, run: Run) -> Path:
        return self.out / "runs" / run.name

    def epochs(self, run: Run) -> int:
        return self.train_args[run.block, run.method].epochs

    def checkpoint(self, run: Run) -> Path:
        return self.folder(run) / "checkpoints" / f"epoch_{self.epochs(run)}.pt"

    def metrics(self, run: Run, epoch: int) -> dict[str, dict[str, Any]]:
        """What a run has found on each set; epoch 0 is zero-shot."""
        lines = self.read(run, "checkpoints/results.jsonl").splitlines()
        rows = [row for row in map(json.loads, lines) if row["epoch"] == epoch]
        by_set: dict[str, dict[str, Any]] = {}
        for key, value in rows[-1].items():  # a run that was resumed may have it twice
            name, slash, metric = key.rpartition("/")
            if slash:
                by_set.setdefault(name, {})[metric] = value
        return by_set

    def read(self, run: Run, name: str) -> str:
        """A text file of a finished run.

        Raises:
            InputError: it is gone.
        """
        path = self.folder(run) / name
        try:
            return path.read_text()
        except FileNotFoundError:
            raise InputError(
                f"{path} is gone, of a run that has finished; delete {self.folder(run)}, and the same command runs it again."
            ) from None

    def id_top1(self, run: Run) -> float:
        """After the last epoch, on the set that chooses."""
        return self.metrics(run, self.epochs(run))[self.id_sets[0]]["top1"]


def parse_methods(text: str) -> list[str]:
    methods = text.split(",")
    if not set(methods) <= METHODS.keys() or len(set(methods)) < len(methods):
        raise InputError(
            f"--methods {text!r} is not different ones of {', '.join(METHODS)}, joined by commas."
        )
    return methods


def with_defaults(texts: Mapping[str, str | None]) -> dict[str, str]:
    """The values to try, A,B,... for each flag; of a flag that is not given the middle ones of its defaults.

    They are as many as the values of the flag that is given, so that no method is tuned better than another.
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
    """The values that are tried of what each method tunes, from A,B,... for each of the flags.

    Raises:
        InputError: not that, or not as many for one method as for another.
    """
    values = {}
    for flag in dict.fromkeys(map(tuned, methods)):
        values[flag] = _numbers(f"--{flag}", texts[flag], float, "1e-6,1e-5")
        if not all(0 < value < math.inf for value in values[flag]):
            raise InputError(f"--{flag} {texts[flag]!r} has one that is not above 0; give such as 1e-6,1e-5.")
    if len({len(some) for some in values.values()}) > 1:
        counts = " and ".join(f"--{flag} {len(some)}" for flag, some in values.items())
        raise InputError(
            f"some methods would be tuned better than others ({counts} values); give as many of each."
        )
    return {method: values[tuned(method)] for method in methods}


def parse_seeds(text: str) -> list[int]:
    """A:B (without B) or A,B,...; InputError where it is neither."""
    start, colon, end = text.partition(":")
    if colon and start.isdecimal() and end.isdecimal() and int(start) < int(end):
        if int(end) - int(start) > MOST_SEEDS:
            raise InputError(f"--seeds {text} are more than {MOST_SEEDS}; give fewer.")
        return list(range(int(start), int(end)))
    return _numbers("--seeds", text, int, "0:3 or 0,1,2")


def parse_blocks(shots: str | None, templates: Sequence[str] | None) -> list[Block]:
    """Each number of shots with each templates; InputError where a number is none."""
    counts: Sequence[int | None] = _numbers("--shots", shots, int, "4,16") if shots else [None]
    if 0 in counts:
        raise InputError(f"--shots {shots!r} has a 0; give 1 or more images a class.")
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
        raise InputError(
            f"{flag} {text!r} is not numbers of 0 or more joined by commas; give such as {example}."
        )
    return numbers


def _id_sets(names: list[str], id_test: str | None) -> list[str]:
    """The set that chooses and, where there is one, the ID test set."""
    if id_test is None:
        return names[:1]
    if id_test not in names[1:]:
        raise InputError(
            f"--id-test {id_test} is not a set after the first of --eval-data ({', '.join(names)})."
        )
    return [names[0], id_test]


def run(args: argparse.Namespace) -> None:
    """`flyp compare`: run what --out lacks, then write compare.md, which also goes to stdout, .json and .png.

    Raises:
        InputError: as its parts; or a method failed, and the others are in the tables.
    """
    comparison = Comparison(args)
    out, counts, tried = comparison.out, comparison.counts, len(comparison.values[comparison.methods[0]])
    settings = {name: value for name, value in vars(args).items() if name not in ("run", "out")}
    claim_folder(
        out, {**settings, "seeds": comparison.seeds[0]}
    )  # which has chosen; the others may come and go
    _log.info(
        f"Plan: {counts['training']} trainings and {counts['sweep']} sweeps over alpha, of which "
        f"{len(list(out.glob(f'runs/**/{DONE}')))} are finished already. In each table each method "
        f"is trained with {tried} values on seed {comparison.seeds[0]}, and with the best of them on "
        f"{len(comparison.seeds) - 1} more seeds."
    )
    results: dict[Block, dict[str, Any]] = {block: {} for block in comparison.blocks}
    failed = 0
    with run_jobs(out, counts) as jobs:
        for block, method in product(comparison.blocks, comparison.methods):
            try:
                results[block][method] = _method(comparison, block, method, jobs)
            except JobFailed as error:
                _log.error(error)
                failed += 1
    _write(comparison, settings, results)
    if failed:
        raise InputError(
            f"{failed} of {len(comparison.train_args)} methods and settings failed (see above) and are not in "
            f"{out}/compare.md; the same command goes on with them."
        )


def _method(comparison: Comparison, block: Block, method: str, jobs: Jobs) -> dict[str, Any]:
    """Tune a method, train it with all seeds and sweep over alpha; its part of compare.json."""
    first, *others = comparison.seeds
    tuning = {value: Run(block, method, value, first) for value in comparison.values[method]}
    for run in tuning.values():
        _train(comparison, run, jobs)
    top1 = {value: comparison.id_top1(run) for value, run in tuning.items()}
    chosen = best(top1)
    for value, run in tuning.items():
        if value != chosen:  # its log and figures are kept
            comparison.checkpoint(run).unlink(missing_ok=True)
    seeds = {first: _sweep(comparison, tuning[chosen], jobs)}
    for seed in others:
        run = Run(block, method, chosen, seed)
        _train(comparison, run, jobs)
        seeds[seed] = _sweep(comparison, run, jobs)
    return {
        "tuned": tuned(method),
        "value": chosen,
        "id_top1_by_value": top1,
        "zero_shot": comparison.metrics(tuning[chosen], 0),
        "seeds": seeds,
    }


def _train(comparison: Comparison, run: Run, jobs: Jobs) -> None:
    folder = comparison.folder(run)
    command = [sys.executable, "-m", "flyp_plugin", "train", *comparison.flags(run)]
    command += ["--logs", str(folder.parent), "--name", folder.name]
    command += ["--resume", "latest", "--delete-previous-checkpoint"]
    val = comparison.id_sets[0]
    jobs.run("training", run.title, folder, command, lambda: f"{val} {100 * comparison.id_top1(run):.1f}")


def _sweep(comparison: Comparison, run: Run, jobs: Jobs) -> dict[str, Any]:
    out = comparison.folder(run) / "wiseft"
    args = vars(comparison.train_args[run.block, run.method])
    command = [sys.executable, "-m", "flyp_plugin", "wiseft", str(comparison.folder(run)), "--force"]
    command += to_argv({name: args[name] for name in ("device", "batch_size", "workers")})
    if comparison.args.id_test:
        command += ["--per-set"]  # the ID test set is no part of a mean OOD

    def record() -> dict[str, Any]:
        return json.loads(comparison.read(run, "wiseft/wiseft.json"))

    jobs.run("sweep", run.title, out, command, lambda: f"alpha {record()['chosen_alpha']:g}")
    found = record()
    return {"folder": str(out.parent), "chosen_alpha": found["chosen_alpha"], "alphas": found["alphas"]}


def _write(comparison: Comparison, settings: dict[str, Any], results: Mapping[Block, dict[str, Any]]) -> None:
    """Write what plots.py makes of it all."""
    blocks = []
    for block, methods in results.items():
        table = plots.rows(methods, comparison.id_sets)
        less = plots.differences(table, list(methods)) if comparison.methods[0] in methods else {}
        entry = {"title": block.title, "shots": block.shots, "templates": block.templates, "methods": methods}
        blocks.append({**entry, "rows": table, "differences": less})
    record = {
        "settings": settings,
        "epochs": max(args.epochs for args in comparison.train_args.values()),  # of a fit, there is one
        **{name: getattr(comparison, name) for name in ("methods", "seeds", "id_sets")},
        "blocks": blocks,
    }
    out, text = comparison.out, plots.document(record)
    write_atomically(out / "compare.json", json.dumps(record, indent=1) + "\n")
    write_atomically(out / "compare.md", text)
    picture = ""
    if any(results.values()):
        picture = ", compare.png"
        plots.draw(record, out / "compare.png")
    sys.stdout.write(text)
    _log.info(f"Wrote {out}/compare.md, compare.json{picture}; the runs are in {out}/runs.")
