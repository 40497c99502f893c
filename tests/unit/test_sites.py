"""Observation, claims and refusals."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import tiny
import torch
from conftest import Case
from torch import nn

import msa2conv
from msa2conv.adapters.paths import block_of
from msa2conv.errors import ConflictingClaims, InvalidInput, NonFiniteValue, NoSitesFound
from msa2conv.observation import observe


def test_every_module_is_observed_once_and_no_hook_stays(case: Case) -> None:
    before = tiny.snapshot(case.work)
    seen = observe(case.work, case.images[:1])
    for site in case.seen.claims.sites:
        call = seen.once(site.path)
        assert call is not None and call.x == call.out
    assert tiny.snapshot(case.work) == before


def test_hooks_are_removed_when_the_model_fails() -> None:
    model = tiny.build("vit")
    before = tiny.snapshot(model)
    with pytest.raises(InvalidInput, match="on which VisionTransformer fails"):
        observe(model, torch.zeros(1, 3, 40, 40))
    with pytest.raises(NonFiniteValue):
        observe(model, torch.full((1, 3, 32, 32), float("nan")))
    assert tiny.snapshot(model) == before


def test_sites_come_in_execution_order(case: Case) -> None:
    order = list(observe(case.work, case.images[:1]).calls)
    positions = [order.index(site.path) for site in case.seen.claims.sites]
    assert positions == sorted(positions)


def test_geometry(case: Case) -> None:
    site = case.seen.claims.attentions[0]
    grid = {"non_square": (4, 6), "swin": (14, 14), "swin_padded": (14, 18), "foreign": (6, 4)}.get(case.name, (4, 4))
    prefix = {"distilled": 2, "registers": 3, "avg_pool": 0, "swin": 0, "swin_padded": 0, "foreign": 0}
    assert (site.layout.grid, site.layout.prefix) == (grid, prefix.get(case.name, 1))
    assert (
        site.heads * site.head_dim
        == site.dim
        == case.work.get_submodule(site.path)(torch.zeros(case.seen.costs.shapes[site.path]))[0].shape[-1]
    )


def test_projections_are_read_from_the_host_as_it_is_now(vit: Case) -> None:
    from timm.layers import Attention

    site = vit.seen.claims.attentions[0]
    host = Attention(48, num_heads=3, qkv_bias=True).double()
    weight, bias = site.projections.v.read(host)
    assert weight.dtype == torch.float64 and torch.equal(weight, host.qkv.weight[96:])
    assert torch.equal(bias, host.qkv.bias[96:])


def normed_glu(*args: Any, norm_layer: Any = None, **kwargs: Any) -> nn.Module:
    from timm.layers import SwiGLU

    return SwiGLU(*args, norm_layer=nn.LayerNorm, **kwargs)


def test_what_cannot_be_converted_is_refused_with_a_reason() -> None:
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(**tiny.VIT, mlp_layer=normed_glu).eval()
    seen = msa2conv.inspect(model)
    assert len(seen.claims.attentions) == 3 and not seen.claims.ffns
    assert {item.path for item in seen.claims.refusals} == {f"blocks.{i}.mlp" for i in range(3)}
    assert all("LayerNorm norm couples the hidden units" in item.reason for item in seen.claims.refusals)
    assert all(item.reason in str(seen) for item in seen.claims.refusals)


def test_a_normed_ffn_is_left_dense() -> None:
    from timm.models.vision_transformer import VisionTransformer

    claims = msa2conv.inspect(VisionTransformer(**tiny.VIT, scale_mlp_norm=True).eval()).claims
    assert not claims.ffns and len(claims.refusals) == 3


def test_an_unknown_model_and_two_claims_are_errors(vit: Case) -> None:
    from msa2conv.adapters.timm import TIMM

    with pytest.raises(NoSitesFound, match="GridAttention"):
        msa2conv.inspect(tiny.build("foreign"), example_inputs=tiny.images("foreign", 1))
    twice = (TIMM, TIMM)
    with pytest.raises(ConflictingClaims, match=r"blocks\.0\.attn"):
        msa2conv.inspect(vit.model, adapters=twice)


def test_a_shared_attention_is_refused() -> None:
    model = tiny.build("vit")
    model.blocks[2].attn = model.blocks[0].attn
    claims = msa2conv.inspect(model).claims
    assert [site.path for site in claims.attentions] == ["blocks.1.attn"]
    assert "ran 2 times" in claims.refusals[0].reason


@pytest.mark.parametrize(
    ("path", "block"),
    [
        ("blocks.3.attn", "blocks.3"),
        ("layers.0.blocks.1.mlp", "layers.0.blocks.1"),
        ("blocks.3.attns.0.attn", "blocks.3"),
        ("encoder.2.attention", "encoder.2"),
        ("attention", "attention"),
    ],
)
def test_blocks(path: str, block: str) -> None:
    assert block_of(path) == block


def test_grids_follow_the_image_not_the_default() -> None:
    """A model with dynamic image size is converted for the size of the example."""
    from timm.models.vision_transformer import VisionTransformer

    build = partial(VisionTransformer, **tiny.VIT, dynamic_img_size=True)
    seen = msa2conv.inspect(build().eval(), example_inputs=torch.zeros(1, 3, 40, 24))
    assert {site.layout.grid for site in seen.claims.attentions} == {(5, 3)}
