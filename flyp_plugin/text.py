"""Text towers run on the positions and prompts that matter, with the features of open_clip's own code.

A causal tower that is read at the EOT token cannot see what comes after it, so a batch of prompts is cut
behind its last EOT (77 positions become about 15 for class prompts), and equal prompts are encoded once.
open_clip's own encode_text runs; it only sees shorter tokens, positional embeddings and mask. Parameters and
state_dict stay as they are. Not for towers where this is not proved to hold: those keep their full context.
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

# Rows encoded at once where there are many and no gradient: rows of nearly one length, whose activations
# stay in the CPU's cache (measured: 64 the best of 16 ... 256). An accelerator wants larger matrices.
CHUNK = {"cpu": 64}
CHUNK_ELSEWHERE = 1024
_BLOCKS = {transformer.ResidualAttentionBlock, transformer.CustomResidualAttentionBlock}
_log = logging.getLogger(__name__)


class _Options(NamedTuple):
    unique: bool = True
    multiple_of: int = 1
    chunk: int = 0  # 0: all rows at once


def reason_full_context(model: nn.Module) -> str | None:
    """None where text behind the EOT token provably cannot change `model.encode_text`; else why, for a log.

    Proved, by structure: open_clip's CLIP, and its CustomTextCLIP with its TextTransformer, with a causal
    mask, open_clip's blocks, no dropout, and a feature read at the largest token ('argmax') or at 'eos'.
    """
    model, tower = _unwrap(model), _tower(model)
    if _full(model) not in (CLIP, CustomTextCLIP) or _full(tower) not in _SHORT:
        return f"nothing is known of the text tower of a {type(model).__name__} (a {type(tower).__name__})"
    pool_type, mask, blocks = _pooling(tower)[0], tower.attn_mask, tower.transformer
    if getattr(tower, "cls_emb", None) is not None:
        return "its text feature is read at a class token behind the text"
    if pool_type not in ("argmax", "eos"):
        return f"its text feature is not read at the EOT token (pool type {pool_type!r})"
    if getattr(tower, "output_tokens", False):
        return "its text tower gives all tokens back, not the feature alone"
    if mask is None or not torch.equal(mask, torch.full_like(mask, float("-inf")).triu_(1)):
        return "its text tower is not causal"
    if type(blocks) is not transformer.Transformer or {type(b) for b in blocks.resblocks} - _BLOCKS:
        return "its text transformer is not made of open_clip's blocks"
    if any(getattr(m, "p" if isinstance(m, nn.Dropout) else "dropout", None) for m in blocks.modules()):
        return "its text tower has dropout"
    return None


def shorten(
    model: nn.Module, tokens: Tensor | None = None, unique: bool = True, multiple_of: int = 1
) -> bool:
    """Make `model` encode text short from now on, in place; to be called before DDP and torch.compile.

    The tower's class becomes a subclass of what it was: copies, pickles, hooks and wrappers go on as before.

    Args:
        model: an open_clip model.
        tokens: int (N, context length), a few prompts for `self_check`; None: no check.
        unique: encode equal rows of a batch once; their gradients, added in another order, equal to rounding.
        multiple_of: round the number of positions up to this. 16 makes features equal open_clip's to the last
            bit on CPUs where it adds over positions 16 at a time (fp32); else they are equal to rounding.

    Returns:
        Whether it was done. Where not, the model is as it was, and a log line has said why.
    """
    reason = reason_full_context(model)
    if reason is not None:
        _say(reason)
        return False
    if tokens is not None and not self_check(model, tokens):
        _log.warning("Text is encoded at full length: on these weights short text gave other features.")
        return False
    _become(_tower(model), _Options(unique, multiple_of))
    return True


@contextmanager
def short_text(model: nn.Module) -> Iterator[None]:
    """Within it `model.encode_text` is short; after it the model is as it was. For heads and evaluation.

    Without gradient, many rows are also sorted by length and encoded in chunks of nearly equal lengths.
    A model for which `reason_full_context` has a reason is left alone, with a log line.
    """
    reason = reason_full_context(model)
    if reason is not None:
        _say(reason)
        yield
        return
    tower = _tower(model)
    before = getattr(tower, "short_options", None)
    device = tower.positional_embedding.device.type
    _become(tower, _Options(chunk=CHUNK.get(device, CHUNK_ELSEWHERE)))
    try:
        yield
    finally:
        _become(tower, before)


def self_check(model: nn.Module, tokens: Tensor) -> bool:
    """Whether `tokens`, int (N, context length), give the same features in full and short, on these weights.

    In eval mode, without gradient or autocast; modes are put back, and no random number is drawn. The same:
    the norm of each row's difference is within what two matrix kernels differ by, relative to the feature's
    norm: 1e-5 in fp32, 8 units in the last place in TF32, fp16 and bf16.
    """
    if reason_full_context(model) is not None:
        return False
    model, tower = _unwrap(model), _tower(model)
    before = getattr(tower, "short_options", None)
    modes = [(module, module.training) for module in model.modules()]
    tokens = tokens.to(tower.positional_embedding.device)
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(tokens.device.type, enabled=False):
            _become(tower, None)
            full = model.encode_text(tokens).double()  # type: ignore[operator]
            _become(tower, _Options())
            short = model.encode_text(tokens)  # type: ignore[operator]
    finally:
        _become(tower, before)
        for module, training in modes:
            module.training = training
    tf32 = short.is_cuda and short.dtype == torch.float32 and allows_tf32()
    exact = short.dtype in (torch.float32, torch.float64) and not tf32
    limit = 1e-5 if exact else 8 * torch.finfo(torch.float16 if tf32 else short.dtype).eps
    return bool(((short.double() - full).norm(dim=-1) <= limit * full.norm(dim=-1)).all())  # NaN: False


class _Trimmed:
    """A text tower as its own methods see it when they run on `length` positions: other in two tensors."""

    def __init__(self, tower: Any, length: int):
        self._tower = tower
        self.positional_embedding = tower.positional_embedding[:length]
        self.attn_mask = tower.attn_mask[:length, :length]

    def __getattr__(self, name: str) -> Any:
        method = getattr(type(self._tower), name, None)
        if isinstance(method, FunctionType):  # helpers such as _embeds are to see the two tensors too
            return MethodType(method, self)
        return getattr(self._tower, name)


def _shortened(base: type, name: str) -> type:
    """A subclass of `base` whose method `name`, (tokens, ...) -> features, obeys `short_options`."""
    full: Callable[..., Tensor] = getattr(base, name)

    def short(self: Any, text: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        parts, where = _plan(text, _pooling(self), self.short_options)
        features = [full(_Trimmed(self, part.shape[1]), part, *args, **kwargs) for part in parts]
        joined = torch.cat(features) if len(features) > 1 else features[0]
        return joined if where is None else joined[where]

    return type(f"Short{base.__name__}", (base,), {name: short, "__module__": __name__})


@torch.compiler.disable  # what follows from the values of the tokens is no part of a graph
def _plan(text: Tensor, pooling: tuple, options: _Options) -> tuple[list[Tensor], Tensor | None]:
    """The rows to encode, in parts cut behind their last EOT, and where in them each row is (None: there)."""

    def cut(rows: Tensor) -> tuple[Tensor, Tensor]:  # reads where open_clip's text_global_pool does
        lengths = ((rows == pooling[1]).int() if pooling[0] == "eos" else rows).argmax(dim=-1) + 1
        return rows[:, : -(-int(lengths.max()) // options.multiple_of) * options.multiple_of], lengths

    if not len(text):
        return [text], None
    (text, lengths), where = cut(text), None
    if options.unique:
        rows, inverse = torch.unique(text, dim=0, return_inverse=True)
        if len(rows) < len(text):
            (text, lengths), where = cut(rows), inverse
    if not options.chunk or torch.is_grad_enabled() or len(text) <= options.chunk:
        return [text], where
    by_length = lengths.argsort()
    back = by_length.argsort()
    parts = [cut(text[rows])[0] for rows in by_length.split(options.chunk)]
    return parts, back if where is None else back[where]


def _pooling(tower: Any) -> tuple:
    """(pool type, EOS token) of a text tower; 'eos' came with open_clip 2.33."""
    text = "text_" if isinstance(tower, CLIP) else ""
    return getattr(tower, f"{text}pool_type", None), getattr(tower, f"{text}eos_id", None)


def _unwrap(model: nn.Module) -> nn.Module:
    """The model inside torch.compile's and DistributedDataParallel's wrappers."""
    while isinstance(inner := getattr(model, "_orig_mod", getattr(model, "module", None)), nn.Module):
        model = inner
    return model


def _tower(model: Any) -> Any:
    model = _unwrap(model)
    return model.text if isinstance(model, CustomTextCLIP) else model


def _full(module: nn.Module) -> type:
    return type(module).__bases__[0] if type(module) in _SHORT.values() else type(module)


def _become(tower: nn.Module, options: _Options | None) -> None:
    tower.__class__ = _full(tower) if options is None else _SHORT[_full(tower)]
    tower.__dict__.pop("short_options", None)
    tower.__dict__.update({} if options is None else {"short_options": options})


@cache  # one line a reason, not one a head
def _say(reason: str) -> None:
    _log.info(f"Text is encoded at full length: {reason}.")


# what open_clip's forward calls: in 4.x _encode_text, before it encode_text
ShortCLIP = _shortened(CLIP, "_encode_text" if hasattr(CLIP, "_encode_text") else "encode_text")
ShortTextTransformer = _shortened(TextTransformer, "forward")
_SHORT: dict[type, type] = {CLIP: ShortCLIP, TextTransformer: ShortTextTransformer}
