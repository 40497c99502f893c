"""Optimiser, schedule, averages of the weights, mixing of images (timm's), and BatchNorm statistics."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .objectives import Mix
from .stages import Stage


def optimizer_for(module: nn.Module, stage: Stage) -> torch.optim.Optimizer:
    """AdamW over what requires a gradient; no decay for parameters of one dimension."""
    from timm.optim import param_groups_weight_decay

    groups = param_groups_weight_decay(module, stage.weight_decay)
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=stage.rate)


def cosine(optimizer: torch.optim.Optimizer, stage: Stage, steps: int) -> Callable[[int], None]:
    """timm's warm-up and cosine, as a function of the step alone."""
    from timm.scheduler import CosineLRScheduler

    warm_up = int(stage.warmup * steps)
    schedule = CosineLRScheduler(
        optimizer, t_initial=max(2, steps - warm_up), lr_min=stage.final_lr, warmup_t=warm_up,
        warmup_lr_init=stage.rate / 100, warmup_prefix=True, t_in_epochs=False,
    )  # fmt: skip
    return schedule.step_update


def mixup(stage: Stage, classes: int) -> Mix | None:
    """timm's Mixup and CutMix, if the stage asks for them and there are labels to mix."""
    if not classes or not (stage.mixup or stage.cutmix):
        return None
    from timm.data import Mixup

    make: Any = Mixup
    mix: Mix = make(stage.mixup, stage.cutmix, label_smoothing=stage.smoothing, num_classes=classes)
    return mix


class Average:
    """timm's exponential moving average of a student's weights; its buffers are copied."""

    def __init__(self, student: nn.Module, decay: float) -> None:
        from timm.utils import ModelEmaV3

        self.student = student
        self._average = ModelEmaV3(student, decay, use_warmup=True)
        self.model: nn.Module = self._average.module

    def update(self, step: int) -> None:
        """After step number `step`."""
        self._average.update(self.student, step + 1)


def norms_of(model: nn.Module) -> list[nn.Module]:
    """BatchNorms that keep statistics."""
    kinds = nn.modules.batchnorm._BatchNorm
    return [m for m in model.modules() if isinstance(m, kinds) and m.track_running_stats]


@torch.no_grad()
def reestimate_norms(model: nn.Module, norms: Iterable[Any], images: Iterable[Tensor]) -> None:
    """Measure the statistics of these BatchNorms anew, as means over these batches, with the weights as they are now.

    As PyTorch's `update_bn`, but with everything else (dropout, other norms) in eval mode, as it will be used.
    """
    modes: dict[Any, bool] = {module: module.training for module in model.modules()}
    momenta = {norm: norm.momentum for norm in norms}
    model.eval()
    for norm in momenta:
        norm.reset_running_stats()
        norm.momentum = None  # a mean, not a moving one
        norm.train()
    for batch in images:
        model(batch)
    for norm, momentum in momenta.items():
        norm.momentum = momentum
    for module, mode in modes.items():
        module.training = mode
