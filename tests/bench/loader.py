"""Images a second of our loader, with and without --jpeg-draft, and of open_clip's, side by side.

    python tests/bench/loader.py [--pixels 500 1024 2048] [--workers 0 1 2] [--rounds 5]

The same shards have a .cls, a .path and a .txt member for each image: ours reads the first two, open_clip's the third.
Both use open_clip's training transform for ViT-B-16 and batches of 100. An epoch's first pass starts the workers and is
not timed; rounds alternate, and the ratio is the median of the rounds' ratios.
"""

import argparse
import io
import logging
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import open_clip
import webdataset as wds
from open_clip_train.data import get_wds_dataset
from PIL import Image

from flyp_plugin import ClassPromptDataset, ClassPrompts

SHARDS, BATCH, NOISE = 10, 100, 8


def write(folder: Path, images: int, pixels: int, noise: float, shards: int = SHARDS) -> None:
    """JPEGs of smooth random shapes and noise, which decides how many bytes they have."""
    rng = np.random.default_rng(0)
    for shard in range(shards):
        with wds.TarWriter(str(folder / f"{shard}.tar")) as tar:
            for i in range(images // shards):
                size = (pixels + int(rng.integers(-50, 50)), pixels * 3 // 4)
                rough = rng.integers(0, 255, (24, 32, 3), dtype=np.uint8)
                image = np.asarray(
                    Image.fromarray(rough).resize(size, Image.Resampling.BICUBIC), dtype=np.int16
                )
                noisy = np.clip(image + rng.normal(0, noise, image.shape), 0, 255).astype(np.uint8)
                stream = io.BytesIO()
                Image.fromarray(noisy).save(stream, "JPEG", quality=85)
                sample = {"jpg": stream.getvalue(), "cls": i % 10, "txt": f"a photo of a thing {i % 10}."}
                sample["path"] = f"thing {i % 10}/{shard}_{i}.jpg".encode()
                tar.write({"__key__": f"s{shard}_{i}", **sample})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=1000, help="of 500 pixels; fewer of the larger ones")
    parser.add_argument("--pixels", type=int, nargs="+", default=[500, 1024, 2048])
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--noise", type=float, default=NOISE, help="of the pixels, 0..255: 8 makes 1.7 to 2.2 bits a pixel"
    )
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    model, preprocess, _ = open_clip.create_model_and_transforms("ViT-B-16")
    tokenizer, draft = open_clip.get_tokenizer("ViT-B-16"), model.visual.image_size[0]
    names = [f"thing {i}" for i in range(10)]
    ragged = {name: [f"{name} from view {k}." for k in range(1 + 20 * i)] for i, name in enumerate(names)}
    prompts = ClassPrompts(names, ["a photo of a {c}."], ragged)
    print("Images a second:\n| pixels | workers | open_clip | ours | ours, --jpeg-draft | ", end="")
    print("ours / open_clip | draft / ours |\n|---|---|---|---|---|---|---|")
    for pixels in args.pixels:
        with tempfile.TemporaryDirectory() as folder:
            # open_clip's loader never ends where a worker has less than a batch
            least = BATCH * max(1, *args.workers)
            images = max(least, args.images * 500**2 // pixels**2 // SHARDS * SHARDS)
            write(Path(folder), images, pixels, args.noise)
            pattern = os.path.join(folder, f"{{0..{SHARDS - 1}}}.tar")
            for workers in args.workers:
                options = argparse.Namespace(
                    train_data=pattern,
                    train_num_samples=images,
                    train_data_upsampling_factors=None,
                    dataset_resampled=False,
                    batch_size=BATCH,
                    workers=workers,
                    world_size=1,
                    seed=0,
                )
                ours = partial(
                    ClassPromptDataset,
                    pattern,
                    preprocess,
                    tokenizer,
                    BATCH,
                    prompts=prompts,
                    num_samples=images,
                    num_workers=workers,
                )
                loaders = [
                    get_wds_dataset(options, preprocess, True, tokenizer=tokenizer).dataloader,
                    ours(),
                    ours(jpeg_draft=draft),
                ]
                rates = _rates(loaders, args.rounds)
                cells = [f"{statistics.median(values):.0f}" for values in rates]
                for above, below in ((1, 0), (2, 1)):
                    ratio = statistics.median(a / b for a, b in zip(rates[above], rates[below]))
                    cells.append(f"{ratio:.2f}x")
                print(f"| {pixels} | {workers} | {' | '.join(cells)} |", flush=True)


def _rates(loaders: Sequence[Iterable], rounds: int) -> list[list[float]]:
    """Images a second of each loader in each round; whose turn is first changes."""
    rates: list[list[float]] = [[] for _ in loaders]
    for round_ in range(rounds + 1):
        for turn in range(len(loaders)):
            i = (turn + round_) % len(loaders)
            start = time.perf_counter()
            seen = sum(len(batch[0]) for batch in loaders[i])
            if round_:
                rates[i].append(seen / (time.perf_counter() - start))
    return rates


if __name__ == "__main__":
    main()
