"""Anchored fine-tuning: the features of the model are held near those of a teacher, which does not learn.

    loss = FLYP + W * mean_i(|f(x_i) - f_T(x_i)|^2 + |g(t_i) - g_T(t_i)|^2)

f and g are the normalised image and text features of the model, f_T and g_T those of the teacher T for the same images
and prompts. With --objective ce, which trains no text tower, the first distance alone. T is either the model that
training starts from, or an average of the weights along the trajectory (TRACER, arXiv 2605.29380). After step t of K

    T <- (1 - w_t) T + w_t S,    w_t = k(tau_t) / sum_{j <= t} k(tau_j),    tau_j = (j + 0.5) / (K + 1),

with S the model's weights and k the density of Beta(0.5, 0.5), which weighs the start and the end of training most: so
the teacher keeps a part of the pretrained model, where an exponential average would forget it. TRACER's own loss is a
mean over the D entries of a feature, with a coefficient that amounts to W = 3.5.

The teacher is no part of the model, nor of its checkpoints: these load in open_clip as any other. That of the trajectory
is saved beside each, as epoch_N.teacher.safetensors.
"""

import copy
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from flyp_plugin import record
from flyp_plugin.checkpoints import atomic_write, first_difference, read_state_dict
from flyp_plugin.errors import InputError
from flyp_plugin.text import shorten

TEACHERS = ("pretrained", "trajectory")


def trajectory_weights(steps: int) -> list[float]:
    """[w_0, ..., w_K] for K steps (TRACER, arXiv 2605.29380); w_0 is 1, the model that training starts from."""
    tau = (torch.arange(steps + 1, dtype=torch.float64) + 0.5) / (steps + 1)
    density = 1 / (tau * (1 - tau)).sqrt()  # of Beta(0.5, 0.5), up to a factor
    return (density / density.cumsum(0)).tolist()


class Teacher:
    """The teacher of a model, a copy of it in eval mode.

    Args:
        model: the model that is about to be trained; its forward returns a dict. Call this before `shorten`,
            DistributedDataParallel, FSDP and torch.compile.
        epochs, steps: those of the training and the optimizer steps of each epoch, for the teacher of the trajectory; 0
            epochs: it stays as it is.
    """

    def __init__(self, model: Any, epochs: int = 0, steps: int = 0):
        self.model: Any = copy.deepcopy(model).eval().requires_grad_(False)
        self.steps, self.step = steps, -1
        self.weights = trajectory_weights(epochs * steps) if epochs else []
        state = self.model.state_dict() if epochs else {}
        # the model's own tensors, but for those in 16 bits, where an average would lose the small steps
        wide = {torch.float16: torch.float32, torch.bfloat16: torch.float32}
        self.average = {
            name: tensor.to(wide.get(tensor.dtype, tensor.dtype)) for name, tensor in state.items()
        }
        self.rounded = [name for name, tensor in state.items() if tensor.dtype in wide]
        # running statistics of batch norm, which differ between ranks
        floats = {name for name, tensor in state.items() if tensor.is_floating_point()}
        self.statistics = floats - dict(self.model.named_parameters()).keys()

    def shorten(self, length: int = 0) -> None:
        """Encode text short, as the model does; see text.shorten."""
        shorten(self.model, length=length, in_eval=True)

    def distances(self, images: Tensor, tokens: Tensor | None, outputs: dict[str, Tensor]) -> Tensor:
        """The squared distances (B,) of the model's features in `outputs` from the teacher's; without tokens, of images."""
        # open_clip 4 with --fsdp turns autocast off, for FSDP casts the model's weights, but not the teacher's
        half = (
            images.dtype in (torch.float16, torch.bfloat16) and images.dtype != self.model.logit_scale.dtype
        )
        with torch.no_grad(), torch.autocast(images.device.type, images.dtype) if half else nullcontext():
            own = self.model(images, tokens)
        names = ["image_features"] if tokens is None else ["image_features", "text_features"]
        differences = torch.cat([outputs[name].float() - own[name].float() for name in names], dim=-1)
        return differences.square().sum(dim=-1)

    @torch.no_grad()
    def update(self, model: Any) -> None:
        """Follow `model`: call this once before its first optimizer step (w_0 is 1), and after each. The same on every rank."""
        self.step = min(self.step + 1, len(self.weights) - 1)
        weight = self.weights[self.step]
        for name, tensor in model.state_dict().items():
            average = self.average[name]
            if tensor.is_floating_point():
                average.lerp_(tensor.to(average.dtype), weight)
            else:
                average.copy_(tensor)
            if name in self.statistics and dist.is_initialized():
                dist.broadcast(average, 0)
        self._round()

    def _round(self) -> None:
        """Bring the average to the tensors of the model that are in 16 bits."""
        if self.rounded:
            self.model.load_state_dict({name: self.average[name] for name in self.rounded}, strict=False)

    def start(self, model: Any, epoch: int) -> None:
        """Before each epoch: take the weights that training starts from, unless it is resumed."""
        if not self.weights:
            return
        if self.step < 0:
            self.update(model)
        self.step = epoch * self.steps  # steps that were left out, as --precision amp may do, count as taken

    @contextmanager
    def follow(self, model: Any, optimizer: torch.optim.Optimizer, all_steps: bool = True) -> Iterator[None]:
        """Update after each optimizer step within a block; InputError if there is none, unless `all_steps` is False."""
        if not self.weights:
            yield
            return
        before = self.step
        hook = optimizer.register_step_post_hook(lambda *_: self.update(model))
        try:
            yield
        finally:
            hook.remove()
        if self.step == before and all_steps:
            raise InputError(
                "the teacher of the trajectory has not moved in an epoch, because this torch or open_clip does not call the "
                "optimizer's hooks; use --anchor-teacher pretrained, or leave out --torchcompile."
            )

    def save(self, epoch: int, args: Namespace) -> None:
        """Write it into a run's checkpoints/ if open_clip will save a checkpoint of this epoch, and delete old ones."""
        regularly = args.save_frequency > 0 and epoch % args.save_frequency == 0
        if not self.weights or not (epoch == args.epochs or regularly or args.save_most_recent):
            return
        folder = Path(args.checkpoint_path)
        path = record.teacher_path(folder, epoch)
        tensors = {name: tensor.cpu().clone() for name, tensor in self.average.items()}
        with atomic_write(path) as part:
            save_file(tensors, part)
        # the newest checkpoint is that of the epoch before: this epoch's is written later
        self.delete_old(folder, {epoch - 1, epoch})

    def delete_old(self, folder: Path, kept: set[int]) -> None:
        """Delete the teachers in a run's checkpoints/ whose checkpoint is gone, but for those of the epochs `kept`."""
        wanted = {record.teacher_path(folder, epoch) for epoch in kept | record.epochs(folder.parent).keys()}
        for path in set(folder.glob(record.teacher_path(folder, "*").name)) - wanted if self.weights else ():
            path.unlink()

    def resume(self, checkpoint: Path, epoch: int) -> None:
        """Go on from the teacher beside a checkpoint. InputError if there is none, or of another architecture."""
        if not self.weights:
            return
        path = record.teacher_of(checkpoint)
        tensors = read_state_dict(path)
        if difference := first_difference(self.average, tensors):
            raise InputError(f"{path} is the teacher of another architecture: {difference}.")
        for name, tensor in tensors.items():
            self.average[name].copy_(tensor)
        self._round()
        self.step = epoch * self.steps
