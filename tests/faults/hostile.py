"""Hostile files: none of them may run code, be read as a source, or write outside the output folder.

    python -m tests.faults.hostile          # half a minute; a table, and status 1 where something got in

Each attack gets a folder, tries to have a file `PWNED` made or changed outside what the command writes, and returns what
is seen. The commands are the real ones.
"""

import gzip
import io
import json
import os
import pickle
import shlex
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from textwrap import shorten

from flyp_plugin import ClassPrompts
from flyp_plugin.checkpoints import read_state_dict
from flyp_plugin.commands import call as flyp
from flyp_plugin.errors import CONTROLS, InputError
from flyp_plugin.images import open_image
from flyp_plugin.prompts import fill
from flyp_plugin.remote import read_text
from flyp_plugin.samples import read_samples
from flyp_plugin.shards import subset
from flyp_plugin.sources import count_samples, expand_source
from tests import tars
from tests.faults import data

PWNED = "PWNED"


class Code:
    """A pickle that makes the file when it is read."""

    def __reduce__(self):
        return os.system, (f"touch {PWNED}",)


def refused(run: Callable[[], object]) -> str:
    try:
        run()
    except InputError as error:
        assert not CONTROLS.search(str(error))
        return "refused: " + shorten(str(error).replace(f"{Path.cwd()}/", ""), 110, placeholder=" ...")
    raise AssertionError("it was not refused")


def pickle_as_a_checkpoint(folder: Path) -> str:
    (folder / "a.pt").write_bytes(pickle.dumps({"state_dict": Code()}, protocol=2))
    return refused(lambda: read_state_dict(folder / "a.pt"))


def pickle_in_a_zip_as_a_checkpoint(folder: Path) -> str:
    with zipfile.ZipFile(folder / "a.pt", "w") as file:
        file.writestr("a/data.pkl", pickle.dumps(Code(), protocol=2))
        file.writestr("a/version", "3\n")
    return refused(lambda: read_state_dict(folder / "a.pt"))


def pickles_in_a_tar(folder: Path) -> str:
    """webdataset's decoders would load these by their endings."""
    raw = pickle.dumps(Code())
    some = {f"s0000.{ending}": raw for ending in ("pyd", "pickle", "pth", "npy", "npz", "mp", "ten", "cbor")}
    fault = data.Fault("", tars.tar(data.many() | {name.replace("s0000", "s0109"): raw for name in some}), 10)
    _, wrong = data.see(fault, folder / "data", workers=0)
    assert not wrong, wrong
    return "never decoded"


def pickle_as_a_label(folder: Path) -> str:
    fault = data.Fault(
        "",
        tars.tar(data.many(cls=pickle.dumps(Code()))),
        0,
        stops="integer",
        check="labels that are missing or wrong",
    )
    _, wrong = data.see(fault, folder / "data", workers=0)
    assert not wrong, wrong
    return "refused: not an integer"


def postscript_as_an_image(folder: Path) -> str:
    try:
        open_image(data.image(form="EPS"))
    except OSError:
        return "skipped: no format of ours"
    raise AssertionError("it was opened")


def template_with_attributes(folder: Path) -> str:
    prompts = ClassPrompts(["cat"], ["{c.__class__.__mro__} {0} %s {c}", "{c!r:>99999999} {}"])
    assert prompts(0, 0) == "{c.__class__.__mro__} {0} %s cat" and prompts(0, 1) == "{c!r:>99999999} cat"
    return "literal text"


def class_name_that_is_a_place(folder: Path) -> str:
    assert fill("a {c}", "{c}\\1/../{}") == "a {c}\\1/../{}"
    return "literal text"


def class_name_with_control_characters(folder: Path) -> str:
    (folder / "names.txt").write_text("cat\n\x1b]0;owned\x07dog\n")
    return refused(lambda: ClassPrompts.from_files(str(folder / "names.txt"), "a {c}"))


def class_folder_with_control_characters(folder: Path) -> str:
    for name in ("cat", "a\x1b[2J"):
        (folder / "photos" / name).mkdir(parents=True)
        (folder / "photos" / name / "0.png").write_bytes(tars.png(0))
    return refused(lambda: flyp(["shards", "write", str(folder / "photos"), str(folder / "out/train")]))


def shard_named_like_a_command(folder: Path) -> str:
    tars.write(folder / f"pipe:touch {PWNED};.tar", tars.samples(range(3)))
    shards = expand_source(".", "train")
    assert len(list(read_samples(shards, lambda what, lost: None))) == 3 == count_samples(shards)
    return "read as a file"


def text_that_names_commands(folder: Path) -> str:
    root = tars.data_folder(folder / "data", 4, 1)
    (root / "train/sizes.json").write_text(json.dumps({"0.tar": 4, f"pipe:touch {PWNED}": 9}))
    (root / "train/nshards.txt").write_text(f"1\npipe:touch {PWNED}\n")
    return refused(lambda: expand_source(str(root), "train"))


def a_million_million_shards(folder: Path) -> str:
    with tars.served({"/nshards.txt": b"999999999999"}) as (url, _):
        return refused(lambda: expand_source(url, "train"))


def text_that_never_ends(folder: Path) -> str:
    return refused(lambda: read_text("/dev/zero"))


def deep_json(folder: Path) -> str:
    root = tars.data_folder(folder / "data", 4, 1)
    (root / "train/sizes.json").write_text("[" * 100_000)
    return refused(lambda: count_samples([str(root / "train/0.tar")]))


def deep_json_label(folder: Path) -> str:
    root = tars.data_folder(folder / "data", 4, 1)
    tars.write(root / "train/0.tar", {"a.png": tars.png(0), "a.json": b"[" * 100_000})
    return refused(
        lambda: flyp(
            [
                "shards",
                "subset",
                str(root),
                str(folder / "few/train"),
                "--shots",
                "1",
                "--label-key",
                "json:a",
            ]
        )
    )


def members_that_lead_out(folder: Path) -> str:
    root = tars.data_folder(folder / "data", 4, 1)
    members = {
        f"../../../{PWNED}.png": tars.png(0),
        f"../../../{PWNED}.cls": b"0",
        "/PWNED.png": tars.png(1),
        "/PWNED.cls": b"1",
    }
    tars.write(root / "train/0.tar", members)
    assert subset(str(root), str(folder / "few/train"), shots=1) == {"0.tar": 1, "1.tar": 1}
    with redirect_stdout(io.StringIO()):
        assert flyp(["shards", "check", str(root)]) == 0
    return "names in a tar, never files"


def link_in_a_tar(folder: Path) -> str:
    (folder / "secret.png").write_bytes(tars.png(3))
    raw = folder / "data.tar"
    with tarfile.open(raw, "w") as file:
        for kind, name in ((tarfile.SYMTYPE, "a.png"), (tarfile.LNKTYPE, "b.png")):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, str(folder / "secret.png")
            file.addfile(link)
    assert not list(read_samples([str(raw)], lambda what, lost: None))
    return "left out"


def tar_bomb(folder: Path) -> str:
    """Ten gigabytes of zeros in ten megabytes, by a header that says so."""
    header = tarfile.TarInfo("s0100.png")
    header.size = 10 << 30
    with gzip.open(folder / "0.tar", "wb") as file:
        file.write(header.tobuf(tarfile.GNU_FORMAT) + bytes(1 << 20))
    skipped: list[str] = []
    assert not list(read_samples([str(folder / "0.tar")], lambda what, lost: skipped.append(what)))
    return f"skipped: {skipped[0].split(': ', 2)[-1]}"


def keys_in_logs_and_tables(folder: Path) -> str:
    """Control characters out of a tar, in the lines of the log and of `flyp shards check`."""
    root = tars.data_folder(folder / "data", 4, 1)
    tars.write(root / "train/0.tar", {"\x1b[2Ja\rb.png": b"no", "\x1b[2Ja\rb.cls": b"0"})
    out = os.popen(f"{shlex.quote(sys.executable)} -m flyp_plugin shards check {shlex.quote(str(root))} 2>&1")
    text = out.read()
    assert "unreadable images" in text and not CONTROLS.search(text.replace("\n", "")), text
    return "as escapes"


ATTACKS = [
    value
    for value in list(globals().values())
    if callable(value) and getattr(value, "__annotations__", {}).get("folder") is Path
]


def see(attack: Callable[[Path], str], folder: Path, chdir: Callable = os.chdir) -> str:
    """What is seen; AssertionError where it got in."""
    inside = folder / "inside" / "here"
    inside.mkdir(parents=True)
    chdir(inside)
    seen = attack(inside)
    found = [str(path) for path in folder.rglob("*") if path.name.startswith(PWNED)]
    assert not found and not Path("/PWNED.png").exists(), found
    return seen


def main() -> None:
    print("| attack | what is seen |\n|---|---|")
    failed = 0
    for attack in ATTACKS:
        with tempfile.TemporaryDirectory() as folder:
            try:
                seen = see(attack, Path(folder))
            except AssertionError as error:
                seen, failed = f"GOT IN: {error}", failed + 1
            os.chdir("/")
        print(f"| {attack.__name__.replace('_', ' ')} | {seen} |", flush=True)
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
