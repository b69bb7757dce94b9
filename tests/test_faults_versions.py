"""Other versions of open_clip, in short: seams that have changed (tests/faults/versions.py), and checkpoints of older ones."""

import numpy as np
import pytest
import torch

from flyp_plugin.checkpoints import read_state_dict
from tests.faults import versions


@pytest.mark.parametrize("change", [name for name in versions.CHANGES if name != "main.get_data is gone"])
def test_a_changed_seam_is_one_sentence_with_open_clips_version(digits, tmp_path, change):
    before = versions.state()
    with versions.changed(change):
        status, written = versions.started(digits, tmp_path)
    assert versions.verdict(status, written) is None
    assert versions.state() == before


def test_without_a_change_the_same_run_succeeds(digits, tmp_path):
    assert versions.started(digits, tmp_path)[0] == 0


@pytest.mark.skipif(not hasattr(torch.serialization, "add_safe_globals"), reason="torch before 2.4")
@pytest.mark.parametrize("numpy", [b"numpy.core.multiarray", b"numpy._core.multiarray"])
def test_a_learning_rate_that_numpy_made_is_no_code(tmp_path, numpy):
    """As in the checkpoints of open_clip before 2.30, on either side of numpy 2."""
    rate = np.float64(0.25)
    torch.save({"state_dict": {"a": torch.ones(2)}, "lr": rate}, tmp_path / "it.pt", pickle_protocol=2)
    data = (tmp_path / "it.pt").read_bytes()
    here = np.float64().__reduce__()[0].__module__.encode()
    assert here in data
    rewrite(tmp_path / "it.pt", here, numpy)
    assert read_state_dict(tmp_path / "it.pt")["a"].tolist() == [1, 1]
    assert torch.load(tmp_path / "it.pt", weights_only=True)["lr"] == 0.25


def rewrite(path, old, new):
    """Another text in the pickle of a file that torch has saved."""
    import zipfile

    with zipfile.ZipFile(path) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, data in members.items():
            archive.writestr(name, data.replace(old, new) if name.endswith("data.pkl") else data)
