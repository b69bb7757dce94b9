"""Time and memory of `flyp shards write`, by number of files; beside it a writer in the manner of img2dataset.

    python tests/bench/shards.py [--files 10000 1000000] [--workers 2] [--bytes 2000] [--folder /tmp] [--hold-out]

Files of random bytes in 1,000 class folders (neither writer decodes images; needs N inodes and 4 KB each in --folder).
Each row is a command of its own: "listing" runs from its start to the class order's line, and includes about 1 s of
imports; "writing" from there to the end. Memory is the peak of the proportional share (PSS) of the process and its workers.
The other writer is in the manner of img2dataset: a pool of processes, of which each writes whole shards with webdataset.
img2dataset itself downloads URLs, and adds a JSON member and a line of parquet for each image.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from multiprocessing import Pool
from pathlib import Path
from random import Random

PER_SHARD, CLASSES = 1_000, 1_000


def make(folder: Path, files: int, size: int) -> None:
    noise = Random(0).randbytes(size)
    for label in range(CLASSES):
        (folder / f"class {label:04d}").mkdir(parents=True)
        for i in range(label, files, CLASSES):
            (folder / f"class {label:04d}/{i:07d}.jpg").write_bytes(b"%d " % i + noise)


def write_shard(job: tuple[Path, list[tuple[int, str, int]]]) -> None:
    from webdataset import TarWriter

    shard, samples = job
    with TarWriter(str(shard), encoder=False) as tar:
        for number, path, label in samples:
            tar.write({"__key__": f"{number:09d}", "jpg": Path(path).read_bytes(), "cls": b"%d" % label})


def write_plainly(folder: Path, dest: Path, workers: int) -> None:
    dest.mkdir(parents=True)
    classes = sorted(os.listdir(folder))
    rows = [
        (str(folder / name / file), label)
        for label, name in enumerate(classes)
        for file in os.listdir(folder / name)
    ]
    Random(0).shuffle(rows)
    print("Class order", file=sys.stderr, flush=True)
    samples = [(number, path, label) for number, (path, label) in enumerate(rows)]
    jobs = [
        (dest / f"{i // PER_SHARD}.tar", samples[i : i + PER_SHARD])
        for i in range(0, len(samples), PER_SHARD)
    ]
    with Pool(workers) as pool:
        pool.map(write_shard, jobs, chunksize=1)


def resident(pid: int) -> float:
    """MiB of a process and its children, shared pages divided among those that share them."""
    total = 0
    children = " ".join(path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children"))
    for one in (pid, *children.split()):
        lines = Path(f"/proc/{one}/smaps_rollup").read_text().splitlines()
        total += next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total / 1024


def measure(command: list[str]) -> tuple[float, float, float]:
    """Seconds until the line "Class order..." and from there on, and the peak of memory in MiB."""
    peak, listed, start = 0.0, 0.0, time.perf_counter()
    with tempfile.TemporaryFile() as said, subprocess.Popen(command, stderr=said) as process:
        while process.poll() is None:
            with suppress(OSError, StopIteration):  # a process has just ended
                peak = max(peak, resident(process.pid))
            if not listed and b"Class order" in os.pread(said.fileno(), 1 << 16, 0):
                listed = time.perf_counter()
            time.sleep(0.2)
    assert process.returncode == 0, command
    return listed - start, time.perf_counter() - listed, peak


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--files", type=int, nargs="+", default=[10_000, 1_000_000])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--bytes", type=int, default=2_000)
    parser.add_argument("--folder", default=tempfile.gettempdir())
    parser.add_argument(
        "--hold-out", action="store_true", help="also time --hold-out val=0.1, which hashes all files"
    )
    parser.add_argument("--plainly", nargs=2, type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.plainly:
        return write_plainly(*args.plainly, args.workers)
    print(
        "| files | writer | workers | listing | writing | files/s | peak memory |\n|---|---|---|---|---|---|---|"
    )
    for files in args.files:
        with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
            source, dest = Path(temporary, "source"), Path(temporary, "data/train")
            make(source, files, args.bytes)
            flyp = [sys.executable, "-m", "flyp_plugin", "shards", "write", str(source), str(dest)]
            commands = {
                "in the manner of img2dataset": [
                    sys.executable,
                    __file__,
                    "--plainly",
                    str(source),
                    str(dest),
                ]
            }
            commands |= {"flyp shards write": flyp}
            commands |= {"with --hold-out val=0.1": [*flyp, "--hold-out", "val=0.1"]} if args.hold_out else {}
            for name, command in commands.items():
                listing, writing, peak = measure([*command, "--workers", str(args.workers)])
                cells = [f"{files:,}", name, args.workers, f"{listing:.1f} s", f"{writing:.1f} s"]
                cells += [f"{files / (listing + writing):,.0f}", f"{peak:.0f} MiB"]
                print(f"| {' | '.join(map(str, cells))} |", flush=True)
                shutil.rmtree(dest.parent)


if __name__ == "__main__":
    main()
