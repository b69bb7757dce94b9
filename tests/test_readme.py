"""README.md keeps its word: its flags exist, its commands run on small data, its Python runs."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import open_clip
import pytest
import timm
import torch
from open_clip import pretrained
from PIL import Image
from sklearn.datasets import load_digits

from flyp_plugin import ImageClassifier, evaluate, flags, openclip
from flyp_plugin import commands as cli
from flyp_plugin.data import LabelledDataset
from flyp_plugin.sources import count_samples, expand_source
from tests.digits import NAMES

REPO = Path(__file__).parents[1]
README = (REPO / "README.md").read_text()
NOT_OURS = {"--rdzv-endpoint", "--nnodes", "--repo-type", "--sort"}  # torchrun's, hf's, tar's


def code(section=""):
    """Lines of README's indented blocks, of one section or of all, with continued lines joined."""
    text = README.partition(f"\n## {section}\n")[2].partition("\n## ")[0] if section else README
    lines = re.findall(r"^ {4,}(?=\S)((?:.*\\\n)*.*)$", text, re.MULTILINE)
    return [re.sub(r"\s*\\\n\s*", " ", line) for line in lines]


def commands(section=""):
    """Each command of ours as its words, from 'flyp' or 'train_flyp.py' on."""
    for line in code(section):
        for part in line.split(" && "):
            found = re.search(r"(?:^|[ /])((?:flyp|train_flyp\.py) .*)$", part)
            if found and not part.startswith(("#", "from ", "import ")):
                yield shlex.split(found[1], comments=True)


def known_flags():
    parsers = [flags.parser(), *(cli._parser(name) for name in cli.COMMANDS)]
    known = set()
    while parsers:
        for action in parsers.pop()._actions:
            known |= set(action.option_strings)
            parsers += list((action.choices or {}).values()) if hasattr(action, "add_parser") else []
    return known


def open_clip_flags():
    script = "import sys; from flyp_plugin import openclip; openclip.parse_args(['--help'])"
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(re.findall(r"--[a-z0-9][a-z0-9-]*", shown.stdout))


def test_the_commands_are_found():
    assert len(list(commands())) > 25
    assert sum(words[0] == "train_flyp.py" for words in commands()) > 8


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_every_command_is_understood(words):
    if words[:2] == ["flyp", "train"]:
        words = words[1:]
    if words[0] == "flyp":
        _, rest = cli._parser(words[1]).parse_known_args(words[1:])
        assert not rest or words[1] == "compare"
        openclip.parse_args(flags.parser().parse_known_args(rest)[1])
    elif "--demo" not in words:
        _, rest = flags.parser().parse_known_args(words[1:])
        openclip.parse_args(rest)


def test_every_flag_exists():
    ours, theirs = known_flags(), open_clip_flags()
    prose = re.sub(r"(?m)^ {4}.*$", "", README)  # commands are tested above
    text = re.sub(r"`[^`]*tests[./](bench|registry)[^`]*`", "", prose)  # scripts have flags of their own
    named = set(re.findall(r"`(?:[^`\n]* )?(--[a-z][a-z0-9-]*)", text))
    assert len(named) > 30
    assert named - ours - theirs - NOT_OURS == set()


def test_every_flag_of_training_is_in_the_table():
    table = README.partition("| flag | meaning |")[2].partition("\n\n")[0]
    ours = {f for action in flags.parser()._actions for f in action.option_strings if f.startswith("--")}
    assert {flag for flag in ours - {"--help"} if f"`{flag}" not in table} == set()


@pytest.fixture
def shell(tmp_path):
    """Run a line of README as it stands, `flyp` and `python` being this environment's, in tmp_path."""
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    (bin_folder / "flyp").write_text(f'#!/bin/sh\nexec {sys.executable} -m flyp_plugin "$@"\n')
    (bin_folder / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    for path in bin_folder.iterdir():
        path.chmod(0o755)
    (tmp_path / "train_flyp.py").write_text((REPO / "train_flyp.py").read_text())
    env = {
        **os.environ,
        "PATH": f"{bin_folder}:{os.environ['PATH']}",
        "PYTHONPATH": f"{os.environ.get('PYTHONPATH', '')}:{REPO}",
    }

    def shell(line):
        done = subprocess.run(
            ["bash", "-o", "pipefail", "-c", line],
            cwd=tmp_path,
            env=env,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr

    return shell


def photos(folder, images, labels, names=NAMES):
    for number, (image, label) in enumerate(zip(images, labels)):
        path = folder / names[label] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image * 15.9).astype("uint8")).resize((16, 16)).save(path)


TAGGED = """
# flyp, with a real entry of open_clip's registry whose model is small and whose weights are a file
import json, sys
import open_clip
open_clip.factory._MODEL_CONFIGS[sys.argv.pop(1)] = json.load(open("model.json"))
for place in (open_clip, open_clip.factory):
    place.download_pretrained = lambda *args, **kwargs: "start.pt"
if openai := sys.modules.get("open_clip.openai"):  # which open_clip 2.28 asks for OpenAI's weights
    openai.download_pretrained_from_url = lambda *args, **kwargs: "start.pt"
from flyp_plugin.commands import main
main(sys.argv[1:])
"""


@pytest.mark.parametrize(("name", "tag"), [("ViT-B-16", "openai"), ("ViT-L-14", "laion2b_s32b_b82k")])
def test_an_hour_with_your_own_images(shell, tmp_path, digits, name, tag):
    """The commands as they stand: OpenAI's tag has QuickGELU, the other its own mean and std. One figure everywhere."""
    data = load_digits()
    for split, some in (("train", slice(200)), ("val", slice(200, 260)), ("test", slice(320, 380))):
        photos(tmp_path / "photos" / split, data.images[some], data.target[some])
    photos(tmp_path / "other/photos", 16 - data.images[260:320], data.target[260:320])
    (tmp_path / "tagged.py").write_text(TAGGED)
    config = json.loads((digits / "digits-vit.json").read_text())
    config["vision_cfg"]["head_width"], config["text_cfg"]["heads"] = (
        64,
        1,
    )  # as open_clip 2.28 takes OpenAI's to be
    (tmp_path / "model.json").write_text(json.dumps(config))
    (tmp_path / "bin/flyp").write_text(f'#!/bin/sh\nexec {sys.executable} tagged.py {name} "$@"\n')
    open_clip.add_model_config(tmp_path / "model.json")
    torch.manual_seed(0)
    torch.save(open_clip.create_model("model").state_dict(), tmp_path / "start.pt")
    shell("flyp shards write other/photos other/test")
    size = "--device cpu --workers 1 --batch-size 25"
    lines = code("An hour with your own images")[:8]
    steps = ["shards", "shards", "shards", "shards", "train", "wiseft", "eval", "export"]
    assert [line.split()[1] for line in lines] == steps
    for line in lines:
        line = line.partition("  #")[0].replace("--model ViT-B-16", f"--model {name}")
        line = line.replace("--pretrained openai", f"--pretrained {tag}")
        line += " --lr 2e-3 --epochs 12" if " train " in line else ""  # from random weights
        said = shell(f"{line} {size}" if line.split()[1] in ("train", "wiseft", "eval") else line)
        assert "Traceback" not in said and "mismatch" not in said
    assert {path.name for path in (tmp_path / "classifier").iterdir()} >= {"config.json", "model.safetensors"}
    assert (tmp_path / "logs/birds/wiseft/frontier.png").exists()

    content = json.loads((tmp_path / "logs/birds/flyp.json").read_text())
    entry = pretrained._PRETRAINED[name][tag]
    assert content["model_cfg"].get("quick_gelu", False) == (tag == "openai")
    assert content["preprocess_cfg"]["mean"] == list(entry["mean"])
    rows = (tmp_path / "logs/birds/checkpoints/results.jsonl").read_text().splitlines()
    figures = {"run": json.loads(rows[-1])["val/top1"]}
    said = shell(f"flyp eval logs/birds --epoch last --eval-data val=data/val --json {size} 2> said")
    figures["eval"] = json.loads(said)["results"]["val"]["top1"]
    sweep = json.loads((tmp_path / "logs/birds/wiseft/wiseft.json").read_text())
    figures["wiseft"] = sweep["alphas"]["1.00"]["val"]["top1"]
    classifier = ImageClassifier.from_run(tmp_path / "logs/birds", epoch="last")
    shards = expand_source(str(tmp_path / "data/val"), "val")
    loader = LabelledDataset(shards, classifier.preprocess, 50, num_classes=10)
    figures["from_run"] = evaluate(classifier, loader)["top1"]
    shell("flyp export logs/birds --epoch last --format timm --out last")
    if tuple(map(int, timm.__version__.split(".")[:3])) >= (1, 0, 26):
        model = timm.create_model(f"local-dir:{tmp_path}/last", pretrained=True).eval()
        transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
        figures["timm"] = evaluate(model, LabelledDataset(shards, transform, 50, num_classes=10))["top1"]
    assert len(set(figures.values())) == 1 and figures["run"] > 0.2, figures


def test_the_python_runs(tmp_path, digits, monkeypatch):
    data = load_digits()
    photos(tmp_path / "photos/test", data.images[-60:], data.target[-60:])
    (tmp_path / "data").symlink_to(digits)
    monkeypatch.chdir(tmp_path)
    open_clip.add_model_config(digits / "digits-vit.json")
    text = README.partition("<!-- python -->\n")[2].partition("\n## ")[0]
    lines = "\n".join(line[4:] for line in text.splitlines())
    lines = lines.replace('"ViT-B-16", "openai"', '"digits-vit"').replace("ViT-B-16", "digits-vit")
    scope = {}
    exec(compile(lines.replace("range(10)", "range(1)"), "README.md", "exec"), scope)
    assert (
        0
        <= scope["evaluate"](
            scope["classifier"], [(scope["images"], torch.zeros(len(scope["images"])).long())]
        )["top1"]
        <= 1
    )
    assert scope["head"].shape[1] == 10


def test_the_recipes_make_shards(shell, tmp_path):
    """ImageNet's, iWildCam's and FMoW's lines, on downloads of two or four images."""
    rng = np.random.default_rng(0)

    def image(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(path)

    for wnid in ("n01440764", "n01443537"):
        for number in range(2):
            image(tmp_path / f"imagenet/train/{wnid}/{wnid}_{number}.JPEG")
    wild, fmow = tmp_path / "iwildcam_v2.0", tmp_path / "fmow_v1.1"
    splits = ("train", "id_val", "test")
    for split in splits:
        image(wild / f"train/{split}.jpg")
    rows = [f"{split},{i % 2},{split}.jpg" for i, split in enumerate(splits)]
    (wild / "metadata.csv").write_text("\n".join(["split,y,filename", *rows]) + "\n")
    (wild / "categories.csv").write_text("y,category_id,name\n1,10,tayassu pecari\n0,0,empty\n")
    (tmp_path / "templates.txt").write_text("a photo of {c}.\n{c} in the wild.\n")
    (tmp_path / "fmow_templates.txt").write_text("satellite photo of a {c}.\n")
    rows = [
        f"{split},{name},FRA,{year}-01-12T08:04:51Z"
        for split, year in (("train", 2012), ("train", 2013), ("val", 2012), ("test", 2016), ("seq", 2012))
        for name in ("airport", "zoo")
    ]
    for number in range(len(rows)):
        image(fmow / f"images/rgb_img_{number}.png")
    (fmow / "rgb_metadata.csv").write_text("\n".join(["split,category,country_code,timestamp", *rows]) + "\n")
    for name in ("negative", "positive"):
        for split in ("train", "test"):
            image(tmp_path / f"rendered-sst2/{split}/{name}/0.png")
        for number in range(6):
            image(tmp_path / f"101_ObjectCategories/{name}/image_{number:04d}.jpg")
    made = [
        line for line in code("Recipes") if line.startswith(("find ", "tail ", "awk ", "flyp shards write "))
    ]
    assert len(made) == 15
    for line in made:
        shell(line)
    for folder, number in (("imagenet", 4), ("iwildcam", 1), ("fmow", 2), ("sst2", 2), ("caltech101", 10)):
        assert count_samples(expand_source(str(tmp_path / "data" / folder), "train")) == number
    assert (tmp_path / "train.csv").read_text().splitlines()[-1].endswith("n01443537_1.JPEG,1")
    assert (tmp_path / "data/iwildcam/classnames.txt").read_text() == "empty\ntayassu pecari\n"
