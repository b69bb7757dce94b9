"""Several ranks: what they score, see and learn against one process, and what is seen where one of them dies.

    python -m tests.faults.ranks [evaluation] [coverage] [loss] [deaths] [--ranks 1 2 3 4] [--epochs 200]

All of it with gloo on a CPU, on five shards of 1, 17, 40, 3 and 64 digits.

evaluation: the images that LabelledDataset gives the ranks, together; and results.jsonl of train_flyp.py, started by torchrun
(2, 4 ranks) and as Slurm does (3), against one process and `flyp eval`. coverage: what an epoch of ClassPromptDataset leaves
out and repeats. loss: train_flyp.py for one step on 120 digits, all of them one global batch; the mean of the ranks' losses
and the gradient, which AdamW's first moment holds, against one process. deaths: a rank is killed, stopped or has bad data; how
the others end, and whether --resume latest then gives the weights of a run that was not disturbed: bit for bit on two
ranks, to rounding on more.
"""

import argparse
import io
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from datetime import timedelta
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.distributed as dist
from PIL import Image

from flyp_plugin import ClassPromptDataset, ClassPrompts
from flyp_plugin.commands import call as flyp
from flyp_plugin.data import LabelledDataset
from flyp_plugin.errors import run
from flyp_plugin.metrics import Tally
from flyp_plugin.objectives import ClassLoss, PairLoss
from flyp_plugin.train import train
from tests import digits, tars
from tests.close import BACKWARD, FORWARD
from tests.faults.long import tokens
from tests.faults.processes import Row, family, gone, table

REPO = Path(__file__).parents[2]
UNEVEN = (1, 17, 40, 3, 64)
EVEN, EIGHT = (10,) * 12, (10,) * 8  # 12: the same number for each of 1, 2, 3 and 4 ranks
LOSSES = (open_clip.ClipLoss, open_clip.loss.SigLipLoss, ClassLoss, PairLoss)
MARK = "FLYP_RANKS_OF"  # in the environment of all that is started here
RESNET = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 16, "patch_size": None},
    "text_cfg": digits.MODEL["text_cfg"],
}


def write(root: Path, sizes: Sequence[int]) -> Path:
    """A data folder of so many digits a shard, each half of two groups; the models, and weights to start from."""
    root.mkdir(parents=True)
    (root / "classnames.txt").write_text("\n".join(digits.NAMES) + "\n")
    (root / "zeroshot_classification_templates.txt").write_text("\n".join(digits.TEMPLATES) + "\n")
    bounds = [0, *(sum(sizes[: i + 1]) for i in range(len(sizes)))]
    for split, offset in (("train", 0), ("test", 1000)):
        for i, (first, last) in enumerate(pairwise(bounds)):
            numbers = range(offset + first, offset + last)
            groups = {f"s{n:04d}.hand": (b"left", b"right")[n % 2] for n in numbers}
            members = tars.samples(numbers) | groups
            tars.write(root / split / f"{i}.tar", dict(sorted(members.items())))
    for name, config in {"digits-vit": digits.MODEL, "digits-rn": RESNET}.items():
        (root / f"{name}.json").write_text(json.dumps(config))
        open_clip.add_model_config(root / f"{name}.json")
        torch.manual_seed(0)
        torch.save(open_clip.create_model(name).state_dict(), root / f"{name}.pt")
    return root


def words(data: Path, logs: Path, name: str, *more: object, model: str = "digits-vit") -> list[str]:
    """The flags of a run; later ones win."""
    given = ["--model", model, "--model-config", f"{data}/{model}.json", "--pretrained", f"{data}/{model}.pt"]
    given += ["--train-data", str(data), "--logs", str(logs), "--name", name, "--device", "cpu"]
    given += ["--dist-backend", "gloo", "--workers", "1", "--lr", "1e-3", "--log-every-n-steps", "1"]
    return [*given, *map(str, more)]


# Ranks as processes


class Ranks:
    """`ranks` processes of a training, started by torchrun, or as Slurm or a user does; what each says is kept.

    Args:
        command: a script and its flags.
        folder: for what they say; a mark in their environment, so that none is left unseen.
        how: "torchrun", "slurm" or "hand".
    """

    def __init__(self, ranks: int, command: Sequence[object], folder: Path, how: str = "hand"):
        folder.mkdir(parents=True, exist_ok=True)
        self.mark, self.folder, self.how = f"{folder}-{time.monotonic_ns()}", folder, how
        # the packages of this process, wherever they come from
        path = os.pathsep.join([str(REPO), *sys.path])
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, MARK: self.mark}
        python = [sys.executable]
        if how == "torchrun":
            python += ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks)]
            python += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0", "--"]
            envs: list[Mapping[str, str]] = [{}]
        else:
            names = ["SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS"]
            names = names if how == "slurm" else ["RANK", "LOCAL_RANK", "WORLD_SIZE"]
            meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
            envs = [dict(zip(names, (str(r), str(r), str(ranks)))) | meet for r in range(ranks)]
        self.processes = [
            subprocess.Popen(
                [*python, *map(str, command)],
                env={**env, **own},
                stdout=subprocess.DEVNULL,
                stderr=open(folder / f"err.{i}", "w"),  # noqa: SIM115 (it is the process's)
            )
            for i, own in enumerate(envs)
        ]

    def ended(self, within: float = 600) -> list[int | None]:
        """The exit statuses; None of one that had to be killed after so many seconds.

        `seconds` is then the time from the first one's end to the last one's.
        """
        start, ends = time.monotonic(), {}
        while len(ends) < len(self.processes) and time.monotonic() < start + within:
            ends |= {p: time.monotonic() for p in self.processes if p not in ends and p.poll() is not None}
            time.sleep(0.05)
        self.seconds = max(ends.values()) - min(ends.values()) if ends else within
        for process in self.processes:
            process.kill()
            process.wait()
        return [process.returncode if process in ends else None for process in self.processes]

    def said(self, number: int = 0) -> str:
        return (self.folder / f"err.{number}").read_text(errors="replace")

    def none_left(self, within: float = 15) -> bool:
        return gone(MARK, self.mark, within)


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def trained(ranks: int, argv: Sequence[object], folder: Path, how: str = "hand") -> None:
    """Train to the end; AssertionError with what was said where that fails."""
    started = Ranks(ranks, [REPO / "train_flyp.py", *argv], folder, how)
    statuses = started.ended()
    assert not any(statuses) and None not in statuses, (statuses, started.said()[-3000:])


# Evaluation


def keys_of(shards: Sequence[str], ranks: int, workers: int) -> Counter[str]:
    """How often each key comes, over all ranks."""
    found: Counter[str] = Counter()
    for rank in range(ranks):
        part = LabelledDataset(
            shards, pixel, 16, num_classes=10, num_workers=workers, rank=rank, world_size=ranks
        )
        found.update(key for batch in part for key in batch["keys"])
    return found


def pixel(image: Image.Image) -> torch.Tensor:
    """The number of a digit of tests.tars, as an image (1, 1, 1)."""
    return torch.tensor([[[tars.number_of(image)]]])


def evaluation_rows(root: Path, ranks: Sequence[int]) -> Iterator[Row]:
    data = write(root / "data", UNEVEN)
    test = [str(data / "test" / f"{i}.tar") for i in range(len(UNEVEN))]
    broken = tars.write(root / "broken.tar", b"no tar" * 100)
    sets = {"all": test, "two": test[1:3], "broken": [*test[:2], broken]}
    for n in ranks:
        cases = [(name, workers) for name in sets for workers in (0, 2)]
        good = sum(
            keys_of(sets[name], n, workers) == Counter(keys_of(sets[name], 1, 0).keys())
            for name, workers in cases
        )
        seen = "each key once: 5, 2 and 3 shards (one of these no tar), 0 and 2 workers"
        yield Row(f"evaluation on {n} ranks: images", len(cases), good, seen)
    for model in ("digits-vit", "digits-rn"):
        alone: Mapping[str, Any] = {}
        for n in sorted({1, *ranks}):
            how = {3: "slurm"}.get(n, "torchrun") if n > 1 else "hand"
            rows, single = scored(data, root / model, n, how, model)
            alone = alone or rows[0]
            same = [rows[0] == alone, all(rows[1][f"val/{name}"] == value for name, value in single.items())]
            seen = (
                f"epoch 0 {'as' if same[0] else 'NOT as'} on one rank, epoch 10 {'as' if same[1] else 'NOT as'} `flyp "
                f"eval` of the checkpoint ({', '.join(sorted(single))}); top-1 {rows[1]['val/top1']:.4f}"
            )
            yield Row(f"evaluation on {n} ranks ({how}), {model}: results.jsonl", 2, sum(same), seen)


def scored(data: Path, logs: Path, ranks: int, how: str, model: str) -> tuple[list[dict], dict[str, Any]]:
    """(the lines of results.jsonl, `flyp eval` of the checkpoint in one process) of ten epochs on so many ranks."""
    name = f"{ranks}-ranks"
    more = ["--epochs", 10, "--batch-size", 24 // ranks, "--lr", "1e-3", "--warmup", 5, "--eval-frequency", 0]
    more += ["--eval-data", f"val={data}", "--group-key", "hand"]
    trained(ranks, words(data, logs, name, *more, model=model), logs / f"said-{ranks}", how)
    checkpoints = logs / name / "checkpoints"
    return results(checkpoints), figures(checkpoints / "epoch_10.pt", data, model)


def results(checkpoints: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (checkpoints / "results.jsonl").read_text().splitlines()]


def figures(checkpoint: Path, data: Path, model: str) -> dict[str, Any]:
    """What `flyp eval` says of a checkpoint, in this process."""
    command = ["eval", str(checkpoint), "--json", "--model", model, "--model-config", f"{data}/{model}.json"]
    with redirect_stdout(io.StringIO()) as out:
        flyp([*command, "--device", "cpu", "--eval-data", f"val={data}", "--group-key", "hand"])
    found = json.loads(out.getvalue())["results"]["val"]
    found.pop("worst_group")  # a name, which is in no log of metrics
    return found


# Coverage


def coverage(shards: Sequence[str], sizes: Sequence[int], ranks: int, epochs: int) -> tuple[list[dict], dict]:
    """What each epoch leaves out and repeats, and how often each image was seen in all of them.

    Raises:
        AssertionError: ranks whose batches differ in number or size; an image of two ranks; an image seen twice before
            each of its rank's was seen once; an image left out though its rank had room.
    """
    total, batch = sum(sizes), 16
    prompts = ClassPrompts(digits.NAMES, digits.TEMPLATES)
    parts = [
        ClassPromptDataset(
            shards, pixel, tokens, batch, prompts=prompts, num_samples=total, rank=r, world_size=ranks
        )
        for r in range(ranks)
    ]
    share = math.ceil(total / ranks)  # samples a rank makes
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    found, views = [], Counter(dict.fromkeys(range(total), 0))
    for _ in range(epochs):
        batches = [[images.flatten().tolist() for images, _ in part] for part in parts]
        lengths = [[len(images) for images in of_rank] for of_rank in batches]
        steps = [batch] * (share // batch) + ([share % batch] if share % batch else [])
        assert lengths == [steps] * ranks, f"ranks made batches of {lengths}, not {steps}"
        seen = [Counter(number for images in of_rank for number in images) for of_rank in batches]
        for of_rank in seen:
            mine = sum(
                size for first, size in zip(starts, sizes) if of_rank.keys() & range(first, first + size)
            )
            mine = max(mine, len(of_rank))
            often = share // mine
            assert set(of_rank.values()) <= {often, often + 1} - {0}, (
                "an image came again before others came once"
            )
            assert often == 0 or len(of_rank) == mine, "an image was left out though there was room"
        once: Counter[int] = sum((Counter(of_rank.keys()) for of_rank in seen), Counter())
        assert max(once.values()) == 1, "an image came to two ranks"
        for of_rank in seen:
            views.update(of_rank)
        most = max(max(of_rank.values()) for of_rank in seen)
        repeated = share * ranks - len(once)
        found.append({"left out": total - len(once), "repeated": repeated, "most": most})
    return found, views


def coverage_rows(root: Path, ranks: Sequence[int], epochs: int) -> Iterator[Row]:
    for name, sizes in (("uneven", UNEVEN), ("equal", EVEN), ("equal", EIGHT)):
        bounds = [0, *(sum(sizes[: i + 1]) for i in range(len(sizes)))]
        shards = [
            tars.write(root / str(len(sizes)) / f"{i}.tar", tars.samples(range(first, last)))
            for i, (first, last) in enumerate(pairwise(bounds))
        ]
        for n in ranks:
            fault = f"coverage, {epochs} epochs on {n} ranks, {len(sizes)} {name} shards"
            try:
                found, views = coverage(shards, sizes, n, epochs)
            except AssertionError as error:
                yield Row(fault, epochs, 0, str(error))
                continue
            out, again, most = ([one[key] for one in found] for key in ("left out", "repeated", "most"))
            by_shard = [
                sum(views[number] for number in range(first, last)) / (last - first) / epochs
                for first, last in pairwise(bounds)
            ]
            seen = (
                f"of {sum(sizes)} images an epoch leaves out {_range(out)} and repeats {_range(again)}, one up to "
                f"{max(most)} times; views of an image and epoch, by shard {min(by_shard):.2f} to {max(by_shard):.2f}; "
                f"seen in no epoch: {sum(not seen for seen in views.values())}"
            )
            yield Row(fault, epochs, epochs, seen)


def _range(numbers: Sequence[int]) -> str:
    return f"{min(numbers)} to {max(numbers)} (mean {sum(numbers) / len(numbers):.1f})"


# Loss and gradient

OBJECTIVES: dict[str, list[str]] = {
    "flyp": [],
    "flyp without --local-loss": ["--no-flyp-defaults", "--gather-with-grad", "--precision", "fp32"],
    "flyp --accum-freq 2": ["--accum-freq", "2"],
    "flyp --siglip": ["--siglip"],
    "--collisions soft": ["--collisions", "soft"],
    "--collisions mask": ["--collisions", "mask"],
    "--ce-weight 0.5": ["--ce-weight", "0.5"],
    "ce": ["--objective", "ce"],
    "flyp-ce, one template": ["--objective", "flyp-ce", "--templates", "a photo of a {c}."],
}


def one_step(data: Path, logs: Path, objective: str, ranks: int) -> list[str]:
    """The flags of a run of one optimizer step on all images, whose step is nearly the gradient itself (eps 1)."""
    accum = 2 if "accum" in objective else 1
    size = sum(EVEN) // ranks // accum
    more = ["--epochs", 1, "--batch-size", size, "--wd", 0, "--eps", 1, "--beta1", 0.9, "--lr", 1]
    more += ["--warmup", 0, *OBJECTIVES[objective]]
    return words(data, logs, re.sub(r"\W+", "_", f"step {objective} {ranks}"), *more)


def steps(argvs: Sequence[Sequence[str]], out: Path, ports: Sequence[int] = ()) -> None:
    """Train each in turn, in this process as one rank; the losses of each go to out/RANK.json, a list a run."""
    losses: list[list[float]] = []

    def hook(module: torch.nn.Module, inputs: object, output: Any) -> None:
        if isinstance(module, LOSSES):
            total = sum(output.values()) if isinstance(output, dict) else output
            losses[-1].append(total.item())

    handle = torch.nn.modules.module.register_module_forward_hook(hook)
    try:
        for i, argv in enumerate(argvs):
            losses.append([])
            os.environ.update({"MASTER_PORT": str(ports[i])} if ports else {})
            assert train(argv) == 0
            if dist.is_initialized():
                dist.destroy_process_group()
    finally:
        handle.remove()
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{_rank()}.json").write_text(json.dumps(losses))


def train_in_turn(ranks: int, argvs: Sequence[Sequence[str]], folder: Path, out: Path) -> None:
    """`steps` on so many ranks, by one start of the processes, which takes longer than a short run; `folder` is theirs."""
    folder.mkdir(parents=True, exist_ok=True)
    plan = folder / "plan.json"
    ports = [_free_port() for _ in argvs]  # the store of the one before may still listen on its own
    plan.write_text(json.dumps([argvs, ports]))
    started = Ranks(ranks, [__file__, "--steps", plan, out], folder)
    assert started.ended() == [0] * ranks, [started.said(rank)[-3000:] for rank in range(ranks)]


def _rank() -> int:
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))


def step_of(argv: Sequence[str], out: Path, number: int, ranks: int) -> dict[str, Any]:
    """The global loss, the gradient and the weights after the step of the run `number` among those of `steps`."""
    local = [json.loads((out / f"{rank}.json").read_text())[number] for rank in range(ranks)]
    logs, name = (argv[argv.index(flag) + 1] for flag in ("--logs", "--name"))
    saved = torch.load(f"{logs}/{name}/checkpoints/epoch_1.pt", weights_only=True, map_location="cpu")
    moments = {i: state["exp_avg"] / (1 - 0.9) for i, state in saved["optimizer"]["state"].items()}
    weights = {key.removeprefix("module."): value for key, value in saved["state_dict"].items()}
    return {
        "loss": sum(map(sum, local)) / sum(map(len, local)),
        "gradient": moments,
        "weights": {key: value for key, value in weights.items() if value.is_floating_point()},
    }


def apart(
    one: Mapping[str, Any], other: Mapping[str, Any], start: Mapping[str, torch.Tensor]
) -> dict[str, float]:
    """Relative differences: of the loss; of the gradient and of the step, in a tensor, to that tensor's largest."""
    step = {key: (one["weights"][key] - start[key]).abs().max() for key in start if key in one["weights"]}
    gradients = [
        (g - other["gradient"][i]).abs().max() / g.abs().max() for i, g in one["gradient"].items() if g.any()
    ]
    assert one["gradient"].keys() == other["gradient"].keys() and gradients
    moved = [
        (one["weights"][key] - other["weights"][key]).abs().max() / size for key, size in step.items() if size
    ]
    return {
        "loss": abs(one["loss"] - other["loss"]) / abs(one["loss"]),
        "gradient": float(max(gradients)),
        "weights": float(max(moved)),
    }


LIMITS = {
    "loss": FORWARD,
    "gradient": BACKWARD,
    "weights": BACKWARD,
}  # a step that is nearly the gradient itself


def differences(
    root: Path,
    ranks: Sequence[int],
    objectives: Sequence[str],
    more: Mapping[int, Sequence[Sequence[str]]] = {},
    flags: Sequence[str] = (),
) -> Iterator[tuple[str, int, dict[str, float]]]:
    """(objective, ranks, how far they are from one process), all objectives by one start of the processes.

    `more` are flags of other runs that so many ranks are to do while they are there, `flags` more flags of all the others.
    """
    data = root / "even"
    if not data.exists():
        write(data, EVEN)
    start = torch.load(data / "digits-vit.pt", weights_only=True)
    plans = {
        n: [[*one_step(data, root / "steps", objective, n), *flags] for objective in objectives]
        for n in {1, *ranks}
    }
    steps(plans[1], root / "losses-1")
    for n in sorted(set(ranks) - {1}):
        out = root / f"losses-{n}"
        train_in_turn(n, [*plans[n], *more.get(n, ())], root / f"said-{n}", out)
        for i, objective in enumerate(objectives):
            ones = step_of(plans[1][i], root / "losses-1", i, 1), step_of(plans[n][i], out, i, n)
            yield objective, n, apart(*ones, start)


def loss_rows(root: Path, ranks: Sequence[int]) -> Iterator[Row]:
    for objective, n, far in differences(root, ranks, list(OBJECTIVES)):
        seen = ", ".join(f"{name} {value:.1e}" for name, value in far.items())
        good = all(value <= LIMITS[name] for name, value in far.items())
        yield Row(f"one step, {objective}, {n} ranks", 1, int(good), f"largest relative difference: {seen}")


# Deaths

PLACES: dict[str, tuple[Any, str]] = {
    "start": (dist, "init_process_group"),
    "training": (open_clip.ClipLoss, "forward"),
    "evaluation": (Tally, "update"),
    "checkpoint": (torch, "save"),
}


def doomed(
    rank: int, where: str, number: int, how: signal.Signals, timeout: int, argv: Sequence[str]
) -> None:
    """train_flyp.py, but one rank sends itself a signal at the so many-th call of a function; leaves the process."""
    dist.distributed_c10d.default_pg_timeout = timedelta(seconds=timeout)
    if rank == _rank():
        place, name = PLACES[where]
        original, calls = getattr(place, name), count(1)

        def deadly(*args: Any, **kwargs: Any) -> Any:
            if next(calls) == number:
                if where == "checkpoint":  # in the middle of it
                    original(*args, **kwargs)
                    os.truncate(args[1], os.path.getsize(args[1]) // 2)
                os.kill(os.getpid(), how)
            return original(*args, **kwargs)

        setattr(place, name, deadly)
    run(lambda: train(argv))


SAME = "resumed to the same weights"
# of the way that the weights went: DistributedDataParallel lays out its buckets anew after the first step of a process,
# and where the sum of a gradient starts, of three terms or more, depends on its place in a bucket
ROUNDING = 1e-3
SENTENCE = r"Error: .*\brank \d\b.*\(.+\).*(--resume latest\b|same command again).*"


class Death:
    """A way in which a rank ends, and what is wrong then with the others (`wrong`), in words."""

    def __init__(self, name: str, ranks: int, victim: int, how: str, *command: object, own: str = ""):
        self.name, self.ranks, self.victim, self.how, self.command = name, ranks, victim, how, command
        self.own = own  # a regular expression of what the victim itself says; "": it is killed
        self.wrong: list[str] = []
        self.seconds = math.nan

    def __call__(self, folder: Path, before: Callable[[Ranks], None] = lambda ranks: None) -> None:
        started = Ranks(self.ranks, self.command, folder, self.how)
        before(started)
        statuses = started.ended(300)
        self.seconds = started.seconds
        if not started.none_left():
            self.wrong.append("a process was left")
        if None in statuses:
            self.wrong.append(f"hung ({statuses})")
        if not all(statuses):
            self.wrong.append(f"ended with status 0 ({statuses})")
        said = [started.said(i) for i in range(len(statuses))]
        if self.how == "torchrun":  # which ends the others itself, and says which was the first to die
            own = said[0].partition("torch/distributed/elastic")[0].partition("Sending process")[0]
            if "Traceback" in own:
                self.wrong.append("traceback")
            if self.own and not re.search(self.own, said[0]):
                self.wrong.append("the reason is not said")
            return
        for i, (text, status) in enumerate(zip(said, statuses)):
            sentence = self.own if self._is_victim(i, said) else SENTENCE
            lines = re.findall(r"^(?:\[rank\d\]: )?(Error: .*|Traceback .*)$", text, re.MULTILINE)
            if not sentence:
                continue
            if len(lines) != 1 or not re.fullmatch(sentence, lines[0]) or status != 1:
                self.wrong.append(f"rank {i} said {lines or text[-300:]!r}, status {status}")

    def _is_victim(self, i: int, said: Sequence[str]) -> bool:
        return bool(self.own and re.search(self.own, said[i])) if self.victim < 0 else i == self.victim


def weights(logs: Path, name: str, epoch: int) -> dict[str, torch.Tensor]:
    state = torch.load(logs / name / "checkpoints" / f"epoch_{epoch}.pt", weights_only=True)["state_dict"]
    return {key.removeprefix("module."): value for key, value in state.items()}


def norm(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> float:
    """The length of the difference of two state dicts."""
    pairs = [(value, other[name]) for name, value in one.items()]
    return math.sqrt(sum((a.double() - b.double()).square().sum().item() for a, b in pairs))


def killed_from_outside(log: Path, epoch: int) -> Callable[[Ranks], None]:
    """SIGKILL of one rank of torchrun's two once its log says that an epoch has begun."""

    def kill(ranks: Ranks) -> None:
        end = time.monotonic() + 300
        while time.monotonic() < end and not (log.exists() and f"Train Epoch: {epoch}" in log.read_text()):
            time.sleep(0.05)
        ranks_of = [pid for pid in family(ranks.processes[0].pid)[1:] if _environment(pid).get("RANK") == "1"]
        os.kill(min(ranks_of), signal.SIGKILL)  # its workers came later

    return kill


def _environment(pid: int) -> dict[str, str]:
    raw = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
    return dict(part.split("=", 1) for part in raw.split("\0") if "=" in part)


def death_rows(root: Path, ranks: Sequence[int]) -> Iterator[Row]:
    data, logs = write(root / "deadly", UNEVEN), root / "deaths"
    more = ["--epochs", 3, "--batch-size", 16, "--eval-data", f"val={data}"]
    whole: dict[int, dict[str, torch.Tensor]] = {}

    def resumed(n: int, name: str) -> str:
        if n not in whole:
            trained(n, words(data, logs, f"whole-{n}", *more), logs / f"said-whole-{n}")
            whole[n] = weights(logs, f"whole-{n}", 3)
        trained(n, words(data, logs, name, *more, "--resume", "latest"), logs / f"said-{name}-again")
        way = norm(whole[n], torch.load(data / "digits-vit.pt", weights_only=True))
        far = norm(whole[n], weights(logs, name, 3)) / way
        return "" if far <= (0 if n < 3 else ROUNDING) else f"resumed to OTHER weights ({far:.1e} of the way)"

    def killed(n: int, victim: int, where: str, number: int, how: str = "hand", by: str = "SIGKILL") -> Row:
        name = f"{where}-{n}-{victim}-{how}-{by}"
        given = ["--doomed", victim, where, number, by, 20, *words(data, logs, name, *more)]
        death = Death(name, n, victim, how, __file__, *given)
        wait = (lambda started: None) if by == "SIGKILL" else (lambda started: _ends_stopped(started, victim))
        death(logs / f"said-{name}", wait)
        same = SAME if n < 3 else f"{SAME} but for rounding"
        begun = how == "hand" and where != "start"
        wrong = [*death.wrong, *filter(None, [resumed(n, name) if begun else ""])]
        what = f"rank {victim} of {n} gets {by} in {where}, started by {how}"
        return Row(what, 1, int(not wrong), "; ".join(wrong) or _seen(death, same if begun else ""))

    yield killed(2, 1, "training", 6, "slurm")
    yield killed(2, 1, "training", 6, "torchrun")
    yield killed(2, 1, "training", 6, by="SIGSTOP")
    yield killed(2, 1, "start", 1)
    yield killed(2, 0, "start", 1)

    name = "outside"
    death = Death(name, 2, 1, "torchrun", REPO / "train_flyp.py", *words(data, logs, name, *more))
    death(logs / f"said-{name}", killed_from_outside(logs / name / "out.log", 1))
    wrong = [*death.wrong, *filter(None, [resumed(2, name)])]
    yield Row(
        "rank 1 of 2 gets SIGKILL from outside, started by torchrun",
        1,
        int(not wrong),
        "; ".join(wrong) or _seen(death, SAME),
    )
    for split in ("train", "test"):
        for how in ("hand", "torchrun"):
            death = bad_label(root, data, split, how)
            what = f"a label of the {split} set is wrong, in a shard of one of 2 ranks, started by {how}"
            yield Row(what, 1, int(not death.wrong), "; ".join(death.wrong) or _seen(death, "its sentence"))
    taken = logs / "taken"
    taken.mkdir()
    (taken / "out.log").touch()
    given = ["--doomed", 9, "start", 1, "SIGKILL", 20, *words(data, logs, "taken", *more)]
    own = r"Error: .*/taken\b.*--name\b.*"
    death = Death("taken", 2, 0, "hand", __file__, *given, own=own)
    death(logs / "said-taken")
    what = "rank 0 of 2 refuses the --name, started by hand"
    yield Row(what, 1, int(not death.wrong), "; ".join(death.wrong) or _seen(death, "its sentence"))
    for n in [n for n in ranks if n in (2, 3)]:
        yield killed(n, n - 1, "training", 6)  # of 12 steps, or 9
        yield killed(n, 0, "training", 6)
        yield killed(n, n - 1, "evaluation", 4)
        yield killed(n, 0, "evaluation", 9 if n == 2 else 2)
        yield killed(n, 0, "checkpoint", 2)


def _ends_stopped(started: Ranks, victim: int) -> None:
    """End a stopped rank once the others have ended; they are not to wait for that."""
    for i, process in enumerate(started.processes):
        if i != victim:
            try:
                process.wait(300)
            except subprocess.TimeoutExpired:
                break
    started.processes[victim].kill()


def bad_label(root: Path, good: Path, split: str, how: str) -> Death:
    """Two ranks, and a label that there is no class for in the last of the shards, so with one of them."""
    data = root / f"bad-{split}-{how}"
    shutil.copytree(good, data)
    last, offset = len(UNEVEN) - 1, 1000 * (split == "test") + sum(UNEVEN[:-1])
    numbers = range(offset, offset + UNEVEN[-1])
    tars.write(data / split / f"{last}.tar", tars.samples(numbers, **{f"s{offset + 5:04d}_cls": b"12"}))
    argv = words(data, root / "deaths", data.name, "--epochs", 2, "--eval-data", f"val={data}")
    own = r"Error: .*4\.tar\b.*\bs\d+\b.*\b12\b.*"
    death = Death(data.name, 2, -1, how, REPO / "train_flyp.py", *argv, own=own)
    death(root / "deaths" / f"said-{data.name}")
    return death


def _seen(death: Death, more: str) -> str:
    if death.how == "torchrun":
        seen = "torchrun ends the others and names the rank, none left"
    else:
        seen = (
            f"one line each of the others, status 1, within {death.seconds:.0f} s of the first end, none left"
        )
    return f"{seen}; {more}" if more else seen


def main() -> int:
    if sys.argv[1:2] == ["--doomed"]:
        rank, where, number, how, timeout, *argv = sys.argv[2:]
        doomed(int(rank), where, int(number), signal.Signals[how], int(timeout), argv)
    if sys.argv[1:2] == ["--steps"]:
        argvs, ports = json.loads(Path(sys.argv[2]).read_text())
        steps(argvs, Path(sys.argv[3]), ports)
        return 0
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ("evaluation", "coverage", "loss", "deaths")
    parser.add_argument("parts", nargs="*", metavar=", ".join(names), default=names)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--epochs", type=int, default=200, help="of coverage")
    args = parser.parse_args()
    makers: dict[str, Callable[[Path], Iterator[Row]]] = {
        "evaluation": lambda root: evaluation_rows(root, args.ranks),
        "coverage": lambda root: coverage_rows(root, args.ranks, args.epochs),
        "loss": lambda root: loss_rows(root, args.ranks),
        "deaths": lambda root: death_rows(root, args.ranks),
    }

    def rows() -> Iterator[Row]:
        for part in args.parts:
            with tempfile.TemporaryDirectory() as temporary:
                yield from makers[part](Path(temporary))

    return table(rows())


if __name__ == "__main__":
    sys.exit(main())
