"""The flags of `flyp train`: FLYP's own, and its defaults for open_clip's.

A new flag goes into `parser` and is then an attribute of the run's `args` (train.py). This module must not import torch,
so that `flyp train --help` answers at once: choices and defaults that belong to modules which do are repeated here, and
tests/test_objectives.py compares them with their owners.
"""

import argparse
import math
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from flyp_plugin.errors import InputError
from flyp_plugin.sources import IMAGE_KEY, RETRIES

GLOBAL_BATCH = 512
# The paper's values (arXiv 2212.00638, appendix) for flags whose open_clip defaults are meant for pretraining
DEFAULTS = {
    "lr": "1e-5",
    "wd": "0.1",
    "warmup": "500",
    "epochs": "10",
    "beta1": "0.9",
    "beta2": "0.999",
    "eps": "1e-8",
    "precision": "fp32",
    "batch_size": str(GLOBAL_BATCH),
}


def to_argv(values: Mapping[str, Any]) -> list[str]:
    """Parsed flags (name: value) as a command line, without those that are None, False or empty."""
    argv = []
    for name, value in values.items():
        if value or (value == 0 and value is not False):
            words = value if isinstance(value, (list, tuple)) else [] if value is True else [value]
            argv += [f"--{name.replace('_', '-')}", *map(str, words)]
    return argv


def number(kind: Callable, low: float, high: float = math.inf, above: bool = False) -> Callable:
    """argparse type: a finite number from `low` (or, with `above`, from above it) to `high`."""

    def parse(text: str) -> Any:
        value = kind(text)
        if not (low < value if above else low <= value) or not value <= high or math.isinf(value):
            limits = f"{'>' if above else '>='} {low:g}" + ("" if math.isinf(high) else f" and <= {high:g}")
            raise argparse.ArgumentTypeError(f"must be {limits}, got {text}")
        return value

    parse.__name__ = kind.__name__  # argparse shows it for a text that is not a number
    return parse


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see --help).")


def parser() -> argparse.ArgumentParser:
    """The parser of FLYP's own flags. It takes no abbreviations: they could be those of open_clip's flags."""
    parser = _Parser(
        prog="train_flyp.py",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Fine-tune a CLIP model like it was pretrained (FLYP), with open_clip's own training script.\n\n"
        "example:\n  python train_flyp.py --model ViT-B-16 --pretrained openai --train-data data --batch-size 256",
        epilog="All other flags are open_clip's (--model, --pretrained, --train-data, --batch-size, --epochs, --lr,\n"
        "--precision, --resume latest, ...): see --help-open-clip. FLYP's defaults for them are\n"
        + " ".join(to_argv(DEFAULTS))
        + "\n(the batch size is the total over all ranks), and --local-loss --gather-with-grad with several ranks.",
    )
    # fmt: off
    add = parser.add_argument
    add("--classnames", metavar="FILE", help="class names, one per line, or: imagenet (default: classnames.txt beside "
        "the shards)")
    add("--templates", metavar="FILE", help="prompt templates with {c}, one per line, or: openai, simple, those of one of "
        "the paper's sets (fmow, iwildcam, caltech101, cars, flowers, pcam, sst2), or a single template (default: "
        "zeroshot_classification_templates.txt beside the shards)")
    add("--prompts", metavar="FILE.json", help="class descriptions, {class name: [prompt, ...]} with lists of any length; "
        "with --templates, in addition to these (default: prompts.json beside the shards, instead of the templates)")
    add("--template-order", choices=("random", "table"), default="random", help="random: each image gets a prompt of its "
        "class at random each time; table: all of them in a random order before any comes again, as in the authors' "
        "code (default: %(default)s)")
    add("--balance", type=number(float, 0, 1), default=0.0, metavar="POWER", help="draw images of rare classes more often: "
        "a class of n images has a share of n^(1 - POWER) of an epoch, so 1 makes all classes equal, 0.5 goes by the "
        "square root. An epoch is then as many images as there are, but not each of them once; local shards only "
        "(default: %(default)s)")
    add("--label-key", default="cls", help="member with the class index or name, or json:FIELD (default: %(default)s)")
    add("--image-key", default=IMAGE_KEY, help="members that may hold the image, separated by ';': the first "
        "present is used (default: %(default)s)")
    add("--retries", type=number(int, 0), default=RETRIES, metavar="N", help="read a remote shard again after an error, "
        "up to N times at growing intervals: about a minute in all with the default (default: %(default)s)")
    add("--max-lost", type=number(float, 0, 1), default=0.01, metavar="SHARE", help="stop when more than this share of "
        "an epoch's samples cannot be read (default: %(default)s)")
    add("--model-config", metavar="PATH", help="JSON file of a model that open_clip does not know, or a folder of them")
    add("--eval-data", metavar="NAME=SHARDS", action="append", default=[], help="a labelled set to score before "
        "training and after each epoch; repeatable, the first is the ID validation set")
    add("--eval-frequency", metavar="N", type=number(int, 0), default=1, help="score every N epochs; 0: only before "
        "training and after the last epoch (default: %(default)s)")
    add("--group-key", metavar="KEY", help="member (or json:FIELD) with a sample's group, for worst-group accuracy")
    add = parser.add_argument_group("objective").add_argument
    add("--objective", choices=("flyp", "ce", "lp", "lp-ft", "flyp-ce"), default="flyp", help="flyp: both towers, "
        "contrastive; ce: image tower and a linear head, cross-entropy (standard fine-tuning); lp: a linear head on "
        "frozen features; lp-ft: lp, then ce from its head; flyp-ce: both towers, cross-entropy over the text tower's "
        "head (default: %(default)s)")
    add("--collisions", choices=("keep", "mask", "soft"), default="keep", help="images of the same class in a batch: "
        "negatives of each other's prompts, left out, or sharing the target (default: %(default)s)")
    add("--ce-weight", type=number(float, 0), default=0.0, metavar="W", help="add W x cross-entropy over the head of "
        "the batch's classes to flyp (default: %(default)s)")
    add("--lp-c", type=number(float, 0, above=True), metavar="C", help="inverse strength of the L2 regularisation in lp "
        "and lp-ft, as scikit-learn's C (default: 31.6)")
    add("--logit-scale", type=number(float, 1, 100), metavar="S", help="start from this logit_scale.exp(), from 1 to "
        "100, in place of the pretrained model's: the inverse temperature, which open_clip logs as Logit Scale")
    add = parser.add_argument_group("anchor", "With flyp or ce: keep accuracy and calibration on other data while training, "
        "as `flyp wiseft`\ndoes afterwards. Try that first.").add_argument
    add("--anchor", type=number(float, 0), default=0.0, metavar="W", help="add W x the squared distance between the "
        "features of the model and those of a teacher for the same images and prompts; try 1 to 10 (default: off)")
    add("--anchor-teacher", choices=("pretrained", "trajectory"), default="pretrained", help="pretrained: the model that "
        "training starts from; trajectory: an average of the weights since then, a model of its own that "
        "`flyp eval --teacher` and `flyp wiseft --teacher` read (default: %(default)s)")
    add = parser.add_argument_group("few shots").add_argument
    add("--shots", type=number(int, 1), metavar="K", help="train on K images of each class, chosen like those of "
        "`flyp shards subset`; local shards only")
    add("--shots-seed", type=int, metavar="S", help="which K images (default: 0)")
    add = parser.add_argument
    add("--full-text", action="store_true", help="run the text tower on its full context and on every row, as "
        "open_clip does: slower, with the same features")
    add("--jpeg-draft", action="store_true", help="decode JPEGs of at least twice the model's image size at a fraction "
        "of their size: faster, with slightly different pixels; in training only, not in evaluation")
    add("--softmax-loss", action="store_true", help="train a SigLIP model with the softmax loss")
    add("--no-flyp-defaults", action="store_true", help="keep open_clip's own defaults, which are meant for pretraining")
    add("--demo", action="store_true", help="run the whole workflow on handwritten digits: see flyp demo --help")
    add("--help-open-clip", action="store_true", help="show open_clip's flags and exit")
    # fmt: on
    return parser
