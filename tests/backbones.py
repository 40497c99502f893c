"""One tiny backbone for every way in which timm, torchvision and transformers lay tokens out, on small images."""

from __future__ import annotations

import importlib
import importlib.util
import math
from typing import Any, NamedTuple

import timm
import torch
from timm.models.mvitv2 import MultiScaleVitCfg
from torch import Tensor, nn
from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformerBlockV2


class TorchViT(nn.Module):
    """PyTorch's own encoder, batch or sequence first."""

    def __init__(self, batch_first: bool, norm_first: bool, dim: int = 32, depth: int = 3, classes: int = 10) -> None:
        super().__init__()
        self.batch_first, self.patches = batch_first, nn.Conv2d(3, dim, 8, 8)
        self.cls = nn.Parameter(torch.randn(1, 1, dim))
        layer = nn.TransformerEncoderLayer(dim, 2, 3 * dim, 0.0, "gelu", batch_first=batch_first, norm_first=norm_first)
        self.encoder, self.head = nn.TransformerEncoder(layer, depth), nn.Linear(dim, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.cls.expand(len(x), -1, -1), x), dim=1)
        x = self.encoder(x) if self.batch_first else self.encoder(x.transpose(0, 1)).transpose(0, 1)
        return self.head(x[:, 0])


class Tiny(NamedTuple):
    """A registered model, or the class of one, made small, and what must be found in it."""

    name: str
    kwargs: dict[str, Any]
    size: tuple[int, int]
    attentions: int
    ffns: int
    layout: str  # of the first attention: pattern @ grid + prefix


_S = {"num_classes": 10}
_VIT = {**_S, "embed_dim": 32, "depth": 2, "num_heads": 2}
TINY = {
    "beit": Tiny("beit_base_patch16_224", {**_VIT, "img_size": 64}, (64, 64), 2, 2, "b (h w) c @ 4x4+1"),
    "cait": Tiny("cait_xxs24_224", {**_VIT, "img_size": 64}, (64, 64), 2, 4, "b (h w) c @ 4x4+0"),
    "coatnet": Tiny(
        "coatnet_nano_rw_224",
        {**_S, "img_size": (64, 96), "depths": (1, 1, 2, 1), "embed_dim": (32, 32, 64, 128), "stem_width": (8, 16)},
        (64, 96),
        1,
        3,
        "b c h w @ 4x6+0",
    ),
    "convit": Tiny(
        "convit.ConVit", {**_VIT, "img_size": 64, "local_up_to_layer": 1}, (64, 64), 2, 2, "b (h w) c @ 4x4+0"
    ),
    "crossvit": Tiny(
        "crossvit.CrossVit",
        {**_S, "img_size": 48, "embed_dim": (24, 48), "depth": ((1, 1, 0),), "num_heads": (2, 2)},
        (48, 48),
        2,
        2,
        "b (h w) c @ 6x6+1",
    ),
    "davit": Tiny(
        "davit_tiny",
        {**_S, "depths": (1, 1), "embed_dims": (24, 48), "num_heads": (2, 4), "window_size": 4},
        (40, 56),
        2,
        4,
        "(b nh nw) (h w) c @ 10x14+0",
    ),
    "efficientformer_v2": Tiny(
        "efficientformerv2_s0",
        {**_S, "img_size": 64, "depths": (1, 1, 2, 2), "embed_dims": (16, 16, 24, 32)},
        (64, 64),
        4,
        6,
        "b c h w @ 4x4+0",
    ),
    "efficientvit_msra": Tiny(
        "efficientvit_m0",
        {**_S, "img_size": 128, "embed_dim": (32, 32, 32), "depth": (1, 1, 1), "num_heads": (2, 2, 2)},
        (128, 128),
        3,
        10,
        "b c h w @ 8x8+0",
    ),
    "eva": Tiny(
        "eva02_tiny_patch14_224", {**_VIT, "img_size": (28, 42), "num_heads": 2}, (28, 42), 2, 2, "b (h w) c @ 2x3+1"
    ),
    "gcvit": Tiny(
        "gcvit.GlobalContextVit",
        {**_S, "img_size": 64, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 2), "window_ratio": (16, 16)},
        (64, 64),
        4,
        4,
        "(b nh nw) (h w) c @ 16x16+0",
    ),
    "hiera": Tiny(
        "hiera_tiny_224",
        {**_S, "img_size": (64, 96), "embed_dim": 16, "stages": (1, 2, 2, 1), "mask_unit_size": (8, 8)},
        (64, 96),
        3,
        6,
        "b (h1 w1 h2 w2 h3 w3 h w) c @ 16x24+0",
    ),
    "levit": Tiny(
        "levit_128s",
        {**_S, "img_size": 64, "embed_dim": (32, 32), "depth": (2, 1), "num_heads": (2, 2), "key_dim": 8},
        (64, 64),
        3,
        4,
        "b (h w) c @ 4x4+0",
    ),
    "maxvit": Tiny(
        "maxvit_rmlp_pico_rw_256",
        {**_S, "img_size": 128, "depths": (1, 1), "embed_dim": (32, 32), "stem_width": 16},
        (128, 128),
        4,
        4,
        "(b nh nw) h w c @ 32x32+0",
    ),
    "mobilevit": Tiny("mobilevit_xxs", _S, (96, 128), 9, 9, "(b nh nw) (h w) c @ 12x16+0"),
    "mvitv2": Tiny(
        "mvitv2.MultiScaleVit",
        {**_S, "img_size": 64, "cfg": MultiScaleVitCfg(depths=(2, 2), embed_dim=16, stride_q=((1, 1), (2, 2)))},
        (64, 64),
        3,
        4,
        "b (h w) c @ 16x16+0",
    ),
    "nest": Tiny(
        "nest.Nest",
        {**_S, "img_size": 64, "embed_dims": (16, 24, 32), "num_heads": (2, 2, 2), "depths": (1, 1, 1)},
        (64, 64),
        3,
        3,
        "b (nh nw) (h w) c @ 16x16+0",
    ),
    "pit": Tiny(
        "pit_ti_distilled_224",
        {**_S, "img_size": 64, "base_dims": (16, 16), "depth": (1, 1), "heads": (1, 2)},
        (64, 64),
        2,
        2,
        "b (h w) c @ 7x7+2",
    ),
    "pvt_v2": Tiny(
        "pvt_v2_b0",
        {**_S, "depths": (1, 1, 1, 1), "embed_dims": (8, 16, 24, 32), "num_heads": (1, 2, 2, 2)},
        (64, 96),
        4,
        4,
        "b (h w) c @ 16x24+0",
    ),
    "relpos": Tiny(
        "vision_transformer_relpos.VisionTransformerRelPos",
        {**_VIT, "img_size": (64, 32)},
        (64, 32),
        2,
        2,
        "b (h w) c @ 4x2+0",
    ),
    "sam": Tiny(
        "samvit_base_patch16_224",
        {**_VIT, "img_size": 96, "window_size": 4, "global_attn_indexes": (1,), "neck_chans": 16},
        (96, 96),
        2,
        2,
        "(b nh nw) h w c @ 6x6+0",
    ),
    "shvit": Tiny(
        "shvit.SHViT",
        {**_S, "embed_dim": (16, 24, 32), "partial_dim": (8, 12, 16), "qk_dim": (8, 8, 8), "depth": (1, 1, 1)},
        (96, 128),
        3,
        7,
        "b c h w @ 6x8+0",
    ),
    "swin_v2": Tiny(
        "swinv2_tiny_window8_256",
        {**_S, "img_size": 64, "embed_dim": 24, "depths": (2, 2), "num_heads": (2, 2), "window_size": 4},
        (64, 64),
        4,
        4,
        "(b nh nw) (h w) c @ 16x16+0",
    ),
    "tiny_vit": Tiny(
        "tiny_vit_5m_224",
        {**_S, "embed_dims": (16, 16, 32), "depths": (1, 2, 1), "num_heads": (1, 2, 2), "window_sizes": (4, 4, 4)},
        (64, 96),
        3,
        3,
        "(b nh nw) (h w) c @ 8x12+0",
    ),
    "tnt": Tiny("tnt_s_patch16_224", {**_S, "img_size": 64, "depth": 1}, (64, 64), 2, 2, "(b nh nw) (h w) c @ 16x16+0"),
    "twins": Tiny(
        "twins_svt_small",
        {
            **_S,
            "img_size": 64,
            "embed_dims": (16, 32),
            "num_heads": (1, 2),
            "depths": (2, 2),
            "mlp_ratios": (2, 2),
            "sr_ratios": (4, 2),
            "wss": (4, 4),
        },
        (64, 64),
        4,
        4,
        "b (h w) c @ 16x16+0",
    ),
    "visformer": Tiny(
        "visformer_tiny",
        {**_S, "img_size": 64, "embed_dim": 32, "depth": (1, 1, 1), "num_heads": 2},
        (64, 64),
        2,
        2,
        "b c h w @ 4x4+0",
    ),
    "volo": Tiny(
        "volo.VOLO",
        {**_S, "img_size": 64, "layers": (1, 1), "embed_dims": (24, 32), "num_heads": (2, 2), "stem_hidden_dim": 8},
        (64, 64),
        2,
        4,
        "b h w c @ 8x8+0",
    ),
}


_HF = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "image_size": 32}
_PATCHES = {**_HF, "patch_size": 8}
_HF_SWIN = {"image_size": 48, "embed_dim": 24, "depths": [2, 2], "num_heads": [2, 2], "window_size": 4}
_STAGES = {"image_size": 64, "depths": [1, 1, 1, 1]}
TRANSFORMERS = {
    "hf_vit": Tiny("transformers:ViT", _PATCHES, (32, 32), 2, 2, "b (h w) c @ 4x4+1"),
    "hf_deit": Tiny("transformers:DeiT", _PATCHES, (32, 32), 2, 2, "b (h w) c @ 4x4+2"),
    "hf_beit": Tiny("transformers:Beit", _PATCHES, (32, 32), 2, 2, "b (h w) c @ 4x4+1"),
    "hf_dinov2": Tiny("transformers:Dinov2", _PATCHES, (32, 32), 2, 2, "b (h w) c @ 4x4+1"),
    "hf_dinov2_registers": Tiny("transformers:Dinov2WithRegisters", _PATCHES, (32, 32), 2, 2, "b (h w) c @ 4x4+5"),
    "hf_dinov3": Tiny(
        "transformers:DINOv3ViT", {**_PATCHES, "num_register_tokens": 3}, (40, 32), 2, 2, "b (h w) c @ 5x4+4"
    ),
    "hf_clip": Tiny("transformers:CLIPVision", _PATCHES, (32, 32), 2, 2, "b (h w) c @ 4x4+1"),
    "hf_siglip": Tiny("transformers:SiglipVision", _PATCHES, (32, 32), 2, 3, "b (h w) c @ 4x4+0"),
    "hf_swin": Tiny("transformers:Swin", _HF_SWIN, (48, 48), 4, 4, "(b nh nw) (h w) c @ 12x12+0"),
    "hf_swinv2": Tiny("transformers:Swinv2", _HF_SWIN, (48, 48), 4, 4, "(b nh nw) (h w) c @ 12x12+0"),
    "hf_segformer": Tiny(
        "transformers:Segformer",
        {**_STAGES, "hidden_sizes": [8, 16, 24, 32], "num_attention_heads": [1, 1, 2, 2]},
        (64, 96),
        4,
        4,
        "b (h w) c @ 16x24+0",
    ),
    "hf_pvt": Tiny(
        "transformers:Pvt", {**_STAGES, "hidden_sizes": [8, 16, 40, 64]}, (64, 64), 4, 4, "b (h w) c @ 16x16+0"
    ),
    "hf_pvt_v2": Tiny(
        "transformers:PvtV2",
        {**_STAGES, "hidden_sizes": [8, 16, 32, 64], "num_attention_heads": [1, 1, 2, 2]},
        (64, 96),
        4,
        4,
        "b (h w) c @ 16x24+0",
    ),
    "hf_mobilevit": Tiny(
        "transformers:MobileViT",
        {"image_size": 64, "hidden_sizes": [24, 32, 40], "neck_hidden_sizes": [8, 8, 16, 24, 32, 40, 64]},
        (64, 64),
        9,
        9,
        "(b nh nw) (h w) c @ 8x8+0",
    ),
    "hf_levit": Tiny(
        "transformers:Levit",
        {"image_size": 64, "hidden_sizes": [32, 48, 64], "num_attention_heads": [2, 3, 4], "depths": [2, 2, 2]}
        | {"key_dim": [8, 8, 8]},
        (64, 64),
        6,
        8,
        "b (h w) c @ 4x4+0",
    ),
    "hf_sam": Tiny(
        "transformers:SamVision",
        {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 64, "patch_size": 8}
        | {"output_channels": 16, "global_attn_indexes": [1], "window_size": 3, "mlp_dim": 64},
        (64, 64),
        2,
        2,
        "(b nh nw) h w c @ 8x8+0",
    ),
    "hf_hiera": Tiny(
        "transformers:Hiera",
        {"image_size": [64, 64], "embed_dim": 16, "depths": [1, 2, 2], "num_heads": [1, 2, 4], "num_query_pool": 2},
        (64, 64),
        3,
        5,
        "b (h1 w1 h2 w2 h w) c @ 16x16+0",
    ),
}
_TV_SWIN = {"patch_size": [4, 4], "embed_dim": 24, "depths": [2, 2], "num_heads": [2, 2], "window_size": [4, 4], **_S}
TORCHVISION = {
    "tv_vit": Tiny(
        "torchvision:vision_transformer.VisionTransformer",
        {**_S, "image_size": 32, "patch_size": 8, "num_layers": 2, "num_heads": 2, "hidden_dim": 32, "mlp_dim": 64},
        (32, 32),
        2,
        2,
        "b (h w) c @ 4x4+1",
    ),
    "tv_swin": Tiny("torchvision:swin_transformer.SwinTransformer", _TV_SWIN, (48, 56), 4, 4, "b h w c @ 12x14+0"),
    "tv_swin_v2": Tiny(
        "torchvision:swin_transformer.SwinTransformer",
        {**_TV_SWIN, "block": SwinTransformerBlockV2, "downsample_layer": PatchMergingV2},
        (48, 56),
        4,
        4,
        "b h w c @ 12x14+0",
    ),
    "tv_maxvit": Tiny(
        "torchvision:maxvit.MaxVit",
        {"input_size": (64, 64), "stem_channels": 16, "partition_size": 4, "block_channels": [16, 32]}
        | {"block_layers": [1, 1], "head_dim": 8, "stochastic_depth_prob": 0.0, **_S},
        (64, 64),
        4,
        4,
        "b (nh nw) (h w) c @ 16x16+0",
    ),
}
TORCH = {
    "torch_encoder": Tiny(
        "own:TorchViT", {"batch_first": True, "norm_first": False}, (32, 40), 3, 3, "b (h w) c @ 4x5+1"
    ),
    "torch_encoder_sequence_first": Tiny(
        "own:TorchViT", {"batch_first": False, "norm_first": True}, (32, 40), 3, 3, "(h w) b c @ 4x5+1"
    ),
}
TINY |= TORCHVISION | TORCH
if importlib.util.find_spec("transformers"):
    TINY |= TRANSFORMERS


def _create(tiny: Tiny) -> nn.Module:
    library, _, rest = tiny.name.rpartition(":")
    module, _, name = rest.rpartition(".")
    if library == "transformers":
        import transformers

        config = getattr(transformers, f"{name}Config")(**tiny.kwargs)
        return getattr(transformers, f"{name}Model")(config)
    if library == "own":
        return TorchViT(**tiny.kwargs)
    if not module:
        return timm.create_model(name, **tiny.kwargs)
    return getattr(importlib.import_module(f"{library or 'timm'}.models.{module}"), name)(**tiny.kwargs)


def untrained(family: str) -> nn.Module:
    """As timm initialises it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return _create(TINY[family])


def build(family: str, seed: int = 0) -> nn.Module:
    """In eval mode, with random weights that matter."""
    tiny = TINY[family]
    model = _create(tiny)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(1.5 * noise / math.sqrt(parameter[0].numel()))
            else:
                parameter.copy_(0.2 * noise if name.endswith("bias") else 1 + 0.2 * noise)
        for name, buffer in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
    return model.eval()


def images(family: str, count: int = 8, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, *TINY[family].size, generator=generator)
