"""From what a user types for a set of shards to tar URLs, the text files beside them and sample counts.

Reads names, small text files and tar headers; the samples themselves are data.py's.
"""

import json
import logging
import os
import re
import tarfile
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator, Sequence
from http.client import HTTPException
from pathlib import Path

import braceexpand
from tqdm import tqdm

from flyp_plugin.errors import InputError

IMAGE_KEY = "jpg;jpeg;png;webp"  # members that may hold a sample's image, as open_clip has it
TAR_ERRORS = (tarfile.TarError, OSError, EOFError, zlib.error)  # what reading a broken one raises
TIMEOUT = 30  # seconds for a small text file over http
_log = logging.getLogger(__name__)


def is_url(source: str) -> bool:
    return "://" in source


def read_text(path: str) -> str | None:
    """A text file's content, local or http(s); None where there is none.

    Raises:
        InputError: it is there but is not UTF-8, or the server does not answer.
    """
    try:
        if is_url(path):
            with urllib.request.urlopen(path, timeout=TIMEOUT) as stream:
                raw = stream.read()
        else:
            raw = Path(path).read_bytes()
        return raw.decode("utf-8-sig")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise InputError(f"{path}, line {line}, is not UTF-8; save the file as UTF-8 text.") from None
    except urllib.error.HTTPError as error:
        if error.code in (403, 404, 410):
            return None
        raise InputError(
            f"{path} could not be read: the server answers {error.code} {error.reason}."
        ) from None
    except (OSError, HTTPException, ValueError) as error:  # ValueError: no address at all
        reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
        raise InputError(f"{path} could not be read ({reason}); check the address.") from None


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
    missing = [s for s in shards if not is_url(s) and not s.startswith("pipe:") and not os.path.isfile(s)]
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
                    "write the set again, or mend nshards.txt."
                )
            return [str(tar) for tar in tars]
    raise InputError(
        f"neither {source} nor {source}/{split} holds .tar files; `flyp shards write` makes shards."
    )


def _expand_url(source: str, split: str) -> list[str]:
    for folder in (source, f"{source}/{split}"):
        stated = read_text(_on_hub(f"{folder}/nshards.txt", "raw"))
        if stated is not None:
            if not stated.strip().isdigit() or int(stated) < 1:
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
    """Path of the text file `name` in the folder of the first shard or the one above; None where neither has it."""
    if not shards or shards[0].startswith("pipe:"):
        return None
    folder = os.path.dirname(_on_hub(shards[0], "raw")) or "."
    if is_url(folder):
        paths = [f"{folder}/{name}", f"{os.path.dirname(folder)}/{name}"]
    else:
        paths = [os.path.normpath(os.path.join(folder, up, name)) for up in (os.curdir, os.pardir)]
    return next((path for path in paths if read_text(path) is not None), None)


def count_samples(shards: Sequence[str], image_key: str = IMAGE_KEY) -> int:
    """Number of samples in `shards`: from sizes.json or __len__ beside them, else from the headers of local tars.

    What was counted is remembered in a sizes.json in the form that open_clip reads, where the folder has none.

    Raises:
        InputError: remote shards without sizes.json, or a sizes.json that is not what it should be.
    """
    total = 0
    for folder, names in _by_folder(shards).items():
        sizes = None if folder is None else _read_sizes(folder, names)
        if sizes is not None:
            total += sizes
        elif folder is None or is_url(folder):
            raise InputError(
                f"the number of samples in {shards[0]} is not known (no sizes.json beside it); give it with "
                "--train-num-samples."
            )
        else:
            total += _count_folder(folder, names, image_key)
    return total


def stated_samples(shards: Sequence[str]) -> int | None:
    """Number of samples in `shards` as sizes.json or __len__ beside them state it; None where they do not."""
    try:
        sizes = [folder and _read_sizes(folder, names) for folder, names in _by_folder(shards).items()]
    except InputError:
        return None
    return None if None in sizes else sum(sizes)  # type: ignore[arg-type]


def _by_folder(shards: Sequence[str]) -> dict[str | None, list[str]]:
    folders: dict[str | None, list[str]] = {}
    for shard in shards:
        folder = None if shard.startswith("pipe:") else os.path.dirname(shard) or "."
        folders.setdefault(folder, []).append(os.path.basename(shard))
    return folders


def _read_sizes(folder: str, names: Sequence[str]) -> int | None:
    text = read_text(_on_hub(f"{folder}/sizes.json", "raw"))
    try:
        if text is not None:
            sizes = json.loads(text)
            return sum(int(sizes[name]) for name in names) if all(name in sizes for name in names) else None
        text = read_text(_on_hub(f"{folder}/__len__", "raw"))
        # __len__ is the whole folder's, and says nothing of a part of it
        others = not is_url(folder) and any(p.name not in names for p in Path(folder).glob("[!.]*.tar"))
        return None if text is None or others else int(text)
    except (ValueError, TypeError):
        raise InputError(
            f"{folder}/{'sizes.json' if text and '{' in text else '__len__'} does not hold sample counts; "
            "delete it, and the shards are counted."
        ) from None


def _count_folder(folder: str, names: Sequence[str], image_key: str) -> int:
    sizes, whole = {}, True
    for name in tqdm(dict.fromkeys(names), desc=f"counting {folder}", unit="shard", disable=None, delay=3):
        path = os.path.join(folder, name)
        keys: set[str] = set()
        try:
            keys.update(_keys(path, image_key))  # keeps those before an error
        except TAR_ERRORS as error:
            whole = False
            reason = str(error).partition(":")[0]  # tarfile goes on with a line for each compression
            _log.warning(f"{path} cannot be read to its end as a tar ({reason}); {len(keys)} samples count.")
        sizes[name] = len(keys)
    counted = sum(sizes[name] for name in names)
    remembered = Path(folder, "sizes.json")
    if whole and counted and not remembered.exists():  # nothing at all: the image key may be wrong
        try:
            write_atomically(remembered, json.dumps(sizes, indent=1) + "\n")
            kept = f"; remembered in {remembered}"
        except OSError:
            kept = " (which cannot be written to)"
        _log.info(f"Counted {counted} samples in {len(sizes)} shards of {folder}{kept}.")
    return counted


def count_shard(path: str, image_key: str = IMAGE_KEY) -> int:
    """Number of samples with an image in one local tar, from its headers."""
    return len(set(_keys(path, image_key)))


def _keys(path: str, image_key: str) -> Iterator[str]:
    """Keys of the samples that have an image; as in webdataset, a key ends at the first dot of the file's name."""
    endings = image_key.split(";")
    with tarfile.open(path) as tar:
        for member in tar:
            folder, _, name = member.name.rpartition("/")
            key, _, ending = name.partition(".")
            if member.isreg() and key and ending.lower() in endings:
                yield f"{folder}/{key}"


def write_atomically(path: Path, text: str) -> None:
    """Write a small text file so that it is there whole or not at all."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
