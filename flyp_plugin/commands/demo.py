"""`flyp demo`: from images to the frontier plot, offline, by the commands that a user would type.

Scikit-learn's handwritten digits in four looks. A small CLIP is pretrained on captions of all of them, fine-tuned with
FLYP on one look, and scored on that one (ID) and on two of the others (OOD): there pretraining knows a little, and what
fine-tuning gains in one look it may lose in others.
"""

import argparse
import json
import logging
import math
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tqdm import tqdm

from flyp_plugin import openclip
from flyp_plugin.commands.flags import positive
from flyp_plugin.commands.jobs import claim_folder
from flyp_plugin.errors import InputError, Terminated
from flyp_plugin.metrics import evaluate, table
from flyp_plugin.run_folder import folder_lock
from flyp_plugin.sources import write_atomically

NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
TEMPLATES = ["a handwritten {c}.", "the digit {c}."]
CAPTIONS = ["a handwritten {c}, {look}.", "the digit {c}, {look}.", "a handwritten {c}."]
LOOKS = {
    "id": "white on black",
    "negative": "black on white",
    "outlined": "outlined",
    "blue": "yellow on blue",
}
# of the 1,797 digits; an image that is scored is in no other part
PARTS = {
    "captions": range(500),
    "train": range(500, 1000),
    "val": range(1000, 1300),
    "test": range(1300, 1797),
}
# the first is ID and chooses alpha
SETS = {"val": "data/val", "negative": "negative/test", "outlined": "outlined/test"}
MODEL = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 16, "layers": 4, "width": 96, "patch_size": 4, "head_width": 24},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 4, "layers": 2},
}
SHARD_SIZE = 250
_SWEEP = "logs/flyp/wiseft"  # where `flyp wiseft` writes
# for `python -c`: open_clip's own training of a model configuration (the first argument) that open_clip does not have
_PLAIN_MAIN = (
    "import open_clip, sys; open_clip.add_model_config(sys.argv.pop(1)); "
    "from open_clip_train.main import main; main(sys.argv[1:])"
)
_log = logging.getLogger(__name__)
EXAMPLE = """  flyp demo
  python train_flyp.py --demo                   # the same"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--demo-dir", default="flyp-demo", metavar="DIR", help="for all that it writes (default: %(default)s)"
    )
    add(
        "--pretrain-epochs", type=positive, default=20, metavar="N", help="on captions (default: %(default)s)"
    )
    add("--epochs", type=positive, default=10, metavar="N", help="of FLYP (default: %(default)s)")


def run(args: argparse.Namespace) -> None:
    """`flyp demo`: run the steps whose results --demo-dir lacks, then print the table.

    Raises:
        InputError: --demo-dir holds something else, a package is missing, or a step failed.
    """
    missing = [name for name in ("sklearn", "matplotlib") if find_spec(name) is None]
    if missing:
        raise InputError(f"the demo needs {', '.join(missing)}: pip install 'flyp-plugin[demo]'")
    openclip.world()  # needs open_clip's training script, and says so
    root = Path(args.demo_dir)
    claim_folder(root, {"pretrain_epochs": args.pretrain_epochs, "epochs": args.epochs}, "--demo-dir")
    with folder_lock(root) as lock:
        if not (root / "photos").exists():
            _log.info(
                f"== Draw scikit-learn's digits in {len(LOOKS)} looks: {root}/photos and, captioned, {root}/captions"
            )
            _draw(root)
        for title, done, line in _steps(root, args.pretrain_epochs, args.epochs):
            command = shlex.split(line)
            if done.exists():
                _log.info(f"== {title}: {done} is there")
            else:
                to = f" > {shlex.quote(str(done))}" if "--json" in command else ""
                _log.info(f"== {title}\n   {shlex.join(command)}{to}")
                if "--epochs" in command:
                    _log.info(f"   (what it says is in {root}/last-training.log)")
                _run(command, root / "last-training.log", done, lock)
    _log.info(f"== Done\n{_table(root)}\n\n{_read_back(root)}")
    _log.info(f"The plot is {root}/{_SWEEP}/frontier.png, all figures are in {root}/{_SWEEP}/wiseft.json.")


def _steps(root: Path, pretrain_epochs: int, epochs: int) -> Iterator[tuple[str, Path, str]]:
    """What it is, the path that is there when it is done, and the command line of each step."""
    here = shlex.quote(str(root))
    shards = [("id", f"data/{split}") for split in ("train", "val", "test")]
    for look, out in [*shards, ("negative", "negative/test"), ("outlined", "outlined/test")]:
        split = Path(out).name
        command = f"flyp shards write {here}/photos/{look}/{split} {here}/{out} --classnames"
        command += f" {here}/classnames.txt --templates {here}/templates.txt --shard-size {SHARD_SIZE}"
        yield f"Write shards of {split}, {LOOKS[look]}", root / out, command

    images = len(PARTS["captions"]) * len(LOOKS)
    cpu = "--device cpu --workers 1"
    train = f"{cpu} --logs {here}/logs --resume latest --delete-previous-checkpoint"
    pretrained = f"logs/pretrain/checkpoints/epoch_{pretrain_epochs}.pt"
    command = f"python -c {shlex.quote(_PLAIN_MAIN)} {here}/demo-clip.json"
    command += " --model demo-clip --dataset-type webdataset"
    command += f" --train-data {here}/captions/{{0..{math.ceil(images / SHARD_SIZE) - 1}}}.tar"
    command += f" --train-num-samples {images} --name pretrain --epochs {pretrain_epochs}"
    command += f" --batch-size 125 --lr 2e-3 --warmup 30 --precision fp32 {train}"
    yield "Pretrain a small CLIP on captions, with open_clip alone", root / pretrained, command

    model = f"--model demo-clip --model-config {here}/demo-clip.json"
    sets = " ".join(f"--eval-data {name}={here}/{source}" for name, source in SETS.items())
    run = f"{here}/logs/flyp"
    command = f"flyp train {model} --pretrained {here}/{pretrained} --train-data {here}/data {sets}"
    command += f" --name flyp --epochs {epochs} --batch-size 100 --lr 1e-3 {train}"
    yield "Fine-tune it with FLYP on one look", root / f"logs/flyp/checkpoints/epoch_{epochs}.pt", command

    yield (
        "Merge with the pretrained weights",
        root / _SWEEP / "frontier.png",
        f"flyp wiseft {run} {cpu} --force",
    )

    for name, checkpoint in (
        ("zero-shot", f"{here}/{pretrained} {model}"),
        ("FLYP", f"{run} --epoch last"),
        ("FLYP + WiSE-FT", run),
    ):
        command = f"flyp eval {checkpoint} --eval-data test={here}/data/test {cpu} --json"
        yield f"Test {name}", _test_result(root, name), command
    command = f"flyp export {run} --format timm --out {here}/classifier"
    yield "Export a classifier for timm", root / "classifier", command


def _test_result(root: Path, name: str) -> Path:
    return root / f"test-{name.replace(' ', '')}.json"


def _run(command: Sequence[str], log: Path, done: Path, lock: int) -> None:
    """Run a step, which keeps `lock` open. Of a training, which says much, the output goes to `log`, epochs to a bar."""
    python = {"flyp": [sys.executable, "-m", "flyp_plugin"], "python": [sys.executable]}[command[0]]
    part = done.with_name(done.name + ".part")
    with subprocess.Popen([*python, *command[1:]], pass_fds=[lock], **_output(command, part)) as process:
        try:
            if process.stdout:
                total = int(command[command.index("--epochs") + 1])
                with log.open("w") as file, tqdm(total=total, disable=None, unit="epoch", leave=False) as bar:
                    for line in process.stdout:
                        file.write(line)
                        bar.update("Start epoch " in line)
            status = process.wait()
        except (KeyboardInterrupt, Terminated) as stop:
            _interrupted(process, stop)
            raise
    if status == 0 and part.exists():
        os.replace(part, done)
    if status or not done.exists():
        part.unlink(missing_ok=True)
        lines = [f"the last lines of {log}:", *log.read_text().splitlines()[-10:]] if process.stdout else []
        raise InputError("\n".join([f"this step ended with status {status}; see above.", *lines]))


def _interrupted(process: subprocess.Popen, stop: BaseException) -> None:
    """End a step, or wait for it where Ctrl-C has reached it too; one that has said so itself is not repeated."""
    if isinstance(stop, Terminated):
        process.terminate()
    try:
        status = process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        process.terminate()
        process.wait()  # which Popen leaves out after Ctrl-C
    else:
        if status in (130, 143) and not process.stdout:
            raise SystemExit(status)


def _output(command: Sequence[str], part: Path) -> dict[str, Any]:
    """Popen's arguments for what a step prints: figures to a file, a training's words to be read, all else as it is."""
    if "--json" in command:
        return {"stdout": part.open("w")}
    if "--epochs" in command:
        return {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    return {}


def _draw(root: Path) -> None:
    """Captioned shards as open_clip reads them, folders of images in classes, names, templates and model."""
    import webdataset as wds

    write_atomically(root / "classnames.txt", "\n".join(NAMES) + "\n")
    write_atomically(root / "templates.txt", "\n".join(TEMPLATES) + "\n")
    write_atomically(root / "demo-clip.json", json.dumps(MODEL, indent=1) + "\n")
    captions, photos = root / "captions", root / "photos.part"
    for folder in (captions, photos):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    digits = _digits()
    # 20 digits follow one another in all looks, so that a shard, and a batch, holds all of both
    pairs = [(number, look) for number in PARTS["captions"] for look in LOOKS.values()]
    for shard in range(math.ceil(len(pairs) / SHARD_SIZE)):
        with wds.TarWriter(str(captions / f"{shard}.tar")) as tar:
            for number, look in pairs[shard * SHARD_SIZE : (shard + 1) * SHARD_SIZE]:
                name, grey = digits[number]
                caption = CAPTIONS[number % len(CAPTIONS)].replace("{c}", name).replace("{look}", look)
                tar.write({"__key__": f"{number}-{look}", "png": _in_look(grey, look), "txt": caption})
    for key, look in LOOKS.items():
        for part in ("train", "val", "test") if key == "id" else ("test",):
            for number in PARTS[part]:
                name, grey = digits[number]
                path = photos / key / part / name / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                _in_look(grey, look).save(path)
    os.replace(photos, root / "photos")


def _digits() -> list[tuple[str, Any]]:
    """(name, grey image of 16 pixels), in scikit-learn's order."""
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits

    data = load_digits()
    images = (Image.fromarray((image * 15.9).astype(np.uint8)).resize((16, 16)) for image in data.images)
    return [(NAMES[label], image) for label, image in zip(data.target, images)]


def _in_look(grey: Any, look: str) -> Any:
    from PIL import ImageFilter, ImageOps

    if look == "outlined":
        grey = grey.filter(ImageFilter.FIND_EDGES)
    ink, paper = look.split(" on ") if " on " in look else ("white", "black")
    return ImageOps.colorize(grey, paper, ink)


def _table(root: Path) -> str:
    """Top-1 of the three models on each set, in percent, with Wilson's 95 % interval."""
    record = json.loads((root / _SWEEP / "wiseft.json").read_text())
    chosen = f"{record['chosen_alpha']:.2f}"
    alphas = {"zero-shot": "0.00", "FLYP": "1.00", "FLYP + WiSE-FT": chosen}
    rows = {}
    for title, alpha in alphas.items():
        test = json.loads(_test_result(root, title).read_text())["results"]["test"]
        rows[title] = {"ID val": record["alphas"][alpha]["val"], "ID test": test}
        rows[title] |= {f"OOD {name}": record["alphas"][alpha][name] for name in list(SETS)[1:]}
    cells = {}
    for title, figures in rows.items():
        of = f", alpha {chosen}" if title == "FLYP + WiSE-FT" else ""
        cells[title + of] = {f"{k}, n={m['n']}": _interval(m["top1"], m["n"]) for k, m in figures.items()}
    return table(cells, "top-1, %, [95 % interval]")


def _interval(p: float, n: int, z: float = 1.96) -> str:
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = ((centre + sign * half) / (1 + z * z / n) for sign in (-1, 1))
    return f"{100 * p:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def _read_back(root: Path) -> str:
    """Top-1 of the exported classifier as timm reads it, on the ID test images."""
    import timm
    import torch
    from timm.data import create_transform, resolve_model_data_config

    from flyp_plugin.data import LabelledDataset
    from flyp_plugin.sources import expand_source

    logging.getLogger("timm").setLevel(logging.WARNING)
    name = f"local-dir:{root}/classifier"
    model = timm.create_model(name, pretrained=True).eval()
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    shards = expand_source(f"{root}/data", "test")
    with torch.inference_mode():
        metrics = evaluate(model, LabelledDataset(shards, transform, 100, num_classes=len(NAMES)))
    return f"timm.create_model({name!r}, pretrained=True) has top-1 {100 * metrics['top1']:.1f} on ID test."
