"""A text tower that runs on the first positions and on the distinct rows only; text.py says why that is exact.

The tower's class becomes a subclass that cuts a batch of tokens and calls open_clip's own method on a view of the tower
with shorter positional embeddings and mask. Parameters, state_dict and the module itself stay as they are.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import FunctionType, MethodType
from typing import Any, NamedTuple

import torch
from open_clip.model import CLIP
from open_clip.transformer import TextTransformer
from torch import Tensor, nn


class Options(NamedTuple):
    unique: bool = True
    multiple_of: int = 1
    length: int = 0  # 0: that of the longest text in the batch
    chunk: int = 0  # 0: all rows at once
    in_eval: bool = False  # `length` holds in eval mode too


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


@cache
def _short_class(base: Any, name: str) -> type:
    """A subclass of `base` whose method `name`, (tokens, ...) -> features, follows `short_options`."""
    full: Callable[..., Tensor] = getattr(base, name)

    def short(self: Any, text: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if (options := self.short_options) is None:
            return full(self, text, *args, **kwargs)
        # the fixed length is the training prompts': evaluation may have longer texts
        if not (self.training or options.in_eval):
            options = options._replace(length=0)
        parts, index = _split_rows(text, get_pooling(self), options)
        features = [full(_Trimmed(self, part.shape[1]), part, *args, **kwargs) for part in parts]
        joined = torch.cat(features) if len(features) > 1 else features[0]
        return joined if index is None else joined[index]

    return type(
        f"Short{base.__name__}", (base,), {name: short, "short_options": None, "__module__": __name__}
    )


@torch.compiler.disable  # it depends on the values of the tokens
def _split_rows(text: Tensor, pooling: tuple, options: Options) -> tuple[list[Tensor], Tensor | None]:
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


def get_pooling(tower: Any) -> tuple:
    """(pool type, EOS token) of a text tower; 'eos' came with open_clip 2.33."""
    prefix = "text_" if isinstance(tower, CLIP) else ""
    return getattr(tower, f"{prefix}pool_type", None), getattr(tower, f"{prefix}eos_id", None)


def original_class(module: nn.Module) -> type:
    """open_clip's class, of which `set_options` makes a subclass, and so does torch's FSDP2."""
    kind = type(module)
    while kind.__module__ == __name__ or kind.__bases__[0].__name__ == "FSDPModule":
        kind = kind.__bases__[-1]
    return kind


def set_options(tower: Any, options: Options | None) -> None:
    """How a tower encodes text from now on; None: as open_clip does."""
    if options is not None and not hasattr(tower, "short_options"):
        tower.__class__ = _short_class(tower.__class__, METHODS[original_class(tower)])
    if hasattr(tower, "short_options"):
        tower.short_options = options


@contextmanager
def use_options(tower: Any, options: Options | None) -> Iterator[None]:
    """`set_options` within a block."""
    before = tower.__class__, vars(tower).pop("short_options", None)
    set_options(tower, options)
    try:
        yield
    finally:
        vars(tower).pop("short_options", None)
        tower.__class__ = before[0]
        set_options(tower, before[1])


# The method that open_clip's forward calls: CLIP's is _encode_text in 4.x, encode_text before
METHODS: dict[type, str] = {
    CLIP: "_encode_text" if hasattr(CLIP, "_encode_text") else "encode_text",
    TextTransformer: "forward",
}
# the names by which pickle finds these classes
ShortCLIP, ShortTextTransformer = (_short_class(*method) for method in METHODS.items())
