"""Models whose parameters are divided among the ranks: open_clip 4's --fsdp, which is torch's FSDP2.

open_clip shards a model in place: each parameter becomes a DTensor, of which a rank holds its part, and is whole only
while a forward or backward pass uses it. Everything else, such as building a head and scoring images, needs it whole.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import fsdp


def is_supported() -> bool:
    """Whether torch is new enough: before 2.8 it cannot keep parameters whole after a forward pass, and 2.8 adds up the
    gradients of gloo's ranks where it should average them.
    """
    return torch.__version__ >= (2, 9)  # type: ignore[operator]  # a TorchVersion


@contextmanager
def whole(model: nn.Module, reshard_after_forward: bool = True) -> Iterator[None]:
    """Hold all parameters of a sharded model on each rank, as plain tensors, within a block that every rank enters.

    In the block the ranks need not keep in step: nothing is gathered any more. The parameters have the dtype in which
    training computes with them (with --fsdp and amp_bf16, bfloat16), and what is written to them is lost at its end. Does
    nothing to other models.

    Args:
        reshard_after_forward: what to go back to; False with --fsdp-no-reshard-after-forward.
    """
    modules: list[Any] = [
        module for module in model.modules() if is_supported() and isinstance(module, fsdp.FSDPModule)
    ]
    for module in modules:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in modules:
            module.set_reshard_after_forward(reshard_after_forward, recurse=False)
            module.reshard()


def assign(parameter: Any, value: Tensor) -> None:
    """Set a parameter, sharded or not, to `value` of its whole shape, which is the same on each rank."""
    if hasattr(parameter, "placements"):  # a DTensor
        from torch.distributed.tensor import distribute_tensor

        value = distribute_tensor(value, parameter.device_mesh, parameter.placements)
    parameter.data.copy_(value)
