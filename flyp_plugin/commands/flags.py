"""Flags that several commands share, added to a command's parser."""

from argparse import ArgumentParser

from flyp_plugin.flags import number
from flyp_plugin.sources import IMAGE_KEY

RUN = "a run's folder (its merged weights if there are some, else its last epoch), a checkpoint, or an open_clip pretrained tag"


count, positive = number(int, 0), number(int, 1)  # argparse types

# fmt: off


def add_model_flags(parser: ArgumentParser) -> None:
    """The model, under open_clip's names for its flags, and --force."""
    parser.add_argument("--force", action="store_true", help="overwrite files that already exist")
    add = parser.add_argument_group("model (read from the run's flyp.json; flags override it)").add_argument
    add("--epoch", metavar="best|loss|last|N", help="take this epoch of the run, not its merged weights or last epoch "
        "(best: the highest top-1, loss: the lowest loss, on its first evaluation set)")
    add("--teacher", action="store_true", help="take the trajectory's teacher in place of the model (of a run with "
        "--anchor-teacher trajectory), which has no figures of its own: --epoch best and loss go by the model's")
    add("--model", metavar="NAME", help="open_clip's name of the architecture")
    add("--model-config", metavar="PATH", help="JSON file of a model that open_clip does not know, or a folder of them")
    add("--force-quick-gelu", action="store_true", help="use QuickGELU (a pretrained tag that needs it sets it already)")
    add("--force-image-size", type=positive, nargs="+", metavar="N", help="as in training")
    add("--force-context-length", type=positive, metavar="N", help="as in training")
    add("--force-custom-text", action="store_true", help="as in training: the text tower as a model of its own")
    add("--image-mean", type=float, nargs=3, metavar="X", help="default: the run's, else the tag's or the model's")
    add("--image-std", type=float, nargs=3, metavar="X", help="likewise")
    add("--image-interpolation", choices=["bicubic", "bilinear"], help="likewise")
    add("--image-resize-mode", choices=["shortest", "longest", "squash"], help="likewise")
    add("--device", help="default: cuda if there is a GPU, else cpu")


def add_classes_flags(parser: ArgumentParser) -> None:
    """Class names and prompts."""
    add = parser.add_argument_group("classes").add_argument
    add("--classnames", metavar="FILE", help="a file, or imagenet (default: classnames.txt of each set)")
    add("--templates", metavar="FILE", help="a file, openai, simple, a set of the paper (fmow, ...), or one "
        "template with {c} (default: zeroshot_classification_templates.txt of each set)")
    add("--prompts", metavar="FILE.json", help="class descriptions, {class name: [prompt, ...]}, with --templates in "
        "addition to these (default: prompts.json of each set, instead of its templates)")


def add_data_flags(parser: ArgumentParser) -> None:
    """The evaluation sets and how they are read."""
    add = parser.add_argument_group("data").add_argument
    add("--eval-data", action="append", default=[], metavar="NAME=SHARDS",
        help="a labelled set: data folder (its test split), split folder or tars; repeatable, ID set first "
        "(default: the sets of the run's training)")
    add("--batch-size", type=positive, default=64, metavar="N", help="default: %(default)s")
    add("--workers", type=count, default=2, metavar="N", help="processes that decode images (default: %(default)s)")
    add("--precision", help="default: the run's, else fp32", choices=[
        "fp32", "amp", "amp_bf16", "amp_bfloat16", "bf16", "fp16", "pure_bf16", "pure_fp16"])
    add_key_flags(add, of_run=True)
    add("--group-key", metavar="KEY", help="member (or json:FIELD) with a group, for worst-group accuracy")


def add_key_flags(add, of_run: bool = False) -> None:
    """--image-key and --label-key; with `of_run`, the run's record supplies what is not given."""
    run = "the run's, else " if of_run else ""
    add("--image-key", default=None if of_run else IMAGE_KEY, metavar="KEYS",
        help=f"members that may hold the image, separated by ';': the first present is used (default: {run}{IMAGE_KEY})")
    add("--label-key", default=None if of_run else "cls", metavar="KEY",
        help=f"member with the class index or name, or json:FIELD (default: {run}cls)")
