"""msa2conv's gate search: weight-shared candidates and learned thresholds, for half of the epochs."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

import msa2conv
from msa2conv import Gates

from .base import Context


@dataclass(frozen=True)
class Gated:
    """Args:
    name: in tables.
    gates: how the search works.
    """

    name: str
    gates: Gates
    keeps_grid: bool = True

    def shrink(self, parent: nn.Module, budget: int, context: Context) -> nn.Module:
        epochs = context.search_for(max(1, context.schedule.epochs // 2))
        if not epochs:
            raise msa2conv.errors.InvalidArgument(
                "epochs", "0", "at least 1", "A gate search trains: leave it out of an experiment without training."
            )
        result = msa2conv.convert(
            parent, context.target(budget), search=self.gates, data=context.train.loader(context.schedule.batch_size),
            epochs=epochs, lr=context.schedule.lr, example_inputs=context.example, seed=context.seed,
            progress=context.progress,
        )  # fmt: skip
        context.note_plan(result.plan)
        return result.model.eval()


METHODS = [Gated("ours-gates", Gates(sampling="annealed"))]
