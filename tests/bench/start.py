"""What the start of a run reads, asks for and says, by the number of its ranks and of its shards.

    python -m tests.bench.start [--ranks 1 4]

Each start is a real one with gloo, of digits and a tiny model, ended before its first step: local shards of 0.5 MB images
without sizes.json, with --shots and with --balance; a checkpoint that is resumed; and 10 and 1,000 shards of a local http
server, with a training and two evaluation sets. Bytes are what the processes together passed through read(), after
Python's imports; seconds run from the imports to the first step. There are no workers.
"""

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
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

    lines, before, start = Counter[str](), read(), time.perf_counter()

    class Count(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines["all"] += record.levelno >= logging.root.level and "  " not in record.getMessage()[:2]

    def stop(*args: object) -> None:
        found = {"read": read() - before, "seconds": time.perf_counter() - start, "lines": lines["all"]}
        print(json.dumps(found), file=sys.stderr, flush=True)
        os._exit(0)

    logging.root.addHandler(Count())
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


def local_rows(root: Path, numbers: list[int]) -> None:
    data, pixels = write(root / "data", (10,) * SHARDS), random.Random(0).randbytes(SIZE)
    for shard in range(SHARDS):  # what follows a PNG's end is ignored by decoders
        keys = range(shard * IMAGES, (shard + 1) * IMAGES)
        members = {f"s{i:04d}.{end}": raw for i in keys for end, raw in
                   (("cls", b"%d" % tars.label(i)), ("png", tars.png(i) + pixels))}  # fmt: skip
        tars.write(data / "train" / f"{shard}.tar", members)
    whole = SHARDS * IMAGES * SIZE / 1e6
    print(
        f"Local, {whole:.0f} MB in {SHARDS} shards:\n| start with | ranks | read, MB | s | lines |\n|---|---|---|---|---|"
    )
    for title, more in (
        ("counting", []),
        ("--shots 4", ["--shots", 4]),
        ("--balance 0.5", ["--balance", 0.5]),
    ):
        for ranks in numbers:
            (data / "train" / "sizes.json").unlink(missing_ok=True)
            found = start(ranks, words(data, root / "logs", f"{ranks}{title[:4]}", *more), root / "said")
            print(
                f"| {title} | {ranks} | {found['read'] / 1e6:.0f} | {found['seconds']:.1f} | {found['lines']} |",
                flush=True,
            )


def remote_rows(root: Path, numbers: list[int]) -> None:
    print(
        "\nhttp:\n| shards | ranks | requests | of them for tars | most for one text file | s |\n|---|---|---|---|---|---|"
    )
    for shards in (10, 1000):
        data = write(root / f"{shards}", (1,) * 2)
        for split in ("train", "test"):
            tar = (data / split / "0.tar").read_bytes()
            for i in range(shards):
                (data / split / f"{i}.tar").write_bytes(tar)
            (data / split / "nshards.txt").write_text(f"{shards}\n")
            (data / split / "sizes.json").write_text(json.dumps({f"{i}.tar": 1 for i in range(shards)}))
        for ranks in numbers:
            with serving(data, good) as (url, asked):
                flags = words(data, root / "logs", f"http{shards}-{ranks}", "--train-data", url)
                flags += [
                    "--eval-data",
                    f"val={url}",
                    "--eval-data",
                    f"same={url}/train",
                    "--eval-frequency",
                    0,
                ]
                found = start(ranks, flags, root / "said")
                tar_requests = [path for path in asked if path.endswith(".tar")]
                texts = Counter(path for path in asked if not path.endswith(".tar"))
            scored = 2 * shards  # the evaluation of epoch 0 reads each shard of both sets
            print(f"| {shards} | {ranks} | {len(asked) - scored} | {len(tar_requests) - scored} | {max(texts.values())} | "
                  f"{found['seconds']:.1f} |", flush=True)  # fmt: skip


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
