import csv
import json
import re
import sys
from itertools import pairwise

import numpy as np
import open_clip
import pytest
import torch
from sklearn import metrics as sk

from flyp_plugin.data import LabelledDataset
from flyp_plugin.errors import InputError
from flyp_plugin.evalsets import build_for_each, parse_eval_sets
from flyp_plugin.heads import ImageClassifier
from flyp_plugin.metrics import Tally, evaluate, score, table
from flyp_plugin.prompts import ClassPrompts
from tests.close import assert_same_figures
from tests.helpers_eval import NAMES, TEMPLATES, checkpoint, flyp, no_larger_files, root, write_set
from tests.naming import naming, says

MODEL = "tiny-digits"


def guesses(n=500, classes=9, seed=0):
    """Logits and labels of which some classes never occur and some are never predicted."""
    rng = np.random.default_rng(seed)
    labels = rng.choice([0, 1, 2, 4, 5, 8], n, p=[0.4, 0.2, 0.2, 0.1, 0.09, 0.01])
    logits = rng.normal(size=(n, classes)) + 1.5 * np.eye(classes)[labels]
    logits[:, 4] -= 20
    groups = rng.choice(["north", "south", "east", "élan"], n, p=[0.5, 0.3, 0.15, 0.05])
    return torch.tensor(logits), torch.tensor(labels), groups.tolist()


def tallied(logits, labels, groups=None, batch=64):
    tally = Tally(logits.shape[1])
    for i in range(0, len(labels), batch):
        part = slice(i, i + batch)
        tally.update(logits[part], labels[part], groups and groups[part])
    return tally


@pytest.mark.parametrize("seed", range(3))
def test_equal_to_scikit_learn(seed):
    logits, labels, _ = guesses(seed=seed)
    ours, prediction, occur = tallied(logits, labels).metrics(), logits.argmax(1), np.unique(labels)
    assert ours["n"] == 500
    assert ours["top1"] == sk.accuracy_score(labels, prediction)
    assert ours["top5"] == pytest.approx(
        sk.top_k_accuracy_score(labels, logits, k=5, labels=range(9)), abs=1e-12
    )
    assert ours["mean_per_class_recall"] == pytest.approx(
        sk.balanced_accuracy_score(labels, prediction), abs=1e-12
    )
    assert ours["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-6)
    f1 = sk.f1_score(labels, prediction, labels=occur, average="macro")
    assert ours["macro_f1"] == pytest.approx(f1, abs=1e-12)


def test_top5_only_where_there_are_more_than_five_classes():
    logits = torch.eye(5)
    assert set(tallied(logits, torch.arange(5)).metrics()) == {
        "n",
        "top1",
        "loss",
        "mean_per_class_recall",
        "macro_f1",
        "ece",
    }


def calibration_error(probabilities, labels):
    """Guo et al. 2017, section 2, in numpy: 15 bins (lo, hi] of the top probability."""
    top, correct = probabilities.max(1), probabilities.argmax(1) == labels
    edges = np.arange(16, dtype=top.dtype) / 15
    error = 0.0
    for low, high in pairwise(edges):
        inside = (top > low) & (top <= high)
        if inside.any():
            error += inside.mean() * abs(correct[inside].mean() - top[inside].mean(dtype=float))
    return error


@pytest.mark.parametrize("classes", [2, 9, 300])
def test_ece_is_the_calibration_error_of_fifteen_bins(classes):
    rng = np.random.default_rng(classes)
    labels = rng.integers(classes, size=2000)
    spread = rng.choice([0.1, 1, 3, 30], (2000, 1))  # images of every confidence
    logits = ((rng.normal(size=(2000, classes)) + 2 * np.eye(classes)[labels]) * spread).astype("float32")
    probabilities = torch.tensor(logits).softmax(1).numpy()
    assert len(set((15 * probabilities.max(1)).astype(int))) >= 8 and (probabilities == 1).any()
    ours = tallied(torch.tensor(logits), torch.tensor(labels)).metrics()["ece"]
    assert ours == pytest.approx(calibration_error(probabilities, labels), abs=1e-12) and ours > 0.01


@pytest.mark.parametrize("classes", [3, 5, 15])
def test_ece_of_a_probability_on_an_edge_is_in_the_bin_below(classes):
    logits = torch.zeros(4, classes)  # 1/3, 1/5, 1/15: the fifth, third and first of the edges
    tally = tallied(logits, torch.tensor([0, 1, 1, 1]))
    assert tally.overconfidence.nonzero().tolist() == [[15 // classes - 1]]
    assert tally.metrics()["ece"] == pytest.approx(abs(1 / 4 - 1 / classes), abs=1e-7)
    inside = torch.tensor([[1.0, 0], [1.5, 0]])  # 0.73 and 0.82: no others in their bins
    expected = ((1 - inside[0].softmax(0)[0]) + inside[1].softmax(0)[0]) / 2
    assert tallied(inside, torch.tensor([0, 1])).metrics()["ece"] == pytest.approx(expected.item(), abs=1e-7)


def test_ece_of_certain_answers_is_the_share_of_wrong_ones():
    certain = 1000 * torch.eye(4)
    assert tallied(certain, torch.tensor([0, 1, 2, 3])).metrics()["ece"] == 0
    assert tallied(certain.half(), torch.tensor([0, 1, 2, 0])).metrics()["ece"] == 0.25


def test_groups_as_wilds_defines_them():
    """WILDS, Metric.compute_group_wise: mean over each group; the worst over groups with counts > 0."""
    logits, labels, groups = guesses()
    correct = (logits.argmax(1) == labels).numpy()
    index = {name: i for i, name in enumerate(["never", *dict.fromkeys(groups)])}
    g = np.array([index[name] for name in groups])
    counts = np.bincount(g, minlength=len(index))
    means = np.bincount(g, weights=correct, minlength=len(index)) / np.maximum(counts, 1)
    ours = tallied(logits, labels, groups).metrics()
    assert ours["worst_group_top1"] == pytest.approx(means[counts > 0].min(), abs=1e-12)
    assert index[ours["worst_group"]] == np.flatnonzero(counts > 0)[means[counts > 0].argmin()]


def test_images_without_a_group_are_in_none(caplog):
    logits, labels, groups = guesses()
    named = [i for i, group in enumerate(groups) if group != "north"]
    some = tallied(logits, labels, [group.replace("north", "") for group in groups]).metrics()
    expected = tallied(logits[named], labels[named], [groups[i] for i in named]).metrics()
    assert some["worst_group_top1"] == expected["worst_group_top1"] and not caplog.text
    assert "worst_group" not in tallied(logits, labels, [""] * 500).metrics() and "--group-key" in caplog.text


def test_merged_tallies_equal_one_pass():
    logits, labels, groups = guesses()
    merged = Tally(9)
    for rank in range(3):
        merged.merge(tallied(logits[rank::3], labels[rank::3], groups[rank::3]))
    alone = tallied(logits, labels, groups).metrics()
    assert merged.metrics() == {
        **alone,
        "loss": pytest.approx(alone["loss"], rel=1e-12),
        "ece": pytest.approx(alone["ece"], rel=1e-12),
    }  # sums in another order


def test_a_label_that_is_no_class_and_a_set_without_images():
    with pytest.raises(InputError, match=naming("label 9", "8")):
        tallied(torch.zeros(2, 9), torch.tensor([0, 9]))
    with pytest.raises(InputError, match=naming("label -1", "8")):
        tallied(torch.zeros(1, 9), torch.tensor([-1]))
    with pytest.raises(InputError, match=naming("--image-key")):
        evaluate(torch.nn.Identity(), [])


def test_evaluate_takes_tuples_and_dicts_and_leaves_the_mode():
    logits, labels, _ = guesses(80)
    classifier = torch.nn.Sequential(torch.nn.Identity(), torch.nn.Dropout(0.9))
    tuples = [(logits[:50], labels[:50]), (logits[50:], labels[50:])]
    dicts = [{"images": images, "labels": target} for images, target in tuples]
    expected = tallied(logits, labels).metrics()
    assert evaluate(classifier, tuples) == evaluate(classifier, dicts) == expected
    assert classifier.training and classifier[1].training


def test_table_aligns_and_shows_percentages():
    rows = {"val": {"n": 12, "top1": 0.5, "loss": 0.25}, "sketch": {"n": 3, "top1": 1.0, "worst_group": "a"}}
    assert table(rows, "set").split("\n") == [
        "set      n    top1    loss  worst_group",
        "val     12   50.00  0.2500",
        "sketch   3  100.00                    a",
    ]


@pytest.fixture(scope="module")
def classifier():
    prompts = ClassPrompts(NAMES, TEMPLATES)
    root()
    return ImageClassifier.from_checkpoint(MODEL, checkpoint(MODEL, 80), prompts)


def loader(classifier, **kwargs):
    shards = [str(root() / f"data/test/{i}.tar") for i in range(2)]
    return LabelledDataset(
        shards, classifier.preprocess, kwargs.pop("batch_size", 32), num_classes=10, **kwargs
    )


def test_equal_to_clip_benchmark_to_the_last_image(classifier, monkeypatch):
    from clip_benchmark.datasets.builder import build_wds_dataset
    from clip_benchmark.metrics import zeroshot_classification

    def accuracy(output, target, topk):  # theirs, but for float() of an array, which numpy 2.4 refuses
        correct = output.topk(max(topk), 1, True, True)[1].t().eq(target.view(1, -1))
        return [correct[:k].reshape(-1).float().sum().item() / len(target) for k in topk]

    monkeypatch.setattr(zeroshot_classification, "accuracy", accuracy)
    dataset = build_wds_dataset("digits", classifier.preprocess, data_dir=str(root() / "data"))
    batches = torch.utils.data.DataLoader(dataset.batched(32), batch_size=None)
    batches.dataset.classes = dataset.classes
    theirs = zeroshot_classification.evaluate(
        classifier.model,
        batches,
        open_clip.get_tokenizer(MODEL),
        dataset.classes,
        dataset.templates,
        "cpu",
        amp=False,
    )
    ours = evaluate(classifier, loader(classifier))
    assert 0.2 < ours["top1"] < 0.95
    theirs = {"n": 203, "top1": theirs["acc1"], "top5": theirs["acc5"], **theirs}
    names = ("n", "top1", "top5", "mean_per_class_recall")
    assert_same_figures({name: ours[name] for name in names}, {name: theirs[name] for name in names})
    assert evaluate(classifier, batches) == {**ours, "n": 203}  # their loader, of tuples


def test_two_ranks_and_two_workers_count_as_one(classifier):
    alone = evaluate(classifier, loader(classifier, group_key="hand"))
    merged = Tally(10)
    for rank in range(2):
        part = loader(classifier, group_key="hand", rank=rank, world_size=2, num_workers=2, batch_size=30)
        merged.merge(score(classifier, part, Tally(10)))
    assert_same_figures(merged.metrics(), alone)  # in batches of another size
    assert alone["n"] == 203 and "worst_group" in alone


def test_flyp_eval_writes_table_json_and_predictions(tmp_path, capsys):
    file = tmp_path / "predictions.csv"
    flags = ["--batch-size", 32, "--workers", 0, "--group-key", "hand"]
    sets = ["--eval-data", f"val={root()}/data", "--eval-data", f"ood={root()}/ood/test/{{0..1}}.tar"]
    argv = ["eval", checkpoint(MODEL, 80), "--model", MODEL, *flags, *sets]
    flyp(*argv, "--json", "--predictions", file)
    results = json.loads(capsys.readouterr().out)["results"]
    rows = list(csv.DictReader(file.open(encoding="utf-8")))
    assert {name: r["n"] for name, r in results.items()} == {"val": 203, "ood": 97}
    for name, classes in (("val", NAMES), ("ood", NAMES[1::2])):
        mine = [row for row in rows if row["set"] == name]
        assert len({row["key"] for row in mine}) == results[name]["n"]
        right = [row["label"] == row["prediction"] for row in mine]
        assert np.mean(right) == pytest.approx(results[name]["top1"])
        by_group = {
            g: np.mean([r for r, row in zip(right, mine) if row["group"] == g]) for g in ("left", "right")
        }
        assert results[name]["worst_group_top1"] <= min(by_group.values())
        assert all(classes[int(row["prediction"])] == row["prediction_name"] for row in mine)
        assert all(row["path"] == f"{row['label_name']}/{int(row['key'])}.png" for row in mine)
        assert all(1 / len(classes) <= float(row["probability"]) <= 1 for row in mine)
    flyp(*argv)
    assert capsys.readouterr().out.split("\n")[1].split()[:2] == ["val", "203"]
    with pytest.raises(InputError, match=naming(file, "--force")):
        flyp(*argv, "--predictions", file)


def predictions(path):
    flyp("eval", checkpoint(MODEL, 80), "--model", MODEL, "--workers", 0, "--predictions", path,
         "--eval-data", f"val={root()}/data")  # fmt: skip


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        torch.cuda.OutOfMemoryError("CUDA out of memory."),
        OSError(28, "No space left on device", "/dev/shm/torch_1"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_with_predictions_a_fault_of_the_model_is_no_full_disk(error, tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise error

    monkeypatch.setattr(open_clip.model.VisionTransformer, "forward", broken)
    with pytest.raises(type(error)) as raised:
        predictions(tmp_path / "it.csv")
    assert raised.value is error and not list(tmp_path.iterdir())


def test_predictions_on_a_full_disk_are_a_sentence(tmp_path):
    for room in (0, 5000):  # not even the header; some batches
        too_large = pytest.raises(InputError, match=naming("it.csv", "File too large"))
        with no_larger_files(room), too_large:
            predictions(tmp_path / "it.csv")
        assert not list(tmp_path.iterdir())


def test_a_set_is_scored_over_its_own_classes():
    sets = parse_eval_sets([f"val={root()}/data", f"ood={root()}/ood/test::{root()}/ood/test/0.tar"])
    assert [len(s.prompts.classnames) for s in sets] == [10, 5]
    assert [len(s.shards) for s in sets] == [2, 3]


def test_class_names_and_templates_given_or_missing(tmp_path, caplog):
    caplog.set_level("INFO")
    write_set(tmp_path / "bare", *([], [], []), shards=1)
    for name in ("classnames.txt", "zeroshot_classification_templates.txt"):
        (tmp_path / "bare" / name).unlink()
    spec = f"bare={tmp_path}/bare"
    with pytest.raises(InputError, match="--classnames"):
        parse_eval_sets([spec])
    (only,) = parse_eval_sets([spec], classnames=f"{root()}/data/classnames.txt")
    assert only.prompts(1, 0) == "a photo of a one." and says(caplog.text, "templates", "a photo of a {c}.")
    (only,) = parse_eval_sets([spec], f"{root()}/data/classnames.txt", "just {c}")
    assert only.prompts(1, 0) == "just one"


@pytest.mark.parametrize(
    ("specs", "named"),
    [
        (["data"], ["--eval-data", "'data'", "NAME=SHARDS"]),
        (["a/b=data"], ["'a/b=data'", "NAME=SHARDS"]),
        (["=data"], ["'=data'", "NAME=SHARDS"]),
        (["val="], ["'val='", "NAME=SHARDS"]),
        (["val={root}/data", "val={root}/ood"], ["--eval-data", "'val'", "/data", "/ood"]),
        (["val={root}/nowhere"], ["/nowhere"]),
    ],
)
def test_eval_data_mistakes_are_one_sentence(specs, named):
    with pytest.raises(InputError, match=naming(*named)) as error:
        parse_eval_sets([spec.format(root=root()) for spec in specs])
    assert "\n" not in str(error.value)


def test_labels_of_other_classes_are_one_sentence(tmp_path):
    few = tmp_path / "few.txt"
    few.write_text("zero\none\n")
    argv = ["eval", checkpoint(MODEL, 80), "--model", MODEL, "--eval-data", f"val={root()}/data"]
    with pytest.raises(InputError, match=r"label \d\b.*\b1\b.*--classnames"):
        flyp(*argv, "--classnames", few, "--workers", 0, "--predictions", tmp_path / "p.csv")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["few.txt"]


@pytest.mark.parametrize("command", ["eval", "wiseft", "export"])
def test_help_opens_with_an_example(command, capsys):
    with pytest.raises(SystemExit):
        flyp(command, "--help")
    assert re.search(rf"(?i)example.*\n+ +flyp {command} ", capsys.readouterr().out)
    assert "flyp_plugin.metrics" in sys.modules  # here; test_cli looks at what a fresh process imports


def test_equal_prompts_are_tokenised_and_encoded_once():
    texts, built = [], []
    sets = parse_eval_sets([f"a={root()}/data", f"b={root()}/data", f"c={root()}/ood"])
    model = open_clip.create_model(MODEL, pretrained=str(checkpoint(MODEL, 80)))
    tokenizer = open_clip.get_tokenizer(MODEL)

    def counted(some, **kwargs):
        texts.extend(some)
        return tokenizer(some, **kwargs)

    def build(prompts):
        built.append(prompts)
        return ImageClassifier.from_prompts(model, counted, prompts)

    for _ in range(2):
        classifiers = build_for_each(sets, build)
        assert classifiers["a"] is classifiers["b"] is not classifiers["c"]
    assert built == [sets[0].prompts, sets[2].prompts] * 2
    assert texts.count(sets[0].prompts(0, 0)) == 1
