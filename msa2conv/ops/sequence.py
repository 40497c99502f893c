"""Tokens as a module takes them, and as one sequence.

Shape suffixes: B batch, N tokens, C channels.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from .base import Spec

Arrangement = Literal["b n c", "n b c", "b h w c", "b c h w"]


class Sizes(Spec):
    """How an attention is told how many tokens stand behind each of its tokens: an additive mask log(size).

    A token of size s then counts like s equal tokens, in softmax(q k^T + log s): "proportional attention" of Bolya et
    al., "Token Merging: Your ViT But Faster", ICLR 2023.

    Args:
        argument: name of the mask.
        shape: "b 1 1 n", as scaled_dot_product_attention broadcasts it, or "b n" (a key padding mask).
    """

    argument: Annotated[str, Field(min_length=1, max_length=64)]
    shape: Literal["b 1 1 n", "b n"] = "b 1 1 n"

    def mask(self, size_BN: Tensor) -> Tensor:
        log_BN = size_BN.log()
        return log_BN[:, None, None, :] if self.shape == "b 1 1 n" else log_BN


def as_sequence(x: Tensor, arrangement: Arrangement) -> Tensor:
    """Tokens as a module takes them -> [B, N, C]."""
    if arrangement == "b n c":
        return x
    if arrangement == "n b c":
        return x.transpose(0, 1)
    return x.flatten(1, 2) if arrangement == "b h w c" else x.flatten(2).transpose(1, 2)


def arranged(tokens_BNC: Tensor, arrangement: Arrangement, shape: torch.Size | None = None) -> Tensor:
    """[B, N, C] -> as a module takes them; of the shape given, else a map of one column."""
    if arrangement == "b n c":
        return tokens_BNC
    if arrangement == "n b c":
        return tokens_BNC.transpose(0, 1)
    if arrangement == "b h w c":
        return tokens_BNC[:, :, None] if shape is None else tokens_BNC.reshape(shape)
    columns_BCN = tokens_BNC.transpose(1, 2)
    return columns_BCN[..., None] if shape is None else columns_BCN.reshape(shape)
