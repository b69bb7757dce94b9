"""Scikit-learn's handwritten digits as class-labelled shards, and a CLIP small enough to learn them on a CPU.

    python -m tests.digits DIR [PIXELS]

writes DIR/train (1,000 images), DIR/test (797), their class names and templates, and DIR/digits-vit.json, a model
configuration for open_clip: a ViT of three layers at 16 pixels with a text tower of two. With PIXELS the images are
JPEGs of that size.
"""

import json
import sys
import tempfile
from pathlib import Path

from PIL import Image
from sklearn.datasets import load_digits

from flyp_plugin import shards
from tests.tars import NAMES

TEMPLATES = ["a photo of the number {c}.", "the digit {c}.", "a handwritten {c}."]
MODEL = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 16, "layers": 3, "width": 64, "patch_size": 4, "head_width": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 4, "layers": 2},
}


def write(root: Path, pixels: int = 16) -> Path:
    """Write it all; every image once, in the order of scikit-learn: the first 1,000 train."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "classnames.txt").write_text("\n".join(NAMES) + "\n")
    (root / "zeroshot_classification_templates.txt").write_text("\n".join(TEMPLATES) + "\n")
    (root / "digits-vit.json").write_text(json.dumps(MODEL, indent=1))
    with tempfile.TemporaryDirectory() as folder:
        photos(Path(folder), pixels)
        for split in ("train", "test"):
            shards.write(str(Path(folder, split)), str(root / split), shard_size=125)
    return root


def photos(root: Path, pixels: int = 16) -> Path:
    """The images alone, in root/SPLIT/CLASS."""
    data = load_digits()
    for i, (image, label) in enumerate(zip(data.images, data.target)):
        name = f"{i}.{'png' if pixels == 16 else 'jpg'}"
        path = root / ("train" if i < 1000 else "test") / NAMES[label] / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image * 15.9).astype("uint8")).resize((pixels, pixels)).save(path)
    return root


if __name__ == "__main__":
    write(Path(sys.argv[1]), *map(int, sys.argv[2:]))
