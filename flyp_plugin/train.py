"""FLYP's flags and defaults on top of open_clip's training script, which does the training.

    python train_flyp.py --model ViT-B-16 --pretrained openai --train-data data --eval-data val=data

`flyp train` and `python -m flyp_plugin.train` are the same program. Flags that are not listed by --help are
open_clip's and go through to it untouched.
"""

import argparse
import logging
import math
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import chain
from typing import Any

import open_clip
import torch
from fsspec.core import url_to_fs
from open_clip.hf_model import HFTextEncoder
from open_clip.model import CLIP, CustomTextCLIP
from open_clip.transformer import QuickGELU

from flyp_plugin import checkpoints, objectives, openclip, record, run_folder, shards, targets
from flyp_plugin.data import ClassPromptDataset, peek
from flyp_plugin.errors import InputError, run
from flyp_plugin.evalsets import EvalSet, loader_from_args, parse_eval_sets, with_progress
from flyp_plugin.flags import (
    DEFAULTS,
    FP16_EPS,
    GLOBAL_BATCH,
    IN_FP16,
    LP_C,
    check_open_clips,
    parser,
    to_argv,
)
from flyp_plugin.heads import image_features, zeroshot_as_learned
from flyp_plugin.learned import HEAD, class_rows, fit_head, head_of
from flyp_plugin.model_spec import FLAGS, PREPROCESSING, ModelSpec, is_place, square_as_int
from flyp_plugin.monitor import Monitor
from flyp_plugin.prompts import resolve_prompts
from flyp_plugin.record import Record
from flyp_plugin.sources import count_samples, expand_sources, is_url
from flyp_plugin.text import shorten

# other defaults, which show what the user gives; the number is one that nobody gives
_NONE = "-987654"
_OTHER = {"precision": "bf16"}
_log = logging.getLogger(__name__)


class FlypRun:
    """A FLYP run, which openclip.py puts into open_clip's: made and checked before there is a model.

    Its methods are called on every rank: on_model, train_data, create_loss, evaluate and before_epoch in turn, finish.
    `args` are open_clip's and ours; main() adds rank, world_size, name, ... before the first of these calls.

    Args:
        ours: FLYP's own flags.
        rest: all other flags, which are open_clip's.

    Raises:
        InputError: whatever is wrong in the flags, the class names, the templates or the first samples.
    """

    def __init__(self, ours: argparse.Namespace, rest: Sequence[str]):
        rank, world_size = openclip.world()
        self.defaults = {} if ours.no_flyp_defaults else _defaults(rest, world_size)
        # open_clip's default is cuda, with a warning where there is none
        device = ["--device", checkpoints.default_device()]
        args = openclip.parse_args([*_flags(self.defaults, world_size), *device, *rest])
        self.args = args = argparse.Namespace(**{**vars(args), **vars(ours)})
        if not is_place(args.model):
            args.model = args.model.replace("/", "-")  # ViT-B/16, which some of open_clip takes
        if args.model_config:
            targets.add_model_config(args.model_config)
        if head_of(checkpoints.read_torch_file(args.pretrained)):  # which also finds it whole, and numbers
            raise InputError(
                f"{args.pretrained} has a learned head, which open_clip cannot load; `flyp export --format open_clip` writes "
                "its towers alone."
            )
        _check_resume(args.resume)
        if args.name == "":
            raise InputError("--name is empty; give the run a name, or leave the flag out.")
        _check_numbers(args)
        check_open_clips(args, openclip.parse_args([]), world_size)
        _check_eps(args)
        _check_reports(args.report_to)
        if rank == 0:
            run_folder.check_free(args)
        self.resumed = run_folder.resumed_record(args)
        self.spec = _spec(args, self.resumed)
        self.objective = objectives.OBJECTIVES[args.objective]
        self.changes = objectives.changes(args)  # flags that need another loss than open_clip's
        objectives.check_flags(args)
        _check_shots(args)
        self.shards, self.weights = _shards(args)
        self.prompts = resolve_prompts(self.shards, args.classnames, args.templates)
        given = {"classnames": args.classnames, "templates": args.templates}
        self.eval_sets = parse_eval_sets(args.eval_data, fallback=given)
        for eval_set in self.eval_sets if self.objective.learned_head else ():
            class_rows(self.prompts.classnames, eval_set.prompts.classnames, f"--eval-data {eval_set.name}")
        self.few = self._take_shots() if args.shots is not None else None
        if not self.objective.loop:
            self.defaults.pop("epochs", None)
            args.epochs = 1  # the fit, which the checkpoint epoch_1.pt holds
        self.num_samples = args.train_num_samples or count_samples(self.shards, args.image_key)
        first = self.shards if self.num_samples else self.shards[:3]  # of none, it says what is wrong there
        self.pairs = peek(first, self.prompts, args.seed, args.image_key, args.label_key)
        self.steps = _steps(args, self.num_samples, world_size)
        most = self.steps * args.epochs // 10
        if "warmup" in self.defaults and args.warmup > most:
            self.defaults["warmup"] = f"{most} (a tenth of the steps, which are few)"
            args.warmup = most
        if args.skip_scheduler:
            self.defaults.pop("warmup", None)  # it has none
        self.settings = record.training_settings(vars(args), samples=self.num_samples, ranks=world_size)
        self.monitor: Monitor | None = None
        self.image_size = 0

    def _take_shots(self) -> tempfile.TemporaryDirectory:
        """Train on a few-shot set: written to a folder of this process's own, which goes when the run does."""
        args, few = self.args, tempfile.TemporaryDirectory(prefix="flyp-shots-")
        folder = f"{few.name}/train"
        keys = {"label_key": args.label_key, "image_key": args.image_key}
        shards.subset(args.train_data, folder, shots=args.shots, seed=args.shots_seed or 0, **keys)
        self.shards = shards.local_shards(folder, "train")
        self.weights = [1.0] * len(self.shards) if args.dataset_resampled else None
        return few

    def record(self, epoch: int) -> Record:
        """What the checkpoints of this run mean, which starts after `epoch`; see record.py."""
        args = self.args
        content = record.describe_model(self.spec)
        content |= {
            name: getattr(args, name) for name in ("model_config", "precision", "objective", "eval_data")
        }
        content |= {name: getattr(self.prompts, name) for name in ("classnames", "templates")}
        content["classes_given"] = [name for name in ("classnames", "templates") if getattr(args, name)]
        content["keys"] = {name: getattr(args, name) for name in ("image_key", "label_key", "group_key")}
        content["training"] = self.settings
        if (
            epoch
            and self.resumed
            and args.pretrained
            in (
                "",
                self.resumed.pretrained,
            )
        ):  # it comes from the checkpoint now
            content["pretrained"] = self.resumed.get("pretrained", {})
        else:
            content["pretrained"] = record.describe_weights(args.pretrained)
        return Record(content)

    @property
    def evaluates(self) -> bool:
        return bool(self.eval_sets)

    def on_model(self, model: torch.nn.Module) -> None:
        """Refuse the wrong loss, make the text tower short, and the model what its objective wants."""
        args = self.args
        _check_built(model, self.spec)
        sigmoid = getattr(model, "logit_bias", None) is not None and args.objective == "flyp"
        if sigmoid and not args.siglip and not args.softmax_loss:
            raise InputError(
                f"{args.model} was pretrained with the sigmoid loss, so like pretrained means --siglip; give that, "
                "or --softmax-loss to train it with the softmax loss all the same."
            )
        own_text = not isinstance(getattr(model, "text", None), HFTextEncoder)
        if args.lock_text and own_text and not args.lock_text_freeze_layer_norm:
            raise InputError(
                f"open_clip cannot lock the text tower of {args.model} but for its layer norms; give "
                "--lock-text-freeze-layer-norm with --lock-text."
            )
        size = getattr(model.visual, "image_size", 0)  # int or (height, width)
        self.image_size = size if isinstance(size, int) else max(size)
        tokenizer = self.spec.tokenizer()
        if not args.full_text:
            two = tokenizer([self.prompts(0, 0), self.prompts(-1, -1)])
            compiled = args.torchcompile  # wants few shapes, and none that depend on the data
            shorten(model, two, unique=not compiled, multiple_of=8 if compiled else 1)
        if self.changes:
            self._install(model, tokenizer)

    def _install(self, model: Any, tokenizer: Callable) -> None:
        if not isinstance(model, (CLIP, CustomTextCLIP)):  # whose outputs the losses know
            raise InputError(
                f"{self.changes[0]} cannot train a {type(model).__name__}, as {self.args.model} is; take a CLIP, or "
                "leave the flag out."
            )
        if self.objective.learned_head:
            setattr(model, HEAD, zeroshot_as_learned(model, tokenizer, self.prompts, self.args.precision))
        if self.args.objective == "flyp-ce":
            model.class_tokens = self.prompts.tokenize(tokenizer)
        self.objective.install(model)

    def create_loss(self) -> torch.nn.Module:
        """The loss of an objective that is not plain FLYP."""
        return self.objective.loss(self.args)

    def before_epoch(self, model: Any, preprocess: Callable, epoch: int) -> bool:
        """Fit the head of a linear probe before the first epoch; whether open_clip's loop is to train then."""
        if self.objective.fit and epoch == 0:
            self._fit(model, preprocess)
        return self.objective.loop

    def after_epoch(self, model: torch.nn.Module, epoch: int) -> None:
        """InputError where training has diverged: nothing that comes after could be used."""
        bad = next((name for name, tensor in model.named_parameters() if not tensor.isfinite().all()), None)
        if bad:
            raise InputError(
                f"epoch {epoch} has left weights that are no finite numbers ({bad}): training has diverged; begin a new "
                f"run {_against_divergence(self.args)}. Earlier epochs are untouched."
            )

    def _fit(self, model: Any, preprocess: Callable) -> None:
        args, head = self.args, getattr(model, HEAD)
        images = EvalSet("features", self.shards, self.prompts, args.train_data)
        # `preprocess` is the evaluation's, without augmentation
        dataset = loader_from_args(images, preprocess, args, args.max_lost)
        features, labels = image_features(model, with_progress(dataset, "features"), args.precision)
        c = args.lp_c or LP_C
        head.weight.data.copy_(fit_head(features, labels, len(head.weight), c))
        _log.info(f"Fitted the head to the features of all images, with C = {c:g}.")

    def train_data(self, preprocess: Callable, tokenizer: Callable, as_dict: bool) -> ClassPromptDataset:
        """The training batches; says what they are."""
        args = self.args
        dataset = ClassPromptDataset(
            self.shards,
            preprocess,
            tokenizer,
            args.batch_size,
            prompts=self.prompts,
            num_samples=self.num_samples,
            num_workers=args.workers,
            shard_weights=self.weights,
            jpeg_draft=self.image_size if args.jpeg_draft else 0,
            with_labels=bool(self.changes),
            as_dict=as_dict,
            **{name: getattr(args, name) for name in ("seed", "rank", "world_size")},
            **{name: getattr(args, name) for name in ("image_key", "label_key", "retries", "max_lost")},
        )
        if args.rank == 0:
            self._say(dataset)
        return dataset

    def evaluate(self, model: torch.nn.Module, preprocess: Callable, tokenizer: Callable, epoch: int) -> dict:
        """Metrics of the evaluation sets, to be logged by open_clip; empty where this epoch is not evaluated."""
        if self.monitor is None:
            self.monitor = Monitor(self.eval_sets, self.args)
        return self.monitor(model, preprocess, tokenizer, epoch)

    def finish(self) -> None:
        """Say what was written, which epoch was best and what to do next."""
        if self.few:
            self.few.cleanup()
        if getattr(self.args, "save_logs", False):  # on rank 0 alone
            how = "open_clip loads with pretrained=PATH"
            if self.spec.differences(ModelSpec.of(self.args.model)):
                how = (
                    "flyp's commands read (open_clip alone would take them for another model: `flyp export --format open_clip` "
                    "makes it a folder)"
                )
            if self.objective.learned_head:
                how = "flyp eval, flyp wiseft and flyp export read with their learned head"
            _log.info(f"Checkpoints, which {how}, are in {self.args.checkpoint_path}.")
        if self.monitor and self.args.rank == 0:
            for line in self.monitor.summary():
                _log.info(line)
        if self.args.rank == 0:
            self._warn_of_random_weights()

    def _say(self, dataset: ClassPromptDataset) -> None:
        args, prompts = self.args, self.prompts
        classes, templates = len(prompts.classnames), len(prompts.templates)
        all_work = dataset.num_workers == args.workers
        fewer = "" if all_work else f" (not {args.workers}: a worker needs a shard)"
        named = ", ".join(f"{name} {value}" for name, value in self.defaults.items()) or "none"
        steps = f"Steps: {self.steps} an epoch, {args.epochs} epochs; {dataset.num_workers} workers a rank{fewer}."
        if not self.objective.loop:
            steps = "One fit to the features of all images in place of epochs and steps."
        for line in (
            f"FLYP's defaults in use: {named}. All else is open_clip's, or yours.",
            f"Model: {self.spec}; weights: {args.pretrained or 'random or its own'}.",
            f"Objective: {', '.join(self.changes) or 'FLYP'}.",
            f"Samples: {self.num_samples} an epoch, in {len(self.shards)} shards.",
            f"Prompts: {classes} classes x {templates} templates = {len(prompts)}.",
            steps,
            *(f"  {key}: {prompt!r}" for key, prompt in self.pairs),
        ):
            _log.info(line)
        self._warn_of_random_weights()
        for line in _doubts(args, self.steps * args.epochs):
            _log.warning(line)

    def _warn_of_random_weights(self) -> None:
        args = self.args
        if not (args.pretrained or args.resume or is_place(args.model)):
            _log.warning(
                "There is no --pretrained: training starts from random weights, which know no prompt."
            )


def train(argv: Sequence[str]) -> int:
    """Check what can be checked before a model is made, then hand over to open_clip's main(); the exit status."""
    ours, rest = parser().parse_known_args(argv)
    if ours.help_open_clip:
        openclip.parse_args(["--help"])
    with _logging_until_open_clip_does():
        flyp = FlypRun(ours, rest)
    return openclip.run(flyp)


@contextmanager
def _logging_until_open_clip_does() -> Iterator[None]:
    logger, handler = logging.getLogger("flyp_plugin"), logging.StreamHandler()
    logger.addHandler(handler)
    logger.setLevel(logging.INFO if openclip.world()[0] == 0 else logging.ERROR)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def _defaults(rest: Sequence[str], world_size: int) -> dict[str, str]:
    """FLYP's defaults without those that the user gives otherwise: found by trying another default with open_clip."""
    others = openclip.parse_args([*_flags({name: _OTHER.get(name, _NONE) for name in DEFAULTS}), *rest])
    ours = [name for name in DEFAULTS if str(getattr(others, name)) in (_NONE, f"{_NONE}.0", "bf16")]
    defaults = {name: DEFAULTS[name] for name in ours}
    if "eps" in defaults and others.precision in IN_FP16:
        defaults["eps"] = FP16_EPS
    if "timm" in getattr(others, "opt", ""):  # whose optimizers have their own
        defaults = {name: value for name, value in defaults.items() if name not in ("beta1", "beta2")}
    if "batch_size" in defaults:  # FLYP's is the number of images that one loss sees
        defaults["batch_size"] = str(max(1, GLOBAL_BATCH // (world_size * others.accum_freq)))
    return defaults


def _flags(values: dict[str, str], world_size: int = 1) -> list[str]:
    """As a command line; with several ranks FLYP's loss is over the batches of all of them."""
    return [*to_argv(values), *(("--local-loss", "--gather-with-grad") if values and world_size > 1 else ())]


def _spec(args: argparse.Namespace, resumed: Record | None) -> ModelSpec:
    """The model that is trained, and open_clip's flags in `args` set so that open_clip makes this one.

    It is that of the run that is resumed, else of the run that --pretrained comes from, else the one of --model and its tag.

    Raises:
        InputError: flags that contradict the run that is resumed, or a tag; a configuration that has changed.
    """
    flags = {name: getattr(args, name, None) for name in FLAGS}
    if resumed:
        spec = resumed.spec.with_flags(flags)
        run_folder.refuse_other_run(resumed, args, spec)
    else:
        spec = targets.resolve_spec(args.model, args.pretrained, flags)
    made = {f"image_{name}": spec.preprocess_cfg[name] for name in PREPROCESSING}
    made |= {**spec.forced, "force_quick_gelu": spec.quick_gelu}
    changed = spec.differences(ModelSpec.of(args.model, args.pretrained).with_flags({**flags, **made}))
    if changed:
        raise InputError(
            f"open_clip's configuration of {args.model} is not the one that the weights were trained with ({changed[0]}); "
            "give that one with --model-config."
        )
    for name, value in made.items():
        setattr(args, name, value)
    return spec


def _check_built(model: Any, spec: ModelSpec) -> None:
    """InputError where open_clip has made another model than it was asked for.

    Before 2.30 it does so of OpenAI's weights, and before 3.0 it leaves timm's towers at their own size.
    """
    has = {key: square_as_int(value) for key, value in model.visual.preprocess_cfg.items()}
    other = [
        f"{key} {has[key]}, not {value}"
        for key, value in spec.preprocess_cfg.items()
        if has.get(key, value) != value
    ]
    native = isinstance(model, CLIP) or not hasattr(model.visual, "trunk")
    if native and spec.quick_gelu != any(isinstance(module, QuickGELU) for module in model.modules()):
        other.append(f"another activation than {spec.activation}")
    size = getattr(getattr(getattr(model.visual, "trunk", None), "patch_embed", None), "img_size", None)
    if spec.forced.get("force_image_size") and size and square_as_int(size) != spec.preprocess_cfg["size"]:
        other.append(
            f"an image tower of timm's for size {square_as_int(size)}, not {spec.preprocess_cfg['size']}"
        )
    if other:
        raise InputError(
            f"open_clip_torch {open_clip.__version__} has made {spec.name} with {other[0]}; leave the flag out that asks for "
            "it, or install a newer open_clip_torch."
        )


def _check_numbers(args: argparse.Namespace) -> None:
    least = dict.fromkeys(("batch_size", "epochs", "accum_freq", "train_num_samples"), 1)
    least |= dict.fromkeys(("workers", "retries", "eval_frequency", "lr", "wd", "eps", "warmup"), 0)
    for name, number in least.items():
        value = getattr(args, name)
        if value is not None and not number <= value < math.inf:
            raise InputError(f"{' '.join(to_argv({name: value}))} is out of range; give {number} or more.")
    for name in ("beta1", "beta2"):
        if not 0 <= (getattr(args, name) or 0) < 1:
            raise InputError(
                f"--{name} {getattr(args, name):g} is out of range; give 0 or more and less than 1."
            )
    if not 0 <= args.max_lost <= 1:
        raise InputError(f"--max-lost {args.max_lost:g} is not a share; give a number from 0 to 1.")


def _check_eps(args: argparse.Namespace) -> None:
    """Refuse an eps that is 0 in the type of the weights: AdamW would divide by it."""
    if args.precision in IN_FP16 and args.eps is not None and not torch.tensor(args.eps, dtype=torch.float16):
        raise InputError(
            f"--eps {args.eps:g} is 0 in --precision {args.precision}, which makes every weight NaN; give {FP16_EPS}, or "
            "--precision amp, which keeps the weights in fp32."
        )


def _doubts(args: argparse.Namespace, steps: int) -> Iterator[str]:
    """Warnings of flags that train otherwise than they seem to; `steps` are those of all epochs."""
    if args.precision in IN_FP16:
        yield (
            f"--precision {args.precision} keeps weights and AdamW's state in 16 bits, in which the squares of small "
            "gradients are 0; --precision amp keeps them in 32."
        )
        # below this the mean of squares is rounded to 0
        gradient = math.sqrt(2**-25 / (1 - (args.beta2 or 0)))
        if args.eps is not None and gradient > 10 * args.eps:
            yield (
                f"With --eps {args.eps:g} in {args.precision} a step may be {gradient / args.eps:.0f} times --lr; "
                f"{FP16_EPS} is safe."
            )
    if args.precision in ("bf16", "pure_bf16"):
        yield (
            f"--precision {args.precision} keeps weights in 16 bits, which round most steps of a --lr of {args.lr:g} away; "
            "--precision amp_bf16 keeps them in 32."
        )
    if args.warmup > steps and not args.skip_scheduler:
        yield (
            f"--warmup {args.warmup} is longer than the run of {steps} steps, which ends at {steps / args.warmup:.0%} of "
            "--lr."
        )


def _against_divergence(args: argparse.Namespace) -> str:
    """What to change where weights have become NaN or infinite."""
    lower = f"with a lower --lr than {args.lr:g} or with --grad-clip-norm 1"
    if args.precision in IN_FP16:
        return f"with --precision amp or amp_bf16: {args.precision} ends at 65504, and so do the gradients; or {lower}"
    return f"with --precision amp_bf16, {lower[5:]}" if args.precision == "amp" else lower


def _check_resume(resume: str | None) -> None:
    """Refuse a checkpoint that cannot be read; of one at a URL, whether it can be reached is all that is looked at."""
    if resume in (None, "latest"):
        return
    if not is_url(resume):
        checkpoints.read_state_dict(resume)
        return
    try:
        files, path = url_to_fs(resume)
        reason = "" if files.exists(path) else "there is none"
    except (ImportError, OSError, ValueError) as error:
        reason = str(error)
    if reason:
        raise InputError(f"--resume {resume} cannot be read ({reason}); download it, and give its path.")


def _check_reports(report_to: str) -> None:
    for package in ("tensorboard", "wandb", "trackio"):
        if (package in report_to or ("all" in report_to and package != "trackio")) and find_spec(
            package
        ) is None:
            raise InputError(f"--report-to {report_to} needs the package {package}: pip install {package}.")
    unknown = set(report_to.split(",")) - {"tensorboard", "wandb", "trackio", "all", "none", ""}
    if unknown:
        raise InputError(f"--report-to {report_to} names something other than tensorboard and wandb.")


def _shards(args: argparse.Namespace) -> tuple[list[str], list[float] | None]:
    """The tar URLs of --train-data, and the weight of each where they are sampled with replacement."""
    if not args.train_data:
        raise InputError("--train-data is missing; give a data folder or shards (see --help).")
    if args.dataset_type not in ("auto", "webdataset"):
        raise InputError(
            f"--dataset-type {args.dataset_type} is not for FLYP; `flyp shards write` makes shards."
        )
    sources = expand_sources(args.train_data, "train")
    shards = list(chain.from_iterable(sources))
    factors = args.train_data_upsampling_factors
    if factors is None:
        return shards, [1.0] * len(shards) if args.dataset_resampled else None
    if not args.dataset_resampled:
        raise InputError(
            "--train-data-upsampling-factors is for sampling with replacement: add --dataset-resampled."
        )
    try:
        weights = [float(factor) for factor in factors.split("::")]
    except ValueError:
        weights = []
    if len(weights) != len(sources) or min(weights) < 0 or not any(weights):
        raise InputError(
            f"--train-data-upsampling-factors {factors} is not one positive number for each of the {len(sources)} "
            "sources in --train-data, joined by '::'."
        )
    return shards, [weight for weight, source in zip(weights, sources) for _ in source]


def _check_shots(args: argparse.Namespace) -> None:
    if args.shots is not None and args.train_data_upsampling_factors:
        raise InputError(
            "--train-data-upsampling-factors is of whole sources, not of --shots; leave one out."
        )
    if args.shots is None and args.shots_seed is not None:
        raise InputError("--shots-seed is the seed of --shots; give that too, or leave it out.")


def _steps(args: argparse.Namespace, num_samples: int, world_size: int) -> int:
    """Optimizer steps an epoch, as open_clip counts them."""
    batches = math.ceil(math.ceil(num_samples / world_size) / args.batch_size)
    if batches < args.accum_freq:
        raise InputError(
            f"an epoch has {batches} batches of {args.batch_size}, fewer than --accum-freq {args.accum_freq}, so that "
            "no step would be taken; lower one of the two."
        )
    return batches // args.accum_freq


def main() -> None:
    """Entry point of `python -m flyp_plugin.train`; leaves the process."""
    run(lambda: train(sys.argv[1:]))


if __name__ == "__main__":
    main()
