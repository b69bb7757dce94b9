"""A run's folder, logs/NAME, as open_clip lays it out: what is found there before a start, and mended after a stop."""

import json
import logging
import pickle
import re
import zipfile
from argparse import Namespace
from contextlib import suppress
from itertools import count
from pathlib import Path

import torch

from flyp_plugin.checkpoints import read_state_dict
from flyp_plugin.errors import InputError
from flyp_plugin.flags import as_words
from flyp_plugin.sources import write_atomically

RESULTS = "checkpoints/results.jsonl"
_RECORDS = ("out.log", "params.txt")
# of params.txt: what says where a run is, how it is watched and on what it runs; all else changes its weights
_ANYTHING = re.compile(
    "resume.*|name|logs|.*_path|device|rank|local_rank|distributed|dist_.*|(eval|val)_data|.*_frequency|report_to|"
    "wandb.*|tensorboard|log_.*|debug|save_.*|delete_.*|remote_.*|copy_codebase|retries|max_lost|group_key|cache_dir|"
    "imagenet_.*|demo|help_.*|no_flyp_defaults"
)
_NEVER = ("model", "objective")  # their weights are others
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


def newest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of the most epochs in a run's folder, which a run is to be resumed from; None: there is none.

    How many epochs is what a checkpoint itself says. open_clip goes by names: it prefers epoch_latest.pt, which is
    older than the others where the run went on without --save-most-recent, and with that flag it knows no other file.
    A folder is a checkpoint too: open_clip 4's, in parts.

    Raises:
        InputError: a file there is not a checkpoint of a training.
    """
    found = {path: _epochs(path) for path in folder.glob("checkpoints/epoch_*.pt")}
    for path in folder.glob("checkpoints/epoch_*/_metadata_extra.pt"):  # which is written last
        found[path.parent] = _epochs(path)
    return max(found, key=lambda path: (found[path], path.name), default=None)  # of equals epoch_latest.pt


def _epochs(path: Path) -> int:
    try:
        return int(torch.load(str(path), map_location="cpu", weights_only=True, mmap=True)["epoch"])
    except (KeyError, TypeError, ValueError):
        raise InputError(
            f"{path} holds no number of epochs, so it is not a checkpoint of this run, but --resume latest would take "
            "it for one; move it elsewhere."
        ) from None
    except (RuntimeError, pickle.UnpicklingError):
        read_state_dict(path)  # says what is wrong with it
        raise


def clear_up(folder: Path) -> None:
    """What a killed run left half-written goes, a checkpoint, which --resume latest would take, under another name."""
    for path in folder.glob("checkpoints/.*.part"):  # those of checkpoints.replacing
        path.unlink()
    for path in sorted(folder.glob("checkpoints/**/*.pt")):
        if not zipfile.is_zipfile(path):  # torch writes a zip file, whose directory comes last
            aside = path.rename(path.with_suffix(".pt.incomplete"))
            _log.warning(f"{path} is incomplete and is left out: it is now {aside}.")


def check_settings(args: Namespace) -> None:
    """Compare a resumed run's settings with its params.txt, before open_clip writes that anew; warns of others.

    Raises:
        InputError: the weights could not be those of the run.
    """
    path = Path(args.logs, args.name, "params.txt")
    if not args.resume or not path.exists():
        return
    before = dict(re.findall(r"(?m)^(\w+): (.*)$", path.read_text(errors="replace")))
    others = {
        name: (before[name], str(value))
        for name, value in vars(args).items()
        if before.get(name, str(value)) != str(value) and not _ANYTHING.fullmatch(name)
    }
    for name in _NEVER:
        if name in others:
            then, now = others[name]
            raise InputError(
                f"the run in {path.parent} is one with --{name} {then} and not {now}; give another --name, or the "
                "flags that it was begun with."
            )
    if others:
        changes = ", ".join(
            f"{as_words({name: 1})[0]} {now} ({then})" for name, (then, now) in others.items()
        )
        kept = _set_aside(path)
        _log.warning(f"Other settings than before (in brackets; all of those are now in {kept}): {changes}.")


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
