import json
import os
import re
import shlex
import sys
from itertools import combinations

import numpy as np
import open_clip
import PIL.Image
import pytest
import torch

from flyp_plugin.commands.wiseft import draw_frontier, parse_alphas
from flyp_plugin.errors import InputError
from flyp_plugin.train import train
from flyp_plugin.wiseft import average, choose_alpha, interpolate, model_stock, stock_ratios
from tests.helpers_eval import NAMES, checkpoint, flyp, no_larger_files, root
from tests.naming import naming, says

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


def stock(pretrained, finetuned):
    """Model Stock in numpy: by tensor, the mean cosine of all pairs, its ratio, and the merged tensor."""
    merged, ratios = {}, {}
    for key, start in pretrained.items():
        start, ends = start.double().numpy(), [state[key].double().numpy() for state in finetuned]
        moves = [(end - start).ravel() for end in ends]
        pairs = [(a @ b, np.linalg.norm(a) * np.linalg.norm(b)) for a, b in combinations(moves, 2)]
        cosine = max(np.mean([product / max(norms, 1e-300) for product, norms in pairs]), 0)
        ratios[key] = len(ends) * cosine / (1 + (len(ends) - 1) * cosine)
        merged[key] = ratios[key] * np.mean(ends, axis=0) + (1 - ratios[key]) * start
    return merged, ratios


def assert_stock(merged, pretrained, finetuned):
    """Equal to the formula up to the rounding of float32; other tensors are the last run's."""
    floats = {key: tensor for key, tensor in pretrained.items() if tensor.is_floating_point()}
    expected, _ = stock(floats, finetuned)
    for key, tensor in merged.items():
        exact = torch.from_numpy(np.asarray(expected.get(key, finetuned[-1][key])))
        assert tensor.shape == exact.shape
        assert (tensor - exact).abs().max() <= 2**-22 * max(exact.abs().max(), 1e-30)


def seeds(number, dtype=torch.float32):
    """Weights, and runs from there that agree in part: a random part of their own beside a common one."""
    start, common = weights(0), weights(1)
    runs = []
    for i in range(number):
        own = weights(2 + i)
        runs += [
            {key: (start[key] + 0.1 * (common[key] + own[key])).to(dtype) for key in ("a.weight", "a.bias")}
        ]
        runs[-1]["seen"] = torch.tensor(i)
    return start, runs


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize("number", [2, 3, 5])
def test_model_stock_is_the_formula_for_each_tensor(number, dtype):
    start, runs = seeds(number, dtype)
    merged, ratios = model_stock(start, runs), stock_ratios(start, runs)
    assert_stock(merged, start, runs)
    assert merged["a.bias"].dtype == torch.promote_types(dtype, torch.float32)
    assert merged["seen"] == number - 1 and merged["seen"].dtype == torch.int64
    assert ratios == pytest.approx(stock({key: start[key] for key in ratios}, runs)[1], abs=1e-12)
    assert list(ratios) == ["a.weight", "a.bias"] and 0 < ratios["a.weight"] != ratios["a.bias"] < 1
    assert torch.equal(start["a.bias"], weights(0)["a.bias"]) and torch.equal(
        runs[0]["a.bias"], seeds(number, dtype)[1][0]["a.bias"]
    )


def test_model_stock_is_the_point_nearest_to_the_centre():
    """The paper's geometry: runs at one distance from their centre, in directions orthogonal to each other."""
    start, centre = torch.zeros(8), 3 * torch.eye(8)[0]
    runs = [{"w": centre + 2 * torch.eye(8)[i]} for i in (1, 2, 3)]
    merged, mean = model_stock({"w": start}, runs)["w"], average(runs)["w"]
    nearest = min(
        np.linspace(0, 1, 10001), key=lambda t: (centre - (t * mean + (1 - t) * start)).norm().item()
    )
    assert stock_ratios({"w": start}, runs)["w"] == pytest.approx(27 / 31) == pytest.approx(nearest, abs=1e-4)
    assert (merged - centre) @ (mean - start) == pytest.approx(0, abs=1e-5)


def test_model_stock_where_runs_agree_differ_or_did_not_train():
    start = {key: torch.ones(2) for key in ("same", "across", "against", "frozen", "one")} | {
        "scale": torch.tensor(4.0)
    }
    moves = {"same": ([1, 2], [2, 4]), "across": ([1, 0], [0, 1]), "against": ([1, 2], [-1.1, -2]),
             "frozen": ([0, 0], [0, 0]), "one": ([1, 1], [0, 0]), "scale": (0.5, 0.25)}  # fmt: skip
    runs = [{key: start[key] + torch.tensor(moves[key][i]) for key in start} for i in (0, 1)]
    merged, ratios = model_stock(start, runs), stock_ratios(start, runs)
    assert ratios == pytest.approx({"same": 1, "across": 0, "against": 0, "one": 0, "scale": 1}, abs=1e-12)
    assert merged["same"].tolist() == pytest.approx([2.5, 4]) and merged["scale"] == pytest.approx(4.375)
    assert all(torch.equal(merged[key], start[key]) for key in ("across", "against", "frozen", "one"))


def test_model_stock_needs_two_runs_of_one_architecture():
    start, (run, other) = seeds(2)
    for few in ([], [run]):
        with pytest.raises(InputError, match=naming("two")):
            model_stock(start, few)
    with pytest.raises(InputError, match=naming("2 of 2", "a.bias")):
        model_stock(start, [run, other | {"a.bias": torch.ones(5)}])


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


@pytest.fixture(scope="module")
def trained(digits, tmp_path_factory):
    """A run of 20 steps by its seed, start and objective, made when it is asked for; not to be changed."""
    logs = tmp_path_factory.mktemp("logs")

    def trained(seed, steps=PRETRAINED, objective="flyp"):
        name = f"{objective}-{seed}-{steps}"
        flags = ["--model", MODEL, "--pretrained", checkpoint(MODEL, steps), "--seed", seed, "--name", name,
                 "--train-data", digits, "--eval-data", f"val={root()}/data", "--eval-data", f"ood={root()}/ood",
                 "--eval-frequency", 0, "--objective", objective, "--logs", logs, "--epochs", 1, "--workers", 0,
                 "--batch-size", 50, "--train-num-samples", 1000, "--warmup", 5, "--lr", 1e-3, "--device", "cpu"]  # fmt: skip
        if not (logs / name).exists():
            assert train([str(word) for word in flags]) == 0
        return logs / name

    return trained


def last(run):
    return torch.load(run / "checkpoints/epoch_1.pt", weights_only=True)["state_dict"]


def test_model_stock_of_runs_is_scored_read_and_exported(trained, tmp_path, capsys, caplog, monkeypatch):
    caplog.set_level("INFO")
    runs, out = [trained(seed) for seed in (0, 1, 2)], tmp_path / "stock"
    flyp("wiseft", "--model-stock", *runs, "--out", out, *LOADING)
    table = capsys.readouterr().out.strip().split("\n")
    assert len(table) == 2 and table[1].startswith("Model Stock ") and "mean OOD ece" in table[0]
    assert sorted(os.listdir(out)) == ["flyp.json", "model_stock.pt", "wiseft.json"]
    merged, said = (
        torch.load(out / "model_stock.pt", weights_only=True),
        json.loads((out / "wiseft.json").read_text()),
    )
    assert_stock(merged, state(PRETRAINED), [last(run) for run in runs])
    assert said["weights"] == "model_stock.pt" and len(said["inputs"]["finetuned"]) == 3
    assert said["t"] == pytest.approx(stock_ratios(state(PRETRAINED), [last(run) for run in runs]), abs=1e-6)
    assert 0.1 < said["t"]["visual.conv1.weight"] < 0.99
    mean = sum(said["t"].values()) / len(said["t"])
    assert says(caplog.text, "Model Stock", f"{mean:.2f}", f"{len(said['t'])} tensors")
    flyp("eval", out, *LOADING, "--json")
    assert read(capsys)["results"] == said["sets"]
    command = next(record.message for record in caplog.records if record.message.startswith("Next: flyp "))
    monkeypatch.chdir(tmp_path)
    flyp(*shlex.split(command)[2:])
    assert json.loads((tmp_path / "classifier/config.json").read_text())["label_names"] == NAMES
    with pytest.raises(InputError, match=naming("model_stock.pt", "--force")):
        flyp("wiseft", "--model-stock", *runs, "--out", out)
    with pytest.raises(InputError, match=naming(out, "no checkpoint of a run")):
        flyp("wiseft", "--model-stock", runs[0], out, "--out", tmp_path / "again")
    flyp("wiseft", "--average", *runs, "--alpha", 1, "--out", out, *LOADING, "--force")
    assert says(caplog.text, out, "earlier", "model_stock.pt")


def test_model_stock_of_loose_files_needs_no_data(tmp_path):
    ends = [checkpoint(MODEL, steps) for steps in (PRETRAINED, FINETUNED, 40)]
    flyp("wiseft", "--model", MODEL, "--pretrained", ends[0], "--model-stock", *ends[1:], "--out", tmp_path)
    merged = torch.load(tmp_path / "model_stock.pt", weights_only=True)
    assert_stock(merged, state(PRETRAINED), [state(FINETUNED), state(40)])
    assert json.loads((tmp_path / "wiseft.json").read_text())["sets"] == {}


def test_model_stock_of_heads_starts_at_the_zero_shot_head(trained, tmp_path):
    runs = [trained(seed, objective="ce") for seed in (0, 1)]
    flyp("wiseft", "--model-stock", *runs, "--out", tmp_path, *LOADING)
    merged = torch.load(tmp_path / "model_stock.pt", weights_only=True)["class_head.weight"]
    said = json.loads((tmp_path / "wiseft.json").read_text())
    mean = average([last(run) for run in runs])["class_head.weight"]
    t = said["t"]["class_head.weight"]
    start = (merged - t * mean) / (1 - t)
    scale = state(PRETRAINED)["logit_scale"].exp()
    assert 0 < t < 1 and start.norm(dim=1).tolist() == pytest.approx([scale.item()] * 10, rel=1e-3)


def test_what_model_stock_cannot_merge_is_one_sentence(trained, tmp_path):
    run, other, out = trained(0), trained(1), tmp_path / "out"
    cases = [
        (["--model-stock", run], naming("--model-stock", "two", "--seed")),
        (["--model-stock", run, tmp_path / "lost.pt"], naming("no run or checkpoint", "lost.pt")),
        (["--model-stock", run, run], naming(run / "checkpoints/epoch_1.pt", "--seed")),
        (["--model-stock", run, other, "--alpha", 0], naming("--model-stock", "--alpha", "--alphas")),
        (
            ["--model-stock", run, other, "--alphas", "0:1:0.1"],
            naming("--model-stock", "--alpha", "--alphas"),
        ),
        ([run, "--model-stock", run, other], naming("RUN", "--model-stock")),
        (
            ["--model-stock", run, trained(1, 40)],
            naming(run, f"{MODEL}-15.pt", trained(1, 40), f"{MODEL}-40.pt"),
        ),
        (["--average", run, trained(1, 40), "--alpha", 1], naming(run, trained(1, 40))),
        (["--model-stock", run, trained(0, objective="ce")], naming("--seed", "--average")),
        (["--average", run, trained(0, objective="ce"), "--alpha", 1], naming("no such head")),
        (["--model-stock", run, checkpoint("tiny-digits-wide", 1)], naming("2 of 2", "pretrained")),
    ]
    for more, message in cases:
        with pytest.raises(InputError, match=message) as error:
            flyp("wiseft", *more, "--out", out, *LOADING)
        assert "\n" not in str(error.value) and not out.exists()
    with pytest.raises(InputError, match=naming("--out")):
        flyp("wiseft", "--model-stock", run, other)
    with pytest.raises(InputError, match=naming(other, "checkpoints", "--out")):
        flyp("wiseft", run, "--alpha", 0.5, "--out", other, "--force")
