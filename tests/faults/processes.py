"""What the scripts of faults share: processes as /proc shows them, and their table."""

import os
import signal
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

HEADER = ("fault", "times", "survived", "what is seen")


@dataclass
class Row:
    """A fault, how often it was tried, how often it did no harm, and what a user sees of it."""

    fault: str
    times: int
    survived: int
    seen: str


def table(rows: Iterable[Row]) -> int:
    """Print each row as it comes, in Markdown; the exit status, 1 where a fault did harm."""
    print(f"| {' | '.join(HEADER)} |\n|{'---|' * len(HEADER)}", flush=True)
    status = 0
    for row in rows:
        print(f"| {row.fault} | {row.times} | {row.survived} | {row.seen} |", flush=True)
        status |= row.survived < row.times
    return status


def family(pid: int) -> list[int]:
    """A process and all that descend from it."""
    found = [pid]
    for parent in found:
        try:
            for path in Path(f"/proc/{parent}/task").glob("*/children"):
                found += map(int, path.read_text().split())
        except OSError:  # it has ended meanwhile
            continue
    return found


def marked(name: str, value: str) -> Iterator[int]:
    """The living processes that were started with this environment variable, orphans too."""
    wanted = f"{name}={value}".encode()
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if wanted in path.read_bytes().split(b"\0"):
                yield int(path.parent.name)
        except OSError:
            continue


def gone(name: str, value: str, within: float) -> bool:
    """Whether all processes so marked end by themselves within so many seconds; what is left is killed."""
    end = time.monotonic() + within
    while left := list(marked(name, value)):
        if time.monotonic() > end:
            for pid in left:
                os.kill(pid, signal.SIGKILL)
            return False
        time.sleep(0.1)
    return True


@dataclass
class Held:
    """What a process and its descendants hold.

    Attributes:
        own: MiB of all of them, PSS without mapped files: a page that they share is counted once. Those of files are
            shared with all that runs the same libraries on the machine, so that PSS in all changes with these.
        rss: MiB of all of them, mapped files too; a page that they share is counted for each.
        descriptors: open file descriptors, of the process and of each descendant.
        shared: files of theirs in /dev/shm.
        pids: the descendants.
    """

    own: float
    rss: float
    descriptors: tuple[int, ...]
    shared: int
    pids: tuple[int, ...]


def held(pid: int) -> Held:
    pids = family(pid)
    sizes = [_rollup(one) for one in pids]
    files = [path.name.split("_") for path in Path("/dev/shm").iterdir()]
    return Held(
        sum(size["Pss_Anon"] + size["Pss_Shmem"] for size in sizes) / 1024,
        sum(size["Rss"] for size in sizes) / 1024,
        tuple(len(os.listdir(f"/proc/{one}/fd")) for one in pids),
        sum(any(str(one) in parts for one in pids) for parts in files),  # torch_PID_..., psm_...
        tuple(sorted(pids[1:])),
    )


def _rollup(pid: int) -> Mapping[str, int]:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    return {name.rstrip(":"): int(size) for name, size, *_ in map(str.split, lines)}
