"""An image classifier as one ONNX file, for `flyp export --format onnx`.

    images  float32 (batch, 3, H, W), preprocessed  ->  logits  float32 (batch, classes), any batch size

Softmax of the logits gives the classifier's probabilities. The file's metadata, JSON strings, say how to preprocess:
classnames, mean, std, size ([height, width]), interpolation, resize_mode; model, flyp_plugin and open_clip are plain text.
torch's exporter may mistranslate an operator silently, so every file is compared with the classifier it came from.
"""

import json
import logging
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor, nn

import flyp_plugin
from flyp_plugin.checkpoints import refuse_existing
from flyp_plugin.errors import InputError
from flyp_plugin.heads import ImageClassifier
from flyp_plugin.model_spec import PREPROCESSING, quiet

MAX_BYTES = 2**31 - 2**24  # of a protobuf message: 2 GiB, less room for the graph and the metadata
_SHARE = 1e-4  # rounding of a deep tower, as a share of the largest logit


class _Graph(nn.Module):
    """The classifier without what torch.export cannot trace (autocast, TF32); the factor is part of the weight (D, C)."""

    def __init__(self, classifier: ImageClassifier):
        super().__init__()
        self.model = classifier.model
        self.register_buffer("weight", self.model.logit_scale.exp().float() * classifier.head.float())

    def forward(self, images: Tensor) -> Tensor:
        return self.model.encode_image(images, normalize=True) @ self.weight


def check_onnx_output(out: str, force: bool) -> None:
    """InputError if packages are missing, or if `out` is a folder, exists without `force`, or is no ONNX file."""
    if [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]:
        raise InputError(
            "--format onnx needs onnx, onnxscript and onnxruntime: pip install 'flyp-plugin[onnx]'."
        )
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 6):
        raise InputError(
            f"--format onnx needs torch 2.6 or newer, and this is {torch.__version__}; update torch."
        )
    path = Path(out)
    if path.is_dir() or out.endswith("/"):
        raise InputError(f"--format onnx writes a file, and {out} is a folder; pass e.g. --out birds.onnx.")
    refuse_existing(path, force)
    if path.exists() and not _is_onnx(path):
        why = "it is not an ONNX file"
        raise InputError(f"refusing to overwrite {path}, even with --force: {why}; choose another path.")


def weights_beside(path: Path) -> Path | None:
    """PATH.data if the ONNX file at `path` keeps weights there, else None."""
    import onnx
    from onnx.external_data_helper import ExternalDataInfo, uses_external_data

    data = path.with_name(f"{path.name}.data")
    if not (path.exists() and data.exists()):
        return None
    weights = onnx.load_model(path, load_external_data=False).graph.initializer
    places = {ExternalDataInfo(tensor).location for tensor in weights if uses_external_data(tensor)}
    return data if data.name in places else None


def _is_onnx(path: Path) -> bool:
    import onnx
    from google.protobuf.message import DecodeError

    try:
        content = onnx.load_model(path, format="protobuf", load_external_data=False)
    except DecodeError:
        return False
    return bool(content.ir_version and content.graph.output)  # an empty file is a valid message


@torch.no_grad()
def write_onnx(classifier: ImageClassifier, name: str, path: Path) -> list[Path]:
    """Write the classifier and check the file; weights of more than MAX_BYTES go into a second file, PATH.data.

    Args:
        classifier: in full precision, on the CPU, in eval mode.
        name: of the model, for the metadata.
        path: of a file that does not exist, in a folder that does.

    Returns:
        The files written, the ONNX file last.

    Raises:
        InputError: torch cannot export the image tower, or onnxruntime computes other or non-finite logits.
    """
    import onnx_ir

    config: Any = classifier.model.visual.preprocess_cfg
    size = config["size"]
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    images = torch.randn(8, 3, height, width, generator=torch.Generator().manual_seed(0))
    expected = classifier(images)
    if not expected.isfinite().all():
        raise InputError("the model's logits are NaN or inf: its training diverged; use other weights.")
    with quiet(logging.ERROR), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            program: Any = torch.onnx.export(
                _Graph(classifier).eval(),
                (images[:2],),
                dynamo=True,
                verbose=False,
                input_names=["images"],
                output_names=["logits"],
                dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
            )
        except torch.onnx.OnnxExporterError as error:
            reason = str(error.__cause__ or error).strip().splitlines()[0][:200]
            raise _unsupported(classifier, reason) from error
    told = {key: config[key] for key in PREPROCESSING} | {"size": [height, width]}
    told["classnames"] = classifier.classnames
    if told["interpolation"] == "random":  # in training; open_clip's evaluation then takes bicubic
        told["interpolation"] = "bicubic"
    program.model.metadata_props.update({key: json.dumps(value) for key, value in told.items()})
    versions = {module.__name__: module.__version__ for module in (flyp_plugin, open_clip)}
    program.model.metadata_props.update({"model": name, **versions})
    weights = program.model.graph.initializers.values()
    large = sum(value.const_value.nbytes for value in weights if value.const_value is not None) > MAX_BYTES
    data = path.with_name(f"{path.name}.data")
    onnx_ir.save(program.model, path, external_data=data.name if large else None)
    _check_equal(classifier, images, expected, path)
    return [data, path] if large else [path]


def _check_equal(classifier: ImageClassifier, images: Tensor, expected: Tensor, path: Path) -> None:
    """InputError if the file is not valid, or if its logits are not the classifier's to rounding or predict another class.

    The images are noise, in batches of 1 and of the rest. Both limits are _SHARE of the largest logit: another class may
    be predicted only if the classifier's own logit for it is nearer to its best than that, which makes them a tie.
    """
    import onnx
    import onnxruntime
    from onnxruntime.capi import onnxruntime_pybind11_state as ort

    failures = (ort.Fail, ort.InvalidGraph, ort.NotImplemented, ort.RuntimeException)
    try:
        onnx.checker.check_model(str(path))
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        batches = [
            session.run(["logits"], {"images": part.numpy()})[0]
            for part in images.split([1, len(images) - 1])
        ]
    except (onnx.checker.ValidationError, *failures) as error:
        raise _unsupported(classifier, str(error).strip().splitlines()[0][:200]) from error
    logits = torch.cat([torch.from_numpy(batch) for batch in batches])
    far, largest = (logits - expected).abs().max().item(), expected.abs().max().item()
    tolerance = _SHARE * largest
    if not far <= tolerance:  # nor NaN
        raise _unsupported(classifier, f"its logits differ by {far:.1e}, where the largest is {largest:.1e}")
    chosen = expected.gather(1, logits.argmax(dim=1, keepdim=True))[:, 0]
    if (expected.amax(dim=1) - chosen > tolerance).any():
        raise _unsupported(classifier, "it predicts other classes")


def _unsupported(classifier: ImageClassifier, why: str) -> InputError:
    tower = type(classifier.model.visual).__name__
    return InputError(f"ONNX cannot hold this image tower ({tower}: {why}); use --format timm or open_clip.")
