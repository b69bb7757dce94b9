"""Run a function over many shards or files in several processes, with a progress bar."""

import gc
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
    with ProcessPoolExecutor(workers, initializer=_start_worker) as pool:
        try:  # not pool.map: it cancels, and Python 3.11 stumbles over that when the workers have ended
            futures = [pool.submit(function, item) for item in items]
            return [future.result() for future in tqdm(futures, **bar)]
        except BaseException:
            for worker in set(active_children()) - others:
                worker.terminate()
            raise


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches workers too, but the parent handles it
    gc.freeze()  # a collection would write to all that was there at the fork, and so copy it
