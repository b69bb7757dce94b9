"""The paper's data sets as people download them, made small: the folders, columns, names and flaws of the real files.

The structure is that of WILDS' dataset_preprocessing/iwildcam/create_split.py and fmow/process_metadata_fmow.py, of the
FLYP authors' labels.csv, of 101_ObjectCategories, rendered-sst2 and ILSVRC2012, and of CLIP_benchmark's sets on its hub
(webp images, lists without a newline at their end, other names and templates than the paper's for PCam).
"""

import csv
import io
import json
from collections.abc import Iterable, Sequence
from importlib.resources import files
from pathlib import Path
from uuid import UUID

import numpy as np
import open_clip
import timm.data
from PIL import Image

from tests import tars

BENCHMARK = files("clip_benchmark") / "datasets"
BENCHMARK_NAMES = json.loads((BENCHMARK / "en_classnames.json").read_text("utf-8"))
BENCHMARK_TEMPLATES = json.loads((BENCHMARK / "en_zeroshot_classification_templates.json").read_text("utf-8"))
WNIDS = list(timm.data.ImageNetInfo().label_names())
FMOW = str.split("""airport airport_hangar airport_terminal amusement_park aquaculture archaeological_site barn border_checkpoint
burial_site car_dealership construction_site crop_field dam debris_or_rubble educational_institution electric_substation
factory_or_powerplant fire_station flooded_road fountain gas_station golf_course ground_transportation_station helipad
hospital impoverished_settlement interchange lake_or_pond lighthouse military_facility multi-unit_residential
nuclear_powerplant office_building oil_or_gas_facility park parking_lot_or_garage place_of_worship police_station port
prison race_track railway_bridge recreational_facility road_bridge runway shipyard shopping_mall single-unit_residential
smokestack solar_farm space_facility stadium storage_tank surface_mine swimming_pool toll_booth tower tunnel_opening
waste_disposal water_treatment_facility wind_farm zoo""")
CALTECH = str.split("""BACKGROUND_Google Faces Faces_easy Leopards Motorbikes accordion airplanes anchor ant barrel bass beaver
binocular bonsai brain brontosaurus buddha butterfly camera cannon car_side ceiling_fan cellphone chair chandelier
cougar_body cougar_face crab crayfish crocodile crocodile_head cup dalmatian dollar_bill dolphin dragonfly
electric_guitar elephant emu euphonium ewer ferry flamingo flamingo_head garfield gerenuk gramophone grand_piano
hawksbill headphone hedgehog helicopter ibis inline_skate joshua_tree kangaroo ketch lamp laptop llama lobster lotus
mandolin mayfly menorah metronome minaret nautilus octopus okapi pagoda panda pigeon pizza platypus pyramid revolver
rhino rooster saxophone schooner scissors scorpion sea_horse snoopy soccer_ball stapler starfish stegosaurus stop_sign
strawberry sunflower tick trilobite umbrella watch water_lilly wheelchair wild_cat windsor_chair wrench
yin_yang""")
SPLITS = ("train", "val", "test", "id_val", "id_test")  # iWildCam's
TWICE = {148: 3, 174: 19, 178: 82, 181: 153}  # iWildCam's classes with the English name of another
_random = np.random.default_rng(0)


def picture(kind: str) -> bytes:
    """A small image, different every time."""
    buffer = io.BytesIO()
    Image.fromarray(_random.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(buffer, kind)
    return buffer.getvalue()


def image(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(picture(path.suffix[1:].lower().replace("jpg", "jpeg")))
    return path


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence], newline: str = "\n") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator=newline)
        writer.writerows([header, *rows])


def imagenet(root: Path) -> None:
    """ILSVRC2012: a folder for each WordNet id, files that end in .JPEG."""
    for wnid in WNIDS:
        for number in (10026, 7):
            image(root / f"imagenet/train/{wnid}/{wnid}_{number}.JPEG")
        image(root / f"imagenet/val/{wnid}/ILSVRC2012_val_{int(wnid[1:]):08d}.JPEG")


def iwildcam(root: Path) -> dict[str, tuple[str, int]]:
    """iwildcam_v2.0, and labels.csv as the authors have it. Returns {file name: (split, y)}."""
    folder = root / "iwildcam_v2.0"
    latin = ["empty", *(f"genus species{y}" for y in range(1, 182))]
    english = ["empty", *(f"Common Species{y}" for y in range(1, 182))]
    latin[153] = latin[181] = "mazama temama"
    english[7] = "Brocket, red"  # a comma within quotes
    for y, other in TWICE.items():
        english[y] = english[other].lower()
    rows = [[y, 2 * y, latin[y], english[y]] for y in range(182)]
    rows += [[99999, 500 + i, f"absent species{i}", f"absent species{i}"] for i in range(24)]
    write_csv(root / "web/labels.csv", ["y", "category_id", "name", "english"], rows, "\r\n")
    write_csv(folder / "categories.csv", ["y", "category_id", "name"], [row[:3] for row in rows])
    header = ["", "split", "location_remapped", "location", "sequence_remapped", "seq_id", "y", "category_id"]
    lines, made = [], {}
    for split in sorted(SPLITS):
        for y in range(182) if split == "train" else (0, 3, 7, 148, 153, 181):
            number = len(lines)
            name = f"{UUID(int=number + (1 << 120))}.jpg"
            made[image(folder / "train" / name).name] = (split, y)
            time = f"2013-{1 + y % 12:02d}-05 07:33:{number % 60:02d}.000"
            lines.append(
                [number, split, y % 5, 100 + y % 5, number, UUID(int=number), y, 2 * y, time, name, name[:-4]]
            )
    write_csv(folder / "metadata.csv", [*header, "datetime", "filename", "image_id"], lines)
    return made


def fmow(root: Path) -> list[tuple[str, str, str]]:
    """fmow_v1.1. Returns (set as WILDS names it or "", category, region) of each image rgb_img_0.png, ..."""
    folder = root / "fmow_v1.1"
    countries = [
        ["France", "FR", "FRA", "250", "ISO 3166-2:FR", "Europe"],
        ["Bonaire, Sint Eustatius and Saba", "BQ", "BES", "535", "ISO 3166-2:BQ", "Americas"],
        ["Namibia", "NA", "NAM", "516", "ISO 3166-2:NA", "Africa"],
        ["Antarctica", "AQ", "ATA", "010", "ISO 3166-2:AQ", ""],
    ]
    regions = {row[2]: row[5] or "Other" for row in countries} | {"XKX": "Other"}  # Kosovo is not in the list
    write_csv(
        folder / "country_code_mapping.csv",
        ["name", "alpha-2", "alpha-3", "country-code", "iso_3166-2", "region"],
        countries,
    )
    header = [
        "split",
        "img_filename",
        "img_path",
        "spatial_reference",
        "epsg",
        "category",
        "visible",
        "img_width",
    ]
    header += ["img_height", "country_code", "cloud_cover", "timestamp", "lat", "lon"]
    where = 'GEOGCS["WGS 84",DATUM["WGS_1984",SPHEROID["WGS 84",6378137,298.257223563]]]'
    names = {("train", 0): "train", ("val", 0): "id_val", ("test", 0): "id_test", ("test", 2): "test"}
    lines, made = [], []
    for split in ("train", "val", "test", "seq"):
        for category in FMOW if split == "train" else [*FMOW[:3], *FMOW[-3:]]:
            for when, time in enumerate(
                ("2012-12-31T23:59:59Z", "2013-01-01T00:00:00Z", "2016-01-01T00:00:00Z")
            ):
                country = sorted(regions)[len(lines) % len(regions)]
                line = [
                    split,
                    f"{category}_1_rgb.tif",
                    f"{split}/{category}/1.jpg",
                    where,
                    4326,
                    category,
                    True,
                ]
                lines.append([*line, 500, 400, country, 3, time, 1.5, -2.5])
                made.append((names.get((split, when), ""), category, regions[country]))
    for number in range(len(lines)):
        image(folder / f"images/rgb_img_{number}.png")
    write_csv(folder / "rgb_metadata.csv", header, lines)
    return made


def caltech101(root: Path) -> None:
    """101_ObjectCategories with its 102 folders, five images in each; and what CLIP_benchmark has for `curl`."""
    for name in CALTECH:
        for number in range(1, 6):
            image(root / f"101_ObjectCategories/{name}/image_{number:04d}.jpg")
    (root / "101_ObjectCategories/BACKGROUND_Google/tmp").write_text("")
    (root / "web").mkdir(exist_ok=True)
    (root / "web/en_classnames.json").write_text(json.dumps(BENCHMARK_NAMES))


def sst2(root: Path) -> None:
    """rendered-sst2, as OpenAI has it: valid, not val."""
    for split in ("train", "valid", "test"):
        for name in ("negative", "positive"):
            for number in range(4):
                image(root / f"rendered-sst2/{split}/{name}/{number}.png")


def hub(
    root: Path, name: str, names: Sequence[str], templates: Sequence[str], per_class: int = 1, **tars_of: int
) -> None:
    """A set of CLIP_benchmark on its hub, hub/NAME, with some tars for each split and `per_class` images per tar."""
    folder = root / "hub" / name
    for split, number in tars_of.items():
        for shard in range(number):
            members, count = {}, 0
            for label in range(len(names)):
                for _ in range(per_class):
                    key = f"s{shard * 1000 + count:07d}"
                    members |= {f"{key}.cls": str(label).encode(), f"{key}.webp": picture("webp")}
                    count += 1
            tars.write(folder / split / f"{shard}.tar", members)
        (folder / split / "nshards.txt").write_text(f"{number}")
    (folder / "classnames.txt").write_text("\n".join(names))
    (folder / "zeroshot_classification_templates.txt").write_text("\n".join(templates))


def shifts(root: Path) -> None:
    """ImageNet's: of 1,000, 200 and 113 classes; an image of each class is enough, and two templates of the 80."""
    names, templates = list(open_clip.IMAGENET_CLASSNAMES), BENCHMARK_TEMPLATES["imagenet1k"][:2]
    for name, number in (("v2", 1000), ("-r", 200), ("-a", 200), ("_sketch", 1000)):
        hub(root, f"wds_imagenet{name}", names[:number], templates, test=1)
    hub(root, "wds_objectnet", names[-113:], templates, test=1)
