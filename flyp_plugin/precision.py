"""Float32 and TF32: on a GPU a product of float32 matrices may keep 10 bits of 23, and who says when.

torch forbids it unless told otherwise; open_clip's main() allows it, for speed. The towers follow open_clip, in training
and in whatever scores what it has trained; class logits, of which several are often equal in few bits, are always exact.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def match_open_clip_precision() -> None:
    """Let a GPU compute as in open_clip's training script, whose main() sets the same: figures then agree with its.

    TF32 is allowed, and cuDNN chooses its algorithms by their speed. Without a GPU nothing is set.
    """
    if torch.cuda.is_available():
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.deterministic = False


def allows_tf32() -> bool:
    """Whether a product of float32 matrices on a GPU may be in TF32."""
    matmul = torch.backends.cuda.matmul
    # torch 2.9 has a new name for it; there reading the old one raises once the new one was set
    return matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32


@contextmanager
def full_float32() -> Iterator[None]:
    """Within it a GPU multiplies float32 matrices in float32.

    The setting is torch's, for the whole process, and is put back at the end.
    """
    if not allows_tf32():
        yield
        return
    try:
        level = torch.get_float32_matmul_precision()
    except RuntimeError:  # it was allowed by its new name, of which this knows nothing
        level = "new"
    matmul = torch.backends.cuda.matmul
    matmul.allow_tf32 = (
        False  # by the old name, which sets the new one too: some products read one, some the other
    )
    try:
        yield
    finally:
        if level == "new":
            matmul.fp32_precision = "tf32"
        elif level == "medium":
            torch.set_float32_matmul_precision(level)
        else:
            matmul.allow_tf32 = True
