"""Time and memory of a sweep of 11 alphas in one `flyp wiseft`, against 11 runs of `flyp eval`. Run by hand:

    python tests/bench/sweep.py [--images 128] [--pixels 1024] [--workers 2]

JPEGs are large and the tower is small, so that decoding is what costs, as on a GPU. Each command is its own
process; memory is its peak resident set and that of its largest worker, in MiB. Writes JSON to stdout.
"""

import argparse
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import open_clip
import torch
from PIL import Image

CONFIG = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": 224, "layers": 2, "width": 128, "patch_size": 32, "head_width": 32},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 128, "heads": 4, "layers": 2},
}
# starts a command and tells its time, its own peak memory and its workers'
RUN = """
import json, resource, sys, time
from flyp_plugin.commands import call
start = time.perf_counter()
call(sys.argv[1:])
peak = [resource.getrusage(who).ru_maxrss // 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
sys.stderr.write("\\nMEASURED " + json.dumps([time.perf_counter() - start, *peak]))
"""


def write_shards(folder: Path, images: int, pixels: int) -> None:
    rng = np.random.default_rng(0)
    (folder / "test").mkdir(parents=True)
    (folder / "classnames.txt").write_text("\n".join(f"class {i}" for i in range(10)) + "\n")
    (folder / "zeroshot_classification_templates.txt").write_text("a photo of a {c}.\n")
    with (
        tarfile.open(folder / "test" / "0.tar", "w") as first,
        tarfile.open(folder / "test" / "1.tar", "w") as second,
    ):
        for i in range(images):
            coarse = Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8))
            jpeg = io.BytesIO()
            coarse.resize((pixels, pixels), Image.Resampling.BICUBIC).save(jpeg, "jpeg", quality=90)
            for ending, content in (("jpg", jpeg.getvalue()), ("cls", str(i % 10).encode())):
                member = tarfile.TarInfo(f"{i:06d}.{ending}")
                member.size = len(content)
                (second if i % 2 else first).addfile(member, io.BytesIO(content))


def measured(*argv: object) -> tuple[float, float, int, int]:
    """Wall time with Python's start, that of the command alone, peak MiB of it and of its workers."""
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", RUN, *map(str, argv)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(done.stderr)
    seconds, *peak = json.loads(done.stderr.rsplit("MEASURED ", 1)[1])
    return time.perf_counter() - start, seconds, *peak


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--pixels", type=int, default=1024)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "bench.json").write_text(json.dumps(CONFIG))
        open_clip.add_model_config(folder / "bench.json")
        write_shards(folder / "data", args.images, args.pixels)
        for seed, name in enumerate(("pretrained", "finetuned")):
            torch.manual_seed(seed)
            torch.save(open_clip.create_model("bench").state_dict(), folder / f"{name}.pt")
        data = ["--eval-data", f"val={folder}/data", "--workers", args.workers]
        model = ["--model", "bench", "--model-config", folder / "bench.json", *data]
        ends = ["--pretrained", folder / "pretrained.pt", "--finetuned", folder / "finetuned.pt"]
        results: dict[str, object] = {"images": args.images, "pixels": args.pixels, "cpus": os.cpu_count()}
        for alphas in ("0:1:0.5", "0:1:0.1", "0:1:0.02"):
            out = folder / f"out-{alphas}"
            wall, seconds, mine, workers = measured("wiseft", *model, *ends, "--out", out, "--alphas", alphas)
            results[f"wiseft {alphas}"] = {
                "wall_s": wall,
                "command_s": seconds,
                "peak_mib": mine,
                "workers_mib": workers,
            }
        separate = [measured("eval", folder / "finetuned.pt", *model) for _ in range(11)]
        wall, seconds, mine, _ = zip(*separate)
        results["11 x eval"] = {"wall_s": sum(wall), "command_s": sum(seconds), "peak_mib": max(mine)}
        sweep = results["wiseft 0:1:0.1"]
        for clock in ("wall_s", "command_s"):
            results[f"ratio {clock}"] = sweep[clock] / results["11 x eval"][clock]  # type: ignore[index]
    sys.stdout.write(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
