"""msa2conv: the calibrated search, without gradients and labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

import msa2conv
from msa2conv.inspection import Levers

from .base import Context


@dataclass(frozen=True)
class Calibrated:
    """Args:
    name: in tables.
    levers: of `msa2conv.convert`.
    """

    name: str
    levers: Levers | None = None
    keeps_grid: bool = True

    def shrink(self, parent: nn.Module, budget: int, context: Context) -> nn.Module:
        result = converted(parent, budget, context, self.levers)
        context.note_plan(result.plan)
        return result.model


def converted(
    parent: nn.Module, budget: int, context: Context, levers: Levers | None = None, **also: Any
) -> msa2conv.Conversion:
    """`msa2conv.convert` on the calibration images; one calibration serves all budgets of a seed.

    Args:
        also: of a budget of time.
    """
    return msa2conv.convert(
        parent, context.target(budget), levers=levers, calibration=calibrated(parent, context, levers),
        example_inputs=context.example, seed=context.seed, progress=context.progress, **also,
    )  # fmt: skip


def calibrated(parent: nn.Module, context: Context, levers: Levers | None) -> msa2conv.Calibration:
    """`msa2conv.calibrate` on the calibration images."""

    def make() -> msa2conv.Calibration:
        images, _ = context.calibration()
        return msa2conv.calibrate(
            parent, images, images=len(images), levers=levers, example_inputs=context.example, seed=context.seed,
            progress=context.progress,
        )  # fmt: skip

    return context.once(("calibration", levers), make)


METHODS = [
    Calibrated("ours"),
    Calibrated("ours-no-merging", ("mixer", "ffn", "linear_ffn", "thin_attention")),
    Calibrated("ours-mixers", ("mixer", "ffn")),
]
