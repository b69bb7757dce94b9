"""What becomes of two of one command that write to one place: the second is refused in a sentence, the first unharmed.

    python -m tests.faults.concurrency [FAULT]

Both are started at once, unless it says otherwise: which of them is the first is left to chance. A case has survived if
one ends with status 0 and with what it gives when it runs alone, and the other with status 1 and a last line
"Error: ..." that names the place.
"""

import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path

from tests.faults.commands import COMMANDS, Commands
from tests.faults.disk import files
from tests.faults.kills import PYTHON, counted, difference, flags, start
from tests.faults.processes import Row, table


def same_second(argv: list[str]) -> None:
    """Train at a time at which others do: open_clip makes the name of a run out of it."""
    import open_clip_train.main

    from flyp_plugin import commands, errors

    class Clock:
        @staticmethod
        def now() -> datetime:
            return datetime(2026, 1, 1)

    open_clip_train.main.datetime = Clock
    errors.run(lambda: commands.call(["train", *argv]))


def together(commands: Sequence[Sequence[str]], logs: Path, place: str) -> str:
    """Start them at once; what is wrong, or ''."""
    processes = [start(command, logs / f"{number}.said") for number, command in enumerate(commands)]
    statuses = [process.wait() for process in processes]
    said = [(logs / f"{number}.said").read_text() for number in range(len(commands))]
    return verdict(statuses, said, place)


def verdict(statuses: Sequence[int], said: Sequence[str], place: str) -> str:
    """What is wrong with how two or more end of which one may write to `place`, or ''."""
    if sorted(statuses) != [0] + [1] * (len(statuses) - 1):
        return f"statuses {statuses}: {[text[-1500:] for text in said]}"
    for status, text in zip(statuses, said):
        last = text.splitlines()[-1]
        if status and (not last.startswith("Error: ") or place not in last or "Traceback" in text):
            return f"it says {text[-1500:]!r}"
    return ""


def resumed_while_on(commands: Commands, folder: Path) -> str:
    """A second start with --resume latest, while the first trains."""
    command = commands.train(folder)
    first = start(command, folder.parent / f"{folder.name}.first")
    while first.poll() is None and not (folder / "checkpoints/epoch_1.pt").exists():
        time.sleep(0.02)
    first.send_signal(signal.SIGSTOP)  # so that it cannot be over when the second has begun
    second = subprocess.run(command, capture_output=True, text=True, check=False)
    first.send_signal(signal.SIGCONT)
    said = [(folder.parent / f"{folder.name}.first").read_text(), second.stderr]
    what = verdict([first.wait(), second.returncode], said, str(folder))
    return what or difference(folder, commands.whole)


def rows(root: Path, times: int, only: str) -> Iterator[Row]:
    # a job in the background ignores Ctrl-C, and so would what it starts
    signal.signal(signal.SIGINT, signal.default_int_handler)
    commands, alone = Commands(root), root / "alone"

    def both(words: Sequence[str], folder: Path) -> str:
        return together([words] * 2, folder.with_name(f"{folder.name}.both"), str(folder))

    def named(folder: Path) -> str:
        words = commands.train(folder)[: -len(("--resume", "latest"))]
        return both(words, folder) or difference(folder, commands.whole)

    def unnamed(folder: Path) -> str:
        words = [*PYTHON, "tests.faults.concurrency", "--same-second"]
        words += [*flags(commands.read["data"], folder)[:-2]]
        words[words.index("--logs") + 1] = str(folder)
        what = both(words, folder)
        (made,) = folder.iterdir()
        return what or difference(made, commands.whole)

    def other(what: str) -> Callable[[Path], str]:
        def case(out: Path) -> str:
            lone = alone / what.replace(" ", "_")
            if not lone.exists():
                assert start(commands(what, lone), alone / f"{lone.name}.said").wait() == 0
            wrong = both(commands(what, out), out)
            ours, theirs = files(out), files(lone)
            if what in ("compare", "demo"):  # whose figures, and so alpha, are not the same twice
                ours, theirs = ({name.partition("_alpha=")[0] for name in some} for some in (ours, theirs))
            return wrong or ("" if ours == theirs else f"{sorted(set(ours) ^ set(theirs))} differ")

        return case

    cases: dict[str, Callable[[Path], str]] = {
        "two new runs with one --name": named,
        "--resume latest of a run that is on": partial(resumed_while_on, commands),
        "two runs without a --name, in one second": unnamed,
    }
    names = (*COMMANDS, "wiseft --force")
    cases |= {f"two of flyp {what}": other(what) for what in names}
    for number, (fault, case) in enumerate(cases.items()):
        if only not in fault:
            continue
        often = times if "demo" not in fault and "compare" not in fault else 1
        wrong = [case(root / "cases" / f"{number}_{again}") for again in range(often)]
        yield counted(fault, wrong, "one is refused with the place, the other is as if alone")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--same-second"]:
        same_second(sys.argv[2:])
    with tempfile.TemporaryDirectory(prefix="flyp-both-") as folder:
        sys.exit(table(rows(Path(folder), 2, *sys.argv[1:] or [""])))
