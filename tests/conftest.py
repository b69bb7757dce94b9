"""What all tests share: digits as shards."""

import pytest

from flyp_plugin import sources
from tests import digits as digits_module


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """A data folder: train/ (1,000 images, 8 shards), test/ (797), class names, templates, digits-vit.json."""
    return digits_module.write(tmp_path_factory.mktemp("digits"))


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    """What fails over a network is tried again at once."""
    monkeypatch.setattr(sources, "BACKOFF", 0.001)
