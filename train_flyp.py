"""Fine-tune a CLIP model with FLYP by open_clip's training script; see `python train_flyp.py --help`."""

from flyp_plugin.train import main

if __name__ == "__main__":
    main()
