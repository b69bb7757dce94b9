"""Weights in and out: read a state_dict from any checkpoint, build a model with it, write files atomically.

There is one reader, `read_state_dict`, which runs no code from the file and refuses weights that are not finite.
Training, evaluation, merging and export accept the same files because open_clip's own loader is made to use it
(`use_reader`). model_spec.py says which model the weights belong to, and targets.py finds them.
"""

import errno
import logging
import os
import re
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from pickle import PROTO, UnpicklingError
from textwrap import shorten
from typing import Any

import numpy as np
import open_clip
import torch
from open_clip.pretrained import download_pretrained_from_hf
from safetensors import SafetensorError
from safetensors.torch import load_file

from flyp_plugin.errors import NO_ROOM, InputError
from flyp_plugin.learned import HEAD, load_head
from flyp_plugin.model_spec import ModelSpec, is_place, quiet, tag_config

StateDict = Mapping[str, torch.Tensor]
Model = Any  # a CLIP model of open_clip: torch's own types do not know its attributes
_PREFIXES = re.compile(r"^(module\.|_orig_mod\.)+")  # of DistributedDataParallel and torch.compile
_JAX = (".npz", ".npy")  # weights that only open_clip itself reads
_OPENAI_SIZES = {"input_resolution", "context_length", "vocab_size"}  # buffers in OpenAI's archives
# what the readers raise for truncated and damaged files, torch's format from before 1.6 included
_DAMAGED = (UnpicklingError, SafetensorError, RuntimeError, EOFError, LookupError, UnicodeError, struct.error)
_WRITE_ERRORS = (*NO_ROOM, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST)
_log = logging.getLogger(__name__)


def _allow_numpy_scalars(module: str) -> None:
    """Let torch.load(weights_only=True) read NumPy scalars: before 2.30 open_clip saved the learning rate as one."""

    def scalar(dtype: np.dtype, data: bytes) -> float:
        return np.frombuffer(data, dtype)[0].item()

    scalar.__module__, scalar.__qualname__ = module, "scalar"  # by which torch looks it up
    if hasattr(torch.serialization, "add_safe_globals"):  # torch >= 2.4
        torch.serialization.add_safe_globals([scalar, np.dtype, type(np.dtype("float64"))])


for _module in ("numpy.core.multiarray", "numpy._core.multiarray"):  # its names before and since NumPy 2
    _allow_numpy_scalars(_module)


def read_state_dict(
    path: str | os.PathLike, joined: bool = True, finite: bool = False
) -> dict[str, torch.Tensor]:
    """The weights in a checkpoint, on the CPU: .safetensors, a .pt of open_clip or torch.save, OpenAI's TorchScript.

    Tensors of a .pt are memory-mapped, so the optimizer state beside the weights costs nothing. Prefixes that wrappers
    add to names (`module.`, `_orig_mod.`) are removed, as are the three sizes in OpenAI's archives.

    Args:
        joined: whether the file may be one that was joined from a sharded checkpoint (record.py).
        finite: whether the weights are known to be finite, because another rank has looked.

    Raises:
        InputError: the file is missing, truncated, could run code when loaded, or has no weights or non-finite ones.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"there is no checkpoint {path}; check the path.")
    try:
        content = _load(path)
    except _DAMAGED as error:
        reason = shorten(str(error), 150) or type(error).__name__
        what = f"not a complete checkpoint ({reason}); it may be truncated, or a Git LFS pointer"
        if code := re.search(r"GLOBAL (\S+)", str(error)):
            what = f"refused because loading it could run code ({code[1]}); save only the state_dict"
        raise InputError(f"{path} is {what}.") from None
    weights = content.get("state_dict", content) if isinstance(content, dict) else None
    if isinstance(weights, dict) and isinstance(weights.get("model"), dict):
        if not joined:
            said = f"{path} was joined from a sharded checkpoint"
            raise InputError(f"{said}; resume that one, or give this as --pretrained.")
        weights = weights["model"]  # with scalars of shape (1,)
        weights |= {key: weights[key].reshape(()) for key in ("logit_scale", "logit_bias") if key in weights}
    if not weights or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise InputError(f"{path} has no weights in it; give a state_dict or a checkpoint of open_clip.")
    floats = {} if finite else {key: value for key, value in weights.items() if value.is_floating_point()}
    bad = [key for key, value in floats.items() if not value.isfinite().all()]
    if bad:
        raise InputError(
            f"{path} has non-finite weights (NaN or inf) in {len(bad)} of {len(weights)} tensors, first in {bad[0]}: "
            "its training diverged; use an earlier checkpoint."
        )
    named = {_PREFIXES.sub("", key): value for key, value in weights.items()}
    return {key: value for key, value in named.items() if key not in _OPENAI_SIZES}


def _load(path: Path) -> Any:
    if path.suffix == ".safetensors":
        return load_file(path)
    if not zipfile.is_zipfile(path):
        with open(path, "rb") as stream:
            if stream.read(1) != PROTO:
                raise EOFError("neither a zip archive nor a pickle")
        return torch.load(path, map_location="cpu", weights_only=True)  # from before torch 1.6
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        if not any(name.endswith("/constants.pkl") for name in names):  # which a TorchScript archive has
            return torch.load(str(path), map_location="cpu", weights_only=True, mmap=True)
        code = b"".join(archive.read(name) for name in names if name.endswith(".py"))
    if b"__setstate__" in code:  # torch.jit.load rebuilds the modules and calls no other method of theirs
        raise InputError(
            f"{path} is refused because loading this TorchScript archive would run its code; save only the state_dict."
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # TorchScript is deprecated
        return dict(torch.jit.load(str(path), map_location="cpu").state_dict())


def read_torch_file(pretrained: str | None) -> dict[str, torch.Tensor]:
    """`read_state_dict` of a file; empty for a tag, '', and JAX's files."""
    if not pretrained or not os.path.isfile(pretrained) or pretrained.endswith(_JAX):
        return {}
    return read_state_dict(pretrained)


def drop_head(state: StateDict) -> dict[str, torch.Tensor]:
    """A state_dict without its learned head: the towers, which is what open_clip reads."""
    return {key: tensor for key, tensor in state.items() if not key.startswith(f"{HEAD}.")}


def first_difference(expected: StateDict, given: StateDict) -> str | None:
    """The first tensor in which two state_dicts are of different architectures, as a phrase; None if they are not."""
    for key, tensor in expected.items():
        if key in given and given[key].shape != tensor.shape:
            return f"tensor {key} has shape {tuple(given[key].shape)}, not {tuple(tensor.shape)}"
    for one, other, what in ((expected, given, "is missing"), (given, expected, "is unexpected")):
        odd = [key for key in one if key not in other]
        if odd:
            return f"tensor {odd[0]} {what}" + (f" (and {len(odd) - 1} more)" if len(odd) > 1 else "")
    return None


@contextmanager
def use_reader(read: Callable[[str], StateDict]) -> Iterator[None]:
    """Make open_clip's load_checkpoint read files with `read` inside the block."""
    original = open_clip.factory.load_state_dict
    open_clip.factory.load_state_dict = lambda path, *args, **kwargs: read(path)
    try:
        yield
    finally:
        open_clip.factory.load_state_dict = original


def build_model(spec: ModelSpec, pretrained: str, precision: str = "fp32", device: Any = "cpu") -> Model:
    """The model of `spec` with the weights of a tag or a file ('' for those of its place), in eval mode.

    A learned head in the file becomes the model's `class_head`.

    Raises:
        InputError: the weights cannot be read or downloaded, are of another architecture, or of another size than
            the spec says, to which open_clip would resize them silently.
    """
    path = locate_weights(spec, pretrained)
    state = read_torch_file(path)
    head, towers = load_head(state), drop_head(state)
    images = {key: value for key, value in spec.preprocess_cfg.items() if key != "size"}
    name, options = spec.registered_name(), {"force_preprocess_cfg": images, "pretrained_hf": False}
    with quiet(logging.ERROR):  # it would warn that the weights are random
        model: Model = open_clip.create_model(name, precision=precision, device=device, **options)
    expected = model.state_dict()
    # A timm tower is built at its own image size. Weights that fit it are resized after loading; others were trained
    # at --force-image-size, to which the tower is resized first.
    resize = spec.forced.get("force_image_size") and getattr(model.visual, "set_input_size", None)
    trunk = [key for key in expected if "visual.trunk." in key and key in towers]
    fits = all(towers[key].shape == expected[key].shape for key in trunk)
    if resize and not fits:
        resize(model.visual.image_size)
    with quiet(), use_reader(lambda path: dict(towers)):
        try:
            open_clip.load_checkpoint(model, path)
        except RuntimeError as error:
            difference = first_difference(expected, towers)
            if difference is None or not str(error).startswith("Error(s) in loading state_dict"):
                raise
            raise InputError(f"{pretrained} is not a checkpoint of {spec.name}: {difference}.") from None
    if resize and fits:
        resize(model.visual.image_size)
    for key, tensor in model.state_dict().items():  # position embeddings may have been resized
        if key in state and state[key].shape != tensor.shape:
            flag = "force_image_size" if key.startswith("visual.") else "force_context_length"
            sizes = f"{key} has shape {tuple(state[key].shape)}, not {tuple(tensor.shape)}"
            said = f"{pretrained} is a {spec.name} of another size ({sizes})"
            if not spec.forced.get(flag):
                raise InputError(f"{said}; pass --{flag.replace('_', '-')} as in its training.")
            _log.warning(f"{said} and is resized.")
    if head is not None:
        setattr(model, HEAD, head.to(device))
    return model.eval()


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def locate_weights(spec: ModelSpec, pretrained: str) -> str:
    """The file with the weights: `pretrained` itself, or the download (else InputError) of its tag or its place."""
    if os.path.isfile(pretrained):
        return pretrained
    kind, _, place = spec.name.partition(":")
    try:
        if not is_place(spec.name):
            path = open_clip.download_pretrained(tag_config(spec.name, pretrained))
        elif kind == "hf-hub":
            path = download_pretrained_from_hf(place)
        else:  # local-dir: names need open_clip 3.0
            path = open_clip.factory._find_checkpoint_in_dir(Path(place))
    except (OSError, RuntimeError) as error:
        what = f"{pretrained} of {spec.name}" if pretrained else spec.name
        problem = f"the weights {what} could not be downloaded ({shorten(str(error), 160)})"
        raise InputError(f"{problem}; check the network, or give a checkpoint's path.") from error
    if not path:
        raise InputError(f"{spec.name} has no weights; give a checkpoint's path.")
    return path


def refuse_existing(path: str | os.PathLike, force: bool) -> None:
    """InputError if `path` already exists, unless --force is given."""
    if os.path.lexists(path) and not force:
        raise InputError(f"{path} already exists; choose another path or pass --force to overwrite it.")


@contextmanager
def explain_write_errors(path: str | os.PathLike) -> Iterator[None]:
    """InputError if the system refuses to write `path`, e.g. because the disk is full. Put only the writing inside.

    Other errors go through, such as a fault of the GPU that holds what is written.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        cause: BaseException | None = error
        while isinstance(cause, RuntimeError):  # torch.save raises one on top of the stream's OSError
            cause = cause.__context__
        found = re.search(r"(?:\[Errno |code: |os error )(\d+)", str(cause))  # OSError's and safetensors'
        if not found or int(found[1]) not in _WRITE_ERRORS:
            raise
        reason = os.strerror(int(found[1]))
        raise InputError(f"{path} could not be written ({reason}); any earlier file is unchanged.") from error


@contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path in the same folder, renamed to `path` when the block ends without an error.

    An error in the block is raised unchanged; wrap the parts that write in `explain_write_errors`. InputError if the
    folder cannot be made, or `path` cannot be replaced.
    """
    target = Path(os.path.abspath(path))  # so that '.' has a name
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        with explain_write_errors(path):
            target.parent.mkdir(parents=True, exist_ok=True)
        yield part
        with explain_write_errors(path):
            os.replace(part, target)
    finally:
        with suppress(NotADirectoryError):  # a file is in the way
            part.unlink(missing_ok=True)


@contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """`atomic_path` for a block that only writes: InputError if it cannot, and an earlier file is unchanged."""
    with atomic_path(path) as part, explain_write_errors(path):
        yield part


def save(content: object, path: str | os.PathLike) -> None:
    """torch.save, atomically; InputError as in `atomic_write`."""
    # to a stream, whose errors say why writing failed
    with atomic_write(path) as part, open(part, "wb") as stream:
        torch.save(content, stream)
