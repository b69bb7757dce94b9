"""Which model some weights belong to: architecture, activation and image preprocessing, as open_clip builds it.

A state_dict says none of this. A pretrained tag does: open_clip's registry states each tag's activation, mean, std,
interpolation and resize mode. open_clip 3.x only warns where a tag wants QuickGELU and the model's configuration has
GELU; here the tag decides, in every command. Runs keep the result in their record (record.py).
"""

import hashlib
import json
import logging
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import open_clip
from open_clip.pretrained import download_pretrained_from_hf
from open_clip.transform import PreprocessCfg, merge_preprocess_dict

from flyp_plugin.errors import InputError

PREPROCESSING = ("mean", "std", "interpolation", "resize_mode")  # of images; the flags are --image-...
# open_clip's flags that change what a model is
FORCED = ("force_quick_gelu", "force_image_size", "force_context_length", "force_custom_text")
FLAGS = (*FORCED, *(f"image_{name}" for name in PREPROCESSING))
_PLACE = re.compile(r"(hf-hub|local-dir):(.+)")  # a name that says where configuration and weights are


@dataclass(frozen=True)
class ModelSpec:
    """A model as open_clip builds it; the two dicts have the form of open_clip's open_clip_config.json.

    Attributes:
        name: open_clip's name of the architecture, or `hf-hub:` or `local-dir:` and a place.
        model_cfg: its configuration, with the activation and the sizes that are used.
        preprocess_cfg: mean, std, interpolation, resize_mode and size (pixels) of evaluation, and open_clip's others.
        forced: the flags that made it another model than its name says, such as {"force_image_size": 336}.
    """

    name: str
    model_cfg: Mapping[str, Any]
    preprocess_cfg: Mapping[str, Any]
    forced: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, name: str, pretrained: str = "") -> "ModelSpec":
        """What a name and one of its pretrained tags mean; `pretrained` that is no tag adds nothing.

        Raises:
            InputError: the place of an `hf-hub:` or `local-dir:` name has no configuration, or the model sees no images (CLAP).
        """
        if is_place(name):
            config = _config_of_place(name)
            model_cfg, preprocess_cfg = config["model_cfg"], config.get("preprocess_cfg", {})
        else:
            model_cfg = open_clip.get_model_config(_clean(name))
            preprocess_cfg = open_clip.get_pretrained_cfg(_clean(name), pretrained)
            if _tag_has_quick_gelu(_clean(name), pretrained):
                model_cfg["quick_gelu"] = True
        if "vision_cfg" not in model_cfg:
            raise InputError(f"{name} is not a model of images and texts; choose another --model.")
        return cls(name, model_cfg, _preprocess_cfg(model_cfg, preprocess_cfg))

    @property
    def quick_gelu(self) -> bool:
        return bool(self.model_cfg.get("quick_gelu"))

    @property
    def context_length(self) -> int | None:
        return self.model_cfg["text_cfg"].get("context_length")

    def with_flags(self, flags: Mapping[str, Any]) -> "ModelSpec":
        """As open_clip's flags of these names change it; those that are None or False change nothing."""
        forced = {name: flags[name] for name in FORCED if flags.get(name)}
        model_cfg, preprocess_cfg = deepcopy(dict(self.model_cfg)), dict(self.preprocess_cfg)
        if forced.get("force_quick_gelu"):
            model_cfg["quick_gelu"] = True
        if size := forced.get("force_image_size"):  # a number, [number] or [height, width]
            one = isinstance(size, int) or len(size) == 1
            model_cfg["vision_cfg"]["image_size"] = (
                (size if isinstance(size, int) else size[0]) if one else list(size)
            )
        if length := forced.get("force_context_length"):
            model_cfg["text_cfg"]["context_length"] = length
        if forced.get("force_custom_text"):
            model_cfg["custom_text"] = True
        images = {name: flags.get(f"image_{name}") for name in PREPROCESSING}
        preprocess_cfg = _preprocess_cfg(model_cfg, merge_preprocess_dict(preprocess_cfg, images))
        return replace(
            self, model_cfg=model_cfg, preprocess_cfg=preprocess_cfg, forced={**self.forced, **forced}
        )

    def differences(self, other: "ModelSpec") -> list[str]:
        """What `other` is that this is not, in words: 'QuickGELU, not GELU', 'mean 0.5 0.5 0.5, not 0 0 0'."""
        found = []
        if self.quick_gelu != other.quick_gelu:
            found.append(f"{other.activation}, not {self.activation}")
        one, two = _flat(self.model_cfg), _flat(other.model_cfg)
        for key in sorted(one.keys() | two.keys()):
            if one.get(key) != two.get(key):
                found.append(f"{key} {_short(two.get(key))}, not {_short(one.get(key))}")
        for key, before in self.preprocess_cfg.items():
            if (now := other.preprocess_cfg.get(key)) != before and key != "size":  # which is the model's
                found.append(f"{key} {_short(now)}, not {_short(before)}")
        return found

    @property
    def activation(self) -> str:
        return "QuickGELU" if self.quick_gelu else "GELU"

    def __str__(self) -> str:
        images = ", ".join(f"{name} {_short(self.preprocess_cfg[name])}" for name in PREPROCESSING)
        return f"{self.name} with {self.activation}, images of {_short(self.preprocess_cfg['size'])} pixels with {images}"

    def registered_name(self) -> str:
        """A name under which open_clip builds this model: its own, or a new one where that means another model."""
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

    def tokenizer(self) -> Callable:
        """open_clip's tokenizer of this model: list of N texts -> int64 (N, context length)."""
        name = (
            self.name if is_place(self.name) else self.registered_name()
        )  # a place has its tokenizer's files
        with quiet():
            return open_clip.get_tokenizer(name, context_length=self.context_length)


def is_place(name: str) -> bool:
    """Whether a model's name says where its configuration and weights are."""
    return _PLACE.match(name) is not None


def check_activation(spec: ModelSpec, pretrained: str, flags: Mapping[str, Any]) -> None:
    """InputError where --force-quick-gelu contradicts a tag."""
    is_tag = not is_place(spec.name) and open_clip.get_pretrained_cfg(_clean(spec.name), pretrained)
    if flags.get("force_quick_gelu") and is_tag and not spec.quick_gelu:
        raise InputError(
            f"the weights {pretrained} of {spec.name} were trained with GELU; leave out --force-quick-gelu."
        )


def other_tags(spec: ModelSpec) -> dict[str, list[str]]:
    """The tags of a model whose activation or preprocessing is another than `spec`'s, by what is other."""
    found: dict[str, list[str]] = {}
    for tag in [] if is_place(spec.name) else open_clip.list_pretrained_tags_by_model(_clean(spec.name)):
        other = ModelSpec.of(spec.name, tag)
        if spec.quick_gelu != other.quick_gelu:
            found.setdefault(other.activation, []).append(tag)
        if any(spec.preprocess_cfg[name] != other.preprocess_cfg[name] for name in PREPROCESSING):
            found.setdefault("preprocessing", []).append(tag)
    return found


def _tag_has_quick_gelu(name: str, tag: str) -> bool:
    """open_clip before 2.30 has no mark on the tag, but lists it under the name's -quickgelu twin (OpenAI's always)."""
    cfg = open_clip.get_pretrained_cfg(name, tag)
    listed = bool(cfg) and (open_clip.is_pretrained_cfg(f"{name}-quickgelu", tag) or tag.lower() == "openai")
    return bool(cfg.get("quick_gelu")) or listed


def _config_of_place(name: str) -> dict[str, Any]:
    kind, place = _PLACE.match(name).groups()  # type: ignore[union-attr]
    try:
        if kind == "hf-hub":
            place = download_pretrained_from_hf(place, filename="open_clip_config.json")
        else:
            place = str(Path(place, "open_clip_config.json"))
        config = json.loads(Path(place).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0][:200]
        raise InputError(
            f"{name} has no readable open_clip_config.json ({reason}); check the name."
        ) from None
    if not isinstance(config, dict) or "model_cfg" not in config:
        raise InputError(f"{place} has no model_cfg, so {name} is no model of open_clip's; check the name.")
    return config


def _preprocess_cfg(model_cfg: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """open_clip's defaults, what is `given` over them, and the size of the model, as JSON has it."""
    size = model_cfg["vision_cfg"].get("image_size", 224)
    merged = merge_preprocess_dict(asdict(PreprocessCfg()), {**given, "size": size})
    return {key: plain(value) for key, value in merged.items()}


def plain(value: Any) -> Any:
    """Tuples as lists, and a square size as one number."""
    if isinstance(value, (tuple, list)):
        return value[0] if len(value) == 2 and value[0] == value[1] else list(value)
    return value


def _flat(model_cfg: Mapping[str, Any]) -> dict[str, Any]:
    """The towers' settings as vision_cfg.layers and so on; without the activation."""
    flat: dict[str, Any] = {}
    for key, value in model_cfg.items():
        flat |= {f"{key}.{k}": v for k, v in value.items()} if isinstance(value, Mapping) else {key: value}
    flat.pop("quick_gelu", None)
    return flat


def _short(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return " ".join(f"{part:.4g}" if isinstance(part, float) else str(part) for part in value)
    return str(value)


def _clean(name: str) -> str:
    return name.replace("/", "-")  # as open_clip does, for ViT-B/32


@contextmanager
def quiet(least: int = logging.WARNING) -> Iterator[None]:
    """open_clip logs each step of building a model to the root logger; keep its warnings only."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(max(level, least))
    try:
        yield
    finally:
        root.setLevel(level)
