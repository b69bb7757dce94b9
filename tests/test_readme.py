"""The documentation keeps its word: its flags exist, its commands run on small data, its Python runs, its links lead somewhere.

The recipes for the paper's sets run in test_recipes.py.
"""

import json
import os
import re
import shlex
import subprocess
import sys

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
from flyp_plugin.sources import expand_source
from tests.digits import NAMES
from tests.pages import BENCH, PAGES, README, REPO, code, section

NOT_OURS = {"--rdzv-endpoint", "--nnodes", "--repo-type"}  # torchrun's, hf's


def commands(text):
    """Each command of the plugin as a list of words, from 'flyp' or 'train_flyp.py' on."""
    for line in code(text):
        for part in line.split(" && "):
            found = re.search(r"(?:^|[ /])((?:flyp|train_flyp\.py) .*)$", part)
            if found and not part.startswith(("#", "from ", "import ")):
                yield shlex.split(found[1], comments=True)


def known_flags():
    """The plugin's flags, of training and of every command and subcommand."""
    parsers, known = [flags.parser(), *map(cli._parser, cli.COMMANDS)], set()
    while parsers:
        for action in parsers.pop()._actions:
            known |= set(action.option_strings)
            parsers += list((action.choices or {}).values()) if hasattr(action, "add_parser") else []
    return known


def parse(words):
    """Parse a command without running it; unknown flags exit or raise."""
    if words[0] == "flyp" and words[1] != "train":
        _, rest = cli._parser(words[1]).parse_known_args(words[1:])
        assert not rest or words[1] == "compare"  # which passes the rest on to training
    else:
        rest = [word for word in words[1:] if word != "train"]
    if "--demo" not in rest:
        openclip.parse_args(flags.parser().parse_known_args(rest)[1])


def test_the_commands_are_found():
    found = [*commands(README), *commands(BENCH)]
    assert len(found) > 35
    assert sum(words[0] == "train_flyp.py" for words in found) > 8


@pytest.mark.parametrize("page", ["README.md", "tests/bench/README.md"])
def test_every_command_is_understood(page):
    for words in commands(PAGES[page]):
        parse(words)


def test_every_flag_exists(capsys):
    with pytest.raises(SystemExit):
        openclip.parse_args(["--help"])
    open_clips = set(re.findall(r"--[a-z0-9][a-z0-9-]*", capsys.readouterr().out))
    prose = re.sub(r"(?m)^ {4}.*$", "", README)  # commands are tested above
    named = set(re.findall(r"`(?:[^`\n]* )?(--[a-z][a-z0-9-]*)", prose))
    assert len(named) > 30
    open_clips.add("--fsdp")  # open_clip 4's
    assert named - known_flags() - open_clips - NOT_OURS == set()


@pytest.mark.parametrize("page", PAGES)
def test_the_pages_are_readable(page):
    prose = [line for line in PAGES[page].splitlines() if not line.startswith(("    ", "|"))]
    assert [line for line in prose if len(line) > 120] == []
    assert len(README.splitlines()) < 300


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings(page):
    for link in re.findall(r"\]\(([^)]+)\)", PAGES[page]):
        if not link.startswith("http"):
            path, _, heading = link.partition("#")
            target = (REPO / page).parent / path if path else REPO / page
            assert target.exists(), link
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE) if heading else []
            slugs = [re.sub(r"[^\w -]", "", text.lower()).replace(" ", "-") for text in headings]
            assert not heading or heading in slugs, link


def test_every_script_exists_and_has_its_flags():
    scripts = 0
    for line in (line for page in PAGES.values() for line in code(page)):
        found = re.match(r"python (?:-m )?(tests[./](?:bench|faults)[./]\w+)(?:\.py)?(.*)$", line)
        if found:
            source = (REPO / f"{found[1].replace('.', '/')}.py").read_text()
            used = set(re.findall(r" (--[a-z-]+)", found[2].partition(" #")[0]))
            passed_on = known_flags() | {"--lr"} if "icon_shift" in found[1] else set()  # to flyp compare
            assert {flag for flag in used - passed_on if flag not in source} == set(), line
            scripts += 1
    assert scripts > 20


@pytest.fixture
def shell(tmp_path):
    """Run a line of README as it stands, `flyp` and `python` being this environment's, in tmp_path."""
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    (bin_folder / "flyp").write_text(f'#!/bin/sh\nexec {sys.executable} -m flyp_plugin "$@"\n')
    (bin_folder / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    for path in bin_folder.iterdir():
        path.chmod(0o755)
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
open_clip.factory._MODEL_CONFIGS["ViT-B-16"] = json.load(open("model.json"))
for place in (open_clip, open_clip.factory):
    place.download_pretrained = lambda *args, **kwargs: "start.pt"
if openai := sys.modules.get("open_clip.openai"):  # which open_clip 2.28 asks for OpenAI's weights
    openai.download_pretrained_from_url = lambda *args, **kwargs: "start.pt"
from flyp_plugin.commands import main
main(sys.argv[1:])
"""


def test_an_hour_with_your_own_images(shell, tmp_path, digits):
    """The commands as they stand, from photos to a classifier that timm scores as flyp eval does."""
    data = load_digits()
    photos(tmp_path / "photos", data.images[320:580], data.target[320:580])
    photos(tmp_path / "other/photos", 16 - data.images[260:320], data.target[260:320])
    assert cli.call(["shards", "write", f"{tmp_path}/other/photos", f"{tmp_path}/other/test"]) in (0, None)
    config = json.loads((digits / "digits-vit.json").read_text())
    config["vision_cfg"]["head_width"] = 64  # open_clip 2.28 takes OpenAI's heads to be so wide
    config["text_cfg"]["heads"] = 1
    (tmp_path / "model.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "model.json")
    torch.manual_seed(0)
    torch.save(open_clip.create_model("model").state_dict(), tmp_path / "start.pt")
    (tmp_path / "tagged.py").write_text(TAGGED)
    tagged = f'#!/bin/sh\ncase $1 in shards) exec {sys.executable} -m flyp_plugin "$@";; esac\n'
    (tmp_path / "bin/flyp").write_text(f'{tagged}exec {sys.executable} tagged.py "$@"\n')

    lines, said = code(section(README, "An hour with your own images"))[:6], {}
    steps = ["shards", "shards", "train", "wiseft", "eval", "export"]
    assert [line.split()[1] for line in lines] == steps
    for step, line in zip(steps, lines):
        line = line.partition("  #")[0].partition(" # ")[0]
        line += " --lr 2e-3 --epochs 12" if step == "train" else ""  # from random weights
        line += " --device cpu --workers 0 --batch-size 25" if step in ("train", "wiseft", "eval") else ""
        said[step] = shell(line)
        assert "Traceback" not in said[step] and "mismatch" not in said[step]

    run = tmp_path / "logs/birds"
    assert (run / "wiseft/frontier.png").exists()
    record = json.loads((run / "flyp.json").read_text())
    assert record["model_cfg"]["quick_gelu"]  # OpenAI's tag needs it
    assert record["preprocess_cfg"]["mean"] == list(pretrained._PRETRAINED["ViT-B-16"]["openai"]["mean"])

    last = json.loads((run / "checkpoints/results.jsonl").read_text().splitlines()[-1])["val/top1"]
    assert last == json.loads((run / "wiseft/wiseft.json").read_text())["alphas"]["1.00"]["val"]["top1"] > 0.2
    test = expand_source(str(tmp_path / "data/test"), "test")
    merged = ImageClassifier.from_run(run)
    top1 = evaluate(merged, LabelledDataset(test, merged.preprocess, 50, num_classes=10))["top1"]
    assert f"{100 * top1:.2f}" in said["eval"]
    if tuple(map(int, timm.__version__.split(".")[:3])) >= (1, 0, 26):
        model = timm.create_model(f"local-dir:{tmp_path}/classifier", pretrained=True).eval()
        transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
        assert evaluate(model, LabelledDataset(test, transform, 50, num_classes=10))["top1"] == top1


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
    labels = torch.zeros(len(scope["images"])).long()
    assert 0 <= scope["evaluate"](scope["classifier"], [(scope["images"], labels)])["top1"] <= 1
    assert scope["head"].shape[1] == 10
