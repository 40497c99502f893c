"""Token merging through the network: Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023, from the paper.

In every block, between attention and FFN, the r most similar pairs merge (bipartite, by the mean of the heads' keys);
attention heeds sizes. For timm's plain ViTs with a class token; the grid of tokens is lost. Nothing is trained.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn


class TokenMerging(nn.Module):
    """A ViT whose blocks merge `schedule[i]` tokens each.

    Args:
        model: timm's VisionTransformer, in eval mode.
        schedule: one number a block.
    """

    def __init__(self, model: VisionTransformer, schedule: tuple[int, ...]) -> None:
        super().__init__()
        self.model, self.schedule = model, schedule

    def forward(self, images: Tensor) -> Tensor:
        model = self.model
        x_BNC = model.norm_pre(model._pos_embed(model.patch_embed(images)))
        size_BN = x_BNC.new_ones(x_BNC.shape[:2])
        for block, going in zip(model.blocks, self.schedule, strict=True):
            x_BNC, size_BN = self._block(block, x_BNC, size_BN, going)
        out: Tensor = model.forward_head(model.norm(x_BNC))
        return out

    def _block(self, block: Block, x_BNC: Tensor, size_BN: Tensor, going: int) -> tuple[Tensor, Tensor]:
        out_BNC, key_BND = _attend(block.attn, block.norm1(x_BNC), size_BN)
        x_BNC = x_BNC + block.ls1(out_BNC)
        if going:
            x_BNC, size_BN = _merge(key_BND[:, 1:], x_BNC, size_BN, going)
        return x_BNC + block.ls2(block.mlp(block.norm2(x_BNC))), size_BN


def token_merging(model: nn.Module, schedule: tuple[int, ...]) -> TokenMerging:
    """The rival, in eval mode."""
    assert isinstance(model, VisionTransformer)
    return TokenMerging(model, schedule).eval()


def constant(model: nn.Module, going: int) -> tuple[int, ...]:
    """The same in every block, save the last: behind its attention nobody asks."""
    assert isinstance(model, VisionTransformer)
    return (going,) * (len(model.blocks) - 1) + (0,)


def _attend(attention: Attention, x_BNC: Tensor, size_BN: Tensor) -> tuple[Tensor, Tensor]:
    """Proportional attention, and the mean of the heads' keys, which cost nothing more."""
    batch, count, dim = x_BNC.shape
    q, k, v = attention.qkv(x_BNC).reshape(batch, count, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
    mask = size_BN.log()[:, None, None, :]
    found = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=attention.scale)
    return attention.proj(found.transpose(1, 2).reshape(batch, count, dim)), k.mean(1)


def _merge(metric_BMD: Tensor, x_BNC: Tensor, size_BN: Tensor, going: int) -> tuple[Tensor, Tensor]:
    unit_BMD = F.normalize(metric_BMD, dim=-1)
    best_BA, partner_BA = (unit_BMD[:, ::2] @ unit_BMD[:, 1::2].transpose(1, 2)).max(-1)
    order_BA = best_BA.argsort(-1)
    stays_BS, goes_BR = order_BA[:, :-going], order_BA[:, -going:]
    to_BR = partner_BA.gather(1, goes_BR)
    weighed_BNC, patch_sizes = x_BNC * size_BN[..., None], size_BN[:, 1:]
    senders, receivers = weighed_BNC[:, 1::2], weighed_BNC[:, 2::2]
    added_RC = receivers.reshape(-1, receivers.shape[2]).index_add(
        0, _flat(to_BR, receivers.shape[1]), _rows(senders, goes_BR).flatten(0, 1)
    )
    received_BDC = added_RC.reshape(receivers.shape)
    sizes_BD = patch_sizes[:, 1::2].scatter_add(1, to_BR, patch_sizes[:, ::2].gather(1, goes_BR))
    size_BN = torch.cat((size_BN[:, :1], patch_sizes[:, ::2].gather(1, stays_BS), sizes_BD), 1)
    summed_BNC = torch.cat((weighed_BNC[:, :1], _rows(senders, stays_BS), received_BDC), 1)
    return summed_BNC / size_BN[..., None], size_BN


def _rows(tokens_BNC: Tensor, index_BM: Tensor) -> Tensor:
    """tokens[b, index[b, m]] -> [B, M, C]; whole rows are copied, as in msa2conv itself."""
    batch, count, channels = tokens_BNC.shape
    return tokens_BNC.reshape(-1, channels).index_select(0, _flat(index_BM, count)).reshape(batch, -1, channels)


def _flat(index_BM: Tensor, count: int) -> Tensor:
    return (index_BM + torch.arange(len(index_BM), device=index_BM.device)[:, None] * count).flatten()
