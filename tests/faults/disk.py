"""What becomes of each thing that is written when the disk is full: one sentence, nothing lost, and on when there is room.

    sudo python -m tests.faults.disk

Each case has a tmpfs of its own (hence sudo), filled but for so many bytes; the command is run, then run again with room.
It has survived if the first ends with status 1 and a last line "Error: ...", no traceback, leaves every file that was
there before as it was and no part of a new one, and the second gives what it gives on a disk with room.
"""

import hashlib
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import open_clip
import torch

from tests import digits
from tests.faults.kills import EPOCHS, PYTHON, Row, difference, flags, table

FLYP = [*PYTHON, "flyp_plugin.cli"]
KIB, MIB = 1 << 10, 1 << 20


def run(command: Sequence[str], limit: int | None = None) -> tuple[int, str]:
    """Its exit status, and what it says on stderr.

    Args:
        limit: no file grows beyond so many bytes: without a full disk at hand, the next best.
    """

    def limited() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

    done = subprocess.run(command, capture_output=True, text=True, check=False, preexec_fn=limited)
    return done.returncode, done.stderr


def refused(status: int, said: str, reason: str) -> str:
    """What is wrong with how a command ends that cannot write; '' for nothing."""
    last = said.splitlines()[-1] if said else ""
    if status != 1 or not last.startswith("Error: ") or reason not in last or "Traceback" in said:
        return f"status {status}: {said[-2000:]!r}"
    return ""


def train_command(data: Path, folder: Path) -> list[str]:
    return [*FLYP, "train", *flags(data, folder), "--resume", "latest"]


def files(root: Path) -> dict[str, str]:
    """The SHA-256 of each file, but for what has times in it."""
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
        and path.name not in ("out.log", "params.txt", "filler", "console.log", "finished.json")
    }


class Disk:
    """A small disk that is full but for some bytes, until `free`."""

    def __init__(self, path: Path):
        self.path, self.filler = path, path / "filler"

    def fill(self, but: int) -> None:
        # bytes are given out in pages, and the new file is one of them
        have = os.statvfs(self.path)
        with self.filler.open("wb") as stream:
            stream.truncate(0)
            os.posix_fallocate(stream.fileno(), 0, have.f_bavail * have.f_frsize - but)

    def free(self) -> None:
        self.filler.unlink()


@contextmanager
def disk(size: int) -> Iterator[Disk]:
    with tempfile.TemporaryDirectory(prefix="flyp-disk-") as folder:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], check=True)
        try:
            yield Disk(Path(folder))
        finally:
            subprocess.run(["umount", folder], check=True)


def case(size: int, but: int, command: Callable[[Path], list[str]], good: Callable[[Path], str]) -> str:
    """Run a command on a disk with `but` bytes left, and again with room; what is wrong, or ''.

    Args:
        command: of the disk's folder.
        good: what is wrong with the outcome there.
    """
    with disk(size) as small:
        subprocess.run(command(small.path / "old"), check=True, stderr=subprocess.DEVNULL)
        before = files(small.path)
        small.fill(but)
        words = command(small.path / "new")
        status, said = run(words)
        if what := refused(status, said, "No space left on device"):
            return what
        after = files(small.path)
        if any(after.get(name) != digest for name, digest in before.items()):
            return "another file has changed"
        if parts := [name for name in after if ".part" in name]:
            return f"left: {parts}"
        small.free()
        status, said = run(words)
        return good(small.path) if status == 0 else f"status {status} with room: {said[-2000:]!r}"


def rows(root: Path, jobs: int) -> Iterator[Row]:
    data, logs, photos = (
        digits.write(root / "digits"),
        root / "logs",
        digits.photos(root / "photos") / "train",
    )
    whole = logs / "whole"
    assert run(train_command(data, whole))[0] == 0
    start = root / "start.pt"
    model = ["--model", "digits-vit", "--model-config", str(data / "digits-vit.json"), "--device", "cpu"]
    open_clip.add_model_config(data / "digits-vit.json")
    torch.save(open_clip.create_model("digits-vit").state_dict(), start)
    finetuned = whole / f"checkpoints/epoch_{EPOCHS}.pt"
    weights, checkpoint = start.stat().st_size, finetuned.stat().st_size

    def same_run(path: Path) -> str:
        return difference(path / "new", whole)

    def same_files(path: Path) -> str:
        ours, theirs = files(path / "new"), files(path / "old")
        return "" if ours == theirs else f"{sorted(ours)} differ from {sorted(theirs)}"

    def training(folder: Path) -> list[str]:
        if folder.name == "old":
            return [*PYTHON, "json.tool", str(data / "digits-vit.json"), str(folder)]
        return train_command(data, folder)

    def wiseft(folder: Path) -> list[str]:
        words = [
            "wiseft",
            *model,
            "--pretrained",
            str(start),
            "--finetuned",
            str(finetuned),
            "--out",
            str(folder),
        ]
        return [
            *FLYP,
            *words,
            "--eval-data",
            f"test={data}/test/0.tar",
            "--alphas",
            "0,1",
            "--workers",
            "0",
            "--force",
        ]

    def export(form: str) -> Callable[[Path], list[str]]:
        words = [*FLYP, "export", str(finetuned), *model, "--format", form, "--data", str(data), "--out"]
        return lambda folder: [*words, str(folder)]

    def write(folder: Path) -> list[str]:
        return [*FLYP, "shards", "write", str(photos), str(folder / "train"), "--workers", "2"]

    def subset(folder: Path) -> list[str]:
        return [*FLYP, "shards", "subset", str(data), str(folder / "train"), "--shots", "20"]

    def compare(folder: Path) -> list[str]:
        words = [
            "compare",
            "--pretrained",
            str(start),
            "--train-data",
            str(data),
            *model,
            "--out",
            str(folder),
        ]
        words += ["--eval-data", f"test={data}/test/{{0..1}}.tar", "--methods", "flyp", "--lr", "1e-3"]
        return [
            *FLYP,
            *words,
            "--seeds",
            "0",
            "--epochs",
            "1",
            "--train-num-samples",
            "100",
            "--workers",
            "0",
        ]

    def compared(path: Path) -> str:
        ours, theirs = ({Path(name).name for name in files(path / of)} for of in ("new", "old"))
        return "" if ours == theirs else f"{ours} differ from {theirs}"

    few = 4 * KIB
    cases = {
        "shards write": [(8 * MIB, but, write, same_files) for but in (0, few, 60 * KIB, 300 * KIB)],
        "shards subset": [(8 * MIB, but, subset, same_files) for but in (0, few, 60 * KIB, 200 * KIB)],
        "training: its folder, out.log, params.txt, results.jsonl": [
            (4 * checkpoint, but * few, training, same_run) for but in range(6)
        ],
        "training: the first, second, third checkpoint": [
            (4 * checkpoint, int((number + 0.5) * checkpoint), training, same_run) for number in range(3)
        ],
        "wiseft --out: weights, wiseft.json, frontier.png": [
            (3 * weights, but, wiseft, same_files)
            for but in (0, weights // 2, weights + few, weights + 3 * few)
        ],
        "export: open_clip, timm": [
            (3 * weights, but, export(form), same_files)
            for form, but in (("open_clip", 0), ("open_clip", weights // 2), ("timm", 0), ("timm", 3 * few))
        ],
        "compare --out: records, a training, a sweep": [
            (3 * checkpoint, but, compare, compared)
            for but in (0, few, 5 * few, checkpoint // 2, checkpoint + 20 * few)
        ],
    }
    seen = (
        "one sentence with the place and the reason, all other files untouched; with room, the same outcome"
    )
    with ThreadPoolExecutor(jobs) as pool:
        for fault, tried in cases.items():
            wrong = list(pool.map(lambda one: case(*one), tried))
            for (_, but, *_), what in zip(tried, wrong):
                if what:
                    print(f"{fault}, {but} bytes: {what}", file=sys.stderr, flush=True)
            yield f"disk full: {fault}", len(wrong), wrong.count(""), seen


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="flyp-disk-") as folder:
        sys.exit(not table(rows(Path(folder), 2)))
