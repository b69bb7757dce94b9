"""From a CLIP model and class prompts to a classifier.

FLYP's head at test time is the *fine-tuned* text tower's own: the encoded prompts of each class (arXiv 2212.00638,
sec. 3). `build_zeroshot_head` makes it, `ImageClassifier` puts it on the image tower: `from_run` for a finished run,
`from_model` for whichever head a model has (a linear probe has a learned one), `from_prompts` for the zero-shot head. Training's
evaluation, `flyp eval`, `flyp wiseft` and `flyp export` all score through ImageClassifier, so that their figures agree.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.distributed as dist
from open_clip.transform import PreprocessCfg, image_transform_v2
from torch import Tensor, nn
from tqdm import tqdm

from flyp_plugin.checkpoints import Model, build_model
from flyp_plugin.errors import InputError
from flyp_plugin.images import to_rgb
from flyp_plugin.learned import HEAD, ClassHead, exact_logits
from flyp_plugin.metrics import eval_mode
from flyp_plugin.prompts import ClassPrompts
from flyp_plugin.record import FILE, find
from flyp_plugin.targets import choose_weights, resolve_spec
from flyp_plugin.text import CHUNK_ELSEWHERE, short_text


def build_zeroshot_head(
    model: Model,
    tokenizer: Callable,
    prompts: ClassPrompts,
    *,
    use_tqdm: bool = False,
    across_ranks: bool = False,
) -> Tensor:
    """The zero-shot head: for each class the mean of its prompts' normalised text features, normalised again.

    Calls open_clip.build_zero_shot_classifier, with short text where that is exact (text.py).

    Args:
        model: an open_clip CLIP model; runs in eval mode and is then restored.
        tokenizer: open_clip.get_tokenizer's for that model.
        prompts: those of C classes.
        across_ranks: the ranks, which must all call this, build a part each and exchange them.

    Returns:
        float (D, C) with D the width of the joint space; columns have norm 1.
    """
    tokens, device = prompts.tokenize(tokenizer), model.logit_scale.device

    def take(pairs: list[tuple[int, int]]) -> Tensor:
        return tokens.take(*zip(*pairs))

    batches = []
    # open_clip takes one list of templates for all classes, so a batch is of classes with as many prompts
    order = sorted(range(len(tokens.counts)), key=tokens.counts.__getitem__)
    for count, group in groupby(order, tokens.counts.__getitem__):
        # "templates" that give a prompt's place in the tokens: it is "tokenised" by a look-up
        labels, places = list(group), [lambda label, n=number: (label, n) for number in range(count)]
        size = 10 if device.type == "cpu" else max(10, CHUNK_ELSEWHERE // count)  # 10 is open_clip's
        batches += [(labels[start : start + size], places) for start in range(0, len(labels), size)]
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if across_ranks else (0, 1)
    build = partial(
        open_clip.build_zero_shot_classifier, model, take, num_classes_per_batch=None, device=device
    )
    with eval_mode(model), short_text(model):
        columns = [
            build(*batch) for batch in tqdm(batches[rank::ranks], "head", unit="batch", disable=not use_tqdm)
        ]
    if across_ranks:
        parts: list[Any] = [None] * ranks
        dist.all_gather_object(parts, [some.cpu() for some in columns])
        columns = [parts[number % ranks][number // ranks].to(device) for number in range(len(batches))]
    head = torch.cat(columns, dim=1)
    return head if order == sorted(order) else head[:, torch.tensor(order, device=device).argsort()]


def zeroshot_as_learned(
    model: Model,
    tokenizer: Callable,
    prompts: ClassPrompts,
    precision: str = "fp32",
    scale: float | None = None,
) -> ClassHead:
    """The zero-shot head as a learned head: where training one starts, and its alpha 0 in WiSE-FT.

    `scale` is the factor of its logits; None: the model's logit_scale.exp().
    """
    head = ImageClassifier.from_prompts(model, tokenizer, prompts, precision).head
    factor = model.logit_scale.detach().exp().float() if scale is None else scale
    return ClassHead(factor * head.T.float(), prompts)


def autocast(precision: str, device: str | torch.device) -> AbstractContextManager:
    """The autocast context of a forward pass under open_clip's --precision."""
    dtype = {"amp": torch.float16, "amp_bf16": torch.bfloat16, "amp_bfloat16": torch.bfloat16}.get(precision)
    return torch.autocast(torch.device(device).type, dtype=dtype) if dtype else nullcontext()


def encode_images(model: Model, images: Tensor, precision: str = "fp32") -> Tensor:
    """Preprocessed images (B, 3, H, W) -> normalised features (B, D) in the dtype of open_clip's --precision."""
    images = images.to(open_clip.get_input_dtype(precision))  # None (no change) except for fp16 and bf16
    with autocast(precision, images.device):
        return model.encode_image(images, normalize=True)


def image_features(model: Model, loader: Iterable[dict], precision: str = "fp32") -> tuple[Tensor, Tensor]:
    """Normalised float32 features (N, D) and labels (N,) of a loader's images; of several ranks, some may have N = 0."""
    device = model.logit_scale.device
    features = [torch.empty(0, getattr(model, HEAD).weight.shape[1], device=device)]
    labels = [torch.empty(0, dtype=torch.int64, device=device)]
    with eval_mode(model):
        for batch in loader:
            features.append(encode_images(model, batch["images"].to(device), precision).float())
            labels.append(batch["labels"].to(device))
    return torch.cat(features), torch.cat(labels)


def val_preprocess(model: Model) -> Callable:
    """The model's transform for evaluation, PIL image -> float (3, H, W): open_clip's `preprocess_val`."""
    return image_transform_v2(PreprocessCfg(**model.visual.preprocess_cfg), is_train=False)


class ImageClassifier(nn.Module):
    """A CLIP model with a classification head: images in, logits out, scaled by logit_scale.exp().

    Args:
        model: an open_clip CLIP model.
        head: float (D, C), one column per class; see `build_zeroshot_head`. ValueError if C is not the number of names.
        classnames: C names.
        precision: open_clip's --precision that the model was built with.

    Example:
        >>> classifier = ImageClassifier.from_run("logs/birds")
        >>> classifier.predict([PIL.Image.open("photos/bird.jpg")])
        [('robin', 0.98)]
    """

    head: Tensor

    def __init__(self, model: Model, head: Tensor, classnames: Sequence[str], precision: str = "fp32"):
        super().__init__()
        if head.shape[1:] != (len(classnames),):
            raise ValueError(f"head of shape {tuple(head.shape)} does not fit {len(classnames)} class names")
        self.model: Any = model
        self.classnames, self.precision = list(classnames), precision
        self.register_buffer("head", head)  # in the state dict, so that it moves with the weights
        self.training = model.training  # eval() and back leave the model as it was

    @classmethod
    def from_prompts(
        cls, model: Model, tokenizer: Callable, prompts: ClassPrompts, precision: str = "fp32", **kwargs: Any
    ) -> "ImageClassifier":
        """The zero-shot classifier of a model; kwargs go to `build_zeroshot_head`."""
        with autocast(precision, model.logit_scale.device):
            head = build_zeroshot_head(model, tokenizer, prompts, **kwargs)
        return cls(model, head, prompts.classnames, precision)

    @classmethod
    def from_model(
        cls, model: Model, tokenizer: Callable, prompts: ClassPrompts, precision: str = "fp32", **kwargs: Any
    ) -> "ImageClassifier":
        """The classifier with the model's learned head, or else `from_prompts`. InputError for a class the head lacks."""
        learned = getattr(model, HEAD, None)
        if learned is None:
            return cls.from_prompts(model, tokenizer, prompts, precision, **kwargs)
        # learned weights include logit_scale.exp(), which forward() multiplies in again
        head = learned.restricted(prompts.classnames).T.float() / model.logit_scale.detach().exp().float()
        return cls(model, head, prompts.classnames, precision)

    @classmethod
    def from_checkpoint(
        cls,
        model_name: str,
        path: str | os.PathLike,
        prompts: ClassPrompts,
        precision: str = "fp32",
        device: str | torch.device = "cpu",
        **kwargs: Any,
    ) -> "ImageClassifier":
        """A classifier from open_clip's model name and a checkpoint's path or a pretrained tag.

        kwargs are open_clip's flags, such as force_quick_gelu=True, where neither the weights' tag nor the flyp.json beside
        them says so. Raises InputError for weights that cannot be read or belong to another architecture.
        """
        spec = resolve_spec(model_name, os.fspath(path), kwargs)
        model = build_model(spec, os.fspath(path), precision, device)
        return cls.from_model(model, spec.tokenizer, prompts, precision).eval()

    @classmethod
    def from_run(
        cls,
        run: str | os.PathLike,
        epoch: str | int | None = None,
        prompts: ClassPrompts | None = None,
        precision: str | None = None,
        device: str | torch.device = "cpu",
    ) -> "ImageClassifier":
        """The classifier that a run trained, with the model, preprocessing and classes recorded in its flyp.json.

        Args:
            run: the run's folder, logs/NAME, or a checkpoint in it or merged from it.
            epoch: for a folder: 'best', 'loss', 'last' or a number; None: the merged weights if there are any, else the last.
            prompts: other classes; None: the training set's.
            precision: open_clip's --precision; None: the run's.

        Raises:
            InputError: no flyp.json, a deleted checkpoint, or weights that cannot be read.
        """
        known = find(run)
        if known is None:
            raise InputError(f"{run} has no {FILE}; for weights alone, use ImageClassifier.from_checkpoint.")
        weights = choose_weights(known, None if epoch is None else str(epoch)) if Path(run).is_dir() else run
        spec, precision = known.spec, precision or known.get("precision") or "fp32"
        model = build_model(spec, os.fspath(weights), precision, device)
        prompts = prompts or known.prompts
        if prompts is None:
            raise InputError(f"{known.folder}/{FILE} names no classes; pass prompts=.")
        return cls.from_model(model, spec.tokenizer, prompts, precision).eval()

    @property
    def preprocess(self) -> Callable:
        """PIL image -> float (3, H, W)."""
        return val_preprocess(self.model)

    def forward(self, images: Tensor) -> Tensor:
        """Preprocessed images (B, 3, H, W) -> float32 logits (B, C)."""
        features = encode_images(self.model, images, self.precision)
        return exact_logits(self.model.logit_scale.exp().float() * features.float(), self.head.T)

    @torch.no_grad()
    def predict(self, images: Sequence | Tensor) -> list[tuple[str, float]]:
        """The most likely class of each image and its probability.

        Args:
            images: PIL images of any mode, converted to RGB as in training, or preprocessed images (B, 3, H, W).
        """
        if not isinstance(images, Tensor):
            images = torch.stack([self.preprocess(to_rgb(image)) for image in images])
        best = self(images.to(self.head.device)).softmax(dim=1).max(dim=1)
        return [(self.classnames[i], p) for i, p in zip(best.indices.tolist(), best.values.tolist())]
