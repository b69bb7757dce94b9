"""FLYP inside open_clip's own training script. This is the only module that names open_clip_train.

`run` calls open_clip_train.main.main() as it is. The loop, the loss of plain FLYP, the optimizer, the schedule,
checkpoints and logs are open_clip's. For the time of that call a few functions are replaced by methods of `_Seams`,
which call the original and the run (train.py's FlypRun). In the order in which main() calls them:

    parse_args                    returns the arguments that train.py has parsed and checked, open_clip's and ours
    init_distributed_device       returns the device: the ranks have met before, in `connect`
    create_model_and_transforms   resumes from the newest checkpoint, reads weights by our reader, and passes the model to
                                  the run before DDP, FSDP2 and torch.compile wrap it
    get_data                      data["train"] is our loader; open_clip's own evaluation sets stay
    create_loss, create_task (4)  replaced only for an objective other than plain FLYP
    train_one_epoch               before the first epoch: evaluates the starting weights, fits a linear probe;
                                  after each: stops if training has diverged
    evaluate                      after each epoch and on every rank: scores our evaluation sets
    train.zero_shot_eval          called by evaluate() on rank 0: returns these scores, which evaluate() then logs

open_clip may change. `SEAMS` lists the parameters that we rely on; they are compared before anything starts. Whether
main() really calls each replacement is checked while it runs. Without these checks a run on other data, or an evaluation
that is never logged, would go unnoticed; whatever fails by itself is left to Python.
"""

import inspect
import io
import logging
import random
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext, redirect_stderr
from functools import partial
from importlib import import_module
from pathlib import Path
from textwrap import shorten
from types import MethodType
from typing import TYPE_CHECKING, Any
from warnings import catch_warnings, simplefilter

import numpy as np
import open_clip
import torch

from flyp_plugin import patches, ranks, run_folder
from flyp_plugin.checkpoints import read_state_dict, use_reader
from flyp_plugin.errors import InputError
from flyp_plugin.model_spec import ModelSpec, is_place
from flyp_plugin.samples import sample_seed

if TYPE_CHECKING:
    from flyp_plugin.train import FlypRun

SUPPORTED = "2.28 to 3.3 and the 4.x development tree"
# name: (module of open_clip_train, parameters that we rely on; two lists where open_clip 4 differs)
SEAMS: dict[str, tuple[str, ...]] = {
    "parse_args": ("main", ""),
    "init_distributed_device": ("main", "args"),
    "create_model_and_transforms": ("main", "model_name pretrained force_quick_gelu"),
    "get_data": ("main", "args preprocess_fns epoch tokenizer"),
    "train_one_epoch": ("main", "model epoch optimizer data args tb_writer", "state data args tb_writer"),
    "evaluate": ("main", "data epoch args tb_writer tokenizer"),
    "zero_shot_eval": ("train", "data epoch args"),
}
_OWN_SETS = ("val_data", "imagenet_val", "imagenet_v2")  # open_clip's flags of evaluation sets
_log = logging.getLogger(__name__)


def _changed(what: str) -> InputError:
    return InputError(
        f"open_clip_torch {open_clip.__version__} has changed ({what}); flyp-plugin works with {SUPPORTED}: "
        "install one of these."
    )


def _find(module: str, name: str) -> Any:
    try:
        found = getattr(import_module(f"open_clip_train.{module}"), name, None)
    except ModuleNotFoundError as error:
        raise InputError(
            f"open_clip_torch {open_clip.__version__} cannot train without the package {error.name}: pip install "
            f"'flyp-plugin[train]' (which works with open_clip_torch {SUPPORTED})."
        ) from None
    if found is None:
        raise _changed(f"it has no open_clip_train.{module}.{name}")
    return found


def parse_args(argv: Sequence[str]) -> Namespace:
    """open_clip's own parser; InputError for a wrong flag, with its last line only, not 200 lines of usage."""
    stderr = io.StringIO()
    try:
        with redirect_stderr(stderr):
            return _find("params", "parse_args")(list(argv))
    except ValueError as error:  # open_clip 4
        raise InputError(f"{error} (see --help-open-clip).") from None
    except SystemExit as error:
        if error.code != 2:  # --help
            raise
        reason = stderr.getvalue().strip().rpartition("error: ")[2]
        raise InputError(f"{reason} (see --help for FLYP's flags, --help-open-clip for the rest).") from None


def world() -> tuple[int, int]:
    """(rank, number of ranks) that open_clip will find in the environment set by torchrun or Slurm."""
    if not _find("distributed", "is_using_distributed")():
        return 0, 1
    _, rank, size = _find("distributed", "world_info_from_env")()
    return rank, size


def connect(args: Namespace) -> None:
    """Let the ranks meet, as main() would do later; sets rank, world_size, local_rank, distributed, device in `args`."""
    with ranks.ended_by_sigterm() if world()[1] > 1 else nullcontext():
        _find("distributed", "init_distributed_device")(args)


def run(flyp: "FlypRun") -> int:
    """Call open_clip_train.main.main() on the data of `flyp` and return the exit status.

    Raises:
        InputError: another process writes to the run's folder, the disk is full, another rank has ended, open_clip has
            changed, or what `flyp` raises.
    """
    main, args = _find("main", "main"), flyp.args
    rank = args.rank
    with run_folder.explain_errors(args, rank), ExitStack() as stack:
        if args.distributed:
            stack.enter_context(ranks.ended_by_sigterm())
        if rank:
            stack.enter_context(catch_warnings())
            simplefilter("ignore")  # rank 0 shows them
        seams = _Seams(flyp, stack)
        seams.install()
        if seams.named and rank == 0:
            seams.claim_folder()
        if main([]) == -1:  # it has printed why
            return 1
        seams.check_called("get_data")
        if seams.started:
            seams.check_evaluated(args.epochs)
        elif rank == 0:
            _log.info(f"The run in {Path(args.logs, args.name)} is finished: --epochs is {args.epochs}.")
        flyp.finish()
    return 0


class _Seams:
    """The functions that replace open_clip_train's during one call of its main().

    Each gets the arguments by name, which it may change, and `proceed`, which calls the original with them.
    """

    def __init__(self, flyp: "FlypRun", stack: ExitStack):
        self.flyp, self.args, self.stack = flyp, flyp.args, stack
        self.named = bool(self.args.name)  # else main() makes up a name
        self.resumes_latest = self.args.resume == "latest"  # which main() replaces by a path
        self.newest: Path | None = None  # on rank 0: the checkpoint to resume from
        self.has_tasks = False  # open_clip 4
        self.called: set[str] = set()
        self.started = False
        self.has_model = False  # a second model is the teacher of --distill-model
        self.train: Any = None  # open_clip's DataInfo of our data
        self.metrics: dict[str, float] = {}  # those that open_clip is about to log
        self.evaluated = 0  # the last epoch that was evaluated

    def install(self) -> None:
        """Replace open_clip's functions until `stack` is closed; InputError if one is missing or lacks a parameter."""
        main = import_module("open_clip_train.main")
        patches.install(self.stack, main, self.args.device.startswith("cpu") or not torch.cuda.is_available())
        self.has_tasks = hasattr(main, "create_task")
        loss = {"create_task" if self.has_tasks else "create_loss": ("main", "args")}
        seams = SEAMS | (loss if self.flyp.changes else {})
        for name, (module, *alternatives) in seams.items():
            original = _find(module, name)
            signature = inspect.signature(original)
            if not any(signature.parameters.keys() >= set(names.split()) for names in alternatives):
                needed = " or ".join(alternatives)
                raise _changed(f"open_clip_train.{module}.{name} lacks one of the parameters {needed}")
            place = sys.modules[f"open_clip_train.{module}"]
            patches.replace(self.stack, place, name, partial(self.call, name, original, signature))

    def call(self, name: str, original: Callable, signature: Any, *args: Any, **kwargs: Any) -> Any:
        """A call by open_clip, passed on to the method of this name."""
        self.called.add(name)
        bound = signature.bind(*args, **kwargs)
        return getattr(self, name)(lambda: original(*bound.args, **bound.kwargs), bound.arguments)

    def check_called(self, name: str) -> None:
        if name not in self.called:
            raise _changed(f"main() does not call {name}")

    def check_evaluated(self, epoch: int) -> None:
        if self.flyp.evaluates and self.evaluated != epoch:
            raise _changed(f"main() did not call evaluate after epoch {epoch}")

    def claim_folder(self) -> None:
        """On rank 0, when the run has a name: lock its folder, and find the checkpoint to resume from."""
        self.folder = Path(self.args.logs, self.args.name)
        self.stack.enter_context(run_folder.folder_lock(self.folder, inherited=False))
        if not self.named or not run_folder.contains_run(self.folder):
            self.stack.callback(self.remove_unless_started)
        if self.resumes_latest:
            self.newest = run_folder.find_newest(self.folder)

    def remove_unless_started(self) -> None:
        if not self.started:
            run_folder.remove_unstarted(self.folder)

    def parse_args(self, proceed: Callable, arguments: dict) -> Namespace:
        return self.args

    def init_distributed_device(self, proceed: Callable, arguments: dict) -> torch.device:
        self.check_called("parse_args")
        return torch.device(self.args.device)

    def create_model_and_transforms(self, proceed: Callable, arguments: dict) -> tuple:
        self.check_called("init_distributed_device")
        name, pretrained = arguments["model_name"], arguments.get("pretrained") or ""
        if not self.has_model:
            if self.args.rank and not self.args.log_local and not self.args.debug:
                for handler in logging.root.handlers:
                    handler.setLevel(logging.WARNING)  # the rest is what rank 0 logs
            self.resume_newest()
            if self.args.rank == 0 and not self.named:  # by now main() has made up a name
                self.claim_folder()
        elif not is_place(name):
            arguments["force_quick_gelu"] = ModelSpec.of(name, pretrained).quick_gelu
        with use_reader(partial(read_state_dict, finite=self.args.rank > 0)):
            created = proceed()
        if not self.has_model:
            self.has_model = True
            self.flyp.on_model(created[0])
        return created

    def create_loss(self, proceed: Callable, arguments: dict) -> torch.nn.Module:
        return self.flyp.create_loss()

    def create_task(self, proceed: Callable, arguments: dict) -> Any:
        task = proceed()
        task.loss, task.training_forward = self.flyp.create_loss(), MethodType(_training_forward, task)
        return task

    def resume_newest(self) -> None:
        """On every rank, replace the checkpoint that main() has found by name with the newest."""
        args = self.args
        if not self.resumes_latest or args.remote_sync:  # in a bucket, main() lists the names
            return
        found = [self.newest]
        if args.distributed:
            torch.distributed.broadcast_object_list(found)
        newest = found[0]
        if args.rank == 0 and newest and newest != Path(args.resume or ""):
            _log.info(f"The newest checkpoint is {newest}: this run is resumed from it.")
        args.resume = newest and str(newest)
        if "resume_is_sharded" in args:  # open_clip 4
            args.resume_is_sharded = newest is not None and newest.is_dir()

    def get_data(self, proceed: Callable, arguments: dict) -> dict:
        self.check_called("create_model_and_transforms")
        args, epoch = arguments["args"], arguments.get("epoch", 0)
        if 0 < epoch < args.epochs:
            self.flyp.on_resume(epoch)
        if args.rank == 0:
            if epoch < args.epochs:  # else nothing is trained
                run_folder.write_record(self.flyp.record(epoch), self.flyp.resumed, self.folder)
            run_folder.drop_results_after(epoch, self.folder)
        arguments["args"] = Namespace(**{**vars(args), "train_data": None, "dataset_type": "auto"})
        self.try_own_sets(proceed, arguments)
        data = proceed()
        dataset = self.flyp.train_data(arguments["preprocess_fns"][0], as_dict=self.has_tasks)
        data["train"] = self.train = _find("data", "DataInfo")(dataloader=dataset)
        self.train.set_epoch = self.set_epoch
        if self.flyp.evaluates:  # main() evaluates only if this key exists; zero_shot_eval below answers
            data.setdefault("imagenet-val", None)
        return data

    def try_own_sets(self, proceed: Callable, arguments: dict) -> None:
        """Read a batch of each of open_clip's own evaluation sets: else a bad one costs the first epoch, unsaved."""
        args = arguments["args"]
        for name in (name for name in _OWN_SETS if getattr(args, name)):
            only = {**dict.fromkeys(_OWN_SETS), name: getattr(args, name), "workers": 0}
            arguments["args"] = Namespace(**{**vars(args), **only})
            try:
                for info in proceed().values():
                    if next(iter(info.dataloader), None) is None:
                        raise ValueError("it has no image with a text in .txt")
                if name != "val_data":  # before open_clip 4 this needs NumPy before 2.4
                    _find("zero_shot", "accuracy")(torch.eye(5), torch.arange(5), topk=(1, 5))
            except (OSError, ValueError, TypeError, RuntimeError, AttributeError, LookupError) as error:
                reason = f"{type(error).__name__}: {shorten(str(error), 200, placeholder=' ...')}"
                raise InputError(
                    f"open_clip cannot evaluate --{name.replace('_', '-')} {getattr(args, name)} ({reason}); give a labelled "
                    "set with --eval-data NAME=SHARDS instead."
                ) from error
        arguments["args"] = args

    def set_epoch(self, epoch: int) -> None:
        """Called by open_clip at the start of each epoch. Seeds everything random: on resuming, open_clip does not."""
        self.check_called("train_one_epoch")
        self.called.add("set_epoch")
        self.train.dataloader.set_epoch(epoch)
        seed = sample_seed(self.args.seed, epoch, self.args.rank)
        torch.manual_seed(seed % 2**63)
        random.seed(seed)
        np.random.seed(seed % 2**32)

    def train_one_epoch(self, proceed: Callable, arguments: dict) -> Any:
        state = arguments.get("state")  # open_clip 4: one object for model, optimizer and epoch
        model, epoch = (state.task, state.epoch) if state else (arguments["model"], arguments["epoch"])
        data, args = arguments["data"], arguments["args"]
        if data.get("train") is not self.train:
            raise _changed("main() does not train on what get_data returns")
        if self.started:
            self.check_evaluated(epoch)
        elif epoch == 0 and self.flyp.evaluates:
            more = {"tb_writer": arguments.get("tb_writer"), "tokenizer": self.flyp.spec.tokenizer}
            _find("main", "evaluate")(model, data=data, epoch=0, args=args, **more)
        self.started = True
        if not self.flyp.before_epoch(epoch):
            return None
        with self.flyp.epoch_context(state.optimizer if state else arguments["optimizer"]):
            result = proceed()
        self.check_called("set_epoch")
        self.flyp.after_epoch(epoch + 1)
        return result

    def evaluate(self, proceed: Callable, arguments: dict) -> dict:
        epoch = self.evaluated = arguments["epoch"]
        if self.flyp.evaluates:
            self.metrics = self.flyp.evaluate(epoch)
        logged = proceed()
        if self.args.rank == 0 and not self.metrics.keys() <= logged.keys():
            raise _changed("evaluate() does not log what zero_shot_eval returns")
        return logged

    def zero_shot_eval(self, proceed: Callable, arguments: dict) -> dict:
        data = {name: info for name, info in arguments["data"].items() if info is not None}
        if not {"imagenet-val", "imagenet-v2"} & data.keys():
            return self.metrics
        arguments["data"] = data
        return {**proceed(), **self.metrics}


def _training_forward(task: Any, batch: dict[str, torch.Tensor]) -> tuple[dict, dict]:
    """open_clip 4's CLIPTask.training_forward, with which only images and texts would reach the model, not labels."""
    outputs = task.trainable_module(**batch)
    losses = task.loss(**outputs, output_dict=True)
    return {**losses, "loss": sum(losses.values())}, {"logit_scale": outputs["logit_scale"]}
