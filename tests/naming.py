"""Messages are recognised by what they name (a flag, a file, a tensor, a class, a number), not by their wording."""

import re


def naming(*words: object) -> str:
    """A pattern for `pytest.raises(match=...)`: all words occur, in any order, each as a whole."""
    return "(?s)" + "".join(f"(?=.*{_whole(str(word))})" for word in words)


def says(text: str, *words: object) -> bool:
    """Whether one line of a text names all of the words."""
    return any(re.search(naming(*words), line) for line in text.splitlines())


def _whole(word: str) -> str:
    """Not a part of a longer word, flag or number: --lock-text is not --lock-text-freeze-layer-norm, 1 is not 10."""
    before = r"(?<![\w-])" if word.startswith("-") else r"(?<!\w)" if re.match(r"\w", word) else ""
    after = r"(?![\w-])" if word.startswith("--") else r"(?!\w)" if re.search(r"\w$", word) else ""
    return before + re.escape(word) + after
