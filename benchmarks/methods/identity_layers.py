"""Control: the attentions that msa2conv replaces become nothing instead (as in lambda-ViT); FFNs take what is left."""

from __future__ import annotations

from torch import nn

from .base import Context
from .restricted import Searched, named


class IdentityLayers:
    name, keeps_grid = "identity-same-layers", True

    def shrink(self, parent: nn.Module, budget: int, context: Context) -> nn.Module:
        searched = Searched.of(parent, budget, context)
        every, chosen = searched.calibration.options(), searched.chosen()
        skips = {p: option for p, o in chosen.items() if o.edits for option in named(every[p], "skip")}
        allowed = {p: named(every[p], "skip" if p in skips else "attention") for p in chosen}
        # nothing costs less than a convolution: where all would leave budget over, the dearest losses stay attentions
        for path in sorted(skips, key=lambda path: skips[path].score or 0.0, reverse=True):
            if searched.most(searched.with_attentions(allowed)) >= 0.995 * budget:
                break
            allowed[path] = named(every[path], "attention")
        return searched.solved(searched.with_attentions(allowed))


METHODS = [IdentityLayers()]
