"""Attentions that take a map as it is."""

from __future__ import annotations

from ..declared import Attention, qkv
from ..geometry import channels_first, channels_last

_FIRST = Attention(channels_first)

MAPS = {
    "timm.layers.attention2d.Attention2d": _FIRST,
    "timm.layers.attention2d.MultiQueryAttention2d": _FIRST,
    "timm.layers.attention2d.MultiQueryAttentionV2": _FIRST,
    "timm.layers.bottleneck_attn.BottleneckAttn": _FIRST,
    "timm.layers.halo_attn.HaloAttn": _FIRST,
    "timm.models.cpubone.ConvAttention": _FIRST,
    "timm.models.efficientformer_v2.Attention2d": _FIRST,
    "timm.models.efficientvit_msra.LocalWindowAttention": _FIRST,
    "timm.models.fastvit.Attention": _FIRST,
    "timm.models.iformer.SHMA": Attention(channels_first, heads=None),
    "timm.models.lowformer.ConvAttention": _FIRST,
    "timm.models.shvit.SHSA": Attention(channels_first, heads=None),
    "timm.models.visformer.Attention": _FIRST,
    "timm.models.volo.Attention": Attention(channels_last, projections=qkv(plain=True)),
    "timm.models.volo.OutlookAttention": Attention(channels_last),
}
