"""PyTorch's own attention, and torchvision's backbones."""

from __future__ import annotations

from torch import nn

from ..kernels import Rows
from ..layouts import APART, SIDE_BY_SIDE, Layout
from ..sites import Projections
from .declared import FFN, Attention, Declarations, qkv
from .geometry import Place, Unknown, channels_last, checked, pair, tokens


def _multihead(module: nn.MultiheadAttention) -> Projections | None:
    """Its three projections are one parameter, by heads."""
    if not module._qkv_same_embed_dim or module.bias_k is not None or module.add_zero_attn:
        return None
    dim, bias = module.embed_dim, None if module.in_proj_bias is None else "in_proj_bias"
    q, k, v = (Rows("in_proj_weight", part * dim, (part + 1) * dim, bias) for part in range(3))
    head_dim = dim // module.num_heads
    return Projections(v, Rows("out_proj"), module.num_heads, head_dim, q, k, head_dim**-0.5)


def _sequence(place: Place) -> Layout:
    return tokens(pattern="b (h w) c" if place.attribute("batch_first") else "(h w) b c")(place)


def _maxvit(place: Place) -> Layout:
    """Windows of a map, or positions that lie a window apart, in a dimension of their own."""
    apart = place.attribute("partition_type") == "grid"
    window, grid = pair(place.attribute("g" if apart else "p")), pair(place.attribute("grid_size"))
    if window is None or grid is None:
        raise Unknown("its windows are not known")
    arrangement = APART if apart else SIDE_BY_SIDE
    return checked(place, Layout(pattern="b (nh nw) (h w) c", grid=grid, window=window, map=arrangement))


TORCH = Declarations(
    "torch",
    {
        nn.MultiheadAttention: Attention(
            _sequence,
            projections=_multihead,
            same=("key", "value"),
            ignored=("need_weights", "average_attn_weights"),
            returns="tuple",
        )
    },
    {nn.TransformerEncoderLayer: FFN("linear2")},
)

TORCHVISION = Declarations(
    "torchvision",
    {
        "torchvision.models.swin_transformer.ShiftedWindowAttention": Attention(channels_last, projections=qkv()),
        "torchvision.models.swin_transformer.ShiftedWindowAttentionV2": Attention(channels_last, projections=qkv()),
        "torchvision.models.maxvit.RelativePositionalMultiHeadAttention": Attention(_maxvit, heads="n_heads"),
    },
    {
        "torchvision.models.vision_transformer.MLPBlock": FFN("3"),
        "torchvision.ops.misc.MLP": FFN("3"),
        "torchvision.models.maxvit.PartitionAttentionLayer": FFN("mlp_layer.3"),
    },
)

__all__ = ["TORCH", "TORCHVISION"]
