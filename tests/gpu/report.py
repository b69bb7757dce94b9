"""What the steps share: their flags, and a report that is printed and written line by line."""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import open_clip
import torch

from tests.bench.step import device_name


def parser(description: str | None) -> argparse.ArgumentParser:
    """The flags that all steps have."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=Path("gpu-tables"), help="folder for the step's table")
    parser.add_argument("--small", action="store_true", help="with little of everything, for a CPU")
    return parser


class Report:
    """Lines of Markdown for FOLDER/NAME.md, each written at once: a step that is killed leaves what it has."""

    def __init__(self, folder: Path, name: str, device: str, seconds: float = 500):
        folder.mkdir(parents=True, exist_ok=True)
        self.path, self.start, self.limit = folder / f"{name}.md", time.monotonic(), seconds
        self.path.write_text("")
        self(
            f"# {name}\n\n{device_name(device)}, torch {torch.__version__}, open_clip {open_clip.__version__}."
        )

    def __call__(self, line: str = "") -> None:
        print(line, flush=True)
        with self.path.open("a") as stream:
            stream.write(f"{line}\n")

    def header(self, *columns: str) -> None:
        self(f"\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")

    def row(self, cells: Sequence[object]) -> None:
        self(f"| {' | '.join(map(str, cells))} |")

    def left(self) -> float:
        """Seconds until the step should end."""
        return self.limit - (time.monotonic() - self.start)
