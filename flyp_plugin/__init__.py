"""FLYP (finetune like you pretrain, arXiv 2212.00638) for CLIP models, inside open_clip's own training script.

The idea: to fine-tune a CLIP model on a labelled data set, write each label as a prompt ("a photo of a {c}.") and go on
with CLIP's own contrastive loss. All that open_clip needs for that is another data set, so this package is one, and a
few places where it enters open_clip's script. Read these eight modules in this order:

    prompts.py    class names, templates, descriptions -> the prompts of each class
    samples.py    tar members -> samples with a label, a prompt and a decoded image: one generator per step
    data.py       samples -> batches, over workers, ranks and epochs: ClassPromptDataset (training), LabelledDataset
    text.py       why the text tower needs only the positions up to EOT, and how it is made to run on these alone
    heads.py      prompts -> zero-shot head -> ImageClassifier
    wiseft.py     interpolate, average and Model Stock of weights; score all alphas on each decoded image once
    openclip.py   the seams: what is replaced in open_clip's script while its main() runs. No other module knows it
    train.py      FLYP's flags and defaults, and the run as openclip.py sees it (its checks: checks.py, data: run_data.py)

Helpers stand beside them: names.py and tokens.py, tars.py, labels.py and images.py, workers.py, short_tower.py and
patches.py hold the mechanics of prompts, samples, data, text and openclip; checks.py what a run is checked for; ranks.py
what one rank finds out for all; errors.py how a mistake is reported.

The way of a training sample: `sources.py` finds the tars and the text files beside them, and `remote.py` opens them
wherever they are; `samples.py` reads a member pair, takes its label, draws its prompt and decodes its image; `data.py`
shuffles and batches; open_clip's loop does the rest. After each epoch `monitor.py` scores the evaluation sets
(`evalsets.py`) through `heads.py` and `metrics.py`, the same code that `flyp eval` uses, so that figures agree.

The way of weights: `model_spec.py` says what a model's name and pretrained tag mean (activation, preprocessing),
`record.py` writes it to the run's flyp.json with the classes, `checkpoints.py` is the one reader and writer of weights,
and `targets.py` finds all of it for what a command is given, such as `logs/RUN`. `run_folder.py` guards that folder before
and after a run.

Where to add:
    a metric            metrics.py, a function of a Tally with the decorator @metric
    an objective        objectives.py, an entry of OBJECTIVES (learned.py has linear heads, anchor.py the teachers of
                        --anchor); flags.py for its flags; commands/grid.py for `flyp compare`
    a prompt source     prompts.py
    a kind of storage   remote.py
    a data source       sources.py (where shards are), rows.py (what `flyp shards write` reads), splits.py (--hold-out)
    an export format    commands/export.py, with a module such as onnx_export.py
    a command           commands/, a module with add_flags and run, and a line in commands.COMMANDS
    a seam              openclip.py, a line in its table

Public names: ClassPrompts, ClassPromptDataset, build_zeroshot_head, ImageClassifier, evaluate, interpolate.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flyp_plugin.data import ClassPromptDataset as ClassPromptDataset
    from flyp_plugin.heads import ImageClassifier as ImageClassifier
    from flyp_plugin.heads import build_zeroshot_head as build_zeroshot_head
    from flyp_plugin.metrics import evaluate as evaluate
    from flyp_plugin.prompts import ClassPrompts as ClassPrompts
    from flyp_plugin.wiseft import interpolate as interpolate

__version__ = "0.1.0"
_MODULES = {
    "ClassPrompts": "prompts",
    "ClassPromptDataset": "data",
    "build_zeroshot_head": "heads",
    "ImageClassifier": "heads",
    "evaluate": "metrics",
    "interpolate": "wiseft",
}
__all__ = list(_MODULES)


def __getattr__(name: str) -> object:
    """Import a public name on first use, so that `flyp --help` does not import torch."""
    if name not in _MODULES:
        raise AttributeError(f"module 'flyp_plugin' has no attribute {name!r}")
    return getattr(import_module(f"flyp_plugin.{_MODULES[name]}"), name)
