"""A plain softmax attention that owns its weights: fewer heads, or thinner ones, than the host had.

Shape suffixes: B batch, N tokens, C channels, K heads, E width of a query, V width of a value.
"""

from __future__ import annotations

from typing import Any, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from .base import IO, Spec, TokenMixer, Width
from .sequence import Arrangement, Sizes, arranged, as_sequence


class Attend(Spec):
    """softmax(scale q k^T + mask) v by heads, with queries and values of widths of their own.

    Args:
        arrangement: how its tokens lie.
        dim: channels in and out.
        heads, qk_dim, v_dim: how many heads there are, and how wide q, k and v of each are.
        scale: of the scores.
        bias: whether q and v have one (the bias of a key adds the same to every score, and cancels).
        sizes: under which name it takes a mask.
        fused: let one linear layer make q, k and v.
    """

    kind: Literal["attend"] = "attend"
    arrangement: Arrangement = "b n c"
    dim: Width
    heads: Width
    qk_dim: Width
    v_dim: Width
    scale: float = Field(gt=0, allow_inf_nan=False)
    bias: bool = True
    sizes: Sizes | None = None
    fused: bool = False

    @property
    def widths(self) -> tuple[int, int, int]:
        """Channels of q, k and v."""
        return self.heads * self.qk_dim, self.heads * self.qk_dim, self.heads * self.v_dim

    def flops(self, tokens: int) -> int:
        """Multiply-adds on one sequence of so many tokens."""
        _, of_k, of_v = self.widths
        return (2 * tokens * self.dim + tokens**2) * (of_k + of_v)

    def build(self, io: IO) -> TokenMixer:
        return AttendMixer(self, io)


class AttendMixer(TokenMixer):
    """Parameters: q, k [K E, C], v [K V, C], all in qkv if fused; proj [C, K V]."""

    def __init__(self, spec: Attend, io: IO) -> None:
        super().__init__(spec, io)
        self.arrangement, self.heads, self.scale, self.sizes = spec.arrangement, spec.heads, spec.scale, spec.sizes
        self.widths = of_q, of_k, of_v = spec.widths
        if spec.fused:
            self.qkv = nn.Linear(spec.dim, sum(spec.widths), bias=spec.bias)
        else:
            self.q = nn.Linear(spec.dim, of_q, bias=spec.bias)
            self.k = nn.Linear(spec.dim, of_k, bias=False)
            self.v = nn.Linear(spec.dim, of_v, bias=spec.bias)
        self.fused = spec.fused
        self.proj = nn.Linear(of_v, spec.dim)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.sizes is None:
            return super().forward(*args, **kwargs)
        given = self.io.arguments(args, kwargs)
        mask = given.pop(self.sizes.argument, None)
        x = args[0] if args else kwargs[self.io.x]
        if mask is not None and self.sizes.shape == "b n":
            mask = mask[:, None, None, :]
        return self._returned(self.mix(self._bind((x,), given), mask), given)

    def mix(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        tokens_BNC = as_sequence(x, self.arrangement)
        out_BNC = self.proj(self.attended(tokens_BNC, mask))
        return arranged(out_BNC, self.arrangement, x.shape)

    def attended(self, tokens_BNC: Tensor, mask: Tensor | None = None) -> Tensor:
        """What the output projection reads: the averaged values of all heads, [B, N, K V]."""
        if self.fused:
            made = self.qkv(tokens_BNC).split(self.widths, -1)
        else:
            made = tuple(layer(tokens_BNC) for layer in (self.q, self.k, self.v))
        q, k, v = (each.unflatten(-1, (self.heads, -1)).transpose(1, 2) for each in made)
        return _attention(q, k, v, mask, self.scale).transpose(1, 2).flatten(2)


def _attention(q_BKNE: Tensor, k_BKNE: Tensor, v_BKNV: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """On a CPU, PyTorch fuses attention for queries as wide as values only; what it does else looks for empty rows."""
    if q_BKNE.device.type != "cpu" or q_BKNE.shape[-1] == v_BKNV.shape[-1]:
        return F.scaled_dot_product_attention(q_BKNE, k_BKNE, v_BKNV, attn_mask=mask, scale=scale)
    scores_BKNN = (q_BKNE * scale) @ k_BKNE.transpose(2, 3)
    return (scores_BKNN if mask is None else scores_BKNN + mask).softmax(-1) @ v_BKNV
