"""A run's folder, logs/NAME, as open_clip lays it out: what is found there before a start, and mended after a stop."""

import fcntl
import json
import logging
import os
import re
import zipfile
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

from flyp_plugin import record
from flyp_plugin.errors import InputError
from flyp_plugin.model_spec import ModelSpec
from flyp_plugin.record import RESULTS, Record
from flyp_plugin.sources import is_url, write_atomically

LOCK = ".lock"  # in a folder that is written to
_RECORDS = ("out.log", "params.txt", record.FILE)
_log = logging.getLogger(__name__)


def has_begun(folder: Path) -> bool:
    """Whether open_clip has written there for a run."""
    return any((folder / name).exists() for name in _RECORDS)


def check_free(args: Namespace) -> None:
    """InputError where a run of this name is there and is not to be resumed, which open_clip says less well."""
    if not args.name or args.resume == "latest":  # without a name open_clip makes up a new one
        return
    folder = Path(args.logs, args.name)
    if has_begun(folder) or any(folder.glob("checkpoints/*.*")):
        raise InputError(
            f"there is a run in {folder}; choose another --name, or go on with it by --resume latest."
        )


def check_checkpoints(folder: Path) -> None:
    """InputError where open_clip would resume from what is not a run's own: of all files it takes the last by name."""
    others = [
        path
        for path in sorted(folder.glob("checkpoints/*.pt"))
        if not re.match(r"epoch_(\d+|latest)\.", path.name)
    ]
    if others:
        raise InputError(
            f"{others[0]} is no checkpoint of this run, but --resume latest would take it for one; move it elsewhere."
        )


def clear_up(folder: Path) -> None:
    """What a killed run left half-written goes, a checkpoint, which --resume latest would take, under another name."""
    for path in folder.glob("checkpoints/.*.part"):  # of checkpoints.atomic_path
        path.unlink()
    for path in sorted(folder.glob("checkpoints/**/*.pt")):
        if not zipfile.is_zipfile(path):  # torch writes a zip file, whose directory comes last
            aside = path.rename(path.with_suffix(".pt.incomplete"))
            _log.warning(f"{path} is incomplete and is left out: it is now {aside}.")


def resumed_record(args: Namespace) -> Record | None:
    """The record of the run that --resume goes on with; None of a new run, or one that has none."""
    if not args.resume or is_url(args.resume):
        return None
    if args.resume == "latest":
        return record.read(Path(args.logs, args.name)) if args.name else None
    return record.find(args.resume)


def refuse_other_run(resumed: Record, args: Namespace, spec: ModelSpec) -> None:
    """InputError where the flags make the weights of the run that is resumed mean something else."""
    others = [
        f"--{name} {resumed.get(name)} and not {getattr(args, name)}"
        for name in ("model", "objective")
        if resumed.get(name) != getattr(args, name)
    ]
    if others:
        raise InputError(
            f"the run in {resumed.folder} is one with {others[0]}; give another --name, or the flags that it was begun with."
        )
    if changed := resumed.spec.differences(spec):
        raise InputError(
            f"your flags would change what the weights of {resumed.folder} mean ({changed[0]}); leave them out, or start a "
            "run with another --name."
        )


def write_record(now: Record, before: Record | None, folder: Path) -> None:
    """Write flyp.json. Where a resumed run had other settings, they are kept in a file beside it, and named."""
    others = record.differences(before, now) if before and before.folder == folder else {}
    if others:
        changes = ", ".join(
            f"--{name.replace('_', '-')} {_short(after)} ({_short(was)})"
            for name, (was, after) in others.items()
        )
        kept = _set_aside(folder / record.FILE)
        _log.warning(f"Other settings than before (in brackets; all of those are now in {kept}): {changes}.")
        if others.keys() & {"workers", "ranks", "batch_size"}:
            _log.warning(
                "So the order of batches, and with it the weights, are not those of an uninterrupted run."
            )
    if not before and (folder / "params.txt").exists() and any(folder.glob("checkpoints/epoch_*.pt")):
        _log.warning(f"{folder} has no {record.FILE}, so its settings cannot be compared with these.")
    now.write(folder)


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) < 60 else f"{text[:50]}..."


def _set_aside(path: Path) -> Path:
    """Move a file to a name beside it that is free."""
    aside = next(
        new for n in count(1) if not (new := path.with_name(f"{path.stem}.{n}{path.suffix}")).exists()
    )
    return path.rename(aside)


def forget_after(epoch: int, folder: Path) -> None:
    """Take out of results.jsonl what a run that resumes after `epoch` will write again, and a line that was cut off.

    open_clip evaluates before it saves; and a run without a checkpoint starts with the evaluation of epoch 0: the
    figures that it has nevertheless are kept in another file.
    """
    results = folder / RESULTS
    if not results.exists():
        return
    rows = {}
    for line in results.read_text().splitlines(keepends=True):
        with suppress(ValueError):
            rows[line] = json.loads(line).get("epoch", 0)
    if epoch == 0 and any(rows.values()):
        aside = _set_aside(results)
        _log.warning(f"The figures of a run whose checkpoints are gone are now in {aside}.")
        rows = {}
    write_atomically(results, "".join(line for line, of in rows.items() if epoch and of <= epoch))


def say_where_it_starts(epoch: int, args: Namespace) -> None:
    """Of a run that is to be resumed from its latest checkpoint, which open_clip has found (epoch > 0) or not."""
    folder = Path(args.logs, args.name)
    if epoch == 0:
        _log.warning(f"There is no checkpoint in {folder} to resume: this run starts at the beginning.")
    elif epoch >= args.epochs:
        _log.info(
            f"The run in {folder} is finished: it has had {epoch} epochs, and --epochs is {args.epochs}."
        )


def withdraw(folder: Path) -> None:
    """Delete what open_clip has written for a run that did not come to train, so that its name stays free."""
    if any(folder.glob("checkpoints/*.*")):
        return
    for name in _RECORDS:
        (folder / name).unlink(missing_ok=True)
    for path in (folder / "checkpoints", folder / "tensorboard", folder):
        with suppress(OSError):  # there is none, or something in it
            path.rmdir()


@contextmanager
def folder_lock(folder: Path, inherited: bool = True) -> Iterator[int]:
    """Hold a lock on a folder, which is made where there is none and deleted where nothing is put into it.

    Args:
        inherited: commands that are given the file descriptor hold the lock too, so that one that outlives its killed
            parent is noticed. Else this process alone does, and none that it forks.

    Raises:
        InputError: it is held already, or the folder cannot be written to.
    """
    new, path = not folder.exists(), folder / LOCK
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.touch()
    except OSError as error:
        raise InputError(
            f"{folder} cannot be written to ({error.strerror}); choose another folder."
        ) from None
    with open(path, "a") as lock:
        try:
            (fcntl.flock if inherited else fcntl.lockf)(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = not os.path.samestat(os.fstat(lock.fileno()), os.stat(path))  # who held it deletes it
        except (BlockingIOError, FileNotFoundError):
            held = True
        except OSError as error:
            held = False
            _log.warning(f"{folder} cannot be locked ({error.strerror}); let nothing else write to it.")
        if held:
            raise InputError(
                f"another process, or a run that one left behind, is writing to {folder}; wait for it or end it."
            )
        try:
            yield lock.fileno()
        finally:
            path.unlink(missing_ok=True)
            if new:
                with suppress(OSError):  # there is something in it
                    folder.rmdir()
