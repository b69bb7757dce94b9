"""`flyp export --format onnx` on each kind of image tower of open_clip, at its real architecture with random weights.

    python -m tests.bench.onnx_towers [MODEL ...]     a line each: MODEL, the largest difference of logits / largest logit

Logits of onnxruntime and of ImageClassifier on images other than the export's own; text towers have one small layer.
"""

import sys
import tempfile
import time
from copy import deepcopy
from pathlib import Path

import onnxruntime
import open_clip
import torch

from flyp_plugin.errors import InputError
from flyp_plugin.heads import ImageClassifier
from flyp_plugin.onnx_export import write_onnx

MODELS = [
    "ViT-B-32", "ViT-B-32-quickgelu", "RN50", "coca_ViT-B-32", "MobileCLIP-S1", "MobileCLIP2-S0", "EVA02-B-16", "ViTamin-S",
    "ViT-B-16-SigLIP", "ViT-B-32-SigLIP2-256", "convnext_base", "PE-Core-T-16-384", "ViT-S-32-alt",
]  # fmt: skip


def difference(name: str) -> float:
    config = deepcopy(open_clip.get_model_config(name))
    text = {"context_length": 8, "vocab_size": 100, "width": 64, "heads": 1, "layers": 1}
    torch.manual_seed(0)
    own = {"quick_gelu": config.get("quick_gelu", False)}
    if decoder := config.get("multimodal_cfg"):
        decoder |= text | {"layers": 1}
        own["multimodal_cfg"] = decoder
    kind = open_clip.CoCa if decoder else open_clip.CLIP
    model = kind(config["embed_dim"], vision_cfg=config["vision_cfg"], text_cfg=text, **own).eval()
    size = config["vision_cfg"]["image_size"]
    images = dict.fromkeys(("mean", "std"), [0.5] * 3) | {
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    }
    model.visual.preprocess_cfg = {"size": size, **images}
    classifier = ImageClassifier(
        model, torch.randn(config["embed_dim"], 20), list(map(str, range(20)))
    ).eval()
    with tempfile.TemporaryDirectory() as folder:
        path = write_onnx(classifier, name, Path(folder, "it.onnx"))[-1]
        session = onnxruntime.InferenceSession(path)
        size = size if isinstance(size, (tuple, list)) else (size, size)
        batch = torch.rand(2, 3, *size) * 2 - 1
        logits = torch.from_numpy(session.run(None, {"images": batch.numpy()})[0])
    with torch.no_grad():
        expected = classifier(batch)
    assert torch.equal(logits.argmax(1), expected.argmax(1))
    return ((logits - expected).abs().max() / expected.abs().max()).item()


if __name__ == "__main__":
    for name in sys.argv[1:] or MODELS:
        start = time.time()
        try:
            print(name, f"{difference(name):.1e}", f"{time.time() - start:.0f} s", flush=True)
        except (InputError, AssertionError, TypeError) as error:
            print(name, "FAILED", type(error).__name__, error, flush=True)
