"""Learned gates: thresholds that open or close, drawn once per forward pass while training, fixed in evaluation.

Straight-through binary concrete (Maddison et al., ICLR 2017; SPViT, TPAMI 2024): z = 1[theta + logit(u) > 0] with the
gradient of sigmoid(theta + logit(u)). Annealed: z = sigmoid(theta / temperature), no sampling.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

Sampling = Literal["concrete", "annealed"]


class Gate(nn.Module):
    """`count` thresholds; independent, or in order (a gate is open only if those before it are).

    Args:
        count: how many.
        init: start value; sigmoid(theta) is the probability of being open.
        ordered: multiply cumulatively: skip < 1x1 < 3x3 < attention.
        sampling: what training sees.

    Example:
        >>> Gate(3, ordered=True).eval()()
        tensor([1., 1., 1.], grad_fn=<CumprodBackward0>)
    """

    temperature: Tensor

    def __init__(self, count: int, init: float = 1.5, ordered: bool = False, sampling: Sampling = "concrete") -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.full((count,), init))
        self.ordered, self.sampling = ordered, sampling
        self.register_buffer("temperature", torch.ones(()))
        self.uniforms: Tensor | None = None
        self.fixed: Tensor | None = None

    def forward(self) -> Tensor:
        """Values in 0..1 [count] that multiply what they gate."""
        z = self._values()
        return torch.cumprod(z, 0) if self.ordered else z

    def _values(self) -> Tensor:
        theta = self.theta
        if self.fixed is not None:
            return self.fixed.to(theta)
        if not self.training:
            return straight_through(is_open(theta), theta.sigmoid())
        if self.sampling == "annealed":
            return (theta / self.temperature.clone()).sigmoid()  # it changes between forward and backward
        u = torch.rand_like(theta) if self.uniforms is None else self.uniforms.to(theta)
        soft = (theta + torch.logit(u, 1e-7)).sigmoid()
        return straight_through(soft > 0.5, soft)

    def decision(self) -> Tensor:
        """The thresholded decision 1[sigmoid(theta) > 0.5] [count], with the gradient of sigmoid(sigmoid(theta) - 0.5).

        What a budget must be measured on: with sampled gates in the penalty a search ends above its target.
        """
        p = self.theta.sigmoid()
        k = straight_through(p > 0.5, (p - 0.5).sigmoid())
        return torch.cumprod(k, 0) if self.ordered else k

    @contextmanager
    def pinned(self, values: Tensor) -> Iterator[None]:
        """Use these values (before the cumulative product) instead of the thresholds."""
        self.fixed = values
        try:
            yield
        finally:
            self.fixed = None

    def extra_repr(self) -> str:
        return f"{len(self.theta)}, ordered={self.ordered}, sampling={self.sampling}"


def is_open(theta: Tensor) -> Tensor:
    return theta.sigmoid() > 0.5


def straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    """The value of `hard`, the gradient of `soft`."""
    return hard.to(soft) + (soft - soft.detach())
