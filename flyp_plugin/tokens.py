"""The tokens of all prompts, made once: a batch's text is then a lookup in an array that worker processes share."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from hashlib import blake2b
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

if TYPE_CHECKING:
    from flyp_plugin.prompts import ClassPrompts

_CHUNK = 16384  # prompts tokenised at once; a process for each in larger sets


class PromptTokens:
    """The tokens of all prompts, end to end in one array, without padding: 21,000 classes x 80 prompts are about 40 MB.

    The array's type is the smallest that holds every token. `take` returns exactly what the tokenizer returned, padded
    to the context length. Worker processes that are forked share the memory; /dev/shm, small in containers, is not used.

    Args:
        tokenizer: list of N texts -> int64 (N, context length), as open_clip.get_tokenizer returns.

    Attributes:
        counts: int64 (C,), the number of prompts of each class.
        length: tokens of the longest prompt.
        cut: the prompts that are longer than the context.
        same: groups of class indices whose prompts all have the same tokens.
    """

    def __init__(self, prompts: "ClassPrompts", tokenizer: Callable):
        empty = tokenizer([""])[0]
        self.context_length, self._pad = len(empty), int(empty[-1])
        self.counts = np.array(prompts.counts())
        per_class = max(1, int(self.counts.mean()))
        loader: DataLoader = DataLoader(
            range(len(self.counts)),  # type: ignore[arg-type]  # a range is a map-style dataset
            batch_size=max(1, _CHUNK // per_class),
            collate_fn=partial(_tokenize_classes, prompts, tokenizer, self._pad),
            num_workers=min(int(self.counts.sum()) // _CHUNK, torch.get_num_threads(), 8),
            generator=torch.Generator(),  # otherwise it would draw from the global generator
        )
        chunks = list(tqdm(loader, desc="tokenising", unit="chunk", disable=None, delay=3))
        tokens, lengths, cut = zip(*chunks)
        self._tokens = np.concatenate(tokens)
        self._ends = np.concatenate(lengths).cumsum()  # of each prompt in _tokens
        self._starts = self._ends - np.concatenate(lengths)
        self._first = self.counts.cumsum() - self.counts  # each class's first prompt
        self.length = int((self._ends - self._starts).max())
        self.cut = [text for some in cut for text in some]
        self.same = self._group_equal_classes()

    def take(self, labels: Sequence[int], numbers: Sequence[int]) -> torch.Tensor:
        """The prompts of B (class index, number of a prompt) pairs: int64 (B, context length)."""
        prompts = self._first[np.asarray(labels)] + np.asarray(numbers)
        positions = self._starts[prompts][:, None] + np.arange(self.length)
        inside = positions < self._ends[prompts][:, None]
        tokens = np.full((len(prompts), self.context_length), self._pad, dtype=np.int64)
        tokens[:, : self.length][inside] = self._tokens[positions[inside]]
        return torch.from_numpy(tokens)

    def _group_equal_classes(self) -> list[list[int]]:
        """Groups of class indices with equal tokens; hashed, because the keys would be a copy of the tokens."""
        groups: dict[bytes, list[int]] = defaultdict(list)
        for label, (first, count) in enumerate(zip(self._first, self.counts)):
            starts, ends = self._starts[first : first + count], self._ends[first : first + count]
            tokens = self._tokens[starts[0] : ends[-1]]
            groups[blake2b((ends - starts).tobytes() + tokens.tobytes()).digest()].append(label)
        return [group for group in groups.values() if len(group) > 1]


def _tokenize_classes(
    prompts: "ClassPrompts", tokenizer: Callable, pad: int, labels: list[int]
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """The tokens of some classes' prompts end to end, their lengths, and the prompts that were truncated."""
    texts = [text for label in labels for text in prompts.texts(label)]
    tokens = tokenizer(texts).numpy()
    context, columns = tokens.shape[1], np.arange(tokens.shape[1])
    lengths = np.where(tokens != pad, columns + 1, 0).max(axis=1)
    full = [texts[row] for row in np.flatnonzero(lengths == context)]  # as long as the context, or longer
    cut = [text for text in full if (tokenizer([text], context_length=2 * context)[0, context:] != pad).any()]
    flat = tokens[columns < lengths[:, None]]
    return flat.astype(np.min_scalar_type(max(int(tokens.max()), pad))), lengths, cut
