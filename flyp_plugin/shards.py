"""Write class-labelled shards from class folders or a CSV, and few-shot subsets of shards.

A sample is some members of a tar, KEY.(jpg|jpeg|png|webp) and KEY.cls, the class index as text: the layout of
CLIP_benchmark, which open_clip's and webdataset's own tools read too. Image bytes are copied, never re-encoded. KEY.path
is the path of the user's file, for messages and predictions: relative, so that a source gives the same bytes everywhere,
and a member, so that it stays with its sample in subsets and on servers, for 1 KiB in the tar.
`flyp shards` (commands/shards.py) calls `write` and `subset`; run_data.py calls `subset` for --shots.

A split folder appears complete or not at all: it is written as FOLDER.part, which is renamed at the end.
"""

import logging
import os
import random
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fractions import Fraction
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from flyp_plugin.errors import InputError
from flyp_plugin.labels import few_shot_keys, log_skipped
from flyp_plugin.names import detect_syntax, first_few, index_names, normalize_name, same_names
from flyp_plugin.parallel import map_parallel
from flyp_plugin.remote import read_lines, require_local
from flyp_plugin.rows import Row, image_extension, read_folder, read_table
from flyp_plugin.sources import (
    CLASSNAMES,
    DESCRIPTIONS,
    IMAGE_KEY,
    TEMPLATES,
    expand_sources,
    find_beside,
    write_atomically,
    write_sizes,
)
from flyp_plugin.splits import divide_rows, resolve_shares
from flyp_plugin.tars import split_name

# prompts, samples and webdataset import torch: they are imported in functions, for a fast --help
if TYPE_CHECKING:
    from flyp_plugin.prompts import ClassPrompts

SHARD_SIZE = 1000  # samples: about 100 MB of 500-pixel JPEGs
MIN_SHARDS = 16  # loaders share out whole shards: one for each of 4 ranks x open_clip's 4 workers
_log = logging.getLogger(__name__)


def write(
    source: str,
    dest: str,
    *,
    classnames: str | None = None,
    templates: str | None = None,
    shard_size: int | None = None,
    seed: int = 0,
    workers: int = 1,
    hold_out: Sequence[tuple[str, Fraction]] = (),
    **columns: str,
) -> None:
    """Write a folder of class folders, or the images that a CSV lists, as shards: one split or several disjoint ones.

    Args:
        source: the folder, or a CSV or TSV file with a header line.
        dest: the split folder, such as data/train; class names and templates go into the folder above it.
        classnames: the class order: a file or `imagenet`. Default: classnames.txt above `dest`, else the sorted names.
        templates: a file, `openai`, `simple`, `fmow`, ... or one template. Default: the file above `dest`, else
            'a photo of a {c}.'.
        shard_size: most samples in a shard. Default: SHARD_SIZE, or fewer, to make MIN_SHARDS shards.
        seed: of the shuffle before writing. The same source and seed give the same bytes.
        workers: number of processes.
        hold_out: names and shares of splits to write beside `dest`, which gets the rest; see splits.divide.
        columns: for a CSV: image_col, label_col, split_col, split, group_col, by and root of rows.read_table.
    """
    if columns.get("by") and not hold_out:
        raise InputError("--by is about --hold-out; give one, such as --hold-out val=0.1, or leave --by out.")
    require_local(source)
    folder = _resolve_dest(dest)
    shares = resolve_shares(folder, hold_out)
    folders = {name: _resolve_dest(str(folder.with_name(name))) for name in shares}
    if not os.path.isdir(source):
        rows, found = read_table(source, **columns)  # type: ignore[arg-type]
    elif columns:
        flag = next(iter(columns)).replace("_", "-")
        raise InputError(f"--{flag} is for a CSV, but {source} is a folder; leave it out.")
    elif folder.is_relative_to(os.path.abspath(source)):
        raise InputError(f"{dest} is inside {source}, where it would be a class; choose a folder elsewhere.")
    else:
        rows, found = read_folder(source)
    prompts = _resolve_lists(found, folder.parent, classnames, templates)
    indices = _to_indices({row.label for row in rows}, prompts.classnames)
    if hold_out:
        rows.sort()  # so that a CSV's order does not matter
    splits = divide_rows(rows, shares, seed, workers) if hold_out else [folder.name] * len(rows)
    for column in (rows, splits):
        random.Random(seed).shuffle(column)  # both in the same way
    by_split = {folders[name]: [row for row, split in zip(rows, splits) if split == name] for name in folders}
    sizes = {folder: _shard_sizes(len(rows), shard_size) for folder, rows in by_split.items()}
    with _create_splits(sizes, {CLASSNAMES: prompts.classnames, TEMPLATES: prompts.templates}) as parts:
        jobs = []
        for part, (folder, rows) in zip(parts, by_split.items()):
            start = 0
            for name, size in sizes[folder].items():
                some = rows[start : start + size]
                jobs.append((part / name, start, some, [indices[row.label] for row in some]))
                start += size
        map_parallel(_write_shard, jobs, workers, "writing")
    _report_written(by_split, sizes, prompts.classnames)
    _log.info(f"Next: flyp shards check {os.path.relpath(folder.parent)}")


def _report_written(
    by_split: Mapping[Path, Sequence[Row]], sizes: Mapping[Path, dict[str, int]], classnames: Sequence[str]
) -> None:
    """Say how much is in each split, and which of the source's classes it lacks."""
    labels = {row.label for rows in by_split.values() for row in rows}
    for folder, rows in by_split.items():
        place, absent = os.path.relpath(folder), sorted(labels - {row.label for row in rows})
        classes = f"{len(labels) - len(absent)} of {len(classnames)} classes"
        _log.info(f"Wrote {len(rows)} images of {classes} in {len(sizes[folder])} shards to {place}.")
        if absent:
            _log.warning(f"{place} has no image of {len(absent)} classes: {first_few(absent)}.")


def subset(
    source: str,
    dest: str,
    *,
    shots: int,
    seed: int = 0,
    split: str = "train",
    shard_size: int | None = None,
    label_key: str = "cls",
    image_key: str = IMAGE_KEY,
    classnames: Sequence[str] = (),
) -> dict[str, int]:
    """Write a few-shot set: `shots` images of each class (see few_shot_keys), with all their members unchanged.

    Args:
        source: local shards: a brace pattern, a split folder, a data folder (then its `split`), '::' between several.
        dest: the split folder to write; class names and templates are copied into the folder above it.
        classnames: class names that labels may be. Default: those beside the shards.

    Returns the number of samples in each shard.
    """
    from flyp_plugin.samples import read_samples

    folder, shards = _resolve_dest(dest), local_shards(source, split)
    paths = {name: find_beside(shards, name) for name in (CLASSNAMES, TEMPLATES, DESCRIPTIONS)}
    lists = {name: read_lines(path) or [] for name, path in paths.items() if path}
    _check_lists(folder.parent, lists)
    classnames = classnames or lists.get(CLASSNAMES, [])
    chosen = few_shot_keys(shards, shots, seed, label_key, image_key, classnames)
    rename = len({key for _, key in chosen}) < len(chosen)  # sets joined by '::' may share keys
    sizes = _shard_sizes(len(chosen), shard_size)

    def is_chosen(shard: str, member: str) -> bool:
        return (shard, split_name(member)[0]) in chosen

    def read_chosen() -> Iterator[dict[str, Any]]:
        bar = tqdm(shards, desc="copying", unit="shard", disable=None)
        for sample in read_samples(bar, log_skipped, wanted=is_chosen):
            identity = (sample["__url__"], sample["__key__"])
            if identity in chosen and any(name in sample for name in image_key.split(";")):
                chosen.remove(identity)
                yield sample | ({"__key__": f"s{len(chosen):07d}"} if rename else {})

    with _create_splits({folder: sizes}, lists) as (part,):
        samples = read_chosen()
        for name, size in sizes.items():
            _write_tar(part / name, islice(samples, size))
    return sizes


def local_shards(source: str, split: str) -> list[str]:
    """Paths of the tars of `source`, or of several joined by '::'."""
    require_local(*source.split("::"))
    return list(chain.from_iterable(expand_sources(source, split)))


def list_splits(source: str, split: str | None) -> list[str]:
    """`split` alone, or all splits of the data folder `source`, train first."""
    found = {tar.parent.name for tar in Path(source).glob("*/*.tar")}
    return [split] if split else sorted(found, key=lambda name: (name != "train", name)) or ["train"]


def _resolve_lists(found: list, data: Path, classnames: str | None, templates: str | None) -> "ClassPrompts":
    """Class names and templates: those given, else those in the folder `data`, else the names found and the default."""
    from flyp_plugin.prompts import DEFAULT_TEMPLATE, ClassPrompts

    existing = {name: str(data / name) for name in (CLASSNAMES, TEMPLATES) if (data / name).exists()}
    if templates and (data / DESCRIPTIONS).exists():
        raise InputError(
            f"{data / DESCRIPTIONS} would be used, not --templates; delete it, or leave the flag out."
        )
    templates = templates or existing.get(TEMPLATES) or DEFAULT_TEMPLATE
    if classnames := classnames or existing.get(CLASSNAMES):
        prompts = ClassPrompts.from_files(classnames, templates)
        _log.info(f"Class order: that of {classnames}, {len(prompts.classnames)} names.")
    else:
        numbers = all(re.fullmatch(r"-?[0-9]+(\.[0-9]*)?", name) for name in found)
        if not numbers and (syntax := detect_syntax(found)):
            raise InputError(f"the class names found, {found[0]!r}, ..., are {syntax}; write plain names.")
        prompts = ClassPrompts.from_files(sorted(found, key=float if numbers else str), templates)
        _log.info(f"Class order: sorted, {len(found)} names, written to {data / CLASSNAMES}.")
        if numbers:
            _log.warning(f"The class names are numbers ({prompts(0, 0)!r}); name them by --classnames FILE.")
    if len(prompts.classnames) < 2:
        raise InputError(f"there is only one class, {prompts.classnames[0]!r}; training needs at least two.")
    _check_lists(data, {CLASSNAMES: prompts.classnames, TEMPLATES: prompts.templates})
    return prompts


def _to_indices(labels: set[str], classnames: Sequence[str]) -> dict[str, int]:
    """The class index of each label. Labels are class names or, if none of them is one, class indices."""
    indices = index_names(classnames)
    if repeated := sorted(label for label in labels if indices.get(label) == -1):
        names = map(normalize_name, classnames)
        lines = " and ".join(f"line {line}" for line, name in enumerate(names, 1) if name == repeated[0])
        raise InputError(f"the class {repeated[0]!r} is {lines} of the class names; give a CSV of indices.")
    numbers = {str(index): index for index in range(len(classnames))}
    if labels.isdisjoint(indices) and not labels.isdisjoint(numbers):
        indices = numbers
        _log.info("The labels are read as class indices.")
    if unknown := sorted(labels - indices.keys()):
        more = f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else ""
        raise InputError(
            f"the class {unknown[0]!r}{more} is not in the list of {len(classnames)} class names; remove its images, or "
            "write to another data folder with a list that contains it."
        )
    return indices


def _shard_sizes(samples: int, shard_size: int | None) -> dict[str, int]:
    """Samples by shard, in order of the shards' numbers. They differ by at most one, so that ranks get equal shares."""
    shards = max(-(-samples // (shard_size or SHARD_SIZE)), 0 if shard_size else min(MIN_SHARDS, samples))
    return {f"{i}.tar": (i + 1) * samples // shards - i * samples // shards for i in range(shards)}


def _resolve_dest(dest: str) -> Path:
    require_local(dest)
    folder = Path(os.path.abspath(dest))
    if folder.is_file() or (folder.exists() and any(folder.iterdir())):
        raise InputError(f"{dest} is a file or is not empty; choose a new split folder, such as data/train.")
    if (part := folder.with_name(f"{folder.name}.part")).exists():
        raise InputError(f"{part} already exists; delete it, unless another run is writing it.")
    return folder


@contextmanager
def _create_splits(sizes: Mapping[Path, dict[str, int]], lists: dict[str, list[str]]) -> Iterator[list[Path]]:
    """FOLDER.part of each split folder to write to, all renamed at the end, or all deleted after an error.

    nshards.txt comes first: expand_source refuses a folder with fewer shards, as a killed run leaves it.
    """
    made, dest = list[Path](), next(iter(sizes))
    try:
        for folder, of_shards in sizes.items():
            part = folder.with_name(f"{folder.name}.part")
            part.mkdir(parents=True)
            made.append(part)
            write_atomically(part / "nshards.txt", f"{len(of_shards)}\n")
        yield list(made)
        _check_lists(dest.parent, lists)
        for name, lines in lists.items():
            if not (dest.parent / name).exists():
                write_atomically(dest.parent / name, "\n".join(lines) + "\n")
        for part, of_shards in zip(made, sizes.values()):
            write_sizes(part, of_shards)
        for i, folder in reversed(list(enumerate(sizes))):  # the hold-outs first
            os.replace(made[i], folder)
            made[i] = folder
        made.clear()
    except OSError as error:
        raise InputError(f"{dest} was not written: {error}; try another place.") from None
    finally:
        for path in made:
            shutil.rmtree(path, ignore_errors=True)


def _write_shard(job: tuple[Path, int, list[Row], list[int]]) -> None:
    shard, start, rows, labels = job

    def read_images() -> Iterator[dict[str, Any]]:
        for number, (row, label) in enumerate(zip(rows, labels), start):
            image = {str(image_extension(row.image)): Path(row.image).read_bytes()}
            members = {"cls": str(label).encode(), "path": row.shown.encode(errors="surrogateescape")}
            members |= {"group": row.group.encode()} if row.group is not None else {}
            yield {"__key__": f"s{number:07d}", **image, **members}  # keys as in CLIP_benchmark

    _write_tar(shard, read_images())


def _write_tar(shard: Path, samples: Iterable[dict[str, Any]]) -> None:
    import webdataset as wds

    part = shard.with_suffix(".part")
    # without time and owner, so that the same samples give the same bytes
    fixed: dict[str, Any] = {"mtime": 0, "user": "", "group": ""}
    with part.open("wb") as file, wds.TarWriter(file, encoder=False, keep_meta=True, **fixed) as tar:
        for sample in samples:
            members = {name: raw for name, raw in sample.items() if name and not name.startswith("__")}
            tar.write({"__key__": sample["__key__"], **members})
    os.replace(part, shard)


def _check_lists(data: Path, lists: dict[str, list[str]]) -> None:
    for name, lines in lists.items():
        existing = read_lines(str(data / name))
        if existing is not None and not same_names(existing, lines):
            raise InputError(f"{data / name} differs from this set's list; write to another data folder.")
