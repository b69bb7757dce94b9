"""Text towers that run on the positions and the prompts that matter, with the same features as open_clip's own code.

A causal tower that is read at the EOT token cannot see what comes after it, so a batch of prompts is cut behind its
last EOT (77 positions -> about 20 for class prompts), and equal prompts are encoded once. open_clip's own encode_text
runs; it only sees shorter tokens, positional embeddings and attention mask. Parameters and state_dict stay as they
are. Not for tokenising, and not for towers where this is not proved to hold: those keep their full context.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import FunctionType, MethodType
from typing import Any, NamedTuple

import torch
from open_clip.model import CLIP, CustomTextCLIP
from open_clip.transformer import (
    CustomResidualAttentionBlock,
    ResidualAttentionBlock,
    TextTransformer,
    Transformer,
)
from torch import Tensor, nn

_log = logging.getLogger(__name__)
# Rows encoded at once where there are many and no gradient. On a CPU 64 was the best of 16 ... 512: rows of one chunk
# are of nearly one length, and their activations stay in the cache. An accelerator wants larger matrices.
CHUNK = {"cpu": 64}
CHUNK_ELSEWHERE = 1024


class Options(NamedTuple):
    unique: bool = True
    multiple_of: int = 1
    chunk: int = 0  # 0: all rows at once


def why_full(model: nn.Module) -> str | None:
    """None where text after the EOT token provably cannot change `model.encode_text`; else why, for a log line.

    Proved, by the structure of the model: open_clip's CLIP, and CustomTextCLIP with open_clip's TextTransformer, with
    a causal mask, standard blocks, no dropout, and the feature read at the largest token ('argmax') or at 'eos'.
    """
    model = _unwrap(model)
    if type(model) not in (CLIP, CustomTextCLIP, ShortCLIP):
        return f"nothing is known of the text tower of a {type(model).__name__}"
    tower = _tower(model)
    if type(tower) not in _SHORT and type(tower) not in _SHORT.values():
        return f"nothing is known of a text tower that is a {type(tower).__name__}"
    blocks = getattr(tower.transformer, "resblocks", ())
    if type(tower.transformer) is not Transformer or {type(b) for b in blocks} - {
        ResidualAttentionBlock,
        CustomResidualAttentionBlock,
    }:
        return "its text transformer has blocks that are not open_clip's"
    if getattr(tower, "cls_emb", None) is not None:
        return "its text feature is read at a class token behind the text"
    if _pool_type(tower) not in ("argmax", "eos"):
        return f"its text feature is not read at the EOT token (pooling {_pool_type(tower)!r})"
    if getattr(tower, "output_tokens", False):
        return "its text tower gives all tokens back, not the feature alone"
    mask = tower.attn_mask
    if mask is None or not torch.equal(mask, torch.full_like(mask, float("-inf")).triu_(1)):
        return "its text tower is not causal"
    if any(_dropout(module) for module in tower.transformer.modules()):
        return "its text tower has dropout"
    return None


def shorten(model: nn.Module, tokens: Tensor | None = None, unique: bool = True, multiple_of: int = 1) -> bool:
    """Make `model` encode text short from now on, in place; to be called before DDP and torch.compile.

    The tower's class becomes a subclass of itself, so copies, pickles, hooks and wrappers go on as before.

    Args:
        model: an open_clip model.
        tokens: int (N, context length), a few prompts for `self_check`; None: no check.
        unique: encode equal rows of a batch once. Gradients then are sums in another order: equal to rounding,
            where trimming alone is equal to the last bit (fp32, CPU).
        multiple_of: round the number of positions up to this, for fewer shapes under torch.compile.

    Returns:
        Whether it was done. Where not, the model is as it was, and one log line has said why.
    """
    reason = why_full(model)
    if reason is not None:
        _say(reason)
        return False
    if tokens is not None and not self_check(model, tokens):
        _log.warning("Text is encoded at full length: shorter text gave other features on this model's weights.")
        return False
    _install(_tower(_unwrap(model)), Options(unique, multiple_of))
    return True


@contextmanager
def short_text(model: nn.Module) -> Iterator[None]:
    """Within it, `model.encode_text` is short; after it the model is as it was. For heads, evaluation and sweeps.

    Without gradient, many rows at once are also sorted by length and encoded in chunks of nearly equal lengths.
    A model for which `why_full` has a reason is left alone, with a log line.
    """
    reason = why_full(model)
    if reason is not None:
        _say(reason)
        yield
        return
    tower = _tower(_unwrap(model))
    before = type(tower), tower.__dict__.get("short_options")
    _install(tower, Options(chunk=CHUNK.get(tower.positional_embedding.device.type, CHUNK_ELSEWHERE)))
    try:
        yield
    finally:
        _restore(tower, *before)


def self_check(model: nn.Module, tokens: Tensor) -> bool:
    """Whether `tokens` (int, (N, context length)) give the same features at full length and short, on these weights.

    In eval mode, without gradient or autocast; modes are put back, and no random number is drawn. The same means: the
    features of each row differ by less than rounding explains, relative to their length (1e-5 in fp32; 8 units in
    the last place of TF32, fp16 and bf16, whose errors are that large between any two matrix kernels).
    """
    if why_full(model) is not None:
        return False
    model = _unwrap(model)
    tower = _tower(model)
    tokens = tokens.to(tower.positional_embedding.device)
    before = type(tower), tower.__dict__.get("short_options")
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad(), torch.autocast(tokens.device.type, enabled=False):
            _restore(tower, _base(type(tower)), None)
            full = model.encode_text(tokens)  # type: ignore[operator]
            _install(tower, Options())
            short = model.encode_text(tokens)  # type: ignore[operator]
    finally:
        _restore(tower, *before)
        for module, training in modes:
            module.training = training
    error = (short.double() - full.double()).norm(dim=-1) / full.double().norm(dim=-1)
    return bool((error <= _rounding(full)).all())  # False for NaN too


class _Trimmed:
    """A text tower as its own methods see it when they run on `length` positions: the same but for two tensors."""

    def __init__(self, tower: nn.Module, length: int):
        self._tower = tower
        self.positional_embedding = tower.positional_embedding[:length]  # type: ignore[index]
        self.attn_mask = tower.attn_mask[:length, :length]  # type: ignore[index]

    def __getattr__(self, name: str) -> Any:
        method = getattr(type(self._tower), name, None)
        if isinstance(method, FunctionType):  # helpers such as _embeds are to see the two tensors too
            return MethodType(method, self)
        return getattr(self._tower, name)


def _shortened(base: type, name: str) -> type:
    """A subclass of `base` whose method `name`, (tokens, ...) -> features, is short as `short_options` has it."""
    full: Callable[..., Tensor] = getattr(base, name)

    def short(self, text: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        parts, order = _plan(text, _lengths(self, text), self.short_options)
        features = [full(_Trimmed(self, part.shape[1]), part, *args, **kwargs) for part in parts]
        joined = torch.cat(features) if len(features) > 1 else features[0]
        return joined if order is None else joined[order]

    return type(f"Short{base.__name__}", (base,), {name: short, "__module__": __name__, "__doc__": base.__doc__})


def _lengths(tower: nn.Module, text: Tensor) -> Tensor:
    """Positions up to and with the one that is read, found as open_clip's text_global_pool finds it: int (N,)."""
    if _pool_type(tower) == "eos":
        text = (text == getattr(tower, "text_eos_id" if isinstance(tower, CLIP) else "eos_id")).int()
    return text.argmax(dim=-1) + 1


@torch.compiler.disable
def _plan(text: Tensor, lengths: Tensor, options: Options) -> tuple[list[Tensor], Tensor | None]:
    """The rows to encode, in parts as long as their longest, and where in them each row of `text` is (None: there)."""
    if not len(text):
        return [text], None
    order = None
    width = _up(int(lengths.max()), options.multiple_of, text.shape[1])
    text = text[:, :width]
    if options.unique and len(text) > 1:
        rows, where = torch.unique(text, dim=0, return_inverse=True)
        if len(rows) < len(text):
            lengths = lengths.new_empty(len(rows)).scatter_(0, where, lengths)
            text, order = rows, where
    if not options.chunk or torch.is_grad_enabled() or len(text) <= options.chunk:
        return [text], order
    by_length = lengths.argsort(stable=True)
    parts = [text[rows, : _up(int(lengths[rows[-1]]), options.multiple_of, width)] for rows in by_length.split(options.chunk)]
    back = by_length.argsort()
    return parts, back if order is None else back[order]


def _up(length: int, multiple: int, most: int) -> int:
    return min(-(-length // multiple) * multiple, most)


def _install(tower: nn.Module, options: Options) -> None:
    _restore(tower, _SHORT.get(type(tower), type(tower)), options)


def _restore(tower: nn.Module, kind: type, options: Options | None) -> None:
    tower.__class__ = kind
    tower.__dict__.pop("short_options", None)
    if options is not None:
        tower.__dict__["short_options"] = options


def _base(kind: type) -> type:
    return next((base for base, short in _SHORT.items() if short is kind), kind)


def _unwrap(model: nn.Module) -> nn.Module:
    """The model inside torch.compile's and DistributedDataParallel's wrappers."""
    while isinstance(inner := getattr(model, "_orig_mod", getattr(model, "module", None)), nn.Module):
        model = inner
    return model


def _tower(model: nn.Module) -> Any:
    return model.text if isinstance(model, CustomTextCLIP) else model


def _pool_type(tower: nn.Module) -> str:
    return getattr(tower, "text_pool_type" if isinstance(tower, CLIP) else "pool_type", "unknown")  # type: ignore[return-value]


def _dropout(module: nn.Module) -> bool:
    rate = module.p if isinstance(module, nn.modules.dropout._DropoutNd) else getattr(module, "dropout", 0.0)
    return isinstance(rate, float) and rate > 0


def _rounding(features: Tensor) -> float:
    if features.dtype == torch.float32:
        tf32 = features.is_cuda and torch.backends.cuda.matmul.allow_tf32
        return 8 * torch.finfo(torch.float16).eps if tf32 else 1e-5
    return 8 * torch.finfo(features.dtype).eps


@cache  # one line a reason, not one a head
def _say(reason: str) -> None:
    _log.info(f"Text is encoded at full length: {reason}.")


# open_clip 4 calls _encode_text everywhere, 2 and 3 encode_text
ShortCLIP = _shortened(CLIP, "_encode_text" if hasattr(CLIP, "_encode_text") else "encode_text")
ShortTextTransformer = _shortened(TextTransformer, "forward")
_SHORT = {CLIP: ShortCLIP, TextTransformer: ShortTextTransformer}
