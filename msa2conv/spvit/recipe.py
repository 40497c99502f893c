"""How the paper trains, as data, and its hard distillation."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from ..errors import InvalidArgument
from ..search.gates import Gates
from .published import architecture

Family = Literal["deit", "swin"]
# What the two halves of the authors' code do differently in their search.
GATES: dict[Family, Gates] = {
    "deit": Gates(init=1.5, alpha=0.01, offsets="columns", skip="identity", exact=False),
    "swin": Gates(init=1.5, alpha=100.0, offsets="centre first", windowed=True, skip="identity", exact=False),
}


class _Data(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Schedule(_Data):
    """One training.

    Args:
        epochs: how many.
        lr, final_lr: of the weights, by a cosine from the first to the second; equal: constant. No warm-up.
        weight_decay: of the weights with two dimensions or more.
    """

    epochs: int = Field(ge=1)
    lr: float = Field(default=1e-4, gt=0)
    final_lr: float = Field(default=1e-4, ge=0)
    weight_decay: float = Field(default=0.05, ge=0)

    def lr_at(self, epoch: float) -> float:
        """The learning rate after `epoch` epochs."""
        return self.final_lr + (self.lr - self.final_lr) * (1 + math.cos(math.pi * epoch / self.epochs)) / 2


class Augmentation(_Data):
    """DeiT's, by timm's names."""

    mixup: float = 0.8
    cutmix: float = 1.0
    auto_augment: str = "rand-m9-mstd0.5-inc1"
    random_erasing: float = 0.25
    label_smoothing: float = 0.1


class Distillation(_Data):
    """Hard distillation: (1 - weight) CE(labels) + weight CE(argmax of the teacher)."""

    teacher: str = "regnety_160.deit_in1k"
    weight: float = Field(default=0.5, ge=0, le=1)
    epochs: int = Field(default=200, ge=1)


class Recipe(_Data):
    """Everything in which the paper's code differs from msa2conv's own gate search.

    Args:
        name: of the published architecture that it leads to.
        base: timm's name of the network.
        gflops: the target; `formula` says in whose FLOPs.
        gates: per-family alpha and order of the kernel's positions, skip as LN1(x) after lowering, Swin's convolutions
            inside windows during the search, the fixed penalty lambda (target - GFLOPs)^2, thresholds that decide.
        formula: "paper", or "counted" by msa2conv's own counter.
        gate_lr: of the thresholds, which have an AdamW of their own without weight decay.
        batch_size: that the learning rates are meant for.
        search, finetune: schedules. Fine-tuning starts again from the original weights.
        picked_epoch: of the search, by eye.
        drop_path, augmentation: of the fine-tuning.
        distillation: of the distilled models, which fine-tune longer.
    """

    name: str
    base: str
    gflops: float = Field(gt=0, allow_inf_nan=False)
    gates: Gates
    formula: Literal["paper", "counted"] = "paper"
    gate_lr: float = Field(default=1e-3, gt=0)
    batch_size: int = Field(default=1024, ge=1)
    search: Schedule = Schedule(epochs=20)
    finetune: Schedule = Schedule(epochs=130, final_lr=1e-5)
    picked_epoch: int | None = None
    drop_path: float = Field(default=0.1, ge=0, lt=1)
    augmentation: Augmentation = Augmentation()
    distillation: Distillation = Distillation()

    @property
    def family(self) -> Family:
        """Whose half of the authors' code it follows."""
        return "swin" if self.base.startswith("swin") else "deit"


def config(name: str, **changes: Any) -> Recipe:
    """The recipe that led to a published architecture.

    Args:
        name: of the architecture; `published()` lists them.
        changes: fields of Recipe to set otherwise; `penalty=` sets that field of its gates.

    Raises:
        InvalidArgument: no such name or field, or a value out of range.

    Example:
        >>> config("swin_tiny").gates.alpha, config("deit_tiny", gflops=0.8, penalty=5.0).gates.penalty
        (100.0, 5.0)
    """
    wanted = architecture(name)
    found = wanted.search
    assert found is not None
    gates = dict(changes.pop("gates", {**dict(GATES[wanted.family]), "penalty": found.penalty}))
    if "penalty" in changes:
        gates["penalty"] = changes.pop("penalty")
    fields: dict[str, Any] = {
        "name": name,
        "base": wanted.base,
        "gflops": found.gflops,
        "gates": gates,
        "gate_lr": found.gate_lr,
        "picked_epoch": found.epoch,
        "drop_path": found.drop_path,
    }
    try:
        return Recipe.model_validate(fields | changes)
    except ValidationError as error:
        first = error.errors()[0]
        raise InvalidArgument(
            ".".join(map(str, first["loc"])), f"{first['input']!r} ({first['msg'].lower()})",
            f"a field of Recipe: {', '.join(Recipe.model_fields)}", "print(msa2conv.spvit.config(name)) shows them.",
        ) from error  # fmt: skip


def hard_distillation(logits: Tensor, labels: Tensor, teacher_logits: Tensor, weight: float = 0.5) -> Tensor:
    """(1 - weight) CE(logits, labels) + weight CE(logits, argmax of the teacher).

    Args:
        logits: the student's [B, classes].
        labels: class indices [B], or probabilities [B, classes] (mixup, smoothing).
        teacher_logits: [B, classes]; no gradient flows into them.
        weight: of the teacher.

    Source: Touvron et al., "Training data-efficient image transformers & distillation through attention", ICML 2021.
    """
    taught = F.cross_entropy(logits, teacher_logits.detach().argmax(1))
    return (1 - weight) * F.cross_entropy(logits, labels) + weight * taught
