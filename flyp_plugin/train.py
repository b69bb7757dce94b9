"""`flyp train`: FLYP's flags, defaults and checks around open_clip's training script, which does the training.

    flyp train --model ViT-B-16 --pretrained openai --train-data data --eval-data val=data/val

`python train_flyp.py` and `python -m flyp_plugin.train` are the same program. `train` parses the flags, checks them and
everything else that can be checked without a model, and hands a FlypRun to openclip.py. open_clip's main() then calls
the methods of FlypRun in the order in which they stand below.
"""

import logging
import math
import shlex
import sys
import tempfile
from argparse import SUPPRESS, ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from flyp_plugin import checks, objectives, openclip, ranks, record, run_data, run_folder, sharding, targets
from flyp_plugin.anchor import Teacher
from flyp_plugin.checkpoints import default_device
from flyp_plugin.data import ClassPromptDataset
from flyp_plugin.errors import InputError, run
from flyp_plugin.evalsets import EvalSet, loader_from_args, with_progress
from flyp_plugin.flags import DEFAULTS, GLOBAL_BATCH, parser, to_argv
from flyp_plugin.heads import image_features, val_preprocess, zeroshot_as_learned
from flyp_plugin.learned import HEAD, LP_C, find_class_rows, fit_head, set_logit_scale
from flyp_plugin.model_spec import ModelSpec, is_place, registry_name
from flyp_plugin.monitor import Monitor
from flyp_plugin.record import Record
from flyp_plugin.samples import balance_weights
from flyp_plugin.text import shorten

_log = logging.getLogger(__name__)


def train(argv: Sequence[str]) -> int:
    """Train with the flags of open_clip and FLYP; returns the exit status.

    Raises:
        InputError: a mistake in the flags or the data.
    """
    if "--help-open-clip" in argv:
        openclip.parse_args(["--help"])
    logger, handler = logging.getLogger("flyp_plugin"), logging.StreamHandler()
    logger.setLevel(logging.INFO if openclip.world()[0] == 0 else logging.ERROR)
    logger.addHandler(handler)  # until open_clip's main() configures logging
    try:
        flyp = FlypRun(argv)
    finally:
        logger.removeHandler(handler)
    return openclip.run(flyp)


def parse(argv: Sequence[str], world_size: int) -> tuple[Namespace, dict[str, str], list[str]]:
    """All flags, FLYP's and open_clip's; FLYP's defaults in use; and which of open_clip's flags the user typed."""
    ours, rest = parser().parse_known_args(argv)
    user = openclip.parse_args(rest)
    without_defaults = ArgumentParser(argument_default=SUPPRESS, add_help=False)
    for name in vars(user):
        without_defaults.add_argument(*to_argv({name: True}), nargs="*")
    typed = list(vars(without_defaults.parse_known_args(rest)[0]))

    # FLYP's batch is the number of images in one loss
    defaults = {**DEFAULTS, "batch_size": str(max(1, GLOBAL_BATCH // max(1, world_size * user.accum_freq)))}
    if user.precision in checks.FP16:
        defaults["eps"] = checks.FP16_EPS
    skipped = set(DEFAULTS if ours.no_flyp_defaults else typed)
    if "timm" in getattr(user, "opt", ""):  # timm's optimizers have betas of their own
        skipped |= {"beta1", "beta2"}
    defaults = {name: value for name, value in defaults.items() if name not in skipped}
    flyps = world_size > 1 and not ours.no_flyp_defaults
    across_ranks = ["--local-loss", "--gather-with-grad"] if flyps else []
    # open_clip's default is cuda, with a warning if there is none
    device = ["--device", default_device()]
    theirs = openclip.parse_args([*to_argv(defaults), *across_ranks, *device, *rest])
    return Namespace(**{**vars(theirs), **vars(ours)}), defaults, typed


class FlypRun:
    """One training run, as openclip.py calls it. Making it checks the flags and the data, on every rank.

    Args:
        argv: the command line, with FLYP's and open_clip's flags.

    Raises:
        InputError: a mistake in the flags, the class names, the templates or the first samples.
    """

    def __init__(self, argv: Sequence[str]):
        self.few_shot: tempfile.TemporaryDirectory | None = None
        rank, world_size = openclip.world()
        args, self.defaults, typed = parse(argv, world_size)
        self.args = args
        if not is_place(args.model):
            args.model = registry_name(args.model)  # for ViT-B/16, which only parts of open_clip accept
        if args.model_config:
            targets.add_model_config(args.model_config)
        mistakes = chain(checks.find_mistakes(args, typed, world_size), objectives.find_mistakes(args))
        if mistake := next(mistakes, None):
            raise InputError(mistake)
        self.objective = objectives.OBJECTIVES[args.objective]
        self.changes = objectives.changed_flags(args)
        with run_folder.explain_errors(args, rank):
            openclip.connect(args)  # from here on, one rank reads for all
            self.resumed = run_folder.resumed_record(args)
            ranks.once(partial(checks.check_start, args, self.resumed))
            self.spec = checks.resolve_model(args, self.resumed)
            self.data = self._read_data()
        self.evaluates = bool(self.data.eval_sets)

        if not self.objective.loop:
            self.defaults.pop("epochs", None)
            args.epochs = 1  # the fit, whose result is saved as epoch_1.pt
        self.steps = _count_steps(args, self.data.num_samples, world_size)
        longest = self.steps * args.epochs // 10
        if "warmup" in self.defaults and args.warmup > longest:
            self.defaults["warmup"] = f"{longest} (a tenth of the steps, which are few)"
            args.warmup = longest
        if args.skip_scheduler:
            self.defaults.pop("warmup", None)
        self.settings = record.training_settings(vars(args), samples=self.data.num_samples, ranks=world_size)
        self.monitor: Monitor | None = None
        self.teacher: Teacher | None = None

    def _read_data(self) -> run_data.RunData:
        args = self.args

        def find() -> run_data.RunData:
            data = run_data.find_data(args)
            for each in data.eval_sets if self.objective.learned_head else ():
                find_class_rows(data.prompts.classnames, each.prompts.classnames, f"--eval-data {each.name}")
            return data

        data = ranks.once(find)
        if args.shots:

            def write() -> str:
                self.few_shot = tempfile.TemporaryDirectory(prefix="flyp-shots-")  # lives as long as the run
                run_data.write_few_shot(data, args, self.few_shot.name)
                return self.few_shot.name

            folder = ranks.once_a_node(write, args.local_rank)
            if not Path(folder).is_dir():  # another machine's, or another container's
                folder = write()
            data = run_data.use_few_shot(data, folder)
        counted = ranks.once(partial(run_data.count_data, data, args))
        return replace(counted, shards=data.shards, sizes=None if args.shots else counted.sizes)

    def on_model(self, model: Any) -> None:
        """Check the model that open_clip built, shorten its text tower and install the objective, before it is wrapped."""
        args = self.args
        checks.check_built(model, self.spec)
        checks.check_loss(model, args, self.changes)
        size = getattr(model.visual, "image_size", 0)  # int or (height, width)
        self.image_size = size if isinstance(size, int) else max(size)
        tokenizer = self.spec.tokenizer
        if self.objective.learned_head:
            setattr(model, HEAD, zeroshot_as_learned(model, tokenizer, self.data.prompts, args.precision))
        if args.anchor:
            epochs = args.epochs if args.anchor_teacher == "trajectory" else 0
            self.teacher = Teacher(model, epochs, self.steps)
        self.short_text = not args.full_text and shorten(
            model, tokenizer([self.data.prompts(0, 0), self.data.prompts(-1, -1)])
        )
        if self.short_text and self.teacher:
            self.teacher.shorten()
        self.model = model
        if self.objective.class_tokens:
            model.class_tokens = self.data.prompts.tokenize(tokenizer)
        if self.changes:
            self.objective.install(model, self.teacher)

    def on_resume(self, epoch: int) -> None:
        """Load what a run that goes on after `epoch` needs beside its checkpoint; InputError if that is missing."""
        if self.teacher:
            self.teacher.resume(Path(self.args.resume), epoch)

    def record(self, epoch: int) -> Record:
        """On rank 0: the content of flyp.json (record.py) for a run that starts after `epoch`."""
        args = self.args
        keys = ("image_key", "label_key", "group_key")
        content = record.describe_model(self.spec) | {"training": self.settings}
        content |= {
            name: getattr(args, name) for name in ("model_config", "precision", "objective", "eval_data")
        }
        content |= self.data.prompts.lists()
        content["classes_given"] = [name for name, value in self.data.given.items() if value]
        content["keys"] = {name: getattr(args, name) for name in keys}
        content["pretrained"] = record.describe_weights(args.pretrained)
        if epoch and self.resumed and args.pretrained in ("", self.resumed.pretrained):
            content["pretrained"] = self.resumed.get("pretrained", {})  # weights are the checkpoint's now
        if epoch and self.resumed:  # set when the run started, if at all
            content["training"] = {**self.settings, "logit_scale": self.resumed.training.get("logit_scale")}
        return Record(content)

    def train_data(self, preprocess: Callable, as_dict: bool) -> ClassPromptDataset:
        """The training batches, as dicts for open_clip 4; on rank 0, log a description of the run."""
        args = self.args
        dataset = ClassPromptDataset(
            self.data.shards,
            preprocess,
            self.spec.tokenizer,
            args.batch_size,
            prompts=self.data.prompts,
            num_samples=self.data.num_samples,
            sizes=self.data.sizes,
            num_workers=args.workers,
            seed=args.seed,
            rank=args.rank,
            world_size=args.world_size,
            shard_weights=self.data.weights,
            class_weights=self.data.class_counts and balance_weights(self.data.class_counts, args.balance),
            image_key=args.image_key,
            label_key=args.label_key,
            template_order=args.template_order,
            retries=args.retries,
            max_lost=args.max_lost,
            jpeg_draft=self.image_size if args.jpeg_draft else 0,
            with_labels=bool(self.changes),
            as_dict=as_dict,
        )
        if self.short_text and (args.torchcompile or args.device.startswith("cuda")):
            shorten(self.model, length=dataset.text_length)  # one shape, and no wait for the GPU
            if self.teacher:
                self.teacher.shorten(dataset.text_length)
        if args.rank == 0:
            self._describe(dataset.num_workers)
        return dataset

    def _describe(self, workers: int) -> None:
        args, prompts = self.args, self.data.prompts
        defaults = ", ".join(f"{name} {value}" for name, value in self.defaults.items()) or "none"
        fewer = "" if workers == args.workers else f" (not {args.workers}: each worker needs a shard)"
        steps = f"{self.steps} an epoch, {args.epochs} epochs; {workers} workers a rank{fewer}"
        for line in (
            f"FLYP's defaults in use: {defaults}. All other settings are open_clip's or yours.",
            f"Model: {self.spec}; weights: {args.pretrained or 'random or its own'}.",
            f"Objective: {', '.join(self.changes) or 'FLYP'}.",
            f"Samples: {self.data.num_samples} an epoch, in {len(self.data.shards)} shards.",
            f"Prompts: {prompts.describe()}.",
            f"Steps: {steps if self.objective.loop else 'none; one fit to the features of all images'}.",
            *(f"  {key}: {prompt!r}" for key, prompt in self.data.pairs),
            *self._describe_balance(),
        ):
            _log.info(line)
        self._warn_of_random_weights()
        for line in checks.find_doubts(args, self.steps * args.epochs):
            _log.warning(line)

    def _describe_balance(self) -> Iterator[str]:
        if counts := self.data.class_counts:
            weights, names = balance_weights(counts, self.args.balance), self.data.prompts.classnames
            known = [label for label, number in enumerate(counts) if number]
            few, many = (f(known, key=counts.__getitem__) for f in (min, max))
            each = (
                f"{weights[label]:.3g} times an epoch of {names[label]!r} ({counts[label]} images)"
                for label in (few, many)
            )
            yield f"Balance {self.args.balance:g}: an image is drawn, on average, {' and '.join(each)}."

    def _warn_of_random_weights(self) -> None:
        if not (self.args.pretrained or self.args.resume or is_place(self.args.model)):
            _log.warning("There is no --pretrained: training starts from random weights.")

    def create_loss(self) -> torch.nn.Module:
        """The loss, if `changes` is not empty."""
        return self.objective.create_loss(self.args)

    def before_epoch(self, epoch: int) -> bool:
        """Set or fit what training starts from; returns whether open_clip's loop should train."""
        args, model, data = self.args, self.model, self.data
        if args.logit_scale and epoch == 0:
            set_logit_scale(model, args.logit_scale)
            _log.info(f"Logit scale at the start: {args.logit_scale:g}.")
        if self.teacher:
            self.teacher.start(model, epoch)
        if self.objective.fit and epoch == 0:
            head = getattr(model, HEAD)
            images = EvalSet("features", data.shards, data.prompts, args.train_data, data.sizes)
            loader = loader_from_args(images, val_preprocess(model), args, args.max_lost)
            with self._whole():
                features, labels = image_features(model, with_progress(loader, "features"), args.precision)
            c = args.lp_c or LP_C
            sharding.assign(head.weight, fit_head(features, labels, len(head.weight), c))
            _log.info(f"Fitted the head to the features of all images, with C = {c:g}.")
        return self.objective.loop

    def epoch_context(self, optimizer: torch.optim.Optimizer) -> AbstractContextManager:
        """In which open_clip's loop trains for an epoch: a teacher of the trajectory follows the optimizer's steps."""
        all_steps = self.args.precision != "amp"  # whose GradScaler leaves out steps that overflow
        return self.teacher.follow(self.model, optimizer, all_steps) if self.teacher else nullcontext()

    def after_epoch(self, epoch: int) -> None:
        """InputError if training has diverged: nothing that follows could be used. Else save the trajectory's teacher."""
        with self._whole():
            bad = next(
                (name for name, tensor in self.model.named_parameters() if not tensor.isfinite().all()), None
            )
        if bad:
            wider = "--precision amp_bf16, " if self.args.precision in ("amp", *checks.FP16) else ""
            raise InputError(
                f"training has diverged: epoch {epoch} left non-finite weights (NaN or inf) in {bad}; start a new run with "
                f"{wider}a --lr below {self.args.lr:g} or --grad-clip-norm 1."
            )
        if self.teacher and getattr(self.args, "save_logs", False):  # on rank 0
            self.teacher.save(epoch, self.args)

    def evaluate(self, epoch: int) -> dict:
        """Metrics of the evaluation sets, for open_clip to log; empty if this epoch is not evaluated."""
        self.monitor = self.monitor or Monitor(self.data.eval_sets, val_preprocess(self.model), self.args)
        if not self.monitor.scores(epoch):
            return {}
        with self._whole():
            return self.monitor(self.model, self.spec.tokenizer, epoch)

    def _whole(self) -> AbstractContextManager:
        return sharding.whole(self.model, not getattr(self.args, "fsdp_no_reshard_after_forward", False))

    def finish(self) -> None:
        """Log where the checkpoints are, which epoch was best and what to do next."""
        args = self.args
        if self.few_shot:
            self.few_shot.cleanup()
        if getattr(args, "save_logs", False):  # on rank 0 only
            readers = "open_clip loads them with pretrained=PATH"
            if self.objective.learned_head or self.spec.differences(ModelSpec.of(args.model)):
                readers = "flyp's commands read them; `flyp export --format open_clip` is for open_clip alone"
            if self.teacher:
                self.teacher.delete_old(Path(args.checkpoint_path), {args.epochs})
            last = list(record.epochs(Path(args.logs, args.name)).values())[-1:]
            if last and record.is_sharded(last[0]):
                readers = f"flyp's commands read the last after `{record.how_to_join(last[0])[0]}`"
            _log.info(f"Checkpoints are in {args.checkpoint_path}; {readers}.")
            if self.teacher and self.teacher.weights:
                name = shlex.quote(str(Path(args.logs, args.name)))
                _log.info(f"The teacher is a model of its own: see flyp eval {name} --teacher.")
        if args.rank == 0:
            for line in self.monitor.summary() if self.monitor else ():
                _log.info(line)
            self._warn_of_random_weights()


def _count_steps(args: Namespace, num_samples: int, world_size: int) -> int:
    """Optimizer steps an epoch, as open_clip counts them."""
    batches = math.ceil(math.ceil(num_samples / world_size) / args.batch_size)
    if not 1 <= args.accum_freq <= batches:
        raise InputError(
            f"--accum-freq {args.accum_freq} must be from 1 to {batches}, the number of batches of {args.batch_size} in an "
            "epoch: otherwise no step would be taken."
        )
    return batches // args.accum_freq


def main() -> None:
    """Entry point of `python -m flyp_plugin.train`; exits the process."""
    run(lambda: train(sys.argv[1:]))


if __name__ == "__main__":
    main()
