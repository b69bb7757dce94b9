"""Long runs: memory, descriptors, shared memory and workers, over a million samples and over 200 epochs.

    python -m tests.faults.long [million] [epochs] [train] [--samples 1000000] [--epochs 200]

million: 100,000 generated samples (8-pixel PNGs in shards of 1,000), ten times over through ClassPromptDataset with two
workers and a transform that does next to nothing; measured each 100,000. epochs: 64 images, two workers, 200 times through
ClassPromptDataset and LabelledDataset. train: 200 epochs of train_flyp.py on 64 digits, each scored on 125.

Memory is that of the process and its workers together: their own, which is PSS without mapped files (pages that they
share counted once), and RSS (with files, counted for each). It is flat where no later measurement of either differs by more than 5 % from the first one: that at 100,000
samples, or at epoch 10. Descriptors, in sum, are to differ by no more than 10 (a tensor on its way from a worker is one);
shared-memory files and the workers' process numbers are to be the same. Speed, as a ratio of the last to the first, is no
part of the verdict.
"""

import argparse
import gc
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image

from flyp_plugin import ClassPromptDataset, ClassPrompts
from flyp_plugin.data import LabelledDataset
from tests import digits, tars
from tests.bench.scale import write
from tests.faults.processes import Held, Row, held, table

BATCH, WORKERS = 500, 2
REPO = Path(__file__).parents[2]


def pixels(image: Image.Image) -> torch.Tensor:
    """As little as a transform can do: uint8 (bytes,)."""
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)


def tokens(texts: Sequence[str]) -> torch.Tensor:
    """As little as a tokenizer can do: int64 (N, 8)."""
    return torch.tensor([[*range(1, 8), 0]] * len(texts))


def prompts() -> ClassPrompts:
    return ClassPrompts([f"thing {i}" for i in range(10)], ["a photo of a {c}."])


def million(folder: Path, samples: int, distinct: int, each: int) -> Iterator[tuple[str, Held, float]]:
    """(where, what is held, samples a second since the last) at each so many samples."""
    write(folder, distinct)
    data = ClassPromptDataset(
        str(folder), pixels, tokens, BATCH, prompts=prompts(), num_samples=samples, num_workers=WORKERS
    )
    seen, since = 0, time.perf_counter()
    for images, _ in data:
        if not seen:
            gc.collect()  # touches all objects, and so copies what is shared with forked workers: once, before it counts
        before, seen = seen, seen + len(images)
        if seen // each > before // each:
            rate = each / (time.perf_counter() - since)
            yield f"{seen:,} samples", held(os.getpid()), rate
            since = time.perf_counter()
    assert seen == samples, f"{seen} samples, not {samples}"


def epochs(folder: Path, number: int, at: Sequence[int]) -> Iterator[tuple[str, Held, float]]:
    """(where, what is held, epochs a second since the last) at those epochs of two data sets with workers each."""
    shards = tars.shards(folder, 64, 2)
    train = ClassPromptDataset(shards, pixels, tokens, 20, prompts=prompts(), num_workers=WORKERS)
    test = LabelledDataset(shards, pixels, 20, num_classes=10, num_workers=WORKERS)
    since, last = time.perf_counter(), 0
    for epoch in range(1, number + 1):
        if epoch == at[0]:
            gc.collect()  # as above
        assert sum(len(images) for images, _ in train) == 64
        assert sum(len(batch["labels"]) for batch in test) == 64
        if epoch in at:
            yield f"epoch {epoch}", held(os.getpid()), (epoch - last) / (time.perf_counter() - since)
            since, last = time.perf_counter(), epoch


def train(folder: Path, number: int, at: Sequence[int]) -> Iterator[tuple[str, Held, float]]:
    """(where, what is held, epochs a second since the last) while train_flyp.py trains, as its log is seen to go on."""
    digits.write(folder)
    words = ["--model", "digits-vit", "--model-config", f"{folder}/digits-vit.json", "--train-data", folder]
    words += ["--train-num-samples", "64", "--batch-size", "32", "--workers", WORKERS, "--epochs", number]
    words += ["--eval-data", f"val={folder}/test/{{0..1}}.tar", "--save-frequency", "0", "--save-most-recent"]
    words += ["--logs", folder, "--name", "run", "--device", "cpu"]
    path = os.pathsep.join([str(REPO), *sys.path])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, REPO / "train_flyp.py", *words]
    with open(folder / "err", "w") as err:
        run = subprocess.Popen([*map(str, command)], stderr=err, stdout=err, env=env)
    try:
        since, last, log = time.perf_counter(), 0, folder / "run" / "out.log"
        for epoch in at:
            while not (log.exists() and f"Start epoch {epoch}\n" in log.read_text()) and run.poll() is None:
                time.sleep(0.05)
            if epoch == number or run.poll() is not None:  # it has ended
                break
            yield f"epoch {epoch}", held(run.pid), (epoch - last) / (time.perf_counter() - since)
            since, last = time.perf_counter(), epoch
        status = run.wait()
    finally:
        run.kill()
    assert status == 0, (folder / "err").read_text()[-3000:]
    assert len(re.findall("val/top1", (folder / "run/checkpoints/results.jsonl").read_text())) == number + 1


def judged(fault: str, points: Iterator[tuple[str, Held, float]]) -> Row:
    """The table's row of a long run: all later points against the first."""
    found = []
    for where, now, rate in points:
        found.append((where, now, rate))
        print(
            f"{fault}, {where}: own memory {now.own:.1f} MiB, RSS {now.rss:.1f} MiB, {now.descriptors} descriptors, "
            f"{now.shared} files in /dev/shm, {len(now.pids)} workers, {rate:.1f} a second",
            flush=True,
        )
    start = found[0][1]
    far = {
        name: max(abs(getattr(now, name) / getattr(start, name) - 1) for _, now, _ in found)
        for name in ("own", "rss")
    }
    descriptors = [sum(now.descriptors) for _, now, _ in found]
    wrong = [
        word
        for word, is_wrong in {
            "memory": max(far.values()) > 0.05,
            "descriptors": max(descriptors) - min(descriptors) > 10,
            "shared memory": len({now.shared for _, now, _ in found}) > 1,
            "workers": len({now.pids for _, now, _ in found}) > 1,
        }.items()
        if is_wrong
    ]
    last = found[-1][1]
    seen = (
        f"{found[0][0]} to {found[-1][0]}: own memory {start.own:.0f} to {last.own:.0f} MiB (at most "
        f"{100 * far['own']:.1f} % off), RSS {start.rss:.0f} to {last.rss:.0f} MiB ({100 * far['rss']:.1f} %), "
        f"descriptors {descriptors[0]} to {descriptors[-1]}, files in /dev/shm {start.shared} to {last.shared}, workers "
        f"{len(start.pids)} to {len(last.pids)}, speed x {found[-1][2] / found[0][2]:.2f}"
    )
    return Row(fault, 1, int(not wrong), f"{seen}{'; NOT FLAT: ' + ', '.join(wrong) if wrong else ''}")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="million, epochs, train", default=[])
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--epochs", type=int, default=200)
    args = parser.parse_args()
    n, at = args.epochs, sorted({10, args.epochs} | set(range(50, args.epochs, 50)))
    tenth = args.samples // 10
    before_end = [10, *range(50, n, 50), n - 1, n]  # the last one it has ended at
    parts: dict[str, tuple[str, Callable[[Path], Iterator]]] = {
        "million": (
            f"{args.samples:,} samples through ClassPromptDataset, {WORKERS} workers",
            lambda folder: million(folder, args.samples, tenth, tenth),
        ),
        "epochs": (
            f"{n} epochs of 64 images through ClassPromptDataset and LabelledDataset, {WORKERS} workers each",
            lambda folder: epochs(folder, n, at),
        ),
        "train": (f"{n} epochs of train_flyp.py on 64 digits", lambda folder: train(folder, n, before_end)),
    }

    def rows() -> Iterator[Row]:
        for part in args.parts or parts:
            with tempfile.TemporaryDirectory() as temporary:
                fault, points = parts[part]
                yield judged(fault, points(Path(temporary, part)))

    return table(rows())


if __name__ == "__main__":
    sys.exit(main())
