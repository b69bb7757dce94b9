"""TF32: a GPU may multiply float32 matrices with 10 of 23 mantissa bits, if torch is told that it may.

torch forbids it by default; open_clip's main() allows it, for speed. The towers follow open_clip, in training and in
whatever scores its results. Class logits are always exact, because TF32 makes many of them equal.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def match_open_clip_precision() -> None:
    """Set a GPU's precision as open_clip's main() does, so that scores agree with training's. Does nothing without one."""
    if torch.cuda.is_available():
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.deterministic = False


def allows_tf32() -> bool:
    """Whether float32 matrices may be multiplied in TF32 on a GPU."""
    matmul = torch.backends.cuda.matmul
    # since torch 2.9, reading the old name raises after the new one was set
    return matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32


@contextmanager
def full_float32() -> Iterator[None]:
    """Forbid TF32 within a block. The setting is process-wide, and is restored afterwards."""
    matmul = torch.backends.cuda.matmul
    if not allows_tf32():
        yield
        return
    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:  # TF32 was allowed by its new name
        precision = ""
    matmul.allow_tf32 = False  # sets both names: some products read the one, some the other
    try:
        yield
    finally:
        if precision:
            torch.set_float32_matmul_precision(precision)
        else:
            matmul.fp32_precision = "tf32"
