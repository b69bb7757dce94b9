"""From what a user gives (a run, a checkpoint, a tag) to weights, the model they belong to, and the record of their run.

    given                     weights                         model, classes, evaluation sets
    logs/NAME                 by --epoch, see choose_weights  as in logs/NAME/flyp.json
    .../epoch_3.pt            the file                        as in the flyp.json beside it or one folder up
    loose.pt --model NAME     the file                        the model as its name says, with a warning
    openai --model NAME       downloaded by open_clip         the model as its tag says

Flags override all of this, with a warning if the record says otherwise. `flyp eval`, `wiseft` and `export` start at
`target_from_args`, training and ImageClassifier.from_checkpoint at `resolve_spec`.
"""

import argparse
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any

import open_clip

from flyp_plugin import record
from flyp_plugin.checkpoints import Model, build_model, default_device
from flyp_plugin.errors import InputError
from flyp_plugin.metrics import best
from flyp_plugin.model_spec import FLAGS, PREPROCESSING, ModelSpec, is_place, registry_name, tag_config
from flyp_plugin.record import RESULTS, Record
from flyp_plugin.sources import IMAGE_KEY

_DEFAULTS = {"image_key": IMAGE_KEY, "label_key": "cls", "group_key": None, "precision": "fp32"}
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Target:
    """Weights that a command reads, the model that they belong to, and the record of their run, if there is one."""

    weights: str  # a checkpoint's path or a tag; '' for the weights of an `hf-hub:` or `local-dir:` model
    spec: ModelSpec
    record: Record | None

    def model(self, args: argparse.Namespace, precision: str | None = None) -> Model:
        """The model with these weights, on --device."""
        return build_model(self.spec, self.weights, precision or args.precision, args.device)


def target_from_args(args: argparse.Namespace, given: str) -> Target:
    """The weights that `given` and --epoch stand for; the record fills in the flags that are not given."""
    known, weights = record.find(given), given
    if args.teacher:
        refuse_no_run(known, given)
    if known and os.path.isdir(given):
        weights = str(choose_weights(known, args.epoch or ("last" if args.teacher else None), args.teacher))
    elif args.epoch:
        raise InputError(f"--epoch chooses a checkpoint of a run, but {given} is not a run; leave it out.")
    return Target(weights, spec_from_args(args, weights, known), known)


def refuse_no_run(known: Record | None, given: str) -> None:
    """InputError if what is given with --teacher is not the folder of a run."""
    if not (known and known.folder and os.path.isdir(given) and (known.folder / "checkpoints").is_dir()):
        raise InputError(
            f"--teacher chooses a teacher of a run, but {given} is not a run's folder; give that, with --epoch N for an "
            "epoch, or give epoch_N.teacher.safetensors without --teacher."
        )


def choose_weights(run: Record, epoch: str | None, teacher: bool = False) -> Path:
    """The weights that a folder with a record stands for: of a run, of merged weights, or an export for open_clip.

    Args:
        run: as `record.find` returns it.
        epoch: 'last', 'best' or 'loss' (the highest top-1 or the lowest loss on the first evaluation set; of equal ones
            the earliest), or a number; None: the merged weights if there are any, else the last epoch.
        teacher: the trajectory's teacher beside that checkpoint (anchor.py).

    Raises:
        InputError: that checkpoint was deleted, there is none, or the first set was not scored.
    """
    folder, what = run.folder, "checkpoint"
    assert folder is not None  # noqa: S101 - records that are found have one
    saved = record.epochs(folder)
    if epoch in (None, "last"):
        path = (None if epoch else _merged_weights(folder, saved)) or record.newest_checkpoint(folder)
    else:
        number, why = _best_epoch(run, folder, epoch) if epoch in ("best", "loss") else (epoch, "")
        path, what = {str(one): path for one, path in saved.items()}.get(str(number)), f"epoch {number}{why}"
    if not (path or saved):
        raise InputError(f"{folder} has no checkpoint of a run; give a run's folder, or a file of weights.")
    if path is None:
        those = ", ".join(map(str, saved))
        raise InputError(
            f"{folder} has no {what}; pass --epoch best, loss, last or one of its own ({those})."
        )
    record.refuse_sharded(path)
    if teacher:
        path = record.teacher_of(path)
    _log.info(f"Using the weights {path}.")
    return path


def _merged_weights(folder: Path, saved: Mapping[int, Path]) -> Path | None:
    """The weights that `flyp wiseft` chose or merged, in a run or in the folder that it wrote; or an export's."""
    for place in (folder / "wiseft", folder):
        path = place / "wiseft.json"
        if path.exists():
            merge = json.loads(path.read_text(encoding="utf-8"))
            weights = place / merge["weights"]
            if saved and max(saved) > (merge.get("last_epoch") or max(saved)):
                said = f"{weights} was merged before {folder} was trained further"
                _log.warning(f"{said}; run `flyp wiseft {folder} --force`, or pass --epoch last.")
            return weights if weights.exists() else None
    export = folder / "open_clip_model.safetensors"
    return export if export.exists() else None


def _best_epoch(run: Record, folder: Path, epoch: str) -> tuple[int, str]:
    """The trained epoch with the highest top-1 ('best') or lowest 'loss' on the first evaluation set, and words that say so."""
    name, path = (run.get("eval_data") or [""])[0].partition("=")[0], folder / RESULTS
    metric, why = ("loss", "the lowest loss") if epoch == "loss" else ("top1", "the best")
    rows = map(json.loads, path.read_text().splitlines() if path.exists() else [])
    scores = {row["epoch"]: row[key] for row in rows if (key := f"{name}/{metric}") in row}
    if not scores.keys() - {0}:
        raise InputError(f"{path} has no scores to choose the best epoch by; pass --epoch last or a number.")
    chosen = best({number: score for number, score in scores.items() if number}, metric)
    if 0 in scores and best(scores, metric) == 0 and scores[0] != scores[chosen]:
        figures = f"{metric} {scores[0]:.4f} against {scores[chosen]:.4f}"
        _log.info(f"On {name}, zero-shot was better than epoch {chosen}, the best one trained ({figures}).")
    return chosen, f" ({why} on {name})"


def spec_from_args(args: argparse.Namespace, weights: str, known: Record | None) -> ModelSpec:
    """`resolve_spec` with a command's flags; other flags not given are set to the run's values, else to defaults."""
    trained = {**known.get("keys", {}), "precision": known.get("precision")} if known else {}
    for name, default in _DEFAULTS.items():
        if getattr(args, name, 0) is None:
            setattr(args, name, trained.get(name) or default)
    args.device = args.device or default_device()
    if args.model_config:
        add_model_config(args.model_config)
    spec = resolve_spec(args.model, weights, {name: getattr(args, name) for name in FLAGS}, known)
    if known is None and not os.path.isfile(weights):
        _log.info(f"Model: {spec}.")
    return spec


def add_model_config(path: str) -> None:
    """open_clip.add_model_config, which ignores a path that does not exist; that is an InputError here."""
    if not os.path.exists(path):
        raise InputError(f"there is no model configuration {path}; check --model-config.")
    open_clip.add_model_config(path)


def resolve_spec(
    model_name: str | None, pretrained: str, flags: Mapping[str, Any], known: Record | None = None
) -> ModelSpec:
    """The model of some weights: by the record beside them, else by the model's name and tag; flags override both.

    An override is logged, and so is what is assumed of a file without a record if the model has tags that differ.

    Args:
        model_name: None means the record's.
        pretrained: a tag, a checkpoint's path, or '' for the weights of an `hf-hub:` or `local-dir:` place.
        flags: open_clip's flags by name (model_spec.FLAGS); None means not given.
        known: the record to go by; None looks for the one beside the weights.

    Raises:
        InputError: no model name and no record, an unknown model or tag, or --force-quick-gelu against a GELU tag.
        TypeError: a name that is not such a flag.
    """
    if unknown := flags.keys() - set(FLAGS):
        raise TypeError(f"{min(unknown)} is none of {', '.join(FLAGS)}")
    known = known or record.find(pretrained)
    if known is None and model_name is None:
        raise InputError(f"{pretrained} has no {record.FILE}, as a run has; check the path, or pass --model.")
    if known and model_name in (None, known.spec.name):
        spec = known.spec.with_flags(flags)
    else:
        spec = ModelSpec.of(model_name or "", pretrained)
        tag = tag_config(spec.name, pretrained)
        if pretrained and not tag and not os.path.isfile(pretrained):
            tags = ", ".join(open_clip.list_pretrained_tags_by_model(registry_name(spec.name))) or "none"
            what = f"neither a file nor a pretrained tag of {spec.name} (its tags: {tags})"
            raise InputError(f"{pretrained} is {what}.")
        if flags.get("force_quick_gelu") and tag and not spec.quick_gelu:
            what = f"{pretrained} of {spec.name} was trained with GELU"
            raise InputError(f"{what}; leave out --force-quick-gelu.")
        spec = spec.with_flags(flags)
    if known:
        if changed := known.spec.differences(spec):
            _log.warning(f"Your flags override {known.folder}/{record.FILE}: {'; '.join(changed)}.")
    elif os.path.isfile(pretrained):
        _warn_of_assumptions(spec, pretrained, flags)
    return spec


def _warn_of_assumptions(spec: ModelSpec, path: str, flags: Mapping[str, Any]) -> None:
    """Say what a file without a record is taken for, if its model has tags with another activation or preprocessing."""
    tags = [] if is_place(spec.name) else open_clip.list_pretrained_tags_by_model(registry_name(spec.name))
    others = {tag: ModelSpec.of(spec.name, tag) for tag in tags}
    activation = [tag for tag, other in others.items() if other.quick_gelu != spec.quick_gelu]
    images = [tag for tag, other in others.items() if other.images != spec.images]
    hints = []
    if activation and not flags.get("force_quick_gelu"):
        flag = "GELU: --model without -quickgelu" if spec.quick_gelu else "QuickGELU: --force-quick-gelu"
        hints.append(f"{shorten(', '.join(activation), 60)} ({flag})")
    if images and any(flags.get(f"image_{name}") is None for name in PREPROCESSING):
        names = ", ".join(f"--image-{name.replace('_', '-')}" for name in PREPROCESSING)
        hints.append(f"{shorten(', '.join(images), 60)} (preprocessing: {names})")
    if hints:
        said = f"{path} has no {record.FILE}, so it is taken as {spec}"
        _log.warning(f"{said}. Tags that differ: {'; '.join(hints)}.")
