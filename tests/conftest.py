"""What all tests share: digits as shards."""

import logging
from contextlib import suppress
from multiprocessing import active_children

import open_clip
import pytest
import torch

from flyp_plugin import remote
from tests import digits as digits_module


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """A data folder: train/ (1,000 images, 8 shards), test/ (797), class names, templates, digits-vit.json."""
    return digits_module.write(tmp_path_factory.mktemp("digits"))


@pytest.fixture(scope="session")
def start(digits, tmp_path_factory):
    """Random weights of the digits' model, from which several runs can start."""
    open_clip.add_model_config(digits / "digits-vit.json")
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("start") / "start.pt"
    torch.save(open_clip.create_model("digits-vit").state_dict(), path)
    return path


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    """What fails over a network is tried again at once."""
    monkeypatch.setattr(remote, "BACKOFF", 0.001)


@pytest.fixture(autouse=True)
def _no_workers_left():
    """End the workers of trainings in this process, which live as long as their loader.

    That is in cycles of references, so a garbage collection frees it; torch then waits five seconds and more for each
    worker, whose queue may be gone already. A worker that its parent ends reports success, so nothing takes it for a crash.
    """
    before = set(active_children())
    yield
    for worker in set(active_children()) - before:
        worker.terminate()


@pytest.fixture(autouse=True)
def _logging_restored():
    """open_clip's main() adds handlers to the root logger and sets the level of every logger there is, torch's too."""
    root, known = logging.getLogger(), logging.getLogger().manager.loggerDict

    def loggers():
        return [root, *(logger for logger in known.values() if isinstance(logger, logging.Logger))]

    handlers, levels = list(root.handlers), {logger: logger.level for logger in loggers()}
    yield
    for handler in set(root.handlers) - set(handlers):
        root.removeHandler(handler)
        with suppress(OSError):  # no room for what it still holds
            handler.close()
    for logger in loggers():
        logger.setLevel(levels.get(logger, logging.NOTSET))
