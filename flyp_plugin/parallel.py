"""Run a function over many shards or files in several processes, with a progress bar."""

import gc
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sized
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import active_children
from typing import Any

from tqdm import tqdm


def map_parallel(
    function: Callable,
    items: Iterable,
    workers: int,
    what: str,
    unit: str = "shard",
    count: int | None = None,
) -> list:
    """function(item) for each item, in `workers` processes, with a progress bar. An error, Ctrl-C or SIGTERM ends them.

    `items` may be a generator of `count` items: each is made when its turn is near, so that they are never all in memory.
    """
    count = len(items) if isinstance(items, Sized) else count
    workers, others = min(workers, count or 1), set(active_children())
    bar: dict[str, Any] = {"total": count, "desc": what, "unit": unit, "disable": None}
    if workers < 2:
        return list(tqdm(map(function, items), **bar))
    # not a Pool: it waits for ever after a signal to the whole group has ended a worker that held its lock
    with ProcessPoolExecutor(workers, initializer=_start_worker) as pool:

        def results() -> Iterator:
            futures = deque[Future]()
            for item in items:
                futures.append(pool.submit(function, item))
                if len(futures) > 4 * workers:
                    yield futures.popleft().result()
            yield from (future.result() for future in futures)

        try:
            return list(tqdm(results(), **bar))
        except BaseException:
            for worker in set(active_children()) - others:
                worker.terminate()
            raise


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches workers too, but the parent handles it
    gc.freeze()  # a collection would write to all that was there at the fork, and so copy it
