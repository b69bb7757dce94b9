"""What a start reads, asks for and logs: once, whatever the number of ranks and shards."""

import pytest

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
