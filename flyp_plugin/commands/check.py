"""Count class-labelled shards and check them, before a training run meets what is wrong. They come from shards.py."""

import argparse
import json
import logging
import os
import warnings
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from flyp_plugin.errors import InputError, escape_control_chars
from flyp_plugin.names import same_names
from flyp_plugin.shards import in_processes, local_shards
from flyp_plugin.sources import (
    IMAGE_KEY,
    find_scattered_sample,
    read_counts,
)

if TYPE_CHECKING:
    from flyp_plugin.prompts import ClassPrompts

SHOWN = 5  # problems of a kind
_log = logging.getLogger(__name__)


@dataclass
class Findings:
    """What is in some shards: problems are sentences by their kind, `samples` are the images with a good label.

    `deep` are images of 16 bits, which others read otherwise.
    """

    images: int = 0
    samples: int = 0
    labels: Counter[int] = field(default_factory=Counter)
    formats: Counter[str] = field(default_factory=Counter)
    pixels: list[tuple[int, int]] = field(default_factory=list)
    deep: int = 0
    keys: list[str] = field(default_factory=list)
    problems: dict[str, list[str]] = field(default_factory=partial(defaultdict, list))


def check(
    shards: Sequence[str],
    num_classes: int,
    *,
    label_key: str = "cls",
    image_key: str = IMAGE_KEY,
    workers: int = 1,
) -> Findings:
    """Read each sample of local `shards`, decode each image, and compare with sizes.json and __len__.

    Those are about samples with one of the default image members, so they are left alone under another `image_key`.
    """
    found = Findings()
    look = partial(_check_shard, num_classes=num_classes, label_key=label_key, image_key=image_key)
    stated = _stated_sizes(shards, found.problems) if image_key == IMAGE_KEY else {}
    images: Counter[str] = Counter()
    first: dict[tuple[str, str], str] = {}
    for shard, part in zip(shards, in_processes(look, shards, workers, "checking")):
        found.samples += part.samples
        found.labels += part.labels
        found.formats += part.formats
        found.pixels += part.pixels
        found.deep += part.deep
        images[os.path.dirname(shard)] += part.images
        for kind, problems in part.problems.items():
            found.problems[kind] += problems
        if stated.get(shard, part.images) != part.images:
            found.problems["wrong sizes.json"].append(f"{shard}: {part.images} images, not {stated[shard]}")
        for key in part.keys:
            identity = (os.path.dirname(shard), key)
            if identity in first:
                found.problems["repeated keys"].append(f"{shard}, sample {key}, also in {first[identity]}")
            first.setdefault(identity, shard)
    if image_key == IMAGE_KEY:
        _compare_lengths(shards, images, found.problems)
    return found


def _compare_lengths(shards: Sequence[str], images: Counter[str], problems: dict[str, list[str]]) -> None:
    """Whether __len__ of each folder that is checked as a whole, and has no sizes.json, is its number of images."""
    for folder, number in images.items():
        try:
            length = (
                read_counts(folder or ".", "__len__") if not Path(folder, "sizes.json").exists() else None
            )
        except InputError as error:
            problems["wrong __len__"].append(str(error))
            continue
        whole = {str(path) for path in Path(folder).glob("[!.]*.tar")} == {
            str(Path(shard)) for shard in shards
        }
        if whole and length not in (None, number):
            problems["wrong __len__"].append(f"{folder or '.'}: {number} images, not {length}")


def _stated_sizes(shards: Sequence[str], problems: dict[str, list[str]]) -> dict[str, int]:
    stated: dict[str, int] = {}
    for folder in {os.path.dirname(shard): None for shard in shards}:
        try:
            sizes = read_counts(folder or ".", "sizes.json") or {}
            stated |= {os.path.join(folder, name): size for name, size in sizes.items()}
        except InputError as error:
            problems["wrong sizes.json"].append(str(error))
    return stated


def _check_shard(shard: str, num_classes: int, label_key: str, image_key: str) -> Findings:
    from flyp_plugin.samples import label_samples, read_samples

    found = Findings()
    if (apart := find_scattered_sample(shard)) is not None:  # else each of its samples lacks something
        found.problems["shards that are not sorted by name"].append(escape_control_chars(apart))
        return found
    unreadable: list[str] = []
    lonely: list[str] = []
    for sample in read_samples([shard], lambda what, lost: unreadable.append(what)):
        found.keys.append(sample["__key__"])
        found.images += any(name in sample for name in image_key.split(";"))
        try:
            for one in label_samples([sample], num_classes, lonely.append, image_key, label_key):
                found.samples += 1
                found.labels[one["label"]] += 1
                _check_image(one, found)
        except InputError as error:
            found.problems["labels that are missing or wrong"].append(str(error))
    found.problems |= {"unreadable shards": unreadable} if unreadable else {}
    found.problems |= {"samples without image": lonely} if lonely else {}
    return found


def _check_image(sample: dict[str, Any], found: Findings) -> None:
    from flyp_plugin.samples import describe_error, is_deep, locate, open_image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = open_image(sample["image"])
            image.load()
    except Exception as error:  # noqa: BLE001 - PIL raises nearly anything on a broken file
        found.problems["unreadable images"].append(f"{locate(sample)}: {describe_error(error)}")
        return
    found.formats[image.format or "?"] += 1
    found.pixels.append(image.size)
    found.deep += is_deep(image)


def run(args: argparse.Namespace) -> int:
    """flyp shards check; status 1 where something is wrong"""
    from flyp_plugin.prompts import resolve_prompts

    reports, names = {}, None
    for split in _splits(args.source, args.split):
        shards = local_shards(args.source, split)
        prompts = resolve_prompts(shards, args.classnames, args.templates)
        if names is not None and not same_names(names, prompts.classnames):
            _log.warning(f"The class names of {shards[0]} are another list than those of the split before.")
        names = prompts.classnames
        keys = {"label_key": args.label_key, "image_key": args.image_key}
        found = check(shards, len(prompts.classnames), workers=args.workers, **keys)
        reports[os.path.dirname(shards[0]) or "."] = _report(shards, found, prompts)
    print(json.dumps(reports, indent=1) if args.json else "\n\n".join(map(_table, reports, reports.values())))
    wrong = sum(len(problems) for report in reports.values() for problems in report["problems"].values())
    if wrong:
        _log.info(f"{wrong} problems.")
    else:
        empty = {name for report in reports.values() for name in report["classes without images"]}
        but = f", but for {len(empty)} classes that have no images in a split (see above)" if empty else ""
        flags = f"--model ViT-B-16 --pretrained openai --train-data {args.source}"
        to_train = any(os.path.basename(place) in ("train", ".") for place in reports)
        _log.info(f"No problems{but}." + (f" Next: flyp train {flags}" if to_train else ""))
    return int(wrong > 0)


def _splits(source: str, split: str | None) -> list[str]:
    if split:
        return [split]
    found = {tar.parent.name for tar in Path(source).glob("*/*.tar")}  # train first, then by name
    return sorted(found, key=lambda name: (name != "train", name)) or ["train"]


def _report(shards: Sequence[str], found: Findings, prompts: "ClassPrompts") -> dict[str, Any]:
    names = prompts.classnames
    a_class = [found.labels[label] for label in range(len(names))]
    by_area = sorted(found.pixels, key=lambda size: size[0] * size[1]) or [(0, 0)]
    if not found.samples:
        found.problems["sets without samples"].append(f"nothing in {len(shards)} shards from {shards[0]} on")
    return {
        "samples": found.samples,
        "shards": len(shards),
        "classes": len(names),
        "images a class": [min(a_class), median(a_class), max(a_class)],
        "classes without images": [name for name, number in zip(names, a_class) if not number],
        "formats": dict(found.formats.most_common()),
        "sizes": [f"{w}x{h}" for w, h in (by_area[0], by_area[len(by_area) // 2], by_area[-1])],
        "prompts": [prompts(i * len(names) // 5, i % len(prompts.templates)) for i in range(5)],
        "notes": _notes(found, prompts),
        "problems": found.problems,
    }


def _notes(found: Findings, prompts: "ClassPrompts") -> list[str]:
    """What is no mistake in the data and yet to be known."""
    import open_clip

    from flyp_plugin.prompts import ClassPrompts, PromptTokens

    # names that CLIP's tokenizer takes for one are so in the shortest template, if they are in any
    shortest = ClassPrompts(prompts.classnames, [min(prompts.templates, key=len)])
    same = PromptTokens(shortest, open_clip.tokenizer.SimpleTokenizer()).same
    notes = [prompts.describe_same_tokens(same)] if same else []
    if found.deep:
        notes.append(
            f"{found.deep} images of 16 bits: the plugin uses their upper 8; timm's and torchvision's own loaders, and so an "
            "exported classifier in them, make them white."
        )
    return notes


def _table(place: str, report: dict[str, Any]) -> str:
    empty = report["classes without images"]
    more = f" and {len(empty) - 10} more" if len(empty) > 10 else ""
    named = f": {', '.join(empty[:10])}{more}" if empty else ""
    lines = [
        f"{place}: {report['samples']} samples in {report['shards']} shards",
        f"  classes: {report['classes']}, {len(empty)} without images{named}",
        "  images a class: {:g} / {:g} / {:g} (min / median / max)".format(*report["images a class"]),
        "  formats: " + ", ".join(f"{name} {number}" for name, number in report["formats"].items()),
        "  sizes: {} / {} / {} (min / median / max by area)".format(*report["sizes"]),
        "  prompts: " + " | ".join(dict.fromkeys(report["prompts"])),
    ]
    lines += [f"  note: {note}" for note in report["notes"]]
    for kind, problems in report["problems"].items():
        lines += [f"  {len(problems)} {kind}:", *(f"    {problem}" for problem in problems[:SHOWN])]
        lines += [f"    and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
    return "\n".join(lines)
