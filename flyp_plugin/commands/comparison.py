"""What `flyp compare` was asked for: its flags, checked, and the figures of its finished runs."""

import argparse
import json
from dataclasses import replace
from importlib.util import find_spec
from itertools import product, starmap
from pathlib import Path
from typing import Any

from flyp_plugin.commands import grid
from flyp_plugin.commands.grid import Block, Run, Setting
from flyp_plugin.commands.jobs import find_devices
from flyp_plugin.errors import InputError
from flyp_plugin.flags import parser, to_argv

# flags of `flyp train` that this command sets for each run
_RESERVED = [
    "seed",
    "shots-seed",
    "objective",
    "anchor",
    "anchor-teacher",
    "name",
    "logs",
    "resume",
    "demo",
    "help-open-clip",
    "save-frequency",
    "delete-previous-checkpoint",
]
_NO_STOCK = "lp"  # its seeds differ in no weights but those of the head


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
        self.tune = grid.parse_tune(self.methods, args.tune)
        further = next(iter(self.tune.values()), [])
        # of each method: its own values, and then
        self.tries = len(self.values[self.methods[0]]), len(further)
        if args.model_stock and len(self.seeds) < 2:
            raise InputError(
                f"--model-stock merges the seeds of a method; pass more seeds than --seeds {args.seeds}."
            )
        self.blocks = grid.parse_blocks(args.shots, args.templates, args.prompts)
        names = [spec.partition("=")[0] for spec in args.eval_data]
        if args.id_test not in (None, *names[1:]):
            what = f"a set of --eval-data after the first ({', '.join(names)})"
            raise InputError(f"--id-test {args.id_test} must be {what}.")
        self.devices = find_devices(args.devices)
        self.id_sets = [names[0], *filter(None, [args.id_test])]  # the set that chooses, and the ID test set
        self.metric = "loss" if args.select == "loss" else "top1"
        self.chosen_by = f"{names[0]}/{self.metric}"  # the figure that chooses the epoch and the tuned value
        reserved = [*_RESERVED, *self.tune, *(["eval-frequency"] if args.select != "last" else [])]
        for word, name in product(args.train_flags, reserved):
            flag = word.partition("=")[0]
            if len(flag) > 2 and f"--{name}".startswith(flag):  # argparse takes --see for --seed
                raise InputError(
                    f"--{name} is set by `flyp compare` for each run; leave out {word} (see --help)."
                )
        if args.model_stock and self.methods == [_NO_STOCK]:
            raise InputError(f"--model-stock merges no seeds of {_NO_STOCK}; leave it out, or add a method.")
        if not (find_spec("matplotlib") and find_spec("scipy")):
            raise InputError("matplotlib and scipy are missing: pip install 'flyp-plugin[train,compare]'.")
        pairs = list(product(self.blocks, self.methods))
        self.train_args = dict(zip(pairs, starmap(self._checked, pairs)))

    def _checked(self, block: Block, method: str) -> argparse.Namespace:
        """The flags of a method's runs as `flyp train` parses and checks them."""
        from flyp_plugin.train import FlypRun

        all_images = replace(block, shots=None)  # drawing shots would read all the data
        setting: Setting = ((grid.tuned(method), self.values[method][0]),)
        *others, last = grid.further(setting, self.values[method], method, self.tune) or [setting]
        for other in others:
            parser().parse_known_args(self.flags(Run(all_images, method, other, self.seeds[0])))
        return FlypRun(self.flags(Run(all_images, method, last, self.seeds[0]))).args

    def flags(self, run: Run) -> list[str]:
        """The flags of a training, except where it goes. The user's come last, so that they win."""
        args, block = self.args, run.block
        flags = {name: getattr(args, name) for name in ("model", "pretrained", "train_data")}
        flags |= {name: getattr(block, name) for name in ("templates", "prompts", "shots")}
        flags |= {"shots_seed": block.shots and run.seed}
        flags |= {**grid.METHODS[run.method], **dict(run.setting)}
        # 0: only before training and after the last epoch
        flags |= {"seed": run.seed, "eval_frequency": 0 if args.select == "last" else 1}
        sets = [word for spec in args.eval_data for word in ("--eval-data", spec)]
        return [*to_argv(flags), *sets, *args.train_flags]

    @property
    def counts(self) -> dict[str, int]:
        """The number of trainings, of sweeps and, with --model-stock, of merges."""
        methods, seeds = [method for _, method in self.train_args], len(self.seeds)
        sweeps = len(methods) + sum(map(grid.has_teacher, methods))
        counts = {"training": len(methods) * (sum(self.tries) + seeds - 1), "sweep": sweeps * seeds}
        return counts | ({"merge": sum(map(self.merges, methods))} if self.args.model_stock else {})

    def merges(self, method: str) -> bool:
        """Whether the seeds of a method are merged by Model Stock."""
        return self.args.model_stock and method != _NO_STOCK

    def folder(self, run: Run) -> Path:
        return self.out / "runs" / run.name

    def rows(self, run: Run) -> dict[int, dict[str, Any]]:
        """The lines of results.jsonl by epoch; 0 is zero-shot. A resumed run may have one twice: the later counts."""
        lines = self.read(self.folder(run), "checkpoints/results.jsonl").splitlines()
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
            return self.train_args[run.block, run.method].epochs
        return best({epoch: row[self.chosen_by] for epoch, row in self.rows(run).items()}, self.metric)

    def figure(self, run: Run) -> float:
        """The figure by which the epoch was chosen, at that epoch; it also chooses the tuned value."""
        return self.rows(run)[self.choose_epoch(run)][self.chosen_by]

    @staticmethod
    def read(folder: Path, name: str) -> str:
        """A text file of a finished run. Raises InputError if it was deleted."""
        if not (folder / name).exists():
            raise InputError(f"{folder / name} of a finished run is missing; delete {folder} to rerun it.")
        return (folder / name).read_text()
