"""An open_clip whose insides have changed: what the user is told when a function that the plugin replaces is not as it was.

    python -m tests.faults.seams

Each change is simulated in the installed open_clip_train, one at a time, and a small run started. Survived: one sentence
that names open_clip's version and the supported ones, no traceback, nothing trained on without the plugin, and
open_clip_train as it was afterwards.
"""

import contextlib
import io
import logging
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pytest import MonkeyPatch

from flyp_plugin import openclip
from flyp_plugin.errors import run
from flyp_plugin.train import train
from tests import digits

REPLACED = {name: place[0] for name, place in openclip.SEAMS.items()}


def module(name: str) -> Any:
    return import_module(f"open_clip_train.{name}")


def gone(place: str, name: str) -> Callable[[MonkeyPatch], None]:
    return lambda patch: patch.delattr(module(place), name)


def module_gone(name: str) -> Callable[[MonkeyPatch], None]:
    return lambda patch: patch.setitem(sys.modules, f"open_clip_train.{name}", None)


def becomes(place: str, name: str, made: Callable[[Callable], Callable]) -> Callable[[MonkeyPatch], None]:
    """`made` from the function that it was."""
    return lambda patch: patch.setattr(module(place), name, made(getattr(module(place), name)))


def passed_by(name: str) -> Callable[[MonkeyPatch], None]:
    """main() calls a copy of its own in place of the function of this name."""

    def change(patch: MonkeyPatch) -> None:
        main = module("main")
        code = main.main.__code__
        names = tuple(f"_{name}" if other == name else other for other in code.co_names)
        patch.setattr(main, f"_{name}", getattr(main, name), raising=False)
        patch.setattr(main.main, "__code__", code.replace(co_names=names))

    return change


def called_with(name: str, change: Callable[..., tuple[tuple, dict]]) -> Callable[[MonkeyPatch], None]:
    """main() calls the function of this name otherwise: `change` gives the new arguments and keywords."""

    def changed(patch: MonkeyPatch) -> None:
        main = module("main")
        passed_by(name)(patch)

        def call(*args: Any, **kwargs: Any) -> Any:
            new, words = change(*args, **kwargs)
            return getattr(main, name)(*new, **words)

        patch.setattr(main, f"_{name}", call)

    return changed


CHANGES: dict[str, Callable[[MonkeyPatch], None]] = {
    **{f"{place}.{name} is gone": gone(place, name) for name, place in REPLACED.items()},
    "params.parse_args is gone": gone("params", "parse_args"),
    "distributed.is_using_distributed is gone": gone("distributed", "is_using_distributed"),
    "data.DataInfo is gone": gone("data", "DataInfo"),
    "main.main is gone": gone("main", "main"),
    "the module train is gone": module_gone("train"),
    "the module main is gone": module_gone("main"),
    "train_one_epoch without epoch and state": becomes(
        "main", "train_one_epoch", lambda was: lambda model, data, loss, optimizer, args: None
    ),
    "get_data without tokenizer": becomes(
        "main", "get_data", lambda was: lambda args, preprocess_fns, epoch=0: was(args, preprocess_fns, epoch)
    ),
    "create_model_and_transforms takes a configuration": becomes(
        "main", "create_model_and_transforms", lambda was: lambda config: was(config.model)
    ),
    "evaluate takes a state": becomes("main", "evaluate", lambda was: lambda state, data, args: {}),
    "evaluate logs no zero-shot metrics": becomes("main", "evaluate", lambda was: lambda *args, **kwargs: {}),
    "zero_shot_eval takes two": becomes("train", "zero_shot_eval", lambda was: lambda model, data: {}),
    **{
        f"main() no longer calls {name}": passed_by(name)
        for name, place in REPLACED.items()
        if place == "main" and name != "get_data"  # open_clip's own then fails on our --train-data by itself
    },
    "main() calls train_one_epoch without data": called_with(
        "train_one_epoch", lambda model, data, *more, **words: ((model, {}, *more), words)
    ),
}  # fmt: skip


@contextlib.contextmanager
def changed(name: str) -> Iterator[None]:
    with MonkeyPatch.context() as patch:
        CHANGES[name](patch)
        yield


def started(data: Path, logs: Path) -> tuple[int, str]:
    """Exit status and what was written to stderr by a run of one epoch, evaluated."""
    argv = ["--model", "digits-vit", "--model-config", f"{data}/digits-vit.json", "--train-data", f"{data}"]
    argv += ["--eval-data", f"val={data}/test/0.tar", "--logs", f"{logs}", "--name", "run", "--device", "cpu"]
    argv += ["--workers", "0", "--epochs", "1", "--batch-size", "50", "--train-num-samples", "100"]
    written = io.StringIO()
    with contextlib.redirect_stderr(written):
        try:
            run(lambda: train(argv))
        except SystemExit as left:
            status = int(left.code or 0)
        except Exception as error:  # noqa: BLE001 (what a user would see as a traceback)
            status = -1
            written.write(f"Traceback: {error!r}")
    return status, written.getvalue()


def verdict(status: int, written: str) -> str | None:
    """What is wrong with how a run ended that could not be; None: nothing."""
    last = written.strip().splitlines()[-1] if written.strip() else ""
    if "Traceback" in written:
        return f"a traceback: {last}"
    if status != 1:
        return f"status {status}"
    here = re.escape(f"open_clip_torch {version('open_clip_torch')} ")
    if not re.fullmatch(rf"Error: {here}.*{re.escape(openclip.SUPPORTED)}.*", last):
        return f"another sentence: {last}"
    return None


def state() -> list[object]:
    return [getattr(module(place), name) for name, place in REPLACED.items()]


def main() -> int:
    rows, bad = [], 0
    with tempfile.TemporaryDirectory() as folder:
        data = digits.write(Path(folder, "data"))
        logging.disable(logging.INFO)
        for i, name in enumerate(CHANGES):
            before = state()
            with changed(name):
                status, written = started(data, Path(folder, str(i)))
            wrong = verdict(status, written)
            if state() != before:
                wrong = "open_clip_train is not as it was"
            bad += bool(wrong)
            seen = wrong or written.strip().splitlines()[-1].removeprefix("Error: ")
            rows.append([name, 1, int(not wrong), seen])
    for row in (["fault", "times", "survived", "what is seen"], ["---"] * 4, *rows):
        print("|", " | ".join(map(str, row)), "|")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
