"""FFNs alone are narrowed: by the size of weights (the same share everywhere, or one ranking), or by Taylor scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

from .base import Context
from .surgery import FFNs, magnitudes


@dataclass(frozen=True)
class FFNOnly:
    """Args:
    name: in tables.
    by: what the units are ranked by.
    uniform: the same share of every FFN; else one ranking of all units.
    """

    name: str
    by: Literal["magnitude", "taylor"]
    uniform: bool
    keeps_grid: bool = True

    def shrink(self, parent: nn.Module, budget: int, context: Context) -> nn.Module:
        ffns = FFNs.of(parent, context)
        if self.by == "taylor":
            images, labels = context.calibration()
            scores = ffns.taylor(parent, images.to(context.device), labels)
        else:
            scores = magnitudes(parent, ffns.sites)
        widths = ffns.uniform(budget) if self.uniform else ffns.ranked(scores, budget)
        context.note(widths=widths)
        return ffns.narrowed(parent, ffns.best(scores, widths))


METHODS = [
    FFNOnly("ffn-uniform-magnitude", "magnitude", uniform=True),
    FFNOnly("ffn-taylor", "taylor", uniform=False),
]
