"""Single samples, as generators over dicts: read from shards, labelled, given a prompt, decoded, transformed.

Nothing here knows of batches, epochs or workers: those are data.py's.
"""

import io
import json
import logging
import random
import re
import tarfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b
from itertools import islice
from typing import Any

import numpy as np
import torch
import webdataset as wds
from PIL import Image
from webdataset.tariterators import group_by_keys

from flyp_plugin.errors import InputError, escape_control_chars
from flyp_plugin.sources import (
    IMAGE_KEY,
    RETRIES,
    Header,
    backoff_delays,
    is_member,
    is_remote,
    is_transient,
    opened,
    why_apart,
)

Sample = dict[str, Any]
# What an image may be, whatever its ending. Not PostScript: Pillow has another program run it
FORMATS = ("JPEG", "PNG", "WEBP", "MPO", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
# What image files of these formats are called
ENDINGS = {"jpg", "jpeg", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "pgm", "jp2", "avif"}
_log = logging.getLogger(__name__)


@dataclass
class Skipped:
    """What could not be read: how many images and tars, about how many samples with them, what was wrong with the first."""

    number: int = 0
    lost: int = 0
    first: str = ""

    def __call__(self, what: str, lost: int = 1) -> None:
        self.add(Skipped(1, lost, what))

    def add(self, other: "Skipped") -> None:
        self.first = self.first or other.first
        self.number += other.number
        self.lost += other.lost

    def taken(self) -> "Skipped":
        """What has come together so far, handed on: this one starts again from nothing."""
        taken = Skipped(self.number, self.lost, self.first)
        self.number, self.lost, self.first = 0, 0, ""
        return taken

    def report(self, where: str) -> None:
        """Say in the log what was skipped, if anything was."""
        if self.number:
            things = "image or tar" if self.number == 1 else "images or tars"
            _log.warning(f"{where}: skipped {self.number} unreadable {things}, the first: {self.first}")


def sample_seed(*what: object) -> int:
    """64 bits that are a pure function of `what`, the same on every machine: (seed, epoch, repeat, key)."""
    return int.from_bytes(blake2b(repr(what).encode(), digest_size=8).digest(), "little")


def read_samples(
    shards: Iterable[str],
    skip: Callable[[str, int], None],
    retries: int = RETRIES,
    samples_in: Callable[[str], int] = lambda shard: 1,
) -> Iterator[Sample]:
    """The samples of `shards`, grouped as webdataset does it, with the bytes of their members.

    A tar that is not local is read again where it breaks, `retries` times, each later than the one before. One that
    stays broken is skipped from there on: `skip` gets what is wrong and how many of its `samples_in(shard)` samples
    were not read, and the last one that was has `__broken__` set, for it may lack a member.
    """
    for shard in shards:
        given = 0
        for wait in [*backoff_delays(retries if is_remote(shard) else 0), None]:
            errors: list[Exception] = []
            held: Sample | None = None
            for sample in islice(_grouped(shard, errors), given, None):
                if held:
                    yield {**held, "__broken__": False}
                    given += 1
                held = sample
            if errors and wait is not None and is_transient(errors[0]):
                _log.warning(
                    f"{escape_control_chars(shard)}: {reason(errors[0])}; trying again in {wait:.0f} s."
                )
                time.sleep(wait)
                continue
            if held:
                yield {**held, "__broken__": bool(errors)}
            if errors:
                skip(f"{escape_control_chars(shard)}: {reason(errors[0])}", max(0, samples_in(shard) - given))
            break


def _grouped(shard: str, errors: list[Exception]) -> Iterator[Sample]:
    def go_on(error: Exception) -> bool:
        errors.append(error)
        return True

    return group_by_keys(_members(shard, errors), handler=go_on)


def _members(shard: str, errors: list[Exception]) -> Iterator[dict[str, Any]]:
    """The regular files in a tar as webdataset has them, up to the first error or else to the mark at the end."""
    whole = False
    try:
        by_command = is_remote(shard) and not shard.startswith(("http://", "https://"))
        with (
            wds.gopen(shard) if by_command else opened(shard) as stream,
            tarfile.open(fileobj=stream, mode="r|*", tarinfo=Header) as tar,
        ):
            for member in tar:
                if member.isreg() and is_member(member.name):
                    yield {"fname": member.name, "data": tar.extractfile(member).read(), "__url__": shard}  # type: ignore[union-attr]
                tar.members = []  # type: ignore[attr-defined]
            whole = True
    except Exception as error:  # noqa: BLE001 - tarfile and decompressors raise nearly anything on broken bytes
        if not whole:  # else a command that cannot write what is behind the mark
            errors.append(error)


def labelled(
    samples: Iterable[Sample],
    num_classes: int,
    skip: Callable[[str], None],
    image_key: str = IMAGE_KEY,
    label_key: str = "cls",
    group_key: str | None = None,
) -> Iterator[Sample]:
    """Samples as {"key", "shard", "image": bytes, "label": int, "group": str}; without an image they are skipped.

    Raises:
        InputError: a label that is missing, not an integer or not in 0..num_classes-1: the class list is wrong. Or a
            tar that is not sorted by name, where that is why a label is missing.
    """
    for sample in samples:
        key, shard = sample["__key__"], sample["__url__"]
        found = {"key": key, "shard": shard}
        image = next((sample[name] for name in image_key.split(";") if name in sample), None)
        text = _member(sample, label_key)
        if (image is None or text is None) and sample["__broken__"]:  # between the two, and is counted
            continue
        if image is None:
            skip(f"{place(found)}, has no {image_key.replace(';', '/')} member{_why_no_image(sample)}")
            continue
        if text is None:
            members = escape_control_chars(", ".join(_members_of(sample)))
            raise InputError(
                f"{place(found)}, has no label '{label_key}' (its members: {members[:200]}); "
                f"{escape_control_chars(why_apart(shard) or _label_elsewhere(sample))}."
            )
        if not re.fullmatch(r"\s*-?[0-9]{1,18}\s*", text):
            raise InputError(
                f"{place(found)}: the label {text[:40]!r} is not an integer; --label-key names the member with "
                "the class index, which is the line number, from 0, of a name in classnames.txt, not the name."
            )
        label = int(text)
        if not 0 <= label < num_classes:
            raise InputError(
                f"{place(found)}: label {label} is outside 0..{num_classes - 1}, for there are {num_classes} "
                "class names; give the list that belongs to these shards with --classnames."
            )
        group = {} if group_key is None else {"group": (_member(sample, group_key) or "").strip()}
        yield {**found, "image": image, "label": label, **group}


def _members_of(sample: Sample) -> list[str]:
    return [name for name in sample if not name.startswith("__")]


def _why_no_image(sample: Sample) -> str:
    """What to do about a sample without an image where its members, or its tar, tell; else nothing."""
    apart = why_apart(sample["__url__"])
    if apart is not None:
        return escape_control_chars(f": {apart}")
    for name in _members_of(sample):
        ending = name.rpartition(".")[2]
        if ending == name and ending in ENDINGS:
            return f", but '{ending}': give --image-key {ending}"
        if ending in ENDINGS:
            return escape_control_chars(
                f", but '{name[:80]}': a sample's key ends at the first dot of its file name, so write the rest without "
                "dots (img_v2_1.png, not img.v2.1.png)"
            )
    return ""


def _label_elsewhere(sample: Sample) -> str:
    """Which member may hold the label: the one integer among them, if there is one."""
    integers = [name for name in _members_of(sample) if re.fullmatch(rb"\s*[0-9]{1,9}\s*", sample[name])]
    if len(integers) == 1:
        return f"'{integers[0]}' holds an integer: if that is the class index, give --label-key {integers[0]}"
    if len(_members_of(sample)) == 1 and is_remote(sample["__url__"]):
        return (
            "if its label comes later in the tar, make the tar again, sorted by name (tar --sort=name), or else name the "
            "member that holds the class index with --label-key"
        )
    return "name the member that holds the class index with --label-key"


def prompted(samples: Iterable[Sample], num_templates: int, *seed: object) -> Iterator[Sample]:
    """Give each sample a template number and the seed of its augmentation, both pure functions of (*seed, key)."""
    for sample in samples:
        drawn = sample_seed(*seed, sample["key"])
        yield {**sample, "template": drawn % num_templates, "seed": drawn >> 1}


def _member(sample: Sample, key: str) -> str | None:
    """A member's text; `json:FIELD` is a field of the .json member. None where it is not there."""
    name, _, name_in_json = key.partition(":")
    if name not in sample:
        return None
    text = sample[name].decode("utf-8", "replace")
    if not name_in_json:
        return text
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return str(content[name_in_json]) if isinstance(content, dict) and name_in_json in content else None


def place(sample: Sample) -> str:
    """Where a sample is, for a message."""
    return escape_control_chars(f"{sample['shard']}, sample {sample['key']}")


def reason(error: BaseException) -> str:
    """What is wrong, for a message: short, and in one line whatever a broken file made of it."""
    known = getattr(error, "strerror", None)  # an OSError's first argument is a number
    if found := re.search(r"exit (-?\d+) \(read\)", str(error)):  # webdataset's, of a `pipe:`
        return f"the command ended with status {found[1]}"
    text = re.sub(r" <_io\.\w+ object at \w+>", "", str(known or (error.args[0] if error.args else error)))
    return escape_control_chars(
        f"{type(error).__name__}: {text.splitlines()[0][:160]}" if text else type(error).__name__
    )


def open_image(raw: bytes) -> Image.Image:
    """The image in a file's bytes, not yet decoded. Formats that other programs would be started for are none."""
    return Image.open(io.BytesIO(raw), formats=_formats())


def to_rgb(image: Image.Image) -> Image.Image:
    """The one way from a PIL image of any mode to the RGB image that a transform gets, in training and evaluation.

    Of 16 bits of grey the upper 8 are taken, where `image.convert("RGB")` makes nearly all white; else it is that.

    Raises:
        Nearly anything, where the image's file is broken: it is decoded here.
    """
    if is_deep(image):
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 256).astype(np.uint8))
    return image.convert("RGB")


def is_deep(image: Image.Image) -> bool:
    """Whether an image's grey values have 16 bits (which Pillow may hold in 32)."""
    return image.mode.startswith("I")


@cache
def _formats() -> list[str]:
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]  # Pillow may be without AVIF


def decoded(
    samples: Iterable[Sample], preprocess: Callable, skip: Callable[[str], None], jpeg_draft: int = 0
) -> Iterator[Sample]:
    """Replace the image's bytes by the transformed image, float (3, H, W).

    With `jpeg_draft`, a target size in pixels, the decoder makes a JPEG of at least twice that size smaller by 2, 4 or
    8, never below the target: faster, with slightly other pixels.
    """
    for sample in samples:
        try:
            image = open_image(sample["image"])
            if jpeg_draft and image.format == "JPEG":
                image.draft("RGB", (jpeg_draft, jpeg_draft))
            image = to_rgb(image)
        except Exception as error:  # noqa: BLE001 (PIL raises nearly anything on a broken file)
            skip(f"{place(sample)}: {reason(error)}")
            continue
        yield {**sample, "image": _transformed(preprocess, image, sample.get("seed"))}


def _transformed(preprocess: Callable, image: Image.Image, seed: int | None) -> torch.Tensor:
    """`preprocess(image)` with every generator that a transform may use seeded; `random_states_kept` undoes it."""
    if seed is not None:
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reset the GPU's generators too
        random.seed(seed)
        np.random.seed(seed % 2**32)
    return preprocess(image)


@contextmanager
def random_states_kept() -> Iterator[None]:
    """Leave the CPU's random states as they were, for transforms that run in the training process itself."""
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])
