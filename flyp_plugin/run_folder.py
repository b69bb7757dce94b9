"""A run's folder, logs/NAME, as open_clip lays it out: checked before a start, cleaned up after a killed run, locked.

    out.log, params.txt              open_clip's log and flags
    flyp.json                        what the checkpoints mean: record.py
    checkpoints/epoch_N.pt           weights and optimizer state
    checkpoints/results.jsonl        a line of metrics for each evaluation

openclip.py calls these functions around open_clip's main(), so that no run is overwritten, --resume latest never takes
a wrong or incomplete file, and no two processes write to one folder.
"""

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
from textwrap import shorten

import open_clip
import torch

from flyp_plugin import record
from flyp_plugin.errors import NO_ROOM, InputError
from flyp_plugin.model_spec import ModelSpec, is_place
from flyp_plugin.record import RESULTS, Record
from flyp_plugin.sources import write_atomically

LOCK = ".lock"  # in a folder that is being written to
_RECORDS = ("out.log", "params.txt", record.FILE)
_log = logging.getLogger(__name__)


def contains_run(folder: Path) -> bool:
    """Whether open_clip has started a run there."""
    return any((folder / name).exists() for name in _RECORDS)


def check_free(args: Namespace) -> None:
    """InputError if there is a run of this name and it is not to be resumed."""
    if not args.name or args.resume == "latest":  # without a name open_clip makes up a new one
        return
    folder = Path(args.logs, args.name)
    if contains_run(folder) or any(folder.glob("checkpoints/*")):
        raise InputError(
            f"{folder} already contains a run; choose another --name, or continue it with --resume latest."
        )


def find_newest(folder: Path) -> Path | None:
    """The checkpoint that --resume latest continues from. Cleans up after a killed run: partial files are deleted, and
    incomplete checkpoints renamed.

    Raises:
        InputError: a foreign file. open_clip would take the last .pt by name, whatever it is.
    """
    for path in folder.glob("checkpoints/.*.part"):  # written by checkpoints.atomic_path
        path.unlink()
    for path in sorted(folder.glob("checkpoints/**/*.pt")):
        if not zipfile.is_zipfile(path):  # torch writes a zip file, whose directory comes last
            aside = path.rename(path.with_suffix(".pt.incomplete"))
            _log.warning(f"{path} is incomplete and will not be used: it is now {aside}.")
        elif path.parent.name == "checkpoints" and not re.match(r"epoch_(\d+|latest)\.", path.name):
            raise InputError(
                f"{path} is not a checkpoint of this run, but --resume latest would take it; move it elsewhere."
            )
    return record.newest_checkpoint(folder)


def resumed_record(args: Namespace) -> Record | None:
    """The record of the run that --resume continues; None for a new run, or one without a record."""
    if args.resume == "latest":
        return record.read(Path(args.logs, args.name)) if args.name else None
    if record.is_sharded(args.resume or ""):
        return record.find(Path(args.resume).parent.parent)
    return record.find(args.resume or "")


def refuse_other_run(resumed: Record, args: Namespace, spec: ModelSpec) -> None:
    """InputError if the flags would change what the weights of the resumed run mean."""
    changed = [
        f"--{name} is {getattr(args, name)}, but the run was started with --{name} {resumed.get(name)}"
        for name in ("model", "objective")
        if resumed.get(name) != getattr(args, name)
    ]
    if changed := changed + resumed.spec.differences(spec):
        raise InputError(
            f"your flags would change what the weights of {resumed.folder} mean ({changed[0]}); leave them out, or start a "
            "new run with another --name."
        )


def refuse_other_start(resumed: Record | None, args: Namespace) -> None:
    """InputError if --pretrained is not what a resumed run started from, which is the teacher of --anchor."""
    given = args.pretrained or "not given"
    if resumed is None:  # a new run, or one without a record
        if args.pretrained or is_place(args.model) or args.resume == "latest":
            return
        said = f"the teacher of --anchor is what training started from, and --pretrained is {given}"
    else:
        before, now = resumed.get("pretrained", {}), record.describe_weights(args.pretrained)
        if record.identity(before) == record.identity(now):
            return
        said = f"the teacher of --anchor is what {resumed.folder} started from, {resumed.pretrained}"
        if resumed.pretrained == args.pretrained:
            raise InputError(f"{said}, and that file has changed (SHA-256) or is gone; restore it.")
        said += f", and --pretrained is {given}"
    raise InputError(f"{said}; give those weights with --pretrained.")


def refuse_other_optimizer(resumed: Record, args: Namespace) -> None:
    """InputError if the optimizer's state was saved in another form: with or without --fsdp, before or by open_clip 4."""
    if args.resume == "latest" and not any(Path(args.logs, args.name).glob("checkpoints/epoch_*")):
        return  # it starts over
    before, now = resumed.training.get("fsdp", False), getattr(args, "fsdp", False)
    versions = [resumed.get("versions", {}).get("open_clip", open_clip.__version__), open_clip.__version__]
    sides = {int(version.split(".")[0]) >= 4 for version in versions}
    if before != now:
        how = f"{'with' if before else 'without'} --fsdp"
    elif len(sides) > 1:  # open_clip 4 groups parameters otherwise
        how = f"with open_clip_torch {versions[0]}, and this is {versions[1]}"
    else:
        return
    raise InputError(
        f"the run in {resumed.folder} was started {how}, so that the state of its optimizer cannot be read; resume it as it "
        "was started, or start a new run from its weights with --pretrained."
    )


def write_record(now: Record, before: Record | None, folder: Path) -> None:
    """Write flyp.json. If a resumed run had other settings, its old file is kept and the changes are named."""
    others = record.differences(before, now) if before and before.folder == folder else {}
    if others:
        changes = ", ".join(
            f"--{name.replace('_', '-')} {shorten(str(after), 60)} ({shorten(str(was), 60)})"
            for name, (was, after) in others.items()
        )
        kept = _set_aside(folder / record.FILE)
        _log.warning(
            f"Settings changed since this run started (old values in brackets, kept in {kept}): {changes}."
        )
        if others.keys() & {"workers", "ranks", "batch_size"}:
            _log.warning("The batches, and so the weights, will differ from those of an uninterrupted run.")
    now.write(folder)


def _set_aside(path: Path) -> Path:
    """Rename a file to the first free name: results.jsonl to results.1.jsonl, ..."""
    names = (path.with_name(f"{path.stem}.{n}{path.suffix}") for n in count(1))
    return path.rename(next(name for name in names if not name.exists()))


def drop_results_after(epoch: int, folder: Path) -> None:
    """Remove from results.jsonl what a run resumed after `epoch` will write again, and a line that was cut off.

    open_clip evaluates before it saves, so a row may have no checkpoint. If none is left (epoch 0), the file is renamed.
    """
    results, epochs = folder / RESULTS, {}
    if not results.exists():
        return
    for line in results.read_text().splitlines(keepends=True):
        with suppress(ValueError):
            epochs[line] = json.loads(line).get("epoch", 0)
    if epoch == 0 and any(epochs.values()):
        _log.warning(f"The results of a run without checkpoints are now in {_set_aside(results)}.")
    write_atomically(results, "".join(line for line, number in epochs.items() if epoch and number <= epoch))


def remove_unstarted(folder: Path) -> None:
    """Delete what open_clip has written for a run that never started to train, so that its name stays free."""
    if not any(folder.glob("checkpoints/*")):
        for name in _RECORDS:
            (folder / name).unlink(missing_ok=True)
        for path in (folder / "checkpoints", folder / "tensorboard", folder):
            with suppress(OSError):  # it does not exist, or is not empty
                path.rmdir()


@contextmanager
def explain_errors(args: Namespace, rank: int) -> Iterator[None]:
    """InputError for a lost rank within the block, and, where the run's folder is written, for what forbids that."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        _log.debug(error, exc_info=True)  # shown with --debug
        if known := _explain(error, args, rank):
            raise known from error
        raise


def _explain(error: Exception, args: Namespace, rank: int) -> InputError | None:
    again = f"continue with --name {args.name} --resume latest" if args.name else "run the same command again"
    if isinstance(error, OSError):
        folder, path = Path(args.logs, args.name or ""), Path(str(error.filename))
        if error.errno in NO_ROOM or path.is_relative_to(folder) or folder.is_relative_to(path):
            return InputError(
                f"{folder} cannot be written to ({error.strerror}); make room and {again}, or choose another --logs."
            )
    # gloo's errors have no type of their own
    elif isinstance(error, getattr(torch.distributed, "DistError", ())) or "gloo" in str(error):
        reason = shorten(str(error), 200, placeholder=" ...")
        return InputError(
            f"rank {rank} has lost another rank ({reason}), which has ended or cannot be reached; look for that "
            f"rank's own error, fix it, and {again}."
        )
    return None


@contextmanager
def folder_lock(folder: Path, inherited: bool = True) -> Iterator[int]:
    """Hold a lock on a folder, which is created if need be, and deleted again if it stays empty.

    The lock ends with the process, however it is killed. On a filesystem without locks there is only a warning. (filelock
    has no public descriptor to pass on, and without locks leaves a file that outlives the process.)

    Args:
        inherited: whether child processes can hold the lock too, by its descriptor (`pass_fds`), so that one that
            outlives its killed parent is noticed.

    Raises:
        InputError: another process holds the lock, or the folder cannot be written to.
    """
    new, path, lock_file = not folder.exists(), folder / LOCK, fcntl.flock if inherited else fcntl.lockf
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = path.open("a")
    except OSError as error:
        raise InputError(f"{folder} cannot be written to ({error.strerror}); choose another one.") from None
    with lock:
        free = True
        try:
            lock_file(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = os.path.samestat(os.fstat(lock.fileno()), os.stat(path))  # else its last holder deletes it
        except (BlockingIOError, FileNotFoundError):
            free = False
        except OSError as error:
            _log.warning(f"{folder} cannot be locked ({error.strerror}); let nothing else write to it.")
        if not free:
            raise InputError(
                f"another process (perhaps left behind by a killed run) is writing to {folder}; wait for it or end it."
            )
        try:
            yield lock.fileno()
        finally:
            path.unlink(missing_ok=True)
            if new:
                with suppress(OSError):  # not empty
                    folder.rmdir()
