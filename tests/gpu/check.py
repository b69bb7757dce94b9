"""What a GPU must compute as a CPU does: short text, each command in each precision, flags, two ranks, too little memory.

    python -m tests.gpu.check --device cuda --out tables                        # 6 minutes on an H100 with 16 cores
    python -m tests.gpu.check --device cuda --out tables --only short-text memory
    python -m tests.gpu.check --device cpu --out tables --small

Each case runs in a process of its own, six at a time, and gives rows of the table: a figure, the most that it may be, and PASS
or FAIL; without a limit, a figure to know. The last line counts them, and the exit status is 1 where there is a FAIL.

"fp32" here is without TF32, and "TF32" is what open_clip makes of --precision fp32 on a GPU. Short text is right if its error,
relative to the same weights in float64, is no more than twice that of full text and a rounding.
"""

import json
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import open_clip
import timm
import torch
from torch import Tensor

from flyp_plugin import ClassPrompts, ImageClassifier, build_zeroshot_head
from flyp_plugin.checkpoints import read_state_dict
from flyp_plugin.heads import autocast
from flyp_plugin.metrics import Tally
from flyp_plugin.prompts import fill
from flyp_plugin.record import teacher_of
from flyp_plugin.text import difference_and_limit, shorten
from tests.faults import fsdp, ranks
from tests.gpu.cases import MODEL, Case, run_cases

TIE = 1.01 / 797  # of top-1 on the digits' test split: an image whose two best classes are equal to rounding
DTYPES = {"fp32": torch.float32, "amp_bf16": torch.bfloat16, "bf16": torch.bfloat16, "TF32": torch.float16}
PRECISIONS = (*DTYPES, "amp", "fp16")  # TF32 has as many digits as float16


# Short text against full text, each against float64


def short_text(case: Case) -> None:
    name, classes, templates = (MODEL, 4, 3) if case.small else ("ViT-B-32", 16, 8)
    given = [template("{c}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES[:templates]]
    prompts, tokenizer = (
        ClassPrompts(open_clip.IMAGENET_CLASSNAMES[:classes], given),
        open_clip.get_tokenizer(name),
    )
    texts = [text for label in range(classes) for text in prompts.texts(label)]
    tokens = tokenizer(texts + texts[: len(texts) // 4]).to(case.device)  # some rows are equal

    def make(weights: Any, precision: str = "fp32") -> Any:
        with torch.device(case.device):  # random weights are made there
            model = open_clip.create_model(name, precision=precision, device=case.device, output_dict=True)
        model.load_state_dict(weights or model.state_dict())
        return model

    torch.manual_seed(0)
    start = make(None)
    weights = start.state_dict()
    images = torch.randn(len(tokens), 3, *start.visual.image_size, device=case.device)
    for label in PRECISIONS if case.cuda else ("fp32", "bf16"):
        precision = label.replace("TF32", "fp32")
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = label != "fp32"
        eps = torch.finfo(DTYPES.get(label, torch.float16)).eps
        outcome = partial(quantities, images=images, tokens=tokens, prompts=prompts, tokenizer=tokenizer)
        full, short, fixed = (make(weights, precision) for _ in range(3))
        assert shorten(short) and shorten(fixed, length=int(tokens.argmax(dim=-1).max()) + 1)
        exact = outcome(make(full.state_dict()).double(), precision="float64")
        found = [outcome(model, precision=precision) for model in (full, short, fixed)]
        for what, right in exact.items():
            errors = [((each[what].double() - right).norm() / right.norm()).item() for each in found]
            words = f"{label}, {what}: error of {{}} (of full text {errors[0]:.1e})"
            case.check(words.format("short text"), errors[1], 2 * errors[0] + eps)
            case.check(words.format("a fixed length"), errors[2], 2 * errors[0] + eps)
        case.check(f"{label}, self-check: difference of a feature", *difference_and_limit(full, tokens))


def quantities(
    model: Any, images: Tensor, tokens: Tensor, prompts: ClassPrompts, tokenizer: Callable, precision: str
) -> dict[str, Tensor]:
    """Features, loss and gradients of a training step; the head, and ImageClassifier's logits."""
    cast = torch.float64 if precision == "float64" else open_clip.get_input_dtype(precision)
    with autocast(precision, images.device):
        out = model.train()(images.to(cast), tokens)
        loss = open_clip.ClipLoss()(**out)
    (128 * loss).backward()  # small gradients have no digits left in float16
    gradients = torch.cat([p.grad.double().flatten() / 128 for p in model.parameters()])
    short = hasattr(model, "short_options")
    with torch.no_grad():
        with autocast(precision, images.device):
            head = (
                build_zeroshot_head(model.eval(), tokenizer, prompts)
                if short
                else open_clip.build_zero_shot_classifier(
                    model.eval(),
                    tokenizer,
                    prompts.classnames,
                    [partial(fill, template) for template in prompts.templates],
                    device=images.device,
                )
            )
        classifier = ImageClassifier(model, head, prompts.classnames, precision)
        logits = classifier(images.to(cast))
    found = {
        "text features": out["text_features"],
        "loss": loss,
        "gradients": gradients,
        "head": head,
        "logits": logits,
    }
    return {what: tensor.detach() for what, tensor in found.items()}


def waits(case: Case) -> None:
    """How often counting a batch waits for the GPU; 0 on a CPU."""
    tally, labels = Tally(1000), torch.randint(1000, (256,), pin_memory=case.cuda)
    logits = torch.randn(256, 1000, device=case.device)
    tally.update(logits, labels)
    if case.cuda:
        torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tally.update(logits, labels, ["north"] * 256)
    case.check(
        "waits for the GPU when a batch is counted", sum("synchron" in str(w.message) for w in caught), 1
    )


# End to end


def run(case: Case, label: str) -> None:
    """Train, resume, eval, wiseft and export. With deterministic kernels, resuming must be exact, as it is on a CPU."""
    precision, _, deterministic = label.replace("TF32", "fp32").partition("-")
    flags = ["--precision", precision, *case.scored]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if deterministic:
            use_deterministic_kernels()
        last = case.train(label, *flags)
        others = {} if case.small else {"the same run again": case.train(f"{label}-again", *flags)}
        shutil.copytree(last.parents[1], case.root / f"logs/{label}-cut")
        (case.root / f"logs/{label}-cut/checkpoints" / last.name).unlink()
        others["resumed"] = case.train(f"{label}-cut", *flags, "--resume", "latest")
    if deterministic:
        names = {str(w.message).split()[0] for w in caught if "deterministic" in str(w.message)}
        case.row("operations without a deterministic kernel", ", ".join(sorted(names)) or "none")
    weights = read_state_dict(last)
    way = difference(weights, read_state_dict(case.root / "start.pt"))
    for what, other in others.items():
        apart = difference(weights, read_state_dict(other)) / way
        case.check(
            f"{what}: difference of a weight / longest way", apart, 0.1 * (case.cuda and not deterministic)
        )
    score(case, last)
    export(case, last)


def use_deterministic_kernels() -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)
    # open_clip's main() turns this on, with which cuDNN takes the algorithm that was the fastest in a trial
    torch._C._set_cudnn_benchmark(False)
    type(torch.backends.cudnn).benchmark = property(lambda module: False, lambda module, value: None)


def difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return max((one[key].double() - other[key].double()).abs().max().item() for key in one)


def score(case: Case, last: Path, what: str = "") -> None:
    """A run's own figures against those of `flyp eval`, ImageClassifier and the sweep."""
    rows = [json.loads(line) for line in (last.parent / "results.jsonl").read_text().splitlines()]
    top1, same = rows[-1]["v/top1"], ["--device", case.device, "--batch-size", 100, "--workers", 0]
    evaluated = json.loads(case.flyp("eval", last, *same, "--json"))["results"]["v"]
    classifier = ImageClassifier.from_run(last, device=case.device)
    out = ["--alphas", "0,0.5,1", "--out", last.parents[1] / "merged"]
    merged = json.loads(case.flyp("wiseft", last, *same, *out, "--json"))["alphas"]
    figures = {alpha: by_set["v"]["top1"] for alpha, by_set in merged.items()}
    words = [f"{100 * value:.2f}" for value in (rows[0]["v/top1"], top1, figures["0.50"])]
    case.row(f"{what}top-1 of epoch 0, of the last, and of alpha 0.5", ", ".join(words))
    case.check(f"{what}flyp eval: difference of the loss", abs(evaluated["loss"] - rows[-1]["v/loss"]), 1e-3)
    found = {"flyp eval": evaluated["top1"], "wiseft, alpha 1": figures["1.00"]}
    found["ImageClassifier"] = case.top1(classifier, classifier.preprocess)
    for name, figure in found.items():
        case.check(f"{what}{name}: difference of top-1", abs(figure - top1), TIE)
    if not what:  # other objectives' alpha 0 may have another head than epoch 0
        case.check(
            "wiseft, alpha 0: difference of top-1 from epoch 0", abs(figures["0.00"] - rows[0]["v/top1"]), TIE
        )


def export(case: Case, last: Path) -> None:
    """What open_clip and timm load is what was trained."""
    clip, timms = (last.parents[1] / name for name in ("clip", "timm"))
    case.flyp("export", last, "--device", case.device, "--format", "open_clip", "--out", clip)
    case.flyp("export", last, "--device", case.device, "--format", "timm", "--out", timms)
    apart = difference(open_clip.create_model(f"local-dir:{clip}").state_dict(), read_state_dict(last))
    case.check("export to open_clip: difference of a weight", apart)
    ours = ImageClassifier.from_run(last, precision="fp32", device=case.device)
    theirs = timm.create_model(f"local-dir:{timms}", pretrained=True).eval().to(case.device)
    one, other = (case.top1(model, ours.preprocess) for model in (ours, theirs))
    case.check("export to timm: difference of top-1 from ImageClassifier in fp32", abs(one - other), TIE)


# Flags and objectives

SGD = ["--opt", "timm/sgd", "--lr", 1, "--wd", 0, "--warmup", 0, "--epochs", 1, "--train-num-samples", 100]
SGD += ["--workers", 0]  # several would make a batch of 100 and two of 50 from other images
FLAGS = ("--full-text", "--grad-checkpointing", "--accum-freq 2 --batch-size 50", "--torchcompile")


def flags(case: Case, label: str) -> None:
    """One step of SGD, which is as long as the gradient, without and with a flag that must not change it."""

    def step(*flags: str) -> dict[str, Tensor]:
        weights = read_state_dict(
            case.train(f"flags-{label}{''.join(flags)}", *SGD, "--precision", label, *flags)
        )
        weights.pop("logit_scale")  # accumulating, open_clip adds up its gradient once a part
        return weights

    plain, start = step(), read_state_dict(case.root / "start.pt")
    for flag in FLAGS[1:3] if case.small else FLAGS:  # compiling takes a minute
        changed = difference(plain, step(*flag.split())) / difference(plain, start)
        case.check(f"{flag}: difference of a gradient / largest", changed, 1e-3 if label == "fp32" else 0.05)


def objectives(case: Case) -> None:
    for objective in ("lp",) if case.small else ("lp", "ce", "lp-ft", "flyp-ce"):
        score(case, case.train(objective, "--objective", objective, *case.scored), f"{objective}, ")
    followed = ["--anchor", 3.5, "--anchor-teacher", "trajectory", "--precision", "amp_bf16"]
    last = case.train("anchor", *followed, *case.scored)
    score(case, last, "anchor, ")
    average, start = (read_state_dict(path) for path in (teacher_of(last), case.root / "start.pt"))
    share = difference(average, start) / difference(read_state_dict(last), start)
    case.check("anchor: way of the teacher / of the model", share, 1.5)


# Two ranks on one device


def place(case: Case, backend: str = "gloo") -> list[str]:
    same = ["--no-set-device-rank"] if case.cuda else []
    return ["--device", "cuda:0" if case.cuda else "cpu", "--dist-backend", backend, *same]


def two_ranks(case: Case) -> None:
    root, data = case.root / "ranks", case.root / "ranks/even"
    more = ["--epochs", 2, "--batch-size", 20, "--eval-data", f"val={data}", "--group-key", "hand"]
    argv = ranks.words(data, root / "logs", "scored", *more, *place(case))
    objectives = ["flyp"] if case.small else ["flyp", "--collisions soft", "ce"]
    for objective, _, far in ranks.differences(root, [2], objectives, {2: [argv]}, place(case)):
        for what, figure in far.items():
            case.check(f"a step on 2 ranks, {objective}: {what}, against 1", figure, ranks.LIMITS[what])
    checkpoints = root / "logs/scored/checkpoints"
    alone = ranks.figures(checkpoints / "epoch_2.pt", data, MODEL)["top1"]
    apart = abs(ranks.results(checkpoints)[-1]["val/top1"] - alone)
    case.check("evaluation on 2 ranks, against flyp eval on a CPU: top-1", apart, 1.01 / sum(ranks.EVEN))


def nccl(case: Case) -> None:
    if not case.cuda:
        return case.row("2 ranks with nccl", "skipped: it needs a GPU")
    for flags in (["--no-set-device-rank"], []):
        name = f"nccl{len(flags)}"
        argv = ranks.words(case.root / "data", case.root, name, *place(case, "nccl")[:-1], *flags)
        argv += ["--pretrained", str(case.root / "start.pt")]
        started = ranks.Ranks(2, [ranks.REPO / "train_flyp.py", *argv], case.root / name)
        statuses = started.ended(within=60)
        said = " / ".join((started.said(i).splitlines() or ["nothing"])[-1][:300] for i in range(2))
        case.row(
            f"2 ranks with nccl on one GPU, {' '.join(flags) or 'without a flag'}", f"{statuses}: {said}"
        )


def sharded(case: Case) -> None:
    if not fsdp.HAS_FSDP:
        return case.row("--fsdp", "skipped: it needs open_clip 4 and torch 2.9")
    data = fsdp.write(case.root / "fsdp", [MODEL])
    for _, far in fsdp.train(case.root / "fsdp", data, {"flyp": place(case)}):
        for what, limit in fsdp.LIMITS.items():
            case.check(f"--fsdp against DistributedDataParallel: {what}", far[what], limit)


# Out of memory

PROGRAM = """
import resource, sys, torch
from flyp_plugin.commands import main
more, argv = int(sys.argv[1]) * 2**20, sys.argv[2:]
def limit(module, inputs):
    hook.remove()
    if "cpu" in argv:
        now = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + more, now + more))
    else:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + more) / total)
hook = torch.nn.modules.module.register_module_forward_pre_hook(limit)
main(argv)
"""


def memory(case: Case) -> None:
    """A command that finds so many MiB in its first batch, fewer than it needs: one sentence, and status 1."""
    same = [*case.model, "--workers", 0, "--batch-size", 1000]
    train = ["--pretrained", case.root / "start.pt", "--train-data", case.root / "data", "--logs", case.root]
    commands = {"train": (100, ["train", *same, *train, "--full-text", "--name", "memory"])}
    if case.cuda:
        commands["eval"] = (2, ["eval", case.root / "start.pt", *same, *case.scored])
    for name, (size, argv) in commands.items():
        command = [sys.executable, "-c", PROGRAM, str(size), *map(str, argv)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        said = (done.stderr.splitlines() or ["nothing"])[-1]
        good = said.startswith(f"Error: out of {'GPU ' * case.cuda}memory") and "--batch-size" in said
        good = good and done.returncode == 1 and "Traceback" not in done.stderr
        case.row(f"flyp {name} without enough memory", said[:300], "a sentence", "PASS" if good else "FAIL")


CASES: dict[str, Callable[[Case], None]] = {
    **{f"flags-{label}": partial(flags, label=label) for label in ("amp_bf16", "fp32")},
    "two-ranks": two_ranks,
    "short-text": short_text,
    "waits": waits,
    "nccl": nccl,
    "objectives": objectives,
    **{f"run-{label}": partial(run, label=label) for label in PRECISIONS},
    **{
        f"run-{label}": partial(run, label=label)
        for label in ("fp32-deterministic", "amp_bf16-deterministic")
    },
    "memory": memory,
    "fsdp": sharded,
}
EXACT = {"two-ranks", "fsdp"} | {name for name in CASES if "fp32" in name}
SMALL = ("short-text", "waits", "flags-fp32", "run-fp32", "objectives", "nccl", "memory", "fsdp")


if __name__ == "__main__":
    run_cases(__doc__, CASES, SMALL, EXACT)
