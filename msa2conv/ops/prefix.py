"""What becomes of prefix tokens where patches are convolved.

Shape suffixes: B batch, P prefix tokens, N tokens, C channels, H W grid, R rank, K heads, D head dim, O I out in.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ..layouts import Layout
from .base import Spec, Width


class RidgePrefix(Spec):
    """Each prefix token: one linear function of (its own value, mean of the patches, 1)."""

    kind: Literal["ridge"] = "ridge"


class AttendPrefix(Spec):
    """Prefix tokens keep the host's own attention, as queries only: exact for plain softmax attention.

    Keys and values are folded into the query and the output (q W_k is formed once per query, W_v is applied after
    averaging), so its cost is about P (4 C K D + 2 K N C) multiply-adds instead of N-token projections.
    """

    kind: Literal["attend"] = "attend"
    heads: Width
    head_dim: Width
    bias: bool = True
    scale: float = Field(gt=0, allow_inf_nan=False)


class PassPrefix(Spec):
    """Prefix tokens come out as they went in: what SPViT's convolutions do with the class token."""

    kind: Literal["pass"] = "pass"


Prefix = Annotated[RidgePrefix | AttendPrefix | PassPrefix, Field(discriminator="kind")]


class PrefixRidge(nn.Module):
    """out_p = W_p (own value, mean of the patches) + b_p; weight_POI [P, C, 2C]."""

    def __init__(self, prefix: int, dim: int) -> None:
        super().__init__()
        self.weight_POI = nn.Parameter(torch.zeros(prefix, dim, 2 * dim))
        self.bias_PO = nn.Parameter(torch.zeros(prefix, dim))

    def forward(self, prefix_BPC: Tensor, mean_BC: Tensor, tokens_BNC: Tensor) -> Tensor:
        own_and_mean_PBI = torch.cat((prefix_BPC, mean_BC[:, None].expand_as(prefix_BPC)), -1).transpose(0, 1)
        return torch.bmm(own_and_mean_PBI, self.weight_POI.transpose(1, 2)).transpose(0, 1) + self.bias_PO


class Folded(nn.Module):
    """The weights of a Linear that is folded into others and never called; tools that replace Linears leave it."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias


class PrefixAttention(nn.Module):
    """The rows of softmax attention that belong to the prefix tokens, with keys and values folded away.

    With x_n the tokens: score = (W_k^T q) . x_n (the key bias adds the same to every n and cancels in the softmax),
    out = W_o (W_v sum_n softmax(score)_n x_n + b_v) + b_o.
    """

    def __init__(self, spec: AttendPrefix, dim: int) -> None:
        super().__init__()
        self.heads, self.head_dim, self.scale = spec.heads, spec.head_dim, spec.scale
        inner = spec.heads * spec.head_dim
        self.q = nn.Linear(dim, inner, bias=spec.bias)
        self.k = Folded(nn.Linear(dim, inner, bias=False))
        self.v = Folded(nn.Linear(dim, inner, bias=spec.bias))
        self.proj = nn.Linear(inner, dim)

    def forward(self, prefix_BPC: Tensor, mean_BC: Tensor, tokens_BNC: Tensor) -> Tensor:
        batch, count, dim = prefix_BPC.shape
        heads, head_dim = self.heads, self.head_dim
        q_BPKD = (self.q(prefix_BPC) * self.scale).reshape(batch, count, heads, head_dim)
        q_KLD = q_BPKD.permute(2, 0, 1, 3).reshape(heads, batch * count, head_dim)
        folded_KLC = torch.bmm(q_KLD, self.k.weight.reshape(heads, head_dim, dim))
        folded_BLC = folded_KLC.reshape(heads, batch, count, dim).permute(1, 0, 2, 3).reshape(batch, -1, dim)
        weights_BLN = torch.bmm(folded_BLC, tokens_BNC.transpose(1, 2)).softmax(-1)
        averaged_BKPC = torch.bmm(weights_BLN, tokens_BNC).reshape(batch, heads, count, dim)
        averaged_KLC = averaged_BKPC.transpose(0, 1).reshape(heads, batch * count, dim)
        v_KLD = torch.bmm(averaged_KLC, self.v.weight.reshape(heads, head_dim, dim).transpose(1, 2))
        v_BPI = v_KLD.reshape(heads, batch, count, head_dim).permute(1, 2, 0, 3).reshape(batch, count, -1)
        if self.v.bias is not None:
            v_BPI = v_BPI + self.v.bias
        out: Tensor = self.proj(v_BPI)
        return out


class PrefixPass(nn.Module):
    def forward(self, prefix_BPC: Tensor, mean_BC: Tensor | None, tokens_BNC: Tensor) -> Tensor:
        return prefix_BPC


def prefix_module(prefix: Prefix | None, layout: Layout, dim: int) -> nn.Module | None:
    if not layout.prefix:
        return None
    if isinstance(prefix, PassPrefix):
        return PrefixPass()
    return PrefixAttention(prefix, dim) if isinstance(prefix, AttendPrefix) else PrefixRidge(layout.prefix, dim)
