"""`flyp eval logs/birds --eval-data test=data/test`: score a classifier on labelled sets."""

import argparse
import csv
import json
import logging
import sys
from argparse import ArgumentParser
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

from flyp_plugin.commands.flags import RUN, add_classes_flags, add_data_flags, add_model_flags
from flyp_plugin.errors import InputError

if TYPE_CHECKING:
    import torch

    from flyp_plugin.evalsets import EvalSet

EXAMPLE = """  flyp eval logs/birds --eval-data test=data/test
  flyp eval openai --model ViT-B-16 --eval-data test=data/test"""
_COLUMNS = "set key label prediction probability group label_name prediction_name path"
_log = logging.getLogger(__name__)


def add_flags(parser: ArgumentParser) -> None:
    add_model_flags(parser)
    add_data_flags(parser)
    add_classes_flags(parser)
    parser.add_argument("checkpoint", metavar="RUN", help=RUN)
    parser.add_argument("--json", action="store_true", help="print JSON, not the table")
    parser.add_argument("--predictions", metavar="FILE.csv", help="write each image's prediction to it")


def run(args: argparse.Namespace) -> None:
    """Score a checkpoint on the evaluation sets; the table or the JSON goes to stdout."""
    from flyp_plugin.checkpoints import refuse_existing
    from flyp_plugin.evalsets import build_for_each, eval_sets_from_args, loader_from_args, with_progress
    from flyp_plugin.heads import ImageClassifier, val_preprocess
    from flyp_plugin.metrics import evaluate, table
    from flyp_plugin.precision import match_open_clip_precision
    from flyp_plugin.targets import target_from_args

    match_open_clip_precision()
    target = target_from_args(args, args.checkpoint)
    sets = eval_sets_from_args(args, target.record)
    if not sets:
        raise InputError("there is nothing to score; pass --eval-data NAME=SHARDS.")
    if args.predictions:
        refuse_existing(args.predictions, args.force)
    model = target.model(args)
    tokenizer, preprocess = target.spec.tokenizer, val_preprocess(model)
    build = partial(ImageClassifier.from_model, model, tokenizer, precision=args.precision)
    # first: a learned head may lack a class
    classifiers = build_for_each(sets, partial(build, use_tqdm=sys.stderr.isatty()))
    results = {}
    with _predictions(args.predictions) if args.predictions else nullcontext() as write:
        for eval_set in sets:
            loader = with_progress(loader_from_args(eval_set, preprocess, args), eval_set.name)
            on_batch = partial(_write, write, eval_set) if write else None
            results[eval_set.name] = evaluate(classifiers[eval_set.name], loader, on_batch=on_batch)
    text = json.dumps({"checkpoint": target.weights, "model": target.spec.name, "results": results}, indent=1)
    sys.stdout.write((text if args.json else table(results, "set")) + "\n")
    if args.predictions:
        _log.info(f"Wrote each image's prediction to {args.predictions}.")


@contextmanager
def _predictions(path: str) -> Iterator[Callable]:
    """Yield a function that appends rows to the CSV. The evaluation runs in this context: its errors are not the file's."""
    from flyp_plugin.checkpoints import atomic_path, explain_write_errors

    with atomic_path(path) as part:

        def write(rows: Iterable[Sequence], mode: str = "a") -> None:
            with explain_write_errors(path), open(part, mode, newline="", encoding="utf-8") as stream:
                csv.writer(stream).writerows(rows)

        write([_COLUMNS.split()], "w")
        yield write


def _write(write: Callable, eval_set: "EvalSet", batch: dict[str, Any], logits: "torch.Tensor") -> None:
    names, best = eval_set.prompts.classnames, logits.softmax(dim=1).max(dim=1)
    labels, groups = batch["labels"].tolist(), batch.get("groups") or [""] * len(batch["labels"])
    guesses, probabilities = best.indices.tolist(), [f"{p:.6f}" for p in best.values.tolist()]
    columns = zip(batch["keys"], labels, guesses, probabilities, groups, batch["paths"])
    write(
        [eval_set.name, key, label, guess, probability, group, names[label], names[guess], path]
        for key, label, guess, probability, group, path in columns
    )
