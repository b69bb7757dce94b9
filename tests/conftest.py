"""What all tests share: digits as shards."""

import pytest

from tests import digits as digits_module


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """A data folder: train/ (1,000 images, 8 shards), test/ (797), class names, templates, digits-vit.json."""
    return digits_module.write(tmp_path_factory.mktemp("digits"))
