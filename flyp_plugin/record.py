"""flyp.json, the record of a run: what its checkpoints mean, so that no later command can get it wrong.

Training writes logs/NAME/flyp.json before its first step; `flyp wiseft` copies it beside merged weights and `flyp
export` into its folder. All values are as resolved, not as typed:

    format           1; a command refuses a format that it does not know
    model            open_clip's name of the model, or hf-hub: / local-dir: and a place
    model_cfg, preprocess_cfg
                     the model as in open_clip's open_clip_config.json: activation (quick_gelu), sizes; mean, std,
                     interpolation, resize_mode and size (pixels) of images in evaluation
    forced           the flags that made it another model than its name says, such as {"force_image_size": 336}
    model_config     path of the user's own configuration (--model-config), or null
    pretrained       {"given": tag or path, "sha256": of the file, null for a tag}: what training started from
    precision        open_clip's --precision, under which the run was evaluated
    objective        flyp, ce, lp, lp-ft or flyp-ce
    classnames, templates, descriptions
                     the prompts of the training set: class names in the order of the class indices, templates, and
                     {class name: [prompt, ...]} or null
    classes_given    which of the three were given by flags: evaluation sets may use them too, see evalsets.py
    eval_data        ["NAME=SHARDS", ...] as given; the first is the ID validation set
    keys             members of a sample: {"image_key", "label_key", "group_key"}
    training         every other flag that changes the weights, and the number of ranks: what --resume compares
    versions         of flyp_plugin, open_clip, timm and torch

Merged loose files have a record of the model alone: all but format, model, model_cfg, preprocess_cfg and versions may
be missing.
"""

import hashlib
import json
import os
import pickle
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from textwrap import shorten
from typing import Any

import open_clip
import timm
import torch

import flyp_plugin
from flyp_plugin.errors import InputError
from flyp_plugin.model_spec import FLAGS, ModelSpec
from flyp_plugin.prompts import ClassPrompts
from flyp_plugin.sources import write_atomically

FILE = "flyp.json"
FORMAT = 1
RESULTS = "checkpoints/results.jsonl"
_SHARDED = "_metadata_extra.pt"  # in a sharded checkpoint; written last
# flags that say where a run is, how it is watched and what it runs on, or that are elsewhere in the record
_NOT_TRAINING = re.compile(
    "resume.*|name|logs|.*_path|device|rank|local_rank|distributed|dist_.*|eval_data|val_.*|.*_frequency|report_to|"
    "wandb.*|tensorboard|log_.*|debug|save_.*|delete_.*|remote_.*|copy_codebase|retries|max_lost|.*_key|cache_dir|"
    "imagenet_.*|train_loss_ema_.*|fsdp_.*|demo|help_.*|no_flyp_defaults|model|model_config|pretrained|objective|precision|classnames|templates|prompts|"
    + "|".join(FLAGS)
)


@dataclass(frozen=True)
class Record:
    """The content of a flyp.json, and the folder where it was found (None: it is not written yet)."""

    content: Mapping[str, Any]
    folder: Path | None = None

    @property
    def spec(self) -> ModelSpec:
        model_cfg, preprocess_cfg = self.content["model_cfg"], self.content["preprocess_cfg"]
        return ModelSpec(self.content["model"], model_cfg, preprocess_cfg, self.get("forced", {}))

    @property
    def prompts(self) -> ClassPrompts | None:
        """The training set's prompts; None in a record of the model alone."""
        names = self.get("classnames")
        return ClassPrompts(names, self.content["templates"], self.get("descriptions")) if names else None

    def get(self, key: str, default: Any = None) -> Any:
        return self.content.get(key, default)

    @property
    def pretrained(self) -> str:
        return self.get("pretrained", {}).get("given", "")

    @property
    def training(self) -> Mapping[str, Any]:
        """The flags that change the weights (`training_settings`); empty in a record of the model alone."""
        return self.get("training", {})

    def write(self, folder: str | Path) -> None:
        """Write it into a folder, atomically."""
        write_atomically(Path(folder, FILE), json.dumps(self.content, indent=1, sort_keys=True) + "\n")


def describe_model(spec: ModelSpec) -> dict[str, Any]:
    """The part of a record that says what weights mean."""
    versions = {module.__name__: module.__version__ for module in (flyp_plugin, open_clip, timm, torch)}
    model = {name: getattr(spec, name) for name in ("model_cfg", "preprocess_cfg", "forced")}
    return {"format": FORMAT, "model": spec.name, **model, "versions": versions}


def describe_weights(pretrained: str) -> dict[str, str | None]:
    """The part of a record that says where weights came from: the tag or path, and the SHA-256 of a file."""
    return {"given": pretrained, "sha256": sha256(pretrained) if os.path.isfile(pretrained) else None}


def identity(described: Mapping[str, str | None]) -> str | None:
    """What tells weights from others: the SHA-256 of a file, else a tag."""
    return described.get("sha256") or described.get("given")


def sha256(path: str | os.PathLike) -> str:
    """The SHA-256 of a file in hex; of a file that has not changed, computed once."""
    file = os.stat(path)
    return _sha256(os.fspath(path), file.st_size, file.st_mtime_ns)


@lru_cache
def _sha256(path: str, size: int, modified: int) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def training_settings(args: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """The flags of a training that change its weights, as JSON has them."""
    settings = {name: value for name, value in args.items() if not _NOT_TRAINING.fullmatch(name)}
    return json.loads(json.dumps({**settings, **more}, default=str))


def read(folder: str | Path) -> Record | None:
    """The record in a folder, or None; InputError if the file is not a record, or is of a later format."""
    path = Path(folder, FILE)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not {"format", "model", "model_cfg", "preprocess_cfg"} <= content.keys():
            raise ValueError("it is not the record of a run")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, AttributeError) as error:  # AttributeError: it is not a dict
        raise InputError(f"{path} cannot be read ({error}); restore it from a copy, or delete it.") from None
    if content["format"] != FORMAT:
        raise InputError(f"{path} has format {content['format']}, not {FORMAT}; upgrade flyp-plugin.")
    return Record(content, Path(folder))


def find(weights: str | os.PathLike) -> Record | None:
    """The record that belongs to a run's folder, a checkpoint, merged weights or an export; None if there is none.

    InputError for a sharded checkpoint, which only training can read.
    """
    path = Path(weights)
    if not os.path.exists(weights):  # such as '' for a place's weights, though Path('') is the current folder
        return None
    refuse_sharded(path)
    folder = path if path.is_dir() else path.parent
    return read(folder) or (read(_above(folder)) if folder.absolute().name == "checkpoints" else None)


def differences(before: Record, now: Record) -> dict[str, tuple[Any, Any]]:
    """The training settings that have changed, as {flag: (before, now)}."""

    def settings(record: Record) -> dict[str, Any]:
        keys = {name: key for name, key in record.get("keys", {}).items() if name != "group_key"}
        others = {name: record.get(name) for name in ("classnames", "templates", "precision")}
        others |= {"prompts": record.get("descriptions"), "pretrained": record.pretrained}
        return {**record.training, **others, **keys}

    old, new = settings(before), settings(now)
    if (was := old["prompts"]) and (is_now := new["prompts"]):  # only the classes whose prompts have changed
        same = {name for name, texts in is_now.items() if was.get(name) == texts}
        old["prompts"], new["prompts"] = (
            {name: texts for name, texts in lists.items() if name not in same} for lists in (was, is_now)
        )
    names = sorted(old.keys() | new.keys())
    return {name: (old.get(name), new.get(name)) for name in names if old.get(name) != new.get(name)}


def check_same_model(records: Sequence[Record]) -> None:
    """InputError if weights that are to be merged are of different models."""
    for other in records[1:]:
        if found := records[0].spec.differences(other.spec):
            folders = f"{other.folder} and {records[0].folder}"
            raise InputError(f"{folders} are of different models ({found[0]}); merge runs of one model.")


def check_same_start(records: Sequence[Record]) -> None:
    """InputError if runs that are to be merged started from different weights, as far as their records say."""
    starts = [(known, start) for known in records if (start := known.get("pretrained"))]
    for known, start in starts[1:]:
        first, before = starts[0]
        if identity(start) != identity(before):
            pairs = ((first, before), (known, start))
            what = " and ".join(f"{one.folder} ({came['given'] or 'random'})" for one, came in pairs)
            raise InputError(f"{what} started from different weights; merge runs of one start.")


def _above(folder: Path) -> Path:
    return folder.parent if folder.name else Path("..")  # Path(".") has no name, and is its own parent


def is_sharded(path: str | os.PathLike) -> bool:
    """Whether it is a folder of parts, as open_clip 4 writes them with --fsdp-checkpoint sharded."""
    return bool(path) and Path(path, _SHARDED).is_file()


def how_to_join(path: Path) -> tuple[str, Path]:
    """The command that makes a file of a sharded checkpoint, in its run's folder, and that file."""
    folder = _above(path.parent) if path.absolute().parent.name == "checkpoints" else path.parent
    whole = folder / f"{path.name}.pt"
    command = "python -m torch.distributed.checkpoint.format_utils dcp_to_torch"
    return shlex.join([*command.split(), str(path), str(whole)]), whole


def refuse_sharded(path: Path) -> None:
    """InputError with the command that joins it, if it is a sharded checkpoint."""
    if is_sharded(path):
        command, whole = how_to_join(path)
        raise InputError(f"{path} is a sharded checkpoint; join it with `{command}` and give {whole}.")


def epochs(folder: Path) -> dict[int, Path]:
    """The checkpoints of a run by their epoch, in order."""
    paths = [*folder.glob("checkpoints/epoch_*.pt"), *_find_sharded(folder)]
    numbers = {path: path.stem.removeprefix("epoch_") for path in paths}
    return dict(sorted((int(number), path) for path, number in numbers.items() if number.isdecimal()))


def teacher_path(checkpoints: Path, epoch: int | str) -> Path:
    """Where the teacher of the trajectory (anchor.py) after an epoch is, in a run's checkpoints/."""
    return checkpoints / f"epoch_{epoch}.teacher.safetensors"


def is_teacher(path: str | os.PathLike) -> bool:
    """Whether a file is the teacher of the trajectory, by its name."""
    return str(path).endswith(teacher_path(Path(), "").name.removeprefix("epoch_"))


def teacher_of(checkpoint: Path) -> Path:
    """The teacher of the trajectory beside a checkpoint; InputError if there is none."""
    path = teacher_path(checkpoint.parent, _read_epoch(checkpoint))
    if not path.is_file():
        raise InputError(
            f"{checkpoint} has no teacher beside it ({path.name}), as training with --anchor-teacher trajectory writes it; "
            "check the path, or restore that file."
        )
    return path


def newest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of a run after the most epochs, by the number in the file, from which it is resumed, or None.

    open_clip goes by names: it prefers epoch_latest.pt, which is older than the others if the run was continued
    without --save-most-recent, and with that flag it looks for no other file. InputError if a file is no checkpoint.
    """
    found = {path: _read_epoch(path) for path in folder.glob("checkpoints/epoch_*.pt")}
    found |= {path: _read_epoch(path / _SHARDED) for path in _find_sharded(folder)}
    return max(found, key=lambda path: (found[path], path.name), default=None)  # of equals, epoch_latest.pt


def _find_sharded(folder: Path) -> list[Path]:
    return [path for path in folder.glob("checkpoints/epoch_*") if is_sharded(path)]


def _read_epoch(path: Path) -> int:
    try:
        return int(torch.load(str(path), map_location="cpu", weights_only=True, mmap=True)["epoch"])
    except (KeyError, TypeError, ValueError, RuntimeError, pickle.UnpicklingError) as error:
        problem = f"not a checkpoint of this run ({shorten(f'{type(error).__name__}: {error}', 150)})"
        raise InputError(
            f"{path} is {problem}, but --resume latest would use it; move it elsewhere."
        ) from None
