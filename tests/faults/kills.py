"""What becomes of a training that is killed, and of one that is asked to end: it goes on to the same weights.

    python -m tests.faults.kills

Runs of three epochs of digits, with two workers and an evaluation before and after each epoch, are killed by SIGKILL to
the whole process group and resumed at once, up to three times each. Some moments are chosen: a random byte of a
checkpoint that is being written (`faulty` below), and the middle of an evaluation. All others are random, from the
start of the process to the CPU time that an unharmed run takes. A run has survived if in the end its weights and its
optimizer state equal those of an uninterrupted run bit for bit, results.jsonl equals that run's, nothing half-written
is in the folder, and no process of any attempt is left.
"""

import argparse
import io
import json
import logging
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from tests import digits
from tests.faults.processes import Row, table

EPOCHS = 3
WAIT = 15  # seconds for the processes of a killed run to be gone: a worker looks for its parent every 5
MOST_RECENT = ("--save-most-recent", "--delete-previous-checkpoint")
PYTHON = [sys.executable, "-m"]


def flags(data: Path, folder: Path) -> list[str]:
    """Those of the training whose folder is `folder`."""
    words = ["--model", "digits-vit", "--model-config", data / "digits-vit.json", "--train-data", data]
    words += ["--eval-data", f"test={data}/test/{{0..1}}.tar", "--device", "cpu", "--workers", 2]
    words += ["--epochs", EPOCHS, "--train-num-samples", 300, "--batch-size", 100, "--lr", "1e-3"]
    return [*map(str, words), "--logs", str(folder.parent), "--name", folder.name]


def start(command: Sequence[str], log: Path) -> subprocess.Popen:
    """A process group of its own, whose output goes to `log`. One thread: several may add up in another order."""
    log.parent.mkdir(parents=True, exist_ok=True)
    one = {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("w") as output:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True, env=one
        )


def train(data: Path, folder: Path, *more: str, fault: str = "") -> subprocess.Popen:
    """Begin a training; `fault` is what `faulty` is to do."""
    program = ["tests.faults.kills", "--fault", fault] if fault else ["flyp_plugin", "train"]
    log = folder.parent / f"{folder.name}.said"
    return start([*PYTHON, *program, *flags(data, folder), *more], log)


def faulty(fault: str, argv: list[str]) -> None:
    """Train, and kill the own process group where `fault` says.

    Args:
        fault: `save N F`: at the fraction F of the bytes of the checkpoint that is written as the Nth;
            `score N`: within the Nth evaluation.
    """
    from flyp_plugin import commands, errors, monitor

    what, number, *rest = fault.split()
    calls = 0

    def due() -> bool:
        nonlocal calls
        calls += 1
        return calls == int(number)

    save, score = torch.save, monitor.score

    def cut_off(content: object, file: str | os.PathLike | io.IOBase, *args: object) -> None:
        if isinstance(file, (str, os.PathLike)):
            with open(file, "wb") as stream:
                return cut_off(content, stream, *args)
        if not due():
            return save(content, file, *args)
        save(content, whole := io.BytesIO())
        file.write(whole.getvalue()[: int(float(rest[0]) * whole.tell())])
        file.flush()
        os.killpg(0, signal.SIGKILL)

    def score_in_part(classifier: Callable, loader: Iterable, tally: object) -> object:
        if due():
            next(iter(loader))
            os.killpg(0, signal.SIGKILL)
        return score(classifier, loader, tally)

    if what == "save":
        torch.save = cut_off
    else:
        monitor.score = score_in_part
    errors.run(lambda: commands.call(["train", *argv]))


def unharmed(data: Path, folder: Path) -> float:
    """Train without a fault; the CPU time that it takes."""
    process, used = train(data, folder), 0.0
    while process.poll() is None:
        used = cpu_seconds(process)
        time.sleep(0.05)
    assert process.returncode == 0, (folder.parent / f"{folder.name}.said").read_text()
    return used


def left(group: int, seconds: float = WAIT) -> list[int]:
    """Processes of a session that have not ended after so many seconds."""
    end = time.monotonic() + seconds
    while True:
        alive = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                state, _, _, session, *_ = path.read_text().rpartition(")")[2].split()
            except OSError:  # it has ended meanwhile
                continue
            if int(session) == group and state != "Z":
                alive.append(int(path.parent.name))
        if not alive or time.monotonic() > end:
            return alive
        time.sleep(0.1)


def cpu_seconds(process: subprocess.Popen) -> float:
    """That it has used itself, without its workers."""
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def come_to(process: subprocess.Popen, moment: float | str, log: Path) -> bool:
    """Wait until a process has used so many seconds of CPU time, or has said something; False where it ends before."""
    while process.poll() is None:
        if moment in log.read_text() if isinstance(moment, str) else cpu_seconds(process) >= moment:
            return True
        time.sleep(0.005)
    return False


def handles_sigterm(process: subprocess.Popen) -> bool:
    """Whether it has come so far; before, there is nothing to say or to tidy up."""
    caught = re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{process.pid}/status").read_text())
    return caught is not None and bool(int(caught[1], 16) >> (signal.SIGTERM - 1) & 1)


def difference(folder: Path, whole: Path) -> str:
    """What a run that was killed has otherwise than an uninterrupted one; '' for nothing."""
    ours, theirs = (
        torch.load(f / f"checkpoints/epoch_{EPOCHS}.pt", weights_only=True) for f in (folder, whole)
    )
    if not _equal(ours, {**theirs, "name": ours["name"]}):
        return "other weights or optimizer state"
    rows, expected = ((f / "checkpoints/results.jsonl").read_text() for f in (folder, whole))
    if [json.loads(line)["epoch"] for line in expected.splitlines()] != list(range(EPOCHS + 1)):
        return "the uninterrupted run lacks epochs"
    names = [path.name for path in folder.rglob("*") if path.name.endswith((".part", ".incomplete"))]
    return "other results.jsonl" if rows != expected else ", ".join(names)


def _equal(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_equal, a, b))
    return a == b


def killed(
    data: Path, whole: Path, folder: Path, *more: str, fault: str = "", moments: Sequence[float] = ()
) -> tuple[str, int]:
    """Kill a run by `fault`, then at each of the moments, resuming it at once; what is wrong, or '', and how many kills.

    A moment that comes after the run's end is no kill.
    """
    groups, log = [], folder.parent / f"{folder.name}.said"
    resume = ["--resume", "latest", *more]
    if fault:
        process = train(data, folder, *resume, fault=fault)
        groups.append(process.pid)
        if process.wait() != -signal.SIGKILL:
            return f"not killed by {fault!r}", 0
    for moment in (*moments, float("inf")):
        process = train(data, folder, *resume)
        groups.append(process.pid)
        if not come_to(process, moment, log):
            break
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    status, kills = process.wait(), len(groups) - 1
    if status:
        return f"status {status}: {log.read_text().splitlines()[-1]}", kills
    if remaining := [pid for group in groups for pid in left(group)]:
        return f"processes left: {remaining}", kills
    return difference(folder, whole), kills


def signalled(
    data: Path, folder: Path, number: signal.Signals, group: bool, moment: float | str
) -> tuple[str, float]:
    """Send a training a signal; what is wrong, or '', and how many seconds later all its processes are gone."""
    process = train(data, folder)
    log = folder.parent / f"{folder.name}.said"
    reached = come_to(process, moment, log)
    while process.poll() is None and not handles_sigterm(process):
        time.sleep(0.005)
    if process.poll() is not None:
        earlier = 0.7 * moment if reached and not isinstance(moment, str) else 0
        return signalled(data, folder.with_name(f"{folder.name}_"), number, group, earlier)
    sent = time.monotonic()
    (os.killpg if group else os.kill)(process.pid, number)
    status = process.wait()
    remaining, took = left(process.pid), time.monotonic() - sent
    said = log.read_text()
    line = {signal.SIGTERM: "Terminated.", signal.SIGINT: "Interrupted."}[number]
    # Python ends itself by SIGINT, which a shell calls 130, where that came within an exec(), as in torch's imports
    if status not in (128 + number, -signal.SIGINT):
        return f"status {status}, and says {said[-800:]!r}", took
    if remaining:
        return f"processes left: {remaining}", took
    clean = said.splitlines()[-1] == line and said.count(line) == 1 and "Traceback" not in said
    return "" if clean else f"it says {said[-3000:]!r}", took


def cut_checkpoints(whole: Path, folder: Path, times: int, rng: random.Random) -> int:
    """How many of a checkpoint's truncations are set aside."""
    from flyp_plugin.run_folder import find_newest

    logging.disable()  # it names each
    content = (whole / f"checkpoints/epoch_{EPOCHS}.pt").read_bytes()
    path = folder / "checkpoints/epoch_1.pt"
    path.parent.mkdir(parents=True)
    noticed = 0
    for number in range(times):
        # the last bytes, which make it whole, more often
        size = rng.randrange(len(content)) if number % 2 else len(content) - 1 - rng.randrange(200)
        path.write_bytes(content[:size])
        find_newest(folder)
        noticed += not path.exists()
    logging.disable(logging.NOTSET)
    return noticed


def counted(fault: str, wrong: Sequence[str], seen: str) -> Row:
    """The row of a fault that was tried so often; what went `wrong`, '' for nothing, is said on stderr."""
    for what in filter(None, wrong):
        print(f"{fault}: {what}", file=sys.stderr, flush=True)
    return Row(fault, len(wrong), wrong.count(""), seen)


def rows(root: Path, times: int, jobs: int, seed: int) -> Iterator[Row]:
    # a job in the background ignores Ctrl-C, and so would what it starts
    signal.signal(signal.SIGINT, signal.default_int_handler)
    data, logs, rng = digits.write(root / "digits"), root / "logs", random.Random(seed)
    whole = logs / "whole"
    usual = unharmed(data, whole)

    def moments(number: int, latest: float = 1) -> list[float]:
        return [rng.uniform(0, latest * usual) for _ in range(number)]

    # a fifth each of the chosen moments, of which the saves of two files an epoch are one
    kinds: list[tuple[str, str, tuple[str, ...]]] = []
    for number in range(times):
        save = f"save {rng.randrange(1, 4)} {rng.random()}"
        recent = f"save {rng.randrange(1, 6)} {rng.random()}"
        kinds.append(
            [
                ("at a random moment", "", ()),
                ("while a checkpoint is written", save, ()),
                ("at a random moment", "", ()),
                (f"while a checkpoint is written, {' '.join(MOST_RECENT)}", recent, MOST_RECENT),
                ("during an evaluation", f"score {rng.randrange(1, 5)}", ()),
            ][number % 5]
        )
    plans = [(*kind, moments(rng.randrange(1, 3) if kind[1] else rng.randrange(1, 4))) for kind in kinds]
    with ThreadPoolExecutor(jobs) as pool:

        def one(number: int) -> tuple[str, int]:
            _, fault, more, at = plans[number]
            return killed(data, whole, logs / f"killed{number}", *more, fault=fault, moments=at)

        outcomes = list(pool.map(one, range(times)))
        same = "weights, optimizer state and results.jsonl of the uninterrupted run, no process left"
        for kind in dict.fromkeys(kind for kind, *_ in kinds):
            wrong, kills = zip(*(outcome for outcome, (name, *_) in zip(outcomes, kinds) if name == kind))
            yield counted(f"SIGKILL {kind}", wrong, f"{sum(kills)} kills in all; {same}")
        for number in (signal.SIGTERM, signal.SIGINT):
            for group in (False, True):
                few = max(1, times // 4)
                folders = [logs / f"{number.name}{group}{i}" for i in range(few)]
                sent = [
                    pool.submit(signalled, data, folder, number, group, moment)
                    for folder, moment in zip(folders, moments(few, 0.8))
                ]
                results = [future.result() for future in sent]
                slowest = max(took for _, took in results)
                to = "to the whole group" if group else "to the main process"
                seen = f"one line, status {128 + number}, all gone after {slowest:.1f} s at most"
                yield counted(f"{number.name} {to}", [what for what, _ in results], seen)
    cut = cut_checkpoints(whole, logs / "cut", 10 * times, rng)
    yield Row("a checkpoint that others cut off", 10 * times, cut, "set aside and named")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--fault"]:
        faulty(sys.argv[2], sys.argv[3:])
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--times", type=int, default=20, help="runs that SIGKILL is sent to")
    parser.add_argument("--jobs", type=int, default=2, help="at once")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="flyp-kills-") as folder:
        sys.exit(table(rows(Path(folder), args.times, args.jobs, args.seed)))
