"""Tars and their servers for the tests: small shards of numbered digits, whole, cut short or broken on purpose."""

import io
import tarfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from PIL import Image
from sklearn.datasets import load_digits

NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


@cache
def _digits():
    return load_digits()


def label(number: int) -> int:
    return int(_digits().target[number])


@cache
def png(number: int, form: str = "PNG") -> bytes:
    """A digit as an RGB image whose first pixel gives its number (but for a JPEG's losses)."""
    image = Image.fromarray((_digits().images[number] * 15.9).astype("uint8")).convert("RGB")
    image.putpixel((0, 0), (number // 256, number % 256, 0))
    raw = io.BytesIO()
    image.save(raw, form)
    return raw.getvalue()


def number_of(image: Image.Image) -> int:
    high, low, _ = image.getpixel((0, 0))
    return high * 256 + low


def tar(members: Mapping[str, bytes]) -> bytes:
    return tar_of(members.items())


def tar_of(members: Iterable[tuple[str, bytes]]) -> bytes:
    """A tar of (name, content) pairs; a name may be there twice."""
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as file:
        for name, content in members:
            header = tarfile.TarInfo(name)
            header.size = len(content)
            file.addfile(header, io.BytesIO(content))
    return raw.getvalue()


def samples(numbers, **changed: bytes) -> dict[str, bytes]:
    """Members of good samples s0007.png, s0007.cls, ...; `changed` are members instead, by s0007_cls."""
    members = {}
    for number in numbers:
        for ending, content in (("png", png(number)), ("cls", str(label(number)).encode())):
            members[f"s{number:04d}.{ending}"] = changed.get(f"s{number:04d}_{ending}", content)
    return members


def write(path: Path, content: bytes | Mapping[str, bytes] | Iterable[tuple[str, bytes]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else tar(dict(content)))
    return str(path)


def shards(folder: Path, number: int, num_shards: int, first: int = 0) -> list[str]:
    """`number` samples, dealt out to `num_shards` tars 0.tar, 1.tar, ..."""
    numbers = range(first, first + number)
    return [write(folder / f"{i}.tar", samples(numbers[i::num_shards])) for i in range(num_shards)]


def data_folder(folder: Path, number: int, num_shards: int, templates=("a photo of a {c}.",)) -> Path:
    """classnames.txt, templates and train/ with nshards.txt, as CLIP_benchmark has it."""
    (folder / "train").mkdir(parents=True)
    (folder / "classnames.txt").write_text("\n".join(NAMES) + "\n")
    (folder / "zeroshot_classification_templates.txt").write_text("\n".join(templates) + "\n")
    (folder / "train" / "nshards.txt").write_text(f"{num_shards}\n")
    shards(folder / "train", number, num_shards)
    return folder


@contextmanager
def served(files: Mapping[str, bytes | int], cut: Mapping[str, int] = {}) -> Iterator[tuple[str, list[str]]]:
    """(address, the paths asked for so far) of a server of `files`; a number is an HTTP status.

    `cut` files break off after so many bytes, though the header says how long they are.
    """
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            content = files.get(self.path, 404)
            if isinstance(content, int):
                return self.send_error(content)
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: cut.get(self.path)])

        def log_message(self, *args):
            pass

    with listening(Handler) as url:
        yield url, asked


@contextmanager
def answering(
    answer: Callable[[BaseHTTPRequestHandler], tuple[int, Mapping[str, str], bytes]],
) -> Iterator[str]:
    """The address of a server that sends what `answer` gives for a request: status, headers and content."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            status, headers, content = answer(self)
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content if self.command == "GET" else b"")

        do_HEAD = do_POST = do_GET

        def log_message(self, *args):
            pass

    with listening(Handler) as url:
        yield url


@contextmanager
def listening(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
