"""Training and evaluation from an S3 server: as from a disk, bit for bit, and what a user reads where it goes wrong.

    pip install s3fs "moto[server]"        # which the package and its other tests do without
    python -m tests.faults.s3              # four minutes; a table, and status 1 where something differs

The server is moto's, on the loopback, with authentication. Each row is a real command in a process of its own, with two
workers, through a proxy that spoils answers. A fault is drawn for each request for a tar.
"""

import json
import logging
import math
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import boto3
import torch
from moto.server import ThreadedMotoServer

from tests import digits, tars

REPO = Path(__file__).parents[2]
POLICY = {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "s3:*", "Resource": "*"}]}
FLYP = [sys.executable, "-m", "flyp_plugin"]
NO_DRIVER = "import sys; sys.modules['s3fs'] = None; from flyp_plugin.commands import main; main()"
# s3fs waits 15 s for an answer, and botocore and s3fs ask again 5 times each
FSSPEC = {"config_kwargs": {"read_timeout": 2, "connect_timeout": 2, "retries": {"max_attempts": 1}}}
BUSY = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
Spoil = Callable[[BaseHTTPRequestHandler, bytes, float], None]  # sends the content, given a random number


def good(request: BaseHTTPRequestHandler, content: bytes, drawn: float) -> None:
    request.wfile.write(content if request.command == "GET" else b"")


def cutting(request: BaseHTTPRequestHandler, content: bytes, drawn: float) -> None:
    """Four of five answers end early, though their header says how long they are."""
    good(request, content if drawn > 0.8 else content[: int(len(content) * drawn)], drawn)
    request.close_connection = drawn < 0.8


def stalling(request: BaseHTTPRequestHandler, content: bytes, drawn: float) -> None:
    """Half of the answers stop in the middle, with the connection open."""
    good(request, content if drawn > 0.5 else content[: len(content) // 2], drawn)
    if drawn < 0.5:
        time.sleep(4)
        request.close_connection = True


@contextmanager
def proxy(
    server: str, spoil: Spoil, busy: float = 0.0, dead: str = "", num_tars: float = math.inf
) -> Iterator[tuple[str, list[str]]]:
    """(address, the tars asked for); a share `busy` of the answers is 503, and `dead` is a tar that is never sent.

    After `num_tars` it hangs up on whoever asks.
    """
    draw, lock, asked = random.Random(5), threading.Lock(), list[str]()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            if len(asked) >= num_tars:
                self.close_connection = True
                return
            upstream, drawn = HTTPConnection(server.removeprefix("http://")), 1.0
            upstream.request(self.command, self.path, headers=dict(self.headers))
            answer = upstream.getresponse()
            status, content, headers = answer.status, answer.read(), dict(answer.getheaders())
            if self.command == "GET" and self.path.endswith(".tar"):
                with lock:
                    drawn = draw.random()
                    asked.append(self.path)
                if drawn < busy or (dead and self.path.endswith(dead)):
                    status, content, headers = 503, BUSY, {"Content-Length": str(len(BUSY))}
            headers.pop("Transfer-Encoding", None)
            headers.setdefault("Content-Length", str(len(content)))
            self.send_response_only(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            try:
                spoil(self, content, drawn if status in (200, 206) else 1.0)
            except OSError:
                pass  # the client has gone

        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    with tars.listening(Handler) as address:
        yield address, asked


@contextmanager
def bucket(data: Path) -> Iterator[tuple[str, dict[str, str], dict[str, str]]]:
    """(address, a user's credentials, those of one without rights) of a server with `data` in s3://digits/data."""
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    address = f"http://{host}:{port}"
    root = {"endpoint_url": address, "aws_access_key_id": "root", "aws_secret_access_key": "root"}
    iam, s3 = (boto3.client(name, region_name="us-east-1", **root) for name in ("iam", "s3"))
    users = []
    for user in ("reader", "nobody"):
        iam.create_user(UserName=user)
        key = iam.create_access_key(UserName=user)["AccessKey"]
        users.append(
            {"AWS_ACCESS_KEY_ID": key["AccessKeyId"], "AWS_SECRET_ACCESS_KEY": key["SecretAccessKey"]}
        )
    iam.put_user_policy(UserName="reader", PolicyName="all", PolicyDocument=json.dumps(POLICY))
    s3.create_bucket(Bucket="digits")
    for path in (path for path in data.rglob("*") if path.is_file()):
        s3.upload_file(str(path), "digits", f"data/{path.relative_to(data)}")
        if path.name != "sizes.json":  # the same set, of unknown size
            s3.upload_file(str(path), "digits", f"uncounted/{path.relative_to(data)}")
    headers = {"Content-Type": "text/plain"}
    checks = urllib.request.Request(f"{address}/moto-api/reset-auth", b"0", headers)
    urllib.request.urlopen(checks).close()
    try:
        yield address, users[0], users[1]
    finally:
        server.stop()


class Trial:
    """Commands in a temporary folder, and the run from the disk that others are compared with."""

    def __init__(self, root: Path):
        self.root, self.data = root, digits.write(root / "data")

    def run(self, command: Sequence[str], env: dict[str, str]) -> tuple[int, str, str]:
        """Its exit status, what it prints and the last line of what it says; status 124 where it hangs."""
        env = {**os.environ, "AWS_DEFAULT_REGION": "us-east-1", "FSSPEC_S3": json.dumps(FSSPEC), **env}
        env |= {
            "NO_PROXY": "127.0.0.1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(REPO), *sys.path]),
        }
        try:
            done = subprocess.run(
                command, check=False, env=env, cwd=self.root, capture_output=True, text=True, timeout=300
            )
        except subprocess.TimeoutExpired:
            return 124, "", "hangs"
        said = done.stderr.strip().splitlines() or [""]
        odd = [line for line in said if "Traceback" in line or "never awaited" in line or "Unclosed" in line]
        return done.returncode or len(odd), done.stdout, " ".join(odd + said[-1:])

    def train(self, name: str, source: str, env: dict[str, str], *flags: str) -> tuple[int, str, str]:
        argv = ["--model", "digits-vit", "--model-config", f"{self.data}/digits-vit.json", "--name", name]
        argv += ["--logs", str(self.root / "logs"), "--device", "cpu", "--workers", "2", "--epochs", "2"]
        argv += [
            "--train-data",
            source,
            "--eval-data",
            f"test={source}",
            "--batch-size",
            "125",
            "--lr",
            "1e-3",
        ]
        return self.run([sys.executable, str(REPO / "train_flyp.py"), *argv, *flags], env)

    def outcome(self, name: str) -> tuple[dict[str, torch.Tensor], str]:
        folder = self.root / "logs" / name / "checkpoints"
        weights = torch.load(folder / "epoch_2.pt", weights_only=True)["state_dict"]
        return weights, (folder / "results.jsonl").read_text()

    def difference(self, name: str, other: str) -> str:
        """In what the outcome of two runs differs, bit for bit."""
        (ours, results), (theirs, figures) = self.outcome(name), self.outcome(other)
        changed = [key for key in theirs if not torch.equal(ours[key], theirs[key])]
        return ", ".join(changed or ([] if results == figures else ["results.jsonl"]))


def rows(trial: Trial, address: str, reader: dict[str, str], nobody: dict[str, str]) -> Iterator[list[str]]:
    """Cells of the table; the last is what is wrong, "" for nothing."""
    status, _, said = trial.train("disk", str(trial.data), {})
    yield ["trains from the disk", f"status {status}", "" if status == 0 else said]

    trainings: list[tuple[str, dict]] = [
        ("trains from s3://", {}),
        ("trains while four of five answers are cut", {"spoil": cutting}),
        ("trains while four of ten answers are 503", {"busy": 0.4}),
        ("trains while half of the answers stall", {"spoil": stalling}),
    ]
    for number, (what, faults) in enumerate(trainings):
        with proxy(address, **{"spoil": good, **faults}) as (url, asked):
            status, _, said = trial.train(
                f"s3-{number}", "s3://digits/data", {**reader, "AWS_ENDPOINT_URL": url}
            )
        wrong = said if status else trial.difference(f"s3-{number}", "disk")
        yield [what, f"the disk's weights and figures, {len(asked)} requests for 38 tars", wrong]

    with proxy(address, good, dead="/train/3.tar") as (url, asked):
        flags = ["--retries", "1"]
        status, _, said = trial.train("dead", "s3://digits/data", {**reader, "AWS_ENDPOINT_URL": url}, *flags)
    expected = status == 1 and "125 of 1000 samples" in said and "s3://digits/data/train/3.tar" in said
    yield ["trains while one shard of eight is never sent", said, "" if expected else f"status {status}"]

    begun = time.monotonic()
    with proxy(address, good, num_tars=20) as (url, asked):
        status, _, said = trial.train("gone", "s3://digits/data", {**reader, "AWS_ENDPOINT_URL": url}, *flags)
    expected = status == 1 and "of 1000 samples" in said
    seen = f"{said} ({time.monotonic() - begun:.0f} s in all)"
    yield ["trains until the server goes away for good", seen, "" if expected else f"status {status}"]

    env = {**reader, "AWS_ENDPOINT_URL": address}
    figures = []
    for source, more in ((str(trial.data), {}), ("s3://digits/data", env)):
        command = [*FLYP, "eval", "logs/disk", "--eval-data", f"test={source}", "--json", "--workers", "2"]
        status, printed, said = trial.run(command, more)
        figures.append(json.loads(printed)["results"] if status == 0 else said)
    wrong = "" if figures[0] == figures[1] else f"{figures}"
    yield ["flyp eval of s3://", "the disk's figures", wrong]

    down = {**reader, "AWS_ENDPOINT_URL": "http://127.0.0.1:9"}
    bad = {**env, "AWS_SECRET_ACCESS_KEY": "wrong"}
    none = {"AWS_ENDPOINT_URL": address, "AWS_EC2_METADATA_DISABLED": "true"}
    sentences: list[tuple[str, list[str], dict[str, str], list[str]]] = [
        ("no s3fs", [sys.executable, "-c", NO_DRIVER], env, ["pip install s3fs"]),
        ("no such bucket", FLYP, env, ["s3://gone/data", "bucket does not exist"]),
        ("no such folder", FLYP, env, ["s3://digits/gone/*.tar", "s3://digits/gone/test/*.tar"]),
        ("no such tar", FLYP, env, ["s3://digits/data/test/99.tar"]),
        ("a wrong secret", FLYP, bad, ["s3://digits/data", "credentials", "listing"]),
        ("no credentials", FLYP, none, ["s3://digits/data", "credentials"]),
        (
            "a user without rights",
            FLYP,
            nobody | {"AWS_ENDPOINT_URL": address},
            ["s3://digits/data", "credentials"],
        ),
        ("a server that is down", FLYP, down, ["s3://digits/data", "connect"]),
    ]
    sources = {"no such bucket": "s3://gone/data", "no such folder": "s3://digits/gone"}
    sources |= {"no such tar": "s3://digits/data/test/99.tar"}
    for what, command, more, named in sentences:
        source = f"test={sources.get(what, 's3://digits/data')}"
        begun = time.monotonic()
        status, _, said = trial.run([*command, "eval", "logs/disk", "--eval-data", source], more)
        missing = [word for word in named if word.lower() not in said.lower()]
        clear = status == 1 and said.startswith("Error: ") and not missing
        seen = f"{said} ({time.monotonic() - begun:.0f} s)"
        yield [what, seen, "" if clear else f"status {status}, not named: {missing}"]

    status, _, said = trial.train("uncounted", "s3://digits/uncounted", env)
    yield ["trains without sizes.json", said, "" if status == 1 and "--train-num-samples" in said else "?"]
    for command in (["count", "s3://digits/data"], ["check", "s3://digits/data"]):
        status, _, said = trial.run([*FLYP, "shards", *command], env)
        yield [
            f"flyp shards {command[0]}",
            said,
            "" if status == 1 and "local" in said else f"status {status}",
        ]


def main() -> None:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # moto's requests
    print("| what | what is seen |\n|---|---|")
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        trial = Trial(Path(folder))
        with bucket(trial.data) as server:
            for *cells, wrong in rows(trial, *server):
                failed += bool(wrong)
                print(f"| {' | '.join(cells)} |" + (f"  <- WRONG: {wrong}" if wrong else ""), flush=True)
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
