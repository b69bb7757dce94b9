"""Evaluation sets: from --eval-data NAME=SHARDS to class names, prompts and a loader.

A set's own text files say what its classes and prompts are. Flags of `flyp eval` and `flyp wiseft` override them for all
sets. Flags of the training are a fallback, here and in later commands on the run: --classnames and --templates for sets
without such files; but class descriptions (--prompts) for each set whose classes all have some.
"""

import argparse
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeVar

from tqdm import tqdm

from flyp_plugin.data import LabelledDataset
from flyp_plugin.errors import InputError
from flyp_plugin.names import find_undescribed
from flyp_plugin.prompts import DEFAULT_TEMPLATE, ClassPrompts, resolve_prompts
from flyp_plugin.record import Record
from flyp_plugin.sources import CLASSNAMES, DESCRIPTIONS, RETRIES, TEMPLATES, expand_sources, find_beside

Built = TypeVar("Built")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvalSet:
    """A labelled set with its own class names and prompts; the first set of a run is the ID validation set."""

    name: str
    shards: list[str]  # tar URLs
    prompts: ClassPrompts
    source: str  # the shards as the user gave them
    sizes: Mapping[str, int] | None = None  # samples of the shards, where known; None: nobody has looked


def parse_eval_sets(
    specs: Sequence[str],
    classnames: str | None = None,
    templates: str | None = None,
    descriptions: str | None = None,
    fallback: Mapping[str, Any] = {},
    same: Sequence[ClassPrompts] = (),
) -> list[EvalSet]:
    """Evaluation sets from NAME=SHARDS; of a data folder, the `test` split is used.

    Args:
        specs: the values of --eval-data.
        classnames, templates, descriptions: used for all sets, whatever text files are beside the shards.
        fallback: what was given for the training set, under the same names.
        same: prompts that are used elsewhere. Sets with equal prompts share one object, which is tokenised once.

    Raises:
        InputError: not NAME=SHARDS, a repeated name, no shards, or no class names.
    """
    sets: dict[str, EvalSet] = {}
    for spec in specs:
        name, equals, source = spec.partition("=")
        if not equals or not source or not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name):
            raise InputError(
                f"--eval-data {spec!r} is not NAME=SHARDS, such as val=data/test, with a name of letters, digits, _, - and ."
            )
        if name in sets:
            raise InputError(f"--eval-data names two sets {name!r}, {sets[name].source} and {source}.")
        shards = list(chain.from_iterable(expand_sources(source, "test")))
        names: Any = classnames or find_beside(shards, CLASSNAMES) or fallback.get("classnames")
        lists: tuple[Any, Any] = (templates, descriptions)
        if not any(lists):
            lists = _fallback_prompts(name, shards, names, fallback)
        prompts = resolve_prompts(shards, names, *lists)
        known = (*same, *(each.prompts for each in sets.values()))
        prompts = next((other for other in known if other.lists() == prompts.lists()), prompts)
        sets[name] = EvalSet(name, shards, prompts, source)
    return list(sets.values())


def _fallback_prompts(
    name: str, shards: list[str], classnames: Any, fallback: Mapping[str, Any]
) -> tuple[Any, Any]:
    """The templates and descriptions of the training that a set is scored with; (None, None): its own files are."""
    templates, descriptions = fallback.get("templates"), fallback.get("descriptions")
    if descriptions and classnames:
        names = ClassPrompts.from_files(classnames, DEFAULT_TEMPLATE).classnames
        if not (missing := find_undescribed(names, descriptions)):
            return templates, descriptions
        _log.info(
            f"--eval-data {name}: --prompts describes {len(names) - len(missing)} of its {len(names)} classes, not "
            f"{missing[0]!r}, so it is scored without them."
        )
    own = any(find_beside(shards, file) for file in (DESCRIPTIONS, TEMPLATES))
    return (None, None) if own else (templates, None)


def build_for_each(sets: Sequence[EvalSet], build: Callable[[ClassPrompts], Built]) -> dict[str, Built]:
    """{name of the set: build(its prompts)}; what has the same prompts is built once."""
    built: dict[int, Built] = {}
    for each in sets:
        if id(each.prompts) not in built:
            built[id(each.prompts)] = build(each.prompts)
    return {each.name: built[id(each.prompts)] for each in sets}


def loader_from_args(
    eval_set: EvalSet, preprocess: Callable, args: argparse.Namespace, max_lost: float = 1.0
) -> LabelledDataset:
    """A loader of the images (on several ranks, of this rank's share), by the flags of `flyp train`, `eval` or `wiseft`."""
    return LabelledDataset(
        eval_set.shards,
        preprocess,
        args.batch_size,
        num_classes=len(eval_set.prompts.classnames),
        classnames=eval_set.prompts.classnames,
        sizes=eval_set.sizes,
        num_workers=args.workers,
        image_key=args.image_key,
        label_key=args.label_key,
        group_key=args.group_key,
        retries=getattr(args, "retries", RETRIES),
        max_lost=max_lost,
        rank=getattr(args, "rank", 0),
        world_size=getattr(args, "world_size", 1),
    )


def with_progress(loader: Iterable[dict[str, Any]], name: str) -> Iterator[dict[str, Any]]:
    """The batches of a loader, with a progress bar in images; its total is shown if the shards state their sizes."""
    shards, sizes = getattr(loader, "shards", ()), getattr(loader, "sizes", {})
    total = sum(sizes[shard] for shard in shards) if sizes.keys() >= set(shards) else 0
    with tqdm(desc=name, unit="image", total=total or None, disable=None) as bar:
        for batch in loader:
            yield batch
            bar.update(len(batch["labels"]))


def eval_sets_from_args(args: argparse.Namespace, known: Record | None) -> list[EvalSet]:
    """The sets of --eval-data, else those of the run; a set without class names uses the run's --classnames."""
    specs = args.eval_data or (known.get("eval_data", []) if known else [])
    fallback = {name: known.get(name) for name in known.get("classes_given", [])} if known else {}
    return parse_eval_sets(specs, args.classnames, args.templates, args.prompts, fallback)
