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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import FunctionType, MethodType
from typing import Any, NamedTuple

import torch
from open_clip import transformer
from open_clip.model import CLIP, CustomTextCLIP
from open_clip.transformer import TextTransformer
from torch import Tensor, nn

from flyp_plugin.precision import allows_tf32

# Rows encoded at once without gradient, sorted by length: on a CPU their activations stay in the cache (measured: 64 is
# the best of 16 ... 256), an accelerator needs larger matrices
CHUNK, CHUNK_ELSEWHERE = {"cpu": 64}, 1024
_BLOCKS = {transformer.ResidualAttentionBlock, transformer.CustomResidualAttentionBlock}
_log = logging.getLogger(__name__)


class _Options(NamedTuple):
    unique: bool = True
    multiple_of: int = 1
    length: int = 0  # 0: that of the longest text in the batch
    chunk: int = 0  # 0: all rows at once


def reason_full_context(model: nn.Module) -> str | None:
    """None if positions behind EOT provably cannot change `model.encode_text`; otherwise the reason, for a log.

    Proved by structure: open_clip's CLIP or TextTransformer, causal, of open_clip's blocks, without dropout, read at EOT.
    """
    model, tower = _unwrap(model), _text_tower(model)
    if _original_class(model) not in (CLIP, CustomTextCLIP) or _original_class(tower) not in _SHORT:
        return f"nothing is known about the text tower of {type(model).__name__} ({type(tower).__name__})"
    at_eot, mask, blocks = _pooling(tower)[0] in ("argmax", "eos"), tower.attn_mask, tower.transformer
    if not at_eot or getattr(tower, "cls_emb", None) is not None or getattr(tower, "output_tokens", False):
        return "its text tower reads more than the EOT token"
    if mask is None or not torch.equal(mask, torch.full_like(mask, float("-inf")).triu_(1)):
        return "its text tower is not causal"
    if type(blocks) is not transformer.Transformer or {type(b) for b in blocks.resblocks} - _BLOCKS:
        return "its text transformer is not made of open_clip's blocks"
    if any(getattr(m, "p" if isinstance(m, nn.Dropout) else "dropout", None) for m in blocks.modules()):
        return "its text tower has dropout"
    return None


def shorten(
    model: nn.Module, tokens: Tensor | None = None, unique: bool = True, multiple_of: int = 1, length: int = 0
) -> bool:
    """Make `model` encode text short from now on, in place. Call it before DDP and torch.compile.

    The tower's class becomes a subclass of its own, so copies, pickles, hooks and wrappers work as before.

    Args:
        tokens: int (N, context length), a few prompts for `self_check`; None skips it.
        unique: encode equal rows of a batch once.
        multiple_of: round the number of positions up. With 16, features are bit-equal to open_clip's on CPUs whose
            float32 kernels add 16 positions at a time.
        length: if > 0, cut every batch to so many positions without a look at its tokens, and encode all rows: one shape
            and no synchronisation, for a GPU. The caller promises that no text, with its EOT, is longer. Measured on an
            H100 in amp_bf16 with ViT-B-32 at batch 512 and 1000 x 80 prompts: open_clip 134 ms, this 97 ms, the default
            242 ms, because torch's attention makes a plan for each new shape and torch.unique waits for the device.

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
    _set_options(_text_tower(model), _Options(unique, multiple_of, length))
    return True


@contextmanager
def short_text(model: nn.Module) -> Iterator[None]:
    """Make `model.encode_text` short within a block, for heads and evaluation. Without gradient, rows go in chunks.

    A model for which `reason_full_context` has a reason stays as it is, with a log line.
    """
    tower, options = _text_tower(model), None
    if _is_exact(model):
        device = tower.positional_embedding.device.type
        options = _Options(chunk=CHUNK.get(device, CHUNK_ELSEWHERE))
    with _text_options(tower, options):
        yield


def self_check(model: nn.Module, tokens: Tensor) -> bool:
    """Whether `tokens`, int (N, context length), have the same features in full and short, with these weights.

    For models without a `reason_full_context`. Each row's difference must be within 1e-5 of the feature's norm in fp32,
    within 8 units in the last place in TF32, fp16 and bf16.
    """
    model, tower = _unwrap(model), _text_tower(model)
    tokens = tokens.to(tower.positional_embedding.device)
    with torch.no_grad(), torch.autocast(tokens.device.type, enabled=False):
        with _text_options(tower, None):
            full = model.encode_text(tokens).double()  # type: ignore[operator]
        with _text_options(tower, _Options()):
            short = model.encode_text(tokens)  # type: ignore[operator]
    tf32 = short.is_cuda and short.dtype == torch.float32 and allows_tf32()
    eps = torch.finfo(torch.float16 if tf32 else short.dtype).eps
    limit = 1e-5 if eps < 1e-6 else 8 * eps
    return bool(((short.double() - full).norm(dim=-1) <= limit * full.norm(dim=-1)).all())  # NaN: False


class _Trimmed:
    """A text tower as seen by its own methods when it runs on `length` positions: two tensors are shorter."""

    def __init__(self, tower: Any, length: int):
        self._tower = tower
        self.positional_embedding = tower.positional_embedding[:length]
        self.attn_mask = tower.attn_mask[:length, :length]

    def __getattr__(self, name: str) -> Any:
        method = getattr(type(self._tower), name, None)
        if isinstance(method, FunctionType):  # bound to this object, so that helpers see the two tensors too
            return MethodType(method, self)
        return getattr(self._tower, name)


def _short_class(base: type, name: str) -> type:
    """A subclass of `base` whose method `name`, (tokens, ...) -> features, follows `short_options`."""
    full: Callable[..., Tensor] = getattr(base, name)

    def short(self: Any, text: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        parts, index = _split_rows(text, _pooling(self), self.short_options)
        features = [full(_Trimmed(self, part.shape[1]), part, *args, **kwargs) for part in parts]
        joined = torch.cat(features) if len(features) > 1 else features[0]
        return joined if index is None else joined[index]

    return type(f"Short{base.__name__}", (base,), {name: short, "__module__": __name__})


@torch.compiler.disable  # it depends on the values of the tokens
def _split_rows(text: Tensor, pooling: tuple, options: _Options) -> tuple[list[Tensor], Tensor | None]:
    """The rows to encode, in parts cut behind their last EOT, and the index that restores the batch (None: as it is)."""

    def cut(rows: Tensor) -> tuple[Tensor, Tensor]:  # at the position that open_clip's text_global_pool reads
        lengths = ((rows == pooling[1]).int() if pooling[0] == "eos" else rows).argmax(dim=-1) + 1
        longest = options.length or int(lengths.max())
        return rows[:, : -(-longest // options.multiple_of) * options.multiple_of], lengths

    (text, lengths), index = cut(text), None
    if options.length:
        fits, error = (lengths <= options.length).all(), f"a text is longer than {options.length} tokens"
        if text.is_cuda:
            torch._assert_async(fits, error)
        elif not fits:
            raise ValueError(f"{error}: {int(lengths.max())}.")
        return [text], None
    if options.unique:
        rows, inverse = torch.unique(text, dim=0, return_inverse=True)
        if len(rows) < len(text):
            (text, lengths), index = cut(rows), inverse
    if not options.chunk or torch.is_grad_enabled() or len(text) <= options.chunk:
        return [text], index
    by_length = lengths.argsort()
    restore = by_length.argsort()
    parts = [cut(text[rows])[0] for rows in by_length.split(options.chunk)]
    return parts, restore if index is None else restore[index]


def _pooling(tower: Any) -> tuple:
    """(pool type, EOS token) of a text tower; 'eos' came with open_clip 2.33."""
    prefix = "text_" if isinstance(tower, CLIP) else ""
    return getattr(tower, f"{prefix}pool_type", None), getattr(tower, f"{prefix}eos_id", None)


def _unwrap(model: nn.Module) -> nn.Module:
    while isinstance(inner := getattr(model, "_orig_mod", getattr(model, "module", None)), nn.Module):
        model = inner  # inside torch.compile's or DistributedDataParallel's wrapper
    return model


def _text_tower(model: Any) -> Any:
    model = _unwrap(model)
    return model.text if isinstance(model, CustomTextCLIP) else model


def _original_class(module: nn.Module) -> type:
    return type(module).__bases__[0] if type(module) in _SHORT.values() else type(module)


def _set_options(tower: Any, options: _Options | None) -> None:  # None: as open_clip does
    vars(tower).pop("short_options", None)
    tower.__class__ = _original_class(tower)
    if options is not None:
        tower.__class__, tower.short_options = _SHORT[type(tower)], options


@contextmanager
def _text_options(tower: nn.Module, options: _Options | None) -> Iterator[None]:
    before = getattr(tower, "short_options", None)
    _set_options(tower, options)
    try:
        yield
    finally:
        _set_options(tower, before)


@cache  # one line for each reason, not for each head
def _log_reason(reason: str) -> None:
    _log.info(f"Text is encoded at full length: {reason}.")


def _is_exact(model: nn.Module) -> bool:
    if (reason := reason_full_context(model)) is not None:
        _log_reason(reason)
    return reason is None


# The method that open_clip's forward calls: _encode_text in 4.x, encode_text before
ShortCLIP = _short_class(CLIP, "_encode_text" if hasattr(CLIP, "_encode_text") else "encode_text")
ShortTextTransformer = _short_class(TextTransformer, "forward")
_SHORT: dict[type, type] = {CLIP: ShortCLIP, TextTransformer: ShortTextTransformer}
