"""Single samples, as generators over dicts: read from shards, labelled, given a prompt, decoded, transformed.

Nothing here knows of batches, epochs or workers: those are data.py's.
"""

import io
import json
import logging
import random
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
import webdataset as wds
from PIL import Image

from flyp_plugin.errors import InputError
from flyp_plugin.sources import IMAGE_KEY

Sample = dict[str, Any]
_log = logging.getLogger(__name__)


@dataclass
class Skipped:
    """What could not be read: how many samples or tars, and what was wrong with the first."""

    number: int = 0
    first: str = ""

    def __call__(self, what: str) -> None:
        self.add(Skipped(1, what))

    def add(self, other: "Skipped") -> None:
        self.first = self.first or other.first
        self.number += other.number

    def taken(self) -> "Skipped":
        """What has come together so far, handed on: this one starts again from nothing."""
        taken = Skipped(self.number, self.first)
        self.number, self.first = 0, ""
        return taken

    def report(self, where: str) -> None:
        """Say in the log what was skipped, if anything was."""
        if self.number:
            things = "image or tar" if self.number == 1 else "images or tars"
            _log.warning(f"{where}: skipped {self.number} unreadable {things}, the first: {self.first}")


def sample_seed(*what: object) -> int:
    """64 bits that are a pure function of `what`, the same on every machine: (seed, epoch, repeat, key)."""
    return int.from_bytes(blake2b(repr(what).encode(), digest_size=8).digest(), "little")


def read_samples(shards: Iterable[str], skip: Callable[[str], None]) -> Iterator[Sample]:
    """The samples of `shards`, as webdataset gives them. A tar that breaks is skipped from there on, and counted.

    Where it breaks, `__broken__` is set; `__short__` is in a tar's last sample with fewer members than the one before:
    a tar that ends too early between two members, or in a header, ends like a good one.
    """
    for shard in shards:
        errors: list[Exception] = []  # append returns None, which would stop webdataset: `or True` goes on
        read = wds.tarfile_to_samples(handler=lambda error, errors=errors: errors.append(error) or True)
        before, held = 0, None
        for sample in read(iter([{"url": shard}])):
            if held:
                before = len(held)
                yield held
            held = {**sample, "__url__": shard, "__broken__": bool(errors), "__short__": False}
        if held:
            yield {**held, "__short__": len(held) < before}
        if errors:
            skip(f"{shard}: {_reason(errors[0])}")


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
        InputError: a label that is missing, not an integer or not in 0..num_classes-1: the class list is wrong.
    """
    for sample in samples:
        key, shard = sample["__key__"], sample["__url__"]
        image = next((sample[name] for name in image_key.split(";") if name in sample), None)
        text = _member(sample, label_key)
        lacks_one = image is None or text is None
        if lacks_one and sample["__broken__"]:  # the tar broke between the two, and is counted
            continue
        if lacks_one and sample["__short__"]:
            skip(f"{shard} ends in the middle of sample {key}")
            continue
        if image is None:
            skip(f"{shard}, sample {key}, has no {image_key.replace(';', '/')} member")
            continue
        if text is None:
            members = ", ".join(name for name in sample if not name.startswith("__"))
            raise InputError(
                f"{shard}, sample {key}, has no label '{label_key}' (its members: {members}); name the member that "
                "holds the class index with --label-key."
            )
        if not re.fullmatch(r"\s*-?\d+\s*", text):
            raise InputError(
                f"{shard}, sample {key}: the label {text[:40]!r} is not an integer; --label-key names the member with "
                "the class index."
            )
        label = int(text)
        if not 0 <= label < num_classes:
            raise InputError(
                f"{shard}, sample {key}: label {label} is outside 0..{num_classes - 1}, for there are {num_classes} "
                "class names; give the list that belongs to these shards with --classnames."
            )
        group = {} if group_key is None else {"group": (_member(sample, group_key) or "").strip()}
        yield {"key": key, "shard": shard, "image": image, "label": label, **group}


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
    except ValueError:
        return None
    return str(content[name_in_json]) if isinstance(content, dict) and name_in_json in content else None


def _reason(error: BaseException) -> str:
    known = getattr(error, "strerror", None)  # an OSError's first argument is a number
    text = str(known or (error.args[0] if error.args else ""))
    return f"{type(error).__name__}: {text.splitlines()[0][:160]}" if text else type(error).__name__


def decoded(
    samples: Iterable[Sample], preprocess: Callable, skip: Callable[[str], None], jpeg_draft: int = 0
) -> Iterator[Sample]:
    """Replace the image's bytes by the transformed image, float (3, H, W).

    With `jpeg_draft`, a target size in pixels, the decoder makes a JPEG of at least twice that size smaller by 2, 4 or
    8, never below the target: faster, with slightly other pixels.
    """
    for sample in samples:
        try:
            image: Image.Image = Image.open(io.BytesIO(sample["image"]))
            if jpeg_draft and image.format == "JPEG":
                image.draft("RGB", (jpeg_draft, jpeg_draft))
            image = image.convert("RGB")
        except Exception as error:  # noqa: BLE001 (PIL raises nearly anything on a broken file)
            skip(f"{sample['shard']}, sample {sample['key']}: {_reason(error)}")
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
