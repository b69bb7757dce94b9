"""Write class-labelled shards from class folders or a CSV, and few-shot subsets of shards.

A sample is two members of a tar, KEY.(jpg|jpeg|png|webp) and KEY.cls, the class index as text: the layout of
CLIP_benchmark, which open_clip's and webdataset's own tools read too. Image bytes are copied, never re-encoded.
`flyp shards` (commands/shards.py) calls `write` and `subset`; train.py calls `subset` for --shots.

A split folder appears complete or not at all: it is written as FOLDER.part, which is renamed at the end.
"""

import logging
import os
import random
import re
import shutil
import signal
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from itertools import chain, islice
from multiprocessing import active_children
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from flyp_plugin.errors import InputError
from flyp_plugin.names import detect_syntax, same_names, to_unique_keys
from flyp_plugin.rows import image_extension, read_folder, read_table
from flyp_plugin.sources import (
    IMAGE_KEY,
    expand_sources,
    find_beside,
    is_remote,
    read_lines,
    write_atomically,
    write_sizes,
)

# prompts, samples and webdataset import torch: they are imported in functions, for a fast --help
if TYPE_CHECKING:
    from flyp_plugin.prompts import ClassPrompts

CLASSNAMES, TEMPLATES = "classnames.txt", "zeroshot_classification_templates.txt"
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
    **columns: str,
) -> None:
    """Write a folder of class folders, or the images that a CSV lists, as shards.

    Args:
        source: the folder, or a CSV or TSV file with a header line.
        dest: the split folder, such as data/train; class names and templates go into the folder above it.
        classnames: the class order: a file or `imagenet`. Default: classnames.txt above `dest`, else the sorted names.
        templates: a file, `openai`, `simple`, `fmow`, ... or one template. Default: the file above `dest`, else
            'a photo of a {c}.'.
        shard_size: most samples in a shard. Default: SHARD_SIZE, or fewer, to make MIN_SHARDS shards.
        seed: of the shuffle before writing. The same source and seed give the same bytes.
        workers: number of processes.
        columns: for a CSV: image_col, label_col, split_col, split, group_col and root of rows.read_table.
    """
    folder = _resolve_dest(dest)
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
    labels = {label for _, label, _ in rows}
    indices = _to_indices(labels, prompts.classnames)
    random.Random(seed).shuffle(rows)
    samples = ((number, path, indices[label], group) for number, (path, label, group) in enumerate(rows))
    sizes = _shard_sizes(len(rows), shard_size)
    with _create_split(folder, sizes, {CLASSNAMES: prompts.classnames, TEMPLATES: prompts.templates}) as part:
        jobs = [(part / name, list(islice(samples, size))) for name, size in sizes.items()]
        map_parallel(_write_shard, jobs, workers, "writing")
    classes = f"{len(labels)} of {len(prompts.classnames)} classes"
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
    """Write a few-shot set: `shots` images of each class (see few_shot_keys), with all their members unchanged.

    Args:
        source: local shards: a brace pattern, a split folder, a data folder (then its `split`), '::' between several.
        dest: the split folder to write; class names and templates are copied into the folder above it.

    Returns the number of samples in each shard.
    """
    from flyp_plugin.samples import read_samples

    folder, shards = _resolve_dest(dest), local_shards(source, split)
    paths = {name: find_beside(shards, name) for name in (CLASSNAMES, TEMPLATES)}
    lists = {name: read_lines(path) or [] for name, path in paths.items() if path}
    _check_lists(folder.parent, lists)
    chosen = few_shot_keys(shards, shots, seed, label_key, image_key, lists.get(CLASSNAMES, []))
    rename = len({key for _, key in chosen}) < len(chosen)  # sets joined by '::' may share keys
    sizes = _shard_sizes(len(chosen), shard_size)

    def read_chosen() -> Iterator[dict[str, Any]]:
        for sample in read_samples(tqdm(shards, desc="copying", unit="shard", disable=None), _warn):
            identity = (sample["__url__"], sample["__key__"])
            if identity in chosen and any(name in sample for name in image_key.split(";")):
                chosen.remove(identity)
                yield sample | ({"__key__": f"s{len(chosen):07d}"} if rename else {})

    with _create_split(folder, sizes, lists) as part:
        samples = read_chosen()
        for name, size in sizes.items():
            _write_tar(part / name, islice(samples, size))
    return sizes


def few_shot_keys(
    shards: Sequence[str],
    shots: int,
    seed: int,
    label_key: str = "cls",
    image_key: str = IMAGE_KEY,
    classnames: Sequence[str] = (),
) -> set[tuple[str, str]]:
    """(shard, key) of `shots` random samples of each class. Fewer shots of a seed are a subset of more shots.

    A class with fewer samples gives all it has and is named in a warning. A wrong label or a key that is repeated in a
    shard raises InputError. The choice depends on the order of the local tars `shards`, not on their paths.
    """
    from flyp_plugin.samples import label_samples, read_samples

    classes, seen = defaultdict(list), set()
    read = read_samples(tqdm(shards, desc="reading labels", unit="shard", disable=None), _warn)
    for sample in label_samples(read, len(classnames) or 2**63, _warn, image_key, label_key):
        identity = (sample["shard"], sample["key"])
        if identity in seen:
            raise InputError(f"{identity[0]} has two samples with the key {identity[1]}; rename one.")
        seen.add(identity)
        classes[sample["label"]].append(identity)
    if not classes:
        raise InputError(f"{shards[0]} has no samples; `flyp shards check` reports what is in it.")
    names = dict(enumerate(classnames)) or {label: str(label) for label in sorted(classes)}
    few = [f"{name} ({len(classes[label])})" for label, name in names.items() if len(classes[label]) < shots]
    if few:
        named = ", ".join(few[:20]) + (", ..." if len(few) > 20 else "")
        _log.warning(f"{len(few)} classes have fewer than {shots} images: {named}.")
    for label, identities in classes.items():
        random.Random(f"{seed} {label}").shuffle(identities)
    return {identity for identities in classes.values() for identity in identities[:shots]}


def _warn(message: str, lost: int = 1) -> None:
    _log.warning(message)


def local_shards(source: str, split: str) -> list[str]:
    """Paths of the tars of `source`, or of several joined by '::'. `flyp shards` reads local files only."""
    shards = list(chain.from_iterable(expand_sources(source, split)))
    if remote := [shard for shard in shards if is_remote(shard)]:
        raise InputError(f"{remote[0]} is not a local file; download the set first.")
    return shards


def list_splits(source: str, split: str | None) -> list[str]:
    """`split` alone, or all splits of the data folder `source`, train first."""
    found = {tar.parent.name for tar in Path(source).glob("*/*.tar")}
    return [split] if split else sorted(found, key=lambda name: (name != "train", name)) or ["train"]


def _resolve_lists(found: list, data: Path, classnames: str | None, templates: str | None) -> "ClassPrompts":
    """Class names and templates: those given, else those in the folder `data`, else the names found and the default."""
    from flyp_plugin.prompts import DEFAULT_TEMPLATE, ClassPrompts

    existing = {name: str(data / name) for name in (CLASSNAMES, TEMPLATES) if (data / name).exists()}
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
    keys = to_unique_keys(classnames)
    if repeated := sorted(label for label in labels if (label, 2) in keys):
        lines = " and ".join(f"line {keys.index((repeated[0], n)) + 1}" for n in (1, 2))
        raise InputError(f"the class {repeated[0]!r} is {lines} of the class names; give a CSV of indices.")
    indices = {name: index for index, (name, _) in enumerate(keys)}
    if labels.isdisjoint(indices) and not labels.isdisjoint(map(str, range(len(keys)))):
        indices = {str(index): index for index in range(len(keys))}
        _log.info("The labels are read as class indices.")
    if unknown := sorted(labels - indices.keys()):
        more = f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else ""
        raise InputError(
            f"the class {unknown[0]!r}{more} is not in the list of {len(keys)} class names; remove its images, or write to "
            "another data folder with a list that contains it."
        )
    return indices


def _shard_sizes(samples: int, shard_size: int | None) -> dict[str, int]:
    """Samples by shard, in order of the shards' numbers. They differ by at most one, so that ranks get equal shares."""
    shards = max(-(-samples // (shard_size or SHARD_SIZE)), 0 if shard_size else min(MIN_SHARDS, samples))
    return {f"{i}.tar": (i + 1) * samples // shards - i * samples // shards for i in range(shards)}


def _resolve_dest(dest: str) -> Path:
    folder = Path(os.path.abspath(dest))
    if folder.is_file() or (folder.exists() and any(folder.iterdir())):
        raise InputError(f"{dest} is a file or is not empty; choose a new split folder, such as data/train.")
    return folder


@contextmanager
def _create_split(folder: Path, sizes: dict[str, int], lists: dict[str, list[str]]) -> Iterator[Path]:
    """FOLDER.part to write to, renamed to `folder` at the end and deleted after an error.

    nshards.txt comes first: expand_source refuses a folder with fewer shards, as a killed run leaves it.
    """
    part = folder.with_name(f"{folder.name}.part")
    try:
        part.mkdir(parents=True)
        try:
            write_atomically(part / "nshards.txt", f"{len(sizes)}\n")
            yield part
            _check_lists(folder.parent, lists)
            for name, lines in lists.items():
                if not (folder.parent / name).exists():
                    write_atomically(folder.parent / name, "\n".join(lines) + "\n")
            write_sizes(part, sizes)
            os.replace(part, folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    except OSError as error:
        fix = f"delete {part}, unless another run is writing it" if part.exists() else "try another place"
        raise InputError(f"{folder} was not written: {error}; {fix}.") from None


def _write_shard(job: tuple[Path, list[tuple[int, str, int, str | None]]]) -> None:
    def read_images() -> Iterator[dict[str, Any]]:
        for number, path, label, group in rows:
            members = {str(image_extension(path)): Path(path).read_bytes(), "cls": str(label).encode()}
            members |= {"group": group.encode()} if group is not None else {}
            yield {"__key__": f"s{number:07d}", **members}  # keys as in CLIP_benchmark

    shard, rows = job
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


def map_parallel(function: Callable, items: Sequence, workers: int, what: str) -> list:
    """function(item) for the item of each shard, in `workers` processes. An error, Ctrl-C or SIGTERM ends them."""
    workers, others = min(workers, len(items)), set(active_children())
    bar: dict[str, Any] = {"total": len(items), "desc": what, "unit": "shard", "disable": None}
    if workers < 2:
        return list(tqdm(map(function, items), **bar))
    # not a Pool: it waits for ever after a signal to the whole group has ended a worker that held its lock
    ignore = (signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the workers too, but is handled here
    with ProcessPoolExecutor(workers, initializer=signal.signal, initargs=ignore) as pool:
        futures = [pool.submit(function, item) for item in items]
        try:
            return [future.result() for future in tqdm(futures, **bar)]
        except BaseException:
            for worker in set(active_children()) - others:
                worker.terminate()
            raise
