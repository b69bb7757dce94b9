"""The `flyp` command line: a table of subcommands, each in a module of its own.

A module in this package has `add_flags(parser)` and `run(args)`, which returns the exit status (None is 0). It imports
what takes long (torch) inside its functions, so that `--help` answers at once. To add a command, write such a module and add a line to COMMANDS.
`flyp train` is in COMMANDS for its help alone: it shares its command line with open_clip's script, see flyp_plugin/train.py.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from importlib import import_module

from flyp_plugin import __version__
from flyp_plugin.errors import run as run_cli
from flyp_plugin.flags import parser as train_parser

COMMANDS = {  # the module in this package, and its line of help
    "train": "fine-tune a CLIP model with FLYP (the same as train_flyp.py)",
    "eval": "score the classifier of a run or of pretrained weights on labelled sets",
    "wiseft": "merge pretrained and fine-tuned weights, with the alpha that is best on the first set",
    "export": "write a folder that open_clip, or timm as a plain classifier, loads by its local-dir: name",
    "shards": "write class-labelled shards, draw few-shot sets from them, count and check them",
    "compare": "the paper's comparison on your data: methods with and without WiSE-FT, ID and OOD",
    "demo": "the whole workflow on handwritten digits: offline, on a CPU, in minutes",
}
_WORKFLOW = """  flyp shards write photos data/train --hold-out val=0.1 --hold-out test=0.1
  flyp shards check data
  flyp train --model ViT-B-16 --pretrained openai --train-data data --eval-data val=data/val --name birds
  flyp wiseft logs/birds
  flyp eval logs/birds --eval-data test=data/test
  flyp export logs/birds --format timm --out classifier"""


def call(argv: Sequence[str]) -> int | None:
    """Run a command in this process and return its exit status (None is 0)."""
    if argv[:1] == ["train"]:
        rest = argv[1:]
        if "--demo" in rest:
            return call(["demo", *(arg for arg in rest if arg != "--demo")])
        train_parser().parse_known_args(rest)  # answers --help before torch is imported
        return import_module("flyp_plugin.train").train(rest)
    parser = _parser(argv[0] if argv else "")
    args, rest = parser.parse_known_args(argv or ["--help"])
    if argv[0] == "compare":  # which passes on the flags that it does not know
        args.train_flags = rest
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)} (see flyp {argv[0]} --help)")
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    return vars(args).pop("run")(args)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the console script and of train_flyp.py; exits the process."""
    run_cli(lambda: call(sys.argv[1:] if argv is None else argv))


def _parser(command: str) -> argparse.ArgumentParser:
    """The parser of `flyp`, with the flags of `command` only: no other command's module is imported."""
    parser = argparse.ArgumentParser(
        prog="flyp",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=f"example:\n{_WORKFLOW}\n\nFine-tune CLIP models like they were pretrained (FLYP), with open_clip.",
        usage="flyp COMMAND ...",
    )
    parser.add_argument("--version", action="version", version=f"flyp-plugin {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, prog="flyp")
    for name, help in COMMANDS.items():
        if name != command or name == "train":
            commands.add_parser(name, help=help, add_help=False)
            continue
        implementation = import_module(f"flyp_plugin.commands.{name}")
        added = commands.add_parser(
            name,
            help=help,
            usage=f"flyp {name} ...",
            description=f"example:\n{implementation.EXAMPLE}\n\n{help[0].upper()}{help[1:]}.",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=name != "compare",  # an abbreviation there may be a flag of `flyp train`
        )
        added.set_defaults(run=getattr(implementation, "run", None))  # `shards` has commands of its own
        implementation.add_flags(added)
    return parser
