"""Control: 1x1 convolutions are the only thing that an attention may become."""

from __future__ import annotations

from torch import nn

from msa2conv import Mixer

from .base import Context
from .restricted import Searched


class Conv1x1:
    name, keeps_grid = "conv1x1-only", True

    def shrink(self, parent: nn.Module, budget: int, context: Context) -> nn.Module:
        searched = Searched.of(parent, budget, context, Mixer(ops=("conv1x1",)))
        return searched.solved(searched.calibration.options())


METHODS = [Conv1x1()]
