"""What icons.py's icons look like, as far as their names and collections.json say, and which sets belong together."""

import re
from collections import defaultdict
from collections.abc import Iterator
from io import BytesIO
from typing import Any, NamedTuple

from icons import STYLE, icons, render

LOOKS = ["outline", "filled", "pixel", "emoji", "colour"]
FILLED = {"fill", "filled", "solid"}  # words at the end of names, or in the names of sets
OUTLINE = {"outline", "outlined", "line", "linear", "light", "thin", "regular"}
OTHER = {"bold", "duotone", "broken", "duo", "twotone", "tone", "remix", "flat"}
BOLD_IS_FILLED = {"solar", "streamline-ultimate"}
PIXEL_ART = {"memory", "dinkie-icons"}  # and those that say so
BEGINNINGS = {word: "filled" for word in ("baseline", "round", "sharp")}  # of the names of the set ic
BEGINNINGS |= {word: word for word in ("outline", "twotone")}
# sets drawn after others
FORKS = [("lucide", "feather"), ("ion", "famicons"), ("heroicons", "sidekickicons"), ("fa", "la")]
FORKS += [("mi", "mono-icons")]
Collections = dict[str, dict[str, Any]]


class Drawing(NamedTuple):
    set: str
    name: str  # in words
    base: str  # without its style
    style: str
    look: str  # of LOOKS, or "none", where it is another; "" where nothing says which
    svg: str


def families(collections: Collections) -> list[tuple[str, ...]]:
    """The sets, in groups that may share drawings: by one author, with one first word, forks; and Material design."""
    links = defaultdict(list, {f"fork {i}": list(fork) for i, fork in enumerate(FORKS)})
    for name, about in collections.items():
        links["by " + re.sub(r",? (inc|llc)\.?$", "", about["author"]["name"].lower())].append(name)
        links["named " + name.split("-")[0]].append(name)
        if about.get("category") == "Material" or name == "zmdi":
            links["material"].append(name)
    family = {name: {name} for name in collections}
    for names in links.values():
        joined = set().union(*(family[name] for name in names if name in family))
        family.update(dict.fromkeys(joined, joined))
    return sorted({tuple(sorted(joined)) for joined in family.values()})


def drawings(package: str, collections: Collections) -> Iterator[Drawing]:
    """All icons of the sets in collections.json."""
    by_set = defaultdict(list)
    for icon in icons(package):
        first, _, rest = icon.name.partition("-")
        name = f"{rest}-{BEGINNINGS[first]}" if icon.set == "ic" and first in BEGINNINGS else icon.name
        match = STYLE.search(name)
        style = {word for word in (match[0] if match else "").split("-") if word and not word.isdigit()}
        by_set[icon.set].append((icon, name, name[: match.start()] if match else name, style))
    for one in (name for name in by_set if name in collections):
        whole = _look_of_set(one, collections[one])
        usual = whole or _usual(one, collections[one], [style for *_, style in by_set[one]])
        for icon, name, base, style in by_set[one]:
            look = usual
            if whole:
                pass
            elif style == {"bold"} and one in BOLD_IS_FILLED:
                look = "filled"
            elif OTHER & {*style, *name.split("-")}:
                look = "none"
            elif style & (FILLED | OUTLINE):
                look = "filled" if style & FILLED else "outline"
            words = (text.replace("-", " ") for text in (icon.name, base))
            yield Drawing(one, *words, " ".join(sorted(style)), look, icon.svg)


def _look_of_set(name: str, about: dict[str, Any]) -> str:
    """Of all of its icons; "" where they differ, or are plain."""
    if "pixel" in name or name in PIXEL_ART:
        return "pixel"
    if "emoji" in name or about.get("category") == "Emoji":
        return "emoji" if about["palette"] else "none"
    if about["palette"]:
        return "colour"
    return "none" if about.get("category") == "Logos" else ""


def _usual(name: str, about: dict[str, Any], styles: list[set[str]]) -> str:
    """Of a plain set's icons that have no style in their names."""
    title = {*about["name"].lower().split(), *name.split("-")}
    if title & FILLED:
        return "filled"
    if title & (OUTLINE - {"light"}) or "Uses Stroke" in about.get("tags", ()):
        return "outline"
    filled, outline = (sum(bool(style & words) for style in styles) for words in (FILLED, OUTLINE))
    if max(filled, outline) < max(10, len(styles) // 50):
        return ""
    return "outline" if filled > outline else "filled"  # names say what is not usual there


def png(svg: str, pixels: int) -> bytes | None:
    """None for what cannot be drawn, or shows nothing on white."""
    try:
        image = render(svg, pixels)
    except ValueError:
        return None
    out = BytesIO()
    image.save(out, "png")
    return out.getvalue() if image.convert("L").getextrema()[0] < 250 else None
