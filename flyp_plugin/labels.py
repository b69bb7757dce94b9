"""The labels of local shards, read without the images: for few-shot sets and for --balance."""

import logging
import random
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

from tqdm import tqdm

from flyp_plugin.errors import InputError
from flyp_plugin.names import first_few, index_names
from flyp_plugin.remote import require_local
from flyp_plugin.sources import IMAGE_KEY
from flyp_plugin.tars import split_name

_log = logging.getLogger(__name__)


def few_shot_keys(
    shards: Sequence[str],
    shots: int,
    seed: int,
    label_key: str = "cls",
    image_key: str = IMAGE_KEY,
    classnames: Sequence[str] = (),
) -> set[tuple[str, str]]:
    """(shard, key) of `shots` random samples of each class. Fewer shots of a seed are a subset of more shots.

    A class with fewer samples gives all it has and is named in a warning. A wrong label or a key that is repeated in a
    shard raises InputError. The choice depends on the order of the local tars `shards`, not on their paths.
    """
    classes, seen = defaultdict(list), set()
    for sample in _read_labels(shards, label_key, image_key, classnames):
        identity = (sample["shard"], sample["key"])
        if identity in seen:
            raise InputError(f"{identity[0]} has two samples with the key {identity[1]}; rename one.")
        seen.add(identity)
        classes[sample["label"]].append(identity)
    if not classes:
        raise InputError(f"{shards[0]} has no samples; `flyp shards check` reports what is in it.")
    names = dict(enumerate(classnames)) or {label: str(label) for label in sorted(classes)}
    few = [f"{name} ({len(classes[label])})" for label, name in names.items() if len(classes[label]) < shots]
    if few:
        _log.warning(f"{len(few)} classes have fewer than {shots} images: {first_few(few, 20)}.")
    for label, identities in classes.items():
        random.Random(f"{seed} {label}").shuffle(identities)
    return {identity for identities in classes.values() for identity in identities[:shots]}


def count_labels(
    shards: Sequence[str], label_key: str, image_key: str, classnames: Sequence[str]
) -> list[int]:
    """Number of images of each class in local shards, of which all labels are read."""
    require_local(*shards)
    counts = Counter(sample["label"] for sample in _read_labels(shards, label_key, image_key, classnames))
    return [counts[label] for label in range(len(classnames))]


def _read_labels(shards: Sequence[str], label_key: str, image_key: str, names: Sequence[str]) -> Iterator:
    from flyp_plugin.samples import label_samples, read_samples

    images = set(image_key.split(";")) - {label_key}
    bar = tqdm(shards, desc="reading labels", unit="shard", disable=None)
    read = read_samples(bar, log_skipped, wanted=lambda shard, member: split_name(member)[1] not in images)
    keys, indices = (image_key, label_key), index_names(names)
    return label_samples(read, len(names) or 2**63, log_skipped, *keys, indices=indices)


def log_skipped(message: str, lost: int = 1) -> None:
    """For samples.read_samples: a warning for each sample that cannot be read."""
    _log.warning(message)
