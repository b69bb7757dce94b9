"""`flyp SUBCOMMAND`: the parsers, and nothing that takes long to import; a command's work is in its own module."""

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from importlib import import_module

from flyp_plugin import __version__
from flyp_plugin.errors import run


def _add_train(commands: argparse._SubParsersAction) -> None:
    # train has a parser of its own, for it shares its command line with open_clip's: see train.py
    commands.add_parser("train", help="fine-tune a CLIP model with FLYP (the same as train_flyp.py)", add_help=False)


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
    for add in (_add_train,):
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
