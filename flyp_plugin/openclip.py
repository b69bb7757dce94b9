"""FLYP inside open_clip's own training script: the only module that knows open_clip_train's internals.

`run` calls open_clip_train.main.main with a few of its module globals replaced for the time of that call:
    main.parse_args                      our flags join open_clip's, so that params.txt and loggers have them
    main.create_model_and_transforms     the model is met before DDP and torch.compile
    main.get_data                        data["train"] is our loader; all else stays open_clip's
    main.evaluate, train.zero_shot_eval  our metrics, on every rank, logged by open_clip
    main.train_one_epoch                 before its first call, the evaluation of the starting weights; and a linear probe
    main.create_loss                     the loss of an objective other than plain FLYP; else this is not touched
    torch.save                           a checkpoint is there whole or not at all
The loop, the loss of plain FLYP, the optimizer, checkpoints and logs are open_clip's, unchanged.
"""

import inspect
import io
import logging
import os
import random
import re
import signal
import sys
import traceback
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, suppress
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from textwrap import shorten
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from flyp_plugin import run_folder
from flyp_plugin.checkpoints import save, use_reader
from flyp_plugin.data import ClassPromptDataset
from flyp_plugin.errors import NO_ROOM, InputError
from flyp_plugin.model_spec import ModelSpec, is_place
from flyp_plugin.record import newest_checkpoint
from flyp_plugin.run_folder import folder_lock
from flyp_plugin.samples import sample_seed

if TYPE_CHECKING:
    from flyp_plugin.train import FlypRun

# for `python -c`: open_clip's own training, of a model configuration (the first argument) that open_clip has not
PLAIN_MAIN = (
    "import open_clip, sys; open_clip.add_model_config(sys.argv.pop(1)); "
    "from open_clip_train.main import main; main(sys.argv[1:])"
)
SUPPORTED = "2.28 to 3.3 and the 4.x development tree"
# what is replaced: in which module of open_clip_train, and how that is called from here (arguments, keywords)
_PLACES: dict[str, tuple[str, int, str]] = {
    "parse_args": ("main", 1, ""),
    "create_model_and_transforms": ("main", 2, ""),
    "get_data": ("main", 2, "epoch tokenizer"),
    "evaluate": ("main", 4, "tb_writer tokenizer"),
    "zero_shot_eval": ("train", 4, ""),
    "train_one_epoch": ("main", 0, ""),  # as main() calls it: see _check_loop
}
_log = logging.getLogger(__name__)


def _module(name: str) -> ModuleType:
    try:
        return import_module(f"open_clip_train.{name}")
    except ModuleNotFoundError as error:
        if error.name and error.name.startswith("open_clip_train"):
            raise InputError(
                f"open_clip_torch {version('open_clip_torch')} has no {error.name}; FLYP needs {SUPPORTED}: "
                "pip install -U 'flyp-plugin[train]'"
            ) from None
        raise InputError(
            f"open_clip's training script needs the package {error.name}: pip install 'flyp-plugin[train]'"
        ) from None


def _unfit(what: str) -> InputError:
    return InputError(
        f"open_clip_torch {version('open_clip_torch')} {what}; FLYP is made for {SUPPORTED}: install one of these."
    )


def _of(module: str, name: str) -> Any:
    found = getattr(_module(module), name, None)
    if found is None:
        raise _unfit(f"has no open_clip_train.{module}.{name}")
    return found


def _bind(function: Callable, who: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """The arguments of a call by the names that the function gives them, without calling it."""
    try:
        return inspect.signature(function).bind(*args, **kwargs).arguments
    except TypeError as error:
        raise _unfit(f"{who} with other arguments ({error})") from None


def parse_args(argv: Sequence[str]) -> Namespace:
    """open_clip's own parser, of whose answer to a wrong flag the last line is told, not its usage of 200 lines.

    Raises:
        InputError: a wrong flag.
    """
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            return _of("params", "parse_args")(list(argv))
    except SystemExit as error:
        if not error.code:  # --help
            raise
        reason = said.getvalue().strip().rpartition("error: ")[2]
        raise InputError(
            f"{reason} (see --help for FLYP's flags, --help-open-clip for open_clip's)."
        ) from None
    except InputError:
        raise
    except (ValueError, SyntaxError) as error:  # as of --aug-cfg, or by open_clip's own hand
        raise InputError(f"open_clip cannot read its flags: {error} (see --help-open-clip).") from None


def world() -> tuple[int, int]:
    """(rank, number of ranks) that open_clip will find, from the environment that torchrun or Slurm has set."""
    if not _of("distributed", "is_using_distributed")():
        return 0, 1
    _, rank, size = _of("distributed", "world_info_from_env")()
    return rank, size


def run(plan: "FlypRun") -> int:
    """open_clip_train.main.main, unchanged, on the plan's data; returns the exit status.

    Raises:
        InputError: another process writes to the run's folder, the disk is full, another rank has ended, open_clip has
            changed, or what the plan finds.
    """
    main, args = _of("main", "main"), plan.args
    rank, ranks = world()
    if ranks > 1:  # one that waits for the others would run no handler, and torchrun wait for it
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with ExitStack() as stack:
        stack.enter_context(_logging_put_back())
        seams = stack.enter_context(_installed(_Seams(plan, stack)))
        try:
            if rank == 0 and seams.named:
                seams.lock()
                run_folder.check_free(args)
                run_folder.clear_up(Path(args.logs, args.name))
                if seams.latest:
                    run_folder.check_checkpoints(Path(args.logs, args.name))
                    seams.newest = newest_checkpoint(Path(args.logs, args.name))
            if main([]) == -1:  # its parser's answer is the plan's
                if not seams.named and not args.remote_sync:  # the name that its clock has made up is taken
                    run_folder.check_free(args)
                return 1
            seams.check_that_all_were_used()
        except InputError as error:
            _log.debug(error, exc_info=True)  # shown by --debug
            raise
        except OSError as error:
            if error.errno in NO_ROOM:
                mend = f"make room, and go on with --name {args.name} --resume latest"
            elif str(error.filename).startswith(str(Path(args.logs))):
                mend = "choose another --logs"
            else:
                raise
            folder = Path(args.logs, args.name or "")
            raise InputError(f"{folder} cannot be written to ({error.strerror}); {mend}.") from error
        except (RuntimeError, ValueError, KeyError, AssertionError) as error:
            _log.debug(error, exc_info=True)
            if _between_ranks(error):
                raise _alone(args, error) from None
            if not seams.started and (reason := _refusal(error)):
                raise InputError(f"open_clip refuses these flags: {reason} (see --help-open-clip).") from None
            another = isinstance(error, (ValueError, KeyError)) or "in loading state_dict" in str(error)
            if not (another and args.resume and seams.model and seams.train is None):  # where it is read
                raise
            raise InputError(
                f"open_clip could not resume from {args.resume} ({shorten(str(error), 300, placeholder=' ...')}); give the "
                "flags and take the version of open_clip that it was trained with."
            ) from None
        plan.finish()
    return 0


def _refusal(error: Exception) -> str:
    """What open_clip or timm says against flags by an error of their own; empty where it comes from elsewhere."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    by_them = re.search(r"[/\\\\](open_clip_train|timm[/\\\\]optim)[/\\\\]", last.filename)
    if not by_them or not isinstance(error, (AssertionError, ValueError)):
        return ""
    return str(error) or last.line or type(error).__name__


def _between_ranks(error: Exception) -> bool:
    """Whether it came out of a collective: gloo's errors have no type of their own."""
    return isinstance(error, getattr(torch.distributed, "DistError", ())) or "gloo" in str(error)


def _alone(args: Namespace, error: Exception) -> InputError:
    """What a rank says that is left by the others, whose own error is the one to mend."""
    reason = re.sub(r"^\[\S+\] ", "", str(error).splitlines()[0]).partition(". This is typically")[0][:200]
    again = f"--name {args.name} --resume latest" if args.name else "the same command"
    return InputError(
        f"rank {world()[0]} has lost another rank ({reason}), which has ended or cannot be reached; look for that "
        f"one's own error, mend it, and go on with {again}."
    )


@contextmanager
def _logging_put_back() -> Iterator[None]:
    """main() adds handlers to the root logger and sets the level of every logger there is, torch's too."""
    root, known = logging.getLogger(), logging.getLogger().manager.loggerDict
    handlers, levels = list(root.handlers), {root: root.level}
    levels |= {logger: logger.level for logger in known.values() if isinstance(logger, logging.Logger)}
    try:
        yield
    finally:
        for handler in set(root.handlers) - set(handlers):
            root.removeHandler(handler)
            with suppress(OSError):  # no room for what it still holds
                handler.close()
        for logger in (root, *known.values()):
            if isinstance(logger, logging.Logger):
                logger.setLevel(levels.get(logger, logging.NOTSET))


@contextmanager
def _installed(seams: "_Seams") -> Iterator["_Seams"]:
    args, replaced = seams.plan.args, []

    def replace(module: Any, name: str, value: object) -> None:
        replaced.append((module, name, getattr(module, name)))
        setattr(module, name, value)

    try:
        _bind(_of("data", "DataInfo"), "has open_clip_train.data.DataInfo", dataloader=None)
        for name, (module, number, words) in _PLACES.items():
            original = seams.original[name] = _of(module, name)
            if number:
                who = f"has open_clip_train.{module}.{name}"
                _bind(original, who, *[None] * number, **dict.fromkeys(words.split()))
            else:
                _check_loop(original)
            replace(_module(module), name, _met(getattr(seams, name)))
        if seams.plan.changes:
            if not hasattr(_module("main"), "create_loss"):  # open_clip 4 has tasks in its place
                raise InputError(
                    f"open_clip_torch {version('open_clip_torch')} takes no other loss, which {seams.plan.changes[0]} "
                    "needs; install open_clip_torch 2.28 to 3.3, or leave the flag out."
                )
            replace(_module("main"), "create_loss", lambda args: seams.plan.create_loss())
        if args.device.startswith("cpu") or not torch.cuda.is_available():
            replace(torch.nn.parallel, "DistributedDataParallel", _CpuDistributed)
        replace(torch, "save", _saved_whole(torch.save))
        replace(_module("main"), "start_sync_process", _ends_with_us(_of("main", "start_sync_process")))
        replace(logging.FileHandler, "handleError", _lines_are_lost())
        yield seams
    finally:
        for place, name, original in reversed(replaced):
            setattr(place, name, original)


def _met(seam: Callable) -> Callable:
    """The seam, which says so where open_clip calls it otherwise than it is made for."""

    def met(*args: Any, **kwargs: Any) -> Any:
        _bind(seam, f"calls {seam.__name__}", *args, **kwargs)
        return seam(*args, **kwargs)

    return met


def _check_loop(train_one_epoch: Callable) -> None:
    names = inspect.signature(train_one_epoch).parameters.keys()
    if not any(wanted <= names for wanted in ({"state", "data", "args"}, {"model", "epoch", "data", "args"})):
        raise _unfit(f"has open_clip_train.main.train_one_epoch with other arguments ({', '.join(names)})")


def _saved_whole(original: Callable) -> Callable:
    """torch.save that leaves no part of a file behind, wherever it is stopped."""

    def torch_save(content: object, file: Any, *args: Any, **kwargs: Any) -> None:
        if isinstance(file, (str, os.PathLike)):
            save(content, file)
        else:
            original(content, file, *args, **kwargs)

    return torch_save


def _ends_with_us(start_sync_process: Callable) -> Callable:
    """For --remote-sync, whose endless process Python would wait for where training ends in an error."""

    def start(*args: Any) -> Any:
        process = start_sync_process(*args)
        process.daemon = True
        return process

    return start


def _lines_are_lost() -> Callable:
    """For a log that cannot be written to: say so once and train on, in place of a traceback a line."""
    said = False

    def handle_error(handler: logging.FileHandler, record: logging.LogRecord) -> None:
        nonlocal said
        if not said:
            said = True
            error = sys.exc_info()[1]
            reason = getattr(error, "strerror", None) or error
            _log.warning(f"{handler.baseFilename} cannot be written to ({reason}): it will lack lines.")

    return handle_error


class _CpuDistributed(torch.nn.parallel.DistributedDataParallel):
    """Without device_ids: open_clip gives [cpu], which DistributedDataParallel refuses."""

    def __init__(self, module: torch.nn.Module, device_ids: object = None, **kwargs: Any):
        super().__init__(module, **kwargs)


class _Seams:
    """The functions that stand in for open_clip_train's during one call of its main()."""

    def __init__(self, plan: "FlypRun", stack: ExitStack):
        self.plan, self.stack, self.locked = plan, stack, False
        self.named = bool(plan.args.name)
        self.latest = plan.args.resume == "latest"  # in place of which main() puts what it finds
        self.newest: Path | None = None  # on rank 0: the checkpoint that is to be resumed
        self.original: dict[str, Callable] = {}
        self.model: Any = None
        self.preprocess_val: Any = None
        self.tokenizer: Any = None
        self.metrics: dict[str, float] = {}  # of the evaluation that open_clip is about to log
        self.train: Any = None  # open_clip's DataInfo of our data
        self.started = False
        self.scored = 0  # the epoch that was evaluated last

    def lock(self) -> None:
        """Let no other process write to the run's folder; called on rank 0, where the run has a name."""
        if not self.locked:
            folder = Path(self.plan.args.logs, self.plan.args.name)
            self.stack.enter_context(folder_lock(folder, inherited=False))
            self.locked = True
            if not self.named or not run_folder.has_begun(folder):
                self.stack.callback(self._withdraw_unless_started, folder)

    def _withdraw_unless_started(self, folder: Path) -> None:
        if not self.started:
            run_folder.withdraw(folder)

    def parse_args(self, argv: list[str]) -> Namespace:
        return self.plan.args

    def create_model_and_transforms(self, name: str, pretrained: str | None = None, **kwargs: Any) -> tuple:
        if not hasattr(self.plan.args, "rank"):  # which main() adds
            raise _unfit("takes its arguments from elsewhere than open_clip_train.main.parse_args")
        self._resume_newest()
        if self.plan.args.rank == 0:  # a run without a name has one by now, which may be that of another
            self.lock()
        if self.model is not None and not is_place(name):  # the teacher of --distill-model
            kwargs["force_quick_gelu"] = ModelSpec.of(name, pretrained or "").quick_gelu
        try:
            with use_reader():
                created = self.original["create_model_and_transforms"](name, pretrained, **kwargs)
        except (RuntimeError, OSError) as error:
            # of weights that are another model's, and those that cannot be downloaded
            if not re.match(r"Error\(s\) in loading state_dict|.*[Dd]ownload", str(error)):
                raise
            reason = shorten(str(error), 300, placeholder=" ...")
            raise InputError(
                f"open_clip could not load the weights {pretrained or name} into {name} ({reason}); check that they are this "
                "model's, and the network where they are downloaded."
            ) from error
        if not (isinstance(created, tuple) and len(created) == 3 and isinstance(created[0], torch.nn.Module)):
            raise _unfit("makes something other than a model and its two transforms")
        if self.model is None:  # a second one is the teacher of --distill-model
            self.model = created[0]
            self.plan.on_model(created[0])
        return created

    def _resume_newest(self) -> None:
        """Put the newest checkpoint, on every rank, in place of what main() has found by names."""
        args = self.plan.args
        if (
            not self.latest or self.model is not None or args.remote_sync
        ):  # of a bucket, main() lists the names
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

    def get_data(
        self, args: Namespace, preprocess: tuple, epoch: int = 0, tokenizer: Any = None, **kwargs: Any
    ) -> dict:
        if not (isinstance(preprocess, tuple) and len(preprocess) == 2):
            raise _unfit("calls get_data with something other than two transforms")
        if args.rank == 0:
            if epoch < args.epochs:  # else nothing is trained
                run_folder.write_record(
                    self.plan.record(epoch), self.plan.resumed, Path(args.logs, args.name)
                )
            run_folder.forget_after(epoch, Path(args.logs, args.name))
            if self.latest:
                run_folder.say_where_it_starts(epoch, args)
        original = self.original["get_data"]
        as_dict = "naflex_data_config" in inspect.signature(original).parameters  # open_clip 4
        others = Namespace(**{**vars(args), "train_data": None, "dataset_type": "auto"})

        def get(args: Namespace) -> dict:
            return original(args, preprocess, epoch=epoch, tokenizer=tokenizer, **kwargs)

        _try_own_evaluation(others, get)
        data = get(others)
        if not isinstance(data, dict):
            raise _unfit(f"has open_clip_train.main.get_data return a {type(data).__name__}")
        self.preprocess_val, self.tokenizer = preprocess[1], self.plan.spec.tokenizer()
        dataset = self.plan.train_data(preprocess[0], self.tokenizer, as_dict)
        data["train"] = self.train = _data_info(dataset, args, self)
        if self.plan.evaluates:  # main() evaluates where this key is; zero_shot_eval below answers
            data.setdefault("imagenet-val", None)
        return data

    def evaluate(self, model: Any, data: dict, epoch: int, args: Namespace, **kwargs: Any) -> dict:
        if self.plan.evaluates:
            self.metrics = self.plan.evaluate(self.model, self.preprocess_val, self.tokenizer, epoch)
        self.scored = epoch
        logged = self.original["evaluate"](model, data, epoch, args, **kwargs)
        if args.rank == 0 and not self.metrics.keys() <= logged.keys():
            raise _unfit("does not log what open_clip_train.train.zero_shot_eval returns")
        return logged

    def zero_shot_eval(self, model: Any, data: dict, epoch: int, args: Namespace, **kwargs: Any) -> dict:
        real = {name: info for name, info in data.items() if info is not None}
        if not {"imagenet-val", "imagenet-v2"} & real.keys():
            return self.metrics
        return {**self.original["zero_shot_eval"](model, real, epoch, args, **kwargs), **self.metrics}

    def train_one_epoch(self, *args: Any, **kwargs: Any) -> Any:
        given = _bind(self.original["train_one_epoch"], "calls train_one_epoch", *args, **kwargs)
        state = given.get("state")  # open_clip 4: one object for model, optimizer and epoch
        if state:
            given |= {"model": getattr(state, "task", None), "epoch": getattr(state, "epoch", None)}
        epoch, model, train = given["epoch"], given["model"], given["data"].get("train")
        if epoch is None or model is None or self.model is None or train is not self.train:
            raise _unfit("calls train_one_epoch with other things than the model, the data and the epoch")
        if self.started and self.plan.evaluates and self.scored != epoch:
            raise _unfit(f"did not call open_clip_train.main.evaluate after epoch {epoch}")
        if not self.started and self.plan.evaluates and epoch == 0:
            more = {"tb_writer": given.get("tb_writer"), "tokenizer": self.tokenizer}
            self.evaluate(model, given["data"], 0, given["args"], **more)
        self.started = True
        if not self.plan.before_epoch(self.model, self.preprocess_val, epoch):
            return None
        result = self.original["train_one_epoch"](*args, **kwargs)
        self.plan.after_epoch(self.model, epoch + 1)
        return result

    def check_that_all_were_used(self) -> None:
        """main() has ended: not without a call of the functions that stand in here."""
        if self.train is None:
            raise _unfit("trains on what does not come from open_clip_train.main.get_data")
        if self.started and self.plan.evaluates and self.scored != self.plan.args.epochs:
            raise _unfit("did not call open_clip_train.main.evaluate after the last epoch")


def _try_own_evaluation(args: Namespace, get_data: Callable[[Namespace], dict]) -> None:
    """Read a batch of each of open_clip's own evaluation sets, which would fail after an epoch, before it is saved.

    Args:
        args: open_clip's, without training data.
        get_data: open_clip's, of nothing but such args.

    Raises:
        InputError: it cannot be read, or not be scored.
    """
    sets = ("val_data", "imagenet_val", "imagenet_v2")
    for name in (name for name in sets if getattr(args, name)):
        path = getattr(args, name)
        one = {**vars(args), **dict.fromkeys(sets), name: path, "workers": 0}
        reason = ""
        try:
            for info in get_data(Namespace(**one)).values():
                if next(iter(info.dataloader), None) is None:
                    reason = "it has no image with a text in .txt"
            if name != "val_data":  # before open_clip 4 this needs NumPy before 2.4
                _of("zero_shot", "accuracy")(torch.eye(5), torch.arange(5), topk=(1, 5))
        except (
            OSError,
            ValueError,
            TypeError,
            RuntimeError,
            AttributeError,
            LookupError,
            AssertionError,
        ) as error:
            _log.debug(error, exc_info=True)
            reason = f"{type(error).__name__}: {shorten(str(error), 200, placeholder=' ...')}"
        if reason:
            raise InputError(
                f"open_clip cannot evaluate --{name.replace('_', '-')} {path} ({reason}); give a labelled set as "
                "--eval-data NAME=SHARDS in its place."
            )


def _data_info(dataset: ClassPromptDataset, args: Namespace, seams: _Seams) -> Any:
    """open_clip's DataInfo, whose set_epoch it calls at the start of each epoch.

    Everything random is seeded there too: open_clip does not restore random states when it resumes, and a resumed
    run is to equal an uninterrupted one.
    """

    info = _of("data", "DataInfo")(dataloader=dataset)

    def set_epoch(epoch: int) -> None:
        if not seams.started:
            raise _unfit("trains by other means than open_clip_train.main.train_one_epoch")
        dataset.set_epoch(epoch)
        seed = sample_seed(args.seed, epoch, args.rank)
        torch.manual_seed(seed % 2**63)
        random.seed(seed)
        np.random.seed(seed % 2**32)

    info.set_epoch = set_epoch
    return info
