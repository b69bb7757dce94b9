"""How far 20 steps with short text end from open_clip's own: losses, and weights in parts of the way they went.

    python tests/bench/drift.py [--model ViT-B-32] [--batch-size 8] [--steps 20]

The same start, images, prompts (ImageNet's names and templates) and AdamW for each; fp32 on a CPU. For measure, open_clip
against itself on one thread: its matrix kernels then add in another order, too.
"""

import argparse
import logging
import random

import open_clip
import torch

from flyp_plugin import text

VARIANTS = {
    "open_clip on one thread": None,
    "--full-text": None,
    "trimmed to a multiple of 16": {"unique": False, "multiple_of": 16},
    "trimmed": {"unique": False},
    "trimmed, equal prompts once (the default)": {},
}


def train(args: argparse.Namespace, variant: str) -> tuple[list[float], dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    model = open_clip.create_model(args.model, output_dict=True).train()
    if (options := VARIANTS.get(variant)) is not None:
        text.shorten(model, **options)
    torch.set_num_threads(1 if "one thread" in variant else args.threads)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, betas=(0.9, 0.999), weight_decay=0.1)
    tokenizer, rng, losses = open_clip.get_tokenizer(args.model), random.Random(0), []
    for _ in range(args.steps):
        chosen = rng.choices(open_clip.IMAGENET_CLASSNAMES[: args.classes], k=args.batch_size)
        tokens = tokenizer([rng.choice(open_clip.SIMPLE_IMAGENET_TEMPLATES)(name) for name in chosen])
        images = torch.randn(args.batch_size, 3, *model.visual.image_size)
        optimizer.zero_grad()
        loss = open_clip.ClipLoss()(**model(images, tokens))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, {name: p.detach() for name, p in model.named_parameters()}


def norm(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return sum((a[name] - b[name]).double().square().sum().item() for name in a) ** 0.5


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="ViT-B-32")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--classes", type=int, default=10, help="few, so that prompts repeat")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    logging.disable(logging.WARNING)  # "no pretrained weights": so it is meant
    torch.manual_seed(0)
    start = dict(open_clip.create_model(args.model).named_parameters())
    losses, weights = train(args, "open_clip")
    way = norm(weights, {name: p.detach() for name, p in start.items()})
    print("| against open_clip | largest difference of a loss | difference of the weights / way |")
    print("|---|---|---|")
    for variant in VARIANTS:
        other, drifted = train(args, variant)
        furthest = max(abs(a - b) for a, b in zip(losses, other))
        print(f"| {variant} | {furthest:.1e} | {norm(weights, drifted) / way:.1e} |", flush=True)


if __name__ == "__main__":
    main()
