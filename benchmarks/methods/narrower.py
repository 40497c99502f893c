"""A control: msa2conv in a network that has fewer channels to begin with, whatever that costs."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn

import msa2conv
from msa2conv.levers import DEFAULT

from .base import Context
from .ours import calibrated

_LEVERS = (*DEFAULT, "width")


@dataclass(frozen=True)
class Narrower:
    """All of the default levers, in whichever of two narrower networks is closer to the parent."""

    name: str = "ours-narrower"
    keeps_grid: bool = True

    def shrink(self, parent: nn.Module, budget: int, context: Context) -> nn.Module:
        calibration = replace(calibrated(parent, context, _LEVERS), records=[])  # nothing is left to do at full width
        result = msa2conv.convert(
            parent, context.target(budget), calibration=calibration, example_inputs=context.example,
            seed=context.seed, progress=context.progress,
        )  # fmt: skip
        context.note_plan(result.plan)
        return result.model


METHODS = [Narrower()]
