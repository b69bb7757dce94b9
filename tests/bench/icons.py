"""Icons of many sets, drawn in many styles, as images: the npm package @iconify/json, rendered by resvg-py.

    npm pack @iconify/json && tar xzf iconify-json-*.tgz     # makes the folder package/, 390,000 icons
    pip install resvg-py

Nothing of them is in this repository; the licence of each set is in package/collections.json.
"""

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import resvg_py
from PIL import Image

# endings by which sets name an icon's style, as in home-outline and home-20-filled
STYLE = re.compile(
    r"(-(outlined?|line|linear|light|thin|regular|bold|filled|fill|solid|sharp|rounded?|duotone|broken|\d+))+$"
)


class Icon(NamedTuple):
    set: str
    name: str  # as the set has it
    base: str  # without its style, in words
    svg: str


def icons(package: str | Path) -> Iterator[Icon]:
    """All icons of the unpacked npm package, by set and name."""
    for path in sorted(Path(package, "json").glob("*.json")):
        collection = json.loads(path.read_text())
        for name, icon in sorted(collection["icons"].items()):
            width, height = (
                icon.get(side, collection.get(side, 16)) for side in ("width", "height")
            )  # 16: Iconify's default
            corner = f"{icon.get('left', 0)} {icon.get('top', 0)}"
            svg = (
                f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
                f'viewBox="{corner} {width} {height}" color="black">{icon["body"]}</svg>'
            )
            yield Icon(path.stem, name, STYLE.sub("", name).replace("-", " "), svg)


def render(svg: str, pixels: int) -> Image.Image:
    """RGB on white, (pixels, pixels), the icon in the middle."""
    png = resvg_py.svg_to_bytes(svg_string=svg, width=pixels, height=pixels, skip_system_fonts=True)
    icon = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    image = Image.new("RGBA", (pixels, pixels), "white")
    image.alpha_composite(icon, ((pixels - icon.width) // 2, (pixels - icon.height) // 2))
    return image.convert("RGB")
