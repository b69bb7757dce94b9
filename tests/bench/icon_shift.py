"""Fine-tuning a broadly pretrained CLIP under a real shift, by FLYP and by what it is compared with: icons of many sets.

    npm pack @iconify/json && tar xzf iconify-json-*.tgz && pip install resvg-py      # for package/ see icons.py
    python tests/bench/icon_shift.py data --icons package     # 2 minutes; all is in ~/.cache/flyp-icons
    python tests/bench/icon_shift.py pretrain                 # 8 epochs: 70 minutes on two busy cores
    python tests/bench/icon_shift.py compare main             # an hour with --seeds 0:3, on the same cores
    python tests/bench/icon_shift.py compare                  # and the further questions (QUESTIONS)

On another machine, and with another model (tests/gpu/icons.py does that): `pack` writes what of package/ is needed as one
file, which `data --icons` takes as well; `data --model-config` draws the icons at that model's image size; further flags
of `pretrain` go to open_clip's script, those of `compare` to `flyp compare`.

Each goes on where it was interrupted and skips what is finished; `compare main --seeds 0:1` can be given more seeds later.
The families of sets (icon_looks.py) are split in half. The drawings of one half, one of each name and style in a set, with
their names as captions pretrain a small CLIP, by open_clip's own script. On the other half, names that many sets draw
both as outline and filled are the classes: all methods are trained on outlines, chosen on others (val), and scored on
others still (id) and on filled, pixel, emoji and colour icons (OOD). No two of these images are equal, nor is one to an image
of pretraining. The seed of the split was chosen by the number of classes and images alone: the OOD sets are large. By
that split pretraining sees no pixel set, and emoji of one family.
"""

import argparse
import json
import lzma
import random
import shlex
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from functools import partial
from hashlib import md5
from itertools import product
from multiprocessing import Pool
from pathlib import Path
from typing import Any

import torch
import webdataset
from icon_looks import LOOKS, Drawing, drawings, families, png

from flyp_plugin import shards
from flyp_plugin.checkpoints import atomic_write
from flyp_plugin.commands.plots import differences, figure, percent

SEED, SHARDS = 67, 32
CAPTIONS = ["{name}", "{base}", "{base} icon", "a picture of {base}"]
TEMPLATES = ["{c}", "{c} icon", "a picture of {c}"]
LEAST = {"outline": 12, "filled": 10}  # sets of the unseen families that draw a class so, by default
TRAIN_MOST, FILLED_MOST = 16, 7  # images of a class; so `main` is 16 shots
METHODS = ["--methods", "flyp,ce,lp,lp-ft"]
ANCHORED = "flyp,ce,lp,lp-ft,flyp-anchor,flyp-trajectory"
QUESTIONS = {  # what `flyp compare` is given for each; other rates where methods chose the ends of TUNED
    "main": METHODS,
    "anchored": ["--methods", ANCHORED, "--tune", "anchor=1,10", "--model-stock"],
    # at a rate that seed 0 did not choose
    "anchored-1e-3": shlex.split("--methods flyp-anchor --lr 1e-3 --seeds 1:5"),
    "shots4": [*METHODS, "--shots", "4", "--lr", "1e-5,3e-5,1e-4,3e-4", "--lp-c", "1,10,100,1000"],
    "template": ["--methods", "flyp", "--templates", TEMPLATES[-1]],  # against all of them in main
    "mask": ["--methods", "flyp", "--collisions", "mask", "--lr", "1e-4,3e-4,1e-3"],
    "soft": ["--methods", "flyp", "--collisions", "soft"],
    "ce-weight": ["--methods", "flyp", "--ce-weight", "1"],
    "flyp-ce": ["--methods", "flyp-ce"],
    "locktext": shlex.split("--methods flyp --lock-text --lock-text-freeze-layer-norm --lr 1e-3"),
    "batch32": ["--methods", "flyp,ce", "--batch-size", "32"],
    "batch512": ["--methods", "flyp,ce", "--batch-size", "512"],
    "scale7": ["--methods", "flyp,flyp-anchor"],
    "scale50": ["--methods", "flyp"],
}
SCALES = {
    "scale7": 7.0,
    "scale50": 50.0,
}  # logit_scale.exp() at the start of these, in place of what was learned
# for `python -c`: open_clip's own training of a model configuration (the first argument) that open_clip does not have
PLAIN_MAIN = (
    "import open_clip, sys; open_clip.add_model_config(sys.argv.pop(1)); "
    "from open_clip_train.main import main; main(sys.argv[1:])"
)
NO_FLASH = "torch.backends.cuda.enable_flash_sdp(False)"  # of CPUs, too: a step takes 1.15 s in place of 2.0
PRETRAIN = """--model icon-clip --dataset-type webdataset --batch-size 512 --lr 1e-3 --warmup 100 --wd 0.1
    --precision amp_bf16 --workers 1 --log-every-n-steps 10"""
TUNED = "--lr 3e-4,1e-3,3e-3 --lp-c 1,10,100"
FINETUNE = "--model icon-clip --epochs 10 --batch-size 128 --precision amp_bf16 --workers 1"
MODEL = {
    "embed_dim": 192,
    "vision_cfg": {"image_size": 40, "layers": 6, "width": 192, "patch_size": 8, "head_width": 48},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 128, "heads": 4, "layers": 3},
}


def select(package: Path, least: Sequence[int]) -> tuple[list[Drawing], list[Drawing]]:
    """Of the seen families a drawing of each name and style in each set; of the others those of the classes."""
    collections = json.loads((package / "collections.json").read_text())
    groups = families(collections)
    random.Random(SEED).shuffle(groups)
    unseen = {name for group in groups[: len(groups) // 2] for name in group}
    found = list(drawings(str(package), collections))
    random.Random(SEED).shuffle(found)
    captioned = {
        (drawing.set, drawing.base, drawing.style): drawing for drawing in found if drawing.set not in unseen
    }
    found = [drawing for drawing in found if drawing.set in unseen]
    in_sets: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for drawing in found:
        in_sets[drawing.base][drawing.look].add(drawing.set)
    classes = {
        base
        for base, kinds in in_sets.items()
        if all(len(kinds[kind]) >= number for kind, number in zip(LEAST, least)) and len(base) > 1
    }
    labelled = [drawing for drawing in found if drawing.base in classes and drawing.look in LOOKS]
    return list(captioned.values()), labelled


def pack(package: Path, least: Sequence[int], path: Path) -> None:
    """What select finds, in one file: 30 MB of the 104 MB that npm downloads."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as part, lzma.open(part, "wt") as file:
        json.dump(select(package, least), file)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


def unpack(path: Path) -> tuple[list[Drawing], ...]:
    with lzma.open(path, "rt") as file:
        return tuple([Drawing(*row) for row in part] for part in json.load(file))


def write_data(
    icons: Path, least: Sequence[int], cache: Path, model: dict[str, Any], processes: int
) -> dict[str, int]:
    """The captions of the seen families; then the labelled sets of the others. Each only if it is not there.

    Returns the number of classes, and of images in each.
    """
    captioned, labelled = unpack(icons) if icons.is_file() else select(icons, least)
    cache.mkdir(parents=True, exist_ok=True)
    (cache / "icon-clip.json").write_text(json.dumps(model, indent=1))
    draw = partial(png, pixels=model["vision_cfg"]["image_size"])
    with Pool(processes) as pool:
        drawn, labelled_drawn = (
            pool.imap(draw, [drawing.svg for drawing in part], 256) for part in (captioned, labelled)
        )
        seen = write_captions(captioned, drawn, cache)
        return {"captions": about(cache)["images"], **write_sets(labelled, labelled_drawn, seen, cache)}


def about(cache: Path) -> dict[str, Any]:
    """What the captioned icons are."""
    return json.loads((cache / "captions/about.json").read_text())


def write_captions(chosen: list[Drawing], drawn: Iterable[bytes | None], cache: Path) -> set[bytes]:
    """The icons with captions, as shards for open_clip; and digests of the images."""
    pairs = [(drawing, image) for drawing, image in zip(chosen, drawn) if image]
    captions, part = cache / "captions", cache / "captions.part"
    if not captions.exists():
        part.mkdir(parents=True)
        choice = random.Random(SEED).choice
        for shard in range(SHARDS):
            with webdataset.TarWriter(str(part / f"{shard}.tar"), mtime=0) as tar:
                for number in range(shard, len(pairs), SHARDS):
                    drawing, image = pairs[number]
                    text = choice(CAPTIONS).format(name=drawing.name, base=drawing.base)
                    tar.write({"__key__": f"{number:06d}", "png": image, "txt": text})
        kinds = Counter(drawing.look for drawing, _ in pairs)
        sets = sorted({drawing.set for drawing, _ in pairs})
        (part / "about.json").write_text(json.dumps({"images": len(pairs), "kinds": kinds, "sets": sets}))
        part.rename(captions)
    return {md5(image).digest() for _, image in pairs}


def write_sets(
    wanted: list[Drawing], drawn: Iterable[bytes | None], seen: set[bytes], cache: Path
) -> dict[str, int]:
    """Of each class: outlines as train, val and test; filled ones; all others. No image is there twice, or in `seen`."""
    classes = sorted({drawing.base for drawing in wanted})
    digests, taken, numbers = set(seen), set(), {"classes": len(classes)}
    parts: dict[tuple[str, str], list[bytes]] = defaultdict(list)
    for drawing, image in zip(wanted, drawn):
        once = (drawing.set, drawing.base, drawing.look)  # of the looks that are plenty: one of a set
        if not image or md5(image).digest() in digests or (drawing.look in LEAST and once in taken):
            continue
        digests.add(md5(image).digest())
        taken.add(once)
        parts[drawing.base, drawing.look].append(image)
    with tempfile.TemporaryDirectory() as photos:
        for (base, kind), images in parts.items():
            fourth = len(images) // 4
            cut = {f"{kind}/test": images[:FILLED_MOST] if kind == "filled" else images}
            if kind == "outline":
                cut = {"id/test": images[:fourth], "id/val": images[fourth : 2 * fourth]}
                cut["id/train"] = images[2 * fourth :][:TRAIN_MOST]
            for split, some in cut.items():
                folder = Path(photos, split, base)
                folder.mkdir(parents=True)
                for number, image in enumerate(some):
                    (folder / f"{number}.png").write_bytes(image)
        texts = {"classnames": f"{photos}/classnames.txt", "templates": f"{photos}/templates.txt"}
        Path(texts["classnames"]).write_text("\n".join(classes) + "\n")
        Path(texts["templates"]).write_text("\n".join(TEMPLATES) + "\n")
        for folder in sorted(Path(photos).glob("*/*")):
            split = folder.relative_to(photos)
            if not (cache / split).exists():
                shards.write(str(folder), str(cache / split), **texts)
            numbers[str(split)] = sum(1 for _ in folder.glob("*/*.png"))
            print(f"{split}: {numbers[str(split)]} images", flush=True)
    if not (cache / "few/val").exists():
        shards.subset(f"{cache}/id/val", f"{cache}/few/val", shots=4)  # to choose by, with 4 shots
    print(f"{len(classes)} classes; {about(cache)}")
    return numbers


def pretrain(cache: Path, epochs: int, device: str, more: list[str]) -> None:
    """By open_clip's own script, unchanged; it goes on from the newest epoch."""
    main = f"import torch; {NO_FLASH}; {PLAIN_MAIN}" if device == "cpu" else PLAIN_MAIN
    command = [sys.executable, "-c", main, str(cache / "icon-clip.json"), *shlex.split(PRETRAIN)]
    command += ["--train-num-samples", str(about(cache)["images"])]
    command += ["--train-data", f"{cache}/captions/{{0..{SHARDS - 1}}}.tar", "--epochs", str(epochs)]
    command += ["--logs", f"{cache}/logs", "--name", f"pretrain{epochs}", "--resume", "latest"]
    command += ["--device", device, *more]  # of a flag the last counts
    if not checkpoint(cache, epochs).exists():
        subprocess.run(command, check=True)


def checkpoint(cache: Path, epochs: int) -> Path:
    return cache / f"logs/pretrain{epochs}/checkpoints/epoch_{epochs}.pt"


def at_temperature(pretrained: Path, scale: float) -> Path:
    """The same weights with another logit_scale.exp(), beside them. Zero-shot accuracy does not depend on it."""
    weights = torch.load(pretrained, map_location="cpu", weights_only=True)["state_dict"]
    print(f"{pretrained} has a scale of {weights['logit_scale'].exp():.1f}; here {scale:g}.")
    path = pretrained.with_name(f"{pretrained.stem}_scale{scale:g}.pt")
    torch.save(weights | {"logit_scale": torch.tensor(scale).log()}, path)
    return path


def compare(question: str, cache: Path, out: Path, args: argparse.Namespace, more: list[str]) -> None:
    """`flyp compare`, which does what is not done yet."""
    sets = {"val": "few/val" if question == "shots4" else "id/val", "id": "id"}
    sets |= {look: look for look in LOOKS if look != "outline"}
    command = ["--model-config", f"{cache}/icon-clip.json", "--train-data", f"{cache}/id"]
    pretrained = args.pretrained or checkpoint(cache, args.pretrain_epochs)
    if question in SCALES:
        pretrained = at_temperature(pretrained, SCALES[question])
    command += ["--pretrained", str(pretrained)]
    for name, source in sets.items():
        command += ["--eval-data", f"{name}={cache}/{source}"]
    command += ["--id-test", "id", "--seeds", args.seeds]
    command += ["--devices" if "," in args.device else "--device", args.device]
    command += [
        *shlex.split(TUNED),
        *shlex.split(FINETUNE),
        *QUESTIONS[question],
    ]  # of a flag the last counts
    command = ["compare", *command, *more, "--out", str(out)]
    print(f"== {question}\nflyp {shlex.join(command)}", flush=True)
    subprocess.run([sys.executable, "-m", "flyp_plugin", *command], check=True)


def summary(results: Path) -> None:
    """The further questions less FLYP on all images in `main`, and the anchored ones less FLYP and LP-FT in `anchored`."""
    found = {
        path.parent.name: json.loads(path.read_text()) for path in sorted(results.glob("*/compare.json"))
    }
    anchored = [name for name in found if name.startswith("anchored")]
    print_less(found, "main", "flyp", "rows", [name for name in found if name not in ("main", *anchored)])
    for method, metric in product(("flyp", "lp-ft"), ("rows", "ece")):
        print_less(found, "anchored", method, metric, anchored)


def print_less(found: dict[str, Any], base: str, method: str, metric: str, questions: Iterable[str]) -> None:
    """Rows of questions less those of one method, paired by the seeds that both have."""
    one = found.get(base)
    if not (one and method in one["methods"]):
        return
    table = one["blocks"][0][metric]
    sets = list(table[method])
    print(
        f"\nLess {base}'s {method} ({metric}), and with WiSE-FT less the same with it:\n| | {' | '.join(sets)} |"
    )
    print("|---" * (len(sets) + 1) + "|")
    for question in questions:
        record = found[question]
        seeds = [seed for seed in one["seeds"] if seed in record["seeds"]]
        baseline = at_seeds({name: table[name] for name in (method, f"{method} + WiSE-FT")}, one, seeds)
        for block in record["blocks"] if seeds else ():
            rows = {
                ", ".join(filter(None, (question, block["title"], name))): row
                for name, row in at_seeds(block[metric], record, seeds).items()
                if question != base or name not in baseline
            }
            for name, row in differences({**baseline, **rows}, [method]).items():
                print(f"| {name} | {' | '.join(percent(cell, '+') for cell in row.values())} |")


def at_seeds(table: dict[str, Any], record: dict[str, Any], seeds: Iterable[int]) -> dict[str, Any]:
    """The rows that have a figure for each seed, of some seeds alone."""
    which = [record["seeds"].index(seed) for seed in seeds]
    return {
        name: {column: figure([cell["by_seed"][i] for i in which]) for column, cell in row.items()}
        for name, row in table.items()
        if name != "zero-shot" and not name.endswith(" + Model Stock")
    }


def main() -> None:
    style = {"description": __doc__, "formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(**style)
    steps = parser.add_subparsers(dest="step", required=True)
    one_file = steps.add_parser("pack", help="write what of the package is used as one file")
    one_file.add_argument("path", type=Path, metavar="FILE", help="such as icons.json.xz")
    data = steps.add_parser("data", help="draw the icons, write captioned and labelled shards")
    data.add_argument("--model-config", type=Path, metavar="FILE", help="(default: a ViT at 40 pixels)")
    data.add_argument("--processes", type=int, default=2, metavar="N", help="(default: %(default)s)")
    for step in (one_file, data):
        text = "the unpacked npm package, or for data what pack has made of it"
        step.add_argument("--icons", type=Path, required=True, metavar="PATH", help=text)
        text = "sets that draw a class as outline and filled (default: %(default)s)"
        step.add_argument("--least", type=int, nargs=2, default=list(LEAST.values()), metavar="N", help=text)
    text = "a CLIP on the captions, by open_clip's own script; further flags go to it"
    one = steps.add_parser("pretrain", help=text, allow_abbrev=False)
    many = steps.add_parser("compare", help="flyp compare; further flags go to it", allow_abbrev=False)
    text = f"of {', '.join(QUESTIONS)}; all, if none is named"
    many.add_argument("questions", nargs="*", default=list(QUESTIONS), help=text)
    many.add_argument("--pretrained", type=Path, metavar="PATH", help="other weights than pretrain's")
    many.add_argument("--results", type=Path, metavar="FOLDER", help="(default: compareN in --out)")
    many.add_argument("--seeds", default="0:5", help="(default: %(default)s)")
    for step in (data, one, many):
        step.add_argument(
            "--out", type=Path, default=Path("~/.cache/flyp-icons"), help="(default: %(default)s)"
        )
    for step in (one, many):
        step.add_argument(
            "--pretrain-epochs", type=int, default=8, metavar="N", help="(default: %(default)s)"
        )
        step.add_argument("--device", default="cpu", help="of compare also several: A,B,... (default: cpu)")
    args, more = parser.parse_known_args()
    if more and args.step in ("pack", "data"):
        parser.error(f"unknown: {shlex.join(more)}")
    if args.step == "pack":
        return pack(args.icons, args.least, args.path)
    cache = args.out.expanduser()
    if args.step == "data":
        model = json.loads(args.model_config.read_text()) if args.model_config else MODEL
        write_data(args.icons, args.least, cache, model, args.processes)
    elif args.step == "pretrain":
        pretrain(cache, args.pretrain_epochs, args.device, more)
    else:
        results = args.results or cache / f"compare{args.pretrain_epochs}"
        for question in args.questions:
            compare(question, cache, results / question, args, more)
        summary(results)


if __name__ == "__main__":
    main()
