"""`flyp SUBCOMMAND`: the parsers, and nothing that takes long to import; a command's work is in its own module."""

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module

from flyp_plugin import __version__
from flyp_plugin.errors import run
from flyp_plugin.flags import parser as train_parser

_HOUR = """  flyp shards write photos/train data/train
  flyp shards write photos/test data/test
  flyp train --model ViT-B-16 --pretrained openai --train-data data --eval-data val=data
  flyp wiseft --model ViT-B-16 --pretrained openai --finetuned logs/RUN/checkpoints/epoch_10.pt \\
      --eval-data val=data --out merged"""


def _add_train(commands: argparse._SubParsersAction) -> None:
    # train has a parser of its own, for it shares its command line with open_clip's: see train.py
    commands.add_parser(
        "train", help="fine-tune a CLIP model with FLYP (the same as train_flyp.py)", add_help=False
    )


def _model_flags() -> argparse.ArgumentParser:
    """The model, under open_clip's names for its flags, and what all commands that take one have."""
    flags = argparse.ArgumentParser(add_help=False)
    flags.add_argument("--force", action="store_true", help="write over files that are there already")
    group = flags.add_argument_group("model")
    group.add_argument("--model", required=True, metavar="NAME", help="open_clip's name of the architecture")
    group.add_argument(
        "--model-config", metavar="PATH", help="JSON file of a model that open_clip has not, or a folder"
    )
    group.add_argument(
        "--force-quick-gelu", action="store_true", help="QuickGELU, as the OpenAI weights were trained with"
    )
    group.add_argument("--image-mean", type=float, nargs=3, metavar="X", help="default: the model's")
    group.add_argument("--image-std", type=float, nargs=3, metavar="X", help="default: the model's")
    group.add_argument("--image-interpolation", choices=["bicubic", "bilinear"], help="default: the model's")
    group.add_argument(
        "--image-resize-mode", choices=["shortest", "longest", "squash"], help="default: the model's"
    )
    group.add_argument("--device", help="default: cuda where there is a GPU, else cpu")
    return flags


def _classes_flags() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(add_help=False)
    group = flags.add_argument_group("classes")
    group.add_argument(
        "--classnames", metavar="FILE", help="a file, or imagenet (default: classnames.txt of each set)"
    )
    group.add_argument(
        "--templates",
        metavar="FILE",
        help="a file, openai, simple, or one template with its {c} "
        "(default: zeroshot_classification_templates.txt of each set)",
    )
    return flags


def _data_flags(required: bool) -> argparse.ArgumentParser:
    """The evaluation sets and how they are read."""
    flags = argparse.ArgumentParser(add_help=False)
    group = flags.add_argument_group("data")
    group.add_argument(
        "--eval-data",
        action="append",
        required=required,
        metavar="NAME=SHARDS",
        help="a labelled set: data folder (its test split), split folder or tars; repeatable, ID set first",
    )
    group.add_argument("--batch-size", type=_positive, default=64, metavar="N", help="default: %(default)s")
    group.add_argument(
        "--workers", type=_count, default=2, metavar="N", help="processes that decode (default: %(default)s)"
    )
    group.add_argument("--precision", default="fp32", help="default: %(default)s", choices=[
        "fp32", "amp", "amp_bf16", "amp_bfloat16", "bf16", "fp16", "pure_bf16", "pure_fp16"])  # fmt: skip
    group.add_argument(
        "--image-key", default="jpg;jpeg;png;webp", metavar="KEYS", help="default: %(default)s"
    )
    group.add_argument(
        "--label-key", default="cls", metavar="KEY", help="or json:FIELD (default: %(default)s)"
    )
    group.add_argument(
        "--group-key", metavar="KEY", help="member (or json:FIELD) with a group, for worst-group accuracy"
    )
    return flags


def _add(
    commands: argparse._SubParsersAction, name: str, help: str, example: str, *flags: argparse.ArgumentParser
) -> argparse.ArgumentParser:
    """A command whose --help opens with an example."""
    parser = commands.add_parser(
        name,
        help=help,
        parents=flags,
        description=f"example:\n{example}\n\n{help[0].upper()}{help[1:]}.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage=f"flyp {name} ...",
    )
    return parser


def _add_eval(commands: argparse._SubParsersAction) -> None:
    example = """  flyp eval logs/RUN/checkpoints/epoch_10.pt --model ViT-B-16 \\
      --eval-data val=data --eval-data sketch=other"""
    help = "score a checkpoint's zero-shot classifier on labelled sets"
    parser = _add(
        commands, "eval", help, example, _model_flags(), _data_flags(required=True), _classes_flags()
    )
    parser.add_argument(
        "checkpoint", metavar="CKPT", help="a checkpoint's path, or one of open_clip's pretrained tags"
    )
    parser.add_argument("--json", action="store_true", help="JSON on the terminal in place of the table")
    parser.add_argument("--predictions", metavar="FILE.csv", help="write each image's prediction there")
    parser.set_defaults(function=_call("evalsets:eval_command"))


def _add_wiseft(commands: argparse._SubParsersAction) -> None:
    example = """  flyp wiseft --model ViT-B-16 --pretrained openai \\
      --finetuned logs/RUN/checkpoints/epoch_10.pt \\
      --eval-data val=data --eval-data sketch=other --out merged"""
    help = "merge the pretrained and the fine-tuned weights, with the alpha that is best on the first set"
    parser = _add(
        commands, "wiseft", help, example, _model_flags(), _data_flags(required=False), _classes_flags()
    )
    parser.add_argument(
        "--pretrained", required=True, metavar="TAG|PATH", help="what the fine-tuning started from"
    )
    finetuned = parser.add_mutually_exclusive_group(required=True)
    finetuned.add_argument("--finetuned", metavar="PATH", help="the fine-tuned checkpoint")
    finetuned.add_argument("--average", nargs="+", metavar="PATH", help="several, of which the mean is taken")
    alphas = parser.add_mutually_exclusive_group()
    alphas.add_argument(
        "--alphas", default="0:1:0.1", metavar="A:B:STEP", help="or A,B,... (default: %(default)s)"
    )
    alphas.add_argument("--alpha", type=float, help="this one alone; needs no --eval-data")
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="for the merged weights, wiseft.json and frontier.png"
    )
    parser.add_argument(
        "--own-first",
        action="store_true",
        help="--classnames and --templates are for sets that have no such file, as in training",
    )
    parser.add_argument("--save-all", action="store_true", help="write the weights of every alpha")
    parser.add_argument(
        "--per-set", action="store_true", help="a curve a set in frontier.png, in place of the mean"
    )
    parser.add_argument("--json", action="store_true", help="JSON on the terminal in place of the table")
    parser.set_defaults(function=_call("merge:wiseft_command"))


def _add_export(commands: argparse._SubParsersAction) -> None:
    example = """  flyp export merged/wise_ft_alpha=0.60.pt --model ViT-B-16 --data data \\
      --format timm --out classifier"""
    help = "write a folder that open_clip or, as a plain classifier, timm reads by its local-dir: name"
    parser = _add(commands, "export", help, example, _model_flags(), _classes_flags())
    parser.add_argument(
        "checkpoint", metavar="CKPT", help="a checkpoint's path, or one of open_clip's pretrained tags"
    )
    parser.add_argument("--data", metavar="DIR", help="the data whose classes the classifier gets")
    parser.add_argument("--format", choices=["open_clip", "timm"], required=True)
    parser.add_argument("--out", required=True, metavar="DIR", help="the folder to write")
    parser.set_defaults(function=_call("export:export_command"))


def _add_shards(commands: argparse._SubParsersAction) -> None:
    what = "write class-labelled shards, cut few-shot sets from them, count and check them"
    shards = commands.add_parser(
        "shards", help=what, description=f"{what[0].upper()}{what[1:]}."
    ).add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(name: str, function: str, help: str, example: str) -> argparse.ArgumentParser:
        parser = shards.add_parser(
            name,
            help=help,
            description=f"example:\n{example}\n\n{help[0].upper()}{help[1:]}.",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            argument_default=argparse.SUPPRESS,  # what is not given is left to the function's own default
        )
        parser.set_defaults(function=_call(function))
        return parser

    def workers(parser: argparse.ArgumentParser) -> None:
        default = min(4, os.cpu_count() or 1)
        parser.add_argument(
            "--workers", type=_count, default=default, help="processes (default: %(default)s)"
        )

    def keys(parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--label-key", default="cls", metavar="KEY", help="or json:FIELD (default: %(default)s)"
        )
        parser.add_argument(
            "--image-key", default="jpg;jpeg;png;webp", metavar="KEYS", help="default: %(default)s"
        )

    shard_size = (
        "most samples in a shard (default: 1000, or fewer for 16 shards: a loader shares out whole shards)"
    )
    example = """  flyp shards write photos/train data/train
  flyp shards write photos/test data/test        # with the class order of data/classnames.txt
  flyp shards write iwildcam/metadata.csv data/test --image-col filename --label-col y --split test \\
      --group-col location_remapped --root iwildcam/train --classnames names.txt"""
    help = "write shards from a folder of class folders or from a CSV; image bytes are copied as they are"
    parser = add("write", "shards:write_command", help, example)
    parser.add_argument(
        "source", metavar="SOURCE", help="folder of class folders, or CSV or TSV with a header line"
    )
    parser.add_argument(
        "dest", metavar="DEST", help="the split folder to write; class names and templates go above it"
    )
    parser.add_argument("--classnames", metavar="FILE", help="class names in the order of their indices: a file, or "
                        "imagenet (default: classnames.txt above DEST where there is one, else sorted)")  # fmt: skip
    parser.add_argument("--templates", metavar="FILE", help="a file, openai, simple, or one template with its {c} "
                        "(default: the file above DEST where there is one, else 'a photo of a {c}.')")  # fmt: skip
    parser.add_argument("--shard-size", type=int, metavar="N", help=shard_size)
    parser.add_argument(
        "--seed", type=int, default=0, help="of the shuffle before writing (default: %(default)s)"
    )
    workers(parser)
    table = parser.add_argument_group("for a CSV")
    table.add_argument("--image-col", metavar="COL", help="image paths")
    table.add_argument(
        "--label-col", metavar="COL", help="class names, or indices into the class names that are given"
    )
    table.add_argument("--split", metavar="VALUE", help="take the lines with this value (default: all lines)")
    table.add_argument("--split-col", metavar="COL", help="in this column (default: split)")
    table.add_argument(
        "--group-col", metavar="COL", help="written as .group members, for worst-group accuracy"
    )
    table.add_argument("--root", metavar="DIR", help="the image paths start here (default: the CSV's folder)")

    help = "write a few-shot set: K images of each class, copied as they are"
    parser = add("subset", "shards:subset_command", help, "  flyp shards subset data few/train --shots 16")
    parser.add_argument(
        "source", metavar="SOURCE", help="a data folder, a split folder or tars, on this machine"
    )
    parser.add_argument("dest", metavar="DEST", help="the split folder to write")
    parser.add_argument("--shots", type=int, required=True, metavar="K", help="images of each class")
    parser.add_argument("--seed", type=int, default=0, help="which images (default: %(default)s)")
    parser.add_argument("--split", default="train", help="of a data folder (default: %(default)s)")
    parser.add_argument("--shard-size", type=int, metavar="N", help=shard_size)
    keys(parser)

    help = "count samples, from the headers of the tars"
    parser = add("count", "check:count_command", help, "  flyp shards count data")
    parser.add_argument("source", metavar="SOURCE", nargs="+", help="a data folder, a split folder or tars")
    parser.add_argument("--split", default=None, help="of a data folder (default: train and test)")
    parser.add_argument("--json", action="store_true", default=False, help="JSON in place of the table")

    help = "read all shards and decode all images; list what is wrong, with exit status 1"
    parser = add("check", "check:check_command", help, "  flyp shards check data")
    parser.add_argument(
        "source", metavar="SOURCE", help="a data folder, a split folder or tars, on this machine"
    )
    parser.add_argument("--split", default=None, help="of a data folder (default: train and test)")
    parser.add_argument(
        "--classnames", default=None, metavar="FILE", help="default: classnames.txt of the set"
    )
    parser.add_argument("--templates", default=None, metavar="FILE", help="default: those of the set")
    keys(parser)
    workers(parser)
    parser.add_argument("--json", action="store_true", default=False, help="JSON in place of the table")


def _add_compare(commands: argparse._SubParsersAction) -> None:
    example = """  flyp compare --model ViT-B-16 --pretrained openai --train-data data \\
      --eval-data val=data --eval-data sketch=other --methods flyp,ce,lp,lp-ft --epochs 10 --out comparison"""
    help = "the paper's comparison on your data: methods with and without WiSE-FT, in and out of distribution"
    parser = _add(commands, "compare", help, example)
    parser.allow_abbrev = False  # an abbreviation may be another flag of train.py's
    parser.set_defaults(passes_on=True, function=_call("compare:compare_command"))
    parser.epilog = """All other flags go to each training as they are (train_flyp.py --help, --help-open-clip): --epochs,
--batch-size, --device, --model-config, ... Every method gets the same data, epochs and number of values of its one tuned
setting, the learning rate or, for lp, C. The value is chosen by top-1 on the first set after the last epoch, on the first
seed; the other seeds train with it. The first set also chooses alpha; no other set chooses anything. Each run is a folder in DIR/runs with its own command.txt;
finished ones are skipped, so that the same command goes on with a comparison that was interrupted."""
    add = parser.add_argument
    add("--model", required=True, metavar="NAME", help="open_clip's name of the architecture")
    add("--pretrained", required=True, metavar="TAG|PATH", help="what each fine-tuning starts from")
    add("--train-data", required=True, metavar="SHARDS", help="data folder (its train split) or tars")
    add(
        "--eval-data",
        action="append",
        required=True,
        metavar="NAME=SHARDS",
        help="a labelled set (a data folder: its test split); repeatable, first the ID validation set, which chooses",
    )
    add(
        "--id-test",
        metavar="NAME",
        help="the set of --eval-data that is an ID test set, and so not in mean OOD",
    )
    add(
        "--methods",
        default="flyp,ce,lp,lp-ft",
        metavar="A,B,...",
        help="of flyp, ce, lp, lp-ft, flyp-ce; others are compared with the first (default: %(default)s)",
    )
    add(
        "--lr", default="1e-6,3e-6,1e-5,3e-5", metavar="A,B,...", help="to choose from (default: %(default)s)"
    )
    add("--lp-c", default="1,10,100,1000", metavar="A,B,...", help="as many, in place of learning rates, for lp: its "
        "inverse strength of regularisation (default: %(default)s)")  # fmt: skip
    add("--seeds", default="0:3", metavar="A:B|A,B,...", help="without B (default: %(default)s)")
    add("--shots", metavar="K,L,...", help="so many images a class, drawn by the seed; a table for each")
    add(
        "--templates",
        action="append",
        metavar="FILE",
        help="to train with (a file, openai, simple, or one template); repeatable, a table for each. Sets with a "
        "templates file of their own are scored with that",
    )
    add("--out", required=True, metavar="DIR", help="for compare.md, compare.json, compare.png and runs/")


def _add_demo(commands: argparse._SubParsersAction) -> None:
    example = "  flyp demo\n  python train_flyp.py --demo                   # the same"
    help = "the whole way on handwritten digits: offline, on a CPU, in minutes; goes on where it stopped"
    parser = _add(commands, "demo", help, example)
    parser.add_argument(
        "--demo-dir", default="flyp-demo", metavar="DIR", help="for all that it writes (default: %(default)s)"
    )
    for flag, default, help in (("--pretrain-epochs", 20, "on captions"), ("--epochs", 10, "of FLYP")):
        parser.add_argument(
            flag, type=_positive, default=default, metavar="N", help=f"{help} (default: {default})"
        )
    parser.set_defaults(function=_call("demo:demo_command"))


def _count(text: str, least: int = 0) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text} is not a number from {least} on")
    return int(text)


def _positive(text: str) -> int:
    return _count(text, 1)


def _call(target: str) -> Callable[[argparse.Namespace], int | None]:
    """A command's function, named 'module:function', imported when it is called."""
    module, function = target.split(":")
    return lambda args: getattr(import_module(f"flyp_plugin.{module}"), function)(args)


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
    """Run a command; its exit status, None where it is 0.

    Raises:
        InputError: as the command.
    """
    if argv[:1] == ["train"]:
        train_parser().parse_known_args(
            argv[1:]
        )  # --help is answered before anything is imported that takes long
        return import_module("flyp_plugin.train").train(argv[1:])
    parser = _parser()
    args, rest = parser.parse_known_args(argv or ["--help"])
    if vars(args).pop("passes_on", False):
        args.train_flags = rest
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    return args.function(args)


def main() -> None:
    """Entry point of the console script; leaves the process."""
    run(lambda: call(sys.argv[1:]))


if __name__ == "__main__":
    main()
