"""Of each command that writes something, a small one on digits, for the scripts that make two of them or a full disk."""

import sys
from pathlib import Path

import open_clip
import torch

from tests import digits
from tests.faults.kills import EPOCHS, flags, start

FLYP = [sys.executable, "-m", "flyp_plugin"]
MODEL = "--model digits-vit --model-config {data}/digits-vit.json --device cpu"
TEST = "--eval-data test={data}/test/{{0..1}}.tar --workers 0"
COMMANDS = {
    "shards write": "shards write {photos} {out}/train --workers 2",
    "shards subset": "shards subset {data} {out}/train --shots 20",
    "wiseft": f"wiseft {MODEL} --pretrained {{weights}} --finetuned {{checkpoint}} {TEST} --alphas 0,1 --out {{out}}",
    "export": f"export {{checkpoint}} {MODEL} --data {{data}} --format timm --out {{out}}",
    "compare": f"compare {MODEL} --pretrained {{weights}} --train-data {{data}} {TEST} --methods flyp --lr 1e-3"
    " --seeds 0 --epochs 1 --train-num-samples 100 --out {out}",
    "demo": "demo --demo-dir {out} --pretrain-epochs 1 --epochs 1",
}


class Commands:
    """Makes what they read: digits, weights to start from, and a run to its end.

    Attributes:
        whole: the run's folder.
        read: what they read, by the names in COMMANDS.
    """

    def __init__(self, root: Path):
        data, self.whole = digits.write(root / "digits"), root / "logs/whole"
        self.read = {"data": data, "photos": digits.photos(root / "photos") / "train"}
        self.read |= {
            "weights": root / "start.pt",
            "checkpoint": self.whole / f"checkpoints/epoch_{EPOCHS}.pt",
        }
        open_clip.add_model_config(data / "digits-vit.json")
        torch.save(open_clip.create_model("digits-vit").state_dict(), self.read["weights"])
        assert start(self.train(self.whole), root / "whole.said").wait() == 0

    def train(self, folder: Path) -> list[str]:
        """The run of that folder: begun, or gone on with."""
        return [*FLYP, "train", *flags(self.read["data"], folder), "--resume", "latest"]

    def __call__(self, what: str, out: Path) -> list[str]:
        """One of COMMANDS, with more flags behind its name."""
        name = next(name for name in COMMANDS if what.startswith(name))
        return [*FLYP, *f"{COMMANDS[name]}{what.removeprefix(name)}".format(**self.read, out=out).split()]
