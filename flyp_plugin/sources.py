"""From what a user types for a set of shards to tar URLs, the text files beside them, and sample counts.

A source is a brace pattern, a `pipe:` command, a folder of tars or a data folder in CLIP_benchmark's layout, local or on
a server. expand_source lists its tars, find_beside finds its class names and templates, shard_sizes says how many
samples each tar holds. Only names, small text files and tar headers are read here; samples.py reads the samples.
"""

import json
import logging
import os
import random
import re
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import suppress
from http.client import HTTPException, IncompleteRead
from pathlib import Path
from typing import IO, Any

import braceexpand
from tqdm import tqdm

from flyp_plugin.errors import InputError
from flyp_plugin.names import same_names
from flyp_plugin.tars import TAR_ERRORS, keys_with_image

IMAGE_KEY = "jpg;jpeg;png;webp"  # members that may hold a sample's image, as in open_clip
TIMEOUT = 30  # seconds without an answer, over http
RETRIES, BACKOFF = 6, 1.0  # retry after at most 1, 2, 4, ... 32 seconds: about a minute in all
TEXT_RETRIES = 4  # for a text file, which a person may be waiting for
MAX_TEXT = 512 << 20  # bytes of a text file, the largest of which are class descriptions
TRANSIENT_STATUS = (408, 425, 429, 500, 502, 503, 504)  # HTTP errors that may pass
_log = logging.getLogger(__name__)


def is_url(source: str) -> bool:
    return "://" in source


def is_remote(shard: str) -> bool:
    return is_url(shard) or shard.startswith("pipe:")


def backoff_delays(retries: int) -> Iterator[float | None]:
    """Seconds to wait after each failed attempt (exponential backoff with jitter); None after the last."""
    for attempt in range(retries):
        yield BACKOFF * 2**attempt * random.SystemRandom().uniform(0.5, 1)
    yield None


def is_transient(error: BaseException) -> bool:
    """Whether a failed read may succeed later: not a malformed address, a 404 or a member that occurs twice."""
    if (code := getattr(error, "code", None)) is not None:
        return code in TRANSIENT_STATUS
    return not isinstance(error, ValueError) and not isinstance(getattr(error, "reason", None), str)


def open_source(path: str) -> IO[bytes]:
    """Open a local file or URL that the user gave, or one beside it."""
    return urllib.request.urlopen(path, timeout=TIMEOUT) if is_url(path) else open(path, "rb")  # noqa: S310


def read_text(path: str) -> str | None:
    """Content of a text file, local or http(s); None if it does not exist. A failing server is asked again.

    Raises:
        InputError: the file is not UTF-8 or larger than MAX_TEXT, or the server does not answer.
    """
    for delay in backoff_delays(TEXT_RETRIES if is_url(path) else 0):
        try:
            with open_source(path) as stream:
                raw = stream.read(MAX_TEXT + 1)
                unsent = getattr(stream, "length", None)  # what a server has announced but not sent
                if unsent and len(raw) <= MAX_TEXT:
                    raise IncompleteRead(raw, unsent)
            break
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, HTTPException, ValueError) as error:  # ValueError: a malformed address
            if getattr(error, "code", None) in (403, 404, 410):
                return None
            if delay is None or not is_transient(error):
                raise InputError(f"{path} could not be read ({error}); check the address.") from None
            _log.warning(f"{path} could not be read ({error}); retrying.")
            time.sleep(delay)
    if len(raw) > MAX_TEXT:
        raise InputError(f"{path} is larger than {MAX_TEXT >> 20} MiB; give a text file.")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise InputError(f"{path}, line {line}, is not UTF-8; save the file as UTF-8 text.") from None


def read_lines(path: str) -> list[str] | None:
    """Lines of a list of names or templates; None if there is no such file."""
    text = read_text(path)
    return None if text is None else [line.strip() for line in text.rstrip().split("\n")]


def expand_sources(sources: str, split: str) -> list[list[str]]:
    """The tar URLs of each of several sources, joined by `::`; see expand_source."""
    return [expand_source(source, split) for source in sources.split("::")]


def expand_source(source: str, split: str) -> list[str]:
    """The tar URLs of one source: a brace pattern, a `pipe:` command, a folder of shards, or a data folder.

    A folder (local, http(s), or a data hub's .../datasets/USER/REPO/tree/BRANCH) that holds no shards itself is taken
    as a data folder, and its subfolder `split` is used.

    Raises:
        InputError: there are no such shards.
    """
    source = source.strip()
    if not source:
        raise InputError("a source of shards is empty; give one between every two '::'.")
    if source.startswith("pipe:") or re.search(r"\.(tar|tar\.gz|tgz)\}?$|[{*]", source):
        return _expand_pattern(source)
    source = source.rstrip("/")
    if not is_url(source) and not os.path.exists(source):
        raise InputError(f"there is no file or folder '{source}'; check the path.")
    for folder in (source, f"{source}/{split}"):
        if names := _list_tars(folder):
            return [os.path.join(_hub_url(folder, "resolve"), name) for name in names]
    missing = "nshards.txt" if is_url(source) else "*.tar"
    raise InputError(
        f"there is no {source}/{missing} or {source}/{split}/{missing}; give a data folder in CLIP_benchmark's layout "
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
    """Names of the tars in a folder, sorted by the numbers in them; on a server 0.tar, 1.tar, ... by nshards.txt."""
    stated = read_text(_hub_url(f"{folder}/nshards.txt", "raw"))
    if is_url(folder):
        if stated is None:
            return []
        if not re.fullmatch(r"\s*0*[1-9][0-9]{0,5}\s*", stated):
            raise InputError(f"{folder}/nshards.txt holds {stated.strip()[:40]!r}, not a number of shards.")
        return [f"{i}.tar" for i in range(int(stated))]
    names = [path.name for path in Path(folder).glob("[!.]*.tar")]
    if names and stated is not None and stated.strip() != str(len(names)):
        raise InputError(
            f"{folder}/nshards.txt says {stated.strip()!r} shards but the folder has {len(names)}; write the set again, or "
            "correct nshards.txt."
        )
    return sorted(names, key=lambda name: [int(s) if s.isdecimal() else s for s in re.split(r"(\d+)", name)])


def _hub_url(url: str, part: str) -> str:
    """The address of a file on a data hub, which serves tars under resolve/ and text under raw/; others unchanged."""
    return re.sub(r"(://.*?/datasets/[^/]+/[^/]+)/(?:tree|resolve)/", rf"\1/{part}/", url, count=1)


def find_beside(shards: Sequence[str], name: str) -> str | None:
    """Path of the text file `name` in the folder of the first shard or in its parent; None if neither has it.

    Raises:
        InputError: the shards of another folder come with another list (lines are compared as in names.py).
    """
    paths = find_all_beside(shards, name)
    for path in paths[1:]:
        if not same_names(read_lines(path) or [], read_lines(paths[0]) or []):
            flag = {"classnames.txt": "--classnames", "prompts.json": "--prompts"}.get(name, "--templates")
            raise InputError(
                f"{path} differs from {paths[0]}, so their shards cannot be used together; give {flag}, or write the "
                "sets again with one list."
            )
    return paths[0] if paths else None


def find_all_beside(shards: Sequence[str], name: str) -> list[str]:
    """Like find_beside, for the folder of every shard: each path once."""
    paths = []
    for folder in dict.fromkeys(os.path.dirname(shard) for shard in shards if not shard.startswith("pipe:")):
        if is_url(folder):
            folder = _hub_url(f"{folder}/", "raw").rstrip("/")
            candidates = [f"{folder}/{name}", f"{os.path.dirname(folder)}/{name}"]
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
                    "--train-num-samples."
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
