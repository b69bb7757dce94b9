"""Class names x templates -> prompts, and the token table of all prompts.

FLYP writes a label as a sentence: the class name in a template, "a photo of a {c}." (section 3). Prompts are text, not
code: `{c}` and `{}` are replaced, nothing is evaluated or formatted. All prompts are tokenised once, into a table that
the loader's workers share, so that a batch's text is an array lookup. Training (data.py), the zero-shot head (heads.py)
and every command get their prompts here.
"""

import logging
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import cache, partial

import numpy as np
import open_clip
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from flyp_plugin.errors import CONTROLS, InputError, escape_control_chars
from flyp_plugin.names import detect_syntax, normalize_name, to_unique_keys
from flyp_plugin.sources import find_all_beside, find_beside, read_lines

_TEMPLATES = {"openai": open_clip.OPENAI_IMAGENET_TEMPLATES, "simple": open_clip.SIMPLE_IMAGENET_TEMPLATES}
DEFAULT_TEMPLATE = "a photo of a {c}."
_PLACEHOLDER = re.compile(r"\{c?\}")
_SHOWN = 5  # classes that a warning names
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
        _check_entries(self.classnames, places[0], "class name")
        _check_entries(self.templates, places[1], "template with {c}")
        for number, template in enumerate(self.templates, 1):
            if not _PLACEHOLDER.search(template):
                raise InputError(
                    f"{places[1]} {number}, {template!r}, has no place for the class name; write {{c}} where it goes."
                )
        keys = to_unique_keys(self.classnames)
        for number, (name, occurrence) in enumerate(keys, 1):
            if occurrence == 2:
                unit, first = places[0].rpartition(" ")[2], keys.index((name, 1)) + 1
                _warn_once(
                    f"{places[0]} {number}, repeats {unit} {first}, {name!r}: no prompt can distinguish them."
                )

    @classmethod
    def from_files(cls, classnames: str | Sequence[str], templates: str | Sequence[str]) -> "ClassPrompts":
        """Read class names and templates from text files or URLs, one per line.

        Args:
            classnames: a path, a URL, `imagenet` (open_clip's list), or the names themselves.
            templates: a path, a URL, `openai` or `simple` (open_clip's lists), one template with its `{c}`, or a list.

        Raises:
            InputError: a file is missing, is not UTF-8, holds Python or JSON, or has a bad line, which is named.
        """
        names = read_classnames(classnames) if isinstance(classnames, str) else classnames
        lines = read_templates(templates) if isinstance(templates, str) else templates
        places = [f"{x}, line" if isinstance(x, str) else "the list, entry" for x in (classnames, templates)]
        return cls(names, lines, (places[0], places[1]))

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
        # equal names already have a warning of their own
        names = [normalize_name(name) for name in self.classnames]
        if same := [group for group in tokens.same if len({names[i] for i in group}) > 1]:
            _log.warning(self.describe_same_tokens(same))
        return tokens

    def describe_same_tokens(self, groups: Sequence[Sequence[int]]) -> str:
        """A sentence on `groups` of class indices whose prompts have the same tokens."""
        shown = "; ".join(
            " and ".join(f"{self.classnames[i][:80]!r} (class {i})" for i in group[:_SHOWN])
            for group in groups[:_SHOWN]
        )
        number = "1 group" if len(groups) == 1 else f"{len(groups)} groups"
        return (
            f"{number} of classes have prompts with the same tokens, so the text tower cannot distinguish "
            f"them: {shown}{', ...' if len(groups) > _SHOWN else ''}; give them names that differ in more than case, "
            "accents' encoding or punctuation."
        )


class PromptTokens:
    """The tokens of all prompts: an integer table (C, T, W) in memory that worker processes share.

    W is the length of the longest prompt, and the type is the smallest that holds every token. `take` returns exactly
    what the tokenizer returned, padded to the context length.

    Args:
        prompts: the class prompts.
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
        self.same = _group_equal_rows(self.table)

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
    full = [
        texts[row] for row in np.flatnonzero(tokens[:, -1] != pad)
    ]  # they fill the context, or are longer
    cut = [text for text in full if (tokenizer([text], context_length=2 * length)[0, length:] != pad).any()]
    return tokens[:, :width].astype(np.min_scalar_type(max(int(tokens.max()), pad))), cut


def _group_equal_rows(table: np.ndarray) -> list[list[int]]:
    """Groups of indices along the first axis whose parts are equal. Most classes differ in the first template."""
    groups = [list(range(len(table)))]
    for parts in (table[:, 0], table):
        finer: dict[bytes, list[int]] = defaultdict(list)
        for row in (row for group in groups for row in group):
            finer[parts[row].tobytes()].append(row)
        groups = [group for group in finer.values() if len(group) > 1]
    return groups


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
        raise InputError(
            f"there is no classnames.txt beside {shards[0]} or in the folder above; give the class names with "
            "--classnames FILE."
        )
    templates = templates or find_beside(shards, "zeroshot_classification_templates.txt")
    if templates is None:
        _log.info(f"No templates beside {shards[0]}; the prompts are '{DEFAULT_TEMPLATE}'.")
    prompts = ClassPrompts.from_files(classnames, templates or DEFAULT_TEMPLATE)
    given = {key: line for line, key in enumerate(to_unique_keys(prompts.classnames), 1)}
    for path in own:
        for line, key in enumerate(to_unique_keys(read_lines(path) or []), 1):
            if given.get(key, line) != line:
                raise InputError(
                    f"{key[0]!r} is line {given[key]} of {classnames} and line {line} of {path}; the labels in the "
                    "shards are line numbers of the latter, so list the classes in the same order."
                )
    return prompts


def fill(template: str, name: str) -> str:
    """`template` with `name` for each `{c}` or `{}`; all other text stays as it is."""
    return _PLACEHOLDER.sub(lambda _: name, template)


def read_classnames(path: str) -> list[str]:
    """Class names from a path, a URL or `imagenet`; see ClassPrompts.from_files."""
    if path == "imagenet":
        return list(open_clip.IMAGENET_CLASSNAMES)
    names = _read_lines(path, "class names", "--classnames FILE (or imagenet)")
    if len(names) == 1 and re.search("[,;|]", names[0]):
        raise InputError(f"{path} has one line, {names[0][:80]!r}; write one class name on each line.")
    return names


def read_templates(templates: str) -> list[str]:
    """Templates from a path, a URL, the name of open_clip's list, or one template; see ClassPrompts.from_files."""
    if templates in _TEMPLATES:  # open_clip has them as functions of the name
        return [template("{c}") for template in _TEMPLATES[templates]]
    if _PLACEHOLDER.search(templates):
        _refuse_code([templates], f"the template {templates[:80]!r}", "templates")
        return [templates]
    return _read_lines(templates, "templates", "--templates FILE (or openai, simple, or a template with {c})")


def _read_lines(path: str, what: str, flag: str) -> list[str]:
    lines = read_lines(path)
    if lines is None:
        raise InputError(f"there is no file {path} with {what}; give one with {flag}.")
    _refuse_code(lines, path, what)
    return lines


def _refuse_code(lines: list[str], place: str, what: str) -> None:
    """Refuse a list in another syntax: the text tower would read its quotes and commas."""
    if (syntax := detect_syntax(lines)) is not None:
        example = DEFAULT_TEMPLATE if what == "templates" else "golden retriever"
        raise InputError(
            f"{place} is {syntax} ({escape_control_chars(lines[0][:40])!r}, ...); write each of the {what} on a line "
            f"of its own, without quotes, brackets, bullets or numbers around it: {example}"
        )


def _check_entries(entries: Sequence[str], place: str, what: str) -> None:
    if not any(entry.strip() for entry in entries):
        raise InputError(f"{place.rpartition(',')[0]} is empty; give at least one {what}.")
    for number, entry in enumerate(entries, 1):
        if not entry.strip():
            raise InputError(f"{place} {number}, is blank; write a {what} there, or delete it.")
        if CONTROLS.search(entry):
            raise InputError(f"{place} {number}, {entry[:80]!r}, contains a control character; delete it.")


@cache  # the same list is read for every set that has it
def _warn_once(message: str) -> None:
    _log.warning(message)
