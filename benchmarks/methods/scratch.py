"""Control: the architecture that `ours` ends with, from fresh weights."""

from __future__ import annotations

import torch
from torch import nn

from .base import Context
from .ours import converted


class Scratch:
    name, keeps_grid = "from-scratch", True

    def shrink(self, parent: nn.Module, budget: int, context: Context) -> nn.Module:
        result = converted(parent, budget, context)
        context.note_plan(result.plan)
        torch.manual_seed(context.seed)
        return fresh(result.model)


@torch.no_grad()
def fresh(model: nn.Module) -> nn.Module:
    """Every layer as PyTorch starts it; tokens, positions and bias tables as timm does."""
    for module in model.modules():
        reset = getattr(module, "reset_parameters", None)
        if callable(reset):
            reset()
            continue
        for parameter in module.parameters(recurse=False):
            if parameter.ndim > 1:
                nn.init.trunc_normal_(parameter, std=0.02)
            else:
                nn.init.zeros_(parameter)
    return model


METHODS = [Scratch()]
