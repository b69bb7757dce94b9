"""Repairs around open_clip's main() that have nothing to do with FLYP. openclip.py installs them for the time of a run.

torch.save                 writes a file completely or not at all
DistributedDataParallel    works on CPUs, where it refuses the device_ids=[cpu] that open_clip passes
start_sync_process         --remote-sync's endless process is a daemon: else Python waits for it after an error
logging                    one warning for a log file that cannot be written, not a traceback for each line; afterwards
                           main()'s handlers are removed, and torch's loggers do not report compile times at exit
"""

import logging
import os
import sys
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any

import torch

from flyp_plugin.checkpoints import save

_log = logging.getLogger(__name__)


def replace(stack: ExitStack, place: Any, name: str, value: object) -> None:
    """Set an attribute until `stack` is closed."""
    stack.callback(setattr, place, name, getattr(place, name))
    setattr(place, name, value)


def install(stack: ExitStack, main: Any, on_cpu: bool) -> None:
    """Install the repairs until `stack` is closed; `main` is the module of open_clip's main()."""
    stack.callback(_restore_logging, list(logging.root.handlers))
    replace(stack, logging.FileHandler, "handleError", _warn_once)
    replace(stack, torch, "save", partial(_save_completely, torch.save))
    replace(stack, main, "start_sync_process", partial(_start_daemon, main.start_sync_process))
    if on_cpu:
        replace(stack, torch.nn.parallel, "DistributedDataParallel", _CpuDistributedDataParallel)


def _restore_logging(handlers: list[logging.Handler]) -> None:
    for handler in set(logging.root.handlers) - set(handlers):
        logging.root.removeHandler(handler)
        with suppress(OSError):  # no room for what it still holds
            handler.close()
    for name in logging.root.manager.loggerDict:
        if name.startswith("torch"):
            logging.getLogger(name).setLevel(logging.WARNING)


def _warn_once(handler: Any, record: logging.LogRecord) -> None:
    if not hasattr(handler, "warned"):
        handler.warned, error = True, sys.exc_info()[1]
        _log.warning(f"{handler.baseFilename} cannot be written to ({error}): it will lack lines.")


def _save_completely(torch_save: Any, content: object, file: Any, *args: Any, **kwargs: Any) -> None:
    if isinstance(file, (str, os.PathLike)):
        save(content, file)
    else:
        torch_save(content, file, *args, **kwargs)


def _start_daemon(start_sync_process: Any, *args: Any) -> Any:
    process = start_sync_process(*args)
    process.daemon = True
    return process


class _CpuDistributedDataParallel(torch.nn.parallel.DistributedDataParallel):
    def __init__(self, module: torch.nn.Module, device_ids: object = None, **kwargs: Any):
        super().__init__(module, **kwargs)
