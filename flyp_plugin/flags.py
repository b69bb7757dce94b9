"""FLYP's own flags and defaults for training, which join open_clip's, and what is refused of open_clip's.

Nothing here takes long to import.
"""

import argparse
import math
import re
from argparse import Namespace
from collections.abc import Callable, Mapping
from importlib.util import find_spec
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
# The precisions that keep the weights themselves, and so AdamW's state, in 16 bits
IN_FP16 = ("fp16", "pure_fp16")
# AdamW divides by the root of the mean of squared gradients, plus eps. In fp16 the mean is 0 for gradients below 0.005
# (with beta2 0.999) and eps is what is left, so that a step is up to 0.005 / eps times --lr: with 1e-8, which is 0 itself,
# NaN; with 1e-6, 5000 times, after which a model of digits is at chance. With 1e-3 it learns as in fp32 or a little slower.
FP16_EPS = "1e-3"
# Of linear probes: CLIP's own example has 0.316 on features that are not normalised, about 10 long: this on ours
LP_C = 31.6
# What `flyp compare` chooses from
TRIED = {"lr": "1e-6,3e-6,1e-5,3e-5", "lp-c": "1,10,100,1000"}
MAX_LOST = 0.01  # of an epoch's samples
OBJECTIVES = ("flyp", "ce", "lp", "lp-ft", "flyp-ce")  # what they are is in objectives.py
COLLISIONS = ("keep", "mask", "soft")


def to_argv(values: Mapping[str, Any]) -> list[str]:
    """Flags by their names in a parser's result, as a command line has them; those that are not given are left out."""
    words = []
    for name, value in values.items():
        if value or (value == 0 and value is not False):
            given = value if isinstance(value, (list, tuple)) else [] if value is True else [value]
            words += [f"--{name.replace('_', '-')}", *map(str, given)]
    return words


# of open_clip's flags those that do nothing without another
_NEEDS = {
    "lock_image_unlocked_groups": "lock_image",
    "lock_image_freeze_bn_stats": "lock_image",
    "lock_text_unlocked_layers": "lock_text",
    "lock_text_freeze_layer_norm": "lock_text",
    "distill_model": "distill_pretrained",
    "distill_pretrained": "distill_model",
}
# those of its own loader of captions, which reads --val-data alone here
_LOADER = re.compile(
    "csv_.*|text_key|json_text_.*|max_image_pixels|length_bucketing|bucket_.*|text_pad_multiple|audio_.*"
)
# and those for something other than training an image and a text tower on several ranks, with what is there for it
_OTHERS = {
    "horovod": "several ranks are torchrun's or Slurm's to start",
    "trace": "open_clip traces a model for inference alone",
    "use_naflex": "there are no NaFlex batches of class prompts",
    "pretrained_audio": "there is no audio tower",
}


def check_open_clips(args: Namespace, plain: Namespace, world_size: int) -> None:
    """InputError where a flag of open_clip's would end in a traceback or would, without a word, do nothing.

    Args:
        args: open_clip's flags as given, with FLYP's defaults.
        plain: what open_clip's parser makes of an empty command line.
        world_size: number of ranks.
    """
    for name in (name for name, value in vars(args).items() if value != getattr(plain, name, value)):
        other = _NEEDS.get(name)
        if other and not getattr(args, other):
            raise InputError(f"{_flag(name)} does nothing without {_flag(other)}; add that, or leave it out.")
        if name in _OTHERS:
            raise InputError(f"{_flag(name)} is not for FLYP: {_OTHERS[name]}; leave it out.")
        if _LOADER.fullmatch(name) and not args.val_data:
            raise InputError(f"{_flag(name)} is for captions, which FLYP does not train on; leave it out.")
    ranges: dict[str, tuple[str, Callable[[float], bool]]] = {
        # open_clip gives NumPy the sum of seed and rank
        "seed": (f"0 to {2**32 - world_size}", lambda value: 0 <= value <= 2**32 - world_size),
        "grad_clip_norm": ("more than 0", lambda value: 0 < value < math.inf),
        "force_patch_dropout": ("0 or more and less than 1", lambda value: 0 <= value < 1),
        "log_every_n_steps": ("1 or more", lambda value: value >= 1),
        "log_metric_every_n_steps": ("1 or more", lambda value: value >= 1),
        "epochs_cooldown": (f"0 to {args.epochs}", lambda value: 0 <= value <= args.epochs),
    }
    for name, (text, holds) in ranges.items():
        value = getattr(args, name, None)
        if value is not None and not holds(value):
            raise InputError(f"{_flag(name)} {value} is out of range; give {text}.")
    opt = getattr(args, "opt", "adamw")  # open_clip 2.28 has AdamW alone
    # open_clip 4 has --opt-kwargs, and leaves an eps that is not given to timm
    for name in ("lr",) if "opt_kwargs" in args else ("lr", "eps"):
        if getattr(args, name) is None:
            raise InputError(f"--opt {opt} has no default of --{name} in open_clip; give that too.")
    if getattr(args, "momentum", None) is not None and "timm" not in opt:
        raise InputError(
            f"--momentum is for timm's optimizers (as --opt timm/sgd), not for {opt}; leave it out."
        )
    if getattr(args, "epochs_cooldown", None) is not None and args.lr_scheduler != "const-cooldown":
        raise InputError("--epochs-cooldown does nothing without --lr-scheduler const-cooldown; add that.")
    if args.copy_codebase and "site-packages" in str(getattr(find_spec("open_clip"), "origin", "")):
        raise InputError(
            "--copy-codebase would copy all of Python's packages, among which open_clip is installed; leave it out."
        )
    if args.use_bnb_linear and find_spec("bitsandbytes") is None:
        raise InputError("--use-bnb-linear needs the package bitsandbytes: pip install bitsandbytes.")


def _flag(name: str) -> str:
    return to_argv({name: True})[0]


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
        + " ".join(to_argv(DEFAULTS))
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
