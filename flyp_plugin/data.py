"""Class-labelled shards -> batches: ClassPromptDataset for training, LabelledDataset for evaluation.

The way of a sample through shard, label, shuffle, prompt and transform is `_TrainStream`; what happens at each step
is in samples.py. Where shards are is sources.py's, what a prompt is prompts.py's.
"""

import gc
import logging
import math
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import chain, count, islice
from typing import Any

import torch
import torch.distributed as dist
import webdataset as wds
from torch.utils.data import DataLoader, IterableDataset, default_collate, get_worker_info

from flyp_plugin.errors import InputError
from flyp_plugin.flags import MAX_LOST
from flyp_plugin.prompts import ClassPrompts, PromptTokens, resolve_prompts
from flyp_plugin.samples import Sample, Skipped, decoded, labelled, prompted, random_states_kept, read_samples
from flyp_plugin.sources import IMAGE_KEY, RETRIES, count_samples, expand_sources, stated_sizes

# Samples in the shuffle buffer, and before the first leaves: as in open_clip
SHUFFLE, SHUFFLE_INITIAL = 5000, 1000
Batch = tuple[torch.Tensor, torch.Tensor]
_log = logging.getLogger(__name__)


@dataclass
class _Reader:
    """How a sample of these shards is read; the part that training and evaluation share."""

    shards: Sequence[str]
    preprocess: Callable
    batch_size: int
    num_classes: int
    image_key: str
    label_key: str
    rank: int
    world_size: int
    retries: int
    samples_in: Callable[[str], int]  # about how many a shard should hold

    def labelled(self, shards: Sequence[str], skip: Skipped, group: str | None = None) -> Iterator[Sample]:
        samples = read_samples(shards, skip, self.retries, self.samples_in)
        return labelled(samples, self.num_classes, skip, self.image_key, self.label_key, group)


@dataclass
class _TrainStream:
    """One worker's share of one pass over the shards, as (images, tokens) batches; the last one may be smaller."""

    reader: _Reader
    tokens: PromptTokens
    seed: int
    weights: Sequence[float] | None  # one a shard: sample shards with replacement, in proportion
    jpeg_draft: int
    with_labels: bool
    clock: torch.Tensor  # int64 (epoch, repeat) in shared memory, set by the main process before each pass
    occurs: torch.Tensor  # bool (classes,) in shared memory, set by the workers: which have images

    def __call__(self, worker: int, num_workers: int, skip: Skipped) -> Iterator[Batch]:
        epoch, repeat = self.clock.tolist()
        samples = self.reader.labelled(self.shards_of(epoch, repeat, worker, num_workers), skip)
        rng = random.Random(repr((self.seed, epoch, repeat, self.reader.rank, worker)))
        samples = wds.shuffle(SHUFFLE, initial=SHUFFLE_INITIAL, rng=rng)(samples)
        samples = prompted(samples, self.tokens.table.shape[1], self.seed, epoch, repeat)
        images = decoded(samples, self.reader.preprocess, skip, self.jpeg_draft)
        for batch in _in_lists(images, self.reader.batch_size):
            labels = [s["label"] for s in batch]
            self.occurs[labels] = True
            tokens = self.tokens.take(labels, [s["template"] for s in batch])
            if self.with_labels:
                tokens = torch.cat([tokens, torch.tensor(labels)[:, None]], dim=1)
            yield default_collate([s["image"] for s in batch]), tokens

    def shards_of(self, epoch: int, repeat: int, worker: int, num_workers: int) -> Sequence[str]:
        shards, rank, world_size = list(self.reader.shards), self.reader.rank, self.reader.world_size
        if self.weights is not None:
            rng = random.Random(repr(("resampled", self.seed, epoch, repeat, rank, worker)))
            return rng.choices(shards, self.weights, k=math.ceil(len(shards) / (world_size * num_workers)))
        random.Random(repr((self.seed, epoch))).shuffle(shards)
        mine = shards[rank::world_size]
        random.Random(repr((self.seed, epoch, repeat, rank))).shuffle(mine)
        return mine[worker::num_workers]


@dataclass
class _EvalStream:
    """One worker's share of one pass in the order of the shards, as dicts with labels, keys and groups."""

    reader: _Reader
    group_key: str | None

    def __call__(self, worker: int, num_workers: int, skip: Skipped) -> Iterator[dict[str, Any]]:
        reader = self.reader
        part, parts = reader.rank * num_workers + worker, reader.world_size * num_workers
        by_shard = len(reader.shards) >= parts  # else everyone reads all and decodes every parts-th sample
        shards = reader.shards[part::parts] if by_shard else reader.shards
        unread = skip if by_shard or part == 0 else Skipped()  # what all of them see is counted by one
        samples = reader.labelled(shards, unread, self.group_key)
        samples = samples if by_shard else islice(samples, part, None, parts)
        for batch in _in_lists(decoded(samples, reader.preprocess, skip), reader.batch_size):
            yield {
                "images": default_collate([s["image"] for s in batch]),
                "labels": torch.tensor([s["label"] for s in batch]),
                "keys": [s["key"] for s in batch],
                **({"groups": [s["group"] for s in batch]} if self.group_key else {}),
            }


class _Workers(IterableDataset):
    """Run a stream in a DataLoader's workers; yields (batch, what was skipped since the last one).

    A user's mistake travels as a value in the batch's place: raised, it would arrive wrapped in a traceback.
    """

    def __init__(self, stream: Callable[[int, int, Skipped], Iterator[Any]]):
        self.stream = stream

    def __iter__(self) -> Iterator[tuple[Any, Skipped]]:
        info = get_worker_info()
        skip = Skipped()
        try:
            for batch in self.stream(info.id if info else 0, info.num_workers if info else 1, skip):
                yield batch, skip.taken()
        except InputError as error:
            yield error, skip.taken()
        yield None, skip.taken()


def _begin_worker(worker: int) -> None:
    """Leave alone what is the main process's: its memory, and its end."""
    gc.freeze()  # a garbage collection touches all objects, and would copy all memory that is shared by the fork

    def unless_the_main_process_has_ended(kind: type[BaseException], *rest: Any) -> None:
        if not issubclass(kind, ConnectionError):  # in the thread that hands over tensors
            sys.__excepthook__(kind, *rest)

    sys.excepthook = unless_the_main_process_has_ended


def _loader(stream: Callable, num_workers: int) -> DataLoader:
    return DataLoader(
        _Workers(stream),
        batch_size=None,
        collate_fn=tuple,  # keeps the pair: it is a batch already
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        worker_init_fn=_begin_worker,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # else it would draw from the generator that the model's dropout uses
    )


def _received(loader: DataLoader, skipped: Skipped) -> Iterator[Any]:
    for batch, skipped_here in loader:
        skipped.add(skipped_here)
        if isinstance(batch, InputError):
            try:
                raise batch
            finally:  # a frame that holds its own error is freed by the garbage collector alone, and workers that it
                del batch  # shuts down are waited for 5 seconds each
        if batch is not None:
            yield batch


def _in_lists(samples: Iterable[Sample], size: int) -> Iterator[list[Sample]]:
    samples = iter(samples)
    while True:
        with nullcontext() if get_worker_info() else random_states_kept():
            batch = list(islice(samples, size))
        if not batch:
            return
        yield batch


def rebatch(
    passes: Iterable[Iterable[Batch]],
    batch_size: int,
    total: int,
    allowed_shortfall: Callable[[], int] = lambda: 0,
) -> Iterator[Batch]:
    """Batches of `batch_size` out of workers' batches, up to `total` samples; the last one may be smaller.

    Full batches pass through as they are; the workers' smaller last ones are joined. All of a pass is given out
    before anything of the next. Where a pass ends no more than `allowed_shortfall()` samples short of the total, the last
    batch is smaller by them instead of starting another pass.
    """
    held: list[Batch] = []
    left = total

    def num_held() -> int:
        return sum(len(images) for images, _ in held)

    def take(size: int) -> Batch:
        nonlocal held, left
        images, texts = (torch.cat(parts) for parts in zip(*held))
        held = [(images[size:], texts[size:])] if len(images) > size else []
        left -= size
        return images[:size], texts[:size]

    for parts in passes:
        from_last_pass = bool(held)
        for images, texts in parts:
            if from_last_pass or len(images) != batch_size:
                held.append((images, texts))
            else:
                size = min(batch_size, left)
                left -= size
                yield images[:size], texts[:size]
            while left and num_held() >= min(batch_size, left):
                yield take(min(batch_size, left))
                from_last_pass = False
            if not left:
                return
        if held and left <= batch_size and left - num_held() <= allowed_shortfall():
            yield take(num_held())
            return


class ClassPromptDataset(IterableDataset):
    """Batches of (images, class prompts) from class-labelled webdataset shards, for FLYP (arXiv 2212.00638, sec. 3).

    Each image comes with its class name in one of the templates. The transform and the template of a sample are a
    pure function of (seed, epoch, key), whatever the number of workers or ranks; the order of the samples, and so the
    batches, are one of (seed, epoch, ranks, workers). Iterate over it directly: it starts its own workers. Every pass
    is a new epoch; `set_epoch` says which.

    Yields:
        images float (B, 3, H, W) and tokens int64 (B, L), as a tuple or as {"image", "text"}. An epoch is
        ceil(N / batch_size) batches, the last one smaller. Every rank makes the same number of batches of the same
        sizes, ceil(N / ranks) samples in all, out of whole shards that are dealt anew each epoch: a rank whose shards
        hold more leaves the rest out, one whose shards hold fewer starts them again. With shards of one size, a
        multiple of the ranks in number, every sample is seen once; else small shards are seen more often.

    Args:
        shards: a data folder, its split folder, a brace pattern, `pipe:` or http(s) source, several joined by `::`,
            or a list of tar URLs.
        preprocess: PIL image -> float (3, H, W), such as open_clip.create_model_and_transforms gives.
        tokenizer: as open_clip.get_tokenizer gives.
        batch_size: images a batch, on each rank.
        prompts: class names and templates; None takes those in the text files beside the shards.
        num_samples: N, over all ranks: more than there are repeats the set, reshuffled, fewer cuts it. None counts.
        num_workers: worker processes; 0 reads in this one. No more than there are shards are started.
        rank, world_size: None asks torch.distributed.
        shard_weights: sample shards with replacement, with these weights (open_clip's --dataset-resampled).
        image_key: members that may hold the image, joined by `;`.
        label_key: member that holds the class index, or `json:FIELD`.
        retries: how often a remote shard that breaks off is read again, a minute in all with the default.
        max_lost: largest share of an epoch's samples, on each rank, that may be unreadable.
        jpeg_draft: decode large JPEGs at a fraction of their size, not below this many pixels; 0: as they are.
        with_labels: append each image's class index to its tokens, which are then (B, L + 1).
        as_dict: yield dicts, as open_clip 4 takes them.

    Raises:
        InputError: no shards, fewer shards than ranks, labels that the class names do not fit, more unreadable than
            `max_lost`, nothing readable.

    Example: FLYP in plain PyTorch.
        >>> import open_clip, torch
        >>> from flyp_plugin import ClassPromptDataset
        >>> model, preprocess, _ = open_clip.create_model_and_transforms("ViT-B-16", "openai", output_dict=True)
        >>> tokenizer = open_clip.get_tokenizer("ViT-B-16")
        >>> dataset = ClassPromptDataset("data", preprocess, tokenizer, batch_size=256, num_workers=4)
        >>> loss, optimizer = open_clip.ClipLoss(), torch.optim.AdamW(model.parameters(), lr=1e-5)
        >>> for epoch in range(10):
        ...     for images, tokens in dataset:
        ...         optimizer.zero_grad()
        ...         loss(**model(images, tokens)).backward()
        ...         optimizer.step()
    """

    def __init__(
        self,
        shards: str | Sequence[str],
        preprocess: Callable,
        tokenizer: Callable,
        batch_size: int,
        *,
        prompts: ClassPrompts | None = None,
        num_samples: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
        shard_weights: Sequence[float] | None = None,
        image_key: str = IMAGE_KEY,
        label_key: str = "cls",
        retries: int = RETRIES,
        max_lost: float = MAX_LOST,
        jpeg_draft: int = 0,
        with_labels: bool = False,
        as_dict: bool = False,
    ):
        by_source = expand_sources(shards, "train") if isinstance(shards, str) else [shards]
        self.shards = list(chain.from_iterable(by_source))
        if not self.shards:
            raise InputError("the list of shards is empty; give at least one tar.")
        self.prompts = prompts or resolve_prompts(self.shards)
        self.rank, self.world_size = _world() if rank is None or world_size is None else (rank, world_size)
        self.as_dict = as_dict
        self.batch_size = batch_size
        if batch_size < 1:
            raise InputError(f"a batch size of {batch_size} is no batch; give 1 or more.")
        if shard_weights is None and len(self.shards) < self.world_size:
            raise InputError(
                f"{len(self.shards)} shards cannot be shared by {self.world_size} ranks; write smaller ones "
                "(`flyp shards write --shard-size`), or start fewer ranks."
            )
        if num_samples is None:
            num_samples = count_samples(self.shards, image_key)
        if num_samples < 1:
            raise _nothing(self.shards, Skipped())
        self.num_workers = num_workers
        if shard_weights is None:
            self.num_workers = min(num_workers, len(self.shards) // self.world_size)
        self._samples = math.ceil(num_samples / self.world_size)  # this rank's
        self.num_samples = self._samples * self.world_size
        self.num_batches = math.ceil(self._samples / batch_size)
        self._epoch, self._max_lost = 0, max_lost
        stated, mean = stated_sizes(self.shards, image_key), num_samples // len(self.shards)
        whole = sum(stated.get(shard, mean) for shard in self.shards)
        self._all_seen = self.world_size == 1 and shard_weights is None and num_samples >= whole
        num_classes, world = len(self.prompts.classnames), (self.rank, self.world_size)
        keys, samples_in = (image_key, label_key), partial(_size, stated, mean)
        reader = _Reader(self.shards, preprocess, batch_size, num_classes, *keys, *world, retries, samples_in)
        tokens, clock = self.prompts.tokenize(tokenizer), torch.zeros(2, dtype=torch.int64).share_memory_()
        self._occurs = torch.zeros(num_classes, dtype=torch.bool).share_memory_()
        self._stream = _TrainStream(
            reader, tokens, seed, shard_weights, jpeg_draft, with_labels, clock, self._occurs
        )
        self._loader = _loader(self._stream, self.num_workers)

    def __len__(self) -> int:
        """Batches an epoch, on each rank."""
        return self.num_batches

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration is."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[Any]:
        if get_worker_info():
            raise RuntimeError(
                "ClassPromptDataset starts its own workers: iterate over it, not over a DataLoader of it."
            )
        epoch, skipped = self._epoch, Skipped()
        self._epoch += 1

        def passes() -> Iterator[Iterator[Batch]]:
            for repeat in count():
                self._stream.clock.copy_(torch.tensor((epoch, repeat)))
                parts = self._within_limit(_received(self._loader, skipped), epoch, skipped)
                first = next(parts, None)
                if first is None:
                    raise _nothing(self.shards, skipped)
                yield chain([first], parts)

        alone = self.world_size == 1  # several ranks need equal batches
        allowed_shortfall = (lambda: max(skipped.lost, skipped.number)) if alone else lambda: 0
        for images, texts in rebatch(passes(), self.batch_size, self._samples, allowed_shortfall):
            yield {"image": images, "text": texts} if self.as_dict else (images, texts)
        skipped.report(f"epoch {epoch}")
        self._name_missing_classes(epoch)

    def _within_limit(self, batches: Iterable[Batch], epoch: int, skipped: Skipped) -> Iterator[Batch]:
        """`batches`, as long as no more is lost than may be; also looked at once they have ended."""
        for batch in chain(batches, [None]):
            _check_lost(skipped, self._samples, self._max_lost, f"epoch {epoch}")
            if batch is not None:
                yield batch

    def _name_missing_classes(self, epoch: int) -> None:
        """Say once which classes had no image, where one process has seen all: labels may be shifted by one."""
        missing = [name for name, there in zip(self.prompts.classnames, self._occurs.tolist()) if not there]
        if self._all_seen and missing:
            more = ", ..." if len(missing) > 5 else ""
            _log.warning(
                f"{len(missing)} of {len(self.prompts.classnames)} classes have no image: "
                f"{', '.join(missing[:5])}{more}. Is the list that of these shards, and are labels from 0 on?"
            )
        self._all_seen = False


def peek(
    shards: Sequence[str],
    prompts: ClassPrompts,
    seed: int = 0,
    image_key: str = IMAGE_KEY,
    label_key: str = "cls",
    number: int = 3,
) -> list[tuple[str, str]]:
    """(key, prompt) of the first samples in the first shards, as epoch 0 pairs them.

    Raises:
        InputError: a label there that the class names do not fit, or nothing but shards that cannot be read.
    """
    skip = Skipped()
    samples = read_samples(shards[:number], skip)
    samples = labelled(samples, len(prompts.classnames), skip, image_key, label_key)
    samples = islice(prompted(samples, len(prompts.templates), seed, 0, 0), number)
    pairs = [(sample["key"], prompts(sample["label"], sample["template"])) for sample in samples]
    if not pairs and len(shards) <= number:
        raise _nothing(shards, skip)
    return pairs


class LabelledDataset(IterableDataset):
    """Batches of labelled images, each image once, for evaluation. Iterate over it directly, as often as you like.

    Yields:
        {"images": float (B, 3, H, W), "labels": int64 (B,), "keys": list of B, "groups": list of B where asked}.
        With several ranks each gives out its part; the parts together are the set.

    Args:
        shards: tar URLs, see sources.expand_source.
        num_classes: labels are 0..num_classes-1.
        group_key: member with the group of a sample, or `json:FIELD`; None: no groups.
        max_lost: largest share of the samples that may be unreadable; what is skipped is logged.
        The others are ClassPromptDataset's.

    Raises:
        InputError: labels that the class names do not fit, more unreadable than `max_lost`, nothing readable.
    """

    def __init__(
        self,
        shards: Sequence[str],
        preprocess: Callable,
        batch_size: int,
        *,
        num_classes: int,
        num_workers: int = 0,
        image_key: str = IMAGE_KEY,
        label_key: str = "cls",
        group_key: str | None = None,
        retries: int = RETRIES,
        max_lost: float = 1.0,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.shards = list(shards)
        if not self.shards:
            raise InputError("the list of shards is empty; give at least one tar.")
        world = rank, world_size
        keys, samples_in = (image_key, label_key), partial(_size, stated_sizes(self.shards, image_key), 1)
        reader = _Reader(self.shards, preprocess, batch_size, num_classes, *keys, *world, retries, samples_in)
        self._alone, self._max_lost = world_size == 1, max_lost
        self._loader = _loader(_EvalStream(reader, group_key), num_workers)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        skipped, given = Skipped(), 0
        for batch in _received(self._loader, skipped):
            given += len(batch["labels"])
            yield batch
        if not given and self._alone:  # of several ranks one may have nothing but a broken shard
            raise _nothing(self.shards, skipped)
        _check_lost(skipped, given + skipped.lost, self._max_lost, self.shards[0])
        skipped.report(self.shards[0])


def _size(stated: Mapping[str, int], otherwise: int, shard: str) -> int:
    return stated.get(shard, otherwise)


def _check_lost(skipped: Skipped, samples: int, max_lost: float, where: str) -> None:
    if skipped.lost > max_lost * samples:
        raise InputError(
            f"{where}: {skipped.lost} of {samples} samples are lost, more than --max-lost {max_lost:g} allows, the "
            f"first: {skipped.first}; fix the data (`flyp shards check`), or allow more."
        )


def _nothing(shards: Sequence[str], skipped: Skipped) -> InputError:
    more = f" and {len(shards) - 1} more shards" if len(shards) > 1 else ""
    reason = f"the first problem is {skipped.first}" if skipped.first else "they hold no images"
    return InputError(f"not one sample of {shards[0]}{more} can be used; {reason}.")


def _world() -> tuple[int, int]:
    started = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if started else (0, 1)
