"""SPViT as published (He et al., TPAMI 2024): the paper's search by labels, then fine-tuning of the original weights.

Three figures of the paper are scaled to the length and the size of an experiment: its penalty is a weight on squared
GFLOPs, its thresholds learn at 1e-3 for some 25,000 steps, and its thresholds alone decide what the network costs,
which misses budgets by 4 to 40 %; the exact solver finishes instead, so that the row may stand beside the others.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from msa2conv import Search, apply, count_flops, errors, make_plan, spvit

from .base import Context

_PAPER = {"deit": ("deit_tiny", 1.26), "swin": ("swin_tiny", 4.5)}  # architecture, GFLOPs of its dense network
_TRAVEL = 15.0  # what all steps together may move a threshold by, which starts at 1.5


class SPViT:
    name, keeps_grid = "spvit", True

    def shrink(self, parent: nn.Module, budget: int, context: Context) -> nn.Module:
        epochs = context.search_for(max(1, context.schedule.epochs // 2))
        if not epochs:
            raise errors.InvalidArgument(
                "epochs", "0", "at least 1", "A gate search trains: leave it out of an experiment without training."
            )
        data, schedule = context.train, context.schedule
        steps = epochs * -(-len(data) // schedule.batch_size)
        search, recipe = _prepared(parent, budget, context, steps)
        optimizers = spvit.optimizers(search, recipe)
        for epoch in range(epochs):
            for images, labels in data.batches(schedule.batch_size, seed=1000 * context.seed + 500 + epoch):
                images, labels = images.to(context.device), labels.to(context.device)
                loss = F.cross_entropy(search.model(images), labels) + search.penalty()
                for optimizer in optimizers:
                    optimizer.zero_grad(set_to_none=True)
                loss.backward()
                for optimizer in optimizers:
                    optimizer.step()
        plan, _ = make_plan(parent, search.inspection, search.decide())
        context.note_plan(plan)
        context.note(searched_to=search.flops())
        torch.manual_seed(context.seed)
        return apply(plan, parent).eval()


def _prepared(parent: nn.Module, budget: int, context: Context, steps: int) -> tuple[Search, spvit.Recipe]:
    name, gflops = _PAPER["swin" if "swin" in type(parent).__name__.lower() else "deit"]
    base = count_flops(parent, context.example) / 1e9
    paper = spvit.config(name)
    gates = paper.gates.model_copy(update={"exact": True, "penalty": paper.gates.penalty * (gflops / base) ** 2})
    recipe = paper.model_copy(
        update={
            "gates": gates, "gflops": budget / 1e9, "formula": "counted",
            "gate_lr": max(paper.gate_lr, _TRAVEL / steps),
            "search": paper.search.model_copy(update={"lr": context.schedule.lr}),
        }
    )  # fmt: skip
    return spvit.prepare(parent, recipe, steps=steps, example_inputs=context.example), recipe


METHODS = [SPViT()]
