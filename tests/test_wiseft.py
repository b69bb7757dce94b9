import json
import os
import re
import shlex
import sys

import numpy as np
import open_clip
import PIL.Image
import pytest
import torch

from flyp_plugin.commands.wiseft import draw_frontier, parse_alphas
from flyp_plugin.errors import InputError
from flyp_plugin.wiseft import average, choose_alpha, interpolate
from tests.helpers_eval import NAMES, checkpoint, flyp, no_larger_files, root
from tests.naming import naming

MODEL = "tiny-digits"
PRETRAINED, FINETUNED = 15, 80
LOADING = ["--workers", 0, "--batch-size", 32]


def state(steps):
    return torch.load(checkpoint(MODEL, steps), weights_only=True)["state_dict"]


def argv(out, *more, pretrained=None):
    root()
    ends = [
        "--pretrained",
        pretrained or checkpoint(MODEL, PRETRAINED),
        "--finetuned",
        checkpoint(MODEL, FINETUNED),
    ]
    return ["wiseft", "--model", MODEL, *ends, *LOADING, "--out", out, *more]


def sets():
    return ["--eval-data", f"val={root()}/data", "--eval-data", f"ood={root()}/ood"]


def read(capsys):
    return json.loads(capsys.readouterr().out)


def evaluated(path, capsys, *more):
    flyp("eval", path, "--model", MODEL, *LOADING, *sets(), *more, "--json")
    return read(capsys)["results"]


def weights(steps=1, **changes):
    generator = torch.Generator().manual_seed(steps)
    made = {"a.weight": torch.randn(4, 3, generator=generator), "a.bias": torch.randn(4, generator=generator),
            "seen": torch.tensor(steps)}  # fmt: skip
    return {**made, **changes}


@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float32, torch.float32),
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.float32),
        (torch.float64, torch.float16),
    ],
)
def test_interpolate_is_the_formula_in_float32_or_wider(dtypes):
    sides = [
        {k: t.to(d) if t.is_floating_point() else t for k, t in weights(i).items()}
        for i, d in enumerate(dtypes)
    ]
    wide = torch.promote_types(*dtypes)
    for alpha in (0.0, 0.1, 0.5, 0.9, 1.0):
        merged = interpolate(*sides, alpha)
        for key in ("a.weight", "a.bias"):
            exact = (1 - alpha) * sides[0][key].double() + alpha * sides[1][key].double()
            assert merged[key].dtype == wide
            rounding = max(
                torch.finfo(wide).eps, 0 if wide == torch.float64 else torch.finfo(torch.float32).eps
            )
            assert (merged[key].double() - exact).abs().max() <= 2 * rounding * exact.abs().max()
        assert merged["seen"] == 1 and merged["seen"].dtype == torch.int64


def test_alpha_0_and_1_are_the_end_points_to_the_last_bit():
    a, b = weights(1), weights(2)
    b["a.bias"][0] = float("inf")
    for alpha, end in ((0, a), (1, b)):
        merged = interpolate(a, b, alpha)
        assert torch.equal(merged["a.weight"], end["a.weight"]) and torch.equal(
            merged["a.bias"], end["a.bias"]
        )


def test_interpolate_changes_neither_side():
    a, b = weights(1), weights(2)
    interpolate(a, b, 0.3)
    assert all(torch.equal(a[k], weights(1)[k]) and torch.equal(b[k], weights(2)[k]) for k in a)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (weights(2, **{"a.bias": torch.ones(5)}), r"(?=.*\ba\.bias\b)(?=.*[(\[]5\b)(?=.*[(\[]4\b)"),
        ({"a.weight": torch.ones(4, 3)}, naming("a.bias", "missing", "1 more")),
        (weights(2, b=torch.ones(1)), naming("tensor b")),
    ],
)
def test_other_architectures_name_the_first_tensor(other, message):
    with pytest.raises(InputError, match=message):
        interpolate(weights(1), other, 0.5)
    with pytest.raises(InputError, match=naming("1 of 2")):
        average([weights(1), other])


@pytest.mark.parametrize("alpha", [-0.1, 1.01, float("nan")])
def test_alpha_outside_0_1(alpha):
    with pytest.raises(InputError, match=naming("alpha", f"{alpha}")):
        interpolate(weights(1), weights(2), alpha)


def test_average_is_the_mean_of_each_tensor():
    three = [weights(i) for i in range(3)]
    soup = average(three)
    expected = torch.stack([w["a.weight"].double() for w in three]).mean(0).float()
    assert torch.equal(soup["a.weight"], expected) and soup["seen"] == 2
    halves = [{"a": torch.tensor([x]).half()} for x in (1.0, 2.0, 2.0)]
    assert average(halves)["a"].item() == pytest.approx(5 / 3, abs=1e-7)


def test_parse_alphas():
    assert parse_alphas("0:1:0.1") == [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1]
    assert parse_alphas("0.5") == [0.5]
    assert parse_alphas("1,0.25, 0.5,1") == [0.25, 0.5, 1]
    assert len(parse_alphas("0:1:0.01")) == 101
    for text in ("", "0:1", "0:1:0", "a", "0:1:1e-9", "1:0:0.1", "nan", "0:inf:1", "0:1:nan"):
        with pytest.raises(InputError):
            parse_alphas(text)
    with pytest.raises(InputError, match=naming("--alphas", "[0, 1]")):
        parse_alphas("0:1.5:0.5")
    for text in ("0:1e9:0.1", "nan:1:0.1", "-1e9:0:0.1"):  # which would take for ever
        with pytest.raises(InputError, match=naming("--alphas", "[0, 1]")):
            parse_alphas(text)
    with pytest.raises(InputError, match=naming("0.125", "0.01")):
        parse_alphas("0.125")


def test_alpha_is_chosen_on_the_first_set_and_ties_go_down():
    def at(val, ood):
        return {"val": {"top1": val}, "ood": {"top1": ood}}

    results = {1.0: at(0.8, 0.9), 0.4: at(0.8, 0.1), 0.6: at(0.8, 0.2), 0.0: at(0.2, 1.0)}
    assert choose_alpha(results, "val") == 0.4


def test_sweep_decodes_once_and_equals_separate_evaluations(tmp_path, capsys, monkeypatch):
    decoded = []
    real_open = PIL.Image.open
    monkeypatch.setattr(
        PIL.Image, "open", lambda *args, **kwargs: decoded.append(1) or real_open(*args, **kwargs)
    )
    monkeypatch.setattr("flyp_plugin.wiseft._BLOCK", 100 * 3 * 32 * 32 * 4)  # several blocks a set
    flyp(*argv(tmp_path / "out", *sets(), "--json", "--save-all", "--group-key", "hand"))
    record = read(capsys)
    assert len(decoded) == 203 + 97
    assert record == json.loads((tmp_path / "out" / "wiseft.json").read_text())
    assert list(record["alphas"]) == [f"{i / 10:.2f}" for i in range(11)]
    for alpha, by_set in record["alphas"].items():
        path = tmp_path / "out" / f"wise_ft_alpha={alpha}.pt"
        assert evaluated(path, capsys, "--group-key", "hand") == by_set
    for alpha, steps in (("0.00", PRETRAINED), ("1.00", FINETUNED)):
        assert evaluated(checkpoint(MODEL, steps), capsys, "--group-key", "hand") == record["alphas"][alpha]
    accuracy = [by_set["val"]["top1"] for by_set in record["alphas"].values()]
    assert len(set(accuracy)) > 5  # the sweep is of models that differ
    assert record["chosen_alpha"] == int(np.argmax(accuracy)) / 10 and record["chosen_by"] == "val/top1"


@pytest.mark.parametrize("precision", ["bf16", "amp_bf16"])
def test_low_precision_sweep_equals_evaluation_of_merged_files(tmp_path, capsys, precision):
    flyp(*argv(tmp_path, *sets(), "--precision", precision, "--alphas", "0.3,0.7", "--save-all", "--json"))
    record = read(capsys)
    for alpha, by_set in record["alphas"].items():
        path = tmp_path / f"wise_ft_alpha={alpha}.pt"
        assert evaluated(path, capsys, "--precision", precision) == by_set


def test_merged_file_is_the_formula_and_loads_in_open_clip(tmp_path):
    flyp(*argv(tmp_path, "--alpha", 0.5))
    path = tmp_path / "wise_ft_alpha=0.50.pt"
    assert sorted(os.listdir(tmp_path)) == ["flyp.json", path.name, "wiseft.json"]
    merged = torch.load(path, weights_only=True)
    model, _, _ = open_clip.create_model_and_transforms(MODEL, pretrained=str(path))
    for key, tensor in model.state_dict().items():
        exact = 0.5 * state(PRETRAINED)[key].double() + 0.5 * state(FINETUNED)[key].double()
        assert torch.equal(merged[key], tensor)
        assert (tensor - exact).abs().max() <= 2**-23 * exact.abs().max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_checkpoints(tmp_path, dtype):
    half = {key: t.to(dtype) for key, t in state(PRETRAINED).items()}
    torch.save(half, tmp_path / "half.pt")
    flyp(*argv(tmp_path / "out", "--alpha", 0.25, pretrained=tmp_path / "half.pt"))
    merged = torch.load(tmp_path / "out" / "wise_ft_alpha=0.25.pt", weights_only=True)
    for key, tensor in merged.items():
        exact = 0.75 * half[key].double() + 0.25 * state(FINETUNED)[key].double()
        assert tensor.dtype == torch.float32
        assert (tensor - exact).abs().max() <= 2**-22 * exact.abs().max()


def test_average_comes_before_the_interpolation(tmp_path):
    command = argv(tmp_path, "--alpha", 1)
    at = command.index("--finetuned")
    command[at : at + 2] = ["--average", checkpoint(MODEL, PRETRAINED), checkpoint(MODEL, FINETUNED)]
    flyp(*command)
    merged = torch.load(tmp_path / "wise_ft_alpha=1.00.pt", weights_only=True)
    expected = average([state(PRETRAINED), state(FINETUNED)])
    assert all(torch.equal(merged[key], expected[key]) for key in expected)
    assert len(json.loads((tmp_path / "wiseft.json").read_text())["inputs"]["finetuned"]) == 2


def test_writes_the_chosen_alpha_record_picture_and_table(tmp_path, capsys, caplog, monkeypatch):
    caplog.set_level("INFO")
    flyp(*argv(tmp_path, *sets(), "--alphas", "0:1:0.5", "--per-set"))
    record = json.loads((tmp_path / "wiseft.json").read_text())
    merged = f"wise_ft_alpha={record['chosen_alpha']:.2f}.pt"
    assert sorted(os.listdir(tmp_path)) == sorted([merged, "flyp.json", "wiseft.json", "frontier.png"])
    assert PIL.Image.open(tmp_path / "frontier.png").size == (900, 675)
    table = capsys.readouterr().out.strip().split("\n")
    assert len(table) == 4 and re.split(" {2,}", table[0]) == [
        "alpha", "val top1", "ood top1", "mean OOD top1", "val ece", "mean OOD ece"
    ]  # fmt: skip
    last = record["alphas"]["1.00"]
    order = [("val", "top1"), ("ood", "top1"), ("ood", "top1"), ("val", "ece"), ("ood", "ece")]
    assert table[-1].replace("*", "").split()[1:] == [
        f"{100 * last[name][metric]:.2f}" for name, metric in order
    ]
    assert [line.split()[0] for line in table if "*" in line] == [f"{record['chosen_alpha']:.2f}"]
    assert (
        len(record["inputs"]["pretrained"]["sha256"]) == 64
        and record["versions"]["torch"] == torch.__version__
    )
    command = next(record.message for record in caplog.records if record.message.startswith("Next: flyp "))
    monkeypatch.chdir(tmp_path)
    flyp(*shlex.split(command)[2:])
    assert json.loads((tmp_path / "classifier/config.json").read_text())["label_names"] == NAMES


def test_merged_loose_weights_keep_the_flags_they_were_read_with(tmp_path):
    flags = ["--force-quick-gelu", "--image-mean", 0.5, 0.5, 0.5, "--image-resize-mode", "squash"]
    flyp(*argv(tmp_path / "merged", "--alpha", 0.5, *flags))
    flyp(
        "export",
        tmp_path / "merged",
        "--data",
        f"{root()}/data",
        "--format",
        "timm",
        "--out",
        tmp_path / "timm",
    )
    config = json.loads((tmp_path / "timm/config.json").read_text())
    assert config["model_args"]["act_layer"] == "quick_gelu"
    assert (config["pretrained_cfg"]["mean"], config["pretrained_cfg"]["crop_mode"]) == (
        [0.5, 0.5, 0.5],
        "squash",
    )


def test_frontier_of_one_set_and_of_many(tmp_path):
    for others in ((), ("a",), ("a", "b", "c")):
        results = {alpha: {name: {"top1": alpha / 2 + i / 10} for i, name in enumerate(("id", *others))}
                   for alpha in (0.0, 0.5, 1.0)}  # fmt: skip
        for per_set in (False, True):
            draw_frontier(results, 0.5, tmp_path / "f.png", per_set)
            assert np.array(PIL.Image.open(tmp_path / "f.png").convert("L")).std() > 5


def test_mistakes_are_one_sentence_and_nothing_is_written(tmp_path, monkeypatch):
    out = tmp_path / "out"
    wide = checkpoint("tiny-digits-wide", 1)
    cases = [
        (["--alpha", "1.5"], naming("alpha", "1.5")),
        (["--alphas", "0:1:0.1"], naming("--eval-data", "--alpha")),
        ([*sets(), "--eval-data", f"val={root()}/ood"], naming("--eval-data", "'val'", f"{root()}/ood")),
        (["--alpha", "0.5", "--finetuned", wide], r"(?=.*visual\.\w)(?=.*[(\[]80\b)(?=.*[(\[]64\b)"),
        (["--alpha", "0.5", "--model-config", "no.json"], naming("no.json", "--model-config")),
        (["--alpha", "0.5", "--model", "tiny-digit"], naming("tiny-digit", "tiny-digits")),
        ([*sets(), "--label-key", "nothing"], "--label-key"),
    ]
    for more, message in cases:
        with pytest.raises(InputError, match=message) as error:
            flyp(*argv(out, *more))
        assert "\n" not in str(error.value) and not out.exists()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match=r"pip install 'flyp-plugin\[plot\]'"):
        flyp(*argv(out, *sets()))
    assert not out.exists()


def test_an_output_is_kept_without_force_and_on_a_full_disk(tmp_path):
    path = tmp_path / "wise_ft_alpha=0.50.pt"
    path.write_text("the old one")
    with pytest.raises(InputError, match="--force"):
        flyp(*argv(tmp_path, "--alpha", 0.5))
    with no_larger_files(1_000_000), pytest.raises(InputError, match=naming(path, "File too large")):
        flyp(*argv(tmp_path, "--alpha", 0.5, "--force"))
    assert path.read_text() == "the old one" and os.listdir(tmp_path) == [path.name]
    flyp(*argv(tmp_path, "--alpha", 0.5, "--force"))
    assert torch.load(path, weights_only=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=naming(tmp_path / "file", "--out")):
        flyp(*argv(tmp_path / "file", "--alpha", 0.5))
