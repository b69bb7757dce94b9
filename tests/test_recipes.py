"""The recipes for the paper's sets, as tests/bench/README.md and README.md have them, run on these sets made small."""

import json
import os
import re
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import open_clip
import pytest

from flyp_plugin import ClassPrompts, flags
from flyp_plugin.commands import call
from flyp_plugin.sources import read_lines
from tests import recipes
from tests.naming import says
from tests.pages import BENCH, README, REPO, section, steps

PAPER = section(BENCH, "The paper's data sets")
# Stand-ins on the PATH. What bash passes to the plugin is written to a file; this process then runs it.
STAND_INS = {
    "flyp": """printf '%s\\0' "$@" > words""",
    "torchrun": """while [ "$1" != train_flyp.py ]; do shift; done; shift; printf '%s\\0' train "$@" > words""",
    "python": f"""[ "$1" != train_flyp.py ] && exec {sys.executable} "$@"; shift; printf '%s\\0' train "$@" > words""",
    "curl": """[ "$1" = -fL ] && cat "web/${2##*/}" """,
    "hf": """[ "$1 $3 $4 $5" = "download --repo-type dataset --local-dir" ] && mkdir -p data && cp -r "hub/${2##*/}" "$6" """,
}


def paragraph(start: str) -> str:
    """The text from '**start' up to the next paragraph that begins in bold."""
    return re.split(r"\n(?=\*\*)", PAPER.partition(f"**{start}")[2])[0]


@pytest.fixture
def recipe(tmp_path, monkeypatch, digits, start) -> Callable[..., None]:
    """Run the commands of a text in tmp_path, as they stand but for what makes a training small, and `more` flags of it."""
    monkeypatch.chdir(tmp_path)
    for name, script in STAND_INS.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/bash\n{script}\n")
        path.chmod(0o755)
    env = {
        **os.environ,
        "PATH": f"{tmp_path}/bin:{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join([str(REPO), *sys.path]),
        "LC_ALL": "C",
    }
    small = [
        "--model",
        "digits-vit",
        "--pretrained",
        str(start),
        "--model-config",
        f"{digits}/digits-vit.json",
    ]
    small += ["--epochs", "1", "--batch-size", "64", "--device", "cpu", "--workers", "0"]

    def run(text: str, *more: str) -> None:
        for step in steps(text):
            subprocess.run(["bash", "-o", "pipefail", "-ec", step], env=env, check=True)
            words = Path("words")
            if words.exists():
                argv = re.sub(
                    r"https://huggingface.co/datasets/clip-benchmark/(\w[\w-]*)/tree/main",
                    r"hub/\1",
                    words.read_text(),
                ).split("\0")[:-1]
                words.unlink()
                assert call([*argv, *([*small, *more] if argv[0] in ("train", "compare") else [])]) in (
                    0,
                    None,
                )

    return run


def written(folder: str) -> Iterator[tuple[bytes, int, str]]:
    """(image, class index, group) of each sample of a split folder."""
    for shard in Path(folder).glob("*.tar"):
        samples: dict[str, dict[str, bytes]] = {}
        with tarfile.open(shard) as tar:
            for member in tar:
                key, _, name = member.name.partition(".")
                samples.setdefault(key, {})[name] = tar.extractfile(member).read()
        for sample in samples.values():
            (picture,) = (raw for name, raw in sample.items() if name not in ("cls", "group", "path"))
            yield picture, int(sample["cls"]), sample.get("group", b"").decode()


def results(run: str = "*") -> dict:
    (path,) = Path("logs").glob(f"{run}/checkpoints/results.jsonl")
    return json.loads(path.read_text().splitlines()[-1])


def test_every_command_of_the_recipes_is_in_a_test():
    names = ["ImageNet", "iWildCam", "FMoW", "Caltech101", "Cars", "Few shots"]
    assert list(steps(PAPER)) == [step for name in names for step in steps(paragraph(name))]


def test_templates_by_name_are_the_papers():
    ours = json.loads((REPO / "flyp_plugin/templates.json").read_text())
    numbers = {"fmow": 16, "iwildcam": 2, "caltech101": 34, "cars": 8, "flowers": 1, "pcam": 1, "sst2": 1}
    assert {name: len(ClassPrompts.from_files(["x"], name).templates) for name in ours} == numbers
    for name, theirs in (("caltech101",) * 2, ("cars",) * 2, ("flowers",) * 2, ("sst2", "renderedsst2")):
        assert ours[name] == recipes.BENCHMARK_TEMPLATES[theirs]
    assert set(ours) <= set(re.findall(r"\w+", flags.parser().format_help()))


def test_imagenet(recipe, tmp_path, caplog):
    recipes.imagenet(tmp_path)
    recipes.shifts(tmp_path)
    text = paragraph("ImageNet")
    writing, _, training = text.partition("    torchrun")
    recipe(writing)
    assert Path("data/imagenet/classnames.txt").read_text() == "\n".join(open_clip.IMAGENET_CLASSNAMES) + "\n"
    held_out = list(written("data/imagenet/val"))
    assert 15 <= len(held_out) <= 25
    for picture, label, _ in written("data/imagenet/test"):
        wnid = recipes.WNIDS[label]
        assert picture == next(Path(f"imagenet/val/{wnid}").iterdir()).read_bytes()
    assert Counter(label for _, label, _ in [*written("data/imagenet/train"), *held_out]) == dict.fromkeys(
        range(1000), 2
    )
    templates = Path("data/imagenet/zeroshot_classification_templates.txt")
    assert len(read_lines(str(templates))) == 80
    templates.write_text("a photo of a {c}.\n")  # 80 would take minutes
    recipe(f"    torchrun{training}")
    sizes = {name: results()[f"{name}/n"] for name in ("val", "id", "v2", "r", "a", "sketch", "objectnet")}
    assert sizes == {
        "val": len(held_out),
        "id": 1000,
        "v2": 1000,
        "r": 200,
        "a": 200,
        "sketch": 1000,
        "objectnet": 113,
    }
    assert says(caplog.text, "data/imagenet/classnames.txt", "missile")  # there twice


@pytest.mark.parametrize("names", ["english", "latin"])
def test_iwildcam(recipe, tmp_path, names):
    made, text = recipes.iwildcam(tmp_path), paragraph("iWildCam")
    if names == "latin":
        instead = re.search(r"and write `(.*?)` in the next", text)[1]
        text = re.sub("(?m)^    curl.*\n", "", text).replace("python - labels.csv english", instead)
        text = text.partition("    python train_flyp.py")[0]
    recipe(text)
    lines = read_lines("data/iwildcam/classnames.txt")
    assert len(lines) == 182
    assert (lines[1], lines[7]) == {
        "english": ("Common Species1", "Brocket, red"), "latin": ("genus species1", "genus species7")
    }[names]  # fmt: skip
    twice = recipes.TWICE if names == "english" else {181: 153}
    assert all(lines[y].lower() == lines[other].lower() for y, other in twice.items())
    assert len({line.lower() for line in lines}) == 182 - len(twice)
    labels = {Path("iwildcam_v2.0/train", name).read_bytes(): where for name, where in made.items()}
    for folder in ("train", "id_val", "id_test", "test"):
        samples = list(written(f"data/iwildcam/{folder}"))
        assert {labels[picture] for picture, _, _ in samples} == {(folder, y) for _, y, _ in samples}
        assert len(samples) == (182 if folder == "train" else 6)
    if names == "english":
        assert [results()[f"{name}/n"] for name in ("val", "id", "ood")] == [6, 6, 6]


def test_fmow(recipe, tmp_path):
    made = recipes.fmow(tmp_path)
    recipe(paragraph("FMoW"))
    assert read_lines("data/fmow/classnames.txt") == recipes.FMOW  # the authors' order
    numbers = {
        path.read_bytes(): int(path.stem.split("_")[-1]) for path in Path("fmow_v1.1/images").iterdir()
    }
    for folder in ("train", "id_val", "id_test", "test"):
        samples = {
            numbers[picture]: (folder, recipes.FMOW[y], group)
            for picture, y, group in written(f"data/fmow/{folder}")
        }
        expected = {number: row for number, row in enumerate(made) if row[0] == folder}
        if folder == "train":
            expected = {number: (*row[:2], "") for number, row in expected.items()}
        assert samples == expected and samples
    assert "ood/worst_group_top1" in results()
    prompts = json.loads(Path("data/fmow/prompts.json").read_text())
    assert list(prompts) == recipes.FMOW and {len(texts) for texts in prompts.values()} == {16}
    assert prompts["airport_hangar"][:5] == [
        "satellite photo of a airport_hangar.",
        "aerial photo of a airport_hangar.",
        "satellite photo of an airport hangar.",
        "aerial photo of an airport hangar.",
        "satellite photo of a airport_hangar in asia.",
    ]
    assert prompts["zoo"][2] == prompts["zoo"][0] == "satellite photo of a zoo."
    (run,) = Path("logs").glob("*/flyp.json")
    assert (
        json.loads(run.read_text())["descriptions"] == prompts
    )  # beside the shards, it replaces the templates


def test_caltech101(recipe, tmp_path):
    recipes.caltech101(tmp_path)
    recipe(paragraph("Caltech101"))
    folders, names = recipes.CALTECH[1:], read_lines("data/caltech101/classnames.txt")
    pairs = dict(zip(folders, names))
    assert len(names) == 101
    assert [pairs[folder] for folder in ("Faces", "Faces_easy", "car_side", "yin_yang")] == [
        "off-center face", "centered face", "side of a car", "yin and yang symbol"
    ]  # fmt: skip
    label = {
        p.read_bytes(): folders.index(p.parent.name) for p in Path("101_ObjectCategories").glob("*/*.jpg")
    }
    everything = []
    for folder, number in (("train", 3), ("val", 1), ("test", 1)):
        samples = list(written(f"data/caltech101/{folder}"))
        assert all(label[picture] == y for picture, y, _ in samples)
        assert Counter(y for _, y, _ in samples) == dict.fromkeys(range(101), number)
        everything += [picture for picture, _, _ in samples]
    assert len(set(everything)) == len(everything) == 505
    assert results()["test/n"] == 101


def cars(root: Path) -> None:
    names = [f"Make Model {i} Sedan 2012" for i in range(195)] + ["Ram C/V Cargo Van Minivan 2012"]
    recipes.hub(root, "wds_cars", names, recipes.BENCHMARK_TEMPLATES["cars"], train=5, test=5)


def test_cars_and_flowers_from_the_hub(recipe, tmp_path):
    cars(tmp_path)
    flowers = [listed["flowers"] for listed in (recipes.BENCHMARK_NAMES, recipes.BENCHMARK_TEMPLATES)]
    recipes.hub(tmp_path, "wds_vtab-flowers", *flowers, train=1, test=1)
    _, *sets = re.split(r"(?=    hf )", paragraph("Cars"))
    for number, commands in enumerate(sets):
        recipe(commands, "--name", f"run{number}")
    assert (results("run0")["val/n"], results("run0")["test/n"], results("run1")["test/n"]) == (196, 980, 102)


def test_readmes_own_recipe(recipe, tmp_path):
    cars(tmp_path)
    recipe(section(README, "Recipes"))
    assert results()["test/n"] == 980


def test_few_shots(recipe, tmp_path):
    recipes.sst2(tmp_path)
    pcam = [listed["pcam"] for listed in (recipes.BENCHMARK_NAMES, recipes.BENCHMARK_TEMPLATES)]
    recipes.hub(tmp_path, "wds_vtab-pcam", *pcam, per_class=4, train=3, test=1)
    recipe(paragraph("Few shots"), "--shots", "2", "--seeds", "0:1")
    for name, prompt, counts in (
        ("sst2", "a {c} review of a movie.", {"val": 8, "test": 8}),
        ("pcam", "this is a photo of {c}", {"val": 8, "test": 8}),
    ):
        (record,) = Path(name, "runs").glob("*/flyp.json")
        assert json.loads(record.read_text())["templates"] == [prompt]
        (run,) = Path(name, "runs").glob("*/checkpoints/results.jsonl")
        row = json.loads(run.read_text().splitlines()[-1])
        assert {set_: row[f"{set_}/n"] for set_ in counts} == counts
        assert "flyp + WiSE-FT" in Path(name, "compare.md").read_text()
