"""Whether the loader keeps a GPU busy, and what would: images a second that it delivers, and that a step takes.

    python -m tests.gpu.feed --device cuda --out tables      # 5 minutes on an H100 with 16 cores
    python -m tests.gpu.feed --device cpu --out tables --small

Images are the JPEGs of tests/bench/loader.py: as they come from the web (500 x 375 pixels), decoded in full and with
--jpeg-draft, and stored again with a shorter side of 256. Three tables: the loader alone, with 1 to 16 workers; the training
step alone (tests/bench/step.py's, with the fixed length of text that training uses on a GPU), on one batch that is on the
device; and the step fed by the loader, of which the share of the step's own rate says how long the GPU waits.

Every worker starts with a batch at the same time, so batches come in bursts: the clock starts after the first burst and runs for
whole ones. The images are few and in the page cache: a disk or a network that is slower than the decoder is not measured.
"""

import gc
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterable
from itertools import product
from pathlib import Path
from typing import NamedTuple

import open_clip
import torch
from torch import Tensor

from flyp_plugin import ClassPromptDataset, ClassPrompts, text
from flyp_plugin.precision import match_open_clip_precision
from tests.bench import loader
from tests.bench.step import Batches, Steps
from tests.gpu.report import Report, parser
from tests.gpu.step import SMALL

SHARD = 128  # images
BUSY = 0.95  # of the step's own rate
PROMPTS = "10x80"  # ImageNet's first classes, which loader.write's labels stand for, and its templates


class Stored(NamedTuple):
    title: str
    pixels: int  # of the longer side, about
    draft: bool = False


class Plan(NamedTuple):
    models: dict[str, int]  # and batch sizes
    stored: list[Stored]
    workers: list[int]  # of the loader alone
    fed: list[int]  # workers of the loader that feeds a step
    image_size: int = 224
    batch: int = SHARD  # of the loader alone
    bursts: int = 4  # that are timed of the loader alone
    steps: int = 20  # of the step alone


WEB = [Stored("500 x 375", 500), Stored("500 x 375, --jpeg-draft", 500, True), Stored("341 x 256", 341)]
FULL = Plan({"ViT-B-32": 512, "ViT-B-16": 256}, WEB, [1, 2, 4, 8, 16], [8, 16])
LITTLE = [Stored("100 x 75", 100), Stored("64 x 48", 64)]
FEW = Plan({"digits-small": 4}, LITTLE, [1, 2], [2], image_size=16, batch=8, bursts=1, steps=2)


def main() -> None:
    args = parser(__doc__).parse_args()
    report, plan = Report(args.out, "feed", args.device), FEW if args.small else FULL
    match_open_clip_precision()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "digits-small.json").write_text(json.dumps(SMALL))
        open_clip.add_model_config(folder / "digits-small.json")
        for pixels in {stored.pixels for stored in plan.stored}:
            (folder / str(pixels)).mkdir()
            loader.write(folder / str(pixels), SHARD, pixels, loader.NOISE, shards=1)
        delivered = time_loader(plan, folder, args.device, report)
        for model in plan.models:
            time_step(model, plan, folder, delivered, args.device, report)
            gc.collect()


def time_loader(plan: Plan, folder: Path, device: str, report: Report) -> dict[Stored, float]:
    """Print the first table; returns its last row, the images a second with the most workers."""
    report("\n## The loader alone, images a second")
    report.header("workers", *(stored.title for stored in plan.stored))
    for workers in plan.workers:
        delivered = {}
        for stored in plan.stored:
            data = dataset(folder, stored, workers, plan.batch, 1 + plan.bursts, plan.image_size)
            delivered[stored] = rate(data, workers, lambda images, tokens: None, device)
        report.row([workers, *(f"{delivered[stored]:.0f}" for stored in plan.stored)])
    return delivered


def time_step(
    model: str, plan: Plan, folder: Path, delivered: dict[Stored, float], device: str, report: Report
) -> None:
    """Print the table of one model, and what follows from it."""
    batch, steps = plan.models[model], Steps(model, device, "amp_bf16")
    synthetic = Batches(model, PROMPTS, batch, steps.image_size, device)
    text.shorten(steps.model, length=synthetic.longest())  # as training does on a GPU

    def train(images: Tensor, tokens: Tensor) -> None:
        images, tokens = (part.to(device, non_blocking=True) for part in (images, tokens))
        steps.contrastive(images, tokens, tokens)

    alone = rate([synthetic.draw()[:2]] * (2 + plan.steps), 2, train, device)
    report(f"\n## {model}, batch {batch}, amp_bf16: the step takes {alone:.0f} images a second")
    report.header("images", "workers", "fed by the loader", "the GPU waits")
    waits = {}
    for stored, workers in product(plan.stored, plan.fed):
        if report.left() < 40:
            report.row([stored.title, workers, "no time left", ""])
            continue
        fed = rate(dataset(folder, stored, workers, batch, 3, steps.image_size), workers, train, device)
        waits[stored, workers] = max(0.0, 1 - fed / alone)
        report.row([stored.title, workers, f"{fed:.0f}", f"{100 * waits[stored, workers]:.0f} %"])
    report()
    most = plan.workers[-1]
    for stored, rate_ in delivered.items():
        waited = waits.get((stored, plan.fed[-1]))
        report(
            f"- {stored.title}: {most} workers deliver {rate_:.0f} images/s, the step takes {alone:.0f}"
            + ("" if waited is None else f": the GPU waits {100 * waited:.0f} %")
            + f". About {math.ceil(alone / rate_ * most)} such cores would keep up."
        )
    busy = [f"{stored.title} with {n} workers" for (stored, n), waited in waits.items() if waited <= 1 - BUSY]
    report(
        f"- {model} is kept busy ({100 * BUSY:.0f} % of its rate or more) by: {'; '.join(busy) or 'none of these'}."
    )


def dataset(
    folder: Path, stored: Stored, workers: int, batch: int, bursts: int, image_size: int
) -> ClassPromptDataset:
    """So many batches for each worker, from links to one shard."""
    links = [
        folder / str(stored.pixels) / f"link{i}.tar"
        for i in range(math.ceil(workers * batch * bursts / SHARD))
    ]
    for link in links:
        if not link.exists():
            link.symlink_to("0.tar")
    classes, templates = map(int, PROMPTS.split("x"))
    names = open_clip.IMAGENET_CLASSNAMES[:classes]
    return ClassPromptDataset(
        [str(link) for link in links],
        open_clip.image_transform(image_size, is_train=True),
        open_clip.get_tokenizer("ViT-B-32"),
        batch,
        prompts=ClassPrompts(names, [t("{c}") for t in open_clip.OPENAI_IMAGENET_TEMPLATES[:templates]]),
        num_samples=workers * batch * bursts,
        num_workers=workers,
        jpeg_draft=image_size if stored.draft else 0,
    )


def rate(batches: Iterable, skip: int, consume: Callable[[Tensor, Tensor], None], device: str) -> float:
    """Images a second that are consumed after the first `skip` batches."""
    start, seen = math.nan, 0
    for number, (images, tokens) in enumerate(batches):
        consume(images, tokens)
        seen += len(images) * (number >= skip)
        if number == skip - 1:
            start = now(device)
    return seen / (now(device) - start)


def now(device: str) -> float:
    """The time when the device has done all that it was given."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main()
