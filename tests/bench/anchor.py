"""What --anchor costs: time and memory of a training step of FLYP, and of the same with each teacher.

    python -m tests.bench.anchor                          # ViT-B-32 at 32, fp32, CPU
    python -m tests.bench.anchor --clock cpu --threads 1  # on a machine that others use too
    python -m tests.bench.anchor --device cuda --precision amp_bf16 --batch-size 512

Steps are those of tests/bench/step.py with short text; the teacher's forward pass is in the same precision, without
gradient, and its text is as short. Each round runs every variant once on one batch, in changing order; a ratio is the
median of the rounds' ratios. Memory is the peak of a process of its own for each variant: resident on a CPU, allocated on
a GPU.
"""

import argparse
import re
import statistics
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from flyp_plugin import text
from flyp_plugin.anchor import TEACHERS, Teacher
from flyp_plugin.precision import match_open_clip_precision
from tests.bench.step import Batches, Steps, add_clock, device_name, seconds

VARIANTS = ("none", *TEACHERS)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="ViT-B-32")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--prompts", default="1000x80", help="classes x templates")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "amp_bf16"])
    parser.add_argument("--peak", choices=VARIANTS, help="print the peak memory of one variant, in MiB")
    add_clock(parser)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    match_open_clip_precision()
    steps = Steps(args.model, args.device, args.precision)
    batches = Batches(args.model, args.prompts, args.batch_size, steps.image_size, args.device)
    if args.peak:
        step = make(steps, args.peak)
        for _ in range(2):
            step(*batches.draw())
        if args.device.startswith("cuda"):
            return print(torch.cuda.max_memory_allocated() >> 20)
        status = Path("/proc/self/status").read_text()
        return print(int(re.search(r"VmHWM:\s+(\d+)", status)[1]) >> 10)  # type: ignore[index]
    times: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    made = {variant: make(steps, variant) for variant in VARIANTS}
    for round_ in range(-1, args.rounds):  # the first is a warm-up
        batch = batches.draw()
        for i in range(len(VARIANTS)):
            variant = VARIANTS[(round_ + i) % len(VARIANTS)]
            elapsed = seconds(partial(made[variant], *batch), args.device, args.clock)
            times[variant] += [elapsed] if round_ >= 0 else []
    print(
        f"{device_name(args.device)}, {args.model}, batch {args.batch_size}, {args.precision}, torch {torch.__version__}"
    )
    print("\n| teacher | step | with / without | peak memory |\n|---|---|---|---|")
    for variant in VARIANTS:
        ratio = statistics.median(a / b for a, b in zip(times[variant], times["none"]))
        command = [sys.executable, "-m", "tests.bench.anchor", *sys.argv[1:], "--peak", variant]
        peak = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
        print(
            f"| {variant} | {statistics.median(times[variant]) * 1000:.0f} ms | {ratio:.2f}x | {peak} MiB |",
            flush=True,
        )


def make(steps: Steps, variant: str):
    """A step with a teacher, or without one."""
    teacher = Teacher(steps.model, int(variant == "trajectory"), 1000) if variant != "none" else None
    if teacher:
        teacher.start(steps.model, 0)
        teacher.shorten()

    def loss(features: dict[str, Tensor], images: Tensor, tokens: Tensor) -> Tensor:
        distance = 3.5 * teacher.distances(images, tokens, features).mean() if teacher else 0
        return steps.loss(**features) + distance

    def step(images: Tensor, tokens: Tensor, labels: Tensor) -> None:
        optimizer, before = steps.optimizers[0], type(steps.model)
        text.shorten(steps.model)
        try:
            optimizer.zero_grad()
            with steps._autocast():
                total = loss(steps.model(images, tokens), images, tokens)
            total.backward()
            optimizer.step()
            if variant == "trajectory":
                teacher.update(steps.model)
        finally:
            steps.model.__class__ = before

    return step


if __name__ == "__main__":
    main()
