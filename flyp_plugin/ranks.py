"""What one rank finds out for all: a run's data is looked at once, not by each of 64 processes.

The others wait on the store through which torch's ranks have met, not in a collective, which NCCL ends after ten
minutes: reading a large set for --shots may take longer. The one that reads shows that it is alive.
"""

import json
import platform
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import count
from pathlib import Path
from threading import Event, Thread
from typing import Any, TypeVar

import torch.distributed as dist

from flyp_plugin.errors import InputError

Found = TypeVar("Found")
BEAT = 30  # seconds between two signs of life
PATIENCE = timedelta(minutes=10)  # without one
GRACE = 10  # seconds that a rank outlives another one, so that a launcher does not kill that before it says why it ends
_calls = count()  # all ranks make the same calls in the same order


def once(function: Callable[[], Found]) -> Found:
    """function() of rank 0, on every rank. If it fails there, the others end after it, with an InputError."""
    if not dist.is_initialized():
        return function()
    results: list[Any] = [None]

    def call() -> None:  # its result may be larger than the store likes
        results[0] = function()

    _once(call, dist.get_rank() == 0)
    dist.broadcast_object_list(results, 0)
    return results[0]


def once_a_node(function: Callable[[], Found], local_rank: int) -> Found:
    """function() of the first rank of each machine, on every rank of it: of what is on its disk. JSON of some bytes."""
    boot = Path("/proc/sys/kernel/random/boot_id")  # machines may share a name
    node = platform.node() + (boot.read_text() if boot.exists() else "")
    return _once(function, local_rank == 0, node) if dist.is_initialized() else function()


def _once(function: Callable[[], Any], here: bool, node: str = "") -> Any:
    store, key = dist.distributed_c10d._get_default_store(), f"flyp_plugin/{next(_calls)}/{node}"
    if here:
        content: dict[str, Any] = {}
        try:
            with _signs_of_life(store, key):
                content["result"] = function()
        finally:  # with an error, without a result
            store.set(key, json.dumps(content))
        return content["result"]
    with ended_by_sigterm():
        _wait(store, key)
    content = json.loads(store.get(key))
    if "result" not in content:
        time.sleep(GRACE)
        said = f"rank {dist.get_rank()} waited for another one, which has found a mistake (or failed)"
        raise InputError(f"{said}; look for that rank's own error, fix it, and run the same command again.")
    return content["result"]


@contextmanager
def _signs_of_life(store: dist.Store, key: str) -> Iterator[None]:
    ended = Event()

    def beat() -> None:
        while not ended.wait(BEAT):
            store.add(f"{key}/beats", 1)

    thread = Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _wait(store: dist.Store, key: str) -> None:
    """Wait for a key; raises torch's error if the rank that sets it is gone, or has shown no sign of life."""
    beats = -1
    while True:
        try:
            return store.wait([key], PATIENCE)
        except RuntimeError:
            before, beats = beats, store.add(f"{key}/beats", 0)
            if beats == before:
                raise


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """SIGTERM ends the process at once: while it waits in C++ no Python handler runs, and torchrun would wait for it."""
    handler = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)
