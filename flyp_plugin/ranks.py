"""What one rank finds out for all: a run's data is looked at once, not by each of 64 processes.

The others wait on the store through which torch's ranks have met, not in a collective, which NCCL ends after ten
minutes: reading a large set for --shots may take longer. A mistake in the data is reported by the rank that found it.
"""

import json
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from itertools import count
from typing import Any, TypeVar

import torch.distributed as dist

from flyp_plugin.errors import InputError

Found = TypeVar("Found")
_PATIENCE = timedelta(days=2)
_GRACE = 10  # seconds
_calls = count()  # all ranks make the same calls in the same order


def once(function: Callable[[], Found]) -> Found:
    """function() of rank 0, on every rank. If it fails there, the others end after it, with an InputError."""
    if not dist.is_initialized():
        return function()
    results: list[Any] = [None]

    def call() -> None:
        results[0] = function()

    _once(call, dist.get_rank() == 0)  # None: the results may be larger than the store likes
    dist.broadcast_object_list(results, 0)
    return results[0]


def once_a_node(function: Callable[[], Found], local_rank: int) -> Found:
    """function() of the first rank of each machine, on every rank of it: of what is on its disk. JSON of some bytes."""
    return _once(function, local_rank == 0, socket.gethostname()) if dist.is_initialized() else function()


def _once(function: Callable[[], Any], here: bool, node: str = "") -> Any:
    store, key = dist.distributed_c10d._get_default_store(), f"flyp_plugin/{next(_calls)}/{node}"
    if here:
        content: dict[str, Any] = {}
        try:
            content["result"] = function()
        finally:  # with an error, without a result
            store.set(key, json.dumps(content))
        return content["result"]
    store.wait([key], _PATIENCE)
    content = json.loads(store.get(key))
    if "result" not in content:
        time.sleep(_GRACE)  # a launcher that sees this rank end may kill the one that says why
        said = f"rank {dist.get_rank()} waited for another one, which has found a mistake (or failed)"
        raise InputError(f"{said}; look for that rank's own error, fix it, and run the same command again.")
    return content["result"]
