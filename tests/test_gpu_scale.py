"""The steps `feed` and `icons` of tests/gpu, in their small form on a CPU, as they are run: the tables that they write."""

import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def step(name: str, out: Path, *flags: str | Path) -> str:
    """The table of a step's small form."""
    command = [sys.executable, "-m", f"tests.gpu.{name}", "--device", "cpu", "--out", out, "--small", *flags]
    subprocess.run(list(map(str, command)), check=True, cwd=ROOT)
    return (out / f"{name}.md").read_text()


def package(root: Path) -> Path:
    """A folder such as @iconify/json makes: 28 sets, in each a sun, a moon and a star."""
    kinds = ["plain"] * 4 + ["pixel", "emoji", "colour"]
    collections = {}
    (root / "json").mkdir(parents=True)
    for number in range(28):
        kind = kinds[number % 7]
        name, painted = f"{kind}{number}", kind in ("emoji", "colour")
        about = {"name": name, "author": {"name": f"author {number}"}, "palette": painted}
        collections[name] = about | ({"category": "Emoji"} if kind == "emoji" else {})
        icons = {}
        for place, base in enumerate(("sun", "moon", "star")):
            shape = f'x="{place * 2}" y="{place}" width="{3 + number * 0.4}" height="{4 + number * 0.3}"'
            colour = f"hsl({number * 12} 90% 40%)" if painted else "black"
            for style in ("outline", "filled") if kind == "plain" else ("",):
                paint = f'fill="none" stroke="{colour}"' if style == "outline" else f'fill="{colour}"'
                icons[f"{base}-{style}".strip("-")] = {"body": f"<rect {shape} {paint}/>"}
        path = root / "json" / f"{name}.json"
        path.write_text(json.dumps({"prefix": name, "width": 24, "height": 24, "icons": icons}))
    (root / "collections.json").write_text(json.dumps(collections))
    return root


def test_feed_compares_the_loader_with_the_step(tmp_path):
    table = step("feed", tmp_path)
    assert re.search(r"\| 2 \| [1-9]\d* \| [1-9]\d* \|", table)  # by the loader alone, of two kinds of images
    assert re.search(r"\| 64 x 48 \| 2 \| [1-9]\d* \| \d+ % \|", table)  # fed
    assert re.search(
        r"- 64 x 48: 2 workers deliver \d+ images/s, the step takes \d+: the GPU waits \d+ %", table
    )


def test_icons_are_packed_drawn_learnt_and_compared(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tests/bench")
    from icon_shift import pack

    packed, out = tmp_path / "pack/icons.json.xz", tmp_path / "out"
    pack(package(tmp_path / "package"), (4, 2), packed)
    table = step("icons", out, "--icons", packed, "--work", tmp_path / "work")
    images = dict(re.findall(r"^\| (\S+) \| (\d+) \|$", table, re.MULTILINE))
    assert images["classes"] == "3" and all(int(number) > 2 for number in images.values())
    assert {"captions", "id/train", "id/val", "id/test", "filled/test", "pixel/test"} <= set(images)
    for method in ("zero-shot", "flyp", "flyp + WiSE-FT", "lp", "lp + WiSE-FT"):
        assert re.search(rf"^\| {re.escape(method)} \| [\d.]+", table, re.MULTILINE), method
    assert json.loads((out / "icons.json").read_text())["methods"] == ["flyp", "lp"]
    assert (out / "icons.png").read_bytes().startswith(b"\x89PNG")
