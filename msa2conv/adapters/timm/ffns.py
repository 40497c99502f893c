"""FFNs, by the layer that reads their hidden units."""

from __future__ import annotations

from ..declared import FFN

FFNS = {
    "timm.layers.mlp.Mlp": FFN("fc2"),
    "timm.layers.mlp.GluMlp": FFN("fc2"),
    "timm.layers.mlp.SwiGLU": FFN("fc2"),
    "timm.layers.mlp.ConvMlp": FFN("fc2"),
    "timm.layers.mlp.GlobalResponseNormMlp": FFN("fc2"),
    "timm.models.efficientformer.ConvMlpWithNorm": FFN("fc2"),
    "timm.models.efficientformer_v2.ConvMlpWithNorm": FFN("fc2.conv"),
    "timm.models.efficientvit_msra.ConvMlp": FFN("pw2.conv"),
    "timm.models.fastvit.ConvMlp": FFN("fc2"),
    "timm.models.gemma4_vit.Gemma4GatedMlp": FFN("down_proj.linear"),
    "timm.models.iformer.FFN": FFN("mixer.module.2.c"),
    "timm.models.levit.LevitMlp": FFN("ln2.linear"),
    "timm.models.pvt_v2.MlpWithDepthwiseConv": FFN("fc2"),
    "timm.models.shvit.FFN": FFN("pw2.c"),
    "timm.models.swiftformer.Mlp": FFN("fc2"),
    "timm.models.tiny_vit.NormMlp": FFN("fc2"),
    "timm.models.visformer.SpatialMlp": FFN("conv3"),
    "timm.models.vision_transformer.ParallelScalingBlock": FFN("mlp_out_proj", split="in_split"),
    "timm.models.vitamin.GeGluMlp": FFN("w2"),
}
