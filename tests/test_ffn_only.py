"""Backbones whose attentions all stay, for known reasons: they may still lose hidden units, and the user is told."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import msa2conv
from msa2conv.errors import InfeasibleBudget, NoSitesFound
from msa2conv.flops import count_flops

WARNING = "no attention can become a convolution, only FFNs can be narrowed: "
FUSED = "blocks.0 and 1 more (ParallelScalingBlock): attention and FFN share one projection: the attention is not a "
XCA = "blocks.0.attn and 1 more (XCA): attention across channels: it does not mix positions"
IMAGES = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def parallel(qkv_bias: bool) -> nn.Module:
    from timm.models.vision_transformer import ParallelScalingBlock, VisionTransformer

    size = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 10}
    return VisionTransformer(**size, qkv_bias=qkv_bias, block_fn=ParallelScalingBlock)


def xcit() -> nn.Module:
    from timm.models.xcit import Xcit

    return Xcit(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, cls_attn_layers=1, num_classes=10)


MODELS = pytest.mark.parametrize(
    ("build", "reason"),
    [(partial(parallel, True), FUSED), (partial(parallel, False), FUSED), (xcit, XCA)],
    ids=["parallel", "parallel without bias", "xcit"],
)


def drawn(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    model = build().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


@MODELS
@torch.no_grad()
def test_it_converts_and_says_what_stays(build: Callable[[], nn.Module], reason: str, tmp_path: Path) -> None:
    model = drawn(build)
    result = msa2conv.convert(model, 0.8, data=IMAGES, example_inputs=IMAGES[:1], progress=False)
    assert 0.97 * 0.8 <= result.plan.flops / result.plan.base.flops <= 0.8
    assert count_flops(result.model, IMAGES[:1]) == result.plan.flops
    assert result.report.warnings[0].startswith(WARNING + reason)
    again = msa2conv.load(result.save(tmp_path / "hybrid.safetensors"), model)
    assert torch.equal(again(IMAGES), result.model(IMAGES))


@MODELS
def test_a_gate_search_does_too(build: Callable[[], nn.Module], reason: str) -> None:
    data = [(IMAGES[:8], torch.arange(8)), (IMAGES[8:], torch.arange(8))]
    gates = msa2conv.Gates()
    result = msa2conv.convert(
        drawn(build), 0.8, data=data, search=gates, epochs=2, example_inputs=IMAGES[:1], progress=False
    )
    assert 0.97 * 0.8 <= result.plan.flops / result.plan.base.flops <= 0.8
    assert result.report.warnings[0].startswith(WARNING + reason)


def test_without_the_lever_there_is_nothing_to_save() -> None:
    with pytest.raises(InfeasibleBudget, match="the floor of the allowed levers"):
        msa2conv.convert(drawn(xcit), 0.8, data=IMAGES, levers="mixer", example_inputs=IMAGES[:1])


def test_an_attention_that_nobody_knows_is_an_error_all_the_same() -> None:
    class OwnAttention(nn.Identity):
        pass

    model = drawn(xcit)
    model.blocks[0].norm1 = nn.Sequential(model.blocks[0].norm1, OwnAttention())
    with pytest.raises(NoSitesFound, match=r"OwnAttention\): an attention that no adapter knows"):
        msa2conv.inspect(model, example_inputs=IMAGES[:1])
