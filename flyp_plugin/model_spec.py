"""What a model's name and pretrained tag mean: architecture, activation and image preprocessing, as open_clip builds them.

A state_dict says none of this. A pretrained tag does: open_clip's registry states each tag's activation, mean, std,
interpolation and resize mode. open_clip 3.x only warns where a tag needs QuickGELU and the model's configuration says
GELU; here the tag decides, in every command. A run keeps the result in its record (record.py); targets.py finds the
spec of whatever a user gives.
"""

import hashlib
import json
import logging
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from textwrap import shorten
from typing import Any

import open_clip
from open_clip.pretrained import download_pretrained_from_hf
from open_clip.transform import PreprocessCfg, merge_preprocess_dict

from flyp_plugin.errors import InputError

PREPROCESSING = ("mean", "std", "interpolation", "resize_mode")  # of images; the flags are --image-...
FORCED = {  # open_clip's flags that change what a model is: the place in its configuration
    "force_quick_gelu": ("", "quick_gelu"),
    "force_image_size": ("vision_cfg", "image_size"),
    "force_context_length": ("text_cfg", "context_length"),
    "force_custom_text": ("", "custom_text"),
}
FLAGS = (*FORCED, *(f"image_{name}" for name in PREPROCESSING))


@dataclass(frozen=True)
class ModelSpec:
    """A model as open_clip builds it; the two configurations are those of open_clip's open_clip_config.json."""

    name: str  # of the architecture, or `hf-hub:` or `local-dir:` and a place
    model_cfg: Mapping[str, Any]  # with the activation and the sizes that are used
    preprocess_cfg: Mapping[str, Any]  # in evaluation: mean, std, interpolation, resize_mode, size, ...
    # the flags that made it another model than its name says, such as {"force_image_size": 336}
    forced: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, name: str, pretrained: str = "") -> "ModelSpec":
        """The spec of a name and one of its pretrained tags; a `pretrained` that is not a tag adds nothing.

        InputError for an unknown name, a place without a configuration, or a model without an image tower (CLAP).
        """
        if is_place(name):
            model_cfg, preprocess_cfg = _read_config(name)
        else:
            key = registry_name(name)
            model_cfg, preprocess_cfg = open_clip.get_model_config(key), tag_config(name, pretrained)
            if model_cfg is None:
                near = ", ".join(get_close_matches(key, open_clip.list_models(), 1)) or "--model-config FILE"
                raise InputError(f"open_clip has no model {name}; did you mean {near}?")
            # before 2.30 open_clip lists the tag under NAME-quickgelu instead of marking it; OpenAI's, not even that
            marked = preprocess_cfg.get("quick_gelu") or pretrained.lower() == "openai"
            if preprocess_cfg and (marked or open_clip.is_pretrained_cfg(f"{key}-quickgelu", pretrained)):
                model_cfg["quick_gelu"] = True
        if "vision_cfg" not in model_cfg:
            raise InputError(f"{name} is not an image-text model; choose another --model.")
        return cls(name, model_cfg, _complete(preprocess_cfg, model_cfg))

    @property
    def quick_gelu(self) -> bool:
        return bool(self.model_cfg.get("quick_gelu"))

    @property
    def activation(self) -> str:
        return "QuickGELU" if self.quick_gelu else "GELU"

    @property
    def images(self) -> dict[str, Any]:
        """mean, std, interpolation and resize_mode."""
        return {name: self.preprocess_cfg[name] for name in PREPROCESSING}

    def with_flags(self, flags: Mapping[str, Any]) -> "ModelSpec":
        """This model as open_clip's flags (FLAGS) change it; those that are None or False change nothing."""
        forced = {name: flags[name] for name in FORCED if flags.get(name)}
        model_cfg = deepcopy(dict(self.model_cfg))
        for flag, value in forced.items():
            part, key = FORCED[flag]
            (model_cfg[part] if part else model_cfg)[key] = square_as_int(value)
        images = {name: flags.get(f"image_{name}") for name in PREPROCESSING}
        preprocess_cfg = _complete(merge_preprocess_dict(dict(self.preprocess_cfg), images), model_cfg)
        return ModelSpec(self.name, model_cfg, preprocess_cfg, {**self.forced, **forced})

    def differences(self, other: "ModelSpec") -> list[str]:
        """How `other` differs from this model, in words such as 'mean 0.5 0.5 0.5, not 0 0 0'."""
        specs = (self, other)
        before, after = ({**_flatten(spec.model_cfg), "activation": spec.activation} for spec in specs)
        for key in self.preprocess_cfg.keys() - {"size"}:  # the model's image_size
            before[key], after[key] = self.preprocess_cfg[key], other.preprocess_cfg.get(key)
        keys = [key for key in sorted(before.keys() | after.keys()) if before.get(key) != after.get(key)]
        return [f"{key} {_format(after.get(key))}, not {_format(before.get(key))}" for key in keys]

    def __str__(self) -> str:
        images = ", ".join(
            f"{name} {_format(self.preprocess_cfg[name])}" for name in ("size", *PREPROCESSING)
        )
        return f"{self.name} with {self.activation}, images with {images}"

    def registered_name(self) -> str:
        """A name under which open_clip builds this model: its own, or a new one if that is another model there."""
        name = re.sub(r"[^\w.-]", "-", self.name)
        if open_clip.get_model_config(name) != self.model_cfg:
            text = json.dumps(self.model_cfg, sort_keys=True)
            name = f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
            if open_clip.get_model_config(name) is None:
                with tempfile.TemporaryDirectory() as folder:
                    path = Path(folder, f"{name}.json")
                    path.write_text(text, encoding="utf-8")
                    open_clip.add_model_config(path)
        return name

    @cached_property
    def tokenizer(self) -> Callable:
        """open_clip's tokenizer of this model: list of N texts -> int64 (N, context length)."""
        name = self.name if is_place(self.name) else self.registered_name()  # a place has tokenizer files
        length = self.model_cfg["text_cfg"].get("context_length")
        with quiet():
            return open_clip.get_tokenizer(name, context_length=length)


def is_place(name: str) -> bool:
    """Whether a model's name is the place of its configuration and weights."""
    return name.startswith(("hf-hub:", "local-dir:"))


def registry_name(name: str) -> str:
    """The name in open_clip's registry, which also takes ViT-B/32 for ViT-B-32."""
    return name.replace("/", "-")


def _read_config(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    (kind, _, place), file = name.partition(":"), "open_clip_config.json"
    try:
        path = download_pretrained_from_hf(place, filename=file) if kind == "hf-hub" else Path(place, file)
        config = json.loads(Path(path).read_text(encoding="utf-8"))
        return config["model_cfg"], config.get("preprocess_cfg", {})
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{name} has no valid {file} ({shorten(str(error), 200)}); check --model.") from None


def tag_config(name: str, tag: str) -> dict[str, Any]:
    """open_clip's registry entry of a model's pretrained tag; empty if there is none."""
    return {} if is_place(name) else open_clip.get_pretrained_cfg(registry_name(name), tag)


def _complete(preprocess_cfg: Mapping[str, Any], model_cfg: Mapping[str, Any]) -> dict[str, Any]:
    """All of open_clip's preprocessing options, with the model's image size."""
    size = model_cfg["vision_cfg"].get("image_size", 224)
    merged = merge_preprocess_dict(asdict(PreprocessCfg()), {**preprocess_cfg, "size": size})
    return {key: square_as_int(value) for key, value in merged.items()}


def square_as_int(value: Any) -> Any:
    """A value of a configuration as JSON has it: tuples as lists, and a size of [N, N] or [N] as N."""
    if isinstance(value, (tuple, list)):
        return value[0] if len(value) <= 2 and len(set(value)) == 1 else list(value)
    return value


def _flatten(model_cfg: Mapping[str, Any]) -> dict[str, Any]:
    """The towers' settings as vision_cfg.layers and so on, without the activation."""
    towers = {key: value for key, value in model_cfg.items() if isinstance(value, Mapping)}
    flat = {key: value for key, value in model_cfg.items() if key not in (*towers, "quick_gelu")}
    return flat | {f"{tower}.{key}": value for tower, cfg in towers.items() for key, value in cfg.items()}


def _format(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return " ".join(f"{part:.4g}" if isinstance(part, float) else str(part) for part in value)
    return str(value)


@contextmanager
def quiet(level: int = logging.WARNING) -> Iterator[None]:
    """Keep open_clip, which logs each step of building a model to the root logger, to messages of this level."""
    root = logging.getLogger()
    before = root.level
    root.setLevel(max(before, level))
    try:
        yield
    finally:
        root.setLevel(before)
