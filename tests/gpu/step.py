"""Time and memory of a training step on a GPU: open_clip, short text in all its forms, and images alone.

    python -m tests.gpu.step --device cuda --out tables      # 8 minutes on an H100
    python -m tests.gpu.step --device cpu --out tables --small

Steps are those of tests/bench/step.py. A table for each model and precision has the time of a step with new prompts for each
way to shorten text (text.shorten): equal rows once or all rows, positions as they come or rounded up to 8 or 16, and a fixed
length, which training uses on a GPU; of some also the peak of allocated memory and the largest batch that fits, to a tenth.
The end says which form is the fastest over all tables.
"""

import gc
import json
import statistics
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import open_clip
import torch

from flyp_plugin.errors import OUT_OF_MEMORY
from flyp_plugin.precision import match_open_clip_precision
from tests import digits
from tests.bench.step import Batches, Steps, seconds
from tests.gpu.report import Report, parser

MODELS = {"ViT-B-32": 512, "ViT-B-16": 256, "ViT-L-14": 64}
SMALL = {**digits.MODEL, "text_cfg": {**digits.MODEL["text_cfg"], "width": 16, "heads": 2}}
PRECISIONS = {"TF32": "fp32", "amp_bf16": "amp_bf16"}  # match_open_clip_precision allows TF32 on a GPU
PROMPTS = ("1000x80", "10x1")
FIXED = "fixed length"
FORMS: dict[str, dict[str, Any]] = {
    "unique rows": {},
    "unique rows, multiple of 8": {"multiple_of": 8},
    "unique rows, multiple of 16": {"multiple_of": 16},
    "all rows": {"unique": False},
    "all rows, multiple of 8": {"unique": False, "multiple_of": 8},
    "all rows, multiple of 16": {"unique": False, "multiple_of": 16},
    FIXED: {},  # that of the longest prompt
}
SEARCHED = ("open_clip", "unique rows", FIXED, "images alone")  # whose memory is measured
ROUNDS = 6
LARGEST_ON_CPU = 13  # larger batches count as too large: nobody wants to fill the memory of a CPU


def main() -> None:
    args = parser(__doc__).parse_args()
    report = Report(args.out, "step", args.device)
    match_open_clip_precision()
    models = MODELS
    if args.small:
        models = {"digits-small": 8}
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "digits-small.json")
            path.write_text(json.dumps(SMALL))
            open_clip.add_model_config(path)
    ratios: dict[str, list[float]] = {form: [] for form in FORMS}
    for name, size in models.items():
        for label, precision in PRECISIONS.items():
            report(f"\n## {name}, batch {size}, {label}\n")
            if report.left() < 45:
                report("No time left.")
                continue
            times = table(Steps(name, args.device, precision), name, size, args, report)
            for found in times:
                for form in FORMS:
                    ratios[form].append(found["open_clip"] / found[form])
            gc.collect()
    report(
        "\n## The fastest\n\nopen_clip / form over all columns of times above: the geometric mean, and the worst."
    )
    report.header("form", "mean", "worst")
    means = {form: statistics.geometric_mean(values) for form, values in ratios.items()}
    for form in FORMS:
        report.row([form, f"{means[form]:.2f}x", f"{min(ratios[form]):.2f}x"])
    best = max(means, key=means.__getitem__)
    report(
        f"\nThe fastest form over all is: {best} ({means[best]:.2f}x). What training uses on a GPU: {FIXED}."
    )


def table(steps: Steps, name: str, size: int, args: Any, report: Report) -> list[dict[str, float]]:
    """Print the table of one model and precision; returns its times, in seconds by variant, for each of PROMPTS."""
    times, columns = [], []
    for spec in PROMPTS:
        batches = Batches(name, spec, size, steps.image_size, args.device)
        variants = make_variants(steps, batches.longest())
        times.append(measure_time(variants, batches, args))
        columns += [f"{batches.prompts}, at most {batches.longest()} positions", "open_clip / it"]
        if spec == PROMPTS[0]:
            memory = measure_memory(variants, batches, steps, report)
    report.header("", *columns, "peak", "largest batch")
    for variant in variants:
        cells = []
        for found in times:
            cells += [f"{1000 * found[variant]:.0f} ms", f"{found['open_clip'] / found[variant]:.2f}x"]
        report.row([variant, *cells, *memory.get(variant, ("", ""))])
    fastest = (
        min((form for form in found if form != "images alone"), key=found.__getitem__) for found in times
    )
    report(f"\nFastest: {'; '.join(f'{spec} {form}' for spec, form in zip(PROMPTS, fastest))}.")
    return times


def make_variants(steps: Steps, length: int) -> dict[str, Callable]:
    forms = {**FORMS, FIXED: {"length": length}}
    short = {form: partial(steps.short, **options) for form, options in forms.items()}
    return {"open_clip": steps.contrastive, **short, "images alone": steps.image}


def measure_time(variants: Mapping[str, Callable], batches: Batches, args: Any) -> dict[str, float]:
    """The median seconds of each variant, all of them on each batch, in changing order."""
    names, times = list(variants), {name: list[float]() for name in variants}
    for round_ in range(-1, 1) if args.small else range(-2, ROUNDS):  # below 0: warm-up
        batch = batches.draw()
        for i in range(len(names)):
            name = names[(round_ + i) % len(names)]
            elapsed = seconds(partial(variants[name], *batch), args.device)
            if round_ >= 0:
                times[name].append(elapsed)
    return {name: statistics.median(values) for name, values in times.items()}


def measure_memory(
    variants: Mapping[str, Callable], batches: Batches, steps: Steps, report: Report
) -> dict[str, tuple[str, str]]:
    """The peak of allocated memory at the batch's size, and the largest batch that fits, of the variants SEARCHED."""
    images, tokens, labels = batches.draw()
    size, cuda, memory = len(images), images.is_cuda, {}

    def fits(variant: Callable, batch: int) -> bool:
        if not cuda and batch > LARGEST_ON_CPU:
            return False
        steps.forget()
        if cuda:
            torch.cuda.empty_cache()
        rows = torch.arange(batch, device=images.device) % size
        try:
            for _ in range(2):  # the first makes AdamW's state
                variant(images[rows], tokens[rows], labels[rows])
            if cuda:
                torch.cuda.synchronize()
        except RuntimeError as error:
            if not OUT_OF_MEMORY.search(str(error)):
                raise
            return False
        return True

    for name in SEARCHED:
        peak = ""
        if cuda:
            torch.cuda.reset_peak_memory_stats()
            fits(variants[name], size)
            peak = f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
        largest = find_largest(partial(fits, variants[name]), size, lambda: report.left() > 60)
        memory[name] = (peak, str(largest or "no time"))
    steps.forget()
    return memory


def find_largest(fits: Callable[[int], bool], start: int, more: Callable[[], bool] = lambda: True) -> int:
    """The largest batch that fits, to a tenth, by doubling and bisecting from `start`; 0 where `more` says to stop."""
    low, high = 0, start
    while more() and fits(high):
        low, high = high, 2 * high
    while more() and high - low > max(1, low // 10):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low if more() else 0


if __name__ == "__main__":
    main()
