"""msa2conv under a budget of time beside the one of multiply-adds: the same share of both."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from msa2conv.flops import count_flops

from .base import Context
from .ours import converted


@dataclass(frozen=True)
class InTime:
    """Args:
    name: in tables.
    batch: how many images at once the time is that of.
    """

    name: str
    batch: int
    keeps_grid: bool = True

    def shrink(self, parent: nn.Module, budget: int, context: Context) -> nn.Module:
        context.in_time = True
        share = round(budget / count_flops(parent, context.example), 3)
        result = converted(
            parent, budget, context,
            latency_target=share, batch_size=self.batch, device=context.time_on,
        )  # fmt: skip
        context.note_plan(result.plan)
        context.note(latency=str(result.report.latency))
        return result.model


METHODS = [InTime("ours-time-1", 1), InTime("ours-time-32", 32)]
