"""What a start reads, asks for and logs: once, whatever the number of ranks and shards."""

import multiprocessing
import os
import signal
from datetime import timedelta
from threading import Event

import pytest
from torch import distributed as dist

from flyp_plugin import ranks as ranks_module
from tests.bench import start
from tests.faults import ranks
from tests.faults.remote import good, serving


def test_two_ranks_read_and_log_what_one_does(tmp_path):
    data = start.local_set(tmp_path / "data", 4, 10)  # 20 MB
    more = ["--shots", 2, "--balance", 0.5, "--eval-data", f"val={data}"]
    one, two = (
        start.start(n, ranks.words(data, tmp_path, f"r{n}", *more), tmp_path / "said") for n in (1, 2)
    )
    assert two["read"] < one["read"] + 10e6  # which are files of Python and of the model
    assert two["lines"] == one["lines"] + 1  # open_clip says of each rank where it runs


def test_requests_depend_on_neither_ranks_nor_shards(tmp_path):
    data = start.remote_set(tmp_path / "data", 100)
    with serving(data, good) as (url, asked):
        start.start(2, start.remote_flags(data, tmp_path / "logs", "http", url), tmp_path / "said")
    assert start.count_requests(asked, 100) == (18, 3)


@pytest.mark.parametrize("how", ["hand", "torchrun"])
def test_a_mistake_in_the_data_is_said_by_the_rank_that_reads(tmp_path, how):
    data = ranks.write(tmp_path / "data", (10,) * 4)
    flags = ranks.words(data, tmp_path, "wrong", "--templates", "{c}", "--label-key", "nothing")
    death = ranks.Death("wrong", 2, 0, how, ranks.REPO / "train_flyp.py", *flags, own="Error: .*'nothing'.*")
    death(tmp_path / "said")
    assert death.wrong == []


def waiting(rank, port, stopped, found):
    """Rank 0 takes longer than the others' patience; if it is `stopped`, without a sign of life."""
    ranks_module.BEAT, ranks_module.PATIENCE = 1, timedelta(seconds=3)
    store = dist.TCPStore("127.0.0.1", port, 2, is_master=rank == 1)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)

    def slow():
        if stopped:
            os.kill(os.getpid(), signal.SIGSTOP)
        Event().wait(8)
        return "it"

    try:
        found.put((rank, ranks_module.once(slow)))
    except RuntimeError as error:
        found.put((rank, type(error).__name__))


@pytest.mark.parametrize("stopped", [False, True])
def test_a_rank_waits_while_the_one_that_reads_shows_life(stopped):
    context = multiprocessing.get_context("spawn")
    found, port = context.Queue(), ranks._free_port()
    both = [context.Process(target=waiting, args=(rank, port, stopped, found)) for rank in (0, 1)]
    for process in both:
        process.start()
    said = dict(found.get(timeout=120) for _ in range(1 if stopped else 2))
    for process in both:
        process.kill()
        process.join()
    assert said == ({1: "DistStoreError"} if stopped else {0: "it", 1: "it"})
