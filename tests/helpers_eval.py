"""Digits as CLIP_benchmark shards, small CLIPs trained on them for a while, and a disk that is full."""

import atexit
import io
import json
import resource
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
import open_clip
import torch
from PIL import Image
from sklearn.datasets import load_digits

from flyp_plugin.commands import call
from tests import tars
from tests.tars import NAMES

TEMPLATES = ["a photo of the number {c}.", "{c}"]
VISION = {"image_size": 32, "layers": 3, "width": 64, "patch_size": 8, "head_width": 16}
TEXT = {"context_length": 32, "vocab_size": 49408, "width": 64, "heads": 4, "layers": 2}
TIMM_VISION = {"timm_model_name": "test_vit", "timm_pool": "", "timm_proj": "linear", "image_size": 160}
CONFIGS = {
    "tiny-digits": {"embed_dim": 48, "vision_cfg": VISION, "text_cfg": TEXT},
    "tiny-digits-quickgelu": {"embed_dim": 48, "quick_gelu": True, "vision_cfg": VISION, "text_cfg": TEXT},
    "tiny-digits-timm": {"embed_dim": 48, "vision_cfg": TIMM_VISION, "text_cfg": TEXT},
    "tiny-digits-resnet": {
        "embed_dim": 48,
        "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16, "patch_size": None},
        "text_cfg": TEXT,
    },
    "tiny-digits-wide": {"embed_dim": 48, "vision_cfg": {**VISION, "width": 80}, "text_cfg": TEXT},
}
torch.set_num_threads(1)  # the models are too small for more


@cache
def root() -> Path:
    """A folder for the test run: models/ (configurations), data/ (ID) and ood/ (5 of the classes, noisy)."""
    folder = Path(tempfile.mkdtemp(prefix="flyp-eval-"))
    atexit.register(shutil.rmtree, folder)
    (folder / "models").mkdir()
    for name, config in CONFIGS.items():
        (folder / "models" / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / "models")
    images, labels = digits()
    write_set(
        folder / "data", images[1000:1203], labels[1000:1203], NAMES
    )  # 203: of no batch size here a multiple
    rng = np.random.default_rng(0)
    odd = np.flatnonzero(labels[1300:] % 2)[:97] + 1300
    noise = rng.normal(0, 60, (len(odd), 40, 33, 3))
    noisy = [
        Image.fromarray(np.clip(np.array(images[i]) + n, 0, 255).astype("uint8")) for i, n in zip(odd, noise)
    ]
    write_set(folder / "ood", noisy, labels[odd] // 2, NAMES[1::2])
    return folder


def digits() -> tuple[list[Image.Image], np.ndarray]:
    data = load_digits()
    images = [
        Image.fromarray((image * 15.9).astype("uint8")).convert("RGB").resize((33, 40))
        for image in data.images
    ]
    return images, data.target


def write_set(
    folder: Path, images, labels, names, templates=TEMPLATES, shards: int = 2, ending: str = "png"
) -> None:
    (folder / "test").mkdir(parents=True)
    (folder / "classnames.txt").write_text("\n".join(names) + "\n")
    (folder / "zeroshot_classification_templates.txt").write_text("\n".join(templates) + "\n")
    (folder / "test" / "nshards.txt").write_text(f"{shards}\n")
    for shard in range(shards):
        members = {}
        for i in range(shard, len(images), shards):
            buffer = io.BytesIO()
            images[i].save(buffer, format={"jpg": "jpeg"}.get(ending, ending))
            group = ["left", "right", "seldom"][0 if i % 2 else 2 if i % 50 == 0 else 1]
            members[f"{i:06d}.{ending}"] = buffer.getvalue()
            members[f"{i:06d}.cls"] = str(labels[i]).encode()
            members[f"{i:06d}.hand"] = group.encode()
            members[f"{i:06d}.path"] = f"{names[labels[i]]}/{i}.png".encode()
        tars.write(folder / "test" / f"{shard}.tar", members)


@cache
def checkpoint(name: str, steps: int) -> Path:
    """`name` trained for some steps on digits, saved as open_clip's training script saves it."""
    root()
    torch.manual_seed(0)
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    tokens = open_clip.get_tokenizer(name)([TEMPLATES[0].replace("{c}", digit) for digit in NAMES])
    images, labels = digits()
    n = 1000 if steps > 5 else 64
    batch, target = torch.stack([preprocess(image) for image in images[:n]]), torch.tensor(labels[:n])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    order = torch.Generator().manual_seed(0)
    for _ in range(steps):
        some = torch.randint(n, (64,), generator=order)
        image_features, text_features, scale = model(batch[some], tokens)[:3]
        loss = torch.nn.functional.cross_entropy(scale * image_features @ text_features.T, target[some])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    path = root() / f"{name}-{steps}.pt"
    torch.save(
        {"epoch": 1, "name": "run", "state_dict": model.state_dict(), "optimizer": optimizer.state_dict()},
        path,
    )
    return path


def flyp(*argv: object) -> None:
    """`flyp ...` in this process; mistakes are InputError."""
    root()
    call([str(arg) for arg in argv])


@contextmanager
def no_larger_files(size: int) -> Iterator[None]:
    """Writing past `size` bytes of a file fails, as on a full disk: "File too large"."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
