"""The steps from a tar to tensors, one sample at a time: generators over dicts, in the order in which they run.

    read_samples -> label_samples -> balance_classes -> shuffle -> draw_prompts -> decode_images

Anything unreadable is left out and reported to `skip`, because one bad image in a million must not end a run. A wrong
label raises InputError, because then the class list is wrong for all samples. Batches, epochs and workers are data.py's.
"""

import json
import logging
import random
import re
import tarfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from hashlib import blake2b
from itertools import islice
from typing import Any

import numpy as np
import torch
from PIL import Image
from webdataset.tariterators import group_by_keys

from flyp_plugin.errors import InputError, escape_control_chars
from flyp_plugin.images import FORMATS, open_image, to_rgb
from flyp_plugin.names import normalize_name
from flyp_plugin.remote import backoff_delays, is_remote, is_transient, open_source
from flyp_plugin.sources import IMAGE_KEY, RETRIES
from flyp_plugin.tars import Header, find_scattered_sample, is_member

SHUFFLE, SHUFFLE_INITIAL = 5000, 1000  # samples in the buffer, and before the first leaves; as in open_clip
SHUFFLE_BYTES = 512 << 20  # about ImageNet's 5,000 images, of 110 KB
Sample = dict[str, Any]
_log = logging.getLogger(__name__)


def sample_seed(*values: object) -> int:
    """64 bits that are a pure function of `values`, the same on every machine: (seed, epoch, repeat, key)."""
    return int.from_bytes(blake2b(repr(values).encode(), digest_size=8).digest(), "little")


def read_samples(
    shards: Iterable[str],
    skip: Callable[[str, int], None],
    retries: int = RETRIES,
    sizes: Mapping[str, int] = {},
    wanted: Callable[[str, str], bool] | None = None,
) -> Iterator[Sample]:
    """The samples of `shards` as webdataset groups them: dicts from ending to bytes, with __key__ and __url__.

    A remote tar that breaks off is read again from there, up to `retries` times. What stays unreadable is skipped:
    `skip` gets the reason and the samples lost, by the `sizes` of the shards. The last sample before the break is marked
    `__broken__`, because it may lack a member.

    With `wanted`, the members of local tars for which wanted(shard, name) is false are not read but empty.
    """
    errors: list[Exception] = []

    def note(error: Exception) -> bool:
        errors.append(error)
        return True  # go on

    for shard in shards:
        num_read = 0
        for delay in backoff_delays(retries if is_remote(shard) else 0):
            errors.clear()
            held: Sample | None = None  # yielded once it is known whether the tar breaks off behind it
            grouped = group_by_keys(_read_members(shard, note, wanted), handler=note)
            for sample in islice(grouped, num_read, None):
                if held:
                    yield {**held, "__broken__": False}
                    num_read += 1
                held = sample
            reason = f"{escape_control_chars(shard)}: {describe_error(errors[0])}" if errors else ""
            if errors and delay is not None and is_transient(errors[0]):
                _log.warning(f"{reason}; trying again in {delay:.0f} s.")
                time.sleep(delay)
                continue
            if held:
                yield {**held, "__broken__": bool(errors)}
            if errors:
                skip(reason, max(0, sizes.get(shard, 1) - num_read))
            break


def _read_members(
    shard: str, note: Callable[[Exception], object], wanted: Callable[[str, str], bool] | None
) -> Iterator[Sample]:
    """The regular files of a tar, in webdataset's form, up to its end mark or the first error, which `note` gets."""
    complete = False
    try:
        with (
            open_source(shard) as stream,
            tarfile.open(fileobj=stream, mode="r:*" if wanted else "r|*", tarinfo=Header) as tar,
        ):
            for member in tar:
                if member.isreg() and is_member(member.name):
                    data: Any = tar.extractfile(member)
                    if wanted is None or wanted(shard, member.name):
                        content = data.read()
                    else:
                        content = b""
                        data.seek(max(0, member.size - 1))
                        data.read(1)  # raises if the tar is cut short there
                    yield {"fname": member.name, "data": content, "__url__": shard}
                tar.members = []  # type: ignore[attr-defined]  # tarfile would keep them all
            complete = True
    except Exception as error:  # noqa: BLE001 - tarfile and decompressors raise nearly anything on broken bytes
        if not complete:  # else a command failed because nobody reads what it writes after the end mark
            note(error)


def label_samples(
    samples: Iterable[Sample],
    num_classes: int,
    skip: Callable[[str], None],
    image_key: str = IMAGE_KEY,
    label_key: str = "cls",
    group_key: str | None = None,
    indices: Mapping[str, int] = {},
) -> Iterator[Sample]:
    """Samples as {"key", "shard", "image": bytes, "label": int}; those without an image are skipped.

    Also "path", the user's own file, where a .path member holds it (`flyp shards write` writes one), and "group" with a
    `group_key`. A label is a class index or, with the `indices` of names.index_names, a class name; an integer is always
    an index.

    Raises:
        InputError: a label that is missing, neither an integer nor a class name, or not in 0..num_classes-1.
    """
    for sample in samples:
        labelled = {"key": sample["__key__"], "shard": sample["__url__"]}
        if path := _read_field(sample, "path"):
            labelled["path"] = path
        image = next((sample[name] for name in image_key.split(";") if name in sample), None)
        text = _read_field(sample, label_key)
        if (image is None or text is None) and sample["__broken__"]:
            continue  # cut off between the two, and counted with its tar
        if image is None:
            skip(f"{locate(labelled)}, has no {image_key.replace(';', '/')} member{_hint_at_image(sample)}")
            continue
        if text is None:
            members = escape_control_chars(", ".join(_member_names(sample)))
            hint = escape_control_chars(find_scattered_sample(sample["__url__"]) or _hint_at_label(sample))
            raise InputError(
                f"{locate(labelled)}, has no label '{label_key}' (its members: {members[:200]}); {hint}."
            )
        integer = re.fullmatch(r"\s*-?[0-9]{1,18}\s*", text)
        label = int(text) if integer else indices.get(normalize_name(text))
        if label is None:
            names = (
                f" or one of the {num_classes} class names"
                if indices
                else ", and there is no classnames.txt to find it in"
            )
            raise InputError(
                f"{locate(labelled)}: the label {text[:40]!r} is not an integer{names}; --label-key names the member that "
                "holds the class, as its name or its line number (from 0) in classnames.txt."
            )
        if label < 0 and not integer:
            raise InputError(
                f"{locate(labelled)}: the label {text[:40]!r} is the name of several classes; write the class index."
            )
        if not 0 <= label < num_classes:
            raise InputError(
                f"{locate(labelled)}: label {label} is outside 0..{num_classes - 1} ({num_classes} class names); "
                "give the list of names that belongs to these shards with --classnames."
            )
        group = {} if group_key is None else {"group": (_read_field(sample, group_key) or "").strip()}
        yield {**labelled, "image": image, "label": label, **group}


def _member_names(sample: Sample) -> list[str]:
    return [name for name in sample if not name.startswith("__")]


def _hint_at_image(sample: Sample) -> str:
    if (scattered := find_scattered_sample(sample["__url__"])) is not None:
        return escape_control_chars(f": {scattered}")
    for name in _member_names(sample):
        ending = name.rpartition(".")[2]
        if Image.registered_extensions().get(f".{ending}") not in FORMATS:
            continue
        if ending == name:
            return f", but '{ending}': give --image-key {ending}"
        return escape_control_chars(
            f", but '{name[:80]}': a sample's key ends at the first dot of its file name, so write the rest without dots "
            "(img_v2_1.png, not img.v2.1.png)"
        )
    return ""


def _hint_at_label(sample: Sample) -> str:
    names = _member_names(sample)
    integers = [name for name in names if re.fullmatch(rb"\s*[0-9]{1,9}\s*", sample[name])]
    if len(integers) == 1:
        return f"'{integers[0]}' holds an integer: if that is the class index, give --label-key {integers[0]}"
    hint = "name the member that holds the class index with --label-key"
    if len(names) == 1 and is_remote(sample["__url__"]):
        return f"if its label comes later in the tar, sort the tar by name (tar --sort=name), or else {hint}"
    return hint


def _read_field(sample: Sample, key: str) -> str | None:
    """A member's text, or for `json:FIELD` that field of its .json; None if there is none."""
    name, _, field = key.partition(":")
    if name not in sample:
        return None
    text = sample[name].decode("utf-8", "replace")
    if not field:
        return text
    try:
        return str(json.loads(text)[field])
    except (ValueError, RecursionError, LookupError, TypeError):  # not JSON, or not an object with that field
        return None


def locate(sample: Sample) -> str:
    """Where a sample is and which file it was, for a message."""
    path = f" ({sample['path']})" if sample.get("path") else ""
    return escape_control_chars(f"{sample['shard']}, sample {sample['key']}{path}")


def describe_error(error: BaseException) -> str:
    """A short message of one line, whatever a broken file put into the error."""
    if status := re.search(r"exit (-?\d+) \(read\)", str(error)):  # webdataset, of a `pipe:`
        return f"the command ended with status {status[1]}"
    text = getattr(error, "strerror", None) or str(error.args[0] if error.args else error)
    text = re.sub(r" <_io\.\w+ object at \w+>", "", text)[:160]
    return escape_control_chars(": ".join([type(error).__name__, *text.splitlines()[:1]]))


def balance_weights(counts: Sequence[int], power: float) -> list[float]:
    """How often an image of each class is drawn in an epoch, for a share of n^(1 - power) of a class of n images.

    w_c = n_c^-power * N / sum_k n_k^(1 - power), with N = sum_k n_k, which is also sum_c n_c w_c.
    """
    shares = sum(n ** (1 - power) for n in counts if n)
    return [n**-power * sum(counts) / shares if n else 0.0 for n in counts]


def balance_classes(samples: Iterable[Sample], weights: Sequence[float], *seed: object) -> Iterator[Sample]:
    """Each sample as often as its class's weight says: 2.3 is twice and, by chance, a third time; 0.3 is rarely at all.

    The number is a pure function of (*seed, key). Each of the copies, numbered by "copy", is prompted and cropped anew.
    """
    for sample in samples:
        whole, part = divmod(weights[sample["label"]], 1)
        chance = sample_seed("balance", *seed, sample["key"]) / 2**64
        for copy in range(int(whole) + (chance < part)):
            yield {**sample, "copy": copy}


def shuffle(
    samples: Iterable[Sample], rng: random.Random, most_bytes: int = SHUFFLE_BYTES
) -> Iterator[Sample]:
    """Samples in random order, by a buffer of at most SHUFFLE of them and of about `most_bytes` of encoded images.

    The order is webdataset's, whose buffer counts samples only: 5,000 photos of 4 MB are 20 GB in each worker.
    """
    buffer: list[Sample] = []
    held, samples = 0, iter(samples)

    def take() -> Sample:
        nonlocal held
        number = rng.randint(0, len(buffer) - 1)
        buffer[number], buffer[-1] = buffer[-1], buffer[number]
        held -= len(buffer[-1]["image"])
        return buffer.pop()

    for sample in samples:
        more = next(samples, None) if len(buffer) + 1 < SHUFFLE and held < most_bytes else None
        new = [sample, more] if more else [sample]
        buffer += new
        held += sum(len(each["image"]) for each in new)
        if len(buffer) >= SHUFFLE_INITIAL:
            yield take()
        while held > most_bytes:
            yield take()
    while buffer:
        yield take()


def draw_prompts(
    samples: Iterable[Sample], counts: Sequence[int], seed: int, epoch: int, repeat: int, passes: int = 0
) -> Iterator[Sample]:
    """Add the number of a prompt and the augmentation's seed, both pure functions of (seed, epoch, repeat, key, copy).

    Args:
        counts: number of prompts of each class.
        repeat: which pass over the samples of the epoch this is.
        passes: 0 draws each time anew (--template-order random). Otherwise the number of passes in an epoch: each image
            goes through a permutation of its class's prompts, over the passes of all epochs, and then through another
            (--template-order table). So no (image, prompt) pair repeats before all have been seen.
    """
    for sample in samples:
        # the first copy is what it is without --balance
        later = [copy] if (copy := sample.get("copy")) else []
        drawn = sample_seed(seed, epoch, repeat, sample["key"], *later)
        count = counts[sample["label"]]
        number = drawn % count
        if passes:
            cycle, position = divmod(epoch * passes + repeat, count)
            order = list(range(count))
            random.Random(sample_seed(seed, "order", cycle, sample["key"])).shuffle(order)
            number = order[position]
        yield {**sample, "prompt": number, "seed": drawn >> 1}


def decode_images(
    samples: Iterable[Sample], preprocess: Callable, skip: Callable[[str], None], jpeg_draft: int = 0
) -> Iterator[Sample]:
    """Replace the image's bytes by `preprocess`'s tensor, float (3, H, W), with all its random numbers from "seed".

    With `jpeg_draft`, in pixels, a JPEG of at least twice that size is decoded at 1/2, 1/4 or 1/8 of its size, never
    below `jpeg_draft`: faster, with slightly different pixels.
    """
    for sample in samples:
        try:
            image = open_image(sample["image"])
            if jpeg_draft and image.format == "JPEG":
                image.draft("RGB", (jpeg_draft, jpeg_draft))
            image = to_rgb(image)
        except Exception as error:  # noqa: BLE001 - Pillow raises nearly anything on a broken file
            skip(f"{locate(sample)}: {describe_error(error)}")
            continue
        if "seed" in sample:
            # torch.manual_seed would seed the GPUs as well
            torch.default_generator.manual_seed(sample["seed"])
            random.seed(sample["seed"])
            np.random.seed(sample["seed"] % 2**32)
        yield {**sample, "image": preprocess(image)}
