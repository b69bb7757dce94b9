"""The icon study of tests/bench/README.md at the scale of a GPU: a ViT-S at 64 pixels, five methods, 5 seeds.

Where npm and pip reach their registries, once:

    npm pack @iconify/json && tar xzf iconify-json-*.tgz && pip install resvg-py
    PYTHONPATH=. python tests/bench/icon_shift.py pack --icons package .gpu/icons.json.xz      # 30 MB, 150,000 icons

and on the machine with the GPU, without a network, twice; 9 minutes at most each time on an H100 with 16 cores:

    python -m tests.gpu.icons --device cuda --out tables

The first command draws the icons, times two half epochs of pretraining, and pretrains for as many as --seconds allow.
The second is `flyp compare`, first with one seed, then with all. Each goes on where it was stopped, in the folder
--work: start the second before that is gone. Results: icons.md, icons.json, icons.png.
"""

import json
import os
import shutil
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any, NamedTuple

from tests.gpu.report import Report, parser

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
import icon_shift

CORES = os.cpu_count() or 1
VIT_S = {
    "embed_dim": 384,
    "vision_cfg": {"image_size": 64, "layers": 12, "width": 384, "patch_size": 8, "head_width": 64},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 256, "heads": 4, "layers": 4},
}
TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 16, "patch_size": 8, "head_width": 8},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


class Plan(NamedTuple):
    model: dict[str, Any]
    pretrain: str  # flags of open_clip's script
    compare: str  # flags of `flyp compare`
    seeds: list[str]  # the last: all
    epochs: int | None = None  # of pretraining; None: as many as there is time for


FULL = Plan(
    VIT_S,
    f"--batch-size 1024 --warmup 300 --grad-clip-norm 1 --workers {min(CORES, icon_shift.SHARDS)}",
    "--methods flyp,ce,lp,lp-ft,flyp-anchor,flyp-trajectory --lr 1e-4,3e-4,1e-3 --model-stock",
    ["0:1", "0:5"],
)
FEW = Plan(
    TINY,
    "--batch-size 32 --warmup 1",
    "--methods flyp,lp --lr 1e-3 --lp-c 1 --epochs 1 --batch-size 32 --workers 0",
    ["0:1"],
    epochs=1,
)


def main() -> None:
    flags = parser(__doc__)
    add, default = flags.add_argument, "(default: %(default)s)"
    add("--icons", type=Path, default=Path(".gpu/icons.json.xz"), help=f"as packed {default}")
    add("--work", type=Path, default=Path("/tmp/flyp-gpu-icons"), help=f"what goes on is here {default}")
    add("--seconds", type=float, default=500, help=f"that the first command may take {default}")
    add("--at-once", type=int, default=10, help=f"trainings that share the GPU {default}")
    args = flags.parse_args()
    if not args.icons.exists():
        flags.error(f"{args.icons} is missing; `icon_shift.py pack` writes it (see --help).")
    plan, report = FEW if args.small else FULL, Report(args.out, "icons", args.device, args.seconds)
    args.work /= "small" if args.small else "full"
    args.work.mkdir(parents=True, exist_ok=True)
    state = State(args.work / "state.json")
    if "pretrained" not in state:
        pretrain(plan, args, state, report)
    report.header("images of", "number")
    for name, number in state["images"].items():
        report.row([name, number])
    report(
        f"\nDrawn in {state['drawing']:.0f} s by {CORES} processes. Epochs of pretraining: {state['epochs']}."
    )
    if report.left() < args.seconds / 2:
        return report("\nPretraining has taken the time there was; the same command compares.")
    compare(plan, args, state, report)


class State(dict):
    """What earlier commands have found, in a file."""

    def __init__(self, path: Path):
        super().__init__(json.loads(path.read_text()) if path.exists() else {})
        self.path = path

    def add(self, **found: Any) -> None:
        self.update(found)
        self.path.write_text(json.dumps(self, indent=1))


def pretrain(plan: Plan, args: Namespace, state: State, report: Report) -> None:
    """Draw the icons, decide the number of epochs, pretrain."""
    if "images" not in state:
        start = time.monotonic()
        images = icon_shift.write_data(
            args.icons, list(icon_shift.LEAST.values()), args.work, plan.model, CORES
        )
        state.add(images=images, drawing=time.monotonic() - start)
    if "epochs" not in state:
        state.add(epochs=plan.epochs or affordable(plan, args, state, report))
    icon_shift.pretrain(args.work, state["epochs"], args.device, plan.pretrain.split())
    state.add(pretrained=True)


def affordable(plan: Plan, args: Namespace, state: State, report: Report) -> int:
    """The number of epochs for which there is time, by the second half epoch of a trial."""
    start, half = time.monotonic(), state["images"]["captions"] // 2
    icon_shift.pretrain(args.work, 2, args.device, [*plan.pretrain.split(), "--train-num-samples", str(half)])
    last = icon_shift.checkpoint(args.work, 2)
    seconds = last.stat().st_mtime - last.with_name("epoch_1.pt").stat().st_mtime
    start_up = max(0.0, time.monotonic() - start - 2 * seconds)
    report(f"\nPretraining: {half / seconds:.0f} images/s after {start_up:.0f} s.")
    return max(3, int((report.left() - start_up) / (2 * seconds)))  # 2 has been the trial's number


def compare(plan: Plan, args: Namespace, state: State, report: Report) -> None:
    """`flyp compare`, and a copy of what it writes after each of plan.seeds."""
    many = args.device.startswith("cuda") and args.at_once > 1
    if many:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, CORES // args.at_once)))
    device = ",".join(["cuda:0"] * args.at_once) if many else args.device
    results = args.work / f"compare{state['epochs']}"
    for seeds in plan.seeds:
        start = time.monotonic()
        study = Namespace(pretrained=None, pretrain_epochs=state["epochs"], seeds=seeds, device=device)
        icon_shift.compare("main", args.work, results, study, plan.compare.split())
        for kind in ("json", "png"):
            shutil.copy(results / f"compare.{kind}", args.out / f"icons.{kind}")
        report(
            f"\n## Seeds {seeds}, {time.monotonic() - start:.0f} s\n\n{(results / 'compare.md').read_text()}"
        )


if __name__ == "__main__":
    main()
