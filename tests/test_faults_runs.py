"""Short forms of tests/faults/kills.py, disk.py and concurrency.py: killed runs, full disks, two runs in one place."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from flyp_plugin import commands, run_folder
from flyp_plugin.commands.export import atomic_folder
from flyp_plugin.commands.jobs import claim_folder
from flyp_plugin.errors import InputError
from flyp_plugin.run_folder import LOCK, folder_lock
from flyp_plugin.train import train
from tests.faults import kills
from tests.helpers_eval import no_larger_files
from tests.naming import naming, says


@pytest.fixture(autouse=True)
def ctrl_c():
    """What a job in the background ignores, its children would too."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def whole(digits, tmp_path_factory):
    """The folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("logs") / "whole"
    assert train(kills.flags(digits, folder)) == 0
    return folder


def test_a_run_killed_in_a_checkpoint_resumes_to_the_same_weights(digits, tmp_path):
    whole = tmp_path / "whole"
    kills.unharmed(digits, whole)  # by itself and on one thread, as those that are killed
    assert kills.killed(digits, whole, tmp_path / "run", fault="save 2 0.5") == ("", 1)


@pytest.mark.parametrize(("number", "group"), [(signal.SIGTERM, False), (signal.SIGINT, True)])
def test_a_signal_is_one_line_and_no_process_is_left(digits, tmp_path, number, group):
    assert kills.signalled(digits, tmp_path / "run", number, group, "Start epoch 0")[0] == ""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_all_processes_that_write_shards_ends_them(tmp_path, number):
    said, short = tmp_path / "said", "print('started', flush=True)"
    long = f"{short}; import time; time.sleep(60)"
    # the third process then waits for more, with the lock of what it waits for
    program = "from flyp_plugin import errors, shards\n"
    program += f"errors.run(lambda: shards.map_parallel(exec, {[long, long, short]}, 3, ''))"
    process = kills.start([sys.executable, "-c", program], said)
    while process.poll() is None and said.read_text().count("started") < 3:
        time.sleep(0.05)
    os.killpg(process.pid, number)
    assert process.wait(60) == 128 + number and kills.left(process.pid) == []
    line = {signal.SIGTERM: "Terminated.", signal.SIGINT: "Interrupted."}[number]
    assert said.read_text().splitlines()[3:] == [line]


def test_a_signal_is_not_lost_where_nothing_can_be_raised():
    program = """
import os, signal, time
from flyp_plugin import errors
class Deleted:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
def main():
    Deleted()
    time.sleep(60)
errors.run(main)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (143, "Terminated.\n")


def piped(program):
    """(status, stderr) of a command whose stdout nobody reads."""
    read, write = os.pipe()
    os.close(read)
    program = f"import os\nfrom flyp_plugin import errors\n{program}\nerrors.run(main)"
    done = subprocess.run(
        [sys.executable, "-c", program], stdout=write, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(write)
    return done.returncode, done.stderr


def test_only_a_broken_pipe_at_stdout_ends_in_silence():
    assert piped("def main():\n    print('a table')") == (141, "")
    status, said = piped("def main():\n    raise RuntimeError('a bug')")
    assert status == 1 and "a bug" in said
    program = """
import subprocess, sys
from flyp_plugin import errors
def main():
    raise BrokenPipeError(32, "of a worker")
errors.run(main)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "BrokenPipeError" in done.stderr and "of a worker" in done.stderr


def test_checkpoints_that_are_cut_off_are_set_aside(whole, tmp_path):
    assert kills.cut_checkpoints(whole, tmp_path, 40, random.Random(0)) == 40


def test_rows_after_the_checkpoint_are_forgotten(tmp_path):
    results = tmp_path / run_folder.RESULTS
    results.parent.mkdir()
    run_folder.drop_results_after(1, tmp_path)
    assert os.listdir(results.parent) == []
    lines = [json.dumps({"a/top1": 0.5, "epoch": epoch}) + "\n" for epoch in range(4)]
    for epoch, kept in ((2, 3), (3, 4), (0, 0), (0, 0)):
        whole = "".join([*lines, '{"a/top1": 0.'])
        results.write_text(whole)
        run_folder.drop_results_after(epoch, tmp_path)
        assert results.read_text() == "".join(lines[:kept])
    results.write_text(lines[0])  # the zero-shot row alone, which will be the same again
    run_folder.drop_results_after(0, tmp_path)
    assert sorted(os.listdir(results.parent)) == ["results.1.jsonl", "results.2.jsonl", "results.jsonl"]
    assert (results.parent / "results.1.jsonl").read_text() == whole


def test_a_full_disk_is_a_sentence_and_the_run_can_resume(digits, whole, tmp_path, caplog):
    folder = tmp_path / "run"
    for limit in (0, 8192):  # nothing at all; neither all of out.log nor a checkpoint
        with (
            no_larger_files(limit),
            pytest.raises(InputError, match=naming(folder, "File too large")) as error,
        ):
            # 0 workers: what they share is limited, too
            train([*kills.flags(digits, folder), "--resume", "latest", "--workers", "0"])
        assert "\n" not in str(error.value)
    assert sum(says(r.getMessage(), f"{folder}/out.log", "File too large") for r in caplog.records) == 2
    assert not list(folder.glob("checkpoints/*.pt*"))
    assert train([*kills.flags(digits, folder), "--resume", "latest"]) == 0
    assert kills.difference(folder, whole) == ""


@pytest.fixture
def other_process(tmp_path):
    """Another process that trains the run `tmp_path/run`, as far as its lock is concerned."""
    program = "import sys, pathlib; from flyp_plugin.run_folder import folder_lock\n"
    program += (
        "with folder_lock(pathlib.Path(sys.argv[1]), inherited=False): print('held', flush=True); input()"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "run")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"held\n"
        yield process
        process.kill()


def test_a_second_run_of_a_name_is_refused_meanwhile(digits, tmp_path, other_process):
    folder = tmp_path / "run"
    for more in ([], ["--resume", "latest"]):
        with pytest.raises(InputError, match=naming("process", folder)):
            train([*kills.flags(digits, folder), *more])
    assert os.listdir(folder) == [LOCK]
    other_process.kill()
    other_process.wait()
    with folder_lock(folder, inherited=False):
        assert os.listdir(folder) == [LOCK]
    assert os.listdir(folder) == []


def test_a_folder_in_use_is_refused_and_an_empty_one_removed(tmp_path):
    out = tmp_path / "new" / "out"
    busy = pytest.raises(InputError, match=naming("process", out))
    with folder_lock(out), busy, folder_lock(out):
        pass
    assert not out.exists()
    claim_folder(out, {"seed": 1})
    claim_folder(out, {"seed": 1})
    with pytest.raises(InputError, match=naming(out, "seed", "1", "2", "--demo-dir")):
        claim_folder(out, {"seed": 2}, "--demo-dir")
    with folder_lock(out), pytest.raises(InputError, match=naming("process", out)):
        (out / "settings.json").write_text(json.dumps({"pretrain_epochs": 24, "epochs": 10}))
        commands.call(["demo", "--demo-dir", str(out)])
    assert os.listdir(out) == ["settings.json"]


def test_of_two_exports_to_one_folder_the_later_is_refused(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(InputError, match=naming(out, "--force")), atomic_folder(out, force=False) as part:
        (part / "second").touch()
        out.mkdir()
        (out / "first").touch()
    assert os.listdir(tmp_path) == ["out"] and os.listdir(out) == ["first"]


def test_only_an_export_is_written_over_by_an_export(tmp_path):
    for name in ("thesis.txt", "config.json"):  # a model's folder with more in it is no export either
        (tmp_path / name).touch()
        with (
            pytest.raises(InputError, match=naming(tmp_path, "thesis.txt")),
            atomic_folder(tmp_path, force=True),
        ):
            pass
    (tmp_path / "thesis.txt").unlink()
    with (
        pytest.raises(InputError, match=naming(tmp_path, "config.json")),
        atomic_folder(tmp_path, force=True),
    ):
        pass
    (tmp_path / "model.safetensors").touch()
    with atomic_folder(tmp_path, force=True) as part:
        (part / "new").touch()
    assert os.listdir(tmp_path) == ["new"]


@pytest.mark.parametrize(
    "error, named",
    [
        ("import torch; torch.empty(2**50)", ["memory"]),  # the CPU's allocator says so itself
        (
            "import torch; raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has')",
            ["GPU", "2.00 GiB"],
        ),
        ("raise RuntimeError('CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublas')", ["GPU"]),
        ("raise MemoryError", ["memory"]),
    ],
)
def test_out_of_memory_is_one_line_that_says_what_needs_less(error, named):
    program = f"from flyp_plugin import errors\ndef main():\n    {error}\nerrors.run(main)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    (line,) = done.stderr.splitlines()
    flags = ["--batch-size", "--grad-checkpointing", "--accum-freq"]
    assert done.returncode == 1 and says(line, "Error", "out of", *named, *flags)
    assert ("GPU" in line) == ("GPU" in named)
