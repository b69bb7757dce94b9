"""`flyp export`: a folder that open_clip, or timm as a plain classifier, reads by its `local-dir:` name."""

import argparse
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import timm
import torch
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from PIL import Image
from safetensors.torch import save_file
from timm.data import create_transform
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import nn

from flyp_plugin.checkpoints import Model, refuse_existing, replacing, towers
from flyp_plugin.commands.flags import RUN, add_classes_flags, add_model_flags
from flyp_plugin.commands.targets import target_from_args
from flyp_plugin.errors import InputError
from flyp_plugin.heads import ImageClassifier
from flyp_plugin.learned import HEAD
from flyp_plugin.model_spec import PREPROCESSING, plain
from flyp_plugin.prompts import ClassPrompts, resolve_prompts
from flyp_plugin.record import Record, of_model
from flyp_plugin.sources import expand_source

# what an export has: configuration, weights, and what Hugging Face's tokenizers write
_WRITTEN = re.compile(
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
    add("--format", choices=["open_clip", "timm"], required=True)
    add("--out", required=True, metavar="DIR", help="the folder to write")
    # fmt: on


def run(args: argparse.Namespace) -> None:
    """`flyp export`: write the folder and say how to read it.

    Raises:
        InputError: a model that the format cannot hold, an output that exists, or a bad checkpoint.
    """
    out = Path(args.out)
    _refuse_other(out, args.force)
    target = target_from_args(args, args.checkpoint)
    prompts = _prompts(args, target.record) if args.format == "timm" else None
    model, config, tokenizer = (
        target.model(args, "fp32"),
        dict(target.spec.model_cfg),
        target.spec.tokenizer(),
    )
    learned = getattr(model, HEAD, None)
    if prompts is None and learned is not None:
        prompts = learned.class_prompts
    known = Record({**(target.record.content if target.record else {}), **of_model(target.spec)})
    if args.format == "open_clip":
        forced = target.spec.forced.get("force_image_size")
        if forced and isinstance(model.visual, TimmModel) and _other_size(model.visual.trunk):
            raise InputError(
                f"open_clip builds {config['vision_cfg']['timm_model_name']} at the image size of its name alone, and could "
                "not read weights that were trained at another; use --format timm."
            )
        with replacing_folder(out, args.force) as folder:
            save_open_clip(model, config, tokenizer, folder)
            known.write(folder)
        call = f"open_clip.create_model_and_transforms('local-dir:{out}')"
        if not hasattr(open_clip.factory, "parse_model_name"):
            call += f", from open_clip 3.0 on (this is {open_clip.__version__})"
        if learned is not None:
            _log.warning("The learned head stays behind: open_clip has no place for it; --format timm has.")
    else:
        if prompts is None:
            raise InputError(
                "a classifier needs its classes; give --data DIR, or --classnames and --templates."
            )
        classifier = ImageClassifier.from_model(model, tokenizer, prompts)
        twin, timm_config = to_timm_model(classifier, config)
        with replacing_folder(out, args.force) as folder:
            weights = {key: tensor.contiguous() for key, tensor in twin.state_dict().items()}
            save_file(weights, folder / "model.safetensors")
            (folder / "config.json").write_text(json.dumps(timm_config, indent=1) + "\n", encoding="utf-8")
            known.write(folder)
        call = f"timm (1.0.26 or newer), timm.create_model('local-dir:{out}', pretrained=True)"
    _log.info(f"Wrote {out}/: {', '.join(sorted(os.listdir(out)))}. Read it with {call}.")


def _prompts(args: argparse.Namespace, known: Record | None) -> ClassPrompts | None:
    """The classes of a timm classifier: by --data, or flags, else those that the run was trained on; None: not known."""
    if args.data:
        only_train = Path(args.data, "train").is_dir() and not Path(args.data, "test").is_dir()
        shards = expand_source(args.data, "train" if only_train else "test")
        return resolve_prompts(shards, args.classnames, args.templates)
    classnames, templates = (
        getattr(args, name) or (known and known.get(name)) for name in ("classnames", "templates")
    )
    return ClassPrompts.from_files(classnames, templates) if classnames and templates else None


def save_open_clip(model: Model, config: dict[str, Any], tokenizer: Any, folder: Path) -> None:
    """The model as open_clip's hub folders have it: configuration, weights, and any tokenizer files."""
    preprocess = {key: plain(model.visual.preprocess_cfg[key]) for key in PREPROCESSING}
    text = json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}, indent=1)
    (folder / "open_clip_config.json").write_text(text + "\n", encoding="utf-8")
    weights = {key: tensor.contiguous() for key, tensor in towers(model.state_dict()).items()}
    save_file(weights, folder / "open_clip_model.safetensors")
    if hasattr(tokenizer, "save_pretrained"):
        tokenizer.save_pretrained(folder)


@torch.no_grad()
def to_timm_model(classifier: ImageClassifier, config: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The image tower as a timm model, the head folded into its classifier, and timm's config.json of it.

    timm's classifier does not normalise the image feature, and logit_scale.exp() is left out: its logits are
    ours times (the feature's length / that scale). That is one positive factor an image: the ranking of the
    classes is ours, the probabilities are not.

    Args:
        classifier: in full precision.
        config: open_clip's configuration of the model.

    Raises:
        InputError: a tower or a preprocessing that timm does not have.
    """
    visual: Any = classifier.model.visual
    names = classifier.classnames
    vision = config["vision_cfg"]
    if isinstance(visual, TimmModel):
        architecture = vision["timm_model_name"].split(".")[0]
        model_args = {"global_pool": pool} if (pool := vision.get("timm_pool", "avg")) else {}
        if other_size := _other_size(visual.trunk):
            model_args["img_size"] = other_size
        weights, projection, bias = _timm_tower(visual)
    elif isinstance(visual, VisionTransformer) and visual.attn_pool is None and visual.proj is not None:
        architecture = "vit_base_patch16_clip_224"  # of any size: every measure is in the arguments
        model_args = {
            "img_size": visual.image_size[0],
            "patch_size": visual.patch_size[0],
            "embed_dim": vision["width"],
            "depth": vision["layers"],
            "num_heads": vision["width"] // vision.get("head_width", 64),
            "mlp_ratio": vision.get("mlp_ratio", 4.0),
            "act_layer": "quick_gelu" if config.get("quick_gelu") else "gelu",
        }
        weights, projection, bias = {}, visual.proj.T, None
    else:
        raise _no_twin(type(visual).__name__)
    try:
        twin: Any = timm.create_model(architecture, num_classes=len(names), **model_args).eval()
        name = twin.pretrained_cfg["classifier"]
        if not weights:  # open_clip's own tower, under timm's names by timm's own conversion
            native = {f"visual.{key}": tensor for key, tensor in visual.state_dict().items()}
            weights = checkpoint_filter_fn(native, twin)
        weight, bias = _folded(classifier.head, projection, bias)
        shape = twin.state_dict()[f"{name}.weight"].shape
        weights |= {f"{name}.weight": weight.reshape(shape), f"{name}.bias": bias}
        twin.load_state_dict(weights)
    except (RuntimeError, KeyError, TypeError, ValueError) as error:
        if str(error).startswith("CUDA"):  # of the device, not of the model
            raise
        raise _no_twin(f"{architecture}: {str(error).strip().splitlines()[-1].strip()[:200]}") from error
    preprocess = visual.preprocess_cfg
    size = preprocess["size"] if isinstance(preprocess["size"], (tuple, list)) else [preprocess["size"]] * 2
    pretrained_cfg = {
        "num_classes": len(names),
        "input_size": [3, *size],
        "pool_size": twin.pretrained_cfg.get("pool_size"),
        "fixed_input_size": twin.pretrained_cfg.get("fixed_input_size", False),
        "crop_pct": 1.0,
        "crop_mode": {"shortest": "center", "squash": "squash"}.get(preprocess["resize_mode"], "border"),
        "interpolation": "bilinear" if preprocess["interpolation"] == "bilinear" else "bicubic",
        "mean": list(preprocess["mean"]),
        "std": list(preprocess["std"]),
        "first_conv": twin.pretrained_cfg["first_conv"],
        "classifier": name,
    }
    _check_twin(classifier, twin, pretrained_cfg)
    return twin, {
        "architecture": architecture,
        "num_classes": len(names),
        "num_features": twin.num_features,
        "label_names": names,
        "model_args": model_args,
        "pretrained_cfg": pretrained_cfg,
    }


def _other_size(trunk: Any) -> list[int] | None:
    """[height, width] of the images that a tower's position embeddings are for, where these are not its name's."""
    size = getattr(getattr(trunk, "patch_embed", None), "img_size", None)
    return list(size) if size and tuple(size) != tuple(trunk.pretrained_cfg["input_size"][1:]) else None


def _timm_tower(visual: Any) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor | None]:
    """The trunk's weights without its classifier, and the projection (D, W) and bias that stand for it."""
    weights = dict(visual.trunk.state_dict())
    if set(visual.head._modules) <= {"drop", "proj"} and "proj" in visual.head._modules:
        return weights, visual.head.proj.weight, visual.head.proj.bias
    if len(visual.head):
        raise _no_twin("a timm tower with a head of open_clip's own")
    classifier = visual.trunk.get_classifier()
    if isinstance(classifier, nn.Linear):
        name = visual.trunk.pretrained_cfg["classifier"]
        return weights, weights.pop(f"{name}.weight"), weights.pop(f"{name}.bias", None)
    return weights, torch.eye(visual.trunk.num_features, device=next(visual.parameters()).device), None


def _folded(
    head: torch.Tensor, projection: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """head (D, C) after projection (D, W) and bias (D,) as the weight (C, W) and bias (C,) of one linear layer."""
    head = head.T.double()
    offset = head.new_zeros(len(head)) if bias is None else head @ bias.double()
    return (head @ projection.double()).float(), offset.float()


def _check_twin(classifier: ImageClassifier, twin: Any, pretrained_cfg: dict[str, Any]) -> None:
    """Compare with what was exported, so that no option of a tower that is unknown here can change it."""
    device = classifier.head.device
    _, height, width = pretrained_cfg["input_size"]
    images = torch.randn(4, 3, height, width, generator=torch.Generator().manual_seed(0)).to(device)
    ours = classifier.model.encode_image(images) @ classifier.head
    if not ours.isfinite().all():
        raise InputError(
            "the model's logits are no finite numbers: its training has diverged; take other weights."
        )
    if not torch.allclose(twin.to(device)(images), ours, rtol=1e-3, atol=1e-3 * ours.abs().max().item()):
        raise _no_twin("its options change the features in a way that timm's model of it has not")
    pixels = np.random.default_rng(0).integers(0, 256, (height + 7, 2 * width + 5, 3), dtype=np.uint8)
    keys = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")
    transform = create_transform(**{key: pretrained_cfg[key] for key in keys})
    if not torch.equal(transform(Image.fromarray(pixels)), classifier.preprocess(Image.fromarray(pixels))):
        mode = classifier.model.visual.preprocess_cfg["resize_mode"]
        raise InputError(
            f"timm has no preprocessing with the same pixels (resize mode {mode!r}); use --format open_clip."
        )


def _no_twin(what: str) -> InputError:
    return InputError(f"timm has no model of this image tower ({what}); use --format open_clip.")


def _refuse_other(path: Path, force: bool) -> None:
    """`refuse_existing`, and with `force` all but an empty folder and one with nothing but an export in it."""
    refuse_existing(path, force)
    if not path.exists():
        return
    names = sorted(os.listdir(path)) if path.is_dir() else [path.name]
    others = [name for name in names if not _WRITTEN.fullmatch(name) or (path / name).is_dir()]
    if others or (names and not any(name.endswith(".safetensors") for name in names)):
        raise InputError(
            f"{path} is no export ({(others or names)[0]}), so it is not written over, by --force neither; give another "
            "name."
        )


@contextmanager
def replacing_folder(path: Path, force: bool) -> Iterator[Path]:
    """Like `replacing`, for a folder; without `force` InputError where another export has made it meanwhile."""
    with replacing(path) as part:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        old = part.with_suffix(".old")
        try:
            yield part
            _refuse_other(path, force)
            if path.exists():
                os.replace(path, old)
        except BaseException:
            shutil.rmtree(part)
            raise
    shutil.rmtree(old, ignore_errors=True)
