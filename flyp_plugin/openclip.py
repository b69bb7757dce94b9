"""FLYP inside open_clip's own training script. This is the only module that names open_clip_train.

`run` calls open_clip_train.main.main() as it is. The loop, the loss of plain FLYP, the optimizer, the schedule,
checkpoints and logs are open_clip's. For the time of that call a few functions are replaced by methods of `_Seams`,
which call the original and the run (`TrainingRun`, which train.py implements). In the order in which main() calls them:

    parse_args                    returns the arguments that train.py has parsed and checked, open_clip's and ours
    create_model_and_transforms   resumes from the newest checkpoint, reads weights by our reader, and passes the model to
                                  the run before DDP, FSDP2 and torch.compile wrap it
    get_data                      data["train"] is our loader; open_clip's own evaluation sets stay
    create_loss                   replaced only for an objective other than plain FLYP
    train_one_epoch               before the first epoch: evaluates the starting weights, fits a linear probe;
                                  after each: stops if training has diverged
    evaluate                      after each epoch and on every rank: scores our evaluation sets
    train.zero_shot_eval          called by evaluate() on rank 0: returns these scores, which evaluate() then logs
    torch.save                    writes a checkpoint completely or not at all

open_clip may change. `SEAMS` lists the parameters that we rely on; they are compared before anything starts. Whether
main() really calls each replacement is checked while it runs. Without these checks a run on other data, or an evaluation
that is never logged, would go unnoticed; whatever fails by itself is left to Python.
"""

import inspect
import io
import logging
import os
import random
import signal
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import ExitStack, redirect_stderr, suppress
from functools import partial
from importlib import import_module
from importlib.metadata import version
from inspect import BoundArguments
from pathlib import Path
from textwrap import shorten
from typing import Any, Protocol

import numpy as np
import torch

from flyp_plugin import run_folder
from flyp_plugin.checkpoints import save, use_reader
from flyp_plugin.data import ClassPromptDataset
from flyp_plugin.errors import NO_ROOM, InputError
from flyp_plugin.model_spec import ModelSpec, is_place
from flyp_plugin.record import Record, newest_checkpoint
from flyp_plugin.samples import sample_seed

SUPPORTED = "2.28 to 3.3 and the 4.x development tree"
# name: (module of open_clip_train, parameters that we rely on; two lists where open_clip 4 differs)
SEAMS: dict[str, tuple[str, ...]] = {
    "parse_args": ("main", ""),
    "create_model_and_transforms": ("main", "model_name pretrained force_quick_gelu"),
    "get_data": ("main", "args preprocess_fns epoch tokenizer"),
    "train_one_epoch": ("main", "model epoch data args tb_writer", "state data args tb_writer"),
    "evaluate": ("main", "data epoch args tb_writer tokenizer"),
    "zero_shot_eval": ("train", "data epoch args"),
}
_OWN_SETS = ("val_data", "imagenet_val", "imagenet_v2")  # open_clip's flags of evaluation sets
_log = logging.getLogger(__name__)


class TrainingRun(Protocol):
    """What open_clip's main() is to train. All methods but `record` are called on every rank, in this order.

    Attributes:
        args: open_clip's and FLYP's flags. main() adds rank, world_size, name, checkpoint_path, ...
        spec: the model that is trained.
        changes: the flags that need another loss than open_clip's; empty for plain FLYP.
        resumed: the record of the run that --resume continues, if it has one.
    """

    args: Namespace
    spec: ModelSpec
    changes: list[str]
    resumed: Record | None

    @property
    def evaluates(self) -> bool:
        """Whether there are evaluation sets."""

    def on_model(self, model: torch.nn.Module) -> None:
        """Called once, when the model has been created, before anything wraps it."""

    def record(self, epoch: int) -> Record:
        """Called on rank 0 when the first epoch is known, before training: what flyp.json is to say."""

    def train_data(self, preprocess: Callable, tokenizer: Callable, as_dict: bool) -> ClassPromptDataset:
        """Called once, where open_clip loads its data. `as_dict`: open_clip 4 takes batches as dicts."""

    def create_loss(self) -> torch.nn.Module:
        """Called once, where open_clip creates its loss, if there are `changes`."""

    def evaluate(self, model: torch.nn.Module, preprocess: Callable, tokenizer: Callable, epoch: int) -> dict:
        """Called before the first epoch (with 0) and after each: the metrics to log, empty to skip this epoch."""

    def before_epoch(self, model: torch.nn.Module, preprocess: Callable, epoch: int) -> bool:
        """Called before each epoch; False: open_clip's loop does not train in it."""

    def after_epoch(self, model: torch.nn.Module, epoch: int) -> None:
        """Called after each epoch that was trained, before its evaluation and checkpoint."""

    def finish(self) -> None:
        """Called when main() has returned without an error."""


def _changed(what: str) -> InputError:
    return InputError(
        f"open_clip_torch {version('open_clip_torch')} has changed ({what}); flyp-plugin works with {SUPPORTED}: "
        "install one of these."
    )


def _find(module: str, name: str) -> Any:
    try:
        found = getattr(import_module(f"open_clip_train.{module}"), name, None)
    except ModuleNotFoundError as error:
        raise InputError(
            f"open_clip_torch {version('open_clip_torch')} cannot train without the package {error.name}: pip install "
            f"'flyp-plugin[train]' (which works with open_clip_torch {SUPPORTED})."
        ) from None
    if found is None:
        raise _changed(f"it has no open_clip_train.{module}.{name}")
    return found


def parse_args(argv: Sequence[str]) -> Namespace:
    """open_clip's own parser. For a wrong flag only its last line is shown, without 200 lines of usage.

    Raises:
        InputError: a wrong flag.
    """
    stderr = io.StringIO()
    try:
        with redirect_stderr(stderr):
            return _find("params", "parse_args")(list(argv))
    except SystemExit as error:
        if error.code != 2:  # --help
            raise
        reason = stderr.getvalue().strip().rpartition("error: ")[2]
        raise InputError(
            f"{reason} (see --help for FLYP's flags, --help-open-clip for open_clip's)."
        ) from None


def world() -> tuple[int, int]:
    """(rank, number of ranks) that open_clip will find in the environment set by torchrun or Slurm."""
    if not _find("distributed", "is_using_distributed")():
        return 0, 1
    _, rank, size = _find("distributed", "world_info_from_env")()
    return rank, size


def run(flyp: TrainingRun) -> int:
    """Call open_clip_train.main.main() on the data of `flyp` and return the exit status.

    Raises:
        InputError: another process writes to the run's folder, the disk is full, another rank has ended, open_clip has
            changed, or what `flyp` raises.
    """
    main, args = _find("main", "main"), flyp.args
    rank, ranks = world()
    if ranks > 1:  # a rank that waits for the others in C++ runs no Python handler, and torchrun waits for it
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with ExitStack() as stack:
        stack.callback(_restore_logging, list(logging.root.handlers))
        seams = _Seams(flyp, stack)
        seams.install()
        try:
            if seams.named and rank == 0:
                seams.claim_folder()
                seams.find_newest()
            if main([]) == -1:  # it has printed why
                if not seams.named and not args.remote_sync:  # the name made from the time is taken
                    run_folder.check_free(args)
                return 1
            seams.check_called("get_data")
            if seams.started:  # else the resumed run was finished
                seams.check_evaluated(args.epochs)
        except (OSError, RuntimeError) as error:
            _log.debug(error, exc_info=True)  # shown with --debug
            if known := _explain(error, args):
                raise known from error
            raise
        flyp.finish()
    return 0


def _explain(error: Exception, args: Namespace) -> InputError | None:
    """The sentence for a full disk, a folder that cannot be written, or a lost rank; None for any other error."""
    again = f"continue with --name {args.name} --resume latest" if args.name else "run the same command again"
    if isinstance(error, OSError):
        if error.errno in NO_ROOM or str(error.filename).startswith(str(Path(args.logs))):
            return InputError(
                f"{Path(args.logs, args.name or '')} cannot be written to ({error.strerror}); make room and {again}, or "
                "choose another --logs."
            )
    # gloo's errors have no type of their own
    elif isinstance(error, getattr(torch.distributed, "DistError", ())) or "gloo" in str(error):
        reason = shorten(str(error), 200, placeholder=" ...")
        return InputError(
            f"rank {world()[0]} has lost another rank ({reason}), which has ended or cannot be reached; look for that "
            f"rank's own error, fix it, and {again}."
        )
    return None


class _Seams:
    """The functions that replace open_clip_train's during one call of its main()."""

    def __init__(self, flyp: TrainingRun, stack: ExitStack):
        self.flyp, self.args, self.stack = flyp, flyp.args, stack
        self.named = bool(self.args.name)  # else main() makes up a name
        self.resumes_latest = self.args.resume == "latest"  # which main() replaces by a path
        self.newest: Path | None = None  # on rank 0: the checkpoint to resume from
        self.called: set[str] = set()
        self.started = False
        self.model: Any = None
        self.preprocess_val: Any = None
        self.tokenizer: Any = None
        self.train: Any = None  # open_clip's DataInfo of our data
        self.metrics: dict[str, float] = {}  # those that open_clip is about to log
        self.evaluated = 0  # the last epoch that was evaluated

    def install(self) -> None:
        """Replace open_clip's functions until `stack` is closed.

        Raises:
            InputError: one of them is missing or lacks a parameter.
        """
        for name, (module, *alternatives) in SEAMS.items():
            original = _find(module, name)
            signature = inspect.signature(original)
            if not any(signature.parameters.keys() >= set(names.split()) for names in alternatives):
                needed = " or ".join(alternatives)
                raise _changed(f"open_clip_train.{module}.{name} lacks one of the parameters {needed}")
            place = sys.modules[f"open_clip_train.{module}"]
            self.replace(place, name, partial(self.call, name, original, signature))
        main = sys.modules["open_clip_train.main"]
        if self.flyp.changes:
            if not hasattr(main, "create_loss"):  # open_clip 4 has tasks
                raise InputError(
                    f"open_clip_torch {version('open_clip_torch')} takes no other loss, which {self.flyp.changes[0]} "
                    "needs; install open_clip_torch 2.28 to 3.3, or leave the flag out."
                )
            self.replace(main, "create_loss", lambda args: self.flyp.create_loss())
        if self.args.device.startswith("cpu") or not torch.cuda.is_available():
            self.replace(torch.nn.parallel, "DistributedDataParallel", _CpuDistributedDataParallel)
        self.replace(torch, "save", partial(_save_completely, torch.save))
        self.replace(main, "start_sync_process", partial(_start_daemon, _find("main", "start_sync_process")))
        self.replace(logging.FileHandler, "handleError", _warn_once)

    def replace(self, place: Any, name: str, value: object) -> None:
        self.stack.callback(setattr, place, name, getattr(place, name))
        setattr(place, name, value)

    def call(
        self, name: str, original: Callable, signature: inspect.Signature, *args: Any, **kwargs: Any
    ) -> Any:
        """A call by open_clip, passed on to the method of this name with its arguments by name."""
        self.called.add(name)
        return getattr(self, name)(original, signature.bind(*args, **kwargs))

    def check_called(self, name: str) -> None:
        if name not in self.called:
            raise _changed(f"main() does not call {name}")

    def check_evaluated(self, epoch: int) -> None:
        if self.flyp.evaluates and self.evaluated != epoch:
            raise _changed(f"main() did not call evaluate after epoch {epoch}")

    def claim_folder(self) -> None:
        """On rank 0, when the run has a name: let no other process write to its folder."""
        self.folder = Path(self.args.logs, self.args.name)
        self.stack.enter_context(run_folder.folder_lock(self.folder, inherited=False))
        if not self.named or not run_folder.contains_run(self.folder):
            self.stack.callback(self.remove_unless_started)

    def remove_unless_started(self) -> None:
        if not self.started:
            run_folder.remove_unstarted(self.folder)

    def find_newest(self) -> None:
        """On rank 0: the checkpoint to resume from. Incomplete ones are set aside."""
        run_folder.check_free(self.args)
        run_folder.set_aside_incomplete(self.folder)
        if self.resumes_latest:
            run_folder.check_checkpoints(self.folder)
            self.newest = newest_checkpoint(self.folder)

    def parse_args(self, original: Callable, given: BoundArguments) -> Namespace:
        return self.args

    def create_model_and_transforms(self, original: Callable, given: BoundArguments) -> tuple:
        self.check_called("parse_args")
        name = given.arguments["model_name"]
        if self.model is None:
            self.resume_newest()
            if self.args.rank == 0 and not self.named:  # by now main() has made up a name
                self.claim_folder()
        elif not is_place(name):  # the teacher of --distill-model
            pretrained = given.arguments.get("pretrained") or ""
            given.arguments["force_quick_gelu"] = ModelSpec.of(name, pretrained).quick_gelu
        with use_reader():
            created = original(*given.args, **given.kwargs)
        if self.model is None:
            self.model, _, _ = created
            self.flyp.on_model(self.model)
        return created

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

    def get_data(self, original: Callable, given: BoundArguments) -> dict:
        self.check_called("create_model_and_transforms")
        args, epoch = given.arguments["args"], given.arguments.get("epoch", 0)
        if args.rank == 0:
            if epoch < args.epochs:  # else nothing is trained
                run_folder.write_record(self.flyp.record(epoch), self.flyp.resumed, self.folder)
            run_folder.drop_results_after(epoch, self.folder)
            if self.resumes_latest:
                run_folder.log_start(epoch, args)
        preprocess_train, self.preprocess_val = given.arguments["preprocess_fns"]
        self.tokenizer = self.flyp.spec.tokenizer()
        given.arguments["args"] = Namespace(**{**vars(args), "train_data": None, "dataset_type": "auto"})
        _try_own_sets(original, given)
        data = original(*given.args, **given.kwargs)
        as_dict = "naflex_data_config" in given.signature.parameters  # open_clip 4
        dataset = self.flyp.train_data(preprocess_train, self.tokenizer, as_dict)
        data["train"] = self.train = _find("data", "DataInfo")(dataloader=dataset)
        self.train.set_epoch = self.set_epoch
        if self.flyp.evaluates:  # main() evaluates only if this key exists; zero_shot_eval below answers
            data.setdefault("imagenet-val", None)
        return data

    def set_epoch(self, epoch: int) -> None:
        """Called by open_clip at the start of each epoch.

        Seeds everything random: open_clip does not restore random states when it resumes, and a resumed run must equal
        an uninterrupted one.
        """
        self.check_called("train_one_epoch")
        self.called.add("set_epoch")
        self.train.dataloader.set_epoch(epoch)
        seed = sample_seed(self.args.seed, epoch, self.args.rank)
        torch.manual_seed(seed % 2**63)
        random.seed(seed)
        np.random.seed(seed % 2**32)

    def train_one_epoch(self, original: Callable, given: BoundArguments) -> Any:
        arguments = given.arguments
        state = arguments.get("state")  # open_clip 4: one object for model, optimizer and epoch
        model, epoch = (state.task, state.epoch) if state else (arguments["model"], arguments["epoch"])
        data, args = arguments["data"], arguments["args"]
        if data.get("train") is not self.train:
            raise _changed("main() does not train on what get_data returns")
        if self.started:
            self.check_evaluated(epoch)
        elif epoch == 0 and self.flyp.evaluates:
            more = {"tb_writer": arguments.get("tb_writer"), "tokenizer": self.tokenizer}
            _find("main", "evaluate")(model, data=data, epoch=0, args=args, **more)
        self.started = True
        if not self.flyp.before_epoch(self.model, self.preprocess_val, epoch):
            return None
        result = original(*given.args, **given.kwargs)
        self.check_called("set_epoch")
        self.flyp.after_epoch(self.model, epoch + 1)
        return result

    def evaluate(self, original: Callable, given: BoundArguments) -> dict:
        epoch = self.evaluated = given.arguments["epoch"]
        if self.flyp.evaluates:
            self.metrics = self.flyp.evaluate(self.model, self.preprocess_val, self.tokenizer, epoch)
        logged = original(*given.args, **given.kwargs)
        if self.args.rank == 0 and not self.metrics.keys() <= logged.keys():
            raise _changed("evaluate() does not log what zero_shot_eval returns")
        return logged

    def zero_shot_eval(self, original: Callable, given: BoundArguments) -> dict:
        data = {name: info for name, info in given.arguments["data"].items() if info is not None}
        if not {"imagenet-val", "imagenet-v2"} & data.keys():
            return self.metrics
        given.arguments["data"] = data
        return {**original(*given.args, **given.kwargs), **self.metrics}


def _try_own_sets(get_data: Callable, given: BoundArguments) -> None:
    """Read a batch of each of open_clip's own evaluation sets: else a bad one costs the first epoch, unsaved."""
    args = given.arguments["args"]
    for name in (name for name in _OWN_SETS if getattr(args, name)):
        only = {**dict.fromkeys(_OWN_SETS), name: getattr(args, name), "workers": 0}
        given.arguments["args"] = Namespace(**{**vars(args), **only})
        try:
            for info in get_data(*given.args, **given.kwargs).values():
                if next(iter(info.dataloader), None) is None:
                    raise ValueError("it has no image with a text in .txt")
            if name != "val_data":  # before open_clip 4 this needs NumPy before 2.4
                _find("zero_shot", "accuracy")(torch.eye(5), torch.arange(5), topk=(1, 5))
        except (OSError, ValueError, TypeError, RuntimeError, AttributeError, LookupError) as error:
            reason = f"{type(error).__name__}: {shorten(str(error), 200, placeholder=' ...')}"
            raise InputError(
                f"open_clip cannot evaluate --{name.replace('_', '-')} {getattr(args, name)} ({reason}); give a labelled set "
                "with --eval-data NAME=SHARDS instead."
            ) from error
    given.arguments["args"] = args


def _restore_logging(handlers: list[logging.Handler]) -> None:
    """Undo what main() does: it adds handlers, and torch's loggers at INFO would report compile times at exit."""
    for handler in set(logging.root.handlers) - set(handlers):
        logging.root.removeHandler(handler)
        with suppress(OSError):  # no room for what it still holds
            handler.close()
    for name in logging.root.manager.loggerDict:
        if name.startswith("torch"):
            logging.getLogger(name).setLevel(logging.WARNING)


def _warn_once(handler: Any, record: logging.LogRecord) -> None:
    """For a log file that cannot be written: one warning, where logging prints a traceback for each line."""
    if not getattr(handler, "warned", False):
        handler.warned = True
        error = sys.exc_info()[1]
        reason = getattr(error, "strerror", None) or error
        _log.warning(f"{handler.baseFilename} cannot be written to ({reason}): it will lack lines.")


def _save_completely(torch_save: Callable, content: object, file: Any, *args: Any, **kwargs: Any) -> None:
    """torch.save() that leaves no partial file, whenever it is killed."""
    if isinstance(file, (str, os.PathLike)):
        save(content, file)
    else:
        torch_save(content, file, *args, **kwargs)


def _start_daemon(start_sync_process: Callable, *args: Any) -> Any:
    """The endless process of --remote-sync as a daemon: else Python waits for it after an error in training."""
    process = start_sync_process(*args)
    process.daemon = True
    return process


class _CpuDistributedDataParallel(torch.nn.parallel.DistributedDataParallel):
    """Without device_ids: open_clip passes [cpu], which DistributedDataParallel refuses."""

    def __init__(self, module: torch.nn.Module, device_ids: object = None, **kwargs: Any):
        super().__init__(module, **kwargs)
