"""flyp.json, the record of a run: what its checkpoints mean, so that no later command has to be told, or can get it wrong.

Training writes logs/NAME/flyp.json before its first step; `flyp wiseft` copies it beside merged weights and `flyp
export` into its folder. JSON, keys sorted, all values as resolved and not as typed:

    format           1; a command refuses a format that it does not know
    model            open_clip's name of the model, or hf-hub: / local-dir: and a place
    model_cfg, preprocess_cfg
                     the model as in open_clip's open_clip_config.json: activation (quick_gelu), sizes; mean, std,
                     interpolation, resize_mode and size (pixels) of images in evaluation
    forced           the flags that made it another model than its name says, such as {"force_image_size": 336}
    model_config     path of the user's own configuration (--model-config), or null
    pretrained       {"given": tag or path, "sha256": of the file, null for a tag}: what training started from
    precision        open_clip's --precision, under which the run was evaluated
    objective        what was trained: flyp, ce, lp, lp-ft or flyp-ce
    classnames, templates
                     of the training set, in the order of the class indices
    classes_given    which of the two were given by flags: those also serve evaluation sets that have no files of their own
    eval_data        ["NAME=SHARDS", ...] as given; the first is the ID validation set
    keys             members of a sample: {"image_key", "label_key", "group_key"}
    training         every other flag that changes the weights, and the number of ranks: what --resume compares
    versions         of flyp_plugin, open_clip, timm and torch

Merged loose files have a record of the model alone: all but format, model, model_cfg, preprocess_cfg and versions may
be missing.
"""

import hashlib
import json
import logging
import os
import pickle
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import timm
import torch

import flyp_plugin
from flyp_plugin.errors import InputError
from flyp_plugin.metrics import best
from flyp_plugin.model_spec import FLAGS, ModelSpec
from flyp_plugin.prompts import ClassPrompts
from flyp_plugin.sources import write_atomically

FILE = "flyp.json"
FORMAT = 1
RESULTS = "checkpoints/results.jsonl"
_MERGED = "wiseft"  # where `flyp wiseft` writes in a run
# flags that say where a run is, how it is watched and what it runs on, or that stand elsewhere in the record
_NOT_TRAINING = re.compile(
    "resume.*|name|logs|.*_path|device|rank|local_rank|distributed|dist_.*|(eval|val)_data|.*_frequency|report_to|"
    "wandb.*|tensorboard|log_.*|debug|save_.*|delete_.*|remote_.*|copy_codebase|retries|max_lost|.*_key|cache_dir|"
    "imagenet_.*|demo|help_.*|no_flyp_defaults|model|model_config|pretrained|objective|precision|classnames|templates|"
    + "|".join(FLAGS)
)
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Record:
    """The content of a flyp.json.

    Attributes:
        content: as in the file.
        folder: where it was found; None where it is not written yet.
    """

    content: Mapping[str, Any]
    folder: Path | None = None

    @property
    def spec(self) -> ModelSpec:
        keys = ("model", "model_cfg", "preprocess_cfg")
        name, model_cfg, preprocess_cfg = (self.content[key] for key in keys)
        return ModelSpec(name, model_cfg, preprocess_cfg, self.get("forced", {}))

    @property
    def prompts(self) -> ClassPrompts | None:
        """The training set's class names and templates; None in a record of the model alone."""
        if "classnames" not in self.content:
            return None
        return ClassPrompts(self.content["classnames"], self.content["templates"])

    def get(self, key: str, default: Any = None) -> Any:
        return self.content.get(key, default)

    @property
    def pretrained(self) -> str:
        return self.get("pretrained", {}).get("given", "")

    def write(self, folder: str | Path) -> None:
        """Write it into a folder, whole or not at all."""
        write_atomically(Path(folder, FILE), json.dumps(self.content, indent=1, sort_keys=True) + "\n")


def of_model(spec: ModelSpec) -> dict[str, Any]:
    """The part of a record that says what weights are."""
    modules = (flyp_plugin, open_clip, timm, torch)
    return {
        "format": FORMAT,
        "model": spec.name,
        "model_cfg": spec.model_cfg,
        "preprocess_cfg": spec.preprocess_cfg,
        "forced": spec.forced,
        "versions": {module.__name__: module.__version__ for module in modules},
    }


def source(pretrained: str) -> dict[str, str | None]:
    """What some weights came from: the tag or path, and the SHA-256 of a file."""
    return {"given": pretrained, "sha256": sha256(pretrained) if os.path.isfile(pretrained) else None}


def sha256(path: str | os.PathLike) -> str:
    with open(path, "rb") as stream:
        digest = hashlib.sha256()
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def training_settings(args: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """Those of a training's flags that change its weights, as JSON has them."""
    settings = {name: value for name, value in args.items() if not _NOT_TRAINING.fullmatch(name)}
    return json.loads(json.dumps({**settings, **more}, default=str))


def read(folder: str | Path) -> Record | None:
    """The record in a folder; None where there is none.

    Raises:
        InputError: it is not one, or is of a later format.
    """
    path = Path(folder, FILE)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}); restore it from a copy, or delete it.") from None
    if (
        not isinstance(content, dict)
        or not {"format", "model", "model_cfg", "preprocess_cfg"} <= content.keys()
    ):
        raise InputError(f"{path} is not the record of a run; restore it from a copy, or delete it.")
    if content["format"] != FORMAT:
        raise InputError(
            f"{path} has format {content['format']}, not {FORMAT}; install the newer flyp-plugin."
        )
    return Record(content, Path(folder))


def find(weights: str | os.PathLike) -> Record | None:
    """The record that belongs to a checkpoint, merged weights, an export, or a folder of a run; None where there is none."""
    path = Path(weights)
    folder = path if path.is_dir() else path.parent
    # '' are the weights of an hf-hub: or local-dir: model, and not the current folder, as which Path has it
    if not os.fspath(weights) or not path.exists():
        return None
    return read(folder) or (read(folder.parent) if folder.absolute().name == "checkpoints" else None)


def differences(before: Record, now: Record) -> dict[str, tuple[Any, Any]]:
    """The training settings that are other ones now, as {flag: (before, now)}."""
    old, new = before.get("training", {}), now.get("training", {})
    old, new = ({**some, **_lists(record)} for some, record in ((old, before), (new, now)))
    return {
        name: (old.get(name), new.get(name))
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    }


def _lists(record: Record) -> dict[str, Any]:
    lists = {name: record.get(name) for name in ("classnames", "templates")}
    keys = {name: key for name, key in record.get("keys", {}).items() if name != "group_key"}
    return {**lists, **keys, "precision": record.get("precision"), "pretrained": record.pretrained}


def epochs(folder: Path) -> dict[int, Path]:
    """The checkpoints of a run by their epoch, in order."""
    found = {}
    for path in folder.glob("checkpoints/epoch_*.pt"):
        if number := re.fullmatch(r"epoch_(\d+)\.pt", path.name):
            found[int(number[1])] = path
    return dict(sorted(found.items()))


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
    except (RuntimeError, pickle.UnpicklingError) as error:
        reason = str(error).strip().split("\n")[0][:150]
        raise InputError(f"{path} cannot be read as a checkpoint ({reason}); move it elsewhere.") from None


def best_epoch(folder: Path, first: str) -> int:
    """The epoch with the best top-1 on the set `first`; of equal ones the earliest.

    Raises:
        InputError: that set was not scored in training.
    """
    path = folder / RESULTS
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    figures = {row["epoch"]: row[f"{first}/top1"] for row in rows if row["epoch"] and f"{first}/top1" in row}
    if not figures:
        raise InputError(
            f"{path} has no figures of trained epochs, so none is the best; give --epoch last or a number."
        )
    return best(figures)


def weights_in(record: Record, epoch: str | None) -> Path:
    """The weights that a folder with a record stands for.

    Args:
        record: of a run, of merged weights or of an export for open_clip.
        epoch: 'last', 'best' (on the first evaluation set) or a number; None: the merged weights where there are some,
            else the last epoch.

    Raises:
        InputError: that checkpoint was deleted, or there is none.
    """
    folder = record.folder
    assert folder is not None  # noqa: S101 - records that are found have one
    there = epochs(folder)
    if epoch is None:
        merged = _merged(folder, there)
        if merged:
            return merged
    if epoch in (None, "last"):
        newest = newest_checkpoint(folder)
        if newest is None:
            raise InputError(f"{folder} holds no weights that this command reads; give a checkpoint's path.")
        return newest
    if epoch == "best":
        sets = [spec.partition("=")[0] for spec in record.get("eval_data", [])]
        if not sets:
            raise InputError(
                f"{folder} was trained without --eval-data, so no epoch is the best; give a number."
            )
        number, why = best_epoch(folder, sets[0]), f", the best on {sets[0]},"
    elif epoch.isdecimal():
        number, why = int(epoch), ""
    else:
        raise InputError(f"--epoch {epoch} is none of best, last and a number.")
    if number not in there:
        have = f"it has {', '.join(map(str, there))}" if there else "all are gone"
        raise InputError(
            f"the checkpoint of epoch {number}{why} is not in {folder}/checkpoints ({have}); choose another --epoch."
        )
    return there[number]


def _merged(folder: Path, there: Mapping[int, Path]) -> Path | None:
    """The weights at the alpha that `flyp wiseft` chose, in a run or in the folder that it wrote."""
    for place in (folder / _MERGED, folder):
        path = place / "wiseft.json"
        if path.exists():
            merge = json.loads(path.read_text(encoding="utf-8"))
            weights = place / merged_name(merge["chosen_alpha"])
            if there and max(there) > (merge.get("last_epoch") or max(there)):
                _log.warning(
                    f"{folder} was trained further after {path} was written; `flyp wiseft {folder} --force` merges its last "
                    "epoch, and --epoch last takes that as it is."
                )
            return weights if weights.exists() else None
    export = folder / "open_clip_model.safetensors"
    return export if export.exists() else None


def merged_name(alpha: float) -> str:
    return f"wise_ft_alpha={alpha:.2f}.pt"


def same_meaning(records: Sequence[Record]) -> None:
    """InputError where weights that are to be put together are of models that differ."""
    for other in records[1:]:
        found = records[0].spec.differences(other.spec)
        if found:
            raise InputError(
                f"{other.folder} and {records[0].folder} are of different models ({found[0]}); merge runs of one model."
            )
