"""Whether the loader keeps a GPU busy, and what would: images a second that it delivers, and that a step takes.

    python -m tests.gpu.feed --device cuda --out tables      # 5 minutes on an H100 with 16 cores
    python -m tests.gpu.feed --device cpu --out tables --small

Images are the JPEGs of tests/bench/loader.py: of a common size, decoded in full and with --jpeg-draft, and stored
again with a shorter side of 256. A table of the loader alone, with 1 to 16 workers; then for each model the rate of
the training step alone (tests/bench/step.py's, with the fixed length of text that training uses on a GPU), on one
batch that is on the device, and of the step fed by the loader: the difference is how long the GPU waits.

All workers start at the same time and need as long for a batch, so batches come in bursts: the clock starts after the
first burst and runs for whole ones. The images are in the page cache: no disk or network is measured.
"""

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
CLASSES = 10  # ImageNet's first, which the labels of loader.write stand for; with all templates
TEMPLATES = [template("{c}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES]


class Plan(NamedTuple):
    models: dict[str, int]  # and batch sizes
    stored: dict[str, int]  # kinds of images and their longer sides; "draft" in a kind decodes it so
    workers: list[int]  # of the loader alone
    fed: list[int]  # workers of the loader that feeds a step
    image_size: int  # of the loader alone, and so on
    batch: int
    bursts: int
    steps: int  # of the step alone


STORED = {"500 x 375": 500, "500 x 375, --jpeg-draft": 500, "341 x 256": 341}
FULL = Plan({"ViT-B-32": 512, "ViT-B-16": 256}, STORED, [1, 2, 4, 8, 16], [8, 16], 224, SHARD, 5, 20)
FEW = Plan({"digits-small": 4}, {"100 x 75": 100, "64 x 48": 64}, [1, 2], [2], 16, 8, 2, 2)


def main() -> None:
    args = parser(__doc__).parse_args()
    report, plan = Report(args.out, "feed", args.device), FEW if args.small else FULL
    match_open_clip_precision()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "digits-small.json").write_text(json.dumps(SMALL))
        open_clip.add_model_config(folder / "digits-small.json")
        for pixels in set(plan.stored.values()):
            (folder / str(pixels)).mkdir()
            loader.write(folder / str(pixels), SHARD, pixels, loader.NOISE, shards=1)
        report("\n## The loader alone, images a second")
        report.header("workers", *plan.stored)
        for workers in plan.workers:
            rates = {}  # the last ones, with the most workers, are what is delivered
            for stored in plan.stored:
                data = dataset(plan, folder, stored, workers, plan.batch, plan.bursts, plan.image_size)
                rates[stored] = rate(data, workers, lambda *batch: None)
            report.row([workers, *(f"{value:.0f}" for value in rates.values())])
        for model in plan.models:
            feed(model, plan, folder, rates, args.device, report)


def feed(model: str, plan: Plan, folder: Path, delivered: dict, device: str, report: Report) -> None:
    """The table of one model, and what follows from it."""
    batch, steps = plan.models[model], Steps(model, device, "amp_bf16")
    synthetic = Batches(model, f"{CLASSES}x{len(TEMPLATES)}", batch, steps.image_size, device)
    text.shorten(steps.model, length=synthetic.longest())  # as training does on a GPU

    def train(images: Tensor, tokens: Tensor) -> None:
        images, tokens = (part.to(device, non_blocking=True) for part in (images, tokens))
        steps.contrastive(images, tokens, tokens)

    alone = rate([synthetic.draw()[:2]] * (2 + plan.steps), 2, train)
    report(f"\n## {model}, batch {batch}, amp_bf16: the step takes {alone:.0f} images a second")
    report.header("images", "workers", "fed by the loader", "the GPU waits")
    waits: dict[tuple[str, int], float] = {}
    for stored, workers in product(plan.stored, plan.fed):
        if report.left() > 40:
            data = dataset(plan, folder, stored, workers, batch, 3, steps.image_size)
            waits[stored, workers] = max(0.0, 1 - (fed := rate(data, workers, train)) / alone)
            report.row([stored, workers, f"{fed:.0f}", f"{100 * waits[stored, workers]:.0f} %"])
    report()
    for stored, most in delivered.items():
        waited = [f"the GPU waits {100 * part:.0f} %" for (name, _), part in waits.items() if name == stored]
        report(
            f"- {stored}: {plan.workers[-1]} workers deliver {most:.0f} images/s, the step takes {alone:.0f}: "
            f"{(waited or ['no time left'])[-1]}. {math.ceil(alone / most * plan.workers[-1])} would keep up."
        )
    busy = [f"{stored} with {workers}" for (stored, workers), part in waits.items() if part < 1 - BUSY]
    report(f"- Workers that keep {model} at {100 * BUSY:.0f} % of its rate: {'; '.join(busy) or 'none'}.")


def dataset(plan, folder: Path, stored: str, workers: int, batch: int, bursts: int, image_size: int):
    """ClassPromptDataset with so many batches for each worker, from links to one shard."""
    number = max(workers, workers * batch * bursts // SHARD)
    shards = [folder / f"{plan.stored[stored]}/{i}.tar" for i in range(number)]
    for link in shards:
        if not link.exists():
            link.symlink_to("0.tar")
    return ClassPromptDataset(
        [str(shard) for shard in shards],
        open_clip.image_transform(image_size, is_train=True),
        open_clip.get_tokenizer("ViT-B-32"),
        batch,
        prompts=ClassPrompts(open_clip.IMAGENET_CLASSNAMES[:CLASSES], TEMPLATES),
        num_samples=workers * batch * bursts,
        num_workers=workers,
        jpeg_draft=image_size if "draft" in stored else 0,
    )


def rate(batches: Iterable, skip: int, consume: Callable[[Tensor, Tensor], None]) -> float:
    """Images a second that are consumed after the first `skip` batches."""
    start, seen = math.nan, 0
    for number, (images, tokens) in enumerate(batches):
        consume(images, tokens)
        seen += len(images) * (number >= skip)
        if number == skip - 1:
            start = now()
    return seen / (now() - start)


def now() -> float:
    """The time at which the device has done all that it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main()
