"""Class-labelled shards: write them from folders or a CSV, cut a few-shot set from them. Checking them is check.py's.

A sample is KEY.(jpg|jpeg|png|webp) + KEY.cls, as in CLIP_benchmark. Image bytes are copied, never re-encoded.
"""

import io
import logging
import os
import random
import re
import shutil
import signal
import tarfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import chain, islice
from multiprocessing import active_children
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from flyp_plugin.errors import InputError
from flyp_plugin.names import normal, repeated_names, same_names, what_else
from flyp_plugin.rows import from_folder, from_table, image_ending, unreadable
from flyp_plugin.sources import (
    IMAGE_KEY,
    expand_sources,
    find_beside,
    is_remote,
    read_lines,
    read_text,
    write_atomically,
    write_sizes,
)

if TYPE_CHECKING:  # prompts and samples import torch: the functions that need them import them
    from flyp_plugin.prompts import ClassPrompts

CLASSNAMES, TEMPLATES = "classnames.txt", "zeroshot_classification_templates.txt"
SHARD_SIZE = 1000  # samples: about 100 MB of 500-pixel JPEGs
MIN_SHARDS = 16  # whole shards are shared out: one for each of 4 ranks x open_clip's 4 workers
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
    **columns: str,
) -> None:
    """Write a folder of class folders, or the images that a CSV lists, as shards.

    Args:
        source: the folder, or a CSV or TSV file with a header line.
        dest: the split folder, such as data/train; class names and templates go into the folder above it.
        classnames: the class order: a file or `imagenet`. None: classnames.txt above `dest`, or else sorted names.
            Names are compared as in names.py, and classnames.txt keeps the list's own spelling.
        templates: a file, `openai`, `simple` or one template. None: the file above `dest`, else 'a photo of a {c}.'.
        shard_size: most samples in a shard. None: SHARD_SIZE, or fewer, so that there are MIN_SHARDS shards.
        seed: of the shuffle before writing; the same source and seed give the same bytes.
        workers: processes that write.
        columns: of a CSV: image_col and label_col; split_col and split, group_col, root where wanted.

    Raises:
        InputError: `dest` is not empty, an image is missing, a class is not in the list or is twice in it, the disk is
            full, ... (of a CSV see rows.from_table).
    """
    folder = _free(dest)
    if os.path.isdir(source) and folder.is_relative_to(os.path.abspath(source)):
        raise InputError(f"{dest} is within {source}, where it would be a class; give a folder elsewhere.")
    rows, found = (from_folder if os.path.isdir(source) else from_table)(source, **columns)
    prompts = _class_prompts(found, folder.parent, classnames, templates)
    labels = _class_indices({label for _, label, _ in rows}, prompts.classnames)
    random.Random(seed).shuffle(rows)
    numbered = ((number, path, labels[label], group) for number, (path, label, group) in enumerate(rows))
    sizes = _shard_sizes(len(rows), shard_size)
    with _new_split(folder, sizes) as part:
        jobs = [(part / name, list(islice(numbered, size))) for name, size in sizes.items()]
        in_processes(_write_shard, jobs, workers, "writing")
        _put(folder.parent / CLASSNAMES, prompts.classnames)
        _put(folder.parent / TEMPLATES, prompts.templates)
    classes = f"{len(labels.keys() & {label for _, label, _ in rows})} of {len(prompts.classnames)} classes"
    _log.info(f"Wrote {len(rows)} images of {classes} in {len(sizes)} shards to {dest}.")
    _log.info(f"Next: flyp shards check {os.path.relpath(folder.parent)}")


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
) -> dict[str, int]:
    """Write a few-shot set: `shots` images of each class (see few_shot_keys), with all members as they are.

    Args:
        source: local shards: a brace pattern, a split folder, a data folder (then its `split`), '::' between several.
        dest: the split folder to write; class names and templates are copied into the folder above it.

    Returns:
        The number of samples in each shard.
    """
    from flyp_plugin.samples import read_samples

    folder, shards = _free(dest), local_shards(source, split)
    beside = {name: find_beside(shards, name) for name in (CLASSNAMES, TEMPLATES)}
    lists = {name: (read_text(path) or "").rstrip().split("\n") for name, path in beside.items() if path}
    for name, lines in lists.items():
        _is_there(folder.parent / name, lines)
    left = few_shot_keys(shards, shots, seed, label_key, image_key, lists.get(CLASSNAMES, []))
    rename = len({key for _, key in left}) < len(left)  # sets joined by '::' may have the same keys
    sizes = _shard_sizes(len(left), shard_size)

    def chosen() -> Iterator[dict[str, Any]]:
        for sample in read_samples(tqdm(shards, desc="copying", unit="shard", disable=None), _warn):
            identity = (sample["__url__"], sample["__key__"])
            if identity in left and any(name in sample for name in image_key.split(";")):
                left.remove(identity)
                yield sample | ({"__key__": f"s{len(left):07d}"} if rename else {})

    samples = chosen()
    with _new_split(folder, sizes) as part:
        for name, size in sizes.items():
            _write_tar(part / name, islice(samples, size))
        for name, lines in lists.items():
            _put(folder.parent / name, lines)
    return sizes


def few_shot_keys(
    shards: Sequence[str],
    shots: int,
    seed: int,
    label_key: str = "cls",
    image_key: str = IMAGE_KEY,
    classnames: Sequence[str] = (),
) -> set[tuple[str, str]]:
    """(shard, key) of `shots` samples of each class, at random by `seed`. A class with fewer gives all it has.

    Those classes are named in a warning. What fewer shots give is a part of what more shots give.

    Args:
        shards: local tars; the choice depends on their order, not on where they are.
        label_key, image_key: as in ClassPromptDataset.
        classnames: the names of the classes, where they are known: then labels beyond them are errors.

    Raises:
        InputError: a label that is missing or not an integer, or a key twice in a shard.
    """
    from flyp_plugin.samples import label_samples, read_samples

    if shots < 1:
        raise InputError(f"{shots} shots give no set; ask for 1 or more.")
    classes = defaultdict(list)
    seen = set()
    read = read_samples(tqdm(shards, desc="reading labels", unit="shard", disable=None), _warn)
    for sample in label_samples(read, len(classnames) or 2**63, _warn, image_key, label_key):
        identity = (sample["shard"], sample["key"])
        if identity in seen:
            raise InputError(f"{identity[0]} has two samples with the key {identity[1]}; give each its own.")
        seen.add(identity)
        classes[sample["label"]].append(identity)
    if not classes:
        raise InputError(f"{shards[0]} has no samples; `flyp shards check` says what is in it.")
    names = dict(enumerate(classnames)) or {label: str(label) for label in sorted(classes)}
    few = [f"{name} ({len(classes[label])})" for label, name in names.items() if len(classes[label]) < shots]
    if few:
        more = f" and {len(few) - 20} more" if len(few) > 20 else ""
        _log.warning(f"{len(few)} classes have fewer than {shots} images: {', '.join(few[:20])}{more}.")
    chosen: set[tuple[str, str]] = set()
    for label, identities in classes.items():
        random.Random(f"{seed} {label}").shuffle(identities)
        chosen.update(identities[:shots])
    return chosen


def _warn(what: str, lost: int = 1) -> None:
    _log.warning(what)


def local_shards(source: str, split: str) -> list[str]:
    """Paths of the tars of `source`, '::' between several; `flyp shards` reads local files only."""
    shards = list(chain.from_iterable(expand_sources(source, split)))
    for shard in shards:
        if is_remote(shard):
            raise InputError(f"{shard} is not a local file; download the set first.")
    return shards


def _class_prompts(found: list, data: Path, classnames: str | None, templates: str | None) -> "ClassPrompts":
    """The set's class names, by the list that is given or there, or as found; and its templates."""
    from flyp_plugin.prompts import DEFAULT_TEMPLATE, ClassPrompts, read_templates

    there = {name: str(data / name) for name in (CLASSNAMES, TEMPLATES) if (data / name).exists()}
    order = classnames or there.get(CLASSNAMES)
    templates = templates or there.get(TEMPLATES) or DEFAULT_TEMPLATE
    if order:
        prompts = ClassPrompts.from_files(order, templates)
        _log.info(f"Class order: that of {order}, {len(prompts.classnames)} names.")
    else:
        numbers = all(re.fullmatch(r"-?[0-9]+(\.[0-9]*)?", name) for name in found)
        if (form := what_else(found)) is not None and not numbers:
            raise InputError(f"the class names found, {found[0]!r}, ..., are {form}; write the names alone.")
        classes = sorted(set(found), key=float if numbers else str)
        prompts = ClassPrompts(classes, read_templates(templates))
        _log.info(f"Class order: sorted, {len(prompts.classnames)} names, for {data / CLASSNAMES}.")
        if numbers:
            _log.warning(f"The class names are numbers ({prompts(0, 0)!r}); --classnames FILE names them.")
    if len(prompts.classnames) < 2:
        raise InputError(
            f"there is only one class, {prompts.classnames[0]!r}; a set to train on has two or more."
        )
    _is_there(data / CLASSNAMES, prompts.classnames)
    _is_there(data / TEMPLATES, prompts.templates)
    return prompts


def _class_indices(labels: set[str], classnames: Sequence[str]) -> dict[str, int]:
    """Class index of each label: labels are class names or, where none is one, class indices."""
    by_name = {normal(name): index for index, name in enumerate(classnames)}
    by_index = {str(index): index for index in range(len(classnames))}
    twice = repeated_names(classnames)
    if ambiguous := sorted(labels & twice.keys()):
        first, second = (position + 1 for position in twice[ambiguous[0]][:2])
        raise InputError(
            f"the class {ambiguous[0]!r} is line {first} and line {second} of the class names, so its name does not say "
            "which; give a CSV with class indices (line numbers from 0) as labels."
        )
    if labels <= by_name.keys():
        return by_name
    if labels.isdisjoint(by_name) and labels <= by_index.keys():
        _log.info("The labels are taken as class indices.")
        return by_index
    unknown = sorted(labels - by_name.keys() - (by_index.keys() if labels.isdisjoint(by_name) else set()))
    more = f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else ""
    raise InputError(
        f"the class {unknown[0]!r}{more} is not in the list of {len(classnames)} class names; take its images "
        "out, or write to another data folder with a list that has it."
    )


# Writing


def _shard_sizes(samples: int, shard_size: int | None) -> dict[str, int]:
    """Samples by shard, at most one apart, so that ranks get equal shares; the order is that of their numbers."""
    if shard_size is not None and shard_size < 1:
        raise InputError(f"the shard size is {shard_size}; give 1 or more.")
    shards = max(-(-samples // (shard_size or SHARD_SIZE)), 0 if shard_size else min(MIN_SHARDS, samples))
    return {f"{i}.tar": (i + 1) * samples // shards - i * samples // shards for i in range(shards)}


def _free(dest: str) -> Path:
    folder = Path(os.path.abspath(dest))
    if folder.is_file():
        raise InputError(f"{dest} is a file; give a new split folder, such as data/train.")
    if folder.exists() and any(folder.iterdir()):
        raise InputError(f"{dest} is there and not empty; give a new split folder, such as data/train.")
    return folder


@contextmanager
def _new_split(folder: Path, sizes: dict[str, int]) -> Iterator[Path]:
    """FOLDER.part to write to, which becomes `folder` at the end, or is deleted.

    nshards.txt is in it first: expand_source refuses the fewer shards that a killed run may leave.
    """
    part = folder.with_name(f"{folder.name}.part")
    try:
        part.mkdir(parents=True)
    except FileExistsError:
        raise InputError(f"{part} is there: if no other run is writing it, delete it.") from None
    except OSError as error:
        raise InputError(f"{folder} cannot be made ({error.strerror}); choose another place.") from None
    try:
        write_atomically(part / "nshards.txt", f"{len(sizes)}\n")
        yield part
        write_sizes(part, sizes)
        os.replace(part, folder)
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"{folder} cannot be written ({reason}); nothing is left of it.") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _write_shard(job: tuple[Path, list[tuple[int, str, int, str | None]]]) -> None:
    shard, rows = job
    _write_tar(shard, (_sample(*row) for row in rows))


def _sample(number: int, path: str, label: int, group: str | None) -> dict[str, Any]:
    try:
        image = Path(path).read_bytes()
    except OSError as error:
        unreadable(error)
    key = f"s{number:07d}"  # CLIP_benchmark's; without a '.', which would end it
    sample = {"__key__": key, str(image_ending(path)): image, "cls": str(label).encode()}
    return sample if group is None else sample | {"group": group.encode()}


def _write_tar(shard: Path, samples: Iterable[dict[str, Any]]) -> None:
    part = shard.with_suffix(".part")
    with tarfile.open(part, "w") as tar:
        for sample in samples:
            for ending in (name for name in sample if not name.startswith("__")):
                # without owner and time: reproducible
                header = tarfile.TarInfo(f"{sample['__key__']}.{ending}")
                header.size = len(sample[ending])
                tar.addfile(header, io.BytesIO(sample[ending]))
    os.replace(part, shard)


def _is_there(path: Path, lines: Sequence[str]) -> bool:
    """Whether a file is there; InputError where it holds other lines."""
    there = read_lines(str(path))
    if there is not None and not same_names(there, lines):
        raise InputError(f"{path} holds another list than this set's; write to another data folder.")
    return there is not None


def _put(path: Path, lines: Sequence[str]) -> None:
    if not _is_there(path, lines):
        write_atomically(path, "\n".join(lines) + "\n")


def in_processes(function: Callable, items: Sequence, workers: int, what: str) -> list:
    """function(item) of each shard's item, in `workers` processes, which an error, Ctrl-C or SIGTERM ends."""
    workers, others = min(workers, len(items)), set(active_children())
    bar = partial(tqdm, total=len(items), desc=what, unit="shard", disable=None)
    if workers < 2:
        return list(bar(map(function, items)))
    # not a Pool, which waits for ever once a signal to all has ended a worker that held its lock
    with ProcessPoolExecutor(
        workers, initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN)
    ) as pool:
        futures = [
            pool.submit(function, item) for item in items
        ]  # not `map`, which cancels what may be running
        try:
            return [future.result() for future in bar(futures)]
        except BaseException:
            for worker in set(active_children()) - others:
                worker.terminate()
            raise
