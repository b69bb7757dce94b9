"""`flyp export`: a folder that open_clip, or timm as a plain classifier, loads by its `local-dir:` name; or an ONNX file."""

import argparse
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flyp_plugin.commands.flags import RUN, add_classes_flags, add_model_flags
from flyp_plugin.errors import InputError

if TYPE_CHECKING:
    from flyp_plugin.checkpoints import Model, StateDict
    from flyp_plugin.heads import ImageClassifier
    from flyp_plugin.prompts import ClassPrompts
    from flyp_plugin.record import Record

# what an export consists of: configuration, weights, and the files of Hugging Face's tokenizers
_EXPORTED = re.compile(
    r"flyp\.json|(open_clip_)?(config\.json|model\.safetensors)|.*(token|vocab|sentencepiece|spiece|merges).*\.(json|txt|model)"
)
_log = logging.getLogger(__name__)
EXAMPLE = """  flyp export logs/birds --format timm --out classifier"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    add_model_flags(parser)
    add_classes_flags(parser)
    add = parser.add_argument
    # fmt: off
    add("checkpoint", metavar="RUN", help=RUN)
    add("--data", metavar="DIR", help="the data whose classes the classifier gets (default: the run's training data)")
    add("--format", choices=["open_clip", "timm", "onnx"], required=True)
    add("--out", required=True, metavar="PATH", help="the folder to write; of onnx, the file")
    # fmt: on


def run(args: argparse.Namespace) -> None:
    """Write the folder or file and say how to load it; InputError if the format cannot hold the model."""
    import open_clip

    from flyp_plugin.heads import ImageClassifier
    from flyp_plugin.learned import HEAD
    from flyp_plugin.onnx_export import check_onnx_output
    from flyp_plugin.record import Record, describe_model
    from flyp_plugin.targets import target_from_args
    from flyp_plugin.timm_export import resized_to, to_timm_model

    out = Path(args.out)
    if args.format == "onnx":
        check_onnx_output(args.out, args.force)
    else:
        _check_output(out, args.force)
    target = target_from_args(args, args.checkpoint)
    spec, record = target.spec, target.record
    prompts = _resolve_classes(args, record) if args.format != "open_clip" else None
    model, model_cfg, tokenizer = target.model(args, "fp32"), dict(spec.model_cfg), spec.tokenizer
    learned = getattr(model, HEAD, None)
    if args.format == "open_clip":
        if spec.forced.get("force_image_size") and resized_to(model.visual):
            what = f"open_clip builds {model_cfg['vision_cfg']['timm_model_name']} only at its own image size"
            raise InputError(f"{what}, so it could not load weights of another size; use --format timm.")
        if learned is not None:
            _log.warning("open_clip has no place for a learned head: it is left out; --format timm keeps it.")
        write: Callable[[Path], None] = partial(save_open_clip, model, model_cfg, tokenizer)
        how = f"open_clip.create_model_and_transforms('local-dir:{out}') (open_clip 3.0 or newer; this is {open_clip.__version__})"
    else:
        prompts = prompts or (learned and learned.class_prompts)
        if prompts is None:
            raise InputError("a classifier needs classes; pass --data DIR, or --classnames and --templates.")
        classifier = ImageClassifier.from_model(model, tokenizer, prompts).eval()
        if args.format == "onnx":
            return save_onnx(classifier.cpu(), spec.name, args.out, args.force)
        timm_model, config = to_timm_model(classifier, model_cfg)
        write = partial(_save, timm_model.state_dict(), "model.safetensors", config, "config.json")
        how = f"timm.create_model('local-dir:{out}', pretrained=True) (timm 1.0.26 or newer)"
    with atomic_folder(out, args.force) as folder:
        write(folder)
        Record({**(record.content if record else {}), **describe_model(spec)}).write(folder)
    _log.info(f"Wrote {out}/: {', '.join(sorted(os.listdir(out)))}. Load it with {how}.")


def _resolve_classes(args: argparse.Namespace, record: "Record | None") -> "ClassPrompts | None":
    """The classes of a timm classifier: of --data or by flags, else those that the run was trained on."""
    from flyp_plugin.prompts import ClassPrompts, resolve_prompts
    from flyp_plugin.sources import expand_source

    if args.data:
        only_train = Path(args.data, "train").is_dir() and not Path(args.data, "test").is_dir()
        shards = expand_source(args.data, "train" if only_train else "test")
        return resolve_prompts(shards, args.classnames, args.templates, args.prompts)
    trained = record.content if record else {}
    lists = [args.templates, args.prompts]
    if not any(lists):
        lists = [trained.get("templates"), trained.get("descriptions")]
    classnames = args.classnames or trained.get("classnames")
    return ClassPrompts.from_files(classnames, *lists) if classnames and any(lists) else None


def save_onnx(classifier: "ImageClassifier", name: str, out: str, force: bool) -> None:
    """Write and check the file in a folder beside `out`, then move it there; InputError as `write_onnx` raises it."""
    from flyp_plugin.checkpoints import explain_write_errors, refuse_existing
    from flyp_plugin.onnx_export import check_onnx_output, weights_beside, write_onnx

    path = Path(os.path.abspath(out))
    with explain_write_errors(out):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
            files = write_onnx(classifier, name, Path(folder, path.name))
            check_onnx_output(out, force)  # another process may have made it meanwhile
            old = weights_beside(path)
            for file in files[:-1]:
                refuse_existing(path.with_name(file.name), force)
                _log.warning(
                    f"An ONNX file holds 2 GB: the weights are in {file.name}, which must stay beside it."
                )
            for file in files:
                os.replace(file, path.with_name(file.name))
            if old and len(files) == 1:
                old.unlink()
    _log.info(f"Wrote {out}. Load it with onnxruntime.InferenceSession('{out}').")


def save_open_clip(model: "Model", model_cfg: Mapping[str, Any], tokenizer: Any, folder: Path) -> None:
    """The model as open_clip's hub folders have it: configuration, weights, and any tokenizer files."""
    from flyp_plugin.checkpoints import drop_head
    from flyp_plugin.model_spec import PREPROCESSING, square_as_int

    preprocess_cfg = {key: square_as_int(model.visual.preprocess_cfg[key]) for key in PREPROCESSING}
    config = {"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg}
    weights = drop_head(model.state_dict())
    _save(weights, "open_clip_model.safetensors", config, "open_clip_config.json", folder)
    if hasattr(tokenizer, "save_pretrained"):
        tokenizer.save_pretrained(folder)


def _save(weights: "StateDict", weights_file: str, config: Mapping, config_file: str, folder: Path) -> None:
    from safetensors.torch import save_file

    save_file({key: tensor.contiguous() for key, tensor in weights.items()}, folder / weights_file)
    (folder / config_file).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def _check_output(path: Path, force: bool) -> None:
    """InputError if `path` exists; with `force`, if it is neither an empty folder nor purely an export."""
    from flyp_plugin.checkpoints import refuse_existing

    refuse_existing(path, force)
    if not path.exists():
        return
    names = sorted(os.listdir(path)) if path.is_dir() else [path.name]
    others = [name for name in names if not _EXPORTED.fullmatch(name) or (path / name).is_dir()]
    if others or (names and not any(name.endswith(".safetensors") for name in names)):
        why = f"it is not an export (it has {(others or names)[0]})"
        raise InputError(f"refusing to overwrite {path}, even with --force: {why}; choose another path.")


@contextmanager
def atomic_folder(path: Path, force: bool) -> Iterator[Path]:
    """`atomic_write` for a folder; without `force`, InputError if another process has made it meanwhile."""
    from flyp_plugin.checkpoints import atomic_write

    with atomic_write(path) as part:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        old = part.with_suffix(".old")
        try:
            yield part
            _check_output(path, force)
            if path.exists():
                os.replace(path, old)
        except BaseException:
            shutil.rmtree(part)
            raise
    shutil.rmtree(old, ignore_errors=True)
