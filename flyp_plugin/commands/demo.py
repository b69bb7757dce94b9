"""`flyp demo`: the whole workflow, from images to the frontier plot, offline and on a CPU.

    flyp demo                           # or: python train_flyp.py --demo

A small CLIP is pretrained from random weights on scikit-learn's handwritten digits, white on black and black on white,
with classes such as "three, black on white". It is then fine-tuned with FLYP on digits in white on black alone, and scored
on such images (ID) and on two shifts (OOD). `near` is the same turned a little: fine-tuning helps there too. `far` is
black on white: fine-tuning forgets some of it, and WiSE-FT brings part of that back.

Each step is a command that a user could type, run in this process, so that torch is imported only once. Seeds,
workers and threads are fixed: everyone gets the same table, except for the rounding of another CPU or version of torch.
"""

import argparse
import json
import logging
import os
import shlex
import shutil
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

from flyp_plugin import commands
from flyp_plugin.commands.flags import positive
from flyp_plugin.commands.jobs import claim_folder
from flyp_plugin.errors import InputError
from flyp_plugin.sources import expand_source, write_atomically

NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
WHITE, BLACK, TURNED = "white on black", "black on white", "turned by 15 degrees"
# (folder of shards, which of the 1,797 digits, how they are drawn, their classes); each part has digits of its own
IMAGES = [
    *[("pretrain/train", range(400), look, f"{{}}, {look}") for look in (WHITE, BLACK)],
    *[("pretrain/train", range(400), look, "{}") for look in (WHITE, BLACK)],
    ("data/train", range(400, 900), WHITE, "{}"),
    ("data/val", range(900, 1300), WHITE, "{}"),
    ("data/test", range(1300, 1797), WHITE, "{}"),
    ("near/test", range(1300, 1797), TURNED, "{}"),
    ("far/test", range(1300, 1797), BLACK, "{}"),
]
SETS = {"val": "data/val", "near": "near/test", "far": "far/test"}  # the first is ID and chooses alpha
MODEL = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 16, "layers": 4, "width": 96, "patch_size": 4, "head_width": 24},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 4, "layers": 2},
}
EXAMPLE = """  flyp demo
  python train_flyp.py --demo                   # the same"""
_log = logging.getLogger(__name__)


def add_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--demo-dir", default="flyp-demo", metavar="DIR", help="output folder (default: %(default)s)")
    epochs: dict[str, Any] = {"type": positive, "metavar": "N"}
    add("--pretrain-epochs", default=24, help="of the pretraining (default: %(default)s)", **epochs)
    add("--epochs", default=10, help="of the fine-tuning with FLYP (default: %(default)s)", **epochs)


def run(args: argparse.Namespace) -> None:
    """Run the steps whose results are not in --demo-dir yet, then print the table.

    Raises:
        InputError: --demo-dir holds something else, a package is missing, or a step failed.
    """
    missing = [name for name in ("sklearn", "matplotlib") if find_spec(name) is None]
    if missing:
        raise InputError(f"the demo needs {', '.join(missing)}: pip install 'flyp-plugin[demo]'")
    import torch

    from flyp_plugin.run_folder import folder_lock

    root = Path(args.demo_dir)
    claim_folder(root, {"pretrain_epochs": args.pretrain_epochs, "epochs": args.epochs}, "--demo-dir")
    torch.set_num_threads(1)  # like OMP_NUM_THREADS=1: a sum over several threads rounds differently
    with folder_lock(root):
        _log.info(
            f"One thread (as with OMP_NUM_THREADS=1). Full logs of the trainings: {root}/logs/*/out.log"
        )
        if not (root / "photos").exists():
            _log.info(f"== Draw scikit-learn's digits: {root}/photos")
            _draw(root)
        for title, result, line in _steps(root, args.pretrain_epochs, args.epochs):
            if result.exists():
                _log.info(f"== {title}: {result} already exists")
                continue
            _log.info(f"== {title}\n   {line}")
            _run(shlex.split(line)[1:])
            if not result.exists():
                raise InputError(f"this step did not write {result}; its log may say why.")
        _log.info(f"== Done\n{_table(root)}\n\n{_score_with_timm(root)}")
    _log.info(f"The plot is {root}/logs/flyp/wiseft/frontier.png, all numbers are in wiseft.json beside it.")


def _steps(root: Path, pretrain_epochs: int, epochs: int) -> Iterator[tuple[str, Path, str]]:
    """(title, path that exists once the step is done, command line) of each step."""
    here = shlex.quote(str(root))
    run = f"{here}/logs/flyp"
    for folder in dict.fromkeys(folder for folder, *_ in IMAGES):
        line = f"flyp shards write {here}/photos/{folder} {here}/{folder} --templates 'a handwritten {{c}}.'"
        yield f"Write shards: {folder}", root / folder, line

    cpu = "--device cpu --workers 1"
    train = f"flyp train --model demo-clip --model-config {here}/demo-clip.json --logs {here}/logs {cpu}"
    train += " --resume latest --delete-previous-checkpoint"
    pretrained = f"logs/pretrain/checkpoints/epoch_{pretrain_epochs}.pt"
    line = f"{train} --name pretrain --train-data {here}/pretrain --eval-data val={here}/data/val"
    line += f" --epochs {pretrain_epochs} --batch-size 75 --lr 2e-3 --warmup 30 --beta2 0.98"
    yield "Pretrain a small CLIP from random weights", root / pretrained, line

    line = f"{train} --name flyp --pretrained {here}/{pretrained} --train-data {here}/data"
    line += "".join(f" --eval-data {name}={here}/{folder}" for name, folder in SETS.items())
    line += f" --epochs {epochs} --batch-size 100 --lr 1e-3"
    finetuned = root / f"logs/flyp/checkpoints/epoch_{epochs}.pt"
    yield f"Fine-tune it with FLYP on {WHITE}", finetuned, line

    line = f"flyp wiseft {run} {cpu} --per-set --force"
    yield "Merge it with the pretrained weights", root / "logs/flyp/wiseft/frontier.png", line
    models = {"zero-shot": f"{here}/logs/pretrain", "FLYP": f"{run} --epoch last", "WiSE-FT": run}
    for name, model in models.items():
        line = f"flyp eval {model} --eval-data test={here}/data/test {cpu} --json > {here}/test-{name}.json"
        yield f"Test {name}", root / f"test-{name}.json", line
    line = f"flyp export {run} --format timm --out {here}/classifier"
    yield "Export a classifier for timm", root / "classifier", line


def _run(argv: list[str]) -> None:
    """Run `flyp ARGV...`; a last argument `> FILE` means what it does in a shell."""
    if argv[0] == "train":
        terminal, monitor = logging.root.handlers, logging.getLogger("flyp_plugin.monitor")
        logging.root.handlers, monitor.handlers = [], terminal  # show only the table of each epoch
        try:
            with redirect_stderr(StringIO()):  # where the handlers that a training adds write
                commands.call(argv)
        finally:
            logging.root.handlers, monitor.handlers = terminal, []
    elif argv[-2] == ">":
        with redirect_stdout(StringIO()) as output:
            commands.call(argv[:-2])
        write_atomically(Path(argv[-1]), output.getvalue())
    else:
        commands.call(argv)


def _draw(root: Path) -> None:
    """Write the model's configuration, and the images in one folder per class."""
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits

    write_atomically(root / "demo-clip.json", json.dumps(MODEL, indent=1) + "\n")
    photos = root / "photos.part"
    shutil.rmtree(photos, ignore_errors=True)
    digits = load_digits()
    for folder, numbers, look, classname in IMAGES:
        for number in numbers:
            ink = (digits.images[number] * 15.9).astype(np.uint8)
            image = Image.fromarray(255 - ink if look == BLACK else ink).resize((16, 16))
            if look == TURNED:
                image = image.rotate(15, resample=Image.Resampling.BILINEAR)
            path = photos / folder / classname.format(NAMES[digits.target[number]]) / f"{look}-{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
    os.replace(photos, root / "photos")


def _table(root: Path) -> str:
    """Top-1 of the three models on each set, in percent, with Wilson's 95 % interval."""
    from scipy.stats import binomtest

    from flyp_plugin.metrics import table

    def cell(top1: float, n: int, **_: Any) -> str:
        interval = binomtest(round(top1 * n), n).proportion_ci(method="wilson")
        return f"{100 * top1:.1f} [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"

    sweep = json.loads((root / "logs/flyp/wiseft/wiseft.json").read_text())
    chosen = f"{sweep['chosen_alpha']:.2f}"
    rows = {}
    for name, alpha in {"zero-shot": "0.00", "FLYP": "1.00", "WiSE-FT": chosen}.items():
        val, near, far = (sweep["alphas"][alpha][key] for key in SETS)
        test = json.loads((root / f"test-{name}.json").read_text())["results"]["test"]
        sets = {"ID val": val, "ID test": test, "OOD near": near, "OOD far": far}
        title = f"FLYP + WiSE-FT, alpha {chosen}" if name == "WiSE-FT" else name
        rows[title] = {f"{key}, n={metrics['n']}": cell(**metrics) for key, metrics in sets.items()}
    return table(rows, "top-1, %, [95 % interval]")


def _score_with_timm(root: Path) -> str:
    """Top-1 of the exported classifier as timm loads it, on the ID test images."""
    import timm
    from timm.data import create_transform, resolve_model_data_config

    from flyp_plugin.data import LabelledDataset
    from flyp_plugin.metrics import evaluate

    logging.getLogger("timm").setLevel(logging.WARNING)
    name = f"local-dir:{root}/classifier"
    model = timm.create_model(name, pretrained=True)
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    dataset = LabelledDataset(expand_source(f"{root}/data", "test"), transform, 100, num_classes=len(NAMES))
    top1 = evaluate(model, dataset)["top1"]  # in eval mode, without gradients
    return f"timm.create_model({name!r}, pretrained=True) has top-1 {100 * top1:.1f} on ID test."
