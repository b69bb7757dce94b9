"""Fine-tune a CLIP model with FLYP by open_clip's training script; see `python train_flyp.py --help`."""

import sys

from flyp_plugin.commands import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
