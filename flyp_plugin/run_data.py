"""What a run trains on and is scored on: from the flags to shards, their sizes, prompts and evaluation sets.

Everything here reads: listings, text files, headers of tars, for --shots and --balance all labels. So train.py calls it
on one rank, for all (ranks.py).
"""

from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from flyp_plugin import shards
from flyp_plugin.data import peek
from flyp_plugin.errors import InputError
from flyp_plugin.evalsets import EvalSet, parse_eval_sets
from flyp_plugin.labels import count_labels
from flyp_plugin.prompts import ClassPrompts, resolve_prompts
from flyp_plugin.remote import remember_texts
from flyp_plugin.sources import expand_sources, shard_sizes


@dataclass(frozen=True)
class RunData:
    """The data of a run, as every rank gets it."""

    shards: list[str]  # tar URLs
    weights: list[float] | None  # of the shards, with --dataset-resampled
    prompts: ClassPrompts
    given: Mapping[str, Any]  # the classes that flags give: classnames, templates, descriptions
    eval_sets: list[EvalSet]
    sizes: Mapping[str, int] | None = None  # samples of the shards, where known; None: nobody has looked
    num_samples: int = 0  # an epoch
    pairs: Sequence[tuple[str, str]] = ()  # (key, prompt) of a few samples
    class_counts: Sequence[int] | None = None  # images of each class, for --balance


def find_data(args: Namespace) -> RunData:
    """The shards, class names and prompts of --train-data and --eval-data. No tar is read."""
    with remember_texts():
        sources = expand_sources(args.train_data, "train")
        urls = list(chain.from_iterable(sources))
        prompts = resolve_prompts(urls, args.classnames, args.templates, args.prompts)
        given = {"classnames": args.classnames, "templates": args.templates}
        given["descriptions"] = prompts.descriptions if args.prompts else None
        eval_sets = parse_eval_sets(args.eval_data, fallback=given, same=[prompts])
        eval_sets = [replace(each, sizes=shard_sizes(each.shards, args.image_key)) for each in eval_sets]
        return RunData(urls, _shard_weights(args, sources), prompts, given, eval_sets)


def write_few_shot(data: RunData, args: Namespace, folder: str) -> None:
    """Write the images that --shots chooses into a new folder."""
    keys: dict[str, Any] = {name: getattr(args, name) for name in ("shots", "label_key", "image_key")}
    keys |= {"seed": args.shots_seed or 0, "classnames": data.prompts.classnames}
    shards.subset(args.train_data, f"{folder}/train", **keys)


def use_few_shot(data: RunData, folder: str) -> RunData:
    """The same data, with the shards of write_few_shot to train on."""
    urls = shards.local_shards(f"{folder}/train", "train")
    return replace(data, shards=urls, weights=data.weights and [1.0] * len(urls))


def count_data(data: RunData, args: Namespace) -> RunData:
    """The same data with the number of samples, a few samples as epoch 0 pairs them, and for --balance the class counts.

    InputError if there are none, or a label is wrong.
    """
    known = args.train_num_samples
    sizes = shard_sizes(data.shards, args.image_key, count=not known)
    number = known or sum(sizes[shard] for shard in data.shards)
    first = data.shards if number else data.shards[:3]  # peek says why there are none
    passes = int(args.template_order == "table")
    pairs = peek(first, data.prompts, args.seed, args.image_key, args.label_key, passes)
    counts = None
    if args.balance:
        names = data.prompts.classnames
        counts = count_labels(data.shards, args.label_key, args.image_key, names)
    return replace(data, sizes=sizes, num_samples=number, pairs=pairs, class_counts=counts)


def _shard_weights(args: Namespace, sources: Sequence[Sequence[str]]) -> list[float] | None:
    """With --dataset-resampled, the weight of each shard of the sources."""
    factors = args.train_data_upsampling_factors
    if factors is None:
        return [1.0] * sum(map(len, sources)) if args.dataset_resampled else None
    weights = [float(factor) for factor in factors.split("::")]
    if len(weights) != len(sources) or min(weights) < 0:
        raise InputError(
            f"--train-data-upsampling-factors {factors} must be one number >= 0 for each of the {len(sources)} sources in "
            "--train-data, joined by '::'."
        )
    return [weight for weight, source in zip(weights, sources) for _ in source]
