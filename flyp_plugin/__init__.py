"""FLYP (finetune like you pretrain) for CLIP models, inside open_clip's own training script."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flyp_plugin.data import ClassPromptDataset as ClassPromptDataset
    from flyp_plugin.heads import ImageClassifier as ImageClassifier
    from flyp_plugin.heads import build_zeroshot_head as build_zeroshot_head
    from flyp_plugin.metrics import evaluate as evaluate
    from flyp_plugin.prompts import ClassPrompts as ClassPrompts
    from flyp_plugin.wiseft import interpolate as interpolate

__version__ = "0.1.0"
_HOME = {
    "ClassPrompts": "prompts",
    "ClassPromptDataset": "data",
    "build_zeroshot_head": "heads",
    "ImageClassifier": "heads",
    "evaluate": "metrics",
    "interpolate": "wiseft",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> object:
    """Import a public name's module when it is first asked for, so that `flyp --help` need not import torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'flyp_plugin' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"flyp_plugin.{_HOME[name]}"), name)
