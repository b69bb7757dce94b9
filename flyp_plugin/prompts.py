"""What the text tower reads for each class: its name in templates, and descriptions of its own.

FLYP pairs an image with a description of its class (section 3). The simplest one is the class name in a template, "a
photo of a {c}."; a class may also have a list of its own, such as a language model's descriptions (CuPL, arXiv 2209.03320).
Prompts are text, not code: `{c}` and `{}` are replaced, nothing is evaluated or formatted. All prompts are tokenised
once (tokens.py), so that a batch's text is an array lookup. Training (data.py), the zero-shot head (heads.py) and every
command get their prompts here.
"""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import open_clip

from flyp_plugin.errors import InputError
from flyp_plugin.names import (
    PLACEHOLDER,
    check_descriptions,
    check_list,
    check_order,
    check_syntax,
    describe_same_tokens,
    normalize_name,
)
from flyp_plugin.remote import read_lines, read_text
from flyp_plugin.sources import CLASSNAMES, DESCRIPTIONS, TEMPLATES, find_all_beside, find_beside
from flyp_plugin.tokens import PromptTokens

Descriptions = Mapping[str, Sequence[str]]  # class name -> prompts of its own
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
_FORM = '{"class name": ["prompt", ...], ...}'
_log = logging.getLogger(__name__)


class ClassPrompts:
    """The prompts of each class: its name in every template, and then its own descriptions.

    Args:
        classnames: C names; the position of a name is its class index. Repeated names are logged as a warning.
        templates: T templates; `{c}` or `{}` marks the class name. Any other braces are text.
        descriptions: {class name: [prompt, ...]}, lists of any length; names are compared as in names.py. Prompts are
            taken as they are; a `{c}` in one is replaced. Names that are not in `classnames` are kept but not used.
        places: where the lists come from, for messages.

    Raises:
        InputError: a list is empty or a single string, an entry is blank or has control characters, a template has no
            place for the class name, or a class has no description.

    Example:
        >>> prompts = ClassPrompts(["cat", "dog"], ["a photo of a {c}."], {"cat": ["a purring pet."], "dog": ["a pet."]})
        >>> prompts.texts(1)
        ['a photo of a dog.', 'a pet.']
    """

    def __init__(
        self,
        classnames: Sequence[str],
        templates: Sequence[str] = (),
        descriptions: Descriptions | None = None,
        *,
        places: Sequence[str] = (
            "the list of class names, entry",
            "the list of templates, entry",
            "descriptions",
        ),
    ):
        if isinstance(classnames, str) or isinstance(templates, str):
            raise InputError("classnames and templates must be lists such as ['cat', 'dog'], got a string.")
        self.classnames, self.templates = list(classnames), list(templates)
        check_list(self.classnames, places[0], "class names")
        if templates or descriptions is None:
            check_list(self.templates, places[1], "templates")
        if descriptions is not None:
            check_descriptions(descriptions, self.classnames, places[2])
        self.descriptions = None if descriptions is None else dict(descriptions)
        self._tokenized: tuple[list, PromptTokens] | None = None
        self._own = {normalize_name(name): texts for name, texts in (descriptions or {}).items()}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tokenized": None}  # tokenizers are large, or cannot be pickled

    @classmethod
    def from_files(
        cls,
        classnames: str | Sequence[str],
        templates: str | Sequence[str] | None = None,
        descriptions: str | Descriptions | None = None,
    ) -> "ClassPrompts":
        """Read class names and templates from text files or URLs, one per line, and descriptions from JSON.

        Args:
            classnames: a path, a URL, `imagenet` (open_clip's list), or the names themselves.
            templates: a path, a URL, `openai` or `simple` (open_clip's lists), a set of the paper (a key of templates.json,
                such as `fmow`), one template with its `{c}`, or a list.
            descriptions: a path, a URL (see `read_descriptions`), or a mapping.

        Raises:
            InputError: a file is missing, is not UTF-8, holds Python or JSON, or has a bad line, which is named.
        """
        names, names_place = _read_list(classnames, "class names")
        lines, lines_place = _read_list(templates or [], "templates")
        place = "descriptions"
        if isinstance(descriptions, str):
            place, descriptions = descriptions, read_descriptions(descriptions)
        return cls(names, lines, descriptions, places=(names_place, lines_place, place))

    @classmethod
    def from_json(
        cls,
        path: str,
        classnames: str | Sequence[str] | None = None,
        templates: str | Sequence[str] | None = None,
    ) -> "ClassPrompts":
        """The descriptions in a JSON file, {class name: [prompt, ...]}, after `templates` if these are given.

        Args:
            path: a path or a URL, as for `read_descriptions`.
            classnames: the class order, as for `from_files`; by default that of the file.
        """
        descriptions = read_descriptions(path)
        return cls.from_files(classnames or list(descriptions), templates, descriptions)

    def texts(self, label: int) -> list[str]:
        """All prompts of class index `label`."""
        name = self.classnames[label]
        own = self._own.get(normalize_name(name), ())
        return [fill(text, name) for text in (*self.templates, *own)]

    def __call__(self, label: int, number: int) -> str:
        """Prompt `number` of class index `label`."""
        return self.texts(label)[number]

    def __len__(self) -> int:
        """Number of prompts of all classes."""
        return sum(self.counts())

    def counts(self) -> list[int]:
        """Number of prompts of each class."""
        own = [len(self._own.get(normalize_name(name), ())) for name in self.classnames]
        return [len(self.templates) + number for number in own]

    def describe(self) -> str:
        """How many prompts there are, for a log."""
        counts, classes = self.counts(), f"{len(self.classnames)} classes"
        if self.descriptions is None:
            return f"{classes} x {len(self.templates)} templates = {len(self)}"
        few = f"{min(counts)} to {max(counts)}" if min(counts) < max(counts) else f"{max(counts)}"
        templates = f" (of which {len(self.templates)} templates)" if self.templates else ""
        return f"{classes} with {few} prompts each{templates}, {sum(counts)} in all"

    def lists(self) -> dict[str, Any]:
        """The arguments that make an equal ClassPrompts, as JSON has them."""
        return {name: getattr(self, name) for name in ("classnames", "templates", "descriptions")}

    def tokenize(self, tokenizer: Callable) -> "PromptTokens":
        """The tokens of all prompts, made once for each tokenizer; see PromptTokens.

        Warns of truncated prompts and of classes with equal tokens.
        """
        key = [tokenizer, *self.classnames, *self.templates]
        if self._tokenized and self._tokenized[0] == key:
            return self._tokenized[1]
        tokens = PromptTokens(self, tokenizer)
        self._tokenized = key, tokens
        if tokens.cut:
            _log.warning(
                f"{len(tokens.cut)} of {len(self)} prompts are longer than the model's {tokens.context_length} tokens "
                f"and are truncated, the first: {tokens.cut[0][:80]!r}"
            )
        if message := describe_same_tokens(self.classnames, tokens.same):
            _log.warning(message)
        return tokens


def resolve_prompts(
    shards: Sequence[str],
    classnames: str | Sequence[str] | None = None,
    templates: str | Sequence[str] | None = None,
    descriptions: str | Descriptions | None = None,
) -> ClassPrompts:
    """The prompts of `shards`: those given, or else by the text files beside the shards or one folder above.

    Templates and descriptions that are given add up, and replace what is beside the shards. Of what is beside them,
    prompts.json replaces the templates.

    Args:
        shards: tar URLs.
        classnames, templates, descriptions: as for `ClassPrompts.from_files`; by default, classnames.txt, and prompts.json
            or zeroshot_classification_templates.txt of the shards. Without any, 'a photo of a {c}.'.

    Raises:
        InputError: there are no class names, a file has a mistake in it, or `classnames` orders a name differently than
            classnames.txt of the shards: their labels, which are line numbers there, would mean other classes.
    """
    own = find_all_beside(shards, CLASSNAMES) if classnames else []
    classnames = classnames or find_beside(shards, CLASSNAMES)
    if classnames is None:
        raise InputError(f"no classnames.txt beside {shards[0]} or one folder above; pass --classnames FILE.")
    if not templates and descriptions is None:
        descriptions = find_beside(shards, DESCRIPTIONS)
        if descriptions is None:
            templates = find_beside(shards, TEMPLATES)
            if templates is None:
                _log.info(f"No templates beside {shards[0]}; the prompts are '{DEFAULT_TEMPLATE}'.")
                templates = DEFAULT_TEMPLATE
    prompts = ClassPrompts.from_files(classnames, templates, descriptions)
    for path in own:
        check_order(prompts.classnames, str(classnames), read_lines(path) or [], path)
    return prompts


def read_descriptions(path: str) -> dict[str, list[str]]:
    """{class name: [prompt, ...]} from a JSON file or URL, as CuPL and DCLIP publish them.

    CLIP_benchmark's cupl_prompts.json, {set: {class name: [prompt, ...]}}, is read as well, if it has one set.

    Raises:
        InputError: there is no such file, it holds other JSON, or a class occurs twice.
    """
    text = read_text(path)
    if text is None:
        raise InputError(f"there is no file {path} with class descriptions; check --prompts.")

    def refuse_repeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(content := dict(pairs)) < len(pairs):
            names = [name for name, _ in pairs]
            repeated = next(name for name in names if names.count(name) > 1)
            raise InputError(f"{path} has {repeated!r} twice; join the two lists.")
        return content

    try:
        content = json.loads(text, object_pairs_hook=refuse_repeated)
    except InputError:  # which is a ValueError
        raise
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON ({error}); --prompts takes {_FORM}.") from None
    if isinstance(content, dict) and content and all(isinstance(value, dict) for value in content.values()):
        if len(content) > 1:
            sets = ", ".join(map(repr, [*content][:5]))
            raise InputError(
                f"{path} has the prompts of several sets ({sets}); copy one of them to a file of its own."
            )
        (content,) = content.values()
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a JSON {type(content).__name__}; --prompts takes {_FORM}.")
    return content


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
