"""Weights in and out: checkpoints read without running code, models built, files written whole or not at all.

Knows no objective: of what the weights are for, it knows that a learned head is beside the towers' weights.
"""

import difflib
import hashlib
import logging
import os
import pickle
import re
import textwrap
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from flyp_plugin.errors import InputError
from flyp_plugin.learned import HEAD, head_of

StateDict = Mapping[str, torch.Tensor]
Model = Any  # a CLIP model of open_clip: a torch.nn.Module whose attributes torch's own types would not allow
PREPROCESSING = ("mean", "std", "interpolation", "resize_mode")  # of images; flags have image_ before it
FORCED = ("force_image_size", "force_context_length", "force_custom_text")  # flags that make a model another
_SCHEMA = r"(hf-hub|local-dir):"  # names that are places
_OF_JAX = (".npz", ".npy")  # weights that open_clip reads and we do not
_log = logging.getLogger(__name__)


def _allow_numbers_of_numpy() -> None:
    """Let torch.load, open_clip's too, read them: the learning rate in a checkpoint of open_clip before 2.30 is one."""
    if not hasattr(torch.serialization, "add_safe_globals"):  # torch before 2.4
        return
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):  # numpy 1 and 2

        def scalar(dtype: np.dtype, data: bytes) -> float:
            return np.frombuffer(data, dtype)[0].item()

        scalar.__module__, scalar.__qualname__ = module, "scalar"
        torch.serialization.add_safe_globals([scalar, np.dtype, type(np.dtype("float64"))])


_allow_numbers_of_numpy()


def read_state_dict(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    """The weights in a checkpoint (.pt of open_clip or of torch.save, or .safetensors), on the CPU.

    Tensors of a .pt are mapped, not read: an optimizer state beside the weights costs nothing.

    Raises:
        InputError: no file, a truncated one, one with more than tensors in its pickle (nothing of it is run),
            one that holds no weights, or one with weights that are NaN or infinite.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"there is no checkpoint {path}; check the path.")
    try:
        content = load_file(path) if path.suffix == ".safetensors" else _load_pickle(path)
    except pickle.UnpicklingError as error:
        name = re.search(r"GLOBAL (\S+)", str(error))
        what = f"more than tensors in it ({name[1]})" if name else "something other than tensors in it"
        raise InputError(
            f"{path} is refused: it has {what}, which could run code when it is read; save the state_dict "
            "alone."
        ) from None
    except Exception as error:  # noqa: BLE001 - the unpickler raises nearly anything on what is no pickle
        if "TorchScript" in str(error):
            raise InputError(
                f"{path} is refused: it is a TorchScript archive; save its state_dict alone."
            ) from None
        reason = str(error).strip().split("\n")[0][:150] or type(error).__name__
        raise InputError(f"{path} is not a whole checkpoint ({reason}); was its writing cut short?") from None
    weights = content.get("state_dict", content) if isinstance(content, dict) else None
    tensors = isinstance(weights, dict) and all(isinstance(v, torch.Tensor) for v in weights.values())
    if not tensors or not weights:
        raise InputError(f"{path} holds no weights; give a state_dict, or a checkpoint of open_clip.")
    diverged = [
        key for key, value in weights.items() if value.is_floating_point() and not value.isfinite().all()
    ]
    if diverged:
        raise InputError(
            f"{path} has weights that are no finite numbers (in {len(diverged)} of {len(weights)} tensors, first "
            f"{diverged[0]}): its training has diverged; take an earlier checkpoint."
        )
    # the wrappers that DistributedDataParallel and torch.compile leave in the names
    return {re.sub(r"^(module\.|_orig_mod\.)+", "", key): value for key, value in weights.items()}


def _load_pickle(path: Path) -> object:
    try:
        return torch.load(str(path), map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:
        if "mmap can only be used" not in str(error):  # files from before torch 1.6
            raise
    return torch.load(path, map_location="cpu", weights_only=True)


def first_difference(expected: StateDict, given: StateDict) -> str | None:
    """What keeps two state dicts from being of one architecture, naming the first tensor; None: nothing."""
    for key, tensor in expected.items():
        if key in given and given[key].shape != tensor.shape:
            return f"tensor {key} has shape {tuple(given[key].shape)} and not {tuple(tensor.shape)}"
    for here, there, verb in ((expected, given, "is missing"), (given, expected, "has no counterpart")):
        odd = [key for key in here if key not in there]
        if odd:
            return f"tensor {odd[0]} {verb}" + (f" (and {len(odd) - 1} more)" if len(odd) > 1 else "")
    return None


def check_names(model_name: str, pretrained: str) -> None:
    """Look up a model's name, and the tag or the path of its weights ('' for none), without loading anything.

    Raises:
        InputError: open_clip knows no such model; no such file, nor a tag of that model.
    """
    schema = re.match(_SCHEMA, model_name)
    if not schema and model_name.replace("/", "-") not in open_clip.list_models():
        near = difflib.get_close_matches(model_name, open_clip.list_models(), 1)
        hint = f"did you mean {near[0]}?" if near else "give its configuration with --model-config FILE."
        raise InputError(f"open_clip has no model {model_name}; {hint}")
    known = not pretrained or os.path.isfile(pretrained)
    if not known and (schema or not open_clip.get_pretrained_cfg(model_name, pretrained)):
        if os.path.isdir(pretrained):
            raise InputError(
                f"{pretrained} is a folder; give a checkpoint in it (a run's: checkpoints/epoch_N.pt)."
            )
        tags = open_clip.list_pretrained_tags_by_model(model_name)
        known_tags = f"its tags are {', '.join(tags)}" if tags else "it has no tags"
        raise InputError(
            f"there is no checkpoint {pretrained}, nor has {model_name} such weights ({known_tags})."
        )


def state_of_file(pretrained: str | None) -> dict[str, torch.Tensor]:
    """`read_state_dict` where `pretrained` is a file of PyTorch's; empty where it is a tag, JAX's, or nothing."""
    if not pretrained or not os.path.isfile(pretrained) or pretrained.endswith(_OF_JAX):
        return {}
    return read_state_dict(pretrained)


def has_own_weights(model_name: str) -> bool:
    """Whether a model's name is a place that has its weights too."""
    return re.match(_SCHEMA, model_name) is not None


def load_model(
    model_name: str,
    pretrained: str | os.PathLike,
    precision: str = "fp32",
    device: str | torch.device = "cpu",
    **kwargs: Any,
) -> Model:
    """A CLIP model with weights, in eval mode: open_clip.create_model with its failures in one sentence.

    A learned head in the checkpoint is the model's `class_head`.

    Args:
        model_name: open_clip's name, also `hf-hub:` or `local-dir:`.
        pretrained: a tag of that model, or a checkpoint's path.
        precision: as open_clip's --precision.
        kwargs: passed through to open_clip.create_model.

    Raises:
        InputError: an unknown model or tag, weights that cannot be read or had, or another architecture's.
    """
    pretrained = os.fspath(pretrained)
    schema = has_own_weights(model_name)
    is_file = os.path.isfile(pretrained)
    check_names(model_name, pretrained)
    state = state_of_file(pretrained)
    head = head_of(state)
    kwargs = dict(kwargs, precision=precision, device=device)
    with _quiet(logging.WARNING if head is None else logging.ERROR):  # that there are no weights yet
        try:
            if head is not None:
                model = open_clip.create_model(model_name, pretrained_hf=False, **kwargs)
                _load_beside_head(model, pretrained)
                setattr(model, HEAD, head.to(device))
            else:
                tag = None if schema else pretrained
                model = open_clip.create_model(model_name, pretrained=tag, **kwargs)
                if schema:
                    open_clip.load_checkpoint(model, pretrained)
        except Exception as error:
            if not is_file:
                reason = textwrap.shorten(str(error), 160, placeholder=" ...")
                raise InputError(
                    f"the weights {pretrained} of {model_name} could not be had ({reason}); check the "
                    "network, or give a checkpoint's path."
                ) from error
            with _quiet(logging.ERROR):  # it would warn of weights that are random
                bare = open_clip.create_model(model_name, pretrained_hf=False, **kwargs)
            difference = first_difference(bare.state_dict(), towers(state))
            if difference is None:
                raise
            raise InputError(f"{pretrained} is not a checkpoint of {model_name}: {difference}.") from None
    _check_sizes(model, state, f"{pretrained} is of a {model_name}", kwargs)
    return model.eval()


def _check_sizes(model: Model, state: StateDict, what: str, kwargs: Mapping[str, Any]) -> None:
    """InputError where open_clip has resized position embeddings and was not told to by its flags."""
    for key, tensor in model.state_dict().items():
        flag = "force_image_size" if key.startswith("visual.") else "force_context_length"
        if key in state and state[key].shape != tensor.shape:
            shapes = f"{key} is {tuple(state[key].shape)} and not {tuple(tensor.shape)}"
            if not kwargs.get(flag):
                raise InputError(
                    f"{what} of another size ({shapes}); give --{flag.replace('_', '-')} as in its training."
                )
            _log.warning(f"{what} of another size ({shapes}), and is resized.")


def towers(state: StateDict) -> dict[str, torch.Tensor]:
    """A state dict without its learned head: what open_clip reads."""
    return {key: tensor for key, tensor in state.items() if not key.startswith(f"{HEAD}.")}


def _load_beside_head(model: Model, path: str) -> None:
    wrong = open_clip.load_checkpoint(model, path, strict=False)
    if wrong.missing_keys or any(not key.startswith(f"{HEAD}.") for key in wrong.unexpected_keys):
        raise RuntimeError(f"another architecture: {wrong}")


def load_tokenizer(model_name: str, context_length: int | None = None) -> Callable:
    """open_clip.get_tokenizer, without its log lines."""
    with _quiet():
        return open_clip.get_tokenizer(model_name, context_length=context_length)


def model_from_args(args: Namespace, pretrained: str, precision: str | None = None) -> Model:
    """`load_model` from the flags that `flyp eval`, `wiseft` and `export` share (cli.py)."""
    if args.model_config:
        add_model_config(args.model_config)
    device = args.device or default_device()
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {device} cannot be used ({str(error).splitlines()[0]}).") from None
    given = {name: getattr(args, f"image_{name}") for name in PREPROCESSING}
    given = {name: value for name, value in given.items() if value is not None}
    kwargs = {"force_quick_gelu": args.force_quick_gelu, "force_preprocess_cfg": given}
    kwargs |= {name: forced for name in FORCED if (forced := getattr(args, name))}
    size = kwargs.get("force_image_size")
    if size:
        kwargs["force_image_size"] = size[0] if len(size) == 1 else tuple(size)
    return load_model(args.model, pretrained, precision or args.precision, device, **kwargs)


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def add_model_config(path: str) -> None:
    """open_clip.add_model_config for a file or a folder of them.

    Raises:
        InputError: it is not there or not JSON.
    """
    if not os.path.exists(path):
        raise InputError(f"there is no model configuration {path}; check --model-config.")
    try:
        open_clip.add_model_config(path)
    except ValueError as error:
        raise InputError(f"{path} is not a model configuration in JSON ({error}).") from None


def weights_file(model_name: str, pretrained: str) -> str:
    """The file that `load_model` read: the checkpoint itself, or where open_clip keeps a tag's download."""
    if os.path.isfile(pretrained):
        return pretrained
    return open_clip.download_pretrained(open_clip.get_pretrained_cfg(model_name, pretrained))


def sha256(path: str | os.PathLike) -> str:
    with open(path, "rb") as stream:
        digest = hashlib.sha256()
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def refuse_existing(path: str | os.PathLike, force: bool) -> None:
    """InputError where `path` is there already and --force is not given."""
    if os.path.lexists(path) and not force:
        raise InputError(f"{path} is there already; give another name, or --force to write over it.")


@contextmanager
def writing(path: str | os.PathLike) -> Iterator[None]:
    """Within it, what keeps `path` from being written is one sentence. Put nothing but the writing in it.

    Told so are errors of the system that name no other file than `path` and what lies on the way to it, and
    safetensors' own form of them. Everything else, such as an error of the GPU that holds what is written, goes through.

    Raises:
        InputError: `path` could not be written, e.g. because the disk is full.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = _why_unwritten(error, Path(os.path.abspath(path)))
        if reason is None:
            raise
        raise InputError(
            f"{path} could not be written ({reason}); what was there before is untouched."
        ) from error


def _why_unwritten(error: OSError | SafetensorError, path: Path) -> str | None:
    """The system's reason, where the error is that `path` cannot be written; None where it is another."""
    if isinstance(error, SafetensorError):
        # in Rust's words: "IoError(Os { code: 28, ..." or, newer, "I/O error: ... (os error 28)"
        found = re.search(r"\b(?:code:|os error) (\d+)", str(error))
        return os.strerror(int(found[1])) if found else None
    if error.errno is None or isinstance(error, ConnectionError) or isinstance(error.filename, int):
        return None  # a library's own OSError, a network's, or one of a file descriptor
    if error.filename is not None:
        named = Path(os.path.abspath(os.fsdecode(error.filename)))
        if named not in (path, *path.parents) and _part_of(path) not in (named, *named.parents):
            return None
    return error.strerror


def _part_of(path: Path) -> Path:
    """Where the absolute `path` is written until it is whole."""
    return path.with_name(f".{path.name}.{os.getpid()}.part")


@contextmanager
def beside(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a path beside `path` to write to, which takes its place only once the block has ended well.

    An error in the block comes through as it is; `writing` is for the parts of it that write.

    Raises:
        InputError: the folder cannot be made, or `path` not replaced.
    """
    whole = Path(os.path.abspath(path))  # also of '.'
    part = _part_of(whole)
    try:
        with writing(path):
            whole.parent.mkdir(parents=True, exist_ok=True)
        yield part
        with writing(path):
            os.replace(part, whole)
    finally:
        with suppress(NotADirectoryError):  # part of the path is a file
            part.unlink(missing_ok=True)


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """`beside`, for a block that does nothing but write: what keeps it from that is told as by `writing`.

    Raises:
        InputError: it could not be written, e.g. because the disk is full; what was at `path` is untouched.
    """
    with beside(path) as part, writing(path):
        yield part


def save(content: object, path: str | os.PathLike) -> None:
    """torch.save, whole or not at all.

    Raises:
        InputError: it could not be written, e.g. because the disk is full; what was at `path` is untouched.
    """
    # into a stream, which can say why it fails
    with replacing(path) as part, open(part, "wb") as stream:
        try:
            torch.save(content, stream)
        except RuntimeError as error:  # which torch raises on top of the stream's, and for much else
            cause: BaseException | None = error
            while cause and not isinstance(cause, OSError):
                cause = cause.__context__
            if cause is None:
                raise
            raise cause from None


@contextmanager
def _quiet(least: int = logging.WARNING) -> Iterator[None]:
    """open_clip tells each step of building a model to the root logger; keep its warnings only."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(max(level, least))
    try:
        yield
    finally:
        root.setLevel(level)
