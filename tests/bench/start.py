"""What the start of a run reads, asks for and says, by the number of its ranks and of its shards.

    python -m tests.bench.start [--ranks 1 4]

Each start is a real one with gloo, of digits and a tiny model, ended before its first step: local shards of 0.5 MB images
without sizes.json, with --shots and with --balance; a checkpoint that is resumed; and 10 and 1,000 shards of a local http
server, with a training and two evaluation sets. Bytes are what the processes together passed through read(), after
Python's imports; seconds run from the imports to the first step, epoch 0's evaluation included. There are no workers.
"""

import argparse
import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path

from tests import tars
from tests.faults.ranks import Ranks, words, write
from tests.faults.remote import good, serving

SHARDS, IMAGES, SIZE = 16, 25, 500_000  # of the local set: 200 MB


def one_rank(flags: list[str]) -> None:
    """Start a run, and print {"read", "seconds", "lines"} instead of its first step."""
    import logging

    from flyp_plugin.commands import call
    from flyp_plugin.train import FlypRun

    def read() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    lines, before, start = list[str](), read(), time.perf_counter()

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.levelno >= logging.root.level and not record.getMessage().startswith("  "):
                lines.append(record.getMessage())

    def stop(*args: object) -> None:
        found = {"read": read() - before, "seconds": time.perf_counter() - start, "lines": len(lines)}
        print(json.dumps(found), file=sys.stderr, flush=True)
        os._exit(0)

    logging.root.addHandler(Keep())
    FlypRun.before_epoch = stop  # type: ignore[assignment]
    sys.exit(call(["train", *flags]))


def start(ranks: int, flags: list[object], folder: Path) -> dict[str, float]:
    """The sum of what the ranks read, the longest time, the lines that all of them log."""
    run = Ranks(ranks, [Path(__file__).resolve(), "--rank", *flags, "--workers", 0, "--epochs", 1], folder)
    statuses = run.ended()
    assert not any(statuses), [run.said(i)[-2000:] for i in range(ranks)]
    found = [json.loads(run.said(i).strip().splitlines()[-1]) for i in range(ranks)]
    total = {name: sum(one[name] for one in found) for name in ("read", "lines")}
    return total | {"seconds": max(one["seconds"] for one in found)}


def local_set(folder: Path, shards: int, images: int) -> Path:
    """A data folder whose training images have SIZE bytes each; decoders ignore what follows a PNG's end."""
    data, noise = write(folder, (10,) * shards), random.Random(0).randbytes(SIZE)
    for shard in range(shards):
        members = {}
        for i in range(shard * images, (shard + 1) * images):
            members |= {f"s{i:04d}.cls": b"%d" % tars.label(i), f"s{i:04d}.png": tars.png(i) + noise}
        tars.write(data / "train" / f"{shard}.tar", members)
    return data


def remote_set(folder: Path, shards: int) -> Path:
    """A data folder for a server, with one digit in each shard of both splits."""
    data = write(folder, (1, 1))
    for split in ("train", "test"):
        for i in range(shards):
            (data / split / f"{i}.tar").write_bytes((data / split / "0.tar").read_bytes())
        (data / split / "nshards.txt").write_text(f"{shards}\n")
        (data / split / "sizes.json").write_text(json.dumps({f"{i}.tar": 1 for i in range(shards)}))
    return data


def remote_flags(data: Path, logs: Path, name: str, url: str) -> list[object]:
    sets = ["--eval-data", f"val={url}", "--eval-data", f"same={url}/train"]
    return words(data, logs, name, "--train-data", url, *sets)


def count_requests(asked: list[str], shards: int) -> tuple[int, int]:
    """(all, those for tars) without the epoch-0 evaluation, for which both sets are read."""
    return len(asked) - 2 * shards, sum(path.endswith(".tar") for path in asked) - 2 * shards


def local_rows(root: Path, numbers: list[int]) -> None:
    data = local_set(root / "data", SHARDS, IMAGES)
    print(
        f"| start of {SHARDS * IMAGES * SIZE / 1e6:.0f} MB | ranks | read, MB | s | lines |\n|---|---|---|---|---|"
    )
    for more in ([], ["--shots", "4"], ["--balance", "0.5"]):
        for ranks in numbers:
            (data / "train" / "sizes.json").unlink(missing_ok=True)
            found = start(ranks, words(data, root / "logs", f"{ranks}{more[:1]}", *more), root / "said")
            cells = f"{found['read'] / 1e6:.0f} | {found['seconds']:.1f} | {found['lines']}"
            print(f"| {' '.join(more) or 'without flags'} | {ranks} | {cells} |", flush=True)


def remote_rows(root: Path, numbers: list[int]) -> None:
    print("\n| shards over http | ranks | requests | of them for tars |\n|---|---|---|---|")
    for shards in (10, 1000):
        data = remote_set(root / f"{shards}", shards)
        for ranks in numbers:
            with serving(data, good) as (url, asked):
                start(ranks, remote_flags(data, root / "logs", f"http{shards}-{ranks}", url), root / "said")
            requests, of_tars = count_requests(asked, shards)
            print(f"| {shards} | {ranks} | {requests} | {of_tars} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 4])
    numbers = parser.parse_args().ranks
    with tempfile.TemporaryDirectory() as folder:
        local_rows(Path(folder), numbers)
        remote_rows(Path(folder), numbers)


if __name__ == "__main__":
    one_rank(sys.argv[2:]) if sys.argv[1:2] == ["--rank"] else main()
