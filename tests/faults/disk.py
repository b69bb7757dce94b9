"""What becomes of each thing that is written when the disk is full: one sentence, nothing lost, and on when there is room.

    sudo python -m tests.faults.disk [FAULT]

Each case has a tmpfs of its own (hence sudo), filled but for so many bytes; the command is run, then run again with room.
It has survived if the first ends with status 1 and a last line "Error: ...", no traceback, leaves every file that was
there before as it was and no part of a new one, and the second gives what it gives on a disk with room.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from tests.faults.commands import Commands
from tests.faults.kills import counted, difference
from tests.faults.processes import Row, table

KIB, MIB = 1 << 10, 1 << 20


def run(command: Sequence[str]) -> tuple[int, str]:
    """Its exit status, and what it says on stderr."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, done.stderr


def refused(status: int, said: str, reason: str) -> str:
    """What is wrong with how a command ends that cannot write; '' for nothing. A comparison quotes its run's reason."""
    lines = said.splitlines() or [""]
    given = any(line.lstrip().startswith("Error: ") and reason in line for line in lines)
    if status != 1 or not lines[-1].startswith("Error: ") or not given or "Traceback" in said:
        return f"status {status}: {said[-2000:]!r}"
    return ""


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
        command: of the folder that it writes to: `old` for what is there before, `new` for what there is no room for.
        good: what is wrong with the outcome on that disk.
    """
    with disk(size) as small:
        subprocess.run(command(small.path / "old"), check=True, capture_output=True)
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


def same_files(path: Path) -> str:
    ours, theirs = files(path / "new"), files(path / "old")
    return "" if ours == theirs else f"{sorted(ours)} differ from {sorted(theirs)}"


def same_names(path: Path) -> str:
    """Of a comparison, whose tables say how long it took."""
    ours, theirs = ({Path(name).name for name in files(path / of)} for of in ("new", "old"))
    return "" if ours == theirs else f"{ours} differ from {theirs}"


def rows(root: Path, jobs: int, only: str) -> Iterator[Row]:
    commands = Commands(root)
    weights, checkpoint = (commands.read[name].stat().st_size for name in ("weights", "checkpoint"))

    def training(folder: Path) -> list[str]:
        if folder.name == "old":  # any file
            return ["cp", str(commands.read["weights"]), str(folder)]
        return commands.train(folder)

    def same_run(path: Path) -> str:
        return difference(path / "new", commands.whole)

    few = 4 * KIB
    writers = {
        what: partial(commands, what)
        for what in ("shards write", "shards subset", "wiseft --force", "compare")
    }
    exports = {form: partial(commands, f"export --format {form}") for form in ("open_clip", "timm")}
    cases = {
        "shards write": [
            (8 * MIB, but, writers["shards write"], same_files) for but in (0, few, 60 * KIB, 300 * KIB)
        ],
        "shards subset": [
            (8 * MIB, but, writers["shards subset"], same_files) for but in (0, few, 60 * KIB, 100 * KIB)
        ],
        "training: its folder, out.log, params.txt, results.jsonl": [
            (4 * checkpoint + weights, but * few, training, same_run) for but in range(6)
        ],
        "training: the first, second, third checkpoint": [
            (4 * checkpoint + weights, int((number + 0.5) * checkpoint), training, same_run)
            for number in range(3)
        ],
        "wiseft --out: weights, wiseft.json, frontier.png": [
            (4 * weights, but, writers["wiseft --force"], same_files)  # again with room: beside the first
            for but in (0, weights // 2, weights + few, weights + 3 * few)
        ],
        "export: open_clip, timm": [
            (3 * weights, but, exports[form], same_files)
            for form, but in (("open_clip", 0), ("open_clip", weights // 2), ("timm", 0), ("timm", 3 * few))
        ],
        "compare --out: records, a training, a sweep": [
            (3 * checkpoint, but, writers["compare"], same_names)
            for but in (0, few, 5 * few, checkpoint // 2, checkpoint + 20 * few)
        ],
    }
    seen = (
        "one sentence with the place and the reason, all other files untouched; with room, the same outcome"
    )
    with ThreadPoolExecutor(jobs) as pool:
        for fault, tried in cases.items():
            if only not in fault:
                continue
            found = pool.map(lambda one: case(*one), tried)
            wrong = [what and f"{but} bytes left: {what}" for (_, but, *_), what in zip(tried, found)]
            yield counted(f"disk full: {fault}", wrong, seen)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="flyp-disk-") as folder:
        sys.exit(table(rows(Path(folder), 2, *sys.argv[1:] or [""])))
