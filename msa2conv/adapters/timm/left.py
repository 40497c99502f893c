"""Attentions that mix no map, and why they are left as they are."""

from __future__ import annotations

_POOL = "a pooling head: it does not mix a map"
_CLASS = "class attention: only the class token asks, the map is not mixed"
_CHANNELS = "attention across channels: it does not mix positions"
_LINEAR = "attention without a softmax over positions, linear in their number already"
_FUSED = "attention and FFN share one projection: the attention is not a module of its own"
_CONVNET = "it re-weights the features of a ConvNet: no softmax over positions"
_STRIDED = "it changes the size of the map"

LEFT = {
    "timm.layers.attention_pool.AttentionPoolLatent": _POOL,
    "timm.layers.attention_pool.AttentionPoolPrr": _POOL,
    "timm.layers.attention_pool2d.AttentionPool2d": _POOL,
    "timm.layers.attention_pool2d.RotAttentionPool2d": _POOL,
    "timm.layers.lambda_layer.LambdaLayer": _LINEAR,
    "timm.layers.non_local_attn.BatNonLocalAttn": _CONVNET,
    "timm.layers.non_local_attn.NonLocalAttn": "a non-local block of a ConvNet, with a shortcut of its own",
    "timm.models.cait.ClassAttn": _CLASS,
    "timm.models.coat.FactorAttnConvRelPosEnc": _LINEAR,
    "timm.models.crossvit.CrossAttention": _CLASS,
    "timm.models.csatv2.SpatialAttention": _CONVNET,
    "timm.models.davit.ChannelAttention": _CHANNELS,
    "timm.models.davit.ChannelAttentionV2": _CHANNELS,
    "timm.models.edgenext.CrossCovarianceAttn": _CHANNELS,
    "timm.models.efficientformer_v2.Attention2dDownsample": _STRIDED,
    "timm.models.levit.AttentionDownsample": _STRIDED,
    "timm.models.mobilevit.LinearSelfAttention": _LINEAR,
    "timm.models.nextvit.ConvAttention": "a multi-head convolution, without a softmax",
    "timm.models.swiftformer.EfficientAdditiveAttention": _LINEAR,
    "timm.models.vision_transformer.DiffParallelScalingBlock": _FUSED,
    "timm.models.vision_transformer.ParallelScalingBlock": _FUSED,
    "timm.models.volo.ClassAttention": _CLASS,
    "timm.models.xcit.ClassAttentionBlock": _CLASS,
    "timm.models.xcit.XCA": _CHANNELS,
}
