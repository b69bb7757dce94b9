"""Exact short text: text towers run only on the positions and the prompts that matter.

CLIP's text tower is causal and its feature is read at the EOT token, so nothing behind EOT can change the feature or
get a gradient. Class prompts use about 10 of 77 positions. A batch of tokens is therefore cut behind its last EOT, and
equal rows, which are frequent among class prompts, are encoded once. open_clip's own code computes the features from
shorter tokens, positional embeddings and mask; parameters and state_dict stay as they are.

Features and gradients equal open_clip's up to rounding: kernels add the same terms in another order. Measured on a CPU, a
training step of ViT-B-32 takes 1/1.6 of the time, a zero-shot head 1/9.5. The cost is a search for equal rows and shapes
that vary, which a GPU does not like: see shorten's `length`. A tower for which exactness is not proved keeps its full
context: see reason_full_context. train.py shortens for training, heads.py for heads.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from open_clip import transformer
from open_clip.model import CLIP, CustomTextCLIP
from torch import Tensor, nn

from flyp_plugin.precision import allows_tf32
from flyp_plugin.short_tower import METHODS, Options, get_pooling, original_class, set_options, use_options

# Rows encoded at once without gradient, sorted by length: on a CPU their activations stay in the cache (measured: 64 is
# the best of 16 ... 256), an accelerator needs larger matrices
CHUNK, CHUNK_ELSEWHERE = {"cpu": 64}, 1024
_BLOCKS = {transformer.ResidualAttentionBlock, transformer.CustomResidualAttentionBlock}
_log = logging.getLogger(__name__)


def reason_full_context(model: nn.Module) -> str | None:
    """None if positions behind EOT provably cannot change `model.encode_text`; otherwise the reason, for a log.

    Proved by structure: open_clip's CLIP or TextTransformer, causal, of open_clip's blocks, without dropout, read at EOT.
    """
    model, tower = _unwrap(model), _text_tower(model)
    if original_class(model) not in (CLIP, CustomTextCLIP) or original_class(tower) not in METHODS:
        return f"nothing is known about the text tower of {type(model).__name__} ({type(tower).__name__})"
    at_eot, mask, blocks = get_pooling(tower)[0] in ("argmax", "eos"), tower.attn_mask, tower.transformer
    if not at_eot or getattr(tower, "cls_emb", None) is not None or getattr(tower, "output_tokens", False):
        return "its text feature is not the one at the EOT token"
    if mask is None or not torch.equal(mask, torch.full_like(mask, float("-inf")).triu_(1)):
        return "its text tower is not causal"
    kinds = {original_class(_unwrap(block)) for block in getattr(blocks, "resblocks", ())}
    if type(blocks) is not transformer.Transformer or kinds - _BLOCKS:
        return "its text transformer is not made of open_clip's blocks"
    if any(getattr(m, "p" if isinstance(m, nn.Dropout) else "dropout", None) for m in blocks.modules()):
        return "its text tower has dropout"
    return None


def shorten(
    model: nn.Module,
    tokens: Tensor | None = None,
    unique: bool = True,
    multiple_of: int = 1,
    length: int = 0,
    in_eval: bool = False,
) -> bool:
    """Make `model` encode text short from now on, in place. Call it before DDP and torch.compile.

    The tower's class becomes a subclass of its own, so copies, pickles, hooks and wrappers work as before.

    Args:
        tokens: int (N, context length), a few prompts for `self_check`; None skips it.
        unique: encode equal rows of a batch once.
        multiple_of: round the number of positions up. With 16, features are bit-equal to open_clip's on CPUs whose
            float32 kernels add 16 positions at a time.
        length: if > 0, in training mode, cut every batch to so many positions without a look at its tokens, and encode all
            rows: one shape and no synchronisation, for a GPU. The caller promises that no text, with its EOT, is longer.
            Measured on an H100 in amp_bf16 with ViT-B-32 at batch 512 and 1000 x 80 prompts: open_clip 134 ms, this
            97 ms, the default 242 ms, because torch's attention makes a plan for each new shape and torch.unique waits
            for the device.
        in_eval: use `length` in eval mode too, for a model that only ever sees training's texts.

    Returns:
        Whether it was done. If not, the model is unchanged and the log has the reason.

    Raises:
        ValueError: later, by the model, on a text longer than `length`. On a GPU it is a device-side assertion.
    """
    if not _is_exact(model):
        return False
    if tokens is not None and not self_check(model, tokens):
        _log.warning("Text is encoded at full length: with these weights short text changes the features.")
        return False
    set_options(_text_tower(model), Options(unique, multiple_of, length, in_eval=in_eval))
    return True


@contextmanager
def short_text(model: nn.Module) -> Iterator[None]:
    """Make `model.encode_text` short within a block, for heads and evaluation. Without gradient, rows go in chunks.

    A model for which `reason_full_context` has a reason stays as it is, with a log line.
    """
    if not _is_exact(model):
        yield
        return
    tower = _text_tower(model)
    chunk = CHUNK.get(tower.positional_embedding.device.type, CHUNK_ELSEWHERE)
    with use_options(tower, Options(chunk=chunk)):
        yield


def self_check(model: nn.Module, tokens: Tensor) -> bool:
    """Whether `tokens`, int (N, context length), have the same features in full and short, with these weights.

    For models without a `reason_full_context`. Each row's difference must be within 1e-5 of the feature's norm in fp32,
    within 8 units in the last place in TF32, fp16 and bf16.
    """
    difference, limit = difference_and_limit(model, tokens)
    return difference <= limit  # NaN: False


def difference_and_limit(model: nn.Module, tokens: Tensor) -> tuple[float, float]:
    """The largest difference of a row's feature, relative to its norm, and what `self_check` allows."""
    model, tower = _unwrap(model), _text_tower(model)
    tokens = tokens.to(tower.positional_embedding.device)
    with torch.no_grad(), torch.autocast(tokens.device.type, enabled=False):
        with use_options(tower, None):
            full = model.encode_text(tokens).double()  # type: ignore[operator]
        with use_options(tower, Options()):
            short = model.encode_text(tokens)  # type: ignore[operator]
    tf32 = short.is_cuda and short.dtype == torch.float32 and allows_tf32()
    eps = torch.finfo(torch.float16 if tf32 else short.dtype).eps
    difference = ((short.double() - full).norm(dim=-1) / full.norm(dim=-1)).max().item()
    return difference, 1e-5 if eps < 1e-6 else 8 * eps


def _unwrap(model: nn.Module) -> nn.Module:
    while isinstance(inner := getattr(model, "_orig_mod", getattr(model, "module", None)), nn.Module):
        model = inner  # inside torch.compile's or DistributedDataParallel's wrapper
    return model


def _text_tower(model: Any) -> Any:
    model = _unwrap(model)
    return model.text if isinstance(model, CustomTextCLIP) else model


@cache  # one line for each reason, not for each head
def _log_reason(reason: str) -> None:
    _log.info(f"Text is encoded at full length: {reason}.")


def _is_exact(model: nn.Module) -> bool:
    if (reason := reason_full_context(model)) is not None:
        _log_reason(reason)
    return reason is None
