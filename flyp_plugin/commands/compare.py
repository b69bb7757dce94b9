"""`flyp compare`: the paper's comparison of fine-tuning methods on the user's own data.

It runs `flyp train` and `flyp wiseft` for each method and seed, each in a process and a folder of its own, one at a time
on each of --devices (jobs.py), and turns their results into tables and a picture (plots.py). What makes the comparison
fair is said in its --help, below.
"""

import argparse
import json
import logging
import re
import sys
from collections.abc import Mapping
from dataclasses import replace
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

from flyp_plugin.commands import grid, plots
from flyp_plugin.commands.grid import TRIED, Block, Run, tuned
from flyp_plugin.commands.jobs import DONE, JobFailed, Jobs, claim_folder, find_devices, run_jobs
from flyp_plugin.errors import InputError
from flyp_plugin.flags import to_argv
from flyp_plugin.sources import write_atomically

# flags of `flyp train` that this command sets for each run, always and with --select best or loss
_RESERVED = (
    "seed|shots-seed|objective|name|logs|resume|demo|help-open-clip|save-frequency|delete-previous-checkpoint"
)
_RESERVED_IF_SELECTED = f"{_RESERVED}|eval-frequency"
_ALPHAS = [f"{tenth / 10:.2f}" for tenth in range(11)]  # those of `flyp wiseft` by default
_FLYP = (sys.executable, "-m", "flyp_plugin")
_log = logging.getLogger(__name__)
EXAMPLE = """  flyp compare --model ViT-B-16 --pretrained openai --train-data data \\
      --eval-data val=data --eval-data sketch=other --methods flyp,ce,lp,lp-ft --epochs 10 --out comparison"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    # fmt: off
    parser.set_defaults(passes_on=True)
    parser.epilog = """All other flags go to each training (see train_flyp.py --help and --help-open-clip): --epochs, --batch-size,
--workers, --model-config, ... Every method gets the same data, epochs and number of values of its one tuned setting: the
learning rate or, for lp, C. The first set chooses that value, on the first seed (the other seeds train with it), and for
each seed the epoch (--select) and alpha; no other set chooses anything. Alpha is chosen by top-1, and so are the value
and the epoch, unless --select is loss. Each run is a folder in DIR/runs with its own command.txt. Finished runs are
skipped, so the same command resumes an interrupted comparison."""
    add = parser.add_argument
    add("--model", required=True, metavar="NAME", help="open_clip's name of the architecture")
    add("--pretrained", required=True, metavar="TAG|PATH", help="what each fine-tuning starts from")
    add("--train-data", required=True, metavar="SHARDS", help="data folder (its train split) or tars")
    add("--eval-data", action="append", required=True, metavar="NAME=SHARDS", help="a labelled set (a data folder: its "
        "test split); repeatable; the first is the ID validation set, which chooses")
    add("--id-test", metavar="NAME", help="the set of --eval-data that is an ID test set, so not part of mean OOD")
    add("--methods", default="flyp,ce,lp,lp-ft", metavar="A,B,...",
        help=f"some of {', '.join(grid.METHODS)}; the others are compared with the first (default: %(default)s)")
    add("--lr", metavar="A,B,...", help=f"learning rates to choose from (default: {TRIED['lr']}, or the middle ones of "
        "these, as many as there are of --lp-c)")
    add("--lp-c", metavar="A,B,...", help="for lp, as many values of its inverse regularisation strength "
        f"(default: {TRIED['lp-c']}, or the middle ones of these, as many as there are of --lr)")
    add("--seeds", default="0:3", metavar="A:B|A,B,...", help="A:B excludes B (default: %(default)s)")
    add("--shots", metavar="K,L,...", help="images per class, drawn by the seed; one table for each")
    add("--templates", action="append", metavar="FILE", help="templates to train with (a file, openai, simple, fmow, ..., "
        "or one template); repeatable, one table for each. Sets that have a templates file are scored with it")
    add("--prompts", action="append", metavar="FILE.json", help="descriptions of each class to train with; repeatable, one "
        "table for each, after those of --templates (in `flyp train` the two add up). Sets whose class names are all in "
        "FILE are scored with it")
    add("--select", choices=["last", "best", "loss"], default="last", help="the epoch at which a run is scored: its last, "
        "or the one with the highest top-1 (best) or the lowest loss (mean cross-entropy) on the first set, where zero-shot "
        "is epoch 0. For best and loss, one run's checkpoints of all epochs must fit on the disk (default: %(default)s)")
    devices = parser.add_mutually_exclusive_group()
    devices.add_argument("--devices", metavar="A,B,...", help="run as many trainings at a time, one on each device, such as "
        "cuda:0,cuda:1; all: each visible GPU. The results are the same. A device may occur several times (default: one "
        "at a time, on cuda if there is a GPU, else cpu)")
    devices.add_argument("--device", dest="devices", metavar="A", help="the same, for one")
    add("--out", required=True, metavar="DIR", help="folder for compare.md, compare.json, compare.png and runs/")
    # fmt: on


class Comparison:
    """What the flags ask for, checked before anything runs: InputError for whatever `flyp train` would refuse.

    Args:
        args: the flags of `flyp compare`; args.train_flags are those for `flyp train`.
    """

    def __init__(self, args: argparse.Namespace):
        self.args, self.out = args, Path(args.out)
        self.methods, self.seeds = grid.parse_methods(args.methods), grid.parse_seeds(args.seeds)
        args.lr, args.lp_c = grid.with_defaults({"lr": args.lr, "lp-c": args.lp_c}).values()
        self.values = grid.parse_values(self.methods, {"lr": args.lr, "lp-c": args.lp_c})
        self.blocks = grid.parse_blocks(args.shots, args.templates, args.prompts)
        names = [spec.partition("=")[0] for spec in args.eval_data]
        if args.id_test not in (None, *names[1:]):
            what = f"a set of --eval-data after the first ({', '.join(names)})"
            raise InputError(f"--id-test {args.id_test} must be {what}.")
        self.devices = find_devices(args.devices)
        self.id_sets = [names[0], *filter(None, [args.id_test])]  # the set that chooses, and the ID test set
        self.metric = "loss" if args.select == "loss" else "top1"
        self.chosen_by = f"{names[0]}/{self.metric}"  # the figure that chooses the epoch and the tuned value
        reserved = _RESERVED if args.select == "last" else _RESERVED_IF_SELECTED
        for word in args.train_flags:
            if re.fullmatch(f"--({reserved})(=.*)?", word):
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
        flags |= {name: getattr(block, name) for name in ("templates", "prompts", "shots")}
        flags |= {"shots_seed": block.shots and run.seed}
        flags |= {"objective": run.method if run.method != "flyp" else None, tuned(run.method): run.value}
        # 0: only before training and after the last epoch
        flags |= {"seed": run.seed, "eval_frequency": 0 if args.select == "last" else 1}
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

    def rows(self, run: Run) -> dict[int, dict[str, Any]]:
        """The lines of results.jsonl by epoch; 0 is zero-shot. A resumed run may have one twice: the later counts."""
        lines = self.read(run, "checkpoints/results.jsonl").splitlines()
        return {row["epoch"]: row for row in map(json.loads, lines)}

    def metrics(self, run: Run, epoch: int) -> dict[str, dict[str, Any]]:
        """The metrics of a run on each set."""
        by_set: dict[str, dict[str, Any]] = {}
        for key, value in self.rows(run)[epoch].items():
            name, slash, metric = key.partition("/")
            if slash:
                by_set.setdefault(name, {})[metric] = value
        return by_set

    def choose_epoch(self, run: Run) -> int:
        """The epoch at which a finished run is scored, by --select; 0 if zero-shot is as good as any other."""
        from flyp_plugin.metrics import best

        if self.args.select == "last":
            return self.epochs(run)
        return best({epoch: row[self.chosen_by] for epoch, row in self.rows(run).items()}, self.metric)

    def figure(self, run: Run) -> float:
        """The figure by which the epoch was chosen, at that epoch; it also chooses the tuned value."""
        return self.rows(run)[self.choose_epoch(run)][self.chosen_by]

    def read(self, run: Run, name: str) -> str:
        """A text file of a finished run. Raises InputError if it was deleted."""
        folder = self.folder(run)
        if not (folder / name).exists():
            raise InputError(f"{folder / name} of a finished run is missing; delete {folder} to rerun it.")
        return (folder / name).read_text()


def run(args: argparse.Namespace) -> None:
    """Run what --out lacks, then write compare.md (also to stdout), compare.json and compare.png.

    Raises:
        InputError: a mistake in the flags; or a method failed, in which case the tables have the others.
    """
    comparison = Comparison(args)
    out, counts, first = comparison.out, comparison.counts, comparison.seeds[0]
    tried, others = len(comparison.values[comparison.methods[0]]), len(comparison.seeds) - 1
    settings = {name: value for name, value in vars(args).items() if name not in ("run", "out", "devices")}
    # only the first seed chooses: others may be added and left out
    claim_folder(out, {**settings, "seeds": first})
    finished = len(list(out.glob(f"runs/**/{DONE}")))
    _log.info(
        f"Plan: {counts['training']} trainings and {counts['sweep']} sweeps over alpha, {finished} of them finished. In each "
        f"table each method is trained with {tried} values on seed {first}, and with the best on {others} more seeds."
    )
    results: dict[Block, dict[str, Any]] = {block: {} for block in comparison.blocks}
    with run_jobs(out, counts, comparison.devices) as jobs:

        def attempt(which: tuple[Block, str]) -> dict[str, Any] | None:
            try:
                return _run_method(comparison, *which, jobs)
            except JobFailed as error:
                _log.error(error)
                return None

        found = jobs.map(attempt, comparison.train_args)
    for (block, method), result in zip(comparison.train_args, found):
        if result:
            results[block][method] = result
    _write(comparison, settings, results)
    if failed := found.count(None):
        what = f"{failed} of {len(found)} methods and settings failed (see above)"
        raise InputError(f"{what} and are missing in {out}/compare.md; the same command tries them again.")


def _run_method(comparison: Comparison, block: Block, method: str, jobs: Jobs) -> dict[str, Any]:
    """Tune a method, train it on all seeds and sweep alpha; returns its part of compare.json."""
    from flyp_plugin.metrics import best

    first = comparison.seeds[0]
    tuning = {value: Run(block, method, value, first) for value in comparison.values[method]}
    jobs.map(lambda run: _train(comparison, run, jobs), tuning.values())
    figures = {value: comparison.figure(run) for value, run in tuning.items()}
    chosen = best(figures, comparison.metric)
    for value, run in tuning.items():
        if value != chosen:
            _keep_checkpoint(comparison.folder(run), None)

    def score(seed: int) -> dict[str, Any]:
        run = Run(block, method, chosen, seed)
        if seed != first:
            _train(comparison, run, jobs)
        return _sweep(comparison, run, jobs)

    seeds = dict(zip(comparison.seeds, jobs.map(score, comparison.seeds)))
    found = {"tuned": tuned(method), "value": chosen, "chosen_by": comparison.chosen_by, "by_value": figures}
    return {**found, "zero_shot": comparison.metrics(tuning[chosen], 0), "seeds": seeds}


def _train(comparison: Comparison, run: Run, jobs: Jobs) -> None:
    """Train; of the checkpoints, keep that of the epoch that --select chooses."""
    folder, select = comparison.folder(run), comparison.args.select
    command = [*_FLYP, "train", *comparison.flags(run), "--logs", str(folder.parent), "--name", folder.name]
    command += ["--resume", "latest", *(["--delete-previous-checkpoint"] if select == "last" else [])]

    def result() -> str:
        name, figure, epoch = comparison.id_sets[0], comparison.figure(run), comparison.choose_epoch(run)
        said = f"{name} loss {figure:.4f}" if comparison.metric == "loss" else f"{name} {100 * figure:.1f}"
        return said if select == "last" else f"{said} at epoch {epoch or '0 (zero-shot)'}"

    jobs.run("training", run.title, folder, command, result)
    _keep_checkpoint(folder, comparison.choose_epoch(run))


def _keep_checkpoint(folder: Path, epoch: int | None) -> None:
    """Delete the checkpoints of a finished run but for one or none; its log and figures stay."""
    from flyp_plugin.record import epochs

    for number, path in epochs(folder).items():
        if number != epoch:
            path.unlink()


def _sweep(comparison: Comparison, run: Run, jobs: Jobs) -> dict[str, Any]:
    """Sweep alpha at the epoch chosen; returns a seed's part of compare.json."""
    folder, epoch = comparison.folder(run), comparison.choose_epoch(run)
    found = {"folder": str(folder), "epoch": epoch}
    if epoch == 0:  # nothing to merge: at every alpha the weights are those that training started from
        jobs.skip("sweep")
        return {**found, "chosen_alpha": 0.0, "alphas": dict.fromkeys(_ALPHAS, comparison.metrics(run, 0))}
    args = vars(comparison.train_args[run.block, run.method])
    command = [*_FLYP, "wiseft", str(folder), "--epoch", str(epoch), "--force"]
    command += to_argv({name: args[name] for name in ("batch_size", "workers")})
    if comparison.args.id_test:
        command += ["--per-set"]  # a mean OOD would include the ID test set

    def record() -> dict[str, Any]:
        return json.loads(comparison.read(run, "wiseft/wiseft.json"))

    jobs.run("sweep", run.title, folder / "wiseft", command, lambda: f"alpha {record()['chosen_alpha']:g}")
    return {**found, **{key: record()[key] for key in ("chosen_alpha", "alphas")}}


def _write(comparison: Comparison, settings: dict[str, Any], results: Mapping[Block, dict[str, Any]]) -> None:
    """Write compare.json, compare.md and compare.png."""
    from flyp_plugin.checkpoints import atomic_write

    blocks = []
    for block, methods in results.items():
        table = plots.rows(methods, comparison.id_sets)
        differences = plots.differences(table, list(methods)) if comparison.methods[0] in methods else {}
        given = {name: getattr(block, name) for name in ("title", "shots", "templates", "prompts")}
        blocks.append({**given, "methods": methods, "rows": table, "differences": differences})
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
