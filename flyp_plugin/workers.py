"""Batches from a DataLoader's worker processes. Those of training start once and serve every epoch.

An item carries its batch, what was skipped since the last one, and an InputError as text, so that the main process sees
the same whatever the number of workers. With 0 workers the loader reads in the main process. Both data sets in data.py
are read through this.
"""

import copy
import gc
import logging
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from flyp_plugin.errors import InputError

_log = logging.getLogger(__name__)


@dataclass
class Skipped:
    """What was unreadable: images and tars, the samples lost with them (estimated for a tar), and the first message."""

    number: int = 0
    lost: int = 0
    first: str = ""

    def __call__(self, message: str, lost: int = 1) -> None:
        self.add(Skipped(1, lost, message))

    def add(self, other: "Skipped") -> None:
        self.first = self.first or other.first
        self.number += other.number
        self.lost += other.lost

    def drain(self) -> "Skipped":
        """Return what was added so far, and start again from nothing."""
        drained = replace(self)
        self.number, self.lost, self.first = 0, 0, ""
        return drained

    def check(self, samples: int, max_lost: float, where: str) -> None:
        """Raise InputError if more than the share `max_lost` of `samples` is lost."""
        if self.lost > max_lost * samples:
            raise InputError(
                f"{where}: {self.lost} of {samples} samples are lost, more than --max-lost {max_lost:g} allows, the "
                f"first: {self.first}; repair the data (`flyp shards check`), or allow more."
            )

    def report(self, where: str) -> None:
        """Log what was skipped, if anything."""
        if self.number:
            things = "image or tar" if self.number == 1 else "images or tars"
            _log.warning(f"{where}: skipped {self.number} unreadable {things}, the first: {self.first}")


class _WorkerStream(IterableDataset):
    """Yields, in a worker, (batch or None, what was skipped since the last one, the text of an InputError or '').

    The error is sent as a value, because a DataLoader would wrap a raised one in the worker's traceback.
    """

    def __init__(self, worker_batches: Callable[[int, int, Skipped], Iterator[Any]]):
        self.worker_batches = worker_batches

    def __iter__(self) -> Iterator[tuple[Any, Skipped, str]]:
        info, skip, mistake = get_worker_info(), Skipped(), ""
        worker, num_workers = (info.id, info.num_workers) if info else (0, 1)
        try:
            for batch in self.worker_batches(worker, num_workers, skip):
                yield batch, skip.drain(), ""
        except InputError as error:
            mistake = str(error)
        yield None, skip.drain(), mistake


def start_workers(dataset: Any, num_workers: int, persistent: bool) -> DataLoader:
    """A loader for `receive_batches` of `dataset.worker_batches(worker, num_workers, skip)`.

    The workers live as long as the loader if they are `persistent`, else only while it is iterated over.
    The workers get a copy of the data set: a cycle of data set and loader would leave them to the garbage collector, and
    torch then waits 5 seconds for each.
    """
    return DataLoader(
        _WorkerStream(copy.copy(dataset).worker_batches),
        batch_size=None,
        num_workers=num_workers,
        persistent_workers=persistent and num_workers > 0,
        worker_init_fn=_init_worker,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # the default would draw from the generator that the model's dropout uses
    )


def _init_worker(worker: int) -> None:
    gc.freeze()  # a garbage collection would touch, and so copy, all memory shared with the main process

    def ignore_lost_connection(kind: type[BaseException], *rest: Any) -> None:
        if not issubclass(kind, ConnectionError):  # the main process has ended before it took a batch
            sys.__excepthook__(kind, *rest)

    sys.excepthook = ignore_lost_connection


def receive_batches(
    loader: DataLoader, skipped: Skipped, check: Callable[[], None] = lambda: None
) -> Iterator[Any]:
    """The workers' batches. Adds what they skipped to `skipped`, then calls `check`; raises their InputErrors anew."""
    for batch, skipped_since, mistake in loader:
        skipped.add(skipped_since)
        if mistake:
            raise InputError(mistake)
        check()
        if batch is not None:
            yield batch


def batch_samples(samples: Iterable[dict], size: int) -> Iterator[list[dict]]:
    """Lists of `size` samples, the last one smaller; the random states are the caller's again at every yield."""
    samples = iter(samples)
    while True:
        with preserve_random_states():
            batch = list(islice(samples, size))
        if not batch:
            return
        yield batch


@contextmanager
def preserve_random_states() -> Iterator[None]:
    """Restore the CPU's random states afterwards: transforms seed them, also in the training process itself."""
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])
