"""What `flyp train` checks before and while open_clip builds the model.

A mistake is looked for here only if open_clip, torch or timm would ignore it, or notice it only after hours; what they
report at the start of a run is left to them. A new check of flags is one `yield` in `find_mistakes` (an error) or
`find_doubts` (a warning); those of the objectives' flags are in objectives.py.
"""

import math
import re
from argparse import Namespace
from collections.abc import Iterable, Iterator, Sequence
from importlib.util import find_spec
from itertools import product
from typing import Any

import open_clip
import torch
from open_clip.model import CLIP, CustomTextCLIP
from open_clip.transformer import QuickGELU

from flyp_plugin import checkpoints, run_folder, sharding, targets
from flyp_plugin.errors import InputError
from flyp_plugin.flags import to_argv
from flyp_plugin.learned import load_head
from flyp_plugin.model_spec import FLAGS, ModelSpec, square_as_int
from flyp_plugin.record import Record, is_sharded
from flyp_plugin.remote import is_url

# The precisions that keep the weights, and so AdamW's state, in 16 bits
FP16, BF16 = ("fp16", "pure_fp16"), ("bf16", "pure_bf16")
# AdamW divides by sqrt(mean of squared gradients) + eps. In fp16 that mean is 0 for gradients below 0.005 (with beta2
# 0.999), so a step can be 0.005 / eps times --lr: with 1e-8, which is 0 itself, NaN; with 1e-6, 5000 times, after which a
# model of digits is at chance. With 1e-3 it learns as in fp32 or a little slower.
FP16_EPS = "1e-3"
# open_clip's flags (regular expressions) that it silently ignores without another flag
_NEEDS = {
    "lock_image_(unlocked_groups|freeze_bn_stats)": "lock_image",
    "lock_text_(unlocked_layers|freeze_layer_norm)": "lock_text",
    "distill_model": "distill_pretrained",
    "distill_pretrained": "distill_model",
    "train_data_upsampling_factors": "dataset_resampled",
    "torchcompile_.*": "torchcompile",
    "fsdp_.*": "fsdp",
    # its loader of captions reads --val-data only
    "csv_.*|text_key|json_text_.*|max_image_pixels|text_pad_multiple|val_retrieval_.*": "val_data",
}
# open_clip 4's flags (a regular expression) for other data than images of one size and short texts
_OTHER_DATA = "(use|force)_naflex.*|naflex_.*|length_bucketing|bucket_.*|audio_.*|pretrained_audio"


def find_mistakes(args: Namespace, typed: Iterable[str], world_size: int) -> Iterator[str]:
    """Mistakes in flags that open_clip would silently ignore, or that would silently spoil the training.

    `typed`: the names of open_clip's flags on the command line.
    """
    if getattr(args, "fsdp", False):
        if args.precision in (*FP16, *BF16):
            yield f"--fsdp with --precision {args.precision} would mix weights of 16 and 32 bits; use amp_bf16 or fp32."
        if world_size == 1:
            yield "--fsdp divides a model among several ranks, and there is one; start them with torchrun, or leave it out."
        if not sharding.is_supported():
            yield f"--fsdp needs torch 2.9 or newer, and this is {torch.__version__}; install it, or leave the flag out."
    # of these open_clip complains too, but an evaluation later
    compiles_steps = getattr(args, "torchcompile_strategy", "") == "step"
    if compiles_steps and (args.accum_freq > 1 or args.precision == "amp"):
        yield "--torchcompile-strategy step needs --accum-freq 1 and a --precision other than amp; use task or model."
    for name, (pattern, other) in product(typed, _NEEDS.items()):
        if re.fullmatch(pattern, name) and getattr(args, name) and not getattr(args, other):
            flag, missing = to_argv({name: True, other: True})
            yield f"{flag} has no effect without {missing}; add that, or leave it out."
    for name in typed:
        if re.fullmatch(_OTHER_DATA, name):
            flag = to_argv({name: True})[0]
            yield f"{flag} is not supported: FLYP trains on images of one size and class prompts; leave it out."
    if not args.train_data:
        yield "--train-data is missing; give a data folder or shards (see --help)."
    if args.dataset_type not in ("auto", "webdataset"):
        yield f"--dataset-type {args.dataset_type} is not supported; make shards with `flyp shards write`."
    if args.shots_seed is not None and not args.shots:
        yield "--shots-seed has no effect without --shots; add that, or leave it out."
    if args.shots and args.train_data_upsampling_factors:
        yield "--train-data-upsampling-factors has no effect with --shots; leave one of them out."
    if args.balance and args.template_order == "table":
        yield "--template-order table needs each image once an epoch, unlike --balance; leave one of them out."
    if args.epochs < 1 or args.log_every_n_steps < 1:
        yield f"--epochs and --log-every-n-steps must be >= 1, got {args.epochs} and {args.log_every_n_steps}."
    if not (args.wd >= 0 and args.warmup >= 0):  # NaN too
        yield f"--wd and --warmup must be >= 0, got {args.wd:g} and {args.warmup}."
    if args.grad_clip_norm is not None and not args.grad_clip_norm > 0:
        yield f"--grad-clip-norm must be > 0, got {args.grad_clip_norm:g}."
    cooldown, opt = getattr(args, "epochs_cooldown", None), getattr(args, "opt", "adamw")
    if cooldown is not None and (args.lr_scheduler != "const-cooldown" or not 0 <= cooldown <= args.epochs):
        yield f"--epochs-cooldown {cooldown} must be from 0 to --epochs, and needs --lr-scheduler const-cooldown."
    if getattr(args, "momentum", None) is not None and "timm" not in opt:
        yield f"--momentum has no effect on --opt {opt}, only on timm's (such as timm/sgd); leave it out."
    if set(args.report_to.split(",")) - {"tensorboard", "wandb", "trackio", "all", "none", ""}:
        yield f"--report-to {args.report_to} must be tensorboard, wandb, or both joined by a comma."
    if args.copy_codebase and "site-packages" in str(getattr(find_spec("open_clip"), "origin", "")):
        yield "--copy-codebase would copy all of site-packages, where open_clip is installed; leave it out."
    if args.precision in FP16 and args.eps is not None and args.eps <= 2**-25:
        yield f"--eps {args.eps:g} is 0 in --precision {args.precision}, so all weights become NaN; give {FP16_EPS}."


def find_doubts(args: Namespace, steps: int) -> Iterator[str]:
    """Warnings about flags with which the `steps` optimizer steps of a run are larger or smaller than they seem."""
    precision = f"--precision {args.precision}"
    if args.precision in FP16:
        yield f"{precision} keeps weights and AdamW's state in 16 bits, too few for small gradients; --precision amp does not."
        # of a smaller gradient the mean square is rounded to 0
        gradient = math.sqrt(2**-25 / (1 - (args.beta2 or 0)))
        if args.eps is not None and gradient > 10 * args.eps:
            times = f"{gradient / args.eps:.0f} times --lr"
            yield f"With --eps {args.eps:g} in {args.precision} a step may be {times}; {FP16_EPS} is safe."
    if getattr(args, "fsdp", False) and args.precision != "fp32":
        yield f"--fsdp with {args.precision} computes everything in 16 bits, losses and class logits too."
    if args.precision in BF16:
        lost = f"most steps of --lr {args.lr:g}"
        yield f"{precision} keeps weights in 16 bits, which rounds away {lost}; amp_bf16 keeps them in 32."
    if args.warmup > steps and not args.skip_scheduler:
        share = f"{steps / args.warmup:.0%} of --lr"
        yield f"--warmup {args.warmup} is longer than the run of {steps} steps, which ends at {share}."


def check_start(args: Namespace, resumed: Record | None) -> None:
    """InputError if the name is taken, or training cannot start from --pretrained or --resume.

    That is because of a learned head, NaN in the weights, or another teacher of --anchor than that of the resumed run.
    """
    run_folder.check_free(args)
    if args.resume and args.anchor and args.anchor_teacher == "pretrained":
        run_folder.refuse_other_start(resumed, args)
    if load_head(checkpoints.read_torch_file(args.pretrained)):
        raise InputError(
            f"{args.pretrained} has a learned head, which open_clip cannot load; export its towers with "
            "`flyp export --format open_clip` and start from those."
        )
    if is_sharded(args.resume or ""):
        if not getattr(args, "fsdp", False):
            raise InputError(f"{args.resume} is a sharded checkpoint; resume it with --fsdp of open_clip 4.")
    elif args.resume and args.resume != "latest" and not is_url(args.resume):
        checkpoints.read_state_dict(args.resume, joined=False)


def resolve_model(args: Namespace, resumed: Record | None) -> ModelSpec:
    """The model of the run that is resumed, else of the run that --pretrained comes from, else of --model and its tag.

    Sets open_clip's flags in `args` so that open_clip builds exactly that model.

    Raises:
        InputError: flags that contradict the resumed run or a tag; a model configuration that has changed.
    """
    flags = {name: getattr(args, name, None) for name in FLAGS}
    if resumed:
        spec = resumed.spec.with_flags(flags)
        run_folder.refuse_other_run(resumed, args, spec)
        run_folder.refuse_other_optimizer(resumed, args)
    else:
        spec = targets.resolve_spec(args.model, args.pretrained, flags)
    images = {f"image_{name}": value for name, value in spec.images.items()}
    made = {**images, **spec.forced, "force_quick_gelu": spec.quick_gelu}
    changed = spec.differences(ModelSpec.of(args.model, args.pretrained).with_flags({**flags, **made}))
    if changed:
        raise InputError(
            f"open_clip's configuration of {args.model} differs from the one that the weights were trained with "
            f"({changed[0]}); give that one with --model-config."
        )
    vars(args).update(made)
    return spec


def check_built(model: Any, spec: ModelSpec) -> None:
    """InputError if open_clip silently built another model than `spec`.

    Before 2.30 it does so with OpenAI's weights; before 3.0 it leaves timm's towers at their own image size.
    """
    built, trunk = model.visual.preprocess_cfg, getattr(model.visual, "trunk", None)  # a trunk is timm's
    wrong = [
        f"{name} {square_as_int(built[name])}, not {value}"
        for name, value in spec.preprocess_cfg.items()
        if square_as_int(built.get(name, value)) != value
    ]
    quick_gelu = any(isinstance(module, QuickGELU) for module in model.modules())
    if (trunk is None or isinstance(model, CLIP)) and spec.quick_gelu != quick_gelu:
        wrong.append(f"another activation than {spec.activation}")
    size = square_as_int(getattr(getattr(trunk, "patch_embed", None), "img_size", None))
    if spec.forced.get("force_image_size") and size and size != spec.preprocess_cfg["size"]:
        wrong.append(f"a timm image tower for size {size}, not {spec.preprocess_cfg['size']}")
    if wrong:
        raise InputError(
            f"open_clip_torch {open_clip.__version__} built {spec.name} with {wrong[0]}; leave out the flag that asks for "
            "it, or install a newer open_clip_torch."
        )


def check_loss(model: Any, args: Namespace, changes: Sequence[str]) -> None:
    """InputError if the model is made for another loss: sigmoid instead of softmax, or more terms, as in CoCa.

    `changes`: the flags that need another loss than open_clip's.
    """
    sigmoid = getattr(model, "logit_bias", None) is not None and args.objective == "flyp"
    if sigmoid and not args.siglip and not args.softmax_loss:
        raise InputError(
            f"{args.model} was pretrained with the sigmoid loss; give --siglip to fine-tune it with the same loss, or "
            "--softmax-loss to train it with the softmax loss."
        )
    if changes and not isinstance(model, (CLIP, CustomTextCLIP)):
        raise InputError(
            f"{changes[0]} cannot train a {type(model).__name__} such as {args.model}; leave the flag out."
        )
