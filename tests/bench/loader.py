"""Images a second of our loader and of open_clip's, side by side, on JPEGs of about 500 pixels.

    python tests/bench/loader.py [--images 1000] [--rounds 5]

The same shards have a .cls and a .txt member for each image: ours reads the first, open_clip's the second. Both use
open_clip's training transform for ViT-B-16 and batches of 100. An epoch's first pass starts the workers and is not
timed; rounds alternate, and the ratio is the median of the rounds' ratios.
"""

import argparse
import io
import logging
import os
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import open_clip
import webdataset as wds
from open_clip_train.data import get_wds_dataset
from PIL import Image

from flyp_plugin import ClassPromptDataset, ClassPrompts

SHARDS, BATCH = 10, 100


def write(folder: Path, images: int, pixels: int) -> None:
    """JPEGs of smooth random shapes, as large in bytes as photos are."""
    rng = np.random.default_rng(0)
    for shard in range(SHARDS):
        with wds.TarWriter(str(folder / f"{shard}.tar")) as tar:
            for i in range(images // SHARDS):
                size = (pixels + int(rng.integers(-50, 50)), pixels * 3 // 4)
                rough = rng.integers(0, 255, (24, 32, 3), dtype=np.uint8)
                image = np.asarray(
                    Image.fromarray(rough).resize(size, Image.Resampling.BICUBIC), dtype=np.int16
                )
                noisy = np.clip(image + rng.normal(0, 8, image.shape), 0, 255).astype(np.uint8)
                stream = io.BytesIO()
                Image.fromarray(noisy).save(stream, "JPEG", quality=85)
                sample = {"jpg": stream.getvalue(), "cls": i % 10, "txt": f"a photo of a thing {i % 10}."}
                tar.write({"__key__": f"s{shard}_{i}", **sample})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--pixels", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    _, preprocess, _ = open_clip.create_model_and_transforms("ViT-B-16")
    tokenizer = open_clip.get_tokenizer("ViT-B-16")
    prompts = ClassPrompts([f"thing {i}" for i in range(10)], ["a photo of a {c}."])
    print("| workers | open_clip, images/s | ours, images/s | ours / open_clip |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), args.images, args.pixels)
        pattern = os.path.join(folder, f"{{0..{SHARDS - 1}}}.tar")
        for workers in (0, 1, 2):
            options = argparse.Namespace(
                train_data=pattern,
                train_num_samples=args.images,
                train_data_upsampling_factors=None,
                dataset_resampled=False,
                batch_size=BATCH,
                workers=workers,
                world_size=1,
                seed=0,
            )
            theirs = get_wds_dataset(options, preprocess, True, tokenizer=tokenizer).dataloader
            shards = [pattern.replace(f"{{0..{SHARDS - 1}}}", str(i)) for i in range(SHARDS)]
            ours = ClassPromptDataset(
                shards,
                preprocess,
                tokenizer,
                BATCH,
                prompts=prompts,
                num_samples=args.images,
                num_workers=workers,
            )
            rates: dict[str, list[float]] = {"theirs": [], "ours": []}
            for round_ in range(args.rounds + 1):
                for name, loader in sorted({"theirs": theirs, "ours": ours}.items(), reverse=round_ % 2 == 1):
                    start = time.perf_counter()
                    seen = sum(len(batch[0]) for batch in loader)
                    if round_:
                        rates[name].append(seen / (time.perf_counter() - start))
            ratio = statistics.median(o / t for o, t in zip(rates["ours"], rates["theirs"]))
            medians = {name: statistics.median(values) for name, values in rates.items()}
            print(
                f"| {workers} | {medians['theirs']:.0f} | {medians['ours']:.0f} | {ratio:.2f}x |", flush=True
            )


if __name__ == "__main__":
    main()
