"""The repository's Markdown pages and the commands in them."""

import re
from collections.abc import Iterator
from pathlib import Path

REPO = Path(__file__).parents[1]
PAGES = {
    name: (REPO / name).read_text()
    for name in (
        "README.md",
        "CHANGELOG.md",
        *(f"tests/{each}/README.md" for each in ("bench", "faults", "gpu")),
    )
}
README, BENCH = PAGES["README.md"], PAGES["tests/bench/README.md"]


def section(page: str, heading: str) -> str:
    return page.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]


def code(text: str) -> list[str]:
    """The lines of indented blocks, with continued lines joined."""
    lines = re.findall(r"^ {4,}(?=\S)((?:.*\\\n)*.*)$", text, re.MULTILINE)
    return [re.sub(r"\s*\\\n\s*", " ", line) for line in lines]


def steps(text: str) -> Iterator[str]:
    """The commands of indented blocks as bash reads them: with continued lines and here-documents."""
    lines = iter([line[4:] for line in text.splitlines() if line.startswith("    ")])
    for step in lines:
        while step.endswith("\\"):
            step += "\n" + next(lines)
        if end := re.search(r"<<'(\w+)'$", step):
            for line in lines:
                step += "\n" + line
                if line == end[1]:
                    break
        yield step
