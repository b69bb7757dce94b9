"""Time of a training step: open_clip as it is, the same model with short text, and image-only cross-entropy.

    python tests/bench/step.py                          # ViT-B-32 at 32, ViT-B-16 at 16, fp32, CPU
    python tests/bench/step.py --threads 1 --clock cpu  # on a machine that others use too
    python tests/bench/step.py --device cuda --precision amp_bf16 --batch-size 512
    python tests/bench/step.py --model ViT-B-32 --batch-size 8 --rounds 2   # a first look

A step is open_clip's: zero_grad, forward, loss, backward, AdamW, clamp of the logit scale; random weights,
random pixels, one random (class, template) a sample. Image-only is the image tower with a linear head on
the same number of classes, and AdamW over these alone. Each round runs every variant once on one batch, in
changing order; a ratio is the median of the rounds' ratios, so that what slows the machine for a while
cancels.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flyp_plugin import text
from flyp_plugin.precision import match_open_clip_precision

DEFAULTS = {"ViT-B-32": 32, "ViT-B-16": 16}
VARIANTS = ("open_clip", "ours", "image-only")


def main() -> None:
    args = _parse()
    torch.set_num_threads(args.threads)
    match_open_clip_precision()  # TF32 on a GPU, as in training
    rows = []
    for model in args.model:
        size = args.batch_size or DEFAULTS.get(model, 32)
        steps = Steps(model, args.device, args.precision, args.adamw)
        for spec in args.prompts:
            rows.append(_row(model, size, spec, steps, args))
            print(rows[-1], flush=True)
        del steps
    threads = f", {torch.get_num_threads()} threads" if args.device == "cpu" else ""
    print(f"\n{device_name(args.device)}{threads}, {args.precision}, torch {torch.__version__}, ", end="")
    print(f"open_clip {open_clip.__version__}; {args.clock} time, medians of {args.rounds} rounds\n")
    print(
        "| model | batch | prompts | unique, longest | open_clip | ours | image-only | open_clip / ours "
        "| at most | ours / image-only |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    print("\n".join(rows))
    print("\nAt most: open_clip / image-only, what a text tower at no cost would give.")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", nargs="+", default=list(DEFAULTS))
    parser.add_argument("--batch-size", type=int, help="default: 32 for ViT-B-32, 16 for ViT-B-16")
    parser.add_argument("--prompts", nargs="+", default=["1000x80", "10x1"], help="classes x templates")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    add_clock(parser)
    parser.add_argument("--precision", default="fp32", choices=["fp32", "amp_bf16"])
    parser.add_argument("--multiple-of", type=int, default=1, help="text.shorten's multiple_of")
    parser.add_argument("--length", type=int, default=0, help="text.shorten's length")
    parser.add_argument("--adamw", choices=["foreach", "fused"], help="torch's implementation, for all three")
    parser.add_argument("--no-unique", action="store_true", help="trim only")
    parser.add_argument("--profile", action="store_true", help="also print where the time of ours goes")
    return parser.parse_args()


class Steps:
    """The steps on one model: what one leaves in caches and allocator, the next one finds too.

    A batch is (images, tokens, labels), as `Batches.draw` makes it.
    """

    def __init__(self, name: str, device: str, precision: str = "fp32", adamw: str | None = None):
        torch.manual_seed(0)
        self.device, self.precision = device, precision
        with torch.device(device):  # random weights are made there, which for ViT-L takes a minute elsewhere
            self.model = open_clip.create_model(name, device=device, output_dict=True).train()
        self.loss = open_clip.ClipLoss()
        self.head = nn.Linear(self.model.visual.output_dim, 1000).to(device)
        self.image_only = nn.ModuleList([self.model.visual, self.head])
        self.optimizers = [_adamw(module, adamw) for module in (self.model, self.image_only)]
        self.image_size = self.model.visual.image_size[0]

    def contrastive(self, images: Tensor, tokens: Tensor, labels: Tensor) -> None:
        """open_clip's."""
        optimizer = self.optimizers[0]
        optimizer.zero_grad()
        with self._autocast():
            loss = self.loss(**self.model(images, tokens))
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            self.model.logit_scale.clamp_(0, 4.6052)

    def short(self, *batch: Tensor, **options: Any) -> None:
        """The same with short text; the options are text.shorten's."""
        before = type(self.model)
        text.shorten(self.model, **options)
        try:
            self.contrastive(*batch)
        finally:
            self.model.__class__ = before

    def image(self, images: Tensor, tokens: Tensor, labels: Tensor) -> None:
        """Cross-entropy on images alone."""
        optimizer = self.optimizers[1]
        optimizer.zero_grad()
        with self._autocast():
            loss = F.cross_entropy(self.head(self.model.visual(images)), labels)
        loss.backward()
        optimizer.step()

    def forget(self) -> None:
        """Give back the memory of gradients and of AdamW's state."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()
            optimizer.state.clear()
        self.model.zero_grad()

    def _autocast(self):
        kind = torch.device(self.device).type
        return torch.autocast(kind, torch.bfloat16) if self.precision == "amp_bf16" else nullcontext()


def _adamw(model: nn.Module, kind: str) -> torch.optim.Optimizer:
    """As open_clip_train.main makes it, but for torch's implementation where one is asked for."""
    plain = [p for n, p in model.named_parameters() if p.ndim < 2 or "bn" in n or "ln" in n or "bias" in n]
    rest = [
        p for n, p in model.named_parameters() if not (p.ndim < 2 or "bn" in n or "ln" in n or "bias" in n)
    ]
    groups = [{"params": plain, "weight_decay": 0.0}, {"params": rest, "weight_decay": 0.1}]
    return torch.optim.AdamW(groups, lr=1e-5, betas=(0.9, 0.999), eps=1e-8, **({kind: True} if kind else {}))


def _row(name: str, size: int, spec: str, steps: Steps, args: argparse.Namespace) -> str:
    batches = Batches(name, spec, size, steps.image_size, args.device)
    options = {"unique": not args.no_unique, "multiple_of": args.multiple_of}
    ours = partial(steps.short, **({"length": args.length} if args.length else options))
    variants = dict(zip(VARIANTS, (steps.contrastive, ours, steps.image)))
    times: dict[str, list[float]] = {variant: [] for variant in variants}
    shapes = []
    for round_ in range(-1, args.rounds):  # the first is a warm-up: allocator, AdamW's state
        batch = batches.draw()
        turn = [VARIANTS[(round_ + i) % 3] for i in range(3)]
        for variant in turn:
            elapsed = seconds(partial(variants[variant], *batch), args.device, args.clock)
            if round_ >= 0:
                times[variant].append(elapsed)
        shapes.append((len(torch.unique(batch[1], dim=0)), int(batch[1].argmax(-1).max()) + 1))
    if args.profile:
        _profile(partial(ours, *batch))
    unique, longest = (statistics.median(values) for values in zip(*shapes))
    full, ours, image_only = (times[variant] for variant in VARIANTS)
    cells = [f"{statistics.median(column) * 1000:.0f} ms" for column in (full, ours, image_only)]
    cells += [f"{_ratio(*pair):.2f}x" for pair in ((full, ours), (full, image_only), (ours, image_only))]
    what = f"{name} | {size} | {batches.prompts} | {unique:.0f}, {longest:.0f}"
    return f"| {what} | {' | '.join(cells)} |"


class Batches:
    """Batches of one size: the same random pixels, and new random prompts, `spec` being classes x templates."""

    def __init__(self, model: str, spec: str, size: int, image_size: int, device: str):
        classes, templates = map(int, spec.split("x"))
        self.prompts = f"{classes} classes x {templates}"
        self.tokenizer, self.device = open_clip.get_tokenizer(model), device
        self.names = open_clip.IMAGENET_CLASSNAMES[:classes]
        self.templates: list[Callable[[str], str]] = (
            [lambda c: f"a photo of a {c}."]
            if templates == 1
            else open_clip.OPENAI_IMAGENET_TEMPLATES[:templates]
        )
        self.random = torch.Generator().manual_seed(0)
        self.images = torch.randn((size, 3, image_size, image_size), device=device)

    def draw(self) -> tuple[Tensor, Tensor, Tensor]:
        size = (len(self.images),)
        labels = torch.randint(len(self.names), size, generator=self.random)
        chosen = torch.randint(len(self.templates), size, generator=self.random)
        prompts = [self.templates[t](self.names[c]) for t, c in zip(chosen.tolist(), labels.tolist())]
        return self.images, self.tokenizer(prompts).to(self.device), labels.to(self.device)

    def longest(self) -> int:
        """Positions of the longest prompt there is, with its EOT: that of the longest name in the longest template."""

        def length(prompts: list[str]) -> Tensor:
            return self.tokenizer(prompts).argmax(dim=-1) + 1

        template = self.templates[int(length([t(self.names[0]) for t in self.templates]).argmax())]
        return int(length([template(name) for name in self.names]).max())


def seconds(step: Callable[[], object], device: str, clock: str = "wall") -> float:
    synchronize = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    now = time.process_time if clock == "cpu" else time.perf_counter
    synchronize()
    start = now()
    step()
    synchronize()
    return now() - start


def _ratio(above: list[float], below: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(above, below))


def _profile(step: Callable[[], None]) -> None:
    with torch.profiler.profile() as profile:
        step()
    print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=15, max_name_column_width=40))


def add_clock(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--clock", default="wall", choices=["wall", "cpu"], help="cpu: the process's CPU time"
    )


def device_name(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    with open("/proc/cpuinfo") as lines:
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))


if __name__ == "__main__":
    main()
