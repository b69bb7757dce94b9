"""Every (model, tag) entry of open_clip's registry through the commands of this plugin.

    python -m tests.registry                     the sample of tests/test_registry.py, from training to export
    python -m tests.registry --all               every entry; a table of them at the end, exit status 1 where one failed
    python -m tests.registry ViT-B-16 RN50:openai ViT-B-16-SigLIP:webli

What an entry means, its activation and its preprocessing, is read here from open_clip's own tables and nowhere else, so
that it is known by other means than those under test. Weights cannot be downloaded, so they are made on the spot: of
models with the registry's names, tags, image sizes and options (custom_text, pooling, tokenizers of Hugging Face, timm and
transformers towers), but with one or two layers of 64 numbers. The tags' entries are untouched.
"""

import argparse
import contextlib
import csv
import io
import json
import logging
import re
import shutil
import sys
import tempfile
import time
import traceback
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from unittest.mock import patch

import huggingface_hub
import open_clip
import timm
import torch
import transformers
from open_clip import factory, pretrained
from open_clip.hf_model import HFTextEncoder
from open_clip.timm_model import TimmModel
from open_clip.transformer import QuickGELU
from PIL import Image
from sklearn.datasets import load_digits
from timm.data import create_transform, resolve_model_data_config
from timm.models import _registry as timm_registry
from timm.models.vitamin import VitCfg, VitConvCfg
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn

from flyp_plugin import checkpoints, checks, openclip, record, shards, targets, train
from flyp_plugin.commands import call
from flyp_plugin.commands.export import save_open_clip
from flyp_plugin.data import LabelledDataset
from flyp_plugin.errors import InputError
from flyp_plugin.heads import ImageClassifier
from flyp_plugin.model_spec import ModelSpec, quiet
from flyp_plugin.sources import expand_source
from tests.digits import NAMES, TEMPLATES

IMAGES = ("mean", "std", "interpolation", "resize_mode")
# what open_clip takes where a tag says nothing: OpenAI's
_DEFAULTS = {
    "mean": [0.48145466, 0.4578275, 0.40821073],
    "std": [0.26862954, 0.26130258, 0.27577711],
    "interpolation": "bicubic",
    "resize_mode": "shortest",
}
_WIDTH = 64  # of every tower: heads of OpenAI's models have 64
_SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]  # the ids that RoBERTa and NLLB give them


def _sane(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.nan_to_num(0, 0, 0).clamp(-100, 100) if tensor.is_floating_point() else tensor


@dataclass(frozen=True)
class Entry:
    """A pretrained tag of a model, and what open_clip's tables say that it means."""

    name: str
    tag: str

    @property
    def config(self) -> dict:
        return deepcopy(factory._MODEL_CONFIGS[self.name])

    @property
    def of_tag(self) -> dict:
        return pretrained._PRETRAINED[self.name][self.tag]

    @property
    def quick_gelu(self) -> bool:
        """The mark of the tag or of the model; before open_clip 2.30, which has none on tags, what is listed says it."""
        marked = any("quick_gelu" in tag for tags in pretrained._PRETRAINED.values() for tag in tags.values())
        listed = self.tag == "openai" or self.tag in pretrained._PRETRAINED.get(f"{self.name}-quickgelu", {})
        of_tag = self.of_tag.get("quick_gelu", False) if marked else listed
        return bool(of_tag or self.config.get("quick_gelu", False))

    @property
    def images(self) -> dict:
        """mean, std, interpolation and resize mode."""
        of_tag = {key: self.of_tag[key] for key in IMAGES if self.of_tag.get(key)}
        of_tag |= {key: list(of_tag[key]) for key in ("mean", "std") if key in of_tag}
        return {**_DEFAULTS, **of_tag}

    @property
    def size(self) -> int:
        return self.config["vision_cfg"]["image_size"]

    @property
    def kind(self) -> str:
        """The family of its towers, its activation, and what of its preprocessing is not OpenAI's."""
        config = self.config
        vision, text = config["vision_cfg"], config["text_cfg"]
        if architecture := vision.get("timm_model_name"):
            tower = f"timm {re.split('[_0-9]', architecture)[0]}"
        else:
            tower = "ResNet" if isinstance(vision["layers"], list) else "ViT"
        words = [tower, "QuickGELU" if self.quick_gelu else "GELU"]
        words += [f"hf text {family(text['hf_model_name']).model_type}"] if "hf_model_name" in text else []
        words += ["hf tokenizer"] if "hf_tokenizer_name" in text and "hf_model_name" not in text else []
        words += (
            ["CoCa"] if "multimodal_cfg" in config else ["custom text"] if config.get("custom_text") else []
        )
        words += ["sigmoid"] if "init_logit_bias" in config else []
        words += [f"own {key}" for key in IMAGES if self.images[key] != _DEFAULTS[key]]
        return ", ".join(words)

    def __str__(self) -> str:
        return f"{self.name}:{self.tag}"


@dataclass(frozen=True)
class Place:
    """A model by an `hf-hub:` or `local-dir:` name, as `make_place` has written it.

    Attributes:
        name: with its prefix.
        config: model_cfg of its open_clip_config.json.
        images: preprocess_cfg of the same.
    """

    name: str
    config: dict
    images: dict
    tag = ""

    @property
    def quick_gelu(self) -> bool:
        return self.config.get("quick_gelu", False)

    @property
    def size(self) -> int:
        return self.config["vision_cfg"]["image_size"]

    def __str__(self) -> str:
        return self.name


def entries() -> list[Entry]:
    """All of the registry that are of images: open_clip 2.28 lists two tags without a model, and 4 has some of sounds."""
    known = {name for name, config in factory._MODEL_CONFIGS.items() if "vision_cfg" in config}
    return [
        Entry(name, tag) for name, tags in pretrained._PRETRAINED.items() if name in known for tag in tags
    ]


# small models of the registry's names


def family(hf_model_name: str) -> type:
    """The configuration's class of one of Hugging Face's text models that the registry has."""
    families = {
        "xlm-roberta": transformers.XLMRobertaConfig,
        "roberta": transformers.RobertaConfig,
        "nllb": transformers.M2M100Config,
        "mt5": transformers.MT5Config,
    }
    return next(config for part, config in families.items() if part in hf_model_name)


def shrunk(config: dict, folder: Path) -> dict:
    """A configuration with the same options, and towers of one layer and 64 numbers.

    Args:
        folder: for what Hugging Face's towers and tokenizers read.
    """
    config = deepcopy(config)
    vision, text = config["vision_cfg"], config["text_cfg"]
    config["embed_dim"] = _WIDTH
    if "timm_model_name" in vision:
        if vision["timm_model_name"] == "vit_base_mci_224" and vision.get("timm_proj") == "none":
            config["embed_dim"] = 768
    elif isinstance(vision["layers"], list):
        vision |= {"layers": [1, 1, 1, 1], "width": 4}
    else:
        vision |= {"layers": 1, "width": _WIDTH, "head_width": _WIDTH}
    if "hf_model_name" in text:
        text["hf_model_name"] = hf_model(text["hf_model_name"], folder)
    else:
        text |= {"layers": 1, "width": _WIDTH, "heads": 1}
    if "hf_tokenizer_name" in text:
        text["hf_tokenizer_name"] = hf_tokenizer(folder)
    if "hf_tokenizer_name" in text and "vocab_size" in text:
        text["vocab_size"] = len(vocabulary())
    if "multimodal_cfg" in config:
        config["multimodal_cfg"] |= {"layers": 1, "width": _WIDTH, "heads": 1}
    return config


def hf_model(name: str, folder: Path) -> str:
    """A folder with the configuration of a small text model of the same family."""
    config = family(name)
    sizes = {"vocab_size": len(vocabulary()), "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
    if config.model_type == "m2m_100":
        sizes |= {f"{side}_{what}": n for side in ("encoder", "decoder")
                  for what, n in (("layers", 1), ("attention_heads", 2), ("ffn_dim", _WIDTH))}  # fmt: skip
        sizes["d_model"] = _WIDTH
    elif config.model_type == "mt5":
        sizes |= {"d_model": _WIDTH, "d_kv": 32, "d_ff": _WIDTH, "num_layers": 1, "num_heads": 2}
    else:
        sizes |= {"hidden_size": _WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2}
        sizes |= {"intermediate_size": _WIDTH, "max_position_embeddings": 100}
    path = folder / "hf" / name.replace("/", "-")
    config(**sizes).save_pretrained(path)
    return str(path)


@cache
def vocabulary() -> dict[str, int]:
    """The words of the digits' prompts."""
    words = {word for template in TEMPLATES for word in re.findall(r"\w+|\.", template.replace("{c}", ""))}
    return {word: i for i, word in enumerate([*_SPECIAL, *sorted(words | set(NAMES))])}


def hf_tokenizer(folder: Path) -> str:
    """A folder with the files of a tokenizer that knows these words."""
    path = folder / "hf" / "tokenizer"
    if not path.exists():
        tokenizer = Tokenizer(models.WordLevel(vocabulary(), unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
        )
        special = dict(zip(("bos_token", "pad_token", "eos_token", "unk_token"), _SPECIAL))
        special |= {"cls_token": "<s>", "sep_token": "</s>"}
        transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(path)
    return str(path)


def _small_timm(build: Callable, *args: object, **kwargs: object) -> nn.Module:
    """A model of timm's by its own name, with the options of that name, small."""
    small: dict[str, object] = {"embed_dim": _WIDTH, "depth": 1, "num_heads": 2}
    kind = build.__module__.rpartition(".")[2]
    if kind == "convnext":
        small = {"depths": [1, 1, 1, 1], "dims": [8, 16, 32, _WIDTH]}
    elif kind == "fastvit":
        stages = 5 if build.__name__ in ("fastvit_mci3", "fastvit_mci4") else 4
        small = {"layers": (1,) * stages, "embed_dims": (16, 32, 64, 64, 64)[:stages]}
    elif kind == "vision_transformer_hybrid":  # whose stem is of one width
        small = {"depth": 1}
    elif kind == "vitamin":
        conv = VitConvCfg(norm_layer="layernorm2d", norm_eps=1e-6)
        embed = VitCfg(
            embed_dim=(16, 32, _WIDTH), depths=(1, 1, 1), stem_width=16, conv_cfg=conv, head_type="1d"
        )
        small["embed_cfg"] = embed
    return build(*args, **{**small, **kwargs})


@contextmanager
def small_models(folder: Path) -> Iterator[None]:
    """Within it every name of open_clip's registry builds a small model, and downloads give weights made for it.

    Configurations are added as a user adds them, as files, because open_clip reads all of them again at each addition.
    """
    configs = folder / "configs"
    configs.mkdir()
    originals = dict(factory._MODEL_CONFIGS)
    for name in {entry.name for entry in entries()}:
        (configs / f"{name}.json").write_text(json.dumps(shrunk(originals[name], folder)))
    towers = {
        config["vision_cfg"].get("timm_model_name") for config in originals.values() if "vision_cfg" in config
    }
    towers = {name.split(".")[0] for name in towers if name}
    known = timm_registry._model_entrypoints
    small = {name: partial(_small_timm, known[name]) for name in towers & known.keys()}
    with ExitStack() as stack:
        use = stack.enter_context
        use(patch.object(factory, "_MODEL_CONFIG_PATHS", list(factory._MODEL_CONFIG_PATHS)))
        use(patch.object(factory, "_MODEL_CONFIGS", originals))
        use(patch.dict(known, small))
        if not hasattr(transformers.PreTrainedTokenizerBase, "batch_encode_plus"):
            # open_clip before 3.0 calls it, and transformers 5 has it no more
            use(patch.object(transformers.PreTrainedTokenizerBase, "batch_encode_plus",
                             transformers.PreTrainedTokenizerBase.__call__, create=True))  # fmt: skip
        open_clip.add_model_config(configs)
        yield


@contextmanager
def downloads(entry: Entry, folder: Path) -> Iterator[None]:
    """Within it what open_clip downloads is a file with random weights of this entry's model, kept in `folder`."""
    path = folder / f"{entry.name}.pt"
    if not path.exists():
        torch.manual_seed(zlib.crc32(entry.name.encode()))
        with quiet(logging.ERROR):
            model = open_clip.create_model(entry.name, pretrained_hf=False)
        # CoCa's text_decoder.text_projection is left as the memory was, which may be NaN, or larger than any weight
        finite = {key: _sane(tensor) for key, tensor in model.state_dict().items()}
        torch.save(finite, path)
    with ExitStack() as stack:
        for module in (open_clip, factory, pretrained):
            stack.enter_context(patch.object(module, "download_pretrained", lambda *_, **__: str(path)))
        if hasattr(getattr(open_clip, "openai", None), "download_pretrained_from_url"):
            of_url = patch.object(
                open_clip.openai, "download_pretrained_from_url", lambda *_, **__: str(path)
            )
            stack.enter_context(of_url)
        yield


def make_place(folder: Path, kind: str, tokenizer: bool) -> Place:
    """A small QuickGELU model with a mean, std, interpolation and resize mode of its own, as a folder or a hub holds it.

    Args:
        folder: an empty one; with kind hf-hub Hugging Face's cache.
        kind: hf-hub or local-dir.
        tokenizer: whether it has a tokenizer of Hugging Face's, whose files lie beside the weights.
    """
    snapshot = folder
    if kind == "hf-hub":
        commit = "0123456789abcdef0123456789abcdef01234567"
        snapshot = folder / "models--org--tiny" / "snapshots" / commit
        (folder / "models--org--tiny" / "refs").mkdir(parents=True)
        (folder / "models--org--tiny" / "refs" / "main").write_text(commit)
        missing = folder / "models--org--tiny" / ".no_exist" / commit  # what was looked for and not found
        missing.mkdir(parents=True)
        (missing / "config.json").touch()
    snapshot.mkdir(parents=True, exist_ok=True)
    config = {**shrunk(factory._MODEL_CONFIGS["ViT-B-32"], folder), "quick_gelu": True}
    if tokenizer:
        shutil.copytree(hf_tokenizer(folder.with_name(f"{folder.name}-files")), snapshot, dirs_exist_ok=True)
        config["text_cfg"] |= {"hf_tokenizer_name": "org/tiny", "vocab_size": len(vocabulary())}
        config["text_cfg"] |= {"pool_type": "last", "no_causal_mask": True, "context_length": 16}
    images = {
        "mean": [0.2, 0.3, 0.4],
        "std": [0.3, 0.2, 0.1],
        "interpolation": "bilinear",
        "resize_mode": "squash",
    }
    text = json.dumps({"model_cfg": config, "preprocess_cfg": images})
    (snapshot / "open_clip_config.json").write_text(text)
    torch.manual_seed(0)
    torch.save(open_clip.CLIP(**deepcopy(config)).state_dict(), snapshot / "open_clip_pytorch_model.bin")
    return Place("hf-hub:org/tiny" if kind == "hf-hub" else f"local-dir:{folder}", config, images)


@contextmanager
def hub(cache: Path) -> Iterator[None]:
    """Within it Hugging Face's hub is out of reach, and what was downloaded before is in this folder."""
    with ExitStack() as stack:
        stack.enter_context(patch.object(huggingface_hub.constants, "HF_HUB_OFFLINE", True))
        stack.enter_context(patch.object(huggingface_hub.constants, "HF_HUB_CACHE", str(cache)))
        yield


# what is found


def activations(model: nn.Module) -> set[str]:
    """Those of open_clip's own towers; timm's and Hugging Face's have theirs by their names."""
    others = [
        name for name, module in model.named_modules() if isinstance(module, (TimmModel, HFTextEncoder))
    ]
    own = (module for name, module in model.named_modules() if not name.startswith(tuple(others)))
    return {type(module).__name__ for module in own if isinstance(module, (nn.GELU, QuickGELU))}


def preprocessing(model: nn.Module) -> dict:
    """mean, std, interpolation, resize mode and size of a built model, as JSON has them; a square size as one number."""
    found = json.loads(json.dumps({key: model.visual.preprocess_cfg[key] for key in (*IMAGES, "size")}))
    size = found["size"]
    return {**found, "size": size[0] if isinstance(size, list) and len(set(size)) == 1 else size}


def write_data(folder: Path) -> Path:
    """A data folder: 20 of scikit-learn's digits to train on and 40 to test on, not square, so that resizing shows."""
    digits, images = load_digits(), folder / "images"
    for i, (image, label) in enumerate(zip(digits.images[:60], digits.target)):
        path = images / ("train" if i < 20 else "test") / NAMES[label] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image * 15.9).astype("uint8")).convert("RGB").resize((20, 28)).save(path)
    (folder / "data").mkdir()
    (folder / "data" / "classnames.txt").write_text("\n".join(NAMES) + "\n")
    (folder / "data" / "zeroshot_classification_templates.txt").write_text("\n".join(TEMPLATES) + "\n")
    with contextlib.redirect_stderr(io.StringIO()):
        for split in ("train", "test"):
            shards.write(str(images / split), str(folder / "data" / split), shard_size=20)
    return folder / "data"


# the two levels of the test


def check_meaning(entry: Entry, folder: Path, build: bool = True) -> None:
    """Within `downloads`, without training: what a tag means at train-start, in the record, beside a checkpoint, to the models that are built
    from tag and record, and in an export for open_clip.

    Args:
        folder: an empty one.
        build: build the models, too. Tags of a model that mean the same build the same one.

    Raises:
        AssertionError: one of them is not as open_clip's tables say.
    """
    expected = {**entry.images, "size": entry.size}

    def same(spec: ModelSpec, where: str) -> None:
        assert spec.quick_gelu == entry.quick_gelu, f"{entry}: {where} has {spec.activation}"
        found = {key: spec.preprocess_cfg[key] for key in expected}
        assert found == expected, f"{entry}: {where} has {found}, not {expected}"

    same(ModelSpec.of(entry.name, entry.tag), "the tag")
    name, tag = (
        "/".join(entry.name.rsplit("-", 1)),
        entry.tag.upper().replace("_", "-"),
    )  # open_clip takes these too
    same(ModelSpec.of(name, tag), f"{name} with {tag}")
    args = openclip.parse_args(["--model", entry.name, "--pretrained", entry.tag])
    spec = checks.resolve_model(args, None)
    same(spec, "train-start")
    assert bool(args.force_quick_gelu) == entry.quick_gelu, f"{entry}: open_clip is not told the activation"
    told = {key: getattr(args, f"image_{key}") for key in IMAGES}
    assert told == entry.images, f"{entry}: open_clip is told {told}, not {entry.images}"
    record.Record({**record.describe_model(spec), "pretrained": record.describe_weights(entry.tag)}).write(
        folder
    )
    known = record.read(folder)
    assert known is not None
    same(known.spec, "the record")
    assert known.spec == spec and known.pretrained == entry.tag, (
        f"{entry}: the record is another than was written"
    )
    (folder / "epoch_1.pt").touch()
    same(targets.resolve_spec(None, str(folder / "epoch_1.pt"), {}), "a checkpoint beside the record")
    if not build:
        return
    of_tag = checkpoints.build_model(targets.resolve_spec(entry.name, entry.tag, {}), entry.tag)
    of_record = checkpoints.build_model(known.spec, entry.tag)
    for model, where in ((of_tag, "the model of the tag"), (of_record, "the model of the record")):
        assert preprocessing(model) == expected, (
            f"{entry}: {where} has {preprocessing(model)}, not {expected}"
        )
        wrong = activations(model) - {"QuickGELU" if entry.quick_gelu else "GELU"}
        assert not wrong, f"{entry}: {where} has {wrong}"
    save_open_clip(of_record, dict(spec.model_cfg), None, folder)
    exported = json.loads((folder / "open_clip_config.json").read_text())
    assert bool(exported["model_cfg"].get("quick_gelu")) == entry.quick_gelu, (
        f"{entry}: the export's activation"
    )
    assert exported["preprocess_cfg"] == entry.images, f"{entry}: the export has {exported['preprocess_cfg']}"


def check_whole(entry: Entry | Place, data: Path, folder: Path, *flags: str) -> dict[str, str]:
    """From `flyp train` through eval, wiseft, from_run and both exports: one meaning, and the same figures to the last image.

    Called within `downloads` or `hub`.

    Args:
        data: as of `write_data`.
        folder: an empty one.
        flags: of flyp train, that force a size or a text tower; eval, wiseft and export are to know of them by the record.

    Returns:
        The formats of export that refuse this model, open_clip or timm, and why.

    Raises:
        AssertionError: something is not as open_clip's tables say, or two commands disagree.
    """
    size = int(flags[flags.index("--force-image-size") + 1]) if "--force-image-size" in flags else entry.size
    expected = {**entry.images, "size": size}
    activation = {"QuickGELU" if entry.quick_gelu else "GELU"}

    def same(model: nn.Module, where: str) -> None:
        assert preprocessing(model) == expected, (
            f"{entry}: {where} has {preprocessing(model)}, not {expected}"
        )
        assert activations(model) <= activation, (
            f"{entry}: {where} has {activations(model)}, not {activation}"
        )

    run = folder / "run"
    argv = ["--model", entry.name, "--pretrained", entry.tag, "--train-data", str(data)]
    argv += [f"--eval-data=val={data}", "--logs", str(folder), "--name", "run", "--device", "cpu", *flags]
    argv += ["--workers", "0", "--epochs", "1", "--batch-size", "10", "--lr", "1e-3"]
    argv += ["--siglip"] if "init_logit_bias" in entry.config else []
    trained: list[nn.Module] = []
    original = train.FlypRun.on_model

    def on_model(flyp: train.FlypRun, model: nn.Module) -> None:
        trained.append(model)
        original(flyp, model)

    with patch.object(train.FlypRun, "on_model", on_model):
        assert train.train(argv) == 0
    same(trained[0], "the model that was trained")
    rows = [json.loads(line) for line in (run / record.RESULTS).read_text().splitlines()]
    start, end = ({k.removeprefix("val/"): v for k, v in row.items() if k.startswith("val/")} for row in rows)
    of_start = _eval(entry.tag, "--model", entry.name, f"--eval-data=val={data}", *flags)
    of_run = _eval(run, "--epoch", "last", "--predictions", folder / "predictions.csv")
    _flyp("wiseft", run, "--alphas", "0,1", "--save-all", "--workers", 0)
    merged = json.loads((run / "wiseft" / "wiseft.json").read_text())["alphas"]
    figures = (
        {
            "epoch 0": start,
            "flyp eval of the start": of_start,
            "alpha 0.00": merged["0.00"]["val"],
        },
        {
            "epoch 1": end,
            "flyp eval RUN": of_run,
            "alpha 1.00": merged["1.00"]["val"],
            "flyp eval of the merged file": _eval(
                run / "wiseft" / "wise_ft_alpha=1.00.pt", f"--eval-data=val={data}"
            ),
        },
    )
    for of_one in figures:
        (first, expected_figures), *others = of_one.items()
        for where, found in others:
            for name in expected_figures.keys() & found.keys():
                one, two = expected_figures[name], found[name]
                exact = name in ("top1", "top5", "n")
                assert one == two if exact else abs(one - two) < 1e-4, (
                    f"{entry}: {name} {one} in {first}, {two} in {where}"
                )

    with open(folder / "predictions.csv") as stream:
        predictions = {row["key"]: row["prediction"] for row in csv.DictReader(stream)}
    classifier = ImageClassifier.from_run(run, epoch="last")
    same(classifier.model, "from_run")
    assert _predictions(classifier, classifier.preprocess, data) == predictions, (
        f"{entry}: from_run predicts otherwise"
    )

    refused = {}
    for form, check in (("open_clip", _check_open_clip), ("timm", _check_timm)):
        try:
            _flyp("export", run, "--epoch", "last", "--format", form, "--out", folder / form)
        except InputError as error:
            refused[form] = str(error)
        else:
            check(entry, folder / form, run, partial(_predictions, data=data), predictions, same)
    return refused


def _check_open_clip(
    entry: Entry | Place, folder: Path, run: Path, predict: Callable, predictions: dict, same: Callable
) -> None:
    config = json.loads((folder / "open_clip_config.json").read_text())
    assert config["preprocess_cfg"] == entry.images, f"{entry}: the export has {config['preprocess_cfg']}"
    assert bool(config["model_cfg"].get("quick_gelu")) == entry.quick_gelu, (
        f"{entry}: the export's activation"
    )
    if not hasattr(factory, "parse_model_name"):  # local-dir: came with open_clip 3.0
        return
    with quiet(logging.ERROR):
        model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
        tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    same(model, "open_clip's reading of the export")
    classifier = ImageClassifier.from_prompts(model.eval(), tokenizer, record.read(run).prompts)
    assert predict(classifier, preprocess) == predictions, f"{entry}: open_clip predicts otherwise"


def _check_timm(
    entry: Entry | Place, folder: Path, run: Path, predict: Callable, predictions: dict, same: Callable
) -> None:
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    transform = create_transform(**resolve_model_data_config(model))
    assert predict(model, transform) == predictions, f"{entry}: timm predicts otherwise"


def _flyp(*argv: object) -> str:
    """`flyp ...` in this process; what it prints."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        call([str(arg) for arg in argv])
    return out.getvalue()


def _eval(*argv: object) -> dict:
    return json.loads(_flyp("eval", *argv, "--workers", 0, "--json"))["results"]["val"]


@torch.no_grad()
def _predictions(model: Callable, transform: Callable, data: Path) -> dict[str, str]:
    """The class of each test image by its key, as `flyp eval --predictions` writes it."""
    dataset = LabelledDataset(expand_source(str(data), "test"), transform, 40, num_classes=len(NAMES))
    return {
        key: str(guess)
        for batch in dataset
        for key, guess in zip(batch["keys"], model(batch["images"]).argmax(1).tolist())
    }


# the script


def table(results: dict[Entry, str]) -> str:
    """A line a kind of entries: how many there are, how many passed, what timm has no twin of, and why others failed."""
    lines = ["| kind | entries | passed | note |", "|---|---|---|---|"]
    kinds: dict[str, list[Entry]] = {}
    for entry in results:
        kinds.setdefault(entry.kind, []).append(entry)
    for kind, some in sorted(kinds.items()):
        notes = {results[entry].removeprefix("ok").lstrip("; ") for entry in some} - {""}
        passed = sum(results[entry].startswith("ok") for entry in some)
        lines.append(f"| {kind} | {len(some)} | {passed} | {'; '.join(sorted(notes))} |")
    passed = sum(result.startswith("ok") for result in results.values())
    return "\n".join([*lines, f"| all | {len(results)} | {passed} | open_clip {open_clip.__version__} |"])


def main() -> None:
    """Check the entries that the command line names; exit status 1 where one failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.registry", description=__doc__.split("\n")[0])
    parser.add_argument(
        "names", nargs="*", metavar="NAME[:TAG]", help="these alone (default: one of each kind)"
    )
    parser.add_argument("--all", action="store_true", help="every entry")
    args = parser.parse_args()
    chosen = entries()
    if args.names:
        chosen = [entry for entry in chosen if {entry.name, str(entry)} & set(args.names)]
    elif not args.all:
        chosen = list({entry.kind: entry for entry in reversed(chosen)}.values())[::-1]
    if not chosen:
        parser.error("open_clip's registry has none of these")
    torch.set_num_threads(1)  # the models are too small for more
    results: dict[Entry, str] = {}
    with tempfile.TemporaryDirectory() as temporary, small_models(Path(temporary)):
        folder = Path(temporary)
        data = write_data(folder)
        for entry in chosen:
            here, start = folder / "entry", time.time()
            log = io.StringIO()
            try:
                with downloads(entry, folder), contextlib.redirect_stderr(log):
                    for check in (partial(check_meaning, entry), partial(check_whole, entry, data)):
                        here.mkdir()
                        refused = check(here) or {}
                        shutil.rmtree(here)
                    assert "open_clip" not in refused, refused["open_clip"]
                results[entry] = "; ".join(["ok", *refused.values()])
            except Exception as error:  # noqa: BLE001 - the others are to be checked all the same
                results[entry] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
                sys.stderr.write(f"{log.getvalue()[-2000:]}{traceback.format_exc()}")
                shutil.rmtree(here, ignore_errors=True)
            sys.stdout.write(f"{entry} [{entry.kind}] {results[entry]} ({time.time() - start:.1f} s)\n")
            sys.stdout.flush()
    sys.stdout.write(f"\n{table(results)}\n")
    sys.exit(not all(result.startswith("ok") for result in results.values()))


if __name__ == "__main__":
    main()
