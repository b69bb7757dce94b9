"""open_clip 4's --fsdp (torch's FSDP2) against DistributedDataParallel on two gloo ranks.

    PYTHONPATH=open_clip/src python -m tests.faults.fsdp

with a checkout of open_clip's development tree. Each case trains two epochs on 80 digits a step from weights that know
digits, evaluated before and after each, once with DistributedDataParallel and once with --fsdp. The table has the largest
differences: of a step's loss (relative), of a weight (relative to the longest way of one in its tensor), and of a figure in
results.jsonl. `flyp eval` is the run's last checkpoint, scored in one process, against its own results.jsonl.

The optimizer is SGD: a step is proportional to its gradient, where AdamW's would be a whole step in a direction of chance
for a gradient that is zero but for rounding.
"""

import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from flyp_plugin import openclip, sharding
from flyp_plugin.checkpoints import read_state_dict
from tests.close import BACKWARD, FORWARD
from tests.faults import ranks
from tests.faults.processes import Row, table

HAS_FSDP = hasattr(openclip.parse_args([]), "fsdp") and sharding.is_supported()
CASES = {
    "flyp": [],
    "flyp, full text": ["--full-text"],
    "flyp, soft + ce-weight": ["--collisions", "soft", "--ce-weight", "0.5"],
    "flyp, accumulated": ["--accum-freq", "2", "--batch-size", "20"],
    "flyp, mask, accumulated": ["--collisions", "mask", "--accum-freq", "2", "--batch-size", "20"],
    "anchor": ["--anchor", "2"],
    "ce": ["--objective", "ce"],
    "lp": ["--objective", "lp"],
    "lp-ft": ["--objective", "lp-ft"],
    "flyp-ce": ["--objective", "flyp-ce"],
    "layer decay": ["--image-layer-decay", "0.7", "--text-layer-decay", "0.7"],
    "clipped gradients": ["--grad-clip-norm", "1"],
    "grad checkpointing": ["--grad-checkpointing"],
    "not resharded": ["--fsdp-no-reshard-after-forward"],
    "compiled": ["--torchcompile", "--torchcompile-backend", "aot_eager"],
    "ResNet": ["--model", "digits-rn"],
}
SHORT = ("flyp", "flyp, soft + ce-weight", "lp-ft", "flyp-ce")  # those of the test


def write(root: Path, models: Sequence[str] = ("digits-vit", "digits-rn")) -> Path:
    """Data, the models, and weights that know some digits."""
    data = ranks.write(root / "data", (10,) * 16)
    for model in models:
        flags = ["--epochs", 60, "--batch-size", 40, "--lr", "3e-3", "--warmup", 20]
        flags += ["--save-frequency", 60, "--workers", 0]
        assert ranks.train(ranks.words(data, root / "logs", f"start-{model}", *flags, model=model)) == 0
        torch.save(
            read_state_dict(root / f"logs/start-{model}/checkpoints/epoch_60.pt"), data / f"{model}.pt"
        )
    return data


def argv(data: Path, logs: Path, name: str, sharded: bool, flags: Sequence[str]) -> list[str]:
    """The flags of a case's run."""
    more = ["--epochs", 2, "--batch-size", 40, "--workers", 0, "--wd", 0.01, "--warmup", 0]
    more += ["--eval-data", f"val={data}", "--group-key", "hand", "--opt", "timm/sgd", "--lr", "0.002"]
    more += ["--fsdp"] if sharded else []
    flags = [flag for flag in flags if sharded or not flag.startswith("--fsdp")]
    return ranks.words(
        data, logs, f"{'fsdp' if sharded else 'ddp'} {name}", *more, *flags, model=model_of(flags)
    )


def model_of(flags: Sequence[str]) -> str:
    return flags[flags.index("--model") + 1] if "--model" in flags else "digits-vit"


def train(
    root: Path, data: Path, cases: Mapping[str, Sequence[str]]
) -> Iterator[tuple[str, dict[str, float]]]:
    """(case, differences), all cases by one start of the two processes."""
    plan = [
        argv(data, root / "logs", name, sharded, cases[name]) for name in cases for sharded in (False, True)
    ]
    ranks.train_in_turn(2, plan, root / "said", root / "losses")
    losses = [json.loads((root / "losses" / f"{rank}.json").read_text()) for rank in range(2)]
    for i, name in enumerate(cases):
        runs = [root / "logs" / f"{how} {name}" / "checkpoints" for how in ("ddp", "fsdp")]
        last = max(int(path.stem.removeprefix("epoch_")) for path in runs[0].glob("epoch_*.pt"))
        ddp, fsdp = (read_state_dict(run / f"epoch_{last}.pt") for run in runs)
        assert ddp.keys() == fsdp.keys() and all(ddp[key].shape == fsdp[key].shape for key in ddp)
        model = model_of(cases[name])
        start = torch.load(data / f"{model}.pt", weights_only=True)
        ways = {key: (ddp[key].double() - start[key].double()).abs().max() for key in start}
        far = [(ddp[key].double() - fsdp[key].double()).abs().max() / way for key, way in ways.items() if way]
        rows = [ranks.results(run) for run in runs]
        pairs = [(a, b) for rank in losses for a, b in zip(rank[2 * i], rank[2 * i + 1], strict=True)]
        found = ranks.figures(runs[1] / f"epoch_{last}.pt", data, model)
        yield (
            name,
            {
                "loss": max((abs(a - b) / abs(a) for a, b in pairs), default=0.0),
                "weights": float(max(far, default=0.0)),
                "figures": max(abs(a[key] - b[key]) for a, b in zip(*rows, strict=True) for key in a),
                "flyp eval": max(abs(rows[1][-1][f"val/{key}"] - value) for key, value in found.items()),
                "top-1": rows[1][-1]["val/top1"],
            },
        )


# a figure may differ by one image of 160 that is a tie
LIMITS = {"loss": FORWARD, "weights": BACKWARD, "figures": 1 / 160, "flyp eval": 1 / 160}


def rows() -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for name, far in train(root, write(root), CASES):
            good = all(far[key] <= limit for key, limit in LIMITS.items())
            seen = ", ".join(f"{key} {value:.1e}" for key, value in far.items() if key != "top-1")
            yield Row(name, 1, int(good), f"{seen}; top-1 {far['top-1']:.3f}")


if __name__ == "__main__":
    if not HAS_FSDP:
        sys.exit(
            "This needs torch 2.9 and open_clip 4: put a checkout of its development tree on PYTHONPATH."
        )
    sys.exit(table(rows()))
