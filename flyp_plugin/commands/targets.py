"""What `flyp eval`, `wiseft` and `export` are given, a run, a checkpoint or a tag, as weights and what they mean."""

import argparse
import logging
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from flyp_plugin import record
from flyp_plugin.checkpoints import Model, add_model_config, build_model, default_device, resolve
from flyp_plugin.errors import InputError
from flyp_plugin.model_spec import FLAGS, ModelSpec
from flyp_plugin.record import Record
from flyp_plugin.sources import IMAGE_KEY

_DEFAULTS = {"image_key": IMAGE_KEY, "label_key": "cls", "group_key": None, "precision": "fp32"}
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Target:
    """Weights that a command reads.

    Attributes:
        weights: a checkpoint's path or a tag; '' for the weights of an `hf-hub:` or `local-dir:` model.
        spec: the model that they belong to.
        record: of the run that they come from; None where nothing is known.
    """

    weights: str
    spec: ModelSpec
    record: Record | None

    def model(self, args: argparse.Namespace, precision: str | None = None) -> Model:
        """The model with these weights, on --device."""
        return build_model(self.spec, self.weights, precision or args.precision, device_of(args))


def target_from_args(args: argparse.Namespace, given: str) -> Target:
    """The weights that `given` and --epoch stand for; the record fills in the flags that are not given.

    Raises:
        InputError: a folder that is no run, a checkpoint that was deleted, or weights of which nothing says what they are.
    """
    known = find_record(given)
    weights = given
    if os.path.isdir(given):
        weights = str(choose_weights(known, given, args.epoch))
    elif getattr(args, "epoch", None):
        raise InputError(f"--epoch chooses among the checkpoints of a run, and {given} is one; leave it out.")
    fill_in(args, known)
    return Target(weights, spec_from_args(args, weights, known), known)


def find_record(given: str) -> Record | None:
    """The record of a run folder or of a checkpoint; a folder must have one."""
    known = record.find(given)
    if known is None and os.path.isdir(given):
        raise InputError(
            f"{given} is a folder without {record.FILE}, so it is no run of flyp train; give a checkpoint (checkpoints/"
            "epoch_N.pt) with its --model."
        )
    return known


def choose_weights(known: Record | None, given: str, epoch: str | None) -> Path:
    """`record.weights_in`, and says which weights these are."""
    assert known is not None  # noqa: S101 - find_record has seen to it
    path = record.weights_in(known, epoch)
    what = " (merged weights)" if epoch is None and "wise_ft" in path.name else ""
    _log.info(f"{given}: takes {os.path.relpath(path, known.folder)}{what}.")
    return path


def fill_in(args: argparse.Namespace, known: Record | None) -> None:
    """Give the flags that the user left out what the run was trained with, else their defaults."""
    kept = {**known.get("keys", {}), "precision": known.get("precision")} if known else {}
    for name, default in _DEFAULTS.items():
        if getattr(args, name, 0) is None:
            setattr(args, name, kept.get(name) or default)


def spec_from_args(args: argparse.Namespace, weights: str, known: Record | None) -> ModelSpec:
    """`resolve`, with the flags of these commands."""
    if args.model_config:
        add_model_config(args.model_config)
    spec = resolve(args.model, weights, {name: getattr(args, name) for name in FLAGS}, known)
    if known is None and not os.path.isfile(weights):
        _log.info(f"Model: {spec}.")
    return spec


def device_of(args: argparse.Namespace) -> str:
    """--device.

    Raises:
        InputError: torch cannot use it.
    """
    device = args.device or default_device()
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {device} cannot be used ({str(error).splitlines()[0]}).") from None
    return device
