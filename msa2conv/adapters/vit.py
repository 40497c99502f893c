"""timm's VisionTransformer and everything built on its standard attention: ViT, DeiT, DeiT-III, DINOv2, SigLIP, ..."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..layouts import Layout
from ..ops import IO
from ..sites import AttentionSite, Claims, Observation, Projections, Refusal, Rows, Site
from .ffn import claim_ffn
from .paths import block_of

VIT_IO = IO(absent=("attn_mask", "is_causal"))


class VisionTransformerAdapter:
    """Claims every standard attention and every two-layer FFN of a timm VisionTransformer."""

    name = "timm VisionTransformer"

    def claims(self, model: nn.Module, seen: Observation) -> Claims:
        from timm.layers import AttentionPoolLatent
        from timm.layers.mlp import Mlp
        from timm.models.vision_transformer import Attention, VisionTransformer

        if not isinstance(model, VisionTransformer):
            return Claims((), ())
        layout = Layout(grid=_grid(model, seen), prefix=int(model.num_prefix_tokens))
        found: list[Site | Refusal] = []
        for path, module in model.named_modules():
            kind = type(module).__name__
            if type(module) is Attention:
                found.append(_attention(module, path, layout, seen))
            elif type(module) is Mlp and "attn_pool" not in path:
                found.append(claim_ffn(module, path, layout, seen))
            elif isinstance(module, AttentionPoolLatent):
                found.append(Refusal(path, kind, "a pooling head: it does not mix a map, so it is left as it is"))
            elif kind.endswith("ParallelScalingBlock"):
                found.append(Refusal(path, kind, "attention and FFN share one projection: not a module of its own"))
            elif kind in ("DiffAttention", "SwiGLU", "SwiGLUPacked", "GluMlp"):
                found.append(Refusal(path, kind, "not timm's standard Attention or two-layer Mlp: left as it is"))
        return Claims.of(found)


def _grid(model: Any, seen: Observation) -> tuple[int, int]:
    embed = model.patch_embed
    if hasattr(embed, "dynamic_feat_size"):
        height, width = embed.dynamic_feat_size(tuple(seen.inputs.shape[-2:]))
    else:
        height, width = embed.grid_size
    return int(height), int(width)


def _attention(module: Any, path: str, layout: Layout, seen: Observation) -> AttentionSite | Refusal:
    reason = _reason_to_refuse(path, layout, seen)
    if reason:
        return Refusal(path, type(module).__name__, reason)
    heads, head_dim = int(module.num_heads), int(module.head_dim)
    inner = heads * head_dim
    norms = [getattr(module, name, None) for name in ("q_norm", "k_norm", "norm")]
    plain = getattr(module, "gate", None) is None and all(isinstance(n, (nn.Identity, type(None))) for n in norms)
    projections = Projections(
        v=Rows("qkv", 2 * inner, 3 * inner),
        out=Rows("proj"),
        heads=heads,
        head_dim=head_dim,
        q=Rows("qkv", 0, inner) if plain else None,
        k=Rows("qkv", inner, 2 * inner) if plain else None,
        scale=float(module.scale) if plain else None,
    )
    dim = int(module.qkv.in_features)
    return AttentionSite(path, block_of(path), dim, heads, head_dim, layout, VIT_IO, projections)


def _reason_to_refuse(path: str, layout: Layout, seen: Observation) -> str | None:
    call = seen.once(path)
    if call is None:
        return f"it ran {len(seen.calls.get(path, []))} times in one forward pass instead of once"
    if call.x is None or call.x[:2] != (1, layout.prefix + layout.positions):
        return f"its tokens {call.x} are not {layout.prefix} prefix tokens + a {layout.grid[0]} x {layout.grid[1]} grid"
    if call.out != call.x:
        return f"its output {call.out} has not the shape of its input {call.x}"
    if call.keywords:
        return f"it is called with {call.keywords[0]!r}, which a convolution cannot honour"
    return None
