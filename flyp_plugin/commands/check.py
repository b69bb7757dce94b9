"""`flyp shards check`: read every sample and decode every image, to find in minutes what would stop a run after hours.

Each shard is checked on its own, in worker processes; what concerns several of them (repeated keys and images, sample
counts) is compared afterwards. The rules are those of training: samples are read by samples.py. Images are the same if
their files are, byte for byte: one that is scaled or saved anew is another image.
"""

import argparse
import json
import logging
import os
import warnings
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b
from itertools import starmap
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

from flyp_plugin.commands.flags import add_key_flags, count
from flyp_plugin.errors import InputError, escape_control_chars
from flyp_plugin.names import describe_same_tokens, index_names, same_names
from flyp_plugin.parallel import map_parallel
from flyp_plugin.shards import list_splits, local_shards
from flyp_plugin.sources import IMAGE_KEY, read_counts
from flyp_plugin.tars import find_scattered_sample

if TYPE_CHECKING:
    from flyp_plugin.prompts import ClassPrompts

SHOWN = 5  # problems of a kind
_log = logging.getLogger(__name__)


def add_flags(parser: argparse.ArgumentParser) -> None:
    # fmt: off
    add = parser.add_argument
    add("source", metavar="SOURCE", help="a data folder, a split folder or tars, all local")
    add("--split", default=None, metavar="NAME", help="split of a data folder (default: all)")
    add("--classnames", default=None, metavar="FILE", help="default: classnames.txt of the set")
    add("--templates", default=None, metavar="FILE", help="default: those of the set")
    add("--prompts", default=None, metavar="FILE.json", help="class descriptions (default: prompts.json of the set)")
    add_key_flags(add)
    add("--workers", type=count, default=min(4, os.cpu_count() or 1), metavar="N",
        help="processes (default: %(default)s)")
    add("--json", action="store_true", default=False, help="print JSON instead of the table")
    # fmt: on


class Seen(NamedTuple):
    """A sample that was read."""

    shard: str
    key: str
    label: int = -1  # one that is valid, of a sample with an image
    path: str = ""
    # of an image that can be decoded
    digest: bytes = b""
    format: str = ""
    size: tuple[int, int] = (0, 0)
    deep: bool = False  # 16 bits


@dataclass
class Findings:
    """What some shards contain; problems are sentences by kind."""

    images: Counter[str] = field(default_factory=Counter)  # by shard
    samples: list[Seen] = field(default_factory=list)
    problems: dict[str, list[str]] = field(default_factory=partial(defaultdict, list))


def check(
    shards: Sequence[str],
    classnames: Sequence[str],
    label_key: str = "cls",
    image_key: str = IMAGE_KEY,
    workers: int = 1,
) -> Findings:
    """Read each sample of local `shards`, decode each image, and compare the counts with sizes.json and __len__.

    The latter count samples with one of the default image members, so they are ignored with another `image_key`.
    """
    found, first = Findings(), dict[tuple[str, str], str]()
    check_one = partial(_check_shard, len(classnames), index_names(classnames), image_key, label_key)
    for part in map_parallel(check_one, shards, workers, "checking"):
        found.images |= part.images  # not a sum: a tar may be listed twice
        found.samples += part.samples
        for kind, problems in part.problems.items():
            found.problems[kind] += problems
    for shard, key, *_ in found.samples:
        identity = (os.path.dirname(shard), key)
        if identity in first:
            found.problems["repeated keys"].append(f"{shard}, sample {key}, also in {first[identity]}")
        first.setdefault(identity, shard)
    if image_key == IMAGE_KEY:
        for folder in dict.fromkeys(map(os.path.dirname, shards)):
            _check_counts(folder, [shard for shard in shards if os.path.dirname(shard) == folder], found)
    return found


def _check_counts(folder: str, shards: Sequence[str], found: Findings) -> None:
    """Compare the images found with sizes.json or, where a folder without one is checked as a whole, with __len__."""
    counted, kind = {os.path.basename(shard): found.images[shard] for shard in shards}, "wrong sizes.json"
    folder = folder or "."
    try:
        stated = read_counts(folder, "sizes.json")
        if stated is None:
            kind, length = "wrong __len__", read_counts(folder, "__len__")
            whole = counted.keys() == {tar.name for tar in Path(folder).glob("[!.]*.tar")}
            stated = {"__len__": length} if whole and length is not None else {}
            counted = {"__len__": sum(counted.values())}
    except InputError as error:
        found.problems[kind].append(str(error))
        return
    for name, number in counted.items():
        if stated.get(name, number) != number:
            found.problems[kind].append(f"{os.path.join(folder, name)}: {number} images, not {stated[name]}")


def compare_images(found: Findings, classnames: Sequence[str], earlier: dict[bytes, Seen]) -> str:
    """Report the images of a split that it has in several classes or that an earlier split has as well.

    `earlier` is {digest: first sample} of the splits before this one, to which this one's are added. Returns a note on
    images that a class has several times, which is no mistake, or ''.
    """
    from flyp_plugin.samples import locate

    first: dict[bytes, Seen] = {}
    copies = []
    for seen in found.samples:
        if not seen.digest:
            continue
        place = locate(seen._asdict())
        if other := earlier.get(seen.digest):
            problem = f"{place} is the same image as {locate(other._asdict())}"
            found.problems["images that are also in another split"].append(problem)
        other = first.setdefault(seen.digest, seen)
        if seen.label != other.label:
            problem = f"{place} is a {classnames[seen.label]!r} and {locate(other._asdict())}"
            found.problems["images in several classes"].append(f"{problem} a {classnames[other.label]!r}")
        elif seen[:2] != other[:2]:  # a tar may be listed twice
            copies.append(f"{place} and {locate(other._asdict())}")
    earlier |= {**first, **earlier}
    said = "images are copies of another of their class, such as"
    return f"{len(copies)} {said} {copies[0]}." if copies else ""


def _check_shard(
    num_classes: int, indices: Mapping[str, int], image_key: str, label_key: str, shard: str
) -> Findings:
    from flyp_plugin.samples import label_samples, read_samples

    found = Findings()
    problems = found.problems
    apart = find_scattered_sample(shard)
    if apart is not None:  # otherwise each of its samples would lack something
        problems["shards that are not sorted by name"].append(escape_control_chars(apart))
        return found

    def skip(message: str) -> None:
        problems["samples without image"].append(message)

    for sample in read_samples([shard], lambda message, lost: problems["unreadable shards"].append(message)):
        seen = Seen(shard, sample["__key__"])
        found.images[shard] += any(name in sample for name in image_key.split(";"))
        try:
            for one in label_samples([sample], num_classes, skip, image_key, label_key, indices=indices):
                image = _look_at_image(one, problems)
                seen = Seen(shard, seen.key, one["label"], one.get("path", ""), *image)
        except InputError as error:
            problems["labels that are missing or wrong"].append(str(error))
        found.samples.append(seen)
    return found


def _look_at_image(sample: dict[str, Any], problems: dict[str, list[str]]) -> tuple:
    """The digest, format, size and depth of an image; () if it cannot be decoded."""
    from flyp_plugin.images import is_deep, open_image
    from flyp_plugin.samples import describe_error, locate

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = open_image(sample["image"])
            image.load()
    except Exception as error:  # noqa: BLE001 - PIL raises nearly anything on a broken file
        problems["unreadable images"].append(f"{locate(sample)}: {describe_error(error)}")
        return ()
    digest = blake2b(sample["image"], digest_size=16).digest()
    return digest, image.format or "?", image.size, is_deep(image)


def run(args: argparse.Namespace) -> int:
    """flyp shards check; the exit status is 1 if there are problems."""
    from flyp_plugin.prompts import resolve_prompts

    reports: dict[str, dict[str, Any]] = {}
    names, images = None, dict[bytes, Seen]()
    for split in list_splits(args.source, args.split):
        shards = local_shards(args.source, split)
        prompts = resolve_prompts(shards, args.classnames, args.templates, args.prompts)
        if names is not None and not same_names(names, prompts.classnames):
            _log.warning(f"The class names of {shards[0]} differ from those of the split before.")
        names = prompts.classnames
        found = check(shards, names, args.label_key, args.image_key, args.workers)
        report = reports[os.path.dirname(shards[0]) or "."] = _to_report(shards, found, prompts)
        if note := compare_images(found, names, images):
            report["notes"].append(note)
    print(json.dumps(reports, indent=1) if args.json else "\n\n".join(starmap(_format, reports.items())))
    if wrong := sum(len(kind) for report in reports.values() for kind in report["problems"].values()):
        _log.info(f"{wrong} problems.")
        return 1
    empty = {name for report in reports.values() for name in report["classes without images"]}
    but = f", but {len(empty)} classes have no images in a split (see above)" if empty else ""
    _log.info(f"No problems{but}.")
    if any(os.path.basename(folder) in ("train", ".") for folder in reports):
        more = f" --prompts {args.prompts}" if args.prompts else ""
        _log.info(f"Next: flyp train --model ViT-B-16 --pretrained openai --train-data {args.source}{more}")
    return 0


def _to_report(shards: Sequence[str], found: Findings, prompts: "ClassPrompts") -> dict[str, Any]:
    import open_clip

    from flyp_plugin.prompts import ClassPrompts
    from flyp_plugin.tokens import PromptTokens

    names = prompts.classnames
    texts = [prompts.texts(i * len(names) // 5) for i in range(5)]
    labels = Counter(seen.label for seen in found.samples)
    per_class = [labels[label] for label in range(len(names))]
    images = [seen for seen in found.samples if seen.digest]
    by_area = sorted((seen.size for seen in images), key=lambda size: size[0] * size[1]) or [(0, 0)]
    if not any(per_class):
        found.problems["sets without samples"].append(f"nothing in {len(shards)} shards from {shards[0]} on")
    if prompts.descriptions is None:
        # names that the tokenizer does not distinguish have equal tokens in all templates; the shortest is fastest
        prompts = ClassPrompts(names, [min(prompts.templates, key=len)])
    same = PromptTokens(prompts, open_clip.tokenizer.SimpleTokenizer()).same
    notes = [note] if (note := describe_same_tokens(names, same)) else []
    if deep := sum(seen.deep for seen in images):
        said = "images of 16 bits: only their upper 8 are used; timm and torchvision would make them white."
        notes.append(f"{deep} {said}")
    return {
        "samples": sum(per_class),
        "shards": len(shards),
        "classes": len(names),
        "images a class": [min(per_class), median(per_class), max(per_class)],
        "classes without images": [name for name, number in zip(names, per_class) if not number],
        "formats": dict(Counter(seen.format for seen in images).most_common()),
        "sizes": [f"{w}x{h}" for w, h in (by_area[0], by_area[len(by_area) // 2], by_area[-1])],
        "prompts": [" ".join(some[i % len(some)].split()) for i, some in enumerate(texts)],
        "notes": notes,
        "problems": found.problems,
    }


def _format(folder: str, report: dict[str, Any]) -> str:
    empty = report["classes without images"]
    named = f": {', '.join(empty[:10])}{', ...' if len(empty) > 10 else ''}" if empty else ""
    lines = [
        f"{folder}: {report['samples']} samples in {report['shards']} shards",
        f"  classes: {report['classes']}, {len(empty)} without images{named}",
        "  images per class: {:g} / {:g} / {:g} (min / median / max)".format(*report["images a class"]),
        "  formats: " + ", ".join(f"{name} {number}" for name, number in report["formats"].items()),
        "  sizes: {} / {} / {} (min / median / max by area)".format(*report["sizes"]),
        "  prompts: " + " | ".join(dict.fromkeys(report["prompts"])),
    ]
    lines += [f"  note: {note}" for note in report["notes"]]
    for kind, problems in report["problems"].items():
        lines += [f"  {len(problems)} {kind}:", *(f"    {problem}" for problem in problems[:SHOWN])]
        lines += [f"    and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
    return "\n".join(lines)
