"""Accuracy in and out of distribution while a run trains: what --eval-data shows. Scoring itself is metrics.py's."""

import json
import logging
import shlex
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from flyp_plugin.data import LabelledDataset
from flyp_plugin.evalsets import EvalSet, loader_from_args
from flyp_plugin.heads import ImageClassifier
from flyp_plugin.metrics import Metrics, Tally, best, score
from flyp_plugin.model_spec import is_place

_log = logging.getLogger(__name__)


class Monitor:
    """Scores a model on evaluation sets after epoch 0 (the zero-shot row), every --eval-frequency epochs and after the last.

    With several ranks each scores its part of the images and all get the figures of the whole.

    Args:
        sets: the first is the ID validation set.
        args: open_clip's and FLYP's, of a run that has begun; a resumed one goes on from its results.jsonl.
    """

    def __init__(self, sets: Sequence[EvalSet], args: Namespace):
        self.sets, self.args = sets, args
        self.loaders: dict[str, LabelledDataset] = {}
        self.history: dict[int, dict[str, Any]] = {}
        results = Path(args.checkpoint_path, "results.jsonl")
        if args.rank == 0 and args.resume and results.exists():
            rows = [json.loads(line) for line in results.read_text().splitlines()]
            self.history = {row["epoch"]: row for row in rows if f"{sets[0].name}/top1" in row}

    def __call__(
        self, model: torch.nn.Module, preprocess: Callable, tokenizer: Callable, epoch: int
    ) -> dict[str, Any]:
        """Metrics as `NAME/top1`, `NAME/macro_f1`, ... and the epoch; empty where this epoch is not evaluated."""
        frequency = self.args.eval_frequency
        if epoch not in (0, self.args.epochs) and (frequency == 0 or epoch % frequency):
            return {}
        row: dict[str, Any] = {}
        self._share_buffers(model)
        for eval_set in self.sets:
            make = ImageClassifier.from_model if epoch else ImageClassifier.from_prompts  # 0: zero-shot
            classifier = make(model, tokenizer, eval_set.prompts, self.args.precision)
            if eval_set.name not in self.loaders:
                self.loaders[eval_set.name] = loader_from_args(eval_set, preprocess, self.args)
            tally = Tally(len(eval_set.prompts.classnames))
            metrics = self._over_ranks(score(classifier, self.loaders[eval_set.name], tally))
            if "worst_group" in metrics:  # a name; what is logged as a metric has to be a number
                _log.info(f"{eval_set.name}: the worst group is {metrics.pop('worst_group')!r}")
            row.update({f"{eval_set.name}/{metric}": value for metric, value in metrics.items()})
        self.history[epoch] = {**row, "epoch": epoch}
        if self.args.rank == 0:
            for line in self.table(epoch):
                _log.info(line)
        return self.history[epoch]

    def table(self, epoch: int) -> list[str]:
        """The figures of an epoch as aligned lines, with the change since epoch 0."""
        lines = [f"{f'epoch {epoch}':<12}" + "".join(f"{name:>22}" for name in ("top-1", "macro-F1", "n"))]
        for eval_set in self.sets:
            cells = []
            for metric in ("top1", "macro_f1"):
                name = f"{eval_set.name}/{metric}"
                now, before = self.history[epoch][name], self.history.get(0, {}).get(name)
                change = f" ({100 * (now - before):+.2f})" if epoch and before is not None else ""
                cells.append(f"{100 * now:.2f}{change}")
            cells.append(str(self.history[epoch][f"{eval_set.name}/n"]))
            lines.append(f"{eval_set.name:<12}" + "".join(f"{cell:>22}" for cell in cells))
        return lines

    def summary(self) -> list[str]:
        """What to say at the end of a run: its best epoch on the first set, and the merge to try next."""
        args, first = self.args, f"{self.sets[0].name}/top1"
        trained = {epoch: row[first] for epoch, row in self.history.items() if epoch}
        if not trained:
            return []
        chosen = best(trained)
        folder = Path(args.logs, args.name)
        lines = [f"Best epoch on {self.sets[0].name}: {chosen}, top-1 {100 * trained[chosen]:.2f}."]
        saved = {epoch for epoch in trained if (folder / f"checkpoints/epoch_{epoch}.pt").exists()}
        if saved and (args.pretrained or is_place(args.model)):
            other = chosen != max(saved) and chosen in saved
            more = f" (the last epoch; --epoch best takes epoch {chosen})" if other else ""
            lines.append(
                f"Next, merge it with the pretrained weights: flyp wiseft {shlex.quote(str(folder))}{more}"
            )
        return lines

    def _share_buffers(self, model: torch.nn.Module) -> None:
        """Rank 0's, which the checkpoint will hold: batch norm's statistics are of each rank's own images."""
        for buffer in model.buffers() if self.args.world_size > 1 else ():
            dist.broadcast(buffer, 0)

    def _over_ranks(self, tally: Tally) -> Metrics:
        if self.args.world_size > 1:
            parts: list[Any] = [None] * self.args.world_size
            dist.all_gather_object(parts, tally)
            tally, *others = parts
            for other in others:
                tally.merge(other)
        return tally.metrics()
