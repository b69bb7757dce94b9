"""An image classifier as a plain timm model, for `flyp export --format timm`.

The head is folded into the linear layer that ends a timm model, after the tower's own projection:

    logits = features @ weight.T + bias    with weight = head.T @ projection (C, W), bias = head.T @ its bias (C,)

timm does not normalise the image feature, and logit_scale.exp() is left out, so each image's logits are the classifier's
times one positive factor: the ranking of the classes is the same, the probabilities are not. An option of a tower that
is unknown here could change the features silently, so every result is compared with the classifier it came from.
"""

from typing import Any

import numpy as np
import timm
import torch
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from PIL import Image
from timm.data import create_transform
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import nn

from flyp_plugin.errors import InputError
from flyp_plugin.heads import ImageClassifier

# timm's, by open_clip's resize mode
_CROP_MODES = {"shortest": "center", "squash": "squash", "longest": "border"}


@torch.no_grad()
def to_timm_model(classifier: ImageClassifier, model_cfg: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """The image tower as a timm model with the head as its classifier, and the content of timm's config.json.

    Args:
        classifier: in full precision.
        model_cfg: open_clip's configuration of the model.

    Raises:
        InputError: timm has no such tower or preprocessing, or the weights give non-finite logits.
    """
    visual: Any = classifier.model.visual
    names, vision = classifier.classnames, model_cfg["vision_cfg"]
    weights: dict[str, torch.Tensor] = {}
    if isinstance(visual, TimmModel):
        architecture = vision["timm_model_name"].split(".")[0]
        model_args = {"global_pool": pool} if (pool := vision.get("timm_pool", "avg")) else {}
        model_args |= {"img_size": size} if (size := resized_to(visual)) else {}
        weights, projection, bias = _split_timm_tower(visual)
    elif isinstance(visual, VisionTransformer) and visual.attn_pool is None and visual.proj is not None:
        architecture = "vit_base_patch16_clip_224"  # of any size: the arguments give all dimensions
        model_args = {
            "img_size": visual.image_size[0],
            "patch_size": visual.patch_size[0],
            "embed_dim": vision["width"],
            "depth": vision["layers"],
            "num_heads": vision["width"] // vision.get("head_width", 64),
            "mlp_ratio": vision.get("mlp_ratio", 4.0),
            "act_layer": "quick_gelu" if model_cfg.get("quick_gelu") else "gelu",
        }
        projection, bias = visual.proj.T, None
    else:
        raise _unsupported(type(visual).__name__)
    try:
        model: Any = timm.create_model(architecture, num_classes=len(names), **model_args).eval()
        if not weights:  # open_clip's own tower: timm converts the names
            native = {f"visual.{key}": tensor for key, tensor in visual.state_dict().items()}
            weights = checkpoint_filter_fn(native, model)
        layer, head = model.pretrained_cfg["classifier"], classifier.head.T.double()
        weight = (head @ projection.double()).float()
        offset = head.new_zeros(len(head)) if bias is None else head @ bias.double()
        weights[f"{layer}.weight"] = weight.reshape(model.state_dict()[f"{layer}.weight"].shape)
        weights[f"{layer}.bias"] = offset.float()
        model.load_state_dict(weights)
    except (RuntimeError, KeyError, TypeError, ValueError) as error:
        if str(error).startswith("CUDA"):  # a fault of the device, not of the model
            raise
        raise _unsupported(f"{architecture}: {str(error).strip().splitlines()[-1].strip()[:200]}") from error
    preprocess, defaults = visual.preprocess_cfg, model.pretrained_cfg
    size = preprocess["size"]
    pretrained_cfg = {
        "num_classes": len(names),
        "input_size": [3, *(size if isinstance(size, (tuple, list)) else (size, size))],
        "pool_size": defaults.get("pool_size"),
        "fixed_input_size": defaults.get("fixed_input_size", False),
        "crop_pct": 1.0,
        "crop_mode": _CROP_MODES[preprocess["resize_mode"]],
        "interpolation": "bilinear" if preprocess["interpolation"] == "bilinear" else "bicubic",
        **{key: list(preprocess[key]) for key in ("mean", "std")},
        **{key: defaults[key] for key in ("first_conv", "classifier")},
    }
    _check_equal(classifier, model, pretrained_cfg)
    config = {"architecture": architecture, "num_classes": len(names), "num_features": model.num_features}
    return model, {**config, "label_names": names, "model_args": model_args, "pretrained_cfg": pretrained_cfg}


def resized_to(visual: Any) -> list[int] | None:
    """[height, width] of the images that a timm tower takes, if they are not of its name's size; else None."""
    trunk: Any = getattr(visual, "trunk", None)
    size = getattr(getattr(trunk, "patch_embed", None), "img_size", None)
    return list(size) if size and tuple(size) != tuple(trunk.pretrained_cfg["input_size"][1:]) else None


def _split_timm_tower(visual: Any) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor | None]:
    """The weights of the trunk without its classifier, and the projection (D, W) with its bias (D,) that follows it."""
    weights, head = dict(visual.trunk.state_dict()), visual.head
    if "proj" in head._modules and set(head._modules) <= {"drop", "proj"}:
        return weights, head.proj.weight, head.proj.bias
    if len(head):
        raise _unsupported("a timm tower with a head of open_clip's own")
    classifier = visual.trunk.get_classifier()
    if isinstance(classifier, nn.Linear):
        layer = visual.trunk.pretrained_cfg["classifier"]
        return weights, weights.pop(f"{layer}.weight"), weights.pop(f"{layer}.bias", None)
    return weights, torch.eye(visual.trunk.num_features, device=next(visual.parameters()).device), None


def _check_equal(classifier: ImageClassifier, model: nn.Module, pretrained_cfg: dict[str, Any]) -> None:
    """InputError if the timm model's logits, or the pixels of its preprocessing, are not the classifier's."""
    device = classifier.head.device
    _, height, width = pretrained_cfg["input_size"]
    images = torch.randn(4, 3, height, width, generator=torch.Generator().manual_seed(0)).to(device)
    expected = classifier.model.encode_image(images) @ classifier.head
    if not expected.isfinite().all():
        raise InputError("the model's logits are NaN or inf: its training diverged; use other weights.")
    tolerance = 1e-3 * expected.abs().max().item()
    if not torch.allclose(model.to(device)(images), expected, rtol=1e-3, atol=tolerance):
        raise _unsupported("its options change the features in a way that timm's does not")
    pixels = np.random.default_rng(0).integers(0, 256, (height + 7, 2 * width + 5, 3), dtype=np.uint8)
    keys = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")
    transform = create_transform(**{key: pretrained_cfg[key] for key in keys})
    if not torch.equal(transform(Image.fromarray(pixels)), classifier.preprocess(Image.fromarray(pixels))):
        mode = classifier.model.visual.preprocess_cfg["resize_mode"]
        raise InputError(f"timm preprocesses to other pixels (resize mode {mode}); use --format open_clip.")


def _unsupported(what: str) -> InputError:
    return InputError(f"timm has no model of this image tower ({what}); use --format open_clip.")
