"""Class names x templates -> prompts, and the token table of all prompts.

FLYP writes a label as a sentence: the class name in a template, "a photo of a {c}." (section 3). Prompts are text, not
code: `{c}` and `{}` are replaced, nothing is evaluated or formatted. All prompts are tokenised once, into a table that
the loader's workers share, so that a batch's text is an array lookup. Training (data.py), the zero-shot head (heads.py)
and every command get their prompts here.
"""

import json
import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from hashlib import blake2b
from pathlib import Path

import numpy as np
import open_clip
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from flyp_plugin.errors import InputError
from flyp_plugin.names import PLACEHOLDER, check_list, check_order, check_syntax, describe_same_tokens
from flyp_plugin.sources import find_all_beside, find_beside, read_lines

DEFAULT_TEMPLATE = "a photo of a {c}."
_BUILT_IN = {
    "class names": {"imagenet": open_clip.IMAGENET_CLASSNAMES},
    "templates": {  # open_clip has them as functions of the name
        "openai": [template("{c}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES],
        "simple": [template("{c}") for template in open_clip.SIMPLE_IMAGENET_TEMPLATES],
        # the FLYP paper's, from its authors' code; all but fmow and iwildcam are CLIP's own prompts for these sets
        **json.loads(Path(__file__).with_name("templates.json").read_text("utf-8")),
    },
}
_CHUNK = 16384  # prompts tokenised at once; a process for each in larger sets
_log = logging.getLogger(__name__)


class ClassPrompts:
    """The prompts of a classification set: every class name in every template (FLYP, section 3).

    Args:
        classnames: C names; the position of a name is its class index. Repeated names are logged as a warning.
        templates: T templates; `{c}` or `{}` marks the class name. Any other braces are text.
        places: where the lists come from, for messages.

    Raises:
        InputError: a list is empty or a single string, an entry is blank or has control characters, or a template has
            no place for the class name.

    Example:
        >>> prompts = ClassPrompts(["cat", "dog"], ["a photo of a {c}.", "a sketch of a {c}."])
        >>> prompts(1, 0)
        'a photo of a dog.'
    """

    def __init__(
        self,
        classnames: Sequence[str],
        templates: Sequence[str],
        places: tuple[str, str] = ("the list of class names, entry", "the list of templates, entry"),
    ):
        if isinstance(classnames, str) or isinstance(templates, str):
            raise InputError("classnames and templates must be lists such as ['cat', 'dog'], got a string.")
        self.classnames, self.templates = list(classnames), list(templates)
        check_list(self.classnames, places[0], "class names")
        check_list(self.templates, places[1], "templates")

    @classmethod
    def from_files(cls, classnames: str | Sequence[str], templates: str | Sequence[str]) -> "ClassPrompts":
        """Read class names and templates from text files or URLs, one per line.

        Args:
            classnames: a path, a URL, `imagenet` (open_clip's list), or the names themselves.
            templates: a path, a URL, `openai` or `simple` (open_clip's lists), a set of the paper (a key of templates.json,
                such as `fmow`), one template with its `{c}`, or a list.

        Raises:
            InputError: a file is missing, is not UTF-8, holds Python or JSON, or has a bad line, which is named.
        """
        names, names_place = _read_list(classnames, "class names")
        lines, lines_place = _read_list(templates, "templates")
        return cls(names, lines, (names_place, lines_place))

    def __call__(self, label: int, template: int) -> str:
        """The prompt of class index `label` in template number `template`."""
        return fill(self.templates[template], self.classnames[label])

    def __len__(self) -> int:
        """Number of prompts, C x T."""
        return len(self.classnames) * len(self.templates)

    def template_functions(self) -> list[Callable[[str], str]]:
        """The templates as functions of a class name, as open_clip.build_zero_shot_classifier takes them."""
        return [partial(fill, template) for template in self.templates]

    def tokenize(self, tokenizer: Callable) -> "PromptTokens":
        """Tokenise all prompts; see PromptTokens. Warns of truncated prompts and of classes with equal tokens."""
        tokens = PromptTokens(self, tokenizer)
        if tokens.cut:
            _log.warning(
                f"{len(tokens.cut)} of {len(self)} prompts are longer than the model's {tokens.context_length} tokens "
                f"and are truncated, the first: {tokens.cut[0][:80]!r}"
            )
        if message := describe_same_tokens(self.classnames, tokens.same):
            _log.warning(message)
        return tokens


class PromptTokens:
    """The tokens of all prompts: an integer table (C, T, W) in memory that worker processes share.

    W is the length of the longest prompt, and the type is the smallest that holds every token. `take` returns exactly
    what the tokenizer returned, padded to the context length.

    Args:
        tokenizer: list of N texts -> int64 (N, context length), as open_clip.get_tokenizer returns.

    Attributes:
        cut: the prompts that are longer than the context.
        same: groups of class indices whose prompts have the same tokens in every template.
    """

    def __init__(self, prompts: ClassPrompts, tokenizer: Callable):
        empty = tokenizer([""])[0]
        self.context_length, self._pad = len(empty), int(empty[-1])
        loader: DataLoader = DataLoader(
            prompts.classnames,  # type: ignore[arg-type]  # a list is a map-style dataset
            batch_size=max(1, _CHUNK // len(prompts.templates)),
            collate_fn=partial(_tokenize_chunk, prompts.templates, tokenizer, self._pad),
            num_workers=min(len(prompts) // _CHUNK, torch.get_num_threads(), 8),
            generator=torch.Generator(),  # otherwise it would draw from the global generator
        )
        chunks = list(tqdm(loader, desc="tokenising", unit="chunk", disable=None, delay=3))
        width = max(tokens.shape[1] for tokens, _ in chunks)
        padded = [np.pad(t, ((0, 0), (0, width - t.shape[1])), constant_values=self._pad) for t, _ in chunks]
        table = np.concatenate(padded).reshape(len(prompts.classnames), len(prompts.templates), width)
        # shared as bytes, which numpy reads: torch supports few operations on unsigned types
        self._type, self._bytes = table.dtype, torch.from_numpy(table.view(np.uint8)).share_memory_()
        self.cut = [text for _, cut in chunks for text in cut]
        self.same = _group_equal_classes(table)

    @property
    def table(self) -> np.ndarray:
        """The tokens, shape (C, T, W)."""
        return self._bytes.numpy().view(self._type)

    def take(self, labels: Sequence[int], templates: Sequence[int]) -> torch.Tensor:
        """The prompts of B (class index, template number) pairs: int64 (B, context length)."""
        tokens = np.full((len(labels), self.context_length), self._pad, dtype=np.int64)
        tokens[:, : self.table.shape[2]] = self.table[np.asarray(labels), np.asarray(templates)]
        return torch.from_numpy(tokens)


def _tokenize_chunk(
    templates: list[str], tokenizer: Callable, pad: int, names: list[str]
) -> tuple[np.ndarray, list[str]]:
    """Tokens (rows, width) of some classes' prompts, without common padding, and the prompts that were truncated."""
    texts = [fill(template, name) for name in names for template in templates]
    tokens = tokenizer(texts).numpy()
    length, width = tokens.shape[1], int(np.flatnonzero((tokens != pad).any(axis=0))[-1]) + 1
    full = [texts[row] for row in np.flatnonzero(tokens[:, -1] != pad)]  # as long as the context, or longer
    cut = [text for text in full if (tokenizer([text], context_length=2 * length)[0, length:] != pad).any()]
    return tokens[:, :width].astype(np.min_scalar_type(max(int(tokens.max()), pad))), cut


def _group_equal_classes(table: np.ndarray) -> list[list[int]]:
    """Groups of class indices with equal tokens; hashed, because the keys would be a copy of the table."""
    groups: dict[bytes, list[int]] = defaultdict(list)
    for label, tokens in enumerate(table):
        groups[blake2b(tokens.tobytes()).digest()].append(label)
    return [group for group in groups.values() if len(group) > 1]


def resolve_prompts(
    shards: Sequence[str],
    classnames: str | Sequence[str] | None = None,
    templates: str | Sequence[str] | None = None,
) -> ClassPrompts:
    """The prompts of `shards`: the lists given, or else the text files beside the shards or one folder above.

    Args:
        shards: tar URLs.
        classnames, templates: as for `ClassPrompts.from_files`; by default, classnames.txt and
            zeroshot_classification_templates.txt of the shards. Without templates, 'a photo of a {c}.'.

    Raises:
        InputError: there are no class names, a file has a mistake in it, or `classnames` orders a name differently than
            classnames.txt of the shards: their labels, which are line numbers there, would mean other classes.
    """
    own = find_all_beside(shards, "classnames.txt") if classnames else []
    classnames = classnames or find_beside(shards, "classnames.txt")
    if classnames is None:
        raise InputError(f"no classnames.txt beside {shards[0]} or one folder above; pass --classnames FILE.")
    templates = templates or find_beside(shards, "zeroshot_classification_templates.txt")
    if templates is None:
        _log.info(f"No templates beside {shards[0]}; the prompts are '{DEFAULT_TEMPLATE}'.")
    prompts = ClassPrompts.from_files(classnames, templates or DEFAULT_TEMPLATE)
    for path in own:
        check_order(prompts.classnames, str(classnames), read_lines(path) or [], path)
    return prompts


def fill(template: str, name: str) -> str:
    """`template` with `name` for each `{c}` or `{}`; all other text stays as it is."""
    return PLACEHOLDER.sub(lambda _: name, template)


def _read_list(source: str | Sequence[str], what: str) -> tuple[Sequence[str], str]:
    """The entries of a list of "class names" or "templates", as ClassPrompts.from_files takes it, and its place."""
    if not isinstance(source, str):
        return source, f"the list of {what}, entry"
    place, is_template = f"{source}, line", what == "templates" and bool(PLACEHOLDER.search(source))
    if source in _BUILT_IN[what]:
        return _BUILT_IN[what][source], place
    lines = [source] if is_template else read_lines(source)
    if lines is None:
        flag = "--classnames FILE" if what == "class names" else "--templates FILE, or a template with {c}"
        raise InputError(
            f"there is no file {source} with {what}; give {flag} (or {', '.join(_BUILT_IN[what])})."
        )
    check_syntax(lines, f"the template {source[:80]!r}" if is_template else source, what)
    return lines, place
