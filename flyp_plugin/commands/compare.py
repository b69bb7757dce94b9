"""`flyp compare`: the paper's comparison of fine-tuning methods on the user's own data.

It runs `flyp train` and `flyp wiseft` for each method and seed (grid.py), each in a process and a folder of its own, one at
a time on each of --devices (jobs.py), and turns their results into tables and a picture (plots.py). What makes the
comparison fair is said in its --help, below.
"""

import argparse
import json
import logging
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from flyp_plugin.commands import grid, plots
from flyp_plugin.commands.comparison import Comparison
from flyp_plugin.commands.grid import TRIED, Block, Run, Setting
from flyp_plugin.commands.jobs import DONE, JobFailed, Jobs, claim_folder, run_jobs
from flyp_plugin.errors import InputError
from flyp_plugin.flags import to_argv
from flyp_plugin.sources import write_atomically

_ALPHAS = [f"{tenth / 10:.2f}" for tenth in range(11)]  # those of `flyp wiseft` by default
# in runs/, of each kind of command
_FOLDERS = {"training": "*_seed*", "sweep": "*_seed*/*", "merge": "*_model_stock"}
_FLYP = (sys.executable, "-m", "flyp_plugin")
_log = logging.getLogger(__name__)
EXAMPLE = """  flyp compare --model ViT-B-16 --pretrained openai --train-data data \\
      --eval-data val=data --eval-data sketch=other --methods flyp,ce,lp,lp-ft --epochs 10 --out comparison"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    # fmt: off
    parser.epilog = """All other flags go to each training (see train_flyp.py --help and --help-open-clip): --epochs, --batch-size,
--workers, --model-config, ... Every method gets the same data, epochs and number of tries. First it is trained with each
value of its own setting: the learning rate or, for lp, C. With --tune it then tries as many further settings as --tune has
values: these at its best own value or, if it has no such setting, more values of its own around the best one. The first set
chooses among all tries, on the first seed (the other seeds train with the best), and for each seed the epoch (--select)
and alpha; no other set chooses anything. Alpha is chosen by top-1, and so are the setting and the epoch, unless --select
is loss.

Methods: an objective of flyp train (flyp, ce, lp, lp-ft, flyp-ce), or flyp or ce with --anchor 3.5: to the pretrained model
(flyp-anchor, ce-anchor) or to an average along the trajectory (flyp-trajectory, ce-trajectory). That average is a model of
its own, which has rows "METHOD, teacher" (at the epoch chosen for METHOD). compare.md also has the calibration error (ECE).

Each run is a folder in DIR/runs with its own command.txt. Finished runs are skipped, so the same command resumes an
interrupted comparison; --model-stock and seeds may be added to one."""
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
    add("--tune", action="append", default=[], metavar="SETTING=A,B,...", help="values to try of one more setting, by the "
        "methods that have it: anchor (the weight; *-anchor and *-trajectory) or logit-scale (the inverse temperature that "
        "training starts from; all but lp and lp-ft). Repeatable with equally many values: a method tunes the first that "
        "it has")
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
    add("--model-stock", action="store_true", help="also merge the seeds of each method but lp by Model Stock (flyp wiseft "
        "--model-stock): a row of one model")
    devices = parser.add_mutually_exclusive_group()
    devices.add_argument("--devices", metavar="A,B,...", help="run as many trainings at a time, one on each device, such as "
        "cuda:0,cuda:1; all: each visible GPU. The results are the same. A device may occur several times (default: one "
        "at a time, on cuda if there is a GPU, else cpu)")
    devices.add_argument("--device", dest="devices", metavar="A", help="the same, for one")
    add("--out", required=True, metavar="DIR", help="folder for compare.md, compare.json, compare.png and runs/")
    # fmt: on


def run(args: argparse.Namespace) -> None:
    """Run what --out lacks, then write compare.md (also to stdout), compare.json and compare.png.

    Raises:
        InputError: a mistake in the flags; or a method failed, in which case the tables have the others.
    """
    comparison = Comparison(args)
    out, counts, first = comparison.out, comparison.counts, comparison.seeds[0]
    (tried, more), others = comparison.tries, len(comparison.seeds) - 1
    settings = {name: value for name, value in vars(args).items() if name not in ("out", "devices")}
    # only the first seed chooses: others may be added and left out, and so may what is merged
    claimed = {name: value for name, value in settings.items() if name != "model_stock"}
    claim_folder(out, {**claimed, "seeds": first})
    finished = {kind: len([*out.glob(f"runs/{_FOLDERS[kind]}/{DONE}")]) for kind in counts}
    left = {kind: number - finished[kind] for kind, number in counts.items()}
    plan = f"{counts['training']} trainings, {counts['sweep']} sweeps over alpha"
    plan += f", {counts['merge']} merges by Model Stock" if args.model_stock else ""
    _log.info(
        f"Plan: {plan}; {sum(finished.values())} of them finished. In each table each method is trained with {tried} values"
        f"{f', then {more} further settings,' if more else ''} on seed {first}, and with the best on {others} more seeds."
    )
    results: dict[Block, dict[str, Any]] = {block: {} for block in comparison.blocks}
    with run_jobs(out, left, sum(counts.values()), comparison.devices) as jobs:

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
    """Tune a method, train it on all seeds, sweep alpha and merge; returns its part of compare.json."""
    first, own = comparison.seeds[0], grid.tuned(method)
    figures: dict[Setting, float] = {}

    def attempt(settings: Iterable[Setting]) -> Setting:
        """Train with some settings; returns the best of all so far, which alone keeps its checkpoint."""
        runs = {setting: Run(block, method, setting, first) for setting in settings}
        jobs.map(lambda run: _train(comparison, run, jobs), runs.values())
        figures.update({setting: comparison.figure(run) for setting, run in runs.items()})
        chosen = grid.choose(figures, comparison.metric)
        for setting in figures:
            if setting != chosen:
                _keep_checkpoint(comparison.folder(Run(block, method, setting, first)), None)
        return chosen

    values = comparison.values[method]
    best_own = attempt(((own, value),) for value in values)
    chosen = attempt(grid.further(best_own, values, method, comparison.tune))
    runs = [Run(block, method, chosen, seed) for seed in comparison.seeds]

    def score(run: Run) -> dict[str, Any]:
        if run.seed != first:
            _train(comparison, run, jobs)
        return _sweep(comparison, run, jobs)

    seeds = dict(zip(comparison.seeds, jobs.map(score, runs)))
    by_value = {setting[0][1]: figure for setting, figure in figures.items() if len(setting) == 1}
    found = {"tuned": own, "value": chosen[0][1], "chosen_by": comparison.chosen_by, "by_value": by_value}
    if flag := grid.second(method, comparison.tune):
        default = grid.METHODS[method].get(flag)  # None: the pretrained model's
        by_value = {dict(setting)[flag]: figure for setting, figure in figures.items() if len(setting) > 1}
        by_value |= {default: figures[best_own]} if default else {}
        found["then"] = {"tuned": flag, "value": dict(chosen).get(flag, default), "by_value": by_value}
    if comparison.merges(method):
        found["model_stock"] = _merge(comparison, runs, jobs)
    return {**found, "zero_shot": comparison.metrics(runs[0], 0), "seeds": seeds}


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
    """Delete the checkpoints of a finished run, and their teachers, but for one or none; its log and figures stay."""
    from flyp_plugin.record import epochs, teacher_path

    for number, path in epochs(folder).items():
        if number != epoch:
            teacher_path(path.parent, number).unlink(missing_ok=True)
            path.unlink()


def _sweep(comparison: Comparison, run: Run, jobs: Jobs) -> dict[str, Any]:
    """Sweep alpha at the epoch chosen, also for the teacher if there is one; returns a seed's part of compare.json."""
    folder, epoch = comparison.folder(run), comparison.choose_epoch(run)

    def sweep(teacher: bool) -> dict[str, Any]:
        if epoch == 0:  # nothing to merge: at every alpha the weights are those that training started from
            jobs.skip("sweep")
            return {"chosen_alpha": 0.0, "alphas": dict.fromkeys(_ALPHAS, comparison.metrics(run, 0))}
        # --per-set: a mean OOD would include the ID test set
        words = [str(folder), "--epoch", str(epoch), *(["--per-set"] if comparison.args.id_test else [])]
        title, out = (", teacher", "wiseft_teacher") if teacher else ("", "wiseft")
        words += ["--teacher"] if teacher else []
        found = _wiseft(comparison, run, "sweep", words, run.title + title, folder / out, jobs)
        return {key: found[key] for key in ("chosen_alpha", "alphas")}

    found = {"folder": str(folder), "epoch": epoch, **sweep(teacher=False)}
    return {**found, "teacher": sweep(teacher=True)} if grid.has_teacher(run.method) else found


def _merge(comparison: Comparison, runs: Sequence[Run], jobs: Jobs) -> dict[str, Any]:
    """Merge the seeds of a method by Model Stock, but for those scored at epoch 0; returns its part of compare.json."""
    epochs = {run: epoch for run in runs if (epoch := comparison.choose_epoch(run))}
    found = {"seeds": [run.seed for run in epochs]}
    if len(epochs) < 2:
        jobs.skip("merge")
        return found
    paths = [f"{comparison.folder(run)}/checkpoints/epoch_{epoch}.pt" for run, epoch in epochs.items()]
    run = replace(runs[0], seed=None)
    folder = comparison.folder(run)
    if (folder / DONE).exists():
        inputs = json.loads(comparison.read(folder, "wiseft.json"))["inputs"]["finetuned"]
        # RUN/checkpoints/epoch_N.pt, however --out was spelled
        merged = [Path(one["given"]).parts[-3:] for one in inputs]
        wanted = [Path(path).parts[-3:] for path in paths]
        # other seeds, or one that was trained again
        if merged != wanted or max(map(os.path.getmtime, paths)) > os.path.getmtime(folder / DONE):
            (folder / DONE).unlink()
    words = ["--model-stock", *paths, "--out", str(folder)]
    stock = _wiseft(comparison, run, "merge", words, run.title, folder, jobs)
    return {**found, "folder": str(folder), "sets": stock["sets"]}


def _wiseft(
    comparison: Comparison, run: Run, kind: str, words: Sequence[str], title: str, out: Path, jobs: Jobs
) -> dict[str, Any]:
    """Run `flyp wiseft` with `words` on the data of a run, unless it has; returns its wiseft.json."""
    args = vars(comparison.train_args[run.block, run.method])
    flags = to_argv({name: args[name] for name in ("batch_size", "workers")})
    command = [*_FLYP, "wiseft", *words, "--force", *flags]

    def record() -> dict[str, Any]:
        return json.loads(comparison.read(out, "wiseft.json"))

    def result() -> str:
        if kind == "sweep":
            return f"alpha {record()['chosen_alpha']:g}"
        name = comparison.id_sets[0]
        return f"{name} {100 * record()['sets'][name]['top1']:.1f}"

    jobs.run(kind, title, out, command, result)
    return record()


def _write(comparison: Comparison, settings: dict[str, Any], results: Mapping[Block, dict[str, Any]]) -> None:
    """Write compare.json, compare.md and compare.png."""
    from flyp_plugin.checkpoints import atomic_write

    blocks = []
    for block, methods in results.items():
        found = {name: getattr(block, name) for name in ("title", "shots", "templates", "prompts")}
        found["methods"] = methods
        for metric, rows, differences in (("top1", "rows", "differences"), ("ece", "ece", "ece_differences")):
            found[rows] = table = plots.rows(methods, comparison.id_sets, metric)
            paired = comparison.methods[0] in methods
            found[differences] = plots.differences(table, list(methods)) if paired else {}
        blocks.append(found)
    epochs = max(args.epochs for args in comparison.train_args.values())  # a linear probe has 1
    parts = {name: getattr(comparison, name) for name in ("methods", "seeds", "id_sets", "tries")}
    record = {"settings": settings, "epochs": epochs, **parts, "blocks": blocks}
    out, text = comparison.out, plots.document(record)
    write_atomically(out / "compare.json", json.dumps(record, indent=1) + "\n")
    write_atomically(out / "compare.md", text)
    if any(results.values()):
        with atomic_write(out / "compare.png") as part:
            plots.draw(record, part)
    sys.stdout.write(text)
    _log.info(f"Wrote compare.md, compare.json and a picture to {out}; the runs are in {out}/runs.")
