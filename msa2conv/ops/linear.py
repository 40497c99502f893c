"""What stands for an FFN: a linear function of each token alone.

Shape suffixes: B batch, N tokens, C channels, R rank.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from .base import IO, Spec, TokenMixer, Width
from .sequence import Arrangement


class Linear(Spec):
    """W x + b of every token, whatever their number.

    Args:
        arrangement: how the tokens lie.
        dim: channels in and out.
        rank: of W; as many as there are channels: one layer C -> C, fewer: C -> rank -> C, 0: b alone.
    """

    kind: Literal["linear"] = "linear"
    arrangement: Arrangement = "b n c"
    dim: Width
    rank: Annotated[int, Field(ge=0, le=65536)]

    @property
    def bottleneck(self) -> bool:
        """Whether there are two layers."""
        return 0 < self.rank < self.dim

    def flops(self, tokens: int) -> int:
        """Multiply-adds on so many tokens."""
        return tokens * self.dim * (2 * self.rank if self.bottleneck else min(self.rank, self.dim))

    def build(self, io: IO) -> TokenMixer:
        return LinearMixer(self, io)


class LinearMixer(TokenMixer):
    """Parameters: reduce [R, C] of a bottleneck; expand [C, R or C] with its bias, or the bias [C] alone."""

    def __init__(self, spec: Linear, io: IO) -> None:
        super().__init__(spec, io)
        self.channels_first = spec.arrangement == "b c h w"
        self.reduce = nn.Linear(spec.dim, spec.rank, bias=False) if spec.bottleneck else None
        self.expand = nn.Linear(spec.rank if spec.bottleneck else spec.dim, spec.dim) if spec.rank else None
        self.bias = None if spec.rank else nn.Parameter(torch.zeros(spec.dim))

    def mix(self, x: Tensor) -> Tensor:
        x = x.movedim(1, -1) if self.channels_first else x
        if self.expand is None:
            assert self.bias is not None
            out = self.bias.to(x.dtype).expand_as(x).clone()  # who called may add to it in place
        else:
            out = self.expand(x if self.reduce is None else self.reduce(x))
        return out.movedim(-1, 1) if self.channels_first else out


__all__ = ["Linear", "LinearMixer"]
