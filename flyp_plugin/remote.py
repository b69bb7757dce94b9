"""Bytes from wherever a user keeps them: a disk, a command, a web server, an object store or a data hub.

The scheme of an address decides who reads it:

    (none)                              open()
    pipe:COMMAND                        webdataset, which runs it in a shell
    http://, https://                   urllib
    hf://, s3://, gs://, az://, ...     fsspec, with the driver that the user has installed. Keys, endpoints and timeouts
                                        are set as the driver's and fsspec's documentation say (FSSPEC_S3='{...}')

Each has errors of its own. What may pass is asked for again, by read_text here and by samples.py for a tar.
"""

import errno
import logging
import os
import random
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import IncompleteRead
from typing import Any, TypeVar
from urllib.error import HTTPError

from flyp_plugin.errors import InputError

TIMEOUT = 30  # seconds without an answer, over http
BACKOFF = 1.0  # retry after at most 1, 2, 4, ... seconds
TEXT_RETRIES = 4  # for a text file or a listing, which a person may be waiting for
MAX_TEXT = 512 << 20  # bytes of a text file, the largest of which are class descriptions
BLOCK = 16 << 20  # bytes of a request to an object store
TRANSIENT_STATUS = (408, 425, 429, 500, 502, 503, 504)  # HTTP errors that may pass
Answer = TypeVar("Answer")
_remembered: dict[str, str | None] | None = None  # in a block of remember_texts
_log = logging.getLogger(__name__)


def is_remote(source: str) -> bool:
    return "://" in source or source.startswith("pipe:")


def is_url(source: str) -> bool:
    return "://" in source and not source.startswith("pipe:")


def is_http(source: str) -> bool:
    return source.startswith(("http://", "https://"))


def require_local(*places: str) -> None:
    """Refuse addresses: few-shot sets and `flyp shards` read and write local files."""
    for place in map(str.strip, places):
        if is_remote(place):
            raise InputError(f"{place} is not a local path; use a local copy of the set.")


def check_driver(source: str) -> None:
    """Import what reads `source`.

    Raises:
        InputError: its driver is not installed, or fsspec knows no such scheme.
    """
    if not is_url(source) or is_http(source):
        return
    import fsspec  # 0.15 s, which `flyp --help` need not wait for

    try:
        fsspec.get_filesystem_class(source.partition("://")[0] or "''")
    except ImportError as error:
        missing = getattr(error.__cause__, "name", None) or "fsspec"
        command = f"pip install {missing.partition('.')[0]}"
        raise InputError(f"{source} cannot be read without its driver ({error}); run: {command}") from None
    except ValueError as error:
        raise InputError(f"{source} cannot be read ({error}); check the address.") from None


def _filesystem(url: str) -> Any:
    """fsspec's file system for a URL; a forked worker makes its own, since fsspec drops what it inherits."""
    import fsspec

    check_driver(url)
    return fsspec.core.url_to_fs(url)[0]


def open_source(path: str) -> Any:
    """Open a file that the user gave, or one beside it, for reading its bytes."""
    if path.startswith("pipe:"):
        from webdataset import gopen

        return gopen(path)
    if not is_url(path):
        return open(path, "rb")
    if is_http(path):
        return urllib.request.urlopen(path, timeout=TIMEOUT)  # noqa: S310
    return _filesystem(path).open(path, "rb", block_size=BLOCK)


def list_folder(folder: str) -> list[str]:
    """Names in a folder, local or of an object store.

    Raises:
        FileNotFoundError: an object store has no such folder.
        InputError: it does not answer, or the folder may not be read.
    """
    if is_url(folder):
        paths = _ask(folder, lambda: _filesystem(folder).ls(folder, detail=False))
    else:
        paths = _ask(folder, lambda: os.listdir(folder)) if os.path.isdir(folder) else []
    return [os.path.basename(path) for path in paths]


@contextmanager
def remember_texts() -> Iterator[None]:
    """Ask servers for each text file once within a block, however often it is read."""
    global _remembered
    _remembered = {}
    try:
        yield
    finally:
        _remembered = None


def read_text(path: str) -> str | None:
    """Content of a text file, local or remote; None if it does not exist. A failing server is asked again.

    Raises:
        InputError: the file is not UTF-8 or larger than MAX_TEXT, or the server does not answer.
    """
    if _remembered is None or not is_url(path):
        return _read_text(path)
    if path not in _remembered:
        _remembered[path] = _read_text(path)
    return _remembered[path]


def _read_text(path: str) -> str | None:
    def read() -> bytes:
        with open_source(path) as stream:
            raw = stream.read(MAX_TEXT + 1)
            unsent = getattr(stream, "length", None)  # what a server has announced but not sent
            if unsent and len(raw) <= MAX_TEXT:
                raise IncompleteRead(raw, unsent)
            return raw

    try:
        raw = _ask(path, read)
    except (FileNotFoundError, NotADirectoryError):
        return None
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


def _ask(path: str, request: Callable[[], Answer]) -> Answer:
    for delay in backoff_delays(TEXT_RETRIES if is_url(path) else 0):
        try:
            return request()
        except (FileNotFoundError, NotADirectoryError, InputError, MemoryError):
            raise
        except Exception as error:  # noqa: BLE001 - botocore, aiohttp and httpx have errors of their own
            if isinstance(error, HTTPError) and error.code in (403, 404, 410):
                raise FileNotFoundError(path) from None
            reason = f"{path} could not be read ({squeeze(error)})"
            if is_url(path) and _is_denied(error):
                needed = "which must allow reading and listing"
                raise InputError(f"{reason}; check your credentials for it, {needed}.") from None
            if delay is None or not is_transient(error):
                raise InputError(f"{reason}; check the address.") from None
            _log.warning(f"{reason}; retrying.")
            time.sleep(delay)
    raise AssertionError  # the last delay is None


def squeeze(error: BaseException) -> str:
    """An error's text in one line."""
    return " ".join(str(error).split()) or type(error).__name__


def backoff_delays(retries: int) -> Iterator[float | None]:
    """Seconds to wait after each failed attempt (exponential backoff with jitter); None after the last."""
    for attempt in range(retries):
        yield BACKOFF * 2**attempt * random.SystemRandom().uniform(0.5, 1)
    yield None


def is_transient(error: BaseException) -> bool:
    """Whether a failed read may succeed later: not a malformed address, a 404 or a member that occurs twice."""
    if (status := _status_of(error)) is not None:
        return status in TRANSIENT_STATUS
    if isinstance(error, (ValueError, ImportError, FileNotFoundError)) or _is_denied(error):
        return False
    if getattr(error, "errno", None) == errno.EINVAL:  # s3fs, of a request that makes no sense to the server
        return False
    return not isinstance(getattr(error, "reason", None), str)


def _is_denied(error: BaseException) -> bool:
    missing = "Credential" in type(error).__name__  # botocore.exceptions.NoCredentialsError and its like
    return missing or isinstance(error, PermissionError) or _status_of(error) in (401, 403)


def _status_of(error: BaseException) -> int | None:
    """The HTTP status in an error of urllib, gcsfs (code), azure (status_code) or huggingface_hub (in its response)."""
    places = [error, getattr(error, "response", None)]
    found = (getattr(place, name, None) for place in places for name in ("code", "status_code"))
    return next((status for status in found if isinstance(status, int)), None)
