"""msa2conv: the calibrated search, without gradients and labels."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

import msa2conv
from msa2conv.inspection import Levers

from .base import Context


@dataclass(frozen=True)
class Calibrated:
    """Args:
    name: in tables.
    levers: of `msa2conv.convert`.
    keeps_grid: whether these do.
    """

    name: str
    levers: Levers | None = None
    keeps_grid: bool = True

    def shrink(self, parent: nn.Module, budget: int, context: Context) -> nn.Module:
        result = converted(parent, budget, context, self.levers)
        context.note(plan=result.plan.model_dump(mode="json"), picture=str(result.plan))
        return result.model


def converted(parent: nn.Module, budget: int, context: Context, levers: Levers | None = None) -> msa2conv.Conversion:
    """`msa2conv.convert` on the calibration images."""
    images, _ = context.calibration()
    return msa2conv.convert(
        parent, context.target(budget), data=images, images=len(images), levers=levers, example_inputs=context.example,
        seed=context.seed, progress=context.progress,
    )  # fmt: skip


METHODS = [
    Calibrated("ours"),
    Calibrated("ours-all", "all", keeps_grid=False),
    Calibrated("ours-no-merging", ("mixer", "ffn", "thin_attention")),
    Calibrated("ours-mixers", ("mixer", "ffn")),
]
