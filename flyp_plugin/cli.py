"""`flyp SUBCOMMAND`: the parsers, and nothing that takes long to import; a command's work is in its own module."""

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from typing import Any

from flyp_plugin import __version__
from flyp_plugin.errors import run
from flyp_plugin.flags import TRIED
from flyp_plugin.flags import parser as train_parser
from flyp_plugin.sources import IMAGE_KEY

Commands = argparse._SubParsersAction
_HOUR = """  flyp shards write photos/train data/train
  flyp shards write photos/val data/val
  flyp shards check data
  flyp train --model ViT-B-16 --pretrained openai --train-data data --eval-data val=data/val --name birds
  flyp wiseft logs/birds
  flyp eval logs/birds --eval-data test=data/test
  flyp export logs/birds --format timm --out classifier"""


def _add(
    commands: Commands, name: str, function: str, help: str, example: str, *flags: Any, **kwargs: Any
) -> argparse.ArgumentParser:
    """A command whose --help opens with an example; its function is 'module:function', `flags` are others' parsers."""
    parser = commands.add_parser(
        name,
        help=help,
        parents=flags,
        description=f"example:\n{example}\n\n{help[0].upper()}{help[1:]}.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        **{"usage": f"flyp {name} ...", **kwargs},
    )
    module, _, command = function.partition(":")  # imported when it is called
    parser.set_defaults(function=lambda args: getattr(import_module(f"flyp_plugin.{module}"), command)(args))
    return parser


def _count(text: str, least: int = 0) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text} is not a number from {least} on")
    return int(text)


def _positive(text: str) -> int:
    return _count(text, 1)


# The flags are tables, with a line or two for each. Those that several commands share come first.
# fmt: off


def _model_flags() -> argparse.ArgumentParser:
    """The model, under open_clip's names for its flags, and what all commands that take one have."""
    flags = argparse.ArgumentParser(add_help=False)
    flags.add_argument("--force", action="store_true", help="overwrite files that already exist")
    add = flags.add_argument_group("model, which a run's flyp.json knows (flags override it)").add_argument
    add("--epoch", metavar="best|last|N", help="of a run, in place of its merged weights or last epoch")
    add("--model", metavar="NAME", help="open_clip's name of the architecture")
    add("--model-config", metavar="PATH", help="JSON file of a model that open_clip does not have, or a folder of them")
    add("--force-quick-gelu", action="store_true", help="QuickGELU; a pretrained tag that needs it has it already")
    add("--force-image-size", type=_positive, nargs="+", metavar="N", help="as in training")
    add("--force-context-length", type=_positive, metavar="N", help="as in training")
    add("--force-custom-text", action="store_true", help="as in training: the text tower as a model of its own")
    add("--image-mean", type=float, nargs=3, metavar="X", help="default: the run's, else the tag's or the model's")
    add("--image-std", type=float, nargs=3, metavar="X", help="likewise")
    add("--image-interpolation", choices=["bicubic", "bilinear"], help="likewise")
    add("--image-resize-mode", choices=["shortest", "longest", "squash"], help="likewise")
    add("--device", help="default: cuda where there is a GPU, else cpu")
    return flags


def _classes_flags() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(add_help=False)
    add = flags.add_argument_group("classes").add_argument
    add("--classnames", metavar="FILE", help="a file, or imagenet (default: classnames.txt of each set)")
    add("--templates", metavar="FILE", help="a file, openai, simple, or one template with its {c} "
        "(default: zeroshot_classification_templates.txt of each set)")
    return flags


def _data_flags() -> argparse.ArgumentParser:
    """The evaluation sets and how they are read."""
    flags = argparse.ArgumentParser(add_help=False)
    add = flags.add_argument_group("data").add_argument
    add("--eval-data", action="append", default=[], metavar="NAME=SHARDS",
        help="a labelled set: data folder (its test split), split folder or tars; repeatable, ID set first "
        "(default: those of the run's training)")
    add("--batch-size", type=_positive, default=64, metavar="N", help="default: %(default)s")
    add("--workers", type=_count, default=2, metavar="N", help="processes that decode (default: %(default)s)")
    add("--precision", help="default: the run's, else fp32", choices=[
        "fp32", "amp", "amp_bf16", "amp_bfloat16", "bf16", "fp16", "pure_bf16", "pure_fp16"])
    _add_keys(add, of_run=True)
    add("--group-key", metavar="KEY", help="member (or json:FIELD) with a group, for worst-group accuracy")
    return flags


def _add_keys(add: Callable, of_run: bool = False) -> None:
    run = "the run's, else " if of_run else ""
    add("--image-key", default=None if of_run else IMAGE_KEY, metavar="KEYS", help=f"default: {run}{IMAGE_KEY}")
    add("--label-key", default=None if of_run else "cls", metavar="KEY", help=f"or json:FIELD (default: {run}cls)")


def _add_train(commands: Commands) -> None:
    # train has a parser of its own, for it shares its command line with open_clip's: see train.py
    help = "fine-tune a CLIP model with FLYP (the same as train_flyp.py)"
    commands.add_parser("train", help=help, add_help=False)


_TARGET = "a run's folder (its merged weights where there are some, else its last epoch), a checkpoint's path, or one of open_clip's pretrained tags"


def _add_eval(commands: Commands) -> None:
    example = """  flyp eval logs/birds --eval-data test=data/test
  flyp eval openai --model ViT-B-16 --eval-data test=data/test"""
    help = "score the classifier of a run or of pretrained weights on labelled sets"
    flags = _model_flags(), _data_flags(), _classes_flags()
    add = _add(commands, "eval", "evalsets:eval_command", help, example, *flags).add_argument
    add("checkpoint", metavar="RUN", help=_TARGET)
    add("--json", action="store_true", help="JSON on the terminal in place of the table")
    add("--predictions", metavar="FILE.csv", help="write each image's prediction there")


def _add_wiseft(commands: Commands) -> None:
    example = """  flyp wiseft logs/birds
  flyp wiseft --model ViT-B-16 --pretrained openai --finetuned epoch_10.pt --eval-data val=data/val --out merged"""
    help = "merge the pretrained and the fine-tuned weights, with the alpha that is best on the first set"
    flags = _model_flags(), _data_flags(), _classes_flags()
    parser = _add(commands, "wiseft", "merge:wiseft_command", help, example, *flags)
    add = parser.add_argument
    add("run", nargs="?", metavar="RUN", help="a run's folder (its last epoch, or --epoch) or a checkpoint in one")
    add("--pretrained", metavar="TAG|PATH", help="what the fine-tuning started from (default: what the run did)")
    finetuned = parser.add_mutually_exclusive_group()
    finetuned.add_argument("--finetuned", metavar="PATH", help="a checkpoint in place of RUN")
    finetuned.add_argument("--average", nargs="+", metavar="PATH", help="several runs or checkpoints in place of RUN, of "
        "which the mean is taken")
    alphas = parser.add_mutually_exclusive_group()
    of = "or A,B,... (default: %(default)s)"
    alphas.add_argument("--alphas", default="0:1:0.1", metavar="A:B:STEP", help=of)
    alphas.add_argument("--alpha", type=float, help="this one alone; needs no --eval-data")
    add("--out", metavar="DIR", help="for the merged weights, wiseft.json and frontier.png (default: RUN/wiseft)")
    add("--save-all", action="store_true", help="write the weights of every alpha")
    add("--per-set", action="store_true", help="a curve a set in frontier.png, in place of the mean")
    add("--json", action="store_true", help="JSON on the terminal in place of the table")


def _add_export(commands: Commands) -> None:
    example = "  flyp export logs/birds --format timm --out classifier"
    help = "write a folder that open_clip or, as a plain classifier, timm reads by its local-dir: name"
    flags = _model_flags(), _classes_flags()
    add = _add(commands, "export", "export:export_command", help, example, *flags).add_argument
    add("checkpoint", metavar="RUN", help=_TARGET)
    add("--data", metavar="DIR", help="the data whose classes the classifier gets (default: the run's training data)")
    add("--format", choices=["open_clip", "timm"], required=True)
    add("--out", required=True, metavar="DIR", help="the folder to write")


def _add_shards(commands: Commands) -> None:
    what = "write class-labelled shards, cut few-shot sets from them, count and check them"
    parser = commands.add_parser("shards", help=what, description=f"{what[0].upper()}{what[1:]}.")
    shards = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    # what is not given is left to the function's own default
    command = partial(_add, shards, usage=None, argument_default=argparse.SUPPRESS)
    some = "a data folder, a split folder or tars"
    of = "of a data folder (default: train and test)"
    many = "most samples in a shard (default: 1000, or fewer for 16 shards: a loader shares out whole shards)"
    size: dict[str, Any] = {"type": int, "metavar": "N", "help": many}
    cores = min(4, os.cpu_count() or 1)
    workers: dict[str, Any] = {"type": _count, "default": cores, "help": "processes (default: %(default)s)"}
    as_json: dict[str, Any] = {"action": "store_true", "default": False, "help": "JSON in place of the table"}

    example = """  flyp shards write photos/train data/train
  flyp shards write photos/test data/test        # with the class order of data/classnames.txt
  flyp shards write iwildcam/metadata.csv data/test --image-col filename --label-col y --split test \\
      --group-col location_remapped --root iwildcam/train --classnames names.txt"""
    help = "write shards from a folder of class folders or from a CSV; image bytes are copied as they are"
    parser = command("write", "shards:write_command", help, example)
    add = parser.add_argument
    add("source", metavar="SOURCE", help="folder of class folders, or CSV or TSV with a header line")
    add("dest", metavar="DEST", help="the split folder to write; class names and templates go above it")
    add("--classnames", metavar="FILE", help="class names in the order of their indices: a file, or "
        "imagenet (default: classnames.txt above DEST where there is one, else sorted)")
    add("--templates", metavar="FILE", help="a file, openai, simple, or one template with its {c} "
        "(default: the file above DEST where there is one, else 'a photo of a {c}.')")
    add("--shard-size", **size)
    add("--seed", type=int, default=0, help="of the shuffle before writing (default: %(default)s)")
    add("--workers", **workers)
    add = parser.add_argument_group("for a CSV").add_argument
    add("--image-col", metavar="COL", help="image paths")
    add("--label-col", metavar="COL", help="class names, or indices into the class names that are given")
    add("--split", metavar="VALUE", help="take the lines with this value; '' takes all")
    add("--split-col", metavar="COL", help="in this column (default: split)")
    add("--group-col", metavar="COL", help="written as .group members, for worst-group accuracy")
    add("--root", metavar="DIR", help="the image paths start here (default: the CSV's folder)")

    help = "write a few-shot set: K images of each class, copied as they are"
    example = "  flyp shards subset data few/train --shots 16"
    add = command("subset", "shards:subset_command", help, example).add_argument
    add("source", metavar="SOURCE", help=f"{some}, on this machine")
    add("dest", metavar="DEST", help="the split folder to write")
    add("--shots", type=int, required=True, metavar="K", help="images of each class")
    add("--seed", type=int, default=0, help="which images (default: %(default)s)")
    add("--split", default="train", help="of a data folder (default: %(default)s)")
    add("--shard-size", **size)
    _add_keys(add)

    help = "count samples, from the headers of the tars"
    add = command("count", "check:count_command", help, "  flyp shards count data").add_argument
    add("source", metavar="SOURCE", nargs="+", help=some)
    add("--split", default=None, help=of)
    add("--image-key", default=IMAGE_KEY, metavar="KEYS", help="count samples with one of these (default: %(default)s)")
    add("--json", **as_json)

    help = "read all shards and decode all images; list what is wrong, with exit status 1"
    add = command("check", "check:check_command", help, "  flyp shards check data").add_argument
    add("source", metavar="SOURCE", help=f"{some}, on this machine")
    add("--split", default=None, help=of)
    add("--classnames", default=None, metavar="FILE", help="default: classnames.txt of the set")
    add("--templates", default=None, metavar="FILE", help="default: those of the set")
    _add_keys(add)
    add("--workers", **workers)
    add("--json", **as_json)


def _add_compare(commands: Commands) -> None:
    example = """  flyp compare --model ViT-B-16 --pretrained openai --train-data data \\
      --eval-data val=data --eval-data sketch=other --methods flyp,ce,lp,lp-ft --epochs 10 --out comparison"""
    help = "the paper's comparison on your data: methods with and without WiSE-FT, in and out of distribution"
    # without abbreviations, which may be other flags of train.py's
    parser = _add(commands, "compare", "compare:compare_command", help, example, allow_abbrev=False)
    parser.set_defaults(passes_on=True)
    parser.epilog = """All other flags go to each training as they are (train_flyp.py --help, --help-open-clip): --epochs,
--batch-size, --device, --model-config, ... Every method gets the same data, epochs and number of values of its one tuned
setting, the learning rate or, for lp, C. The value is chosen by top-1 on the first set after the last epoch, on the first
seed; the other seeds train with it. The first set also chooses alpha; no other set chooses anything. Each run is a folder in DIR/runs with its own command.txt;
finished ones are skipped, so that the same command goes on with a comparison that was interrupted."""
    add = parser.add_argument
    add("--model", required=True, metavar="NAME", help="open_clip's name of the architecture")
    add("--pretrained", required=True, metavar="TAG|PATH", help="what each fine-tuning starts from")
    add("--train-data", required=True, metavar="SHARDS", help="data folder (its train split) or tars")
    add("--eval-data", action="append", required=True, metavar="NAME=SHARDS", help="a labelled set (a data folder: its "
        "test split); repeatable, first the ID validation set, which chooses")
    add("--id-test", metavar="NAME", help="the set of --eval-data that is an ID test set, and so not in mean OOD")
    add("--methods", default="flyp,ce,lp,lp-ft", metavar="A,B,...",
        help="of flyp, ce, lp, lp-ft, flyp-ce; others are compared with the first (default: %(default)s)")
    add("--lr", metavar="A,B,...", help=f"to choose from (default: {TRIED['lr']}, or the middle ones of these, as many as "
        "there are of --lp-c)")
    add("--lp-c", metavar="A,B,...", help="as many, in place of learning rates, for lp: its inverse strength of "
        f"regularisation (default: {TRIED['lp-c']}, or the middle ones of these, as many as there are of --lr)")
    add("--seeds", default="0:3", metavar="A:B|A,B,...", help="without B (default: %(default)s)")
    add("--shots", metavar="K,L,...", help="so many images a class, drawn by the seed; a table for each")
    add("--templates", action="append", metavar="FILE", help="to train with (a file, openai, simple, or one template); "
        "repeatable, a table for each. Sets with a templates file of their own are scored with that")
    add("--out", required=True, metavar="DIR", help="for compare.md, compare.json, compare.png and runs/")


def _add_demo(commands: Commands) -> None:
    example = "  flyp demo\n  python train_flyp.py --demo                   # the same"
    help = "the whole way on handwritten digits: offline, on a CPU, in minutes; goes on where it stopped"
    add = _add(commands, "demo", "demo:demo_command", help, example).add_argument
    add("--demo-dir", default="flyp-demo", metavar="DIR", help="for all that it writes (default: %(default)s)")
    add("--pretrain-epochs", type=_positive, default=20, metavar="N", help="on captions (default: %(default)s)")
    add("--epochs", type=_positive, default=10, metavar="N", help="of FLYP (default: %(default)s)")


# fmt: on


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="flyp",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=f"example:\n{_HOUR}\n\nFine-tune CLIP models like they were pretrained (FLYP), with open_clip.",
        usage="flyp COMMAND ...",
    )
    parser.add_argument("--version", action="version", version=f"flyp-plugin {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, prog="flyp")
    for add in (_add_train, _add_eval, _add_wiseft, _add_export, _add_shards, _add_compare, _add_demo):
        add(commands)
    return parser


def call(argv: Sequence[str]) -> int | None:
    """Run a command; its exit status, None where it is 0."""
    if argv[:1] == ["train"]:
        # --help is answered before anything is imported that takes long
        train_parser().parse_known_args(argv[1:])
        return import_module("flyp_plugin.train").train(argv[1:])
    parser = _parser()
    args, rest = parser.parse_known_args(argv or ["--help"])
    if vars(args).pop("passes_on", False):
        args.train_flags = rest
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)} (see flyp {argv[0]} --help)")
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    return args.function(args)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the console script and of train_flyp.py; leaves the process."""
    run(lambda: call(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    main()
