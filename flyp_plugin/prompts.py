"""Class names x templates -> prompts, and their tokens in one table. Not for images, labels or models."""

import logging
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import open_clip
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from flyp_plugin.errors import CONTROLS, InputError
from flyp_plugin.sources import all_beside, find_beside, lines_of

CLASSNAMES = {"imagenet": open_clip.IMAGENET_CLASSNAMES}
TEMPLATES = {"openai": open_clip.OPENAI_IMAGENET_TEMPLATES, "simple": open_clip.SIMPLE_IMAGENET_TEMPLATES}
DEFAULT_TEMPLATE = "a photo of a {c}."
_PLACE = re.compile(r"\{c?\}")
_CHUNK = 16384  # prompts tokenised at once; above this number several processes share the work
_log = logging.getLogger(__name__)


class ClassPrompts:
    """The prompts of a classification set: every class name in every template (FLYP, section 3).

    Args:
        classnames: C names; a name's position is its class index.
        templates: T templates; `{c}` or `{}` is where the class name goes. Nothing else in braces is touched.

    Raises:
        InputError: an empty list, a name given twice, or a template without a place for the class.

    Example:
        >>> prompts = ClassPrompts(["cat", "dog"], ["a photo of a {c}.", "a sketch of a {c}."])
        >>> prompts(1, 0)
        'a photo of a dog.'
    """

    def __init__(self, classnames: Sequence[str], templates: Sequence[str]):
        self.classnames = list(classnames)
        self.templates = list(templates)
        _check_classnames(self.classnames, "the list of class names", "entry")
        _check_templates(self.templates, "the list of templates", "entry")

    @classmethod
    def from_files(cls, classnames: str | Sequence[str], templates: str | Sequence[str]) -> "ClassPrompts":
        """Read class names and templates, one a line, from files or URLs.

        Args:
            classnames: a path, a URL, `imagenet` (open_clip's list), or the names themselves.
            templates: a path, a URL, `openai` or `simple` (open_clip's lists), one template, with its `{c}`, or several.

        Raises:
            InputError: a file that is not there, is not UTF-8 or has a mistake in it, with its line.
        """
        if not isinstance(classnames, str):
            names = list(classnames)
        elif classnames in CLASSNAMES:
            names = list(CLASSNAMES[classnames])
        else:
            names = _read_lines(classnames, "class names", "--classnames", list(CLASSNAMES))
            _check_classnames(names, classnames, "line")
        if not isinstance(templates, str):
            lines = list(templates)
        elif templates in TEMPLATES:  # functions of the name, in open_clip
            lines = [template("{c}") for template in TEMPLATES[templates]]
        elif _PLACE.search(templates):
            lines = [templates]
        else:
            lines = _read_lines(templates, "templates", "--templates", list(TEMPLATES))
            _check_templates(lines, templates, "line")
        return cls(names, lines)

    def __call__(self, label: int, template: int) -> str:
        """The prompt of class index `label` in template number `template`."""
        return fill(self.templates[template], self.classnames[label])

    def __len__(self) -> int:
        """Number of prompts, C x T."""
        return len(self.classnames) * len(self.templates)

    def template_functions(self) -> list[Callable[[str], str]]:
        """The templates as functions of a class name, as open_clip.build_zero_shot_classifier takes them."""
        return [lambda name, template=template: fill(template, name) for template in self.templates]  # type: ignore[misc]

    def tokenize(self, tokenizer: Callable) -> "PromptTokens":
        """All prompts through `tokenizer` (open_clip.get_tokenizer's) once; see PromptTokens."""
        return PromptTokens(self, tokenizer)


class PromptTokens:
    """The tokens of all prompts: an integer table (C, T, W) in memory that worker processes share.

    W is the longest prompt's number of tokens and the type the smallest that holds every token; `take` gives
    back what the tokenizer gave, padded to the model's context length.

    Args:
        prompts: the class prompts.
        tokenizer: list of N texts -> int64 (N, context length), as open_clip.get_tokenizer gives.
    """

    def __init__(self, prompts: ClassPrompts, tokenizer: Callable):
        empty = tokenizer([""])[0]
        self.context_length, self._pad = len(empty), int(empty[-1])
        chunks = _Chunks(prompts, tokenizer, self._pad)
        workers = 0 if len(prompts) <= _CHUNK else min(len(chunks), torch.get_num_threads(), 8)
        own = torch.Generator()  # else it would draw from the global one
        loader = DataLoader(chunks, batch_size=None, num_workers=workers, collate_fn=as_it_is, generator=own)
        parts = list(tqdm(loader, desc="tokenising", unit="chunk", disable=None, delay=3))
        width = max(part.shape[1] for part, _ in parts)
        self._type = np.result_type(*(part.dtype for part, _ in parts))
        self._shape = (len(prompts.classnames), len(prompts.templates), width)
        # torch can do little with unsigned types: the tensor is the shared bytes, which numpy reads
        size = int(np.prod(self._shape)) * self._type.itemsize
        self._bytes = torch.zeros(size, dtype=torch.uint8).share_memory_()
        rows = self.table.reshape(-1, width)
        rows[:] = self._pad
        start = 0
        for part, _ in parts:
            rows[start : start + len(part), : part.shape[1]] = part
            start += len(part)
        cut = [prompt for _, cut_here in parts for prompt in cut_here]
        if cut:
            _log.warning(
                f"{len(cut)} of {len(prompts)} prompts are longer than the model's {self.context_length} tokens and "
                f"are cut there, the first of them: {cut[0][:80]!r}"
            )

    @property
    def table(self) -> np.ndarray:
        """The tokens, shape (C, T, W)."""
        return self._bytes.numpy().view(self._type).reshape(self._shape)

    def take(self, labels: Sequence[int], templates: Sequence[int]) -> torch.Tensor:
        """The prompts of B (class index, template number) pairs: int64 (B, context length)."""
        tokens = np.full((len(labels), self.context_length), self._pad, dtype=np.int64)
        tokens[:, : self._shape[2]] = self.table[np.asarray(labels), np.asarray(templates)]
        return torch.from_numpy(tokens)


class _Chunks(Dataset):
    """Some classes' prompts at a time: tokens (rows, width) without common padding, and the prompts that were cut."""

    def __init__(self, prompts: ClassPrompts, tokenizer: Callable, pad: int):
        self.prompts, self.tokenizer, self.pad = prompts, tokenizer, pad
        self.classes = max(1, _CHUNK // len(prompts.templates))

    def __len__(self) -> int:
        return math.ceil(len(self.prompts.classnames) / self.classes)

    def __getitem__(self, item: int) -> tuple[np.ndarray, list[str]]:
        names = self.prompts.classnames[item * self.classes :][: self.classes]
        texts = [fill(template, name) for name in names for template in self.prompts.templates]
        tokens = self.tokenizer(texts).numpy()
        used = np.flatnonzero((tokens != self.pad).any(axis=0))
        full = np.flatnonzero(tokens[:, -1] != self.pad)
        narrow = tokens[:, : int(used[-1]) + 1]
        cut = [texts[i] for i in full if self._is_cut(texts[i])]
        return narrow.astype(np.min_scalar_type(int(tokens.max()))), cut

    def _is_cut(self, text: str) -> bool:
        """Whether a prompt that fills the context has more tokens than that."""
        longer = self.tokenizer([text], context_length=2 * len(self.tokenizer([""])[0]))[0]
        return bool((longer[len(longer) // 2 :] != self.pad).any())


def as_it_is(item: Any) -> Any:
    """A DataLoader's collate_fn for what is a batch already."""
    return item


def resolve_prompts(
    shards: Sequence[str],
    classnames: str | Sequence[str] | None = None,
    templates: str | Sequence[str] | None = None,
) -> ClassPrompts:
    """The prompts that belong to `shards`: what is given, or else the text files beside them or one folder above.

    Args:
        shards: tar URLs.
        classnames, templates: as for `ClassPrompts.from_files`; None looks for classnames.txt and
            zeroshot_classification_templates.txt. Without the latter, 'a photo of a {c}.' is the template.

    Raises:
        InputError: there are no class names, or a file has a mistake in it.
    """
    own = all_beside(shards, "classnames.txt") if classnames else []
    classnames = classnames or find_beside(shards, "classnames.txt")
    if classnames is None:
        raise InputError(
            f"there is no classnames.txt beside {shards[0]} or in the folder above; give the class names with "
            "--classnames FILE."
        )
    templates = templates or find_beside(shards, "zeroshot_classification_templates.txt")
    if templates is None:
        _log.info(f"There are no templates beside {shards[0]}; the prompts are '{DEFAULT_TEMPLATE}'.")
    prompts = ClassPrompts.from_files(classnames, templates or DEFAULT_TEMPLATE)
    for path in own:
        _check_order(prompts.classnames, classnames, path)
    return prompts


def _check_order(names: list[str], path: str | Sequence[str], own: str) -> None:
    """InputError where a name that is given is another line of the list beside the shards, which their labels number."""
    there, here = (
        {name: line for line, name in reversed(list(enumerate(some, 1)))}
        for some in (lines_of(own) or [], names)
    )
    for name, line in sorted(there.items(), key=lambda item: item[1]):
        if here.get(name, line) != line:
            raise InputError(
                f"{name!r} is line {here[name]} of {path} and line {line} of {own}; the labels in the shards are line "
                "numbers of the latter, so give the same order."
            )


def fill(template: str, name: str) -> str:
    """`template` with `name` in each place marked `{c}` or `{}`; all other text is left as it is."""
    return _PLACE.sub(lambda _: name, template)


def _read_lines(path: str, what: str, flag: str, builtin: list[str]) -> list[str]:
    lines = lines_of(path)
    if lines is None:
        or_one = ", or one template with {c} in it" if what == "templates" else ""
        raise InputError(
            f"there is no file {path} with {what}; give one with {flag} FILE (or {' or '.join(builtin)}{or_one})."
        )
    if lines == [""]:
        raise InputError(f"{path} is empty; write one of the {what} on each line.")
    if "" in lines:
        raise InputError(
            f"{path}, line {lines.index('') + 1}, is blank; delete the line, or write what belongs there."
        )
    return lines


def _check_classnames(names: list[str], place: str, unit: str) -> None:
    if not names:
        raise InputError(f"{place} is empty; give at least one class name.")
    tolerated = {name for name, count in Counter(CLASSNAMES["imagenet"]).items() if count > 1}
    first: dict[str, int] = {}
    for number, name in enumerate(names, 1):
        if not name.strip():
            raise InputError(f"{place}, {unit} {number}, is blank; write the class name there.")
        _check_text(name, place, unit, number)
        if first.setdefault(name, number) != number and name not in tolerated:
            raise InputError(
                f"{place}, {unit} {number}, repeats the class name {name!r} of {unit} {first[name]}; two classes need "
                "two names, or no prompt can tell them apart."
            )


def _check_templates(templates: list[str], place: str, unit: str) -> None:
    if not templates:
        raise InputError(f"{place} is empty; give at least one template, such as 'a photo of a {{c}}.'.")
    for number, template in enumerate(templates, 1):
        _check_text(template, place, unit, number)
        if not _PLACE.search(template):
            raise InputError(
                f"{place}, {unit} {number}, {template!r}, has no place for the class name; write {{c}} where it goes."
            )


def _check_text(text: str, place: str, unit: str, number: int) -> None:
    if CONTROLS.search(text):
        raise InputError(
            f"{place}, {unit} {number}, {text[:80]!r}, has a control character in it; write text alone."
        )
