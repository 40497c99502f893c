"""Models that a command line names: by timm, with a checkpoint, or as a hybrid's original."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from ..adapters.build import build, create
from ..adapters.weights import downloaded, fill, from_checkpoint
from ..errors import ArchitectureMismatch
from ..files import read_state_dict
from ..plan import Plan, weights_sha256
from .shown import say


def named(name: str, pretrained: bool, checkpoint: Path | None, num_classes: int | None) -> nn.Module:
    """In eval mode, with weights from a file, downloaded, or random."""
    kwargs: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    if checkpoint is not None:
        return from_checkpoint(name, checkpoint, **kwargs)
    if not pretrained:
        return create(name, **kwargs).eval()
    create(name)  # an unknown name is told apart from missing weights
    return downloaded(name, "pass --checkpoint FILE, or --no-pretrained for random weights", **kwargs)


def original_of(plan: Plan, checkpoint: Path) -> nn.Module:
    """What was converted, in eval mode."""
    if plan.base.builder is None:
        raise ArchitectureMismatch(
            str(checkpoint), f"a Plan for {plan.base.model_class} without a builder", "a timm model",
            "Evaluate in Python.",
        )  # fmt: skip
    model = build(plan.base.builder)
    fill(model, read_state_dict(checkpoint), str(checkpoint))
    if weights_sha256(model) != plan.base.weights_sha256:
        say(f"[yellow]warning:[/yellow] {checkpoint} holds other weights than those that were converted")
    return model.eval()
