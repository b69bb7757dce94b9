"""Run a function over many shards or files in several processes, with a progress bar."""

import signal
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import active_children
from typing import Any

from tqdm import tqdm


def map_parallel(function: Callable, items: Sequence, workers: int, what: str, unit: str = "shard") -> list:
    """function(item) for each item, in `workers` processes, with a progress bar. An error, Ctrl-C or SIGTERM ends them."""
    workers, others = min(workers, len(items)), set(active_children())
    bar: dict[str, Any] = {"total": len(items), "desc": what, "unit": unit, "disable": None}
    if workers < 2:
        return list(tqdm(map(function, items), **bar))
    # not a Pool: it waits for ever after a signal to the whole group has ended a worker that held its lock
    ignore = (signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the workers too, but is handled here
    with ProcessPoolExecutor(workers, initializer=signal.signal, initargs=ignore) as pool:
        futures = [pool.submit(function, item) for item in items]
        try:
            return [future.result() for future in tqdm(futures, **bar)]
        except BaseException:
            for worker in set(active_children()) - others:
                worker.terminate()
            raise
