"""`flyp shards write|subset|count|check`: make and inspect class-labelled webdataset shards."""

import argparse
import json
import logging
import os
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from tqdm import tqdm

from flyp_plugin.commands import check
from flyp_plugin.commands.flags import add_key_flags, count, positive
from flyp_plugin.errors import InputError, escape_control_chars
from flyp_plugin.shards import list_splits, local_shards, subset, write
from flyp_plugin.sources import IMAGE_KEY
from flyp_plugin.tars import TAR_ERRORS, find_scattered_sample, first_endings, keys_with_image

EXAMPLE = """  flyp shards write photos data/train --hold-out val=0.1 --hold-out test=0.1
  flyp shards check data"""
WRITE_EXAMPLE = """  flyp shards write photos data/train --hold-out val=0.1 --hold-out test=0.1
  flyp shards write scans.csv data/train --image-col file --label-col finding --hold-out val=0.2 --by patient
  flyp shards write photos/train data/train
  flyp shards write photos/test data/test        # in the class order of data/classnames.txt
  flyp shards write iwildcam/metadata.csv data/test --image-col filename --label-col y --split test \\
      --group-col location_remapped --root iwildcam/train --classnames names.txt"""
_log = logging.getLogger(__name__)

# fmt: off


def add_flags(parser: argparse.ArgumentParser) -> None:
    """A subcommand for each of write, subset, count and check."""
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, prog="flyp shards")

    def command(name: str, run: Callable, help: str, example: str) -> argparse.ArgumentParser:
        added = commands.add_parser(
            name, help=help, formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=argparse.SUPPRESS,
            description=f"example:\n{example}\n\n{help[0].upper()}{help[1:]}.",
        )
        added.set_defaults(run=run)
        return added

    size: dict[str, Any] = {"type": positive, "metavar": "N",
        "help": "most samples in a shard (default: 1000, or fewer, to make 16 shards: loaders share out whole shards)"}

    help = "write shards from a folder of class folders or from a CSV; image files are copied unchanged"
    parser = command("write", lambda args: write(**vars(args)), help, WRITE_EXAMPLE)
    add = parser.add_argument
    add("source", metavar="SOURCE", help="folder of class folders, or CSV or TSV with a header line")
    add("dest", metavar="DEST", help="the split folder to write; class names and templates go into the folder above it")
    add("--classnames", metavar="FILE", help="class names in the order of their indices: a file, or imagenet "
        "(default: classnames.txt above DEST, else the sorted names)")
    add("--templates", metavar="FILE", help="a file, openai, simple, a set of the paper (fmow, ...), or one "
        "template with its {c} (default: the file above DEST, else 'a photo of a {c}.')")
    add("--hold-out", type=_share, action="append", metavar="NAME=SHARE", help="also write a split NAME beside DEST, with "
        "this share of the images of each class, such as val=0.1; DEST gets the rest; repeatable")
    add("--shard-size", **size)
    add("--seed", type=int, default=0, metavar="N",
        help="of --hold-out and of the shuffle before writing (default: %(default)s)")
    add("--workers", type=count, default=min(4, os.cpu_count() or 1), metavar="N",
        help="processes (default: %(default)s)")
    add = parser.add_argument_group("for a CSV").add_argument
    add("--image-col", metavar="COL", help="column of image paths")
    add("--label-col", metavar="COL", help="column of class names, or of indices into the class names given")
    add("--split", metavar="VALUE", help="take the lines with this value in --split-col; '' takes all lines")
    add("--split-col", metavar="COL", help="the column that --split is about (default: split)")
    add("--group-col", metavar="COL", help="column to write as .group members, for worst-group accuracy")
    add("--by", metavar="COL", help="column, such as patient or camera, whose values --hold-out does not divide")
    add("--root", metavar="DIR", help="folder that the image paths are relative to (default: the CSV's folder)")

    help = "write a few-shot set: K images of each class, copied unchanged"
    add = command("subset", subset_command, help, "  flyp shards subset data few/train --shots 16").add_argument
    add("source", metavar="SOURCE", help="a data folder, a split folder or tars, all local")
    add("dest", metavar="DEST", help="the split folder to write")
    add("--shots", type=positive, required=True, metavar="K", help="images of each class")
    add("--seed", type=int, default=0, metavar="N", help="which images are drawn (default: %(default)s)")
    add("--split", default="train", metavar="NAME", help="split of a data folder (default: %(default)s)")
    add("--shard-size", **size)
    add_key_flags(add)

    help = "count samples by reading the headers of the tars"
    add = command("count", count_command, help, "  flyp shards count data").add_argument
    add("source", metavar="SOURCE", nargs="+", help="a data folder, a split folder or tars, all local")
    add("--split", default=None, metavar="NAME", help="split of a data folder (default: all)")
    add("--image-key", default=IMAGE_KEY, metavar="KEYS", help="count samples with one of these (default: %(default)s)")
    add("--json", action="store_true", default=False, help="print JSON instead of the table")

    help = "read all shards, decode and compare all images; list what is wrong, with exit status 1"
    check.add_flags(command("check", check.run, help, "  flyp shards check data"))


# fmt: on


def _share(text: str) -> tuple[str, Fraction]:
    """argparse type: NAME=SHARE, with a share between 0 and 1."""
    name, _, share = text.partition("=")
    plain = re.fullmatch(r"[A-Za-z0-9][\w.-]*", name) and not name.endswith(".part")
    if not plain or not re.fullmatch(r"0?\.[0-9]+", share) or not Fraction(share):
        raise argparse.ArgumentTypeError(
            f"must be NAME=SHARE with a share between 0 and 1, such as val=0.1, got {text}"
        )
    return name, Fraction(share)


def subset_command(args: argparse.Namespace) -> None:
    """flyp shards subset"""
    sizes = subset(**vars(args))
    _log.info(f"Wrote {sum(sizes.values())} samples in {len(sizes)} shards to {args.dest}.")
    _log.info(f"Next: flyp shards check {args.dest}")


def count_command(args: argparse.Namespace) -> None:
    """flyp shards count"""
    pairs = [(source, split) for source in args.source for split in list_splits(source, args.split)]
    shards = [shard for pair in pairs for shard in local_shards(*pair)]
    bar = tqdm(shards, desc="counting", unit="shard", disable=None)
    sizes = {shard: _count(shard, args.image_key) for shard in bar}
    if args.json:
        print(json.dumps({"shards": sizes, "total": sum(sizes.values())}))
    else:
        print("\n".join(f"{size:>10}  {shard}" for shard, size in sizes.items()))
        print(f"{sum(sizes.values()):>10}  in {len(sizes)} shards")
    for shard in shards:
        if (apart := find_scattered_sample(shard)) is not None:
            _log.warning(f"{shard} cannot be used as it is: {escape_control_chars(apart)}.")
        elif not sizes[shard]:
            members = escape_control_chars(", ".join(first_endings(shard)))[:200] or "none"
            _log.warning(
                f"{shard} has no sample with a {args.image_key.replace(';', '/')} member, only {members}; name the "
                "member that holds the image with --image-key."
            )


def _count(shard: str, image_key: str) -> int:
    try:
        return sum(1 for _ in keys_with_image(shard, image_key))
    except TAR_ERRORS as error:
        reason = str(error).partition(":")[0]
        raise InputError(f"{shard} is not a readable tar ({reason}); write or download it again.") from None
