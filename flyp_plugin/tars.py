"""Headers of local tars: which samples they hold, without reading the images.

Files are grouped as webdataset groups them: a sample's members stand next to each other and share the name up to its
first dot. Header is also what samples.py reads tars with, so that a damaged one is an error and not a shorter tar.
"""

import os
import re
import tarfile
import zlib
from collections.abc import Iterator
from functools import lru_cache
from itertools import groupby

TAR_ERRORS = (tarfile.TarError, OSError, EOFError, zlib.error)  # what reading a broken tar raises
MAX_MEMBER = 1 << 30  # bytes
_MEMBER = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)")  # key and ending, split at the first dot as in webdataset


class Header(tarfile.TarInfo):
    """A member's header that raises when it is damaged: tarfile would take it for the end of the tar."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> "Header":
        try:
            return super().fromtarfile(tar)
        except tarfile.HeaderError as error:
            kind = type(error).__name__
            if kind == "EOFHeaderError":  # the end mark
                raise
            cut = kind == "EmptyHeaderError"
            raise tarfile.ReadError("no end mark, the file is cut short" if cut else str(error)) from None

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "Header":
        header = super().frombuf(buf, encoding, errors)
        if header.size > MAX_MEMBER:
            raise tarfile.ReadError(f"member {header.name[:80]} claims to have {header.size} bytes")
        return header


def is_member(name: str) -> bool:
    """Whether a file in a tar belongs to a sample: not a hidden one, such as macOS' ._ files, or webdataset's __NAME__."""
    return not re.match(r"__[^/]*__($|/)", name) and not name.rpartition("/")[2].startswith(".")


def split_name(member: str) -> tuple[str, str]:
    """(key of its sample, ending in lower case) of a member; both are empty if webdataset would leave it out."""
    found = _MEMBER.fullmatch(member)
    return (found[1], found[2].lower()) if found else ("", "")


def _group_members(path: str) -> Iterator[tuple[str, Iterator[str]]]:
    """(key, endings of the members) of each sample in a local tar, grouped as by samples.read_samples."""
    with tarfile.open(path, tarinfo=Header) as tar:
        files = (member.name for member in tar if member.isreg() and is_member(member.name))
        parts = (parts for parts in map(split_name, files) if parts[0])
        for key, members in groupby(parts, lambda part: part[0]):
            yield key, (ending for _, ending in members)


def keys_with_image(path: str, image_key: str) -> Iterator[str]:
    """Keys of the samples in a local tar that have one of the members in `image_key`, as they are found."""
    images = set(image_key.split(";"))
    return (key for key, endings in _group_members(path) if any(ending in images for ending in endings))


def first_endings(path: str) -> list[str]:
    """Endings of the members of the first sample in a local tar."""
    return next((sorted(endings) for _, endings in _group_members(path)), [])


def find_scattered_sample(path: str) -> str | None:
    """A message if some sample's members are not next to each other in a local tar; None if all are, or for remote tars.

    Two samples with the same key and the same members are another matter.
    """
    known = os.path.isfile(path)
    return _find_scattered_sample(path, os.stat(path).st_mtime_ns) if known else None


@lru_cache(64)  # asked again for each sample that lacks something
def _find_scattered_sample(path: str, modified: int) -> str | None:
    first: dict[str, set[str]] = {}
    try:
        for key, members in _group_members(path):
            endings = set(members)
            if first.setdefault(key, endings) is not endings and first[key].isdisjoint(endings):
                return (
                    f"the members of sample {key} ({', '.join(sorted(first[key] | endings)[:5])}) are not next to each "
                    f"other in {path}; make the tar again, sorted by name: tar --sort=name -cf {path} FOLDER"
                )
    except TAR_ERRORS:
        pass  # everything before the damage is in order
    return None
