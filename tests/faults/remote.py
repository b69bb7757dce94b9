"""Training from a server that is slow, answers 500, cuts connections, stalls and goes away for a while.

    python -m tests.faults.remote          # two minutes; a table, and status 1 where something differs

Each row is an epoch of ClassPromptDataset with two workers over a local server's shards, by http(s) addresses and by
`pipe:curl`. A server's fault is drawn for each request, the same in each run.
"""

import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from flyp_plugin import ClassPromptDataset, ClassPrompts, remote
from tests import tars
from tests.faults.data import attempt, pixels, tokens

SHARDS, SAMPLES = 8, 160
Answer = Callable[[BaseHTTPRequestHandler, bytes, float], None]  # the request, the file and a random number


def good(request: BaseHTTPRequestHandler, content: bytes, drawn: float = 1.0, pause: float = 0.0) -> None:
    request.send_response(200)
    request.send_header("Content-Length", str(len(content)))
    request.end_headers()
    for start in range(0, len(content), 4096):
        request.wfile.write(content[start : start + 4096])
        time.sleep(pause)


def slow(request: BaseHTTPRequestHandler, content: bytes, drawn: float) -> None:
    good(request, content, pause=0.02)


def failing(request: BaseHTTPRequestHandler, content: bytes, drawn: float) -> None:
    request.send_error(500) if drawn < 0.4 else good(request, content)


def cutting(request: BaseHTTPRequestHandler, content: bytes, drawn: float) -> None:
    """Half of the answers end early, though their header says how long they are."""
    request.send_response(200)
    request.send_header("Content-Length", str(len(content)))
    request.end_headers()
    request.wfile.write(content if drawn < 0.5 else content[: int(len(content) * drawn)])
    request.close_connection = True


def stalling(request: BaseHTTPRequestHandler, content: bytes, drawn: float) -> None:
    """A fifth of the answers stop in the middle, with the connection open."""
    request.send_response(200)
    request.send_header("Content-Length", str(len(content)))
    request.end_headers()
    request.wfile.write(content if drawn > 0.2 else content[: len(content) // 2])
    request.wfile.flush()
    time.sleep(0 if drawn > 0.2 else 4)


def dead(request: BaseHTTPRequestHandler, content: bytes, drawn: float) -> None:
    request.send_error(500) if request.path == "/3.tar" else good(request, content)


def changed(request: BaseHTTPRequestHandler, content: bytes, drawn: float) -> None:
    """A gateway's page with status 200."""
    good(request, b"<html>busy</html>" * 99 if drawn < 0.4 else content)


@contextmanager
def serving(folder: Path, answer: Answer, away: float = 0.0) -> Iterator[tuple[str, list[str]]]:
    """(address, the paths asked for) of a server of a folder; for the first `away` seconds it does not listen."""
    draw, lock, asked = random.Random(5), threading.Lock(), list[str]()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            with lock:  # a text file fails at most once
                drawn = draw.random() if self.path.endswith(".tar") or self.path not in asked else 1.0
                asked.append(self.path)
            path = folder / self.path[1:]
            try:
                answer(self, path.read_bytes(), drawn) if path.is_file() else self.send_error(404)
            except OSError:
                pass  # the client has gone

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler, bind_and_activate=False)
    server.daemon_threads = True
    server.server_bind()  # its port is taken from now on
    address = f"http://127.0.0.1:{server.server_address[1]}"

    def come() -> None:
        time.sleep(away)
        server.server_activate()
        server.serve_forever(0.05)

    threading.Thread(target=come, daemon=True).start()
    try:
        yield address, asked
    finally:
        server.shutdown()
        server.server_close()


def epoch(source: list[str] | str, **settings) -> tuple[int, str]:
    """(images, the sentence that it stopped with)"""

    def run() -> int:
        prompts = ClassPrompts(tars.NAMES, ["a {c}"])
        data = ClassPromptDataset(source, pixels, tokens, 20, prompts=prompts, num_workers=2, **settings)
        return len({image.numpy().tobytes() for images, _ in data for image in images})  # no two are alike

    return attempt(run)


# what the server does; for how many seconds it is away; images of an epoch, or words of the sentence it stops with
CASES: list[tuple[str, Answer, float, int | str]] = [
    ("is good", good, 0, SAMPLES),
    ("is slow", slow, 0, SAMPLES),
    ("answers 500 to four of ten", failing, 0, SAMPLES),
    ("cuts every second answer", cutting, 0, SAMPLES),
    ("sends a page of HTML four times of ten", changed, 0, SAMPLES),
    ("stalls in one of five answers", stalling, 0, SAMPLES),
    ("is away for 5 s", good, 5, SAMPLES),
    (
        "never gives one shard of eight",
        dead,
        0,
        "20 of 160 samples",
    ),
]


def rows(cases=CASES, retries: int = 6) -> Iterator[tuple[list[str], bool]]:
    """Cells of the table, and whether they are as stated."""
    with tempfile.TemporaryDirectory() as name:
        folder = tars.data_folder(Path(name, "data"), SAMPLES, SHARDS)
        (folder / "train/sizes.json").write_text(
            "{" + ", ".join(f'"{i}.tar": {SAMPLES // SHARDS}' for i in range(SHARDS)) + "}"
        )
        for what, answer, away, expected in cases:
            for how in ("an http folder", "pipe:curl"):
                if how == "pipe:curl" and answer is stalling:
                    continue  # curl waits as long as it is told to: --speed-time, --max-time
                with serving(folder / "train", answer, away) as (address, asked):
                    source: list[str] | str = address
                    settings: dict = {"retries": retries}
                    if how == "pipe:curl":
                        source = [f"pipe:curl -sf {address}/{i}.tar" for i in range(SHARDS)]
                        settings["num_samples"] = SAMPLES
                    number, sentence = epoch(source, **settings)
                as_stated = number == expected if isinstance(expected, int) else expected in sentence
                seen = f"stops: {sentence.split(', the first')[0]}" if sentence else f"{number} of {SAMPLES}"
                yield [what, how, seen, str(sum(path.endswith(".tar") for path in asked))], as_stated


def main() -> None:
    remote.TIMEOUT = 2  # seconds without a byte, in place of 30
    print("| the server | read by | an epoch's images | requests for the 8 tars |\n|---|---|---|---|")
    failed = 0
    for cells, as_stated in rows():
        failed += not as_stated
        print(f"| {' | '.join(cells)} |" + ("" if as_stated else "  <- WRONG"), flush=True)
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
