"""What is wrong in shards, one thing at a time among 40 good samples, and what training, evaluation and check make of it.

    python -m tests.faults.data          # a minute; prints a table, and ends with status 1 where something differs

Training is one epoch of ClassPromptDataset with a worker and `max_lost` 1, evaluation one pass of LabelledDataset, check
what `flyp shards check` says. With the default, --max-lost 0.01, training stops at each of these that loses a sample.
"""

import gc
import gzip
import io
import logging
import re
import sys
import tarfile
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from flyp_plugin import ClassPromptDataset, ClassPrompts
from flyp_plugin.commands.check import check
from flyp_plugin.data import LabelledDataset
from flyp_plugin.errors import InputError
from tests import tars

BLOCK, GOOD = 512, 40
NAMES = [*tars.NAMES, "ten"]


@dataclass(frozen=True)
class Fault:
    """A tar beside four good ones of ten samples, and what should come of it."""

    name: str
    tar: bytes
    read: int  # samples of it that are read
    skipped: int = 0  # images and tars that are counted as unreadable
    stops: str = ""  # words of the sentence that training and evaluation stop with
    check: str = ""  # the kind of problem that check reports
    warns: str = ""  # words of a line in the log
    num_classes: int = 10
    times: int = 1  # that the tar is listed
    alone: bool = False  # there are no others


def image(mode: str = "RGB", size: tuple[int, int] = (8, 8), form: str = "PNG", **options) -> bytes:
    raw = io.BytesIO()
    Image.new(mode, size, **({"color": 7} if mode in "LP1" else {})).save(raw, form, **options)
    return raw.getvalue()


def many(number: int = 10, **changed: bytes) -> dict[str, bytes]:
    """Good samples that are not those of the good tars; `changed` members are of s0100."""
    return tars.samples(
        range(100, 100 + number), **{f"s0100_{ending}": raw for ending, raw in changed.items()}
    )


def named(names: Mapping[str, bytes]) -> bytes:
    return tars.tar({**names, **tars.samples(range(101, 110))})


def header_changed(tar: bytes, member: int) -> bytes:
    """The tar with a wrong checksum in the header of one of its members, each of which has one block of content."""
    at = 2 * BLOCK * member + 150
    return tar[:at] + b"9" + tar[at + 1 :]


def odd_tar(kind: bytes, name: str) -> bytes:
    """A good tar with a link in it."""
    raw = io.BytesIO(tars.tar(many()))
    with tarfile.open(fileobj=raw, mode="a") as file:
        link = tarfile.TarInfo(name)
        link.type, link.linkname = kind, "/etc/passwd"
        file.addfile(link)
    return raw.getvalue()


def animated(form: str) -> bytes:
    raw, frames = io.BytesIO(), [Image.new("RGB", (8, 8), (value, 0, 0)) for value in (200, 10)]
    frames[0].save(raw, form, save_all=True, append_images=frames[1:], duration=9)
    return raw.getvalue()


def rotated() -> bytes:
    picture, exif = Image.new("RGB", (8, 4)), Image.Exif()
    exif[0x0112] = 6
    raw = io.BytesIO()
    picture.save(raw, "JPEG", exif=exif)
    return raw.getvalue()


def deep() -> bytes:
    raw = io.BytesIO()
    Image.fromarray(np.full((8, 8), 0x8000, np.uint16)).save(raw, "PNG")
    return raw.getvalue()


def faults() -> list[Fault]:
    whole, label = tars.tar(many()), b"%d" % tars.label(100)
    broken, unread, wrong = "unreadable shards", "unreadable images", "labels that are missing or wrong"
    found = []
    for tenth in range(10):  # a sample is four blocks
        end = 4 * BLOCK * tenth + (0, 70, 512, 700, 1024, 1100, 1536, 1600, 1024, 512)[tenth]
        good = end // (4 * BLOCK) + (end % (4 * BLOCK) > 3 * BLOCK)  # the label is the block's first byte
        found.append(Fault(f"tar cut after {end} bytes", whole[:end], good, 1, check=broken))
    found += [
        Fault("tar cut exactly between two samples", whole[: 4 * BLOCK * 5], 5, 1, check=broken),
        Fault("tar without its end mark alone", whole[: 4 * BLOCK * 10], 10, 1, check=broken),
        Fault("wrong checksum in the first header", header_changed(whole, 0), 0, 1, check=broken),
        Fault("wrong checksum in a later header", header_changed(whole, 8), 4, 1, check=broken),
        Fault("a page of HTML in place of a tar", b"<html>moved</html>" * 99, 0, 1, check=broken),
        Fault("zeros in place of a tar", bytes(9999), 0),
        Fault("an empty tar", tars.tar({}), 0),
        Fault("gzip under .tar", gzip.compress(whole), 10),
        Fault("gzip under .tar, cut", gzip.compress(whole)[:-99], 9, 1, check=broken),
        Fault("a member that claims 2 TB", huge(), 0, 1, check=broken),
        Fault("image of zero bytes", tars.tar(many(png=b"")), 9, 1, check=unread),
        Fault("image that is text", tars.tar(many(png=b"<html>")), 9, 1, check=unread),
        Fault("image cut short", tars.tar(many(png=tars.png(100)[:-60])), 9, 1, check=unread),
        Fault("image of one pixel", tars.tar(many(png=image(size=(1, 1)))), 10),
        Fault("image of 16 bits", tars.tar(many(png=deep())), 10),
        Fault("image in CMYK", tars.tar(many(png=image("CMYK", form="JPEG"))), 10),
        Fault("image with a palette", tars.tar(many(png=image("P", transparency=7))), 10),
        Fault("image with alpha", tars.tar(many(png=image("RGBA"))), 10),
        Fault("image that moves (GIF)", tars.tar(many(png=animated("GIF"))), 10),
        Fault("image that moves (WebP)", tars.tar(many(png=animated("WEBP"))), 10),
        Fault("image that EXIF turns", tars.tar(many(png=rotated())), 10),
        Fault("decompression bomb", tars.tar(many(png=image("1", (30000, 30000)))), 9, 1, check=unread),
        Fault("PostScript as an image", tars.tar(many(png=image(form="EPS"))), 9, 1, check=unread),
        Fault("JPEG named .png", tars.tar(many(png=image(form="JPEG"))), 10),
        Fault(
            "no image", named({"s0100.txt": b"a", "s0100.cls": label}), 9, 1, check="samples without image"
        ),
        Fault("no label", named({"s0100.png": tars.png(100)}), 0, stops="'cls'", check=wrong),
        Fault(
            "members that nobody asked for", tars.tar(many() | {"s0109.pickle": b"no", "s0109.pyd": b"."}), 10
        ),
        Fault(
            "a sample of such members alone",
            tars.tar(many() | {"z.pickle": b"no"}),
            10,
            1,
            check="samples without image",
        ),
        Fault("a member twice", tars.tar_of([*many(1).items(), *many().items()]), 10, 1, check=broken),
        Fault(
            "a key twice, apart", tars.tar_of([*many().items(), *many(1).items()]), 11, check="repeated keys"
        ),
        Fault("keys with folders", named({"a/b/s.png": tars.png(100), "a/b/s.cls": label}), 10),
        Fault("keys that lead out", named({"../../s.png": tars.png(100), "../../s.cls": label}), 10),
        Fault("keys in Unicode", named({"füß/猫.png": tars.png(100), "füß/猫.cls": label}), 10),
        Fault(
            "keys with control characters",
            named({"\x1b[2Ja\nb.png": b"", "\x1b[2Ja\nb.cls": label}),
            9,
            1,
            check=unread,
        ),
        Fault("file names without an ending", tars.tar(many() | {"README": b"hello"}), 10),
        Fault("a symbolic link", odd_tar(tarfile.SYMTYPE, "s0999.png"), 10),
        Fault("a hard link", odd_tar(tarfile.LNKTYPE, "s0999.png"), 10),
        Fault("label with spaces and a newline", tars.tar(many(cls=b" " + label + b" \n")), 10),
        *(
            Fault(f"label {raw[:12]!r}", tars.tar(many(cls=raw)), 0, stops=words, check=wrong)
            for raw, words in (
                (b"", "integer"),
                (b"-1", "label -1"),
                (b"+1", "integer"),
                (b"3.0", "integer"),
                (b"cat", "integer"),
                (b"9" * 5000, "integer"),
                (b"99999999999", "99999999999"),
                ("٣".encode(), "integer"),
                (b"\x80\x04K\x03.", "integer"),
            )
        ),
        Fault("labels from 1 to 10 for 10 classes", shifted(), 0, stops="label 10", check=wrong),
        Fault("a tar that is listed twice", whole, 20, times=2, check="repeated keys"),
        Fault("one sample in all", tars.tar(many(1)), 1, alone=True, warns="9 of 10 classes"),
        Fault("one class in all", one_class(), 10, alone=True, warns="9 of 10 classes"),
        Fault(
            "a class that never occurs",
            whole,
            10,
            num_classes=11,
            warns="1 of 11 classes",
        ),
    ]
    return found


def huge() -> bytes:
    header = tarfile.TarInfo("s0100.png")
    header.size = 2 << 40
    return header.tobuf(tarfile.GNU_FORMAT) + bytes(10240)


def shifted() -> bytes:
    numbers = [number for number in range(100, 200) if tars.label(number) == 9]
    return tars.tar(tars.samples(numbers, **{f"s{number:04d}_cls": b"10" for number in numbers}))


def one_class() -> bytes:
    return tars.tar(tars.samples([number for number in range(100, 300) if tars.label(number) == 3][:10]))


def pixels(picture: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(picture.resize((8, 8)))).permute(2, 0, 1).float()


def tokens(texts: list[str], context_length: int = 8) -> torch.Tensor:
    return torch.tensor([[len(text), *[0] * (context_length - 1)] for text in texts])


class Log(logging.Handler):
    """The lines that the package logs."""

    def __init__(self):
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())

    def __enter__(self) -> list[str]:
        logging.getLogger("flyp_plugin").addHandler(self)
        return self.lines

    def __exit__(self, *error: object) -> None:
        logging.getLogger("flyp_plugin").removeHandler(self)


def attempt(run: Callable[[], int]) -> tuple[int, str]:
    """(samples that were read, the sentence that it stopped with)"""
    try:
        return run(), ""
    except InputError as error:
        return 0, str(error)
    finally:
        gc.collect()  # a loader that ended with an error, which later workers would inherit


def see(fault: Fault, folder: Path, workers: int = 1) -> tuple[list[str], list[str]]:
    """The cells of the table, and what is not as it should be."""
    folder.mkdir()
    good = 0 if fault.alone else GOOD
    shards = [tars.write(folder / "bad.tar", fault.tar)] * fault.times + tars.shards(folder, good, good // 10)
    prompts = ClassPrompts(NAMES[: fault.num_classes], ["a {c}"])
    settings = {"num_workers": workers, "max_lost": 1.0}

    def train() -> int:
        data = ClassPromptDataset(shards, pixels, tokens, 20, prompts=prompts, **settings)
        return sum(len(images) for images, _ in data)

    def evaluate() -> int:
        data = LabelledDataset(shards, pixels, 8, num_classes=fault.num_classes, **settings)
        return sum(len(batch["keys"]) for batch in data)

    wrong = []
    with Log() as lines:
        results = {"training": attempt(train)}
        told = "\n".join(lines)
        results["evaluation"] = attempt(evaluate)
    for what, (number, sentence) in results.items():
        if fault.stops not in sentence or bool(fault.stops) != bool(sentence):
            wrong.append(f"{what} says {sentence!r}")
        elif not fault.stops and number != good + fault.read:
            wrong.append(f"{what} reads {number}")
    counted = re.search(r"skipped (\d+)", told)
    if not fault.stops and int(counted[1] if counted else 0) != fault.skipped:
        wrong.append(f"the log says {told!r}")
    if fault.warns not in told or any("\x1b" in line or "\n" in line for line in lines):
        wrong.append(f"the log says {told!r}")
    kinds = list(check(shards, NAMES[: fault.num_classes]).problems)
    if kinds != ([fault.check] if fault.check else []):
        wrong.append(f"check says {kinds}")
    seen = f"stops: {fault.stops}" if fault.stops else f"reads {fault.read}"
    seen += f", counts {fault.skipped}" if fault.skipped else ""
    return [fault.name, seen + (f"; {fault.warns}" if fault.warns else ""), ", ".join(kinds)], wrong


def main() -> None:
    print(
        "| fault in one of five tars of ten | training and evaluation | `flyp shards check` |\n|---|---|---|"
    )
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        for number, fault in enumerate(faults()):
            cells, wrong = see(fault, Path(folder, str(number)))
            failed += bool(wrong)
            print(
                f"| {' | '.join(cells)} |" + (f"  <- WRONG: {'; '.join(wrong)}" if wrong else ""), flush=True
            )
    print(f"\n{number + 1 - failed} of {number + 1} as stated")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
