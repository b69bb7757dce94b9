"""Class names x templates -> prompts, and their tokens in one table. Not for images, labels or models."""

import logging
import math
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import open_clip
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from flyp_plugin.errors import CONTROLS, InputError, escape_control_chars
from flyp_plugin.names import normal, numbered, repeated_names, what_else
from flyp_plugin.sources import find_all_beside, find_beside, read_lines

CLASSNAMES = {"imagenet": open_clip.IMAGENET_CLASSNAMES}
TEMPLATES = {"openai": open_clip.OPENAI_IMAGENET_TEMPLATES, "simple": open_clip.SIMPLE_IMAGENET_TEMPLATES}
DEFAULT_TEMPLATE = "a photo of a {c}."
_PLACE = re.compile(r"\{c?\}")
_SHOWN = 5  # of the classes that a warning names
_CHUNK = 16384  # prompts tokenised at once; above this number several processes share the work
_log = logging.getLogger(__name__)


class ClassPrompts:
    """The prompts of a classification set: every class name in every template (FLYP, section 3).

    Args:
        classnames: C names; a name's position is its class index. A name that is there twice is a warning.
        templates: T templates; `{c}` or `{}` is where the class name goes. Nothing else in braces is touched.
        places: where the two lists are from, for messages.

    Raises:
        InputError: an empty list, a blank name, one text in place of a list, or a template without a place for the
            class.

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
            raise InputError("class names and templates are lists; give ['cat', 'dog'], not one text.")
        self.classnames = list(classnames)
        self.templates = list(templates)
        _check_classnames(self.classnames, places[0])
        _check_templates(self.templates, places[1])

    @classmethod
    def from_files(cls, classnames: str | Sequence[str], templates: str | Sequence[str]) -> "ClassPrompts":
        """Read class names and templates, one a line, from files or URLs.

        Args:
            classnames: a path, a URL, `imagenet` (open_clip's list), or the names themselves.
            templates: a path, a URL, `openai` or `simple` (open_clip's lists), one template, with its `{c}`, or several.

        Raises:
            InputError: a file that is not there, is not UTF-8, is Python or JSON in place of a name or template a
                line, or has a mistake in it, with its line.
        """
        places = [
            f"{it}, line" if isinstance(it, str) else "the list, entry" for it in (classnames, templates)
        ]
        if not isinstance(classnames, str):
            classes = list(classnames)
        elif classnames in CLASSNAMES:
            classes = list(CLASSNAMES[classnames])
        else:
            classes = _read_lines(classnames, "class names", "--classnames", list(CLASSNAMES))
        lines = read_templates(templates) if isinstance(templates, str) else templates
        return cls(classes, lines, (places[0], places[1]))

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
        """All prompts through `tokenizer` (open_clip.get_tokenizer's) once; see PromptTokens.

        A warning names what the text tower cannot see: prompts that are cut, and classes of the same tokens.
        """
        tokens = PromptTokens(self, tokenizer)
        if tokens.cut:
            _log.warning(
                f"{len(tokens.cut)} of {len(self)} prompts are longer than the model's {tokens.context_length} tokens "
                f"and are cut there, the first of them: {tokens.cut[0][:80]!r}"
            )
        same = [group for group in tokens.same if len({normal(self.classnames[i]) for i in group}) > 1]
        if same:  # equal names have been named before
            _log.warning(self.describe_same_tokens(same))
        return tokens

    def describe_same_tokens(self, groups: Sequence[Sequence[int]]) -> str:
        """A sentence on `groups` of class indices whose prompts have the same tokens."""
        shown = "; ".join(
            " and ".join(f"{self.classnames[i][:80]!r} (class {i})" for i in group[:_SHOWN])
            for group in groups[:_SHOWN]
        )
        more = f"; and {len(groups) - _SHOWN} more" if len(groups) > _SHOWN else ""
        number = "classes have" if len(groups) == 1 else f"{len(groups)} groups of classes have each"
        return (
            f"{number} prompts of the same tokens, so the text tower cannot tell them apart: {shown}{more}; give them "
            "names that differ in more than case, accents' encoding or punctuation marks."
        )


class PromptTokens:
    """The tokens of all prompts: an integer table (C, T, W) in memory that worker processes share.

    W is the longest prompt's number of tokens and the type the smallest that holds every token; `take` gives
    back what the tokenizer gave, padded to the model's context length.

    Args:
        prompts: the class prompts.
        tokenizer: list of N texts -> int64 (N, context length), as open_clip.get_tokenizer gives.

    Attributes:
        cut: the prompts that are longer than the context.
        same: groups of class indices whose prompts have the same tokens in every template.
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
        self.cut = [prompt for _, cut_here in parts for prompt in cut_here]
        self.same = _equal_rows(self.table)

    @property
    def table(self) -> np.ndarray:
        """The tokens, shape (C, T, W)."""
        return self._bytes.numpy().view(self._type).reshape(self._shape)

    def take(self, labels: Sequence[int], templates: Sequence[int]) -> torch.Tensor:
        """The prompts of B (class index, template number) pairs: int64 (B, context length)."""
        tokens = np.full((len(labels), self.context_length), self._pad, dtype=np.int64)
        tokens[:, : self._shape[2]] = self.table[np.asarray(labels), np.asarray(templates)]
        return torch.from_numpy(tokens)


def _equal_rows(table: np.ndarray) -> list[list[int]]:
    """Groups of indices along the first axis whose parts are equal; almost all are told apart by their first row."""
    groups: dict[bytes, list[int]] = defaultdict(list)
    for row in range(len(table)):
        groups[table[row, 0].tobytes()].append(row)
    wholes: dict[bytes, list[int]] = defaultdict(list)
    for row in (row for group in groups.values() if len(group) > 1 for row in group):
        wholes[table[row].tobytes()].append(row)
    return [group for group in wholes.values() if len(group) > 1]


class _Chunks(Dataset):
    """Some classes' prompts at a time: tokens (rows, width) without common padding, and the prompts that were cut."""

    def __init__(self, prompts: ClassPrompts, tokenizer: Callable, pad: int):
        self.prompts, self.tokenizer, self.pad = prompts, tokenizer, pad
        self.classes = max(1, _CHUNK // len(prompts.templates))

    def __len__(self) -> int:
        return math.ceil(len(self.prompts.classnames) / self.classes)

    def __getitem__(self, item: int) -> tuple[np.ndarray, list[str]]:
        classes = self.prompts.classnames[item * self.classes :][: self.classes]
        texts = [fill(template, name) for name in classes for template in self.prompts.templates]
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
    own = find_all_beside(shards, "classnames.txt") if classnames else []
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


def _check_order(given: list[str], path: str | Sequence[str], own: str) -> None:
    """InputError where a name that is given is another line of the list beside the shards, which their labels number."""
    here = {key: line for line, key in enumerate(numbered(given), 1)}
    for line, key in enumerate(numbered(read_lines(own) or []), 1):
        if here.get(key, line) != line:
            raise InputError(
                f"{key[0]!r} is line {here[key]} of {path} and line {line} of {own}; the labels in the shards are line "
                "numbers of the latter, so give the same order."
            )


def fill(template: str, name: str) -> str:
    """`template` with `name` in each place marked `{c}` or `{}`; all other text is left as it is."""
    return _PLACE.sub(lambda _: name, template)


def read_templates(templates: str) -> list[str]:
    """Templates by a path, a URL, the name of open_clip's list, or one template itself; see ClassPrompts.from_files."""
    if templates in TEMPLATES:  # functions of the name, in open_clip
        return [template("{c}") for template in TEMPLATES[templates]]
    if _PLACE.search(templates):
        _refuse_code([templates], f"the template {templates[:80]!r}", "templates")
        return [templates]
    return _read_lines(templates, "templates", "--templates", list(TEMPLATES))


def _read_lines(path: str, what: str, flag: str, builtin: list[str]) -> list[str]:
    lines = read_lines(path)
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
    _refuse_code(lines, path, what)
    if what == "class names" and len(lines) == 1 and re.search("[,;|]", lines[0]):
        raise InputError(
            f"{path} has one line, {lines[0][:80]!r}, which would be one class; write one of the {what} on each line."
        )
    return lines


def _refuse_code(lines: list[str], place: str, what: str) -> None:
    """InputError where a list is in another syntax: the text tower would read the quote marks and commas."""
    if (form := what_else(lines)) is not None:
        example = "a photo of a {c}." if what == "templates" else "golden retriever"
        raise InputError(
            f"{place} is {form} ({escape_control_chars(lines[0][:40])!r}, ...); write each of the {what} on a line of its own, with "
            f"nothing around it: {example}"
        )


def _check_classnames(classes: list[str], place: str) -> None:
    if not classes:
        raise InputError(f"{place.rpartition(',')[0]} is empty; give at least one class name.")
    for number, name in enumerate(classes, 1):
        if not name.strip():
            raise InputError(f"{place} {number}, is blank; write the class name there.")
        _check_text(name, place, number)
    for name, positions in repeated_names(classes).items():
        _warn_once(
            f"{place} {positions[1] + 1}, repeats the class name {name!r} of {place.rpartition(' ')[2]} "
            f"{positions[0] + 1}: no prompt can tell the two classes apart."
        )


@cache  # a list is read for each set that has it
def _warn_once(what: str) -> None:
    _log.warning(what)


def _check_templates(templates: list[str], place: str) -> None:
    if not templates:
        raise InputError(
            f"{place.rpartition(',')[0]} is empty; give at least one template, such as 'a photo of a {{c}}.'."
        )
    for number, template in enumerate(templates, 1):
        _check_text(template, place, number)
        if not _PLACE.search(template):
            raise InputError(
                f"{place} {number}, {template!r}, has no place for the class name; write {{c}} where it goes."
            )


def _check_text(text: str, place: str, number: int) -> None:
    if CONTROLS.search(text):
        raise InputError(f"{place} {number}, {text[:80]!r}, has a control character in it; write text alone.")
