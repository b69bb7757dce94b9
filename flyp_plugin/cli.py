"""`flyp SUBCOMMAND`: the parsers, and nothing that takes long to import; a command's work is in its own module."""

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module

from flyp_plugin import __version__
from flyp_plugin.errors import run


def _add_train(commands: argparse._SubParsersAction) -> None:
    # train has a parser of its own, for it shares its command line with open_clip's: see train.py
    commands.add_parser("train", help="fine-tune a CLIP model with FLYP (the same as train_flyp.py)", add_help=False)


def _add_shards(commands: argparse._SubParsersAction) -> None:
    what = "write class-labelled shards, cut few-shot sets from them, count and check them"
    shards = commands.add_parser("shards", help=what, description=f"{what[0].upper()}{what[1:]}.").add_subparsers(
        title="commands", metavar="COMMAND", required=True
    )

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
        parser.add_argument("--workers", type=int, default=default, help="processes (default: %(default)s)")

    def keys(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--label-key", default="cls", metavar="KEY", help="or json:FIELD (default: %(default)s)")
        parser.add_argument("--image-key", default="jpg;jpeg;png;webp", metavar="KEYS", help="default: %(default)s")

    shard_size = "most samples in a shard (default: 1000, or fewer for 16 shards: a loader shares out whole shards)"
    example = """  flyp shards write photos/train data/train
  flyp shards write photos/test data/test        # with the class order of data/classnames.txt
  flyp shards write iwildcam/metadata.csv data/test --image-col filename --label-col y --split test \\
      --group-col location_remapped --root iwildcam/train --classnames names.txt"""
    help = "write shards from a folder of class folders or from a CSV; image bytes are copied as they are"
    parser = add("write", "shards:write_command", help, example)
    parser.add_argument("source", metavar="SOURCE", help="folder of class folders, or CSV or TSV with a header line")
    parser.add_argument("dest", metavar="DEST", help="the split folder to write; class names and templates go above it")
    parser.add_argument("--classnames", metavar="FILE", help="class names in the order of their indices: a file, or "
                        "imagenet (default: classnames.txt above DEST where there is one, else sorted)")  # fmt: skip
    parser.add_argument("--templates", metavar="FILE", help="a file, openai, simple, or one template with its {c} "
                        "(default: the file above DEST where there is one, else 'a photo of a {c}.')")  # fmt: skip
    parser.add_argument("--shard-size", type=int, metavar="N", help=shard_size)
    parser.add_argument("--seed", type=int, default=0, help="of the shuffle before writing (default: %(default)s)")
    workers(parser)
    table = parser.add_argument_group("for a CSV")
    table.add_argument("--image-col", metavar="COL", help="image paths")
    table.add_argument("--label-col", metavar="COL", help="class names, or indices into the class names that are given")
    table.add_argument("--split", metavar="VALUE", help="take the lines with this value (default: all lines)")
    table.add_argument("--split-col", metavar="COL", help="in this column (default: split)")
    table.add_argument("--group-col", metavar="COL", help="written as .group members, for worst-group accuracy")
    table.add_argument("--root", metavar="DIR", help="the image paths start here (default: the CSV's folder)")

    help = "write a few-shot set: K images of each class, copied as they are"
    parser = add("subset", "shards:subset_command", help, "  flyp shards subset data few/train --shots 16")
    parser.add_argument("source", metavar="SOURCE", help="a data folder, a split folder or tars, on this machine")
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
    parser.add_argument("source", metavar="SOURCE", help="a data folder, a split folder or tars, on this machine")
    parser.add_argument("--split", default=None, help="of a data folder (default: train and test)")
    parser.add_argument("--classnames", default=None, metavar="FILE", help="default: classnames.txt of the set")
    parser.add_argument("--templates", default=None, metavar="FILE", help="default: those of the set")
    keys(parser)
    workers(parser)
    parser.add_argument("--json", action="store_true", default=False, help="JSON in place of the table")


def _call(target: str) -> Callable[[argparse.Namespace], int | None]:
    """A command's function, named 'module:function', imported when it is called."""
    module, function = target.split(":")
    return lambda args: getattr(import_module(f"flyp_plugin.{module}"), function)(args)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="flyp", description="Fine-tune CLIP models like they were pretrained (FLYP), with open_clip."
    )
    parser.add_argument("--version", action="version", version=f"flyp-plugin {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in (_add_train, _add_shards):
        add(commands)
    return parser


def _main(argv: Sequence[str]) -> int | None:
    if argv[:1] == ["train"]:
        return import_module("flyp_plugin.train").train(argv[1:])
    args = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    return args.function(args)


def main() -> None:
    """Entry point of the console script; leaves the process."""
    run(lambda: _main(sys.argv[1:]))
