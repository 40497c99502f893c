"""Attentions on one sequence of tokens an image: ViT and its relatives, and pyramids that flatten their maps."""

from __future__ import annotations

from ...layouts import Layout
from ..declared import Attention, qkv, separate
from ..geometry import Place, channels_first, tokens
from .windows import mobilevit


def _standard(place: Place) -> Layout:
    """timm's own Attention serves ViT, DeiT, PiT, CrossViT, ... and the unfolded patches of MobileViT."""
    return mobilevit(place) if place.attribute("patch_area") else tokens()(place)


def _levit(place: Place) -> Layout:
    """LeViT comes with tokens, and with maps and 1x1 convolutions."""
    return channels_first(place) if len(place.x) == 4 else tokens(prefix=0)(place)


_STANDARD = Attention(_standard, projections=qkv(plain=True))
_ROTARY = Attention(tokens(), projections=qkv(), ignored=("rope",))
_POOLED = Attention(tokens(), ignored=("feat_size",), returns="echo", echo="feat_size")
_PYRAMID = Attention(tokens(prefix=0), projections=separate("kv", half=True), ignored=("feat_size", "size"))

SEQUENCES = {
    "timm.layers.attention.Attention": _STANDARD,
    "timm.layers.attention.AttentionRope": _ROTARY,
    "timm.layers.diff_attention.DiffAttention": Attention(tokens()),
    "timm.models.vision_transformer.Attention": _STANDARD,
    "timm.models.beit.Attention": Attention(tokens(), projections=qkv(), ignored=("shared_rel_pos_bias",)),
    "timm.models.eva.EvaAttention": _ROTARY,
    "timm.models.vision_transformer_relpos.RelPosAttention": Attention(
        tokens(), projections=qkv(), ignored=("shared_rel_pos",)
    ),
    "timm.models.gemma4_vit.Gemma4Attention": Attention(tokens(prefix=0), ignored=("rope_cos", "rope_sin")),
    "timm.models.cait.TalkingHeadAttn": Attention(tokens(prefix=0), projections=qkv()),
    "timm.models.convit.GPSA": Attention(tokens(prefix=0), projections=separate("v")),
    "timm.models.convit.MHSA": Attention(tokens(prefix=1), projections=qkv(plain=True)),
    "timm.models.metaformer.Attention": Attention(tokens(prefix=0), projections=qkv(plain=True)),
    "timm.models.efficientformer.Attention": Attention(tokens(prefix=0)),
    "timm.models.levit.Attention": Attention(_levit),
    "timm.models.pvt_v2.Attention": _PYRAMID,
    "timm.models.twins.GlobalSubSampleAttn": _PYRAMID,
    "timm.models.twins.LocallyGroupedAttn": Attention(tokens(prefix=0), projections=qkv(), ignored=("size",)),
    "timm.models.nextvit.EfficientAttention": Attention(tokens(prefix=0), projections=separate("v")),
    "timm.models.mvitv2.MultiScaleAttention": _POOLED,
    "timm.models.mvitv2.MultiScaleAttentionPoolFirst": _POOLED,
}
