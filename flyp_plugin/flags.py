"""FLYP's own flags and defaults for training, which join open_clip's; nothing here takes long to import."""

import argparse
from collections.abc import Mapping
from typing import Any, NoReturn

from flyp_plugin.errors import InputError
from flyp_plugin.sources import IMAGE_KEY, RETRIES

GLOBAL_BATCH = 512
# The paper's, where they differ from open_clip's, which are for pretraining (arXiv 2212.00638, appendix)
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
# Of linear probes: CLIP's own example has 0.316 on features that are not normalised, about 10 long: this on ours
LP_C = 31.6
MAX_LOST = 0.01  # of an epoch's samples
OBJECTIVES = ("flyp", "ce", "lp", "lp-ft", "flyp-ce")  # what they are is in objectives.py
COLLISIONS = ("keep", "mask", "soft")


def as_words(values: Mapping[str, Any]) -> list[str]:
    """Flags by their names in a parser's result, as a command line has them; those that are not given are left out."""
    words = []
    for name, value in values.items():
        if value or (value == 0 and value is not False):
            given = value if isinstance(value, (list, tuple)) else [] if value is True else [value]
            words += [f"--{name.replace('_', '-')}", *map(str, given)]
    return words


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see --help).")


def parser() -> argparse.ArgumentParser:
    """The parser of FLYP's own flags; it takes no abbreviations, so that it catches none of open_clip's."""
    parser = _Parser(
        prog="train_flyp.py",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Fine-tune a CLIP model like it was pretrained (FLYP), by open_clip's own training script.\n\n"
        "example:\n  python train_flyp.py --model ViT-B-16 --pretrained openai --train-data data --batch-size 256",
        epilog="All other flags are open_clip's (--model, --pretrained, --train-data, --batch-size, --epochs, --lr,\n"
        "--precision, --resume latest, ...): see --help-open-clip. With FLYP's defaults: "
        + " ".join(as_words(DEFAULTS))
        + "\n(over all ranks together), and --local-loss --gather-with-grad with several ranks.",
    )
    # fmt: off
    add = parser.add_argument
    add("--classnames", metavar="FILE",
        help="class names, a line each (or: imagenet); else classnames.txt by the shards")
    add("--templates", metavar="FILE", help="prompt templates with {c}, a line each (or: openai, simple, or one "
        "template); else zeroshot_classification_templates.txt by the shards")
    add("--label-key", default="cls", help="member with the class index, or json:FIELD (default: %(default)s)")
    add("--image-key", default=IMAGE_KEY, help="members that may hold the image (default: %(default)s)")
    add("--retries", type=int, default=RETRIES, metavar="N", help="read a remote shard that breaks off again, up to N "
        "times at growing intervals, a minute in all with the default (default: %(default)s)")
    add("--max-lost", type=float, default=MAX_LOST, metavar="SHARE", help="stop where more than this share of an "
        "epoch's samples cannot be read (default: %(default)s)")
    add("--model-config", metavar="PATH", help="a model configuration of your own for open_clip, or a folder of them")
    add("--eval-data", metavar="NAME=SHARDS", action="append", default=[], help="a labelled set to score before "
        "training and after each epoch; repeatable, the first is the ID validation set")
    add("--eval-frequency", metavar="N", type=int, default=1, help="score every N epochs (default: %(default)s)")
    add("--group-key", metavar="KEY", help="member with a sample's group, or json:FIELD, for worst-group accuracy")
    add = parser.add_argument_group("objective").add_argument
    add("--objective", choices=OBJECTIVES, default="flyp", help="flyp: both towers, contrastive; "
        "ce: image tower and a linear head, cross-entropy (standard fine-tuning); lp: a linear head on frozen features; "
        "lp-ft: lp, then ce from its head; flyp-ce: both towers, cross-entropy over the text tower's head "
        "(default: %(default)s)")
    add("--collisions", choices=COLLISIONS, default="keep", help="two images of one class in a batch: "
        "negatives of each other's prompts, left out, or sharing the target (default: %(default)s)")
    add("--ce-weight", type=float, default=0.0, metavar="W", help="add W x cross-entropy over the head "
        "of the batch's classes to flyp (default: %(default)s)")
    add("--lp-c", type=float, metavar="C", help="of lp and lp-ft: inverse strength of the L2 "
        f"regularisation, scikit-learn's C (default: {LP_C})")
    add = parser.add_argument_group("few shots").add_argument
    add("--shots", type=int, metavar="K", help="train on K images of each class, the ones that "
        "`flyp shards subset` takes; local shards only")
    add("--shots-seed", type=int, metavar="S", help="which images (default: 0)")
    add = parser.add_argument
    add("--full-text", action="store_true", help="run the text tower on its full context and on every row, as "
        "open_clip does: slower, the same features")
    add("--jpeg-draft", action="store_true", help="decode JPEGs of at least twice the model's image size at a fraction "
        "of their size: faster, with slightly other pixels; for training, not for evaluation")
    add("--softmax-loss", action="store_true", help="train a SigLIP model with the softmax loss all the same")
    add("--no-flyp-defaults", action="store_true", help="leave open_clip's own defaults, made for pretraining")
    add("--demo", action="store_true", help="the whole way on handwritten digits: see flyp demo --help")
    add("--help-open-clip", action="store_true", help="show open_clip's flags and leave")
    # fmt: on
    return parser
