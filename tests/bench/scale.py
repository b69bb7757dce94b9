"""Resident memory and time to the first batch, by number of samples and of classes.

    python tests/bench/scale.py [--samples 10000 100000 1000000] [--classes 10 1000 21000] [--workers 2] [--prompts N]

Shards of 1,000 generated 8-pixel PNGs with sizes.json beside them, in batches of 100. Each row is a process of
its own. The time runs from ClassPromptDataset(...), tokenising included, to the first batch; importing torch and
open_clip comes before it. Memory is the proportional share (PSS) of the process and its workers together, when
the first batch is there and at the hundredth; `before` is the process before it makes the dataset.

    python tests/bench/scale.py --samples 1000 --classes 10 --padding 4000000

The same with images of 4 MB, which the shuffle buffer holds as they are.

    python tests/bench/scale.py --score --samples 1000 --classes 1000 21000 --prompts 8

A sweep over 3 alphas on two sets that have the same class descriptions, --prompts of each class, with towers of one layer
and few images: what it costs beside the towers.
"""

import argparse
import io
import json
import subprocess
import sys
import tarfile
import tempfile
import time
from functools import partial
from itertools import islice
from pathlib import Path

PER_SHARD, BATCH, MORE = 1_000, 100, 99


def write(folder: Path, samples: int, padding: int = 0) -> None:
    import numpy as np
    from PIL import Image

    rng, images = np.random.default_rng(0), []
    for _ in range(100):
        stream = io.BytesIO()
        Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(stream, "PNG")
        images.append(stream.getvalue() + bytes(padding))  # decoders ignore what follows the end
    folder.mkdir()
    shards = -(-samples // PER_SHARD)
    for shard in range(shards):
        with tarfile.open(folder / f"{shard}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for i in range(PER_SHARD):
                for ending, data in (("png", images[i % 100]), ("cls", b"%d" % (i % 10))):
                    member = tarfile.TarInfo(f"{shard:03d}{i:06d}.{ending}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    (folder / "sizes.json").write_text(json.dumps({f"{shard}.tar": PER_SHARD for shard in range(shards)}))


def resident() -> float:
    """MiB of this process and its children, shared pages divided among those that share them."""
    children = Path("/proc/self/task").glob("*/children")
    total = 0
    for pid in ("self", *(pid for path in children for pid in path.read_text().split())):
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        total += next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total / 1024


def measure(folder: str, classes: int, workers: int, prompts_each: int) -> None:
    import open_clip

    from flyp_plugin import ClassPromptDataset, ClassPrompts

    preprocess = open_clip.image_transform(16, is_train=True)
    tokenizer = open_clip.get_tokenizer("ViT-B-16")
    names = [f"thing {i}" for i in range(classes)]
    prompts = ClassPrompts(names, ["a photo of a {c}."])
    if prompts_each:  # half as many to half as many again, 15 tokens or so
        numbers = [prompts_each // 2 + i * 7919 % (prompts_each + 1) for i in range(classes)]
        own = {
            name: [f"{name}, number {k} of the many photos of it in the rain." for k in range(number)]
            for name, number in zip(names, numbers)
        }
        prompts = ClassPrompts(names, [], own)
    before, start = resident(), time.perf_counter()
    dataset = ClassPromptDataset(folder, preprocess, tokenizer, BATCH, prompts=prompts, num_workers=workers)
    batches = iter(dataset)
    next(batches)
    first, held = time.perf_counter() - start, resident()
    for _ in islice(batches, MORE):
        pass
    cells = [f"{dataset.num_samples:,}", f"{classes:,}", f"{first:.2f} s"]
    cells += [f"{mib:.0f} MiB" for mib in (before, held, resident())]
    print(f"| {' | '.join(cells)} |", flush=True)


def measure_scoring(folder: str, classes: int, prompts_each: int) -> None:
    from open_clip import CLIP, get_tokenizer, image_transform

    from flyp_plugin.evalsets import loader_from_args, parse_eval_sets
    from flyp_plugin.wiseft import sweep

    names = [f"thing {i}" for i in range(classes)]
    own = {
        name: [f"{name}, number {k} of the many photos of it." for k in range(prompts_each)] for name in names
    }
    Path(folder, "classnames.txt").write_text("\n".join(names) + "\n")
    Path(folder, "prompts.json").write_text(json.dumps(own))
    vision = {"image_size": 16, "layers": 1, "width": 64, "patch_size": 8}
    model = CLIP(64, vision, {"context_length": 77, "width": 64, "heads": 1, "layers": 1})
    flags = argparse.Namespace(batch_size=BATCH, workers=0, image_key="png", label_key="cls", group_key=None)
    before, start = resident(), time.perf_counter()
    sets = parse_eval_sets([f"a={folder}", f"b={folder}"])
    found = time.perf_counter() - start
    weights = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    alphas, tokenizer = [0, 0.5, 1], get_tokenizer("ViT-B-16")
    loader = partial(loader_from_args, preprocess=image_transform(16, is_train=False), args=flags)
    sweep(model, weights, weights, alphas, sets, tokenizer, loader)
    cells = [f"{classes:,}", f"{classes * prompts_each:,}", f"{found:.1f} s"]
    cells += [f"{time.perf_counter() - start - found:.0f} s", f"{before:.0f} MiB", f"{resident():.0f} MiB"]
    print(f"| {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--classes", type=int, nargs="+", default=[10, 1_000, 21_000])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--padding", type=int, default=0, help="bytes added to each image")
    parser.add_argument(
        "--prompts", type=int, default=0, help="descriptions of each class, about; 0: a template"
    )
    parser.add_argument("--score", action="store_true", help="the second table")
    parser.add_argument("--measure", nargs=2, metavar=("FOLDER", "CLASSES"), help="one row, in this process")
    args = parser.parse_args()
    if args.measure:
        folder, classes = args.measure[0], int(args.measure[1])
        if args.score:
            measure_scoring(folder, classes, args.prompts or 1)
        else:
            measure(folder, classes, args.workers, args.prompts)
        return
    columns = ["samples | classes | first batch", "before | first batch | hundredth"]
    if args.score:
        columns = ["classes | prompts | sets read", "sweep | before | after"]
    print(f"| {' | '.join(columns)} |\n|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        for samples in args.samples:
            folder = Path(temporary, str(samples))
            write(folder, samples, args.padding)
            for classes in args.classes if samples == args.samples[-1] else args.classes[:1]:
                command = [sys.executable, __file__, "--measure", str(folder), str(classes)]
                command += ["--workers", str(args.workers), "--prompts", str(args.prompts)]
                subprocess.run(command + ["--score"] * args.score, check=True)


if __name__ == "__main__":
    main()
