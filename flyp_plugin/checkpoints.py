"""Weights in and out: checkpoints read without running code, models built, files written whole or not at all.

There is one reader, `read_state_dict`: training, evaluation, merging and export take the same files, because open_clip's
own loader is given what this one has read. What the weights mean is model_spec.py's and record.py's.
"""

import difflib
import logging
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from open_clip.pretrained import download_pretrained_from_hf
from safetensors import SafetensorError
from safetensors.torch import load_file

from flyp_plugin import record
from flyp_plugin.errors import InputError
from flyp_plugin.learned import HEAD, load_head
from flyp_plugin.model_spec import FLAGS, ModelSpec, check_activation, is_place, other_tags, quiet

StateDict = Mapping[str, torch.Tensor]
Model = Any  # a CLIP model of open_clip: a torch.nn.Module whose attributes torch's own types would not allow
_OF_JAX = (".npz", ".npy")  # weights that open_clip reads and we do not
_OPENAI_SIZES = (
    "input_resolution",
    "context_length",
    "vocab_size",
)  # numbers beside the weights in OpenAI's files
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
    """The weights in a checkpoint (.pt of open_clip or of torch.save, .safetensors, OpenAI's TorchScript), on the CPU.

    Tensors of a .pt are mapped, not read: an optimizer state beside the weights costs nothing. A TorchScript archive is
    opened by torch.jit.load, which rebuilds its modules and calls none of their methods but __setstate__: an archive that
    defines one is refused, so nothing in it runs. The wrappers' prefixes in names (`module.` of DistributedDataParallel,
    `_orig_mod.` of torch.compile) and the three sizes that OpenAI keeps beside its weights are left out.

    Raises:
        InputError: no file, a truncated one, one with more than tensors in its pickle (nothing of it is run),
            one that holds no weights, or one with weights that are NaN or infinite.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"there is no checkpoint {path}; check the path.")
    try:
        if path.suffix == ".safetensors":
            content: object = load_file(path)
        elif _is_torchscript(path):
            content = _load_torchscript(path)
        else:
            content = _load_pickle(path)
    except pickle.UnpicklingError as error:
        name = re.search(r"GLOBAL (\S+)", str(error))
        what = f"more than tensors in it ({name[1]})" if name else "something other than tensors in it"
        raise InputError(
            f"{path} is refused: it has {what}, which could run code when it is read; save the state_dict "
            "alone."
        ) from None
    except (InputError, MemoryError):
        raise
    except Exception as error:  # noqa: BLE001 - the unpickler raises nearly anything on what is no pickle
        reason = str(error).strip().split("\n")[0][:150] or type(error).__name__
        raise InputError(f"{path} is not a whole checkpoint ({reason}); was its writing cut short?") from None
    weights = content.get("state_dict", content) if isinstance(content, dict) else None
    tensors = isinstance(weights, dict) and all(isinstance(v, torch.Tensor) for v in weights.values())
    if not isinstance(weights, dict) or not tensors or not weights:
        raise InputError(f"{path} holds no weights; give a state_dict, or a checkpoint of open_clip.")
    diverged = [
        key for key, value in weights.items() if value.is_floating_point() and not value.isfinite().all()
    ]
    if diverged:
        raise InputError(
            f"{path} has weights that are NaN or infinite (in {len(diverged)} of {len(weights)} tensors, first "
            f"{diverged[0]}): its training has diverged; take an earlier checkpoint."
        )
    plain = {re.sub(r"^(module\.|_orig_mod\.)+", "", key): value for key, value in weights.items()}
    return {key: value for key, value in plain.items() if key not in _OPENAI_SIZES}


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _load_torchscript(path: Path) -> dict[str, torch.Tensor]:
    with zipfile.ZipFile(path) as archive:
        code = (archive.read(name) for name in archive.namelist() if name.endswith(".py"))
        if any(b"__setstate__" in text for text in code):
            raise InputError(
                f"{path} is refused: it is a TorchScript archive that would run code when it is read; save its "
                "state_dict alone."
            )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch wants others to write archives of another kind
        return dict(torch.jit.load(str(path), map_location="cpu").state_dict())


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
    place = is_place(model_name)
    if not place and model_name.replace("/", "-") not in open_clip.list_models():
        near = difflib.get_close_matches(model_name, open_clip.list_models(), 1)
        hint = f"did you mean {near[0]}?" if near else "give its configuration with --model-config FILE."
        raise InputError(f"open_clip has no model {model_name}; {hint}")
    known = not pretrained or os.path.isfile(pretrained)
    if not known and (place or not open_clip.get_pretrained_cfg(model_name.replace("/", "-"), pretrained)):
        if os.path.isdir(pretrained):
            raise InputError(
                f"{pretrained} is a folder; give a checkpoint in it (a run's: checkpoints/epoch_N.pt)."
            )
        tags = open_clip.list_pretrained_tags_by_model(model_name)
        known_tags = f"its tags are {', '.join(tags)}" if tags else "it has no tags"
        raise InputError(
            f"there is no checkpoint {pretrained}, nor has {model_name} such weights ({known_tags})."
        )


def resolve(
    model_name: str | None, pretrained: str, flags: Mapping[str, Any], known: record.Record | None = None
) -> ModelSpec:
    """What weights mean: by the record beside them (or `known`), else by the model's name and tag; flags override both.

    An override that makes another model of what the record says is logged, as is what is assumed of weights about
    which nothing is known and whose model has tags that differ.

    Args:
        model_name: None takes the record's.
        pretrained: a tag, a checkpoint's path, or '' for the weights of an `hf-hub:` or `local-dir:` place.
        flags: open_clip's flags by name (model_spec.FLAGS); None is not given.

    Raises:
        InputError: no model name and no record; an unknown model or tag; a flag that contradicts a tag.
        TypeError: a name that is no such flag.
    """
    if unknown := flags.keys() - set(FLAGS):
        raise TypeError(f"{min(unknown)} is none of {', '.join(FLAGS)}")
    known = known or (record.find(pretrained) if pretrained else None)
    if known is None and model_name is None:
        if not os.path.exists(pretrained):
            raise InputError(
                f"there is no run or checkpoint {pretrained}; check the path, or give a tag's --model."
            )
        raise InputError(f"there is no {record.FILE} beside {pretrained} that says what it is; give --model.")
    if known is not None and model_name in (None, known.spec.name):
        spec = known.spec.with_flags(flags)
    else:
        check_names(model_name or "", pretrained)
        named = ModelSpec.of(model_name or "", pretrained)
        check_activation(named, pretrained, flags)
        spec = named.with_flags(flags)
    if known is not None:
        changed = known.spec.differences(spec)
        if changed:
            _log.warning(
                f"Other than {known.folder}/{record.FILE} says, by your flags: {'; '.join(changed)}."
            )
    elif os.path.isfile(pretrained):
        _say_what_is_assumed(spec, pretrained, flags)
    return spec


def _say_what_is_assumed(spec: ModelSpec, path: str, flags: Mapping[str, Any]) -> None:
    other = other_tags(spec)
    if flags.get("force_quick_gelu"):
        other.pop("GELU", None)
    if all(flags.get(name) is not None for name in FLAGS if name.startswith("image_")):
        other.pop("preprocessing", None)
    if not other:
        return
    change = {
        "QuickGELU": "QuickGELU: --force-quick-gelu",
        "GELU": "GELU: --model without -quickgelu",
        "preprocessing": "other preprocessing: --image-mean, --image-std, --image-interpolation, --image-resize-mode",
    }
    tags = "; ".join(
        f"{', '.join(tags[:3])}{' and others' if len(tags) > 3 else ''} ({change[what]})"
        for what, tags in other.items()
    )
    _log.warning(
        f"{path} has no {record.FILE}, so it is taken as {spec}. Weights of this model that differ: {tags}."
    )


def state_of_file(pretrained: str | None) -> dict[str, torch.Tensor]:
    """`read_state_dict` where `pretrained` is a file of PyTorch's; empty where it is a tag, JAX's, or nothing."""
    if not pretrained or not os.path.isfile(pretrained) or pretrained.endswith(_OF_JAX):
        return {}
    return read_state_dict(pretrained)


@contextmanager
def one_reader(read: Callable[[str], StateDict] | None = None) -> Iterator[None]:
    """Within it open_clip's load_checkpoint reads files by `read`, else by `read_state_dict`."""
    original = open_clip.factory.load_state_dict
    open_clip.factory.load_state_dict = lambda path, *args, **kwargs: (read or read_state_dict)(path)
    try:
        yield
    finally:
        open_clip.factory.load_state_dict = original


def load_model(
    model_name: str,
    pretrained: str | os.PathLike,
    precision: str = "fp32",
    device: str | torch.device = "cpu",
    **flags: Any,
) -> Model:
    """A CLIP model with weights, in eval mode, by open_clip's names: `build_model` of what `resolve` says.

    Args:
        model_name: open_clip's name, also `hf-hub:` or `local-dir:`.
        pretrained: a tag of that model, or a checkpoint's path.
        precision: as open_clip's --precision.
        flags: force_quick_gelu, force_image_size, image_mean, ... as in open_clip.create_model_and_transforms.

    Raises:
        InputError: an unknown model or tag, weights that cannot be read or downloaded, or another architecture's.
        TypeError: a keyword that is no such flag.
    """
    pretrained = os.fspath(pretrained)
    return build_model(resolve(model_name, pretrained, flags), pretrained, precision, device)


def build_model(
    spec: ModelSpec, pretrained: str, precision: str = "fp32", device: str | torch.device = "cpu"
) -> Model:
    """The model of `spec` with the weights of a tag or a file ('': of its place), in eval mode.

    A learned head in the file is the model's `class_head`.

    Raises:
        InputError: weights that cannot be read or downloaded, or another architecture's.
    """
    path = weights_file(spec, pretrained)
    state = state_of_file(path)
    head = load_head(state)
    preprocess_cfg = {key: value for key, value in spec.preprocess_cfg.items() if key != "size"}
    with quiet(logging.ERROR):  # it would warn of weights that are random
        model: Model = open_clip.create_model(
            spec.registered_name(),
            precision=precision,
            device=device,
            force_preprocess_cfg=preprocess_cfg,
            pretrained_hf=False,
        )
    expected, given = model.state_dict(), towers(state)
    # a timm tower is made at its own size, and weights that were trained at another are of that one
    resize = spec.forced.get("force_image_size") and getattr(model.visual, "set_input_size", None)
    at_size = any(
        key in given and given[key].shape != expected[key].shape for key in expected if "visual.trunk." in key
    )
    if resize and at_size:
        resize(model.visual.image_size)
    with quiet(), one_reader(lambda path: dict(given)):
        try:
            open_clip.load_checkpoint(model, path)
        except RuntimeError as error:
            if not str(error).startswith("Error(s) in loading state_dict"):
                raise
            difference = first_difference(expected, given)
            if difference is None:
                raise
            raise InputError(f"{pretrained} is not a checkpoint of {spec.name}: {difference}.") from None
    if resize and not at_size:
        resize(model.visual.image_size)
    _check_sizes(model, state, f"{pretrained} is of a {spec.name}", spec.forced)
    if head is not None:
        setattr(model, HEAD, head.to(device))
    return model.eval()


def _check_sizes(model: Model, state: StateDict, what: str, forced: Mapping[str, Any]) -> None:
    """InputError where open_clip has resized position embeddings and was not told to by its flags."""
    for key, tensor in model.state_dict().items():
        flag = "force_image_size" if key.startswith("visual.") else "force_context_length"
        if key in state and state[key].shape != tensor.shape:
            shapes = f"{key} is {tuple(state[key].shape)} and not {tuple(tensor.shape)}"
            if not forced.get(flag):
                raise InputError(
                    f"{what} of another size ({shapes}); give --{flag.replace('_', '-')} as in its training."
                )
            _log.warning(f"{what} of another size ({shapes}), and is resized.")


def towers(state: StateDict) -> dict[str, torch.Tensor]:
    """A state dict without its learned head: what open_clip reads."""
    return {key: tensor for key, tensor in state.items() if not key.startswith(f"{HEAD}.")}


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


def weights_file(spec: ModelSpec, pretrained: str) -> str:
    """The file of some weights: the checkpoint itself, or where open_clip keeps what it downloads of a tag or a place.

    Raises:
        InputError: it cannot be downloaded.
    """
    if os.path.isfile(pretrained):
        return pretrained
    try:
        if is_place(spec.name):
            kind, _, place = spec.name.partition(":")
            path = _file_in_folder(Path(place)) if kind == "local-dir" else download_pretrained_from_hf(place)
        else:
            path = open_clip.download_pretrained(
                open_clip.get_pretrained_cfg(spec.name.replace("/", "-"), pretrained)
            )
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise InputError(
            f"the weights {f'{pretrained} ' if pretrained else ''}of {spec.name} could not be downloaded ({reason}); check the network, or "
            "give a checkpoint's path."
        ) from error
    if not path:
        raise InputError(f"{spec.name} holds no weights; give a checkpoint's path.")
    return path


def _file_in_folder(folder: Path) -> str | None:
    if not hasattr(open_clip.factory, "_find_checkpoint_in_dir"):
        raise InputError(
            f"local-dir: names need open_clip 3.0 or newer, and this is {open_clip.__version__}."
        )
    return open_clip.factory._find_checkpoint_in_dir(folder)


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
