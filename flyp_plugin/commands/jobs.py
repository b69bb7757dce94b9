"""Run many commands, one at a time on each device, and each only once however often the program is started again.

A thread of its own waits for each command that runs. Signals arrive in the main thread, which waits for these threads
in `Jobs.map` and ends all commands.
"""

import json
import logging
import os
import shlex
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from queue import Queue
from statistics import fmean
from threading import Event, Lock
from typing import Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from flyp_plugin.errors import InputError
from flyp_plugin.sources import write_atomically

DONE = "finished.json"  # in the folder of each command that succeeded
_log = logging.getLogger(__name__)


class JobFailed(InputError):
    """A command failed; the others can still run."""


class Jobs:
    """Runs commands, each with a folder that keeps its command line, its output and whether it finished.

    `left` is the number of commands of each kind that had not finished before, `bar` counts all, `devices` has one entry
    for each command that may run at a time, and the commands inherit the file descriptor `lock` (see `folder_lock`).
    """

    def __init__(self, left: Mapping[str, int], devices: Sequence[str], lock: int, bar: tqdm):
        self.left, self.lock, self.bar, self.number = dict(left), lock, bar, 0
        self.seconds: dict[str, list[float]] = {kind: [] for kind in left}
        self.devices, self.free = devices, Queue[str]()
        for device in devices:
            self.free.put(device)
        self.guard = Lock()  # of everything here that changes
        self.running: set[subprocess.Popen] = set()
        self.error: BaseException | None = None  # what ended everything

    def map(self, function: Callable[[Any], Any], items: Iterable) -> list:
        """function(item) for each item, for as many at a time as there are devices; `function` may call map itself.

        After a JobFailed of one item, those that have begun are finished. Any other error, Ctrl-C and SIGTERM end all
        commands at once.
        """
        stopped = Event()

        def attempt(item: Any) -> Any:
            if stopped.is_set():
                return None
            try:
                return function(item)
            except BaseException:
                stopped.set()
                raise

        with ThreadPoolExecutor(len(self.devices)) as pool:
            try:
                futures = [pool.submit(attempt, item) for item in items]
                for future in as_completed(futures):
                    if not isinstance(future.exception(), JobFailed):
                        future.result()
            except BaseException as error:
                stopped.set()
                with self.guard:  # the threads that wait for a command, or for a device, raise `error`
                    self.error = self.error or error
                    for process in self.running:
                        process.terminate()
                raise
        return [future.result() for future in futures]  # raises a JobFailed

    def run(
        self, kind: str, title: str, folder: Path, command: Sequence[str], result: Callable[[], str]
    ) -> None:
        """Run a command with --device, unless it has finished before, and log its result. Raises JobFailed if it fails."""
        done = folder / DONE
        new = not done.exists()
        if new:
            device = self.free.get()
            try:
                self._run(kind, title, folder, command, device)
            finally:
                self.free.put(device)
        with self.guard:
            self.left[kind] -= new
            self.number += 1
            self.bar.update()
            self.seconds[kind].append(json.loads(done.read_text())["seconds"])
            if new:
                seconds_to_go = seconds_left(self.seconds, self.left) / len(self.devices)
                took, left = map(tqdm.format_interval, (self.seconds[kind][-1], seconds_to_go))
                what = f"[{self.number}/{self.bar.total}] {title}, {kind}"
                _log.info(f"{what}: {result()}, in {took}; about {left} left")

    def skip(self, kind: str) -> None:
        """Count a command that turned out to be unnecessary."""
        with self.guard:
            self.left[kind] -= 1
            self.number += 1
            self.bar.update()

    def _run(self, kind: str, title: str, folder: Path, command: Sequence[str], device: str) -> None:
        environment, device = one_gpu(device)
        command = [*command, "--device", device]
        line = " ".join([*(f"{name}={value}" for name, value in environment.items()), shlex.join(command)])
        folder.mkdir(parents=True, exist_ok=True)
        log, environment = folder / "console.log", {**os.environ, **environment}
        with log.open("w") as output:
            streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": output}
            with self.guard:
                if self.error:
                    raise self.error
                write_atomically(folder / "command.txt", line + "\n")
                _log.info(f"{title}, {kind}:\n  {line}")
                start = time.monotonic()
                process = subprocess.Popen(command, **streams, pass_fds=[self.lock], env=environment)
                self.running.add(process)
            status = process.wait()
        with self.guard:
            self.running.remove(process)
            if self.error:
                raise self.error
        if status:
            last = "\n".join(f"  {line}" for line in log.read_text(errors="replace").splitlines()[-10:])
            problem = f"{title}: the {kind} in {folder} failed with status {status}"
            raise JobFailed(f"{problem}; the end of its {log.name}:\n{last}")
        write_atomically(folder / DONE, json.dumps({"seconds": round(time.monotonic() - start, 1)}) + "\n")


def find_devices(text: str | None) -> list[str]:
    """A,B,... (all: each visible GPU; None: the default) as a list. Raises InputError for one that this machine lacks."""
    import torch

    from flyp_plugin.checkpoints import default_device

    gpus = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    given = default_device() if text is None else text
    devices = gpus if text == "all" else [*map(str.strip, given.split(","))]
    for device in devices or ["cuda"]:
        try:
            if device not in gpus and not (device == "cuda" and gpus):  # a GPU's memory is left alone
                torch.empty(0, device=device)
        except (RuntimeError, AssertionError):
            found = f"torch finds {', '.join(gpus) or 'no GPU'}"
            said = f"this machine has no device {device!r} ({found}); check --device or --devices {text}."
            raise InputError(said) from None
    return devices


def one_gpu(device: str) -> tuple[dict[str, str], str]:
    """Environment variables and --device of a process that sees this GPU alone.

    open_clip does not make the GPU of `--device cuda:1` the current one, so that pinned memory, and whatever else takes
    "the" GPU, would go to cuda:0.
    """
    kind, _, number = device.partition(":")
    if kind != "cuda" or not number:
        return {}, device
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return {"CUDA_VISIBLE_DEVICES": visible.split(",")[int(number)].strip() if visible else number}, kind


def seconds_left(seconds: Mapping[str, Sequence[float]], left: Mapping[str, int]) -> float:
    """An estimate from the mean time of each kind of command; a kind not run yet is taken to be like the others."""
    known = fmean(fmean(times) for times in seconds.values() if times)
    # less than 0: the folder has finished commands that are not asked for
    return sum(max(0, left[kind]) * (fmean(times) if times else known) for kind, times in seconds.items())


@contextmanager
def run_jobs(folder: Path, left: Mapping[str, int], total: int, devices: Sequence[str]) -> Iterator[Jobs]:
    """Jobs with a progress bar, in a locked folder. Raises InputError if another process has the lock."""
    from flyp_plugin.run_folder import folder_lock

    with (
        folder_lock(folder) as lock,
        logging_redirect_tqdm(),
        tqdm(total=total, disable=None, unit="run") as bar,
    ):
        yield Jobs(left, devices, lock, bar)


def claim_folder(folder: Path, settings: Mapping[str, object], flag: str = "--out") -> None:
    """Create a folder for the results of `settings`, or check that an existing one is for the same settings.

    Raises:
        InputError: it holds the results of other settings or something else, or another process writes to it; the error
            names the `flag` that gave the folder.
    """
    from flyp_plugin.run_folder import folder_lock

    record = folder / "settings.json"
    if not record.exists():
        # a process killed at this point leaves hidden files
        if folder.is_file() or (folder.exists() and any(path.name[0] != "." for path in folder.iterdir())):
            raise InputError(f"{folder} exists and holds something else; choose another {flag}.")
        with folder_lock(folder):
            if not record.exists():
                write_atomically(record, json.dumps(settings, indent=1) + "\n")
    before = json.loads(record.read_text())
    for name, value in settings.items():
        if before.get(name) != value:
            said = f"{folder} was started with {name} {before.get(name)!r}, not {value!r}"
            raise InputError(f"{said}; choose another {flag}, or the same settings to resume it.")
