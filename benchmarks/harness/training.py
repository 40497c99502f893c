"""The training that everybody gets: the parent's answers and the labels, AdamW, a cosine."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msa2conv.errors import NonFiniteValue
from msa2conv.progress import track
from msa2conv.search.measure import first_tensor

from .data import Split


@dataclass(frozen=True)
class Schedule:
    """Args:
    epochs: passes over the training images.
    lr: highest learning rate, after a warm-up over a tenth of the steps; a cosine to 0 follows.
    batch_size, weight_decay: as usual.
    """

    epochs: int
    lr: float
    batch_size: int = 64
    weight_decay: float = 0.05


def train(
    model: nn.Module,
    data: Split,
    schedule: Schedule,
    teacher: nn.Module | None = None,
    seed: int = 0,
    what: str = "train",
    progress: bool = False,
) -> nn.Module:
    """Train in place; the loss is half cross entropy, half KL to the teacher (Hinton et al., 2015), or the first alone.

    Args:
        model: on the device where it is to be trained.
        data: images and labels; order and augmentation of every epoch follow from the seed, whatever the model.
        schedule: how long and how fast.
        teacher: in eval mode, on the same device.
        seed: of everything random.
        what, progress: a bar.

    Returns:
        The model, in eval mode.

    Raises:
        NonFiniteValue: the loss became NaN or Inf; says at which step.
    """
    torch.manual_seed(seed)
    with _tensor_cores():
        return _train(model, data, schedule, teacher, seed, what, progress)


@contextmanager
def _tensor_cores() -> Iterator[None]:
    """Products in TF32 where a GPU has it. For training alone: what is measured is float32."""
    kinds = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [kind.allow_tf32 for kind in kinds]
    try:
        for kind in kinds:
            kind.allow_tf32 = True
        yield
    finally:
        for kind, allowed in zip(kinds, before, strict=True):
            kind.allow_tf32 = allowed


def _train(
    model: nn.Module, data: Split, schedule: Schedule, teacher: nn.Module | None, seed: int, what: str, progress: bool
) -> nn.Module:
    device = next(model.parameters()).device
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": schedule.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=schedule.lr)
    steps = schedule.epochs * math.ceil(len(data) / schedule.batch_size)
    model.train().requires_grad_(True)
    step = 0
    for epoch in range(schedule.epochs):
        lessons = data.lessons(schedule.batch_size, 1000 * seed + epoch, teacher)
        for images, labels, answers in track(lessons, f"{what}, epoch {epoch + 1}", progress, steps // schedule.epochs):
            images, labels = images.to(device), labels.to(device)
            for group in optimizer.param_groups:
                group["lr"] = schedule.lr * _share(step, steps)
            loss = _loss(first_tensor(model(images)), labels, answers)
            if not torch.isfinite(loss):
                raise NonFiniteValue(f"{what}, step {step}", f"a loss of {loss}", "a finite one", "Lower `lr`.")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            step += 1
    return model.eval().requires_grad_(False)


def _share(step: int, steps: int) -> float:
    warm_up = max(1, steps // 10)
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


def _loss(output: Tensor, labels: Tensor, answers: Tensor | None) -> Tensor:
    labelled = F.cross_entropy(output, labels)
    if answers is None:
        return labelled
    taught = F.log_softmax(answers.to(output.device), -1)
    return 0.5 * (labelled + F.kl_div(F.log_softmax(output, -1), taught, reduction="batchmean", log_target=True))
