import os
import pickle
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import save_file

from flyp_plugin.checkpoints import (
    atomic_path,
    atomic_write,
    build_model,
    explain_write_errors,
    first_difference,
    read_state_dict,
    save,
)
from flyp_plugin.errors import InputError
from flyp_plugin.targets import resolve_spec
from tests.helpers_eval import checkpoint, no_larger_files, root
from tests.naming import naming, says

MODEL = "tiny-digits"


def load_model(name, weights):
    return build_model(resolve_spec(name, str(weights), {}), str(weights))


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


class Restoring(torch.nn.Module):
    """Its archive has a method that torch.jit.load calls."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(2))

    @torch.jit.export
    def __getstate__(self):
        return self.weight

    @torch.jit.export
    def __setstate__(self, weight: torch.Tensor):
        self.weight = weight

    def forward(self, x):
        return self.weight * x


def test_reads_openais_archive_and_its_state_dict(tmp_path):
    """Their files hold three sizes beside the weights, and QuickGELU has to be said."""
    root()
    model = open_clip.create_model(MODEL).eval()
    archive = torch.nn.Module()
    for name, part in [*model.named_children(), *model.named_parameters(recurse=False)]:
        setattr(archive, name, part)
    for name, number in (("input_resolution", 32), ("context_length", 32), ("vocab_size", 49408)):
        archive.register_buffer(name, torch.tensor(number))
    archive.forward = lambda images: archive.visual(images)
    torch.jit.trace(archive.half(), torch.randn(1, 3, 32, 32).half(), check_trace=False).save(
        tmp_path / "openai.pt"
    )
    torch.save(archive.state_dict(), tmp_path / "state.pt")
    expected = {key: tensor.half() for key, tensor in model.state_dict().items()}
    for path in tmp_path.iterdir():
        read = read_state_dict(path)
        assert read.keys() == expected.keys() and all(torch.equal(read[key], expected[key]) for key in read)
        built = load_model(MODEL, path).state_dict()
        assert all(torch.equal(tensor, expected[key].to(tensor.dtype)) for key, tensor in built.items())


def test_memory_that_ends_is_not_told_as_wrong_weights(monkeypatch):
    root()

    def out_of_memory(*args, **kwargs):
        raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB")

    for place, name in ((open_clip, "create_model"), (open_clip, "load_checkpoint")):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, out_of_memory)
            with pytest.raises(RuntimeError, match="^CUDA out of memory"):
                load_model(MODEL, checkpoint(MODEL, 15))


def test_reads_what_open_clip_and_torch_save(tmp_path):
    weights = {"a": torch.randn(3), "n": torch.tensor(4)}
    wrapped = {f"module._orig_mod.{key}": tensor for key, tensor in weights.items()}
    torch.save(weights, tmp_path / "bare.pt")
    torch.save({"epoch": 3, "state_dict": wrapped, "optimizer": {}}, tmp_path / "run.pt")
    torch.save(weights, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    save_file(weights, tmp_path / "it.safetensors")
    for path in tmp_path.iterdir():
        read = read_state_dict(path)
        assert read.keys() == weights.keys() and all(torch.equal(read[key], weights[key]) for key in weights)


def mistakes(folder):
    evil = {"state_dict": {"a": torch.ones(2)}, "note": Evil(str(folder / "ran"))}
    torch.save(evil, folder / "code.pt")
    torch.save(evil, folder / "code-old.pt", _use_new_zipfile_serialization=False)
    (folder / "plain.pkl").write_bytes(pickle.dumps(evil["note"], protocol=2))
    whole = checkpoint(MODEL, 15).read_bytes()
    (folder / "cut.pt").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.pt").write_bytes(b"")
    save_file({"a": torch.ones(5)}, folder / "whole.safetensors")
    (folder / "cut.safetensors").write_bytes((folder / "whole.safetensors").read_bytes()[:-3])
    torch.save({"epoch": 3}, folder / "none.pt")
    torch.save([1, 2], folder / "list.pt")
    (folder / "text.pt").write_text("text\n")
    (folder / "words.pt").write_text("elephants are grey\n")
    torch.save({"ln.weight": torch.tensor([1.0, float("nan")]), "b": torch.ones(1)}, folder / "nan.pt")
    torch.save({"ln.weight": torch.tensor([1.0, float("-inf")])}, folder / "inf.pt")
    torch.jit.script(Restoring()).save(folder / "jit.pt")


def test_bad_files_are_one_sentence_and_their_code_does_not_run(tmp_path):
    mistakes(tmp_path)
    damaged, no_weights = r"whole|complete|truncated|corrupt", r"\b(no|not)\b.*\bweights\b.*state_dict"
    expected = {
        "code.pt": r"mkdir.*state_dict",
        "code-old.pt": "mkdir",
        "plain.pkl": "mkdir",
        "cut.pt": damaged,
        "empty.pt": damaged,
        "cut.safetensors": damaged,
        "none.pt": no_weights,
        "list.pt": no_weights,
        "jit.pt": "TorchScript",
        "text.pt": damaged,
        "words.pt": damaged,
        "nan.pt": naming("NaN", "1 of 2", "ln.weight"),
        "inf.pt": naming("NaN", "1 of 1", "ln.weight"),
        "gone.pt": r"no checkpoint|not found|not exist",
    }
    for name, message in expected.items():
        with pytest.raises(InputError, match=message) as error:
            read_state_dict(tmp_path / name)
        assert "\n" not in str(error.value) and name in str(error.value)
    with pytest.raises(InputError, match=naming("code.pt", "mkdir")):
        load_model(MODEL, str(tmp_path / "code.pt"))
    assert not (tmp_path / "ran").exists()


def test_another_architecture_names_first_tensor_and_shapes():
    root()
    with pytest.raises(InputError, match=r"(?=.*visual\.\w)(?=.*[(\[]80\b)(?=.*[(\[]64\b)") as error:
        load_model(MODEL, str(checkpoint("tiny-digits-wide", 1)))
    assert "\n" not in str(error.value)
    one, two, three = ({f"ln_{name}.bias": torch.ones(2)} for name in ("1", "2", "3"))
    assert first_difference(one | two, one | two) is None
    for expected, given, named, word in (
        (one | two, one | three, "ln_2.bias", "missing"),
        (one, one | two, "ln_2.bias", ""),
        (one | two, {}, "ln_1.bias", "1 more"),
    ):
        assert says(first_difference(expected, given), named, word)
    assert "missing" not in first_difference(one, one | two)


def test_unknown_models_tags_and_a_hub_that_does_not_answer(monkeypatch):
    root()
    with pytest.raises(InputError, match=naming("ViT-B-61", "ViT-B-16")):
        load_model("ViT-B-61", "openai")
    with pytest.raises(InputError, match=naming("ViT-B-16", "opemai", "openai")):
        load_model("ViT-B-16", "opemai")
    with pytest.raises(InputError, match=naming(MODEL, "epoch_10.pt")):
        load_model(MODEL, "epoch_10.pt")

    def fail(*args, **kwargs):
        raise ConnectionError("no route to host\nlong story")

    monkeypatch.setattr(open_clip, "download_pretrained", fail)
    with pytest.raises(InputError, match=naming("RN50", "yfcc15m", "no route to host")) as error:
        load_model("RN50", "yfcc15m")
    assert "\n" not in str(error.value)


def test_a_full_disk_leaves_the_old_file_whole(tmp_path):
    path = tmp_path / "weights.pt"
    path.write_text("the old one")
    with no_larger_files(100_000):
        for write in (lambda part: save_file({"a": torch.zeros(10**6)}, part),
                      lambda part: part.write_bytes(bytes(10**6))):  # fmt: skip
            with pytest.raises(InputError, match="File too large") as error, atomic_write(path) as part:
                write(part)
            assert "\n" not in str(error.value)
        with pytest.raises(InputError, match=naming(path, "File too large")):
            save({"a": torch.zeros(10**6)}, path)
    assert path.read_text() == "the old one" and os.listdir(tmp_path) == ["weights.pt"]


def test_a_place_that_cannot_be_written_to_is_a_sentence(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    for path, reason in (
        (tmp_path / "file" / "new", "File exists|Not a dir"),
        (tmp_path / "folder", "Is a dir"),
    ):
        with pytest.raises(InputError, match=rf"{path}\b.*({reason})"):
            save({}, path)
        with (
            pytest.raises(InputError, match=rf"{path}\b.*({reason})"),
            atomic_path(path) as part,
        ):
            part.touch()
    with pytest.raises(InputError, match="No space left on device"), explain_write_errors("/dev/full"):
        Path("/dev/full").write_bytes(b"a")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


class Unpicklable:
    """What fails while it is read, as a tensor does on a GPU with a fault."""

    def __init__(self, error):
        self.error = error

    def __reduce__(self):
        raise self.error


OTHERS = [
    RuntimeError("CUDA error: device-side assert triggered"),
    torch.cuda.OutOfMemoryError("CUDA out of memory."),
    FileNotFoundError(2, "No such file or directory", "shards/0.tar"),
    ConnectionResetError(104, "Connection reset by peer"),
    OSError("cannot identify image file"),
    ValueError("another"),
]


@pytest.mark.parametrize("error", OTHERS, ids=lambda error: type(error).__name__)
def test_what_is_no_fault_of_the_file_comes_through(error, tmp_path):
    path = tmp_path / "it"
    for block in (atomic_write, atomic_path, explain_write_errors):
        with pytest.raises(type(error)) as raised, block(path):
            raise error
        assert raised.value is error
    with pytest.raises(type(error)) as raised:
        save({"a": torch.zeros(9), "b": Unpicklable(error)}, path)
    assert raised.value is error and not os.listdir(tmp_path)
