"""timm's Swin Transformer: shifted windows; a convolution runs on the whole map."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..layouts import Layout
from ..ops import IO
from ..sites import AttentionSite, Claims, Observation, Projections, Refusal, Rows, Site
from ..transforms.apply import submodule
from .ffn import claim_ffn
from .paths import block_of

# The mask keeps windows of a rolled map apart; the Layout undoes the roll, so on the whole map nothing is to be masked.
SWIN_IO = IO(ignored=("mask",))


class SwinAdapter:
    """Claims every window attention and every FFN of a timm SwinTransformer (version 1)."""

    name = "timm SwinTransformer"

    def claims(self, model: nn.Module, seen: Observation) -> Claims:
        from timm.layers.mlp import Mlp
        from timm.models.swin_transformer import SwinTransformer, WindowAttention

        if not isinstance(model, SwinTransformer):
            return Claims((), ())
        found: list[Site | Refusal] = []
        for path, module in model.named_modules():
            if type(module) is WindowAttention:
                found.append(_attention(module, path, submodule(model, path.rpartition(".")[0]), seen))
            elif type(module) is Mlp:
                call = seen.once(path)
                tokens = call.x[1] if call is not None and call.x is not None else 1
                found.append(claim_ffn(module, path, Layout(grid=(tokens, 1)), seen))
        return Claims.of(found)


def _attention(module: Any, path: str, block: Any, seen: Observation) -> AttentionSite | Refusal:
    call, around = seen.once(path), seen.once(path.rpartition(".")[0])
    if call is None or call.x is None or around is None or around.x is None:
        return Refusal(path, type(module).__name__, "it did not run exactly once in one forward pass")
    _, height, width, dim = around.x
    layout = Layout(
        pattern="(b nh nw) (h w) c",
        grid=(height, width),
        window=(int(block.window_size[0]), int(block.window_size[1])),
        shift=(int(block.shift_size[0]), int(block.shift_size[1])),
    )
    heads = int(module.num_heads)
    head_dim = int(module.qkv.out_features) // (3 * heads)
    inner = heads * head_dim
    projections = Projections(v=Rows("qkv", 2 * inner, 3 * inner), out=Rows("proj"), heads=heads, head_dim=head_dim)
    return AttentionSite(path, block_of(path), dim, heads, head_dim, layout, SWIN_IO, projections)
