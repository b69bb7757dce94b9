"""Scores the evaluation sets (--eval-data) while a run trains: accuracy in and out of distribution, epoch by epoch.

openclip.py calls the Monitor where open_clip evaluates, and open_clip logs what it returns. Scoring is in metrics.py.
"""

import json
import logging
import shlex
from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from flyp_plugin.evalsets import EvalSet, build_for_each, loader_from_args
from flyp_plugin.heads import ImageClassifier
from flyp_plugin.metrics import Metrics, Tally, best, score, table
from flyp_plugin.model_spec import is_place

_log = logging.getLogger(__name__)


class Monitor:
    """Scores a model before training (epoch 0: zero-shot), every --eval-frequency epochs and after the last one.

    With several ranks each scores its part of the images, and all get the metrics of the whole set. The first of `sets` is
    the ID validation set. A resumed run reads its earlier epochs from results.jsonl.
    """

    def __init__(self, sets: Sequence[EvalSet], preprocess: Callable, args: Namespace):
        self.sets, self.args = sets, args
        self.loaders = [loader_from_args(each, preprocess, args) for each in sets]
        self.history: dict[int, dict[str, Any]] = {}
        results = Path(args.checkpoint_path, "results.jsonl")
        if args.rank == 0 and args.resume and results.exists():
            rows = [json.loads(line) for line in results.read_text().splitlines()]
            self.history = {row["epoch"]: row for row in rows if f"{sets[0].name}/top1" in row}

    def scores(self, epoch: int) -> bool:
        """Whether this epoch is evaluated."""
        frequency = self.args.eval_frequency
        return epoch in (0, self.args.epochs) or bool(frequency and epoch % frequency == 0)

    def __call__(self, model: torch.nn.Module, tokenizer: Callable, epoch: int) -> dict:
        """Metrics as `NAME/top1`, `NAME/macro_f1`, ... and the epoch."""
        several = self.args.world_size > 1
        if several:  # the checkpoint has rank 0's statistics of batch norm
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)
        row: dict[str, Any] = {}
        make = ImageClassifier.from_model if epoch else ImageClassifier.from_prompts  # 0: zero-shot
        build = partial(make, model, tokenizer, precision=self.args.precision, across_ranks=several)
        classifiers = build_for_each(self.sets, build)
        for eval_set, loader in zip(self.sets, self.loaders):
            tally = Tally(len(eval_set.prompts.classnames))
            metrics = self._merge_ranks(score(classifiers[eval_set.name], loader, tally))
            if "worst_group" in metrics:  # a name, while logged metrics must be numbers
                _log.info(f"{eval_set.name}: the worst group is {metrics.pop('worst_group')!r}")
            row |= {f"{eval_set.name}/{metric}": value for metric, value in metrics.items()}
        row["epoch"] = epoch
        self.history[epoch] = row
        if self.args.rank == 0:
            self._log_table(epoch)
        return row

    def _merge_ranks(self, tally: Tally) -> Metrics:
        if self.args.world_size > 1:
            parts: list[Any] = [None] * self.args.world_size
            dist.all_gather_object(parts, tally)
            tally = parts.pop(0)
            for other in parts:
                tally.merge(other)
        return tally.metrics()

    def _log_table(self, epoch: int) -> None:
        """Log the metrics of an epoch, with the change since epoch 0."""
        now, before, rows = self.history[epoch], self.history.get(0, {}) if epoch else {}, {}
        for name in (eval_set.name for eval_set in self.sets):
            rows[name] = {"top-1": f"{name}/top1", "macro-F1": f"{name}/macro_f1"}
            for title, key in rows[name].items():
                change = f" ({100 * (now[key] - before[key]):+.2f})" if key in before else ""
                rows[name][title] = f"{100 * now[key]:.2f}{change}"
            rows[name]["n"] = str(now[f"{name}/n"])
        for line in table(rows, f"epoch {epoch}").splitlines():
            _log.info(line)

    def summary(self) -> list[str]:
        """For the end of a run: its best epoch on the first set, and the command that merges it."""
        args, name = self.args, self.sets[0].name
        trained = {epoch: row[f"{name}/top1"] for epoch, row in self.history.items() if epoch}
        if not trained:
            return []
        chosen, folder = best(trained), Path(args.logs, args.name)
        lines = [f"Best epoch on {name}: {chosen}, top-1 {100 * trained[chosen]:.2f}."]
        saved = {epoch for epoch in trained if (folder / f"checkpoints/epoch_{epoch}.pt").exists()}
        if saved and (args.pretrained or is_place(args.model)):
            better = chosen in saved - {max(saved)}
            hint = f" (the last epoch; --epoch best takes epoch {chosen})" if better else ""
            lines.append(
                f"Next, merge it with the pretrained weights: flyp wiseft {shlex.quote(str(folder))}{hint}"
            )
        return lines
