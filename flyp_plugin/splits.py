"""Divide a labelled set into disjoint splits, for `flyp shards write --hold-out`.

An image in two splits makes a figure too good, and so do two images of one patient or camera. So what is divided is not
images but *units*: images that are byte for byte the same, or that have the same value of a column, stay together.
"""

import logging
from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping, Sequence
from fractions import Fraction
from hashlib import blake2b
from itertools import chain
from math import ceil, floor
from pathlib import Path

from flyp_plugin.errors import InputError, escape_control_chars
from flyp_plugin.parallel import map_parallel
from flyp_plugin.rows import Row

CHUNK = 256  # files that a process hashes before it asks for more
_log = logging.getLogger(__name__)


def join_units(*columns: Sequence[Hashable]) -> list[int]:
    """The unit of each image: images that are equal in any of the `columns`, directly or through others, share one."""
    parents = list(range(len(columns[0])))

    def find(image: int) -> int:
        while parents[image] != image:
            parents[image] = image = parents[parents[image]]
        return image

    for column in columns:
        first: dict[Hashable, int] = {}
        for image, value in enumerate(column):
            parents[find(image)] = find(first.setdefault(value, image))
    return [find(image) for image in range(len(parents))]


def divide(
    units: Sequence[Hashable],
    names: Sequence[bytes],
    labels: Sequence[str],
    shares: Mapping[str, Fraction],
    seed: int,
) -> list[str]:
    """The split of each image, so that each split gets its share of each class as nearly as whole units allow.

    A greedy method in the manner of scikit-learn's StratifiedGroupKFold: the largest units first, those of one size in
    random order, each to the split that has most room for its classes. The room for a class is its share of the class,
    rounded down at first and up when no split has any left; among equals, the split with the smallest part of its own
    share takes the unit. Units of one image thus come to within one image of the share of every class. The first split
    gets an image of each class before any other split, because what is not in training cannot be learned.

    Args:
        units: the unit of each image.
        names: an image's identity, equal only within a unit: its hash. The result depends on these and the seed, and not
            on the order of the images.
        shares: the share of each split; together 1.
    """
    members, identity = defaultdict(list), dict[Hashable, bytes]()
    for image, unit in enumerate(units):
        members[unit].append(image)
        identity[unit] = min(names[image], identity.get(unit, names[image]))
    sizes, order = Counter(labels), list(shares)
    rooms = []  # for each split, of each class: the images that may still come, by the share rounded down and up
    for number, share in enumerate(shares.values()):
        least = int(number == 0)
        down = {label: max(least, floor(share * size)) for label, size in sizes.items()}
        rooms.append((down, {label: max(least, ceil(share * size)) for label, size in sizes.items()}))
    taken, splits = [0] * len(rooms), [""] * len(labels)

    def priority(unit: Hashable) -> tuple[int, bytes]:
        return -len(members[unit]), blake2b(b"%d " % seed + identity[unit]).digest()

    for unit in sorted(members, key=priority):
        counts = Counter(labels[image] for image in members[unit])
        preferences = []
        for share, already, room in zip(shares.values(), taken, rooms):
            fits = [sum(min(n, of_class[label]) for label, n in counts.items()) for of_class in room]
            preferences.append((*fits, -(already + len(members[unit])) / float(share)))
        best = preferences.index(max(preferences))
        taken[best] += len(members[unit])
        for of_class in rooms[best]:
            for label, number in counts.items():
                of_class[label] -= number
        for image in members[unit]:
            splits[image] = order[best]
    return splits


def resolve_shares(dest: Path, hold_out: Sequence[tuple[str, Fraction]]) -> dict[str, Fraction]:
    """The share of each split by name, that of `dest` first."""
    shares = {dest.name: 1 - sum((share for _, share in hold_out), Fraction(0))}
    for name, share in hold_out:
        if name in shares:
            raise InputError(f"--hold-out {name} is the name of another split here; choose another name.")
        shares[name] = share
    if min(shares.values()) <= 0:
        raise InputError(
            f"the shares of --hold-out leave nothing for {dest}; give shares that sum to less than 1."
        )
    return shares


def divide_rows(rows: Sequence[Row], shares: dict[str, Fraction], seed: int, workers: int) -> list[str]:
    """The split of each row. Images with the same bytes, and those with the same value of --by, stay together."""
    paths = sorted({row.image for row in rows})
    chunks = [paths[i : i + CHUNK] for i in range(0, len(paths), CHUNK)]
    hashed = chain.from_iterable(map_parallel(_hash_files, chunks, workers, "hashing", f"x{CHUNK} images"))
    digest_of = dict(zip(paths, hashed))
    digests = [digest_of[row.image] for row in rows]
    first: dict[bytes, str] = {}
    same = [(path, first[d]) for path in paths if first.setdefault(d := digest_of[path], path) != path]
    if same:
        example = escape_control_chars(" and ".join(same[0]))
        _log.info(
            f"{len(same)} images are byte for byte the same as another, such as {example}; they stay in one split."
        )
    units = join_units(digests, *([[row.by for row in rows]] if rows[0].by else []))
    splits = divide(units, digests, [row.label for row in rows], shares, seed)
    for name in shares:
        if name not in splits:
            largest = max(Counter(units).values())
            raise InputError(
                f"--hold-out gives {name} no images: the largest group of images that stay together has {largest} of "
                f"{len(rows)}; give larger shares, or another --by."
            )
    return splits


def _hash_files(paths: Sequence[str]) -> list[bytes]:
    return [blake2b(Path(path).read_bytes(), digest_size=16).digest() for path in paths]
