"""--fsdp of open_clip 4 against DistributedDataParallel (tests/faults/fsdp.py, in short), resumed, and what its checkpoints are."""

import json
import shutil

import pytest
import torch

from flyp_plugin import record
from flyp_plugin.commands import call as flyp
from flyp_plugin.errors import InputError
from flyp_plugin.train import train
from tests.close import assert_same_figures
from tests.faults import fsdp, ranks
from tests.naming import naming, says
from tests.test_train import assert_equal, results, weights

needs_fsdp = pytest.mark.skipif(not fsdp.HAS_FSDP, reason="--fsdp needs open_clip 4 and torch 2.9")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with data/, and weights to start from."""
    folder = tmp_path_factory.mktemp("fsdp")
    fsdp.write(folder, ["digits-vit"] if fsdp.HAS_FSDP else [])
    return folder


@pytest.fixture(scope="module")
def logs(root):
    """Runs of two epochs with --fsdp, each kind of checkpoint, and the same resumed after the first epoch."""
    data, logs = root / "data", root / "resumed"
    for kind in ("full", "sharded"):
        flags = ["--fsdp-checkpoint", kind, "--opt", "adamw", "--lr", "1e-3"]
        argv = fsdp.argv(data, logs, kind, True, flags)
        ranks.train_in_turn(2, [argv], root / f"said-{kind}", root / f"losses-{kind}")
        stopped = logs / f"fsdp {kind} stopped"
        shutil.copytree(logs / f"fsdp {kind}", stopped)
        for path in stopped.glob("checkpoints/epoch_2*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        again = fsdp.argv(data, logs, f"{kind} stopped", True, [*flags, "--resume", "latest"])
        ranks.train_in_turn(2, [again], root / f"said-{kind}-again", root / f"losses-{kind}-again")
    return logs


@needs_fsdp
def test_fsdp_equals_ddp_and_flyp_eval(root):
    for name, far in fsdp.train(root, root / "data", {name: fsdp.CASES[name] for name in fsdp.SHORT}):
        assert all(far[key] <= limit for key, limit in fsdp.LIMITS.items()), (name, far)
    said = (root / "logs" / "fsdp flyp" / "out.log").read_text()
    assert "full length" not in said and says(said, "FSDP2", "sharding", "5")


@needs_fsdp
def test_an_anchored_run_trains_in_bf16(root):
    # FSDP casts the images, and the weights of the model alone
    flags = ["--anchor", "2", "--precision", "amp_bf16", "--opt", "adamw", "--lr", "1e-3"]
    argv = fsdp.argv(root / "data", root / "anchored", "bf16", True, flags)
    ranks.train_in_turn(2, [argv], root / "said-bf16", root / "losses-bf16")
    assert results(root / "anchored" / "fsdp bf16")[-1]["epoch"] == 2


@needs_fsdp
def test_a_resumed_run_equals_an_uninterrupted_one(logs):
    assert_equal(weights(logs / "fsdp full stopped", 2), weights(logs / "fsdp full", 2))
    for kind in ("full", "sharded"):
        assert results(logs / f"fsdp {kind} stopped") == results(logs / f"fsdp {kind}")


@needs_fsdp
def test_a_sharded_checkpoint_is_joined_and_read(root, logs, capsys):
    run = logs / "fsdp sharded"
    with pytest.raises(InputError, match=naming("checkpoints/epoch_2", "dcp_to_torch", "epoch_2.pt")):
        flyp(["eval", str(run), "--device", "cpu"])
    last = run / "checkpoints" / "epoch_2"
    _, whole = record.how_to_join(last)
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    dcp_to_torch_save(last, whole)
    flyp(["eval", str(whole), "--device", "cpu", "--json"])
    scored = json.loads(capsys.readouterr().out)["results"]["val"]
    logged = {key.removeprefix("val/"): value for key, value in results(run)[-1].items() if key != "epoch"}
    scored.pop("worst_group")
    argv = fsdp.argv(root / "data", logs, "joined", False, ["--resume", str(whole)])
    with pytest.raises(InputError, match=naming("epoch_2.pt", "joined", "--pretrained")):
        train(argv)
    assert_same_figures(scored, logged)
    flyp(["export", str(whole), "--format", "open_clip", "--out", str(root / "clip"), "--device", "cpu"])
    assert says((run / "out.log").read_text(), "dcp_to_torch", "checkpoints/epoch_2")


@needs_fsdp
@pytest.mark.parametrize("before", [True, False])
def test_fsdp_stays_as_it_was(root, logs, before):
    name = "sharded" if before else "alone"
    if not before:
        argv = fsdp.argv(root / "data", logs, name, False, ["--epochs", "1"])
        assert train(argv) == 0
    argv = fsdp.argv(root / "data", logs, name, not before, ["--resume", "latest"])
    argv[argv.index("--name") + 1] = f"{'fsdp' if before else 'ddp'} {name}"
    with pytest.raises(InputError, match=naming("--fsdp")):
        train(argv)


@needs_fsdp
@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--fsdp"], ("--fsdp", "torchrun")),
        (["--fsdp", "--precision", "bf16"], ("--fsdp", "bf16", "amp_bf16")),
        (
            ["--torchcompile", "--torchcompile-strategy", "step", "--accum-freq", "2"],
            ("step", "--accum-freq 1"),
        ),
        (["--text-pad-multiple", "0"], ("--text-pad-multiple", "0")),
        (["--fsdp-offload-cpu"], ("--fsdp-offload-cpu", "--fsdp")),
        (["--torchcompile-mode", "default"], ("--torchcompile-mode", "--torchcompile")),
        (["--use-naflex"], ("--use-naflex", "one size")),
        (["--naflex-seq-lens", "64"], ("--naflex-seq-lens",)),
        (["--length-bucketing"], ("--length-bucketing",)),
        (["--pretrained-audio", "a.pt"], ("--pretrained-audio",)),
        (["--objective", "ce", "--text-layer-decay", "0.5"], ("--text-layer-decay",)),
        (["--lock-image", "--image-layer-decay", "0.5"], ("--image-layer-decay",)),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else "",
)
def test_flags_that_would_do_nothing_or_something_else(root, tmp_path, flags, named):
    with pytest.raises(InputError, match=naming(*named)):
        train(ranks.words(root / "data", tmp_path, "run", *flags))


@needs_fsdp
def test_a_rank_that_finds_nan_tells_the_others(root):
    flags = ["--opt", "adamw", "--lr", "1e30", "--eval-frequency", "0"]
    plan = root / "nan" / "plan.json"
    plan.parent.mkdir()
    plan.write_text(
        json.dumps([[fsdp.argv(root / "data", root / "nan", "nan", True, flags)], [ranks._free_port()]])
    )
    started = ranks.Ranks(2, [ranks.__file__, "--steps", plan, root / "nan" / "losses"], root / "nan")
    assert started.ended() == [1, 1]
    assert all(says(started.said(rank), "diverged", "non-finite") for rank in range(2))


def test_a_sharded_checkpoint_is_told_from_a_run(tmp_path, monkeypatch):
    """Of whichever open_clip."""
    sharded = tmp_path / "run" / "checkpoints" / "epoch_3"
    sharded.mkdir(parents=True)
    torch.save({"epoch": 3}, sharded / "_metadata_extra.pt")
    assert record.epochs(tmp_path / "run") == {3: sharded}
    assert record.newest_checkpoint(tmp_path / "run") == sharded
    with pytest.raises(InputError, match=naming("checkpoints/epoch_3", "dcp_to_torch", "run/epoch_3.pt")):
        flyp(["eval", str(sharded), "--device", "cpu"])
    monkeypatch.chdir(sharded.parent)
    assert record.how_to_join(record.Path("epoch_3"))[1] == record.Path("../epoch_3.pt")
    with pytest.raises(InputError, match=naming("epoch_3", "--fsdp")):
        train(["--model", "ViT-B-32", "--train-data", "data", "--resume", str(sharded)])
