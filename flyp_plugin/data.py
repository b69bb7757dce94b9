"""Class-labelled shards -> batches: ClassPromptDataset for training, LabelledDataset for evaluation.

The rule of an epoch
- A sample's augmented image and its prompt are a pure function of (seed, epoch, key), whatever the number of workers
  and ranks: both are drawn from a generator that is seeded with these three.
- The order of the samples, and with it the batches, is a function of (seed, epoch, ranks, workers): shards are shuffled
  and dealt to the ranks, each rank's to its workers, and each worker's samples pass through a shuffle buffer.
- A rank sees each of its samples once before it sees any twice. A single process sees all N samples once, in
  ceil(N / batch_size) batches, the last one smaller.
- Each of R ranks makes ceil(ceil(N / R) / batch_size) batches, of equal sizes, because a gradient step waits for every
  rank. A rank whose shards hold more than its N / R samples leaves the rest out; one whose shards hold fewer starts
  them again (`repeat` 1, 2, ...) with new crops and prompts. So write shards of one size, a multiple of R in number.
- With class weights (--balance), an epoch is still N samples, but an image comes as often as its class's weight says,
  on average: a pass over the shards yields about N, and the next one or a cut makes it exactly N.
- Unreadable images and tars are skipped, counted and reported, and end the run once they exceed `max_lost`. A wrong
  label ends it at once, because the class list does not belong to the shards.

The code follows a sample from tar to batch: a worker reads, labels, shuffles, prompts, decodes and batches it
(worker_batches, with the steps in samples.py); the main process takes the batches of all workers (workers.py), joins the
smaller last ones (rebatch) and ends the epoch at its last sample (__iter__).
"""

import logging
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain, count, islice
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import IterableDataset, default_collate, get_worker_info

from flyp_plugin import samples as steps
from flyp_plugin.errors import InputError
from flyp_plugin.names import first_few, index_names
from flyp_plugin.prompts import ClassPrompts, resolve_prompts
from flyp_plugin.sources import IMAGE_KEY, RETRIES, count_samples, expand_sources, shard_sizes
from flyp_plugin.workers import Skipped, batch_samples, receive_batches, start_workers

MAX_LOST = 0.01  # largest share of an epoch's samples that may be unreadable
Batch = tuple[torch.Tensor, torch.Tensor]  # images, tokens
_log = logging.getLogger(__name__)


class ClassPromptDataset(IterableDataset):
    """Batches of (images, class prompts) from class-labelled webdataset shards, for FLYP (arXiv 2212.00638, sec. 3).

    Each image comes with one of the prompts of its class, by the rule of an epoch above. Iterate over the data set
    directly: it starts its own workers. Every pass is a new epoch; `set_epoch` chooses which.

    Yields:
        images float (B, 3, H, W) and tokens int64 (B, L), as a tuple or as {"image", "text"}.

    Args:
        shards: a source as in sources.expand_source or several joined by `::`, or a list of tar URLs.
        preprocess: PIL image -> float (3, H, W), as from open_clip.create_model_and_transforms.
        tokenizer: as from open_clip.get_tokenizer.
        batch_size: images per batch and rank.
        prompts: those of the classes; None: by the text files beside the shards.
        num_samples: N, over all ranks: more than there are repeats the set, fewer cuts it. None counts.
        sizes: {shard: its samples}, where known; None: sources.shard_sizes.
        num_workers: worker processes, at most one per shard; 0 reads in this one.
        rank, world_size: None asks torch.distributed.
        shard_weights: sample shards with replacement, with these weights (open_clip's --dataset-resampled).
        class_weights: how often an image of each class is drawn in an epoch, on average; None: once.
        image_key: members that may hold the image, joined by `;`.
        label_key: member that holds the class index or name, or `json:FIELD`.
        template_order: "random" draws a prompt of the class anew each time; with "table", an image meets all of them
            before it meets one again (exactly so where each epoch is one pass over the samples; see samples.draw_prompts).
        retries, max_lost: how often a remote shard that breaks off is read again; the share of samples that may be lost.
        jpeg_draft: decode large JPEGs at a fraction of their size, at least this many pixels; 0 decodes in full.
        with_labels: append each image's class index to its tokens, which are then (B, L + 1).
        as_dict: yield dicts, as for open_clip 4; the class indices are then "labels", int64 (B,).

    Raises:
        InputError: fewer shards than ranks, wrong labels, nothing readable, or more than `max_lost` unreadable.

    Example:
        >>> dataset = ClassPromptDataset("data", preprocess, tokenizer, batch_size=256, num_workers=4)
        >>> for images, tokens in dataset:  # one epoch
        ...     optimizer.zero_grad()
        ...     open_clip.ClipLoss()(**model(images, tokens)).backward()
        ...     optimizer.step()
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
        sizes: Mapping[str, int] | None = None,
        num_workers: int = 0,
        seed: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
        shard_weights: Sequence[float] | None = None,
        class_weights: Sequence[float] | None = None,
        image_key: str = IMAGE_KEY,
        label_key: str = "cls",
        template_order: str = "random",
        retries: int = RETRIES,
        max_lost: float = MAX_LOST,
        jpeg_draft: int = 0,
        with_labels: bool = False,
        as_dict: bool = False,
    ):
        self.shards = list(chain(*expand_sources(shards, "train")) if isinstance(shards, str) else shards)
        if not self.shards:
            raise InputError("the list of shards is empty; give at least one tar.")
        self.prompts = prompts or resolve_prompts(self.shards)
        if rank is None or world_size is None:
            rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        if batch_size < 1:
            raise InputError(f"the batch size must be >= 1, got {batch_size}.")
        if shard_weights is None:
            if len(self.shards) < world_size:
                raise InputError(
                    f"{len(self.shards)} shards are too few for {world_size} ranks; write smaller ones (--shard-size)."
                )
            num_workers = min(num_workers, len(self.shards) // world_size)
        num_samples = count_samples(self.shards, image_key) if num_samples is None else num_samples
        if num_samples < 1:
            raise _nothing_readable(self.shards, Skipped())
        self._samples = math.ceil(num_samples / world_size)  # of this rank
        self.num_samples, self.num_batches = self._samples * world_size, math.ceil(self._samples / batch_size)
        about = dict.fromkeys(self.shards, num_samples // len(self.shards))
        self.sizes = about | (shard_sizes(self.shards, image_key) if sizes is None else dict(sizes))
        in_shards = sum(self.sizes[shard] for shard in self.shards)
        self._passes_per_epoch = math.ceil(num_samples / max(1, in_shards))
        each_once = shard_weights is None and class_weights is None
        self._sees_all = each_once and world_size == 1 and num_samples >= in_shards
        self.preprocess, self.batch_size, self.num_workers = preprocess, batch_size, num_workers
        self.rank, self.world_size, self.seed, self.shard_weights = rank, world_size, seed, shard_weights
        self.image_key, self.label_key, self.retries, self.max_lost = image_key, label_key, retries, max_lost
        self.template_order, self.class_weights = template_order, class_weights
        self.jpeg_draft, self.with_labels, self.as_dict = jpeg_draft, with_labels, as_dict
        self._indices = index_names(self.prompts.classnames)
        self.num_classes, self._tokens = len(self.prompts.classnames), self.prompts.tokenize(tokenizer)
        self.text_length = self._tokens.length
        # In shared memory: (epoch, repeat), set before each pass, and the classes whose images the workers have met
        self._clock = torch.zeros(2, dtype=torch.int64).share_memory_()
        self._occurs = torch.zeros(self.num_classes, dtype=torch.bool).share_memory_()
        self._epoch = 0
        self._loader = start_workers(self, num_workers, persistent=True)

    def __len__(self) -> int:
        """Batches an epoch, on each rank."""
        return self.num_batches

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration."""
        self._epoch = epoch

    def worker_batches(self, worker: int, num_workers: int, skip: Skipped) -> Iterator[Batch]:
        """One worker's share of one pass over the shards; its last batch may be smaller."""
        epoch, repeat = self._clock.tolist()
        shards = self._deal_shards(epoch, repeat, worker, num_workers)
        samples = steps.read_samples(shards, skip, self.retries, self.sizes)
        samples = steps.label_samples(
            samples, self.num_classes, skip, self.image_key, self.label_key, indices=self._indices
        )
        if self.class_weights is not None:
            samples = steps.balance_classes(samples, self.class_weights, self.seed, epoch, repeat)
        rng = random.Random(repr((self.seed, epoch, repeat, self.rank, worker)))
        samples = steps.shuffle(samples, rng)
        passes = self._passes_per_epoch if self.template_order == "table" else 0
        samples = steps.draw_prompts(samples, self._tokens.counts.tolist(), self.seed, epoch, repeat, passes)
        samples = steps.decode_images(samples, self.preprocess, skip, self.jpeg_draft)
        for batch in batch_samples(samples, self.batch_size):
            labels = [sample["label"] for sample in batch]
            self._occurs[labels] = True
            tokens = self._tokens.take(labels, [sample["prompt"] for sample in batch])
            if self.with_labels:
                tokens = torch.cat([tokens, torch.tensor(labels)[:, None]], dim=1)
            yield default_collate([sample["image"] for sample in batch]), tokens

    def _deal_shards(self, epoch: int, repeat: int, worker: int, num_workers: int) -> list[str]:
        shards = list(self.shards)
        if self.shard_weights is not None:
            rng = random.Random(repr(("resampled", self.seed, epoch, repeat, self.rank, worker)))
            number = math.ceil(len(shards) / (self.world_size * num_workers))
            return rng.choices(shards, self.shard_weights, k=number)
        random.Random(repr((self.seed, epoch))).shuffle(shards)
        shards = shards[self.rank :: self.world_size]
        random.Random(repr((self.seed, epoch, repeat, self.rank))).shuffle(shards)
        return shards[worker::num_workers]

    def __iter__(self) -> Iterator[Any]:
        if get_worker_info():
            raise RuntimeError("ClassPromptDataset starts its own workers; use it without a DataLoader.")
        epoch, skipped = self._epoch, Skipped()
        self._epoch += 1

        def num_lost() -> int:  # several ranks need equal batches, so they start their shards again instead
            return max(skipped.lost, skipped.number) if self.world_size == 1 else 0

        for images, tokens in rebatch(self._passes(epoch, skipped), self.batch_size, self._samples, num_lost):
            parts = [images, tokens[:, :-1], tokens[:, -1]] if self.with_labels else [images, tokens]
            yield dict(zip(("image", "text", "labels"), parts)) if self.as_dict else (images, tokens)
        skipped.report(f"epoch {epoch}")
        empty = [name for name, occurs in zip(self.prompts.classnames, self._occurs) if not occurs]
        if self._sees_all and empty:  # then the labels may be shifted by one
            _log.warning(
                f"{len(empty)} of {self.num_classes} classes have no image: {first_few(empty)}. Check that the class "
                "names are those of these shards and that labels start at 0."
            )
        self._sees_all = False  # it is said once

    def _passes(self, epoch: int, skipped: Skipped) -> Iterator[Iterator[Batch]]:
        check = partial(skipped.check, self._samples, self.max_lost, f"epoch {epoch}")
        for repeat in count():
            self._clock.copy_(torch.tensor((epoch, repeat)))
            batches = receive_batches(self._loader, skipped, check)
            if (first := next(batches, None)) is None:
                raise _nothing_readable(self.shards, skipped)
            yield chain([first], batches)


def rebatch(
    passes: Iterable[Iterable[Batch]], batch_size: int, total: int, num_lost: Callable[[], int] = lambda: 0
) -> Iterator[Batch]:
    """Batches of `batch_size` out of the workers' batches, `total` samples in all; the last one may be smaller.

    Full batches pass through; the workers' smaller last ones are joined. All of a pass is used before the next. If a
    pass ends at most `num_lost()` samples short of the total, those are left out instead of starting another pass.
    """
    held: list[Batch] = []  # samples that wait for more
    for batches in passes:
        join_full = bool(held)  # what the last pass has left comes first
        for batch in batches:
            if join_full or len(batch[0]) < batch_size:
                held.append(batch)
            else:
                size = min(batch_size, total)
                total -= size
                yield batch[0][:size], batch[1][:size]
            while total and _count(held) >= min(batch_size, total):
                joined, held = _join(held, min(batch_size, total))
                total -= len(joined[0])
                join_full = False
                yield joined
            if not total:
                return
        if held and total <= batch_size and total - _count(held) <= num_lost():
            yield _join(held, total)[0]
            return


def _count(batches: Iterable[Batch]) -> int:
    return sum(len(images) for images, _ in batches)


def _join(batches: Sequence[Batch], size: int) -> tuple[Batch, list[Batch]]:
    """The first `size` samples as one batch, and the rest."""
    images, tokens = (torch.cat(parts) for parts in zip(*batches))
    rest = [(images[size:], tokens[size:])] if len(images) > size else []
    return (images[:size], tokens[:size]), rest


def peek(
    shards: Sequence[str],
    prompts: ClassPrompts,
    seed: int,
    image_key: str = IMAGE_KEY,
    label_key: str = "cls",
    passes: int = 0,
) -> list[tuple[str, str]]:
    """(key, prompt) of the first 3 samples in the first 3 shards, as epoch 0 pairs them.

    Raises:
        InputError: one of their labels is wrong, or no shard has anything readable.
    """
    skip = Skipped()
    samples = steps.read_samples(shards[:3], skip)
    names = prompts.classnames
    samples = steps.label_samples(samples, len(names), skip, image_key, label_key, indices=index_names(names))
    samples = islice(steps.draw_prompts(samples, prompts.counts(), seed, 0, 0, passes), 3)
    pairs = [(sample["key"], prompts(sample["label"], sample["prompt"])) for sample in samples]
    if not pairs and len(shards) <= 3:
        raise _nothing_readable(shards, skip)
    return pairs


class LabelledDataset(IterableDataset):
    """Batches of labelled images, each image once and in the shards' order, for evaluation. Iterate over it directly.

    Yields:
        {"images": float (B, 3, H, W), "labels": int64 (B,), "keys", "paths": lists of B, "groups": list of B with
        `group_key`}. A path is that of the user's own file, '' where it is not known (samples.label_samples). Of several
        ranks, each yields a part of the set.

    Args:
        shards: tar URLs, see sources.expand_source.
        num_classes: labels are 0..num_classes-1.
        classnames: their names, where labels may be class names.
        group_key: member with the group of a sample, or `json:FIELD`; None: no groups.
        The others are as for ClassPromptDataset.

    Raises:
        InputError: labels outside the classes, nothing readable, or more than `max_lost` unreadable.
    """

    def __init__(
        self,
        shards: Sequence[str],
        preprocess: Callable,
        batch_size: int,
        *,
        num_classes: int,
        classnames: Sequence[str] = (),
        sizes: Mapping[str, int] | None = None,
        num_workers: int = 0,
        image_key: str = IMAGE_KEY,
        label_key: str = "cls",
        group_key: str | None = None,
        retries: int = RETRIES,
        max_lost: float = 1.0,
        rank: int = 0,
        world_size: int = 1,
    ):
        if not shards:
            raise InputError("the list of shards is empty; give at least one tar.")
        self.shards, self.sizes = list(shards), shard_sizes(shards, image_key) if sizes is None else sizes
        self.preprocess, self.batch_size, self.num_classes = preprocess, batch_size, num_classes
        self._indices = index_names(classnames)
        self.image_key, self.label_key, self.group_key = image_key, label_key, group_key
        self.retries, self.max_lost, self.rank, self.world_size = retries, max_lost, rank, world_size
        self._loader = start_workers(self, num_workers, persistent=False)

    def worker_batches(self, worker: int, num_workers: int, skip: Skipped) -> Iterator[dict[str, Any]]:
        """One worker's share of the shards or, if there are too few of them, of the samples."""
        part, parts = self.rank * num_workers + worker, self.world_size * num_workers
        enough = len(self.shards) >= parts  # otherwise all read everything, and decode every parts-th sample
        shards = self.shards[part::parts] if enough else self.shards
        unread = skip if enough or part == 0 else Skipped()  # what all of them meet, one counts
        keys = self.image_key, self.label_key, self.group_key
        samples = steps.read_samples(shards, unread, self.retries, self.sizes)
        samples = steps.label_samples(samples, self.num_classes, unread, *keys, indices=self._indices)
        samples = samples if enough else islice(samples, part, None, parts)
        for batch in batch_samples(steps.decode_images(samples, self.preprocess, skip), self.batch_size):
            yield {
                "images": default_collate([sample["image"] for sample in batch]),
                "labels": torch.tensor([sample["label"] for sample in batch]),
                "keys": [sample["key"] for sample in batch],
                "paths": [sample.get("path", "") for sample in batch],
                **({"groups": [sample["group"] for sample in batch]} if self.group_key else {}),
            }

    def __iter__(self) -> Iterator[dict[str, Any]]:
        skipped, num_read = Skipped(), 0
        for batch in receive_batches(self._loader, skipped):
            num_read += len(batch["labels"])
            yield batch
        if not num_read and self.world_size == 1:  # one of several ranks may have nothing but a broken shard
            raise _nothing_readable(self.shards, skipped)
        skipped.check(num_read + skipped.lost, self.max_lost, self.shards[0])
        skipped.report(self.shards[0])


def _nothing_readable(shards: Sequence[str], skipped: Skipped) -> InputError:
    reason = f"the first problem is {skipped.first}" if skipped.first else "they hold no images"
    return InputError(f"no sample can be used in {len(shards)} shard(s), the first {shards[0]}; {reason}.")
