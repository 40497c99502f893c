"""Token merging through the network (Bolya et al., ICLR 2023): about as many tokens go in every block; ViTs only."""

from __future__ import annotations

import copy

from timm.models.vision_transformer import VisionTransformer
from torch import nn

from msa2conv import count_flops
from msa2conv.errors import InvalidArgument

from ..rivals.token_merging import constant, token_merging
from .base import Context


class TokenMerging:
    name, keeps_grid = "token-merging", False

    def shrink(self, parent: nn.Module, budget: int, context: Context) -> nn.Module:
        if not isinstance(parent, VisionTransformer):
            raise InvalidArgument("parent", type(parent).__name__, "a plain ViT", "Windows cannot merge their tokens.")

        def flops(schedule: tuple[int, ...]) -> int:
            return count_flops(token_merging(parent, schedule), context.example)

        going = 0
        while flops(constant(parent, going + 1)) > budget:
            going += 1
        schedule = constant(parent, going)
        for block in range(len(schedule) - 1):  # one more, where that does not take more than there is to save
            more = (*schedule[:block], going + 1, *schedule[block + 1 :])
            if flops(schedule) > budget and flops(more) >= 0.99 * budget:
                schedule = more
        context.note(schedule=list(schedule))
        return token_merging(copy.deepcopy(parent), schedule)


METHODS = [TokenMerging()]
