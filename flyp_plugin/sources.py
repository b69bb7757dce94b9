"""From what a user types for a set of shards to tar URLs, the text files beside them, and sample counts.

A source is a brace pattern, a `pipe:` command, a folder of tars or a data folder in CLIP_benchmark's layout. expand_source
lists its tars, find_beside finds its class names and templates, shard_sizes says how many samples each tar holds. Only
names, small text files and tar headers are read here; samples.py reads the samples.

It may be local or remote, which makes two differences. An http server cannot list a folder as a disk and an object store
can, so nshards.txt says which tars there are. And remote tars are not counted: that would be a download of them all.
"""

import json
import logging
import os
import re
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import braceexpand
from tqdm import tqdm

from flyp_plugin.errors import InputError
from flyp_plugin.names import same_names
from flyp_plugin.remote import (
    check_driver,
    is_http,
    is_remote,
    is_url,
    list_folder,
    read_lines,
    read_text,
    squeeze,
)
from flyp_plugin.tars import TAR_ERRORS, keys_with_image

# The text files beside shards, or one folder above, with the flag that replaces each
CLASSNAMES = "classnames.txt"
TEMPLATES = "zeroshot_classification_templates.txt"
DESCRIPTIONS = "prompts.json"
_FLAGS = {CLASSNAMES: "--classnames", TEMPLATES: "--templates", DESCRIPTIONS: "--prompts"}
IMAGE_KEY = "jpg;jpeg;png;webp"  # members that may hold a sample's image, as in open_clip
RETRIES = 6  # of a remote tar: with remote.py's pauses about a minute in all
_log = logging.getLogger(__name__)


def expand_sources(sources: str, split: str) -> list[list[str]]:
    """The tar URLs of each of several sources, joined by `::`; see expand_source."""
    return [expand_source(source, split) for source in sources.split("::")]


def expand_source(source: str, split: str) -> list[str]:
    """The tar URLs of one source: a brace pattern, a `pipe:` command, a folder of shards, or a data folder.

    A folder (local, of a server or object store, or a data hub's .../datasets/USER/REPO/tree/BRANCH) that holds no
    shards itself is taken as a data folder, and its subfolder `split` is used.

    Raises:
        InputError: there are no such shards, or the driver that reads them is not installed.
    """
    source = source.strip()
    if not source:
        raise InputError("a source of shards is empty; give one between every two '::'.")
    check_driver(source)
    if source.startswith("pipe:") or re.search(r"\.(tar|tar\.gz|tgz)\}?$|[{*]", source):
        return _expand_pattern(source)
    source = source.rstrip("/")
    if not is_url(source) and not os.path.exists(source):
        raise InputError(f"there is no file or folder '{source}'; check the path.")
    reason = ""
    for folder in (source, f"{source}/{split}"):
        try:
            if names := _list_tars(folder):
                return [os.path.join(_hub_url(folder, "resolve"), name) for name in names]
        except FileNotFoundError as error:
            if " " in (text := squeeze(error)):  # s3fs may repeat the path alone
                reason = reason or f" ({text})"
    missing = "nshards.txt" if is_http(source) else "*.tar"
    raise InputError(
        f"there is no {source}/{missing} or {source}/{split}/{missing}{reason}; give a data folder in CLIP_benchmark's layout "
        "(`flyp shards write` makes one) or a pattern of tars (DIR/{0..9}.tar)."
    )


def _expand_pattern(source: str) -> list[str]:
    try:
        shards = list(braceexpand.braceexpand(source))
    except ValueError as error:
        raise InputError(f"unbalanced braces in '{source}' ({error}); write {{0..9}} or {{a,b}}.") from None
    missing = [shard for shard in shards if not is_remote(shard) and not os.path.isfile(shard)]
    if missing or ("*" in source and not source.startswith("pipe:")):
        others = f" (and {len(missing) - 1} more of {len(shards)})" if len(missing) > 1 else ""
        raise InputError(
            f"there is no shard {(missing or shards)[0]}{others}; check the path and the range in '{source}' (braces, as in "
            "DIR/{0..9}.tar, are expanded; '*' is not)."
        )
    return shards


def _list_tars(folder: str) -> list[str]:
    """Names of the tars in a folder, sorted by the numbers in them; on a server 0.tar, 1.tar, ... by nshards.txt.

    Raises:
        FileNotFoundError: an object store has no such folder.
    """
    if is_http(folder):
        stated = read_text(_hub_url(f"{folder}/nshards.txt", "raw"))
        if stated is not None and not re.fullmatch(r"\s*0*[1-9][0-9]{0,5}\s*", stated):
            raise InputError(f"{folder}/nshards.txt holds {stated.strip()[:40]!r}, not a number of shards.")
        return [f"{i}.tar" for i in range(int(stated or 0))]
    names = [n for n in list_folder(folder) if n.endswith(".tar") and not n.startswith(".")]
    stated = read_text(f"{folder}/nshards.txt") if names else None
    if stated is not None and stated.strip() != str(len(names)):
        raise InputError(
            f"{folder}/nshards.txt says {stated.strip()!r} shards but the folder has {len(names)}; write the set again, or "
            "correct nshards.txt."
        )
    return sorted(names, key=lambda name: [int(s) if s.isdecimal() else s for s in re.split(r"(\d+)", name)])


def _hub_url(url: str, part: str) -> str:
    """The address of a file on a data hub, which serves tars under resolve/ and text under raw/; others unchanged."""
    return re.sub(r"^(https?://.*?/datasets/[^/]+/[^/]+)/(?:tree|resolve)/", rf"\1/{part}/", url, count=1)


def find_beside(shards: Sequence[str], name: str) -> str | None:
    """Path of the text file `name` in the folder of the first shard or in its parent; None if neither has it.

    Raises:
        InputError: the shards of another folder come with another list (lines are compared as in names.py).
    """
    paths = find_all_beside(shards, name)
    for path in paths[1:]:
        if not same_names(read_lines(path) or [], read_lines(paths[0]) or []):
            raise InputError(
                f"{path} differs from {paths[0]}, so their shards cannot be used together; give {_FLAGS[name]}, or write the "
                "sets again with one list."
            )
    return paths[0] if paths else None


def find_all_beside(shards: Sequence[str], name: str) -> list[str]:
    """Like find_beside, for the folder of every shard: each path once."""
    paths = []
    for folder in dict.fromkeys(os.path.dirname(shard) for shard in shards if not shard.startswith("pipe:")):
        if is_url(folder):
            folder = _hub_url(f"{folder}/", "raw").rstrip("/")
            folders = [folder, os.path.dirname(folder)]  # above a server or bucket there is nothing
            candidates = [f"{place}/{name}" for place in folders if is_url(place)]
        else:
            candidates = [os.path.normpath(os.path.join(folder, up, name)) for up in (".", "..")]
        paths += [path for path in candidates if read_text(path) is not None][:1]
    return list(dict.fromkeys(paths))


def count_samples(shards: Sequence[str], image_key: str = IMAGE_KEY) -> int:
    """Number of samples in `shards`, counted if it is not known; see shard_sizes."""
    sizes = shard_sizes(shards, image_key, count=True)
    return sum(sizes[shard] for shard in shards)


def shard_sizes(shards: Sequence[str], image_key: str = IMAGE_KEY, count: bool = False) -> dict[str, int]:
    """{shard: number of samples} for the shards whose sizes are known.

    Sizes come from sizes.json beside the shards, {tar: samples}, or from __len__, the total of a whole folder, as in
    open_clip. Beside local tars they are believed only while newer than the tars (to the nanosecond, and newer than a
    rename or a link) and only for the default `image_key`, which they are about; beside remote tars always. With
    `count`, local tars are otherwise counted from their headers, and sizes.json remembers the result.

    Raises:
        InputError: a sizes.json or __len__ without counts, or, with `count`, remote shards of unknown size.
    """
    folders: dict[str, list[str]] = {}
    for shard in shards:
        folder = shard if shard.startswith("pipe:") else os.path.dirname(shard) or "."
        folders.setdefault(folder, []).append(shard)
    sizes: dict[str, int] = {}
    for folder, group in folders.items():
        names = [os.path.basename(shard) for shard in group]
        known = {} if folder.startswith("pipe:") else _believed_sizes(folder, names, image_key)
        if count and not known.keys() >= set(names):
            if is_remote(folder):
                raise InputError(
                    f"the number of samples in {group[0]} is not known (no sizes.json beside it); give it with "
                    "--train-num-samples, or upload the sizes.json that the local tars have."
                )
            known = _count_folder(folder, names, image_key)
        sizes |= {shard: known[name] for shard, name in zip(group, names) if name in known}
    return sizes


def _believed_sizes(folder: str, names: Sequence[str], image_key: str) -> dict[str, int]:
    local = not is_url(folder)
    if local and image_key != IMAGE_KEY:
        return {}
    sizes = read_counts(folder, "sizes.json")
    if sizes is not None:
        return {n: size for n, size in sizes.items() if not local or _is_newer(folder, "sizes.json", n)}
    total = read_counts(folder, "__len__")
    if total is None or sorted(names) != sorted(_list_tars(folder)):  # it says nothing about part of a folder
        return {}
    if local and not all(_is_newer(folder, "__len__", name) for name in names):
        return {}
    return {name: total // len(names) + (i < total % len(names)) for i, name in enumerate(names)}


def read_counts(folder: str, name: str) -> Any:
    """What a folder's sizes.json ({tar: samples}) or __len__ (an int) says, believed or not; None without that file.

    Raises:
        InputError: it holds something else.
    """
    text = read_text(_hub_url(f"{folder}/{name}", "raw"))
    if text is None:
        return None
    counts: Any = -1
    with suppress(ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        content = json.loads(text)
        counts = {tar: int(size) for tar, size in content.items()} if name == "sizes.json" else int(content)
    if any(size < 0 for size in (counts.values() if isinstance(counts, dict) else [counts])):
        raise InputError(
            f"{folder}/{name} does not hold sample counts; delete it, and the shards are counted."
        )
    return counts


def _is_newer(folder: str, counts: str, tar: str) -> bool:
    path = os.path.join(folder, tar)
    try:
        link, file = os.lstat(path), os.stat(path)
        # the change time as well: a file that is moved or copied may keep an old modification time
        changed = max(link.st_mtime_ns, link.st_ctime_ns, file.st_mtime_ns, file.st_ctime_ns)
        return os.stat(os.path.join(folder, counts)).st_mtime_ns > changed
    except (OSError, ValueError):
        return False


def _count_folder(folder: str, names: Sequence[str], image_key: str) -> dict[str, int]:
    sizes, complete, note = {}, True, ""
    for name in tqdm(dict.fromkeys(names), desc=f"counting {folder}", unit="shard", disable=None, delay=3):
        path, sizes[name] = os.path.join(folder, name), 0
        try:
            for _ in keys_with_image(path, image_key):
                sizes[name] += 1  # an error after these does not lose them
        except TAR_ERRORS as error:
            complete = False
            reason = str(error).partition(":")[0]  # tarfile adds a line for each compression that it tried
            _log.warning(
                f"{path} cannot be read to its end as a tar ({reason}); counted {sizes[name]} samples."
            )
    stated, believed = read_counts(folder, "sizes.json"), _believed_sizes(folder, names, image_key)
    stale = {name for name in stated or () if os.path.exists(os.path.join(folder, name))} - believed.keys()
    if image_key == IMAGE_KEY and (stale or (stated is None and os.path.exists(f"{folder}/__len__"))):
        note = ", because the counts there are not newer than the tars"
    # Not remembered: zero samples, since the image key may be wrong, and a part of what is stale, since the rest would
    # then look new as well
    countable = complete and any(sizes.values()) and image_key == IMAGE_KEY
    if countable and (stale or stated is None) and stale <= sizes.keys():
        try:
            write_sizes(folder, believed | sizes)
            note += f"; remembered in {folder}/sizes.json"
        except OSError as error:
            note += f"; sizes.json could not be written ({error.strerror})"
    _log.info(f"Counted {sum(sizes.values())} samples in {len(sizes)} shards of {folder}{note}.")
    return sizes


def write_sizes(folder: str | Path, sizes: dict[str, int]) -> None:
    """Write sizes.json, {tar: samples}, into a local folder, with a time newer than the tars'."""
    path = Path(folder, "sizes.json")
    write_atomically(path, json.dumps(sizes, indent=1) + "\n")
    for _ in range(10):  # file clocks may tick only every 4 to 10 milliseconds
        if all(_is_newer(str(folder), path.name, name) for name in sizes):
            return
        time.sleep(0.005)
        os.utime(path)


def write_atomically(path: Path, text: str) -> None:
    """Write a small text file so that readers see all of it or none."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
