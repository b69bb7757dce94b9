"""`flyp shards write|subset|count|check`: make and inspect class-labelled webdataset shards."""

import argparse
import json
import logging
import os
from collections.abc import Callable
from functools import partial
from typing import Any

from flyp_plugin.commands import check
from flyp_plugin.commands.flags import add_key_flags, count
from flyp_plugin.errors import InputError, escape_control_chars
from flyp_plugin.shards import in_processes, local_shards, subset, write
from flyp_plugin.sources import IMAGE_KEY, TAR_ERRORS, count_shard, find_scattered_sample, first_endings

EXAMPLE = "  flyp shards write photos/train data/train\n  flyp shards check data"
_log = logging.getLogger(__name__)


def add_flags(parser: argparse.ArgumentParser) -> None:
    # fmt: off
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, run: Callable, help: str, example: str) -> argparse.ArgumentParser:
        added = commands.add_parser(
            name, help=help, formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=argparse.SUPPRESS,
            description=f"example:\n{example}\n\n{help[0].upper()}{help[1:]}.",
        )
        added.set_defaults(run=run)
        return added

    some = "a data folder, a split folder or tars"
    of = "of a data folder (default: train and test)"
    many = "most samples in a shard (default: 1000, or fewer for 16 shards: a loader shares out whole shards)"
    size: dict[str, Any] = {"type": int, "metavar": "N", "help": many}
    cores = min(4, os.cpu_count() or 1)
    workers: dict[str, Any] = {"type": count, "default": cores, "help": "processes (default: %(default)s)"}
    as_json: dict[str, Any] = {"action": "store_true", "default": False, "help": "JSON in place of the table"}

    example = """  flyp shards write photos/train data/train
  flyp shards write photos/test data/test        # with the class order of data/classnames.txt
  flyp shards write iwildcam/metadata.csv data/test --image-col filename --label-col y --split test \\
      --group-col location_remapped --root iwildcam/train --classnames names.txt"""
    help = "write shards from a folder of class folders or from a CSV; image bytes are copied as they are"
    parser = command("write", write_command, help, example)
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
    add = command("subset", subset_command, help, example).add_argument
    add("source", metavar="SOURCE", help=f"{some}, on this machine")
    add("dest", metavar="DEST", help="the split folder to write")
    add("--shots", type=int, required=True, metavar="K", help="images of each class")
    add("--seed", type=int, default=0, help="which images (default: %(default)s)")
    add("--split", default="train", help="of a data folder (default: %(default)s)")
    add("--shard-size", **size)
    add_key_flags(add)

    help = "count samples, from the headers of the tars"
    add = command("count", count_command, help, "  flyp shards count data").add_argument
    add("source", metavar="SOURCE", nargs="+", help=some)
    add("--split", default=None, help=of)
    add("--image-key", default=IMAGE_KEY, metavar="KEYS", help="count samples with one of these (default: %(default)s)")
    add("--json", **as_json)

    help = "read all shards and decode all images; list what is wrong, with exit status 1"
    add = command("check", check.run, help, "  flyp shards check data").add_argument
    add("source", metavar="SOURCE", help=f"{some}, on this machine")
    add("--split", default=None, help=of)
    add("--classnames", default=None, metavar="FILE", help="default: classnames.txt of the set")
    add("--templates", default=None, metavar="FILE", help="default: those of the set")
    add_key_flags(add)
    add("--workers", **workers)
    add("--json", **as_json)
    # fmt: on


def write_command(args: argparse.Namespace) -> None:
    """flyp shards write"""
    write(**{name: value for name, value in vars(args).items() if name != "run"})


def subset_command(args: argparse.Namespace) -> None:
    """flyp shards subset"""
    sizes = subset(**{name: value for name, value in vars(args).items() if name != "run"})
    _log.info(f"Wrote {sum(sizes.values())} samples in {len(sizes)} shards to {args.dest}.")
    _log.info(f"Next: flyp shards check {args.dest}")


def count_command(args: argparse.Namespace) -> None:
    """flyp shards count"""
    pairs = [(source, split) for source in args.source for split in check._splits(source, args.split)]
    shards = [shard for pair in pairs for shard in local_shards(*pair)]
    sizes = dict(zip(shards, in_processes(partial(_count, image_key=args.image_key), shards, 1, "counting")))
    if args.json:
        print(json.dumps({"shards": sizes, "total": sum(sizes.values())}))
    else:
        print("\n".join(f"{size:>10}  {shard}" for shard, size in sizes.items()))
        print(f"{sum(sizes.values()):>10}  in {len(sizes)} shards")
    for shard in shards:
        if (apart := find_scattered_sample(shard)) is not None:
            _log.warning(f"{shard} cannot be used as it is: {escape_control_chars(apart)}.")
        elif not sizes[shard]:
            members = escape_control_chars(", ".join(first_endings(shard)))
            _log.warning(
                f"{shard} has no sample with a {args.image_key.replace(';', '/')} member; the members of its first are "
                f"{members[:200] or 'none'}. --image-key names the one that holds the image."
            )


def _count(shard: str, image_key: str) -> int:
    try:
        return count_shard(shard, image_key)
    except TAR_ERRORS as error:
        reason = str(error).partition(":")[0]
        raise InputError(f"{shard} cannot be read as a tar ({reason}); write or download it again.") from None
