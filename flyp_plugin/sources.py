"""From what a user types for a set of shards to tar URLs, the text files beside them and sample counts.

Reads names, small text files and tar headers; the samples themselves are samples.py's.
"""

import json
import logging
import os
import random
import re
import tarfile
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator, Sequence
from functools import lru_cache
from http.client import HTTPException, IncompleteRead
from itertools import groupby
from pathlib import Path
from typing import IO

import braceexpand
from tqdm import tqdm

from flyp_plugin.errors import InputError
from flyp_plugin.names import same_names

IMAGE_KEY = "jpg;jpeg;png;webp"  # members that may hold a sample's image, as open_clip has it
TAR_ERRORS = (tarfile.TarError, OSError, EOFError, zlib.error)  # what reading a broken one raises
TIMEOUT = 30  # seconds without an answer, over http
RETRIES, BACKOFF = 6, 1.0  # tries again after 1, 2, 4, ... 32 seconds, at most: a minute in all
TEXT_RETRIES = 4  # for a text file, which a person may be waiting for
MOST_TEXT, MOST_MEMBER = 100 << 20, 1 << 30  # bytes of a text file and of a tar's member
MOST_SHARDS = 1_000_000  # that nshards.txt may ask for
PASSING = (408, 425, 429, 500, 502, 503, 504)  # a server's answers that may be others soon
# Members of a sample: as in webdataset, files in a row that have one name up to its first dot
_MEMBER = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)")
_log = logging.getLogger(__name__)


def is_url(source: str) -> bool:
    return "://" in source


def is_remote(shard: str) -> bool:
    return is_url(shard) or shard.startswith("pipe:")


def backoff_delays(retries: int) -> Iterator[float]:
    """Seconds to wait before each further try: exponential backoff, with jitter for the sake of the server."""
    for attempt in range(retries):
        yield BACKOFF * 2**attempt * random.SystemRandom().uniform(0.5, 1)


def is_transient(error: BaseException) -> bool:
    """Whether what failed over a network may work a little later: not a wrong address, a 404, a member that is twice."""
    code, reason = (getattr(error, name, None) for name in ("code", "reason"))
    if code is not None:
        return code in PASSING
    return not isinstance(reason, str) and not isinstance(error, ValueError)


def read_text(path: str) -> str | None:
    """A text file's content, local or http(s); None where there is none. A server is asked again for some seconds.

    Raises:
        InputError: it is there but is not UTF-8, or larger than text is, or the server does not answer.
    """
    for wait in [*backoff_delays(TEXT_RETRIES if is_url(path) else 0), None]:
        try:
            with opened(path) as stream:
                raw = stream.read(MOST_TEXT + 1)
                left = getattr(stream, "length", None)  # of what the server announced
                if left and len(raw) <= MOST_TEXT:
                    raise IncompleteRead(raw, left)
            break
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, HTTPException, ValueError) as error:  # ValueError: no address at all
            code = getattr(error, "code", None)
            if code in (403, 404, 410):
                return None
            reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
            if wait is None or not is_transient(error):
                what = (
                    f": the server answers {code} {reason}." if code else f" ({reason}); check the address."
                )
                raise InputError(f"{path} could not be read{what}") from None
            _log.warning(f"{path} could not be read ({code or reason}); trying again.")
            time.sleep(wait)
    if len(raw) > MOST_TEXT:
        raise InputError(
            f"{path} is larger than {MOST_TEXT >> 20} MiB, so it is not the text file it should be."
        )
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise InputError(f"{path}, line {line}, is not UTF-8; save the file as UTF-8 text.") from None


def opened(path: str) -> IO[bytes]:
    """The bytes of a local file or of an address, which the user typed or which is beside what the user typed."""
    return urllib.request.urlopen(path, timeout=TIMEOUT) if is_url(path) else open(path, "rb")  # noqa: S310


def expand_sources(sources: str, split: str) -> list[list[str]]:
    """The tar URLs of each of the sources that `::` joins; see expand_source."""
    return [expand_source(source, split) for source in sources.split("::")]


def expand_source(source: str, split: str) -> list[str]:
    """The tar URLs of one source: a brace pattern, a `pipe:` command, a folder of shards, or a data folder.

    A folder (local or http(s), also in the form .../datasets/USER/REPO/tree/BRANCH) is taken as the split folder
    where it holds shards itself, and else as the data folder, whose `split` is then used.

    Raises:
        InputError: nothing is there.
    """
    source = source.strip()
    if not source:
        raise InputError(
            "a source of shards is empty; give a tar pattern or a folder, joined by '::' if several."
        )
    if source.startswith("pipe:") or re.search(r"\.(tar|tar\.gz|tgz)\}?$|[{*]", source):
        return _expand_pattern(source)
    source = source.rstrip("/")
    return _expand_url(source, split) if is_url(source) else _expand_folder(source, split)


def _expand_pattern(source: str) -> list[str]:
    if "*" in source and not source.startswith("pipe:"):
        raise InputError(f"'{source}' has a '*'; shards are named by braces (DIR/{{0..9}}.tar) or by folder.")
    try:
        shards = list(braceexpand.braceexpand(source))
    except ValueError as error:
        raise InputError(
            f"the braces in '{source}' do not pair ({error}); write {{0..9}} or {{a,b}}."
        ) from None
    missing = [s for s in shards if not is_remote(s) and not os.path.isfile(s)]
    if missing:
        more = f" (and {len(missing) - 1} more of {len(shards)})" if len(missing) > 1 else ""
        raise InputError(f"there is no shard {missing[0]}{more}; check the path or the range in '{source}'.")
    return shards


def _expand_folder(source: str, split: str) -> list[str]:
    if os.path.isfile(source):
        raise InputError(f"{source} is not a tar file or a folder; `flyp shards write` makes shards.")
    if not os.path.isdir(source):
        raise InputError(f"there is no file or folder {source}; check the path.")
    for folder in (Path(source), Path(source, split)):
        tars = [path for path in folder.glob("*.tar") if not path.name.startswith(".")]
        # by the numbers in their names
        tars.sort(key=lambda p: [int(s) if s.isdecimal() else s for s in re.split(r"(\d+)", p.name)])
        if tars:
            stated = read_text(str(folder / "nshards.txt"))
            if stated is not None and stated.strip() != str(len(tars)):
                raise InputError(
                    f"{folder}/nshards.txt says {stated.strip()!r} shards but the folder has {len(tars)}; "
                    "write the set again, or fix nshards.txt."
                )
            # joined, for str(Path("./pipe:x.tar")) would be a command
            return [os.path.join(folder if str(folder) != "." else "./", tar.name) for tar in tars]
    raise InputError(
        f"neither {source} nor {source}/{split} holds .tar files; `flyp shards write` makes shards."
    )


def _expand_url(source: str, split: str) -> list[str]:
    for folder in (source, f"{source}/{split}"):
        stated = read_text(_on_hub(f"{folder}/nshards.txt", "raw"))
        if stated is not None:
            if not re.fullmatch(r"\s*0*[1-9][0-9]{0,6}\s*", stated) or int(stated) > MOST_SHARDS:
                raise InputError(
                    f"{folder}/nshards.txt holds {stated.strip()[:40]!r}, not a number of shards."
                )
            return [f"{_on_hub(folder, 'resolve')}/{i}.tar" for i in range(int(stated))]
    raise InputError(
        f"neither {source}/nshards.txt nor {source}/{split}/nshards.txt can be had; give a data folder in the "
        "CLIP_benchmark layout, or the shards themselves (URL/{0..9}.tar)."
    )


def _on_hub(url: str, part: str) -> str:
    """Where a data hub keeps it: its tars are under resolve/, its text under raw/; other addresses stay as they are."""
    return re.sub(r"(://.*?/datasets/[^/]+/[^/]+)/(?:tree|resolve)/", rf"\1/{part}/", url, count=1)


def find_beside(shards: Sequence[str], name: str) -> str | None:
    """Path of the text file `name` in the folder of the first shard or the one above; None where neither has it.

    Raises:
        InputError: shards in other folders have another `name`; lines are compared as in names.py.
    """
    paths = all_beside(shards, name)
    for path in paths[1:]:
        if not same_names(lines_of(path) or [], lines_of(paths[0]) or []):
            flag = "--classnames" if name == "classnames.txt" else "--templates"
            raise InputError(
                f"{path} is not the same list as {paths[0]}, so their shards do not go together; give {flag}, or write "
                "the sets again with one list."
            )
    return paths[0] if paths else None


def lines_of(path: str) -> list[str] | None:
    """The lines of a text file that is a list of names or templates; None where there is none."""
    text = read_text(path)
    return None if text is None else [line.strip() for line in text.rstrip().split("\n")]


def all_beside(shards: Sequence[str], name: str) -> list[str]:
    """As find_beside, in or above the folder of each shard: each path once."""
    first_in = {os.path.dirname(shard): shard for shard in reversed(shards)}
    paths = (_beside(shard, name) for shard in reversed(first_in.values()))
    return list(dict.fromkeys(path for path in paths if path))


def _beside(shard: str, name: str) -> str | None:
    if shard.startswith("pipe:"):
        return None
    folder = os.path.dirname(_on_hub(shard, "raw")) or "."
    if is_url(folder):
        paths = [f"{folder}/{name}", f"{os.path.dirname(folder)}/{name}"]
    else:
        paths = [os.path.normpath(os.path.join(folder, up, name)) for up in (os.curdir, os.pardir)]
    return next((path for path in paths if read_text(path) is not None), None)


def count_samples(shards: Sequence[str], image_key: str = IMAGE_KEY) -> int:
    """Number of samples in `shards`: from sizes.json or __len__ beside them, else from the headers of local tars.

    Beside local tars a count is believed only where it is newer than they are (by the nanosecond, and also than a
    rename or a link) and of the default `image_key`, which is what sizes.json is about; what is not believed is counted
    anew. So files that came in any order, by a copy or a download, are counted once. Counts of remote tars are believed.
    What was counted is remembered in sizes.json in the form that open_clip reads, {tar: samples}, where the folder has
    none or one that was out of date.

    Raises:
        InputError: remote shards without sizes.json, or a sizes.json that is not what it should be.
    """
    total = 0
    for folder, names in _by_folder(shards).items():
        stated = None if folder is None else _stated(folder, names, image_key)
        if stated is not None:
            total += stated
        elif folder is None or is_url(folder):
            raise InputError(
                f"the number of samples in {shards[0]} is not known (no sizes.json beside it); give it with "
                "--train-num-samples."
            )
        else:
            total += _count_folder(folder, names, image_key)
    return total


def stated_samples(shards: Sequence[str], image_key: str = IMAGE_KEY) -> int | None:
    """Number of samples in `shards` as sizes.json or __len__ beside them state it; None where they are not believed."""
    try:
        stated = [
            None if folder is None else _stated(folder, names, image_key)
            for folder, names in _by_folder(shards).items()
        ]
    except InputError:
        return None
    return None if None in stated else sum(stated)  # type: ignore[arg-type]


def _by_folder(shards: Sequence[str]) -> dict[str | None, list[str]]:
    folders: dict[str | None, list[str]] = {}
    for shard in shards:
        folder = None if shard.startswith("pipe:") else os.path.dirname(shard) or "."
        folders.setdefault(folder, []).append(os.path.basename(shard))
    return folders


def _stated(folder: str, names: Sequence[str], image_key: str) -> int | None:
    """The samples in the tars `names` of a folder as counts in it that are believed have it; None where there are none."""
    if read_sizes(folder) is not None:
        sizes = _believed_sizes(folder, image_key)
        return sum(sizes[name] for name in names) if all(name in sizes for name in names) else None
    length = read_length(folder)
    # __len__ is the whole folder's, and says nothing of a part of it
    if length is None or sorted(names) != sorted(_tars_in(folder) or ()):
        return None
    newer = is_url(folder) or all(_is_newer(folder, "__len__", name) for name in names)
    return length if newer and (is_url(folder) or image_key == IMAGE_KEY) else None


def _tars_in(folder: str) -> list[str] | None:
    """Names of all tars in a folder; of a remote one by its nshards.txt, None where it has none."""
    if not is_url(folder):
        return [path.name for path in Path(folder).glob("[!.]*.tar")]
    stated = (read_text(_on_hub(f"{folder}/nshards.txt", "raw")) or "").strip()
    return [f"{i}.tar" for i in range(int(stated))] if re.fullmatch("[0-9]{1,6}", stated) else None


def _believed_sizes(folder: str, image_key: str) -> dict[str, int]:
    """Of read_sizes what is believed: see count_samples."""
    sizes = read_sizes(folder) or {}
    if is_url(folder):
        return sizes
    if image_key != IMAGE_KEY:
        return {}
    return {name: size for name, size in sizes.items() if _is_newer(folder, "sizes.json", name)}


def _is_newer(folder: str, counts: str, tar: str) -> bool:
    """Whether a file of counts in a local folder was written after the tar came to be what it is."""
    path = os.path.join(folder, tar)
    try:
        link, file = os.lstat(path), os.stat(path)
        # the change time, too: a file that is moved or copied to a name may bring an old time of writing
        changed = max(link.st_mtime_ns, link.st_ctime_ns, file.st_mtime_ns, file.st_ctime_ns)
        return os.stat(os.path.join(folder, counts)).st_mtime_ns > changed
    except (OSError, ValueError):
        return False


def read_length(folder: str) -> int | None:
    """The number of samples in `folder`, local or not, as __len__ in it has it; None where there is none.

    Raises:
        InputError: it holds something else.
    """
    text = read_text(_on_hub(f"{folder}/__len__", "raw"))
    if text is None:
        return None
    if not re.fullmatch(r"\s*[0-9]{1,18}\s*", text):
        raise _no_counts(f"{folder}/__len__")
    return int(text)


def read_sizes(folder: str) -> dict[str, int] | None:
    """The number of samples by tar as sizes.json in `folder`, local or not, has it; None where there is none.

    Raises:
        InputError: it holds something else.
    """
    text = read_text(_on_hub(f"{folder}/sizes.json", "raw"))
    if text is None:
        return None
    try:
        sizes = {name: int(size) for name, size in json.loads(text).items()}
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        sizes = {"": -1}
    if any(size < 0 for size in sizes.values()):
        raise _no_counts(f"{folder}/sizes.json")
    return sizes


def stated_sizes(shards: Sequence[str], image_key: str = IMAGE_KEY) -> dict[str, int]:
    """The number of samples of those of the tars for which sizes.json beside them states it and is believed."""
    sizes = {folder: folder and _believed_sizes(folder, image_key) for folder in _by_folder(shards)}
    by_shard = {s: (sizes.get(os.path.dirname(s) or ".") or {}).get(os.path.basename(s)) for s in shards}
    return {shard: size for shard, size in by_shard.items() if size is not None}


def _no_counts(path: str) -> InputError:
    return InputError(f"{path} does not hold sample counts; delete it, and the shards are counted.")


def _count_folder(folder: str, names: Sequence[str], image_key: str) -> int:
    sizes, whole = {}, True
    for name in tqdm(dict.fromkeys(names), desc=f"counting {folder}", unit="shard", disable=None, delay=3):
        path = os.path.join(folder, name)
        found = 0
        try:
            for _ in _with_image(path, image_key):
                found += 1  # keeps those before an error
        except TAR_ERRORS as error:
            whole = False
            reason = str(error).partition(":")[0]  # tarfile goes on with a line for each compression
            _log.warning(f"{path} cannot be read to its end as a tar ({reason}); {found} samples count.")
        sizes[name] = found
    counted = sum(sizes[name] for name in names)
    before, believed = read_sizes(folder), _believed_sizes(folder, image_key)
    out_of_date = {
        name for name in before or () if os.path.exists(os.path.join(folder, name))
    } - believed.keys()
    old, kept = "", ""
    if image_key == IMAGE_KEY and (out_of_date or (before is None and os.path.exists(f"{folder}/__len__"))):
        old = ", for what counts there are is not newer than all of them"
    # nothing at all: the image key may be wrong; a part of what is out of date: the rest would look new, too
    if (
        whole
        and counted
        and image_key == IMAGE_KEY
        and (before is None or out_of_date)
        and out_of_date <= sizes.keys()
    ):
        try:
            write_sizes(folder, believed | sizes)
            kept = f"; remembered in {folder}/sizes.json"
        except OSError:
            kept = " (which cannot be written to)"
    _log.info(f"Counted {counted} samples in {len(sizes)} shards of {folder}{old}{kept}.")
    return counted


def write_sizes(folder: str | Path, sizes: dict[str, int]) -> None:
    """Write sizes.json, {tar: samples}, into a local folder, so that it is newer than those tars."""
    path = Path(folder, "sizes.json")
    write_atomically(path, json.dumps(sizes, indent=1) + "\n")
    for _ in range(10):  # a clock that ticks every 4 or 10 milliseconds
        if all(_is_newer(str(folder), path.name, name) for name in sizes):
            return
        time.sleep(0.005)
        os.utime(path)


class Header(tarfile.TarInfo):
    """A member's header. What is wrong with it is an error here: tarfile takes it for the end of the tar."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> "Header":
        try:
            return super().fromtarfile(tar)
        except tarfile.HeaderError as error:
            kind = type(error).__name__
            if kind == "EOFHeaderError":  # the mark at the end
                raise
            end = kind == "EmptyHeaderError"
            raise tarfile.ReadError("it has no end mark, so it is cut short" if end else str(error)) from None

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "Header":
        header = super().frombuf(buf, encoding, errors)
        if header.size > MOST_MEMBER:
            raise tarfile.ReadError(f"{header.name[:80]} in it claims to have {header.size} bytes")
        return header


def count_shard(path: str, image_key: str = IMAGE_KEY) -> int:
    """Number of samples with an image in one local tar, from its headers."""
    return sum(1 for _ in _with_image(path, image_key))


def is_member(name: str) -> bool:
    """Whether a file in a tar is read at all: not what begins with a dot, as macOS' ._ files, nor webdataset's __NAME__."""
    return not re.match(r"__[^/]*__($|/)", name) and not name.rpartition("/")[2].startswith(".")


def _groups(path: str) -> Iterator[tuple[str, Iterator[str]]]:
    """(key, endings of the members) of each sample in a local tar, grouped as samples.read_samples does."""
    with tarfile.open(path, tarinfo=Header) as tar:
        names = (
            _MEMBER.fullmatch(member.name) for member in tar if member.isreg() and is_member(member.name)
        )
        for key, members in groupby((found.groups() for found in names if found), lambda member: member[0]):
            yield key, (ending.lower() for _, ending in members)


def _with_image(path: str, image_key: str) -> Iterator[str]:
    images = set(image_key.split(";"))
    # known with the image, whatever breaks after it
    return (key for key, endings in _groups(path) if any(ending in images for ending in endings))


def first_endings(path: str) -> list[str]:
    """The endings of the members of the first sample in a local tar."""
    return next((sorted(endings) for _, endings in _groups(path)), [])


def why_apart(path: str) -> str | None:
    """A sentence where some sample's members are not next to each other in a local tar; None where all are, or remote.

    A key that comes again with the same members is another matter: two samples of one key.
    """
    try:
        return None if is_remote(path) else _why_apart(path, os.stat(path).st_mtime_ns)
    except OSError:
        return None


@lru_cache(64)
def _why_apart(path: str, written: int) -> str | None:
    first: dict[str, set[str]] = {}
    try:
        for key, members in _groups(path):
            endings = set(members)
            if first.setdefault(key, endings) is not endings and first[key].isdisjoint(endings):
                return (
                    f"the members of sample {key} ({', '.join(sorted(first[key] | endings)[:5])}) are not next to each "
                    f"other in {path}; make the tar again, sorted by name: tar --sort=name -cf {path} FOLDER"
                )
    except TAR_ERRORS:
        pass  # what was read before the break is in order
    return None


def write_atomically(path: Path, text: str) -> None:
    """Write a small text file so that it is there whole or not at all."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
