"""Time to build a zero-shot head: open_clip.build_zero_shot_classifier as it is, and the same call with short
text.

    python tests/bench/head.py                          # ViT-B-32, 20 of ImageNet's classes x 80 templates
    python tests/bench/head.py --threads 1 --clock cpu  # on a machine that others use too
    python tests/bench/head.py --device cuda --classes 1000 --runs 9

The classes are a sample evenly spread over ImageNet's names: at full length all 1000 x 80 take an hour on
two cores. Runs alternate; the ratio is the median of the pairs' ratios. Tokenising is inside both.
"""

import argparse
import logging
import statistics

import open_clip
import torch
from step import add_clock, device_name, seconds

from flyp_plugin import text


def main() -> None:
    args = _parse()
    logging.disable(logging.WARNING)  # "no pretrained weights": so it is meant
    torch.set_num_threads(args.threads)
    rows = [_row(model, args) for model in args.model]
    threads = f", {torch.get_num_threads()} threads" if args.device == "cpu" else ""
    print(f"\n{device_name(args.device)}{threads}, fp32, torch {torch.__version__}, ", end="")
    print(f"open_clip {open_clip.__version__}; {args.classes} of ImageNet's 1000 classes, ", end="")
    print(f"80 templates; {args.clock} time, medians of {args.runs} pairs of runs\n")
    print("| model | prompts | open_clip | short text | ratio | largest difference of the heads |")
    print("|---|---|---|---|---|---|")
    print("\n".join(rows))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", nargs="+", default=["ViT-B-32"])
    parser.add_argument("--classes", type=int, default=20)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    add_clock(parser)
    parser.add_argument("--chunk", type=int, help="rows encoded at once, in place of text.CHUNK")
    return parser.parse_args()


def _row(name: str, args: argparse.Namespace) -> str:
    torch.manual_seed(0)
    model = open_clip.create_model(name, device=args.device).eval()
    tokenizer = open_clip.get_tokenizer(name)
    every = len(open_clip.IMAGENET_CLASSNAMES) // args.classes
    names = open_clip.IMAGENET_CLASSNAMES[::every][: args.classes]
    if args.chunk:
        text.CHUNK[args.device.split(":")[0]] = args.chunk

    def build() -> torch.Tensor:
        templates = open_clip.OPENAI_IMAGENET_TEMPLATES
        return open_clip.build_zero_shot_classifier(model, tokenizer, names, templates, device=args.device)

    def build_short() -> torch.Tensor:
        with text.short_text(model):
            return build()

    difference = (build_short() - build()).abs().max().item()  # and the warm-up
    pairs = []
    for run in range(args.runs):
        first, second = (build, build_short) if run % 2 else (build_short, build)
        pair = {
            first: seconds(first, args.device, args.clock),
            second: seconds(second, args.device, args.clock),
        }
        pairs.append((pair[build], pair[build_short]))
        print(f"{name}, run {run + 1}: {pairs[-1][0]:.2f} s, {pairs[-1][1]:.2f} s", flush=True)
    full, short = (statistics.median(times) for times in zip(*pairs))
    ratio = statistics.median(a / b for a, b in pairs)
    prompts = len(names) * len(open_clip.OPENAI_IMAGENET_TEMPLATES)
    return f"| {name} | {prompts} | {full:.2f} s | {short:.2f} s | {ratio:.1f}x | {difference:.1e} |"


if __name__ == "__main__":
    main()
