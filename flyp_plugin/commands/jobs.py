"""Run a list of commands one after another, each only once however often the program is started again."""

import json
import logging
import shlex
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean

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

    `left` is the number of commands of each kind, `bar` counts them, and they inherit the file descriptor `lock` (see
    `folder_lock`).
    """

    def __init__(self, left: Mapping[str, int], lock: int, bar: tqdm):
        self.left, self.lock, self.bar, self.total = dict(left), lock, bar, sum(left.values())
        self.seconds: dict[str, list[float]] = {kind: [] for kind in left}

    def run(
        self, kind: str, title: str, folder: Path, command: Sequence[str], result: Callable[[], str]
    ) -> None:
        """Run a command unless it has finished before, and log its result. Raises JobFailed if it fails."""
        done = folder / DONE
        new = not done.exists()
        if new:
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(folder / "command.txt", shlex.join(command) + "\n")
            _log.info(f"{title}, {kind}:\n  {shlex.join(command)}")
            start = time.monotonic()
            self._run(command, folder / "console.log", f"{title}: the {kind}")
            write_atomically(done, json.dumps({"seconds": round(time.monotonic() - start, 1)}) + "\n")
        self.left[kind] -= 1
        self.seconds[kind].append(json.loads(done.read_text())["seconds"])
        self.bar.update()
        if new:
            number, took = self.total - sum(self.left.values()), tqdm.format_interval(self.seconds[kind][-1])
            left = tqdm.format_interval(seconds_left(self.seconds, self.left))
            _log.info(f"[{number}/{self.total}] {title}, {kind}: {result()}, in {took}; about {left} left")

    def skip(self, kind: str) -> None:
        """Count a command that turned out to be unnecessary."""
        self.left[kind] -= 1
        self.bar.update()

    def _run(self, command: Sequence[str], log: Path, what: str) -> None:
        with log.open("w") as output:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, pass_fds=[self.lock]
            )
            try:
                status = process.wait()
            except BaseException:
                process.terminate()
                process.wait()
                raise
        if status:
            last = "\n".join(f"  {line}" for line in log.read_text(errors="replace").splitlines()[-10:])
            problem = f"{what} in {log.parent} failed with status {status}"
            raise JobFailed(f"{problem}; the end of its {log.name}:\n{last}")


def seconds_left(seconds: Mapping[str, Sequence[float]], left: Mapping[str, int]) -> float:
    """An estimate from the mean time of each kind of command; a kind not run yet is taken to be like the others."""
    known = fmean(fmean(times) for times in seconds.values() if times)
    return sum(left[kind] * (fmean(times) if times else known) for kind, times in seconds.items())


@contextmanager
def run_jobs(folder: Path, left: Mapping[str, int]) -> Iterator[Jobs]:
    """Jobs with a progress bar, in a locked folder. Raises InputError if another process has the lock."""
    from flyp_plugin.run_folder import folder_lock

    with (
        folder_lock(folder) as lock,
        logging_redirect_tqdm(),
        tqdm(total=sum(left.values()), disable=None, unit="run") as bar,
    ):
        yield Jobs(left, lock, bar)


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
