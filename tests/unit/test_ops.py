"""The mixers against slow or foreign references, and their calling convention."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from msa2conv.errors import LayoutMismatch, UnsupportedArgument
from msa2conv.layouts import Layout
from msa2conv.ops import (
    IO,
    Attend,
    AttendPrefix,
    Constant,
    Conv,
    Depthwise,
    Global,
    Identity,
    MixerSpec,
    PassPrefix,
    PrefixAttention,
    RidgePrefix,
    Sizes,
    Skip,
)

DIM = 6
PLAIN, TUPLE = IO(absent=("attn_mask", "is_causal")), IO(returns="tuple", x="hidden")
VIT = Layout(grid=(3, 4), prefix=2)
SWIN = Layout(pattern="(b nh nw) (h w) c", grid=(5, 4), window=(3, 3), shift=(1, 2))
ATTEND = AttendPrefix(heads=2, head_dim=3, scale=0.6)
SPECS = [
    Skip(),
    Identity(),
    Constant(layout=VIT, dim=DIM),
    Constant(layout=SWIN, dim=DIM),
    Global(layout=VIT, dim=DIM, prefix=RidgePrefix()),
    Global(layout=SWIN, dim=DIM, context=False),
    Conv(layout=VIT, dim=DIM, kernel=3, rank=2, context=True, prefix=ATTEND),
    Conv(layout=VIT, dim=DIM, kernel=5, rank=DIM, prefix=RidgePrefix()),
    Conv(layout=SWIN, dim=DIM, kernel=1, rank=3, context=True),
    Conv(layout=VIT, dim=DIM, kernel=3, rank=DIM, norm="batch", act="relu", prefix=PassPrefix()),
    Conv(layout=SWIN, dim=DIM, kernel=1, rank=3, act="relu"),
    Depthwise(layout=VIT, dim=DIM, kernel=3, width=4, context=True, prefix=ATTEND),
    Depthwise(layout=SWIN, dim=DIM, kernel=5, width=DIM),
]


def randomised(module: torch.nn.Module, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return module


def tokens_for(layout: Layout, batch: int = 2) -> Tensor:
    prefix_BPC = torch.randn(batch, layout.prefix, DIM) if layout.prefix else torch.zeros(0)
    return layout.from_map(prefix_BPC, torch.randn(batch, DIM, *layout.grid))


# Values


@torch.no_grad()
@pytest.mark.parametrize("prefix", [1, 3])
@pytest.mark.parametrize("bias", [True, False])
def test_prefix_attention_is_the_first_rows_of_timms_attention(prefix: int, bias: bool) -> None:
    from timm.layers import Attention

    torch.manual_seed(0)
    host = randomised(Attention(24, num_heads=3, qkv_bias=bias))
    spec = AttendPrefix(heads=3, head_dim=8, bias=bias, scale=host.scale)
    folded = PrefixAttention(spec, 24)
    values = dict(zip(("q", "k", "v"), host.qkv.weight.chunk(3), strict=True))
    state = {f"{name}.weight": value for name, value in values.items()}
    state |= {"proj.weight": host.proj.weight, "proj.bias": host.proj.bias}
    if bias:
        q_bias, _, v_bias = host.qkv.bias.chunk(3)
        state |= {"q.bias": q_bias, "v.bias": v_bias}
    folded.load_state_dict(state)
    x_BNC = torch.randn(4, 10, 24)
    expected_BPC = host(x_BNC)[:, :prefix]
    found_BPC = folded(x_BNC[:, :prefix], x_BNC[:, prefix:].mean(1), x_BNC)
    assert float((found_BPC - expected_BPC).abs().max()) <= 1e-5 * float(expected_BPC.abs().max())


def slow_convolution(map_BCHW: Tensor, weight_OIKK: Tensor) -> Tensor:
    """Position by position, with zeros outside the map."""
    batch, _, height, width = map_BCHW.shape
    edge = weight_OIKK.shape[-1] // 2
    out_BOHW = torch.zeros(batch, len(weight_OIKK), height, width)
    for row in range(height):
        for column in range(width):
            for i in range(-edge, edge + 1):
                for j in range(-edge, edge + 1):
                    if 0 <= row + i < height and 0 <= column + j < width:
                        tap_OI = weight_OIKK[:, :, edge + i, edge + j]
                        out_BOHW[:, :, row, column] += map_BCHW[:, :, row + i, column + j] @ tap_OI.T
    return out_BOHW


@pytest.mark.parametrize("layout", [Layout(grid=(3, 4)), VIT, SWIN], ids=["plain", "prefix", "windows"])
@pytest.mark.parametrize(("kernel", "rank"), [(1, 2), (3, 2), (3, DIM), (5, 3)])
def test_a_convolution_runs_on_the_whole_map(layout: Layout, kernel: int, rank: int) -> None:
    prefix = RidgePrefix() if layout.prefix else None
    mixer = randomised(Conv(layout=layout, dim=DIM, kernel=kernel, rank=rank, prefix=prefix).build(PLAIN))
    x = tokens_for(layout)
    inner = slow_convolution(layout.to_map(x)[1], mixer.reduce.weight)
    if rank < DIM:
        expected = slow_convolution(inner, mixer.expand.weight) + mixer.expand.bias[:, None, None]
    else:
        expected = inner + mixer.reduce.bias[:, None, None]
    torch.testing.assert_close(layout.to_map(mixer(x))[1], expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("layout", [Layout(grid=(3, 4)), VIT, SWIN], ids=["plain", "prefix", "windows"])
@pytest.mark.parametrize("kernel", [3, 5])
def test_a_depthwise_convolution_mixes_positions_channel_by_channel(layout: Layout, kernel: int) -> None:
    prefix = RidgePrefix() if layout.prefix else None
    mixer = randomised(Depthwise(layout=layout, dim=DIM, kernel=kernel, width=4, prefix=prefix).build(PLAIN))
    x = tokens_for(layout)
    values = slow_convolution(layout.to_map(x)[1], mixer.value.weight)
    averaged = torch.cat([slow_convolution(values[:, i : i + 1], mixer.taps.weight[i : i + 1]) for i in range(4)], 1)
    expected = slow_convolution(averaged, mixer.expand.weight) + mixer.expand.bias[:, None, None]
    torch.testing.assert_close(layout.to_map(mixer(x))[1], expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("layout", "kernel", "rank"), [(VIT, 3, 2), (SWIN, 1, 2), (SWIN, 3, DIM)])
def test_a_norm_and_an_activation_stand_between_two_convolutions(
    layout: Layout, kernel: int, rank: int, training: bool
) -> None:
    """Even where the bottleneck is as wide as the map."""
    prefix = PassPrefix() if layout.prefix else None
    spec = Conv(layout=layout, dim=DIM, kernel=kernel, rank=rank, norm="batch", act="relu", prefix=prefix)
    mixer, x = randomised(spec.build(PLAIN)).train(training), tokens_for(layout)
    mixer.norm.running_mean.normal_(), mixer.norm.running_var.uniform_(0.5, 2)
    hidden = slow_convolution(layout.to_map(x)[1], mixer.reduce.weight) + mixer.reduce.bias[:, None, None]
    mean, var = mixer.norm.running_mean, mixer.norm.running_var
    if training:
        mean, var = hidden.mean((0, 2, 3)), hidden.var((0, 2, 3), correction=0)
    scale = mixer.norm.weight / (var + 1e-5).sqrt()
    hidden = ((hidden - mean[:, None, None]) * scale[:, None, None] + mixer.norm.bias[:, None, None]).clamp_min(0)
    expected = slow_convolution(hidden, mixer.expand.weight) + mixer.expand.bias[:, None, None]
    torch.testing.assert_close(layout.to_map(mixer(x))[1], expected, rtol=1e-4, atol=1e-4)


def test_prefix_tokens_may_pass() -> None:
    spec = Conv(layout=VIT, dim=DIM, kernel=3, rank=2, norm="batch", act="relu", prefix=PassPrefix())
    mixer, x = randomised(spec.build(PLAIN)), tokens_for(VIT)
    assert torch.equal(mixer(x)[:, : VIT.prefix], x[:, : VIT.prefix]) and not torch.equal(mixer(x), x)
    assert not list(mixer.prefix.parameters())


def test_context_adds_a_linear_function_of_prefix_and_mean_everywhere() -> None:
    mixer = randomised(Global(layout=VIT, dim=DIM, prefix=RidgePrefix()).build(PLAIN))
    x = tokens_for(VIT)
    prefix_BPC, map_BCHW = VIT.to_map(x)
    seen_BI = torch.cat((prefix_BPC[:, 0], prefix_BPC[:, 1], map_BCHW.mean((2, 3))), 1)
    expected = mixer.grid_CHW + (seen_BI @ mixer.context.weight.T)[:, :, None, None]
    torch.testing.assert_close(VIT.to_map(mixer(x))[1], expected)


def test_ridge_prefix_sees_its_own_value_and_the_mean() -> None:
    mixer = randomised(Global(layout=VIT, dim=DIM, context=False, prefix=RidgePrefix()).build(PLAIN))
    x = tokens_for(VIT)
    prefix_BPC, map_BCHW = VIT.to_map(x)
    for position in range(VIT.prefix):
        seen_BI = torch.cat((prefix_BPC[:, position], map_BCHW.mean((2, 3))), 1)
        expected = seen_BI @ mixer.prefix.weight_POI[position].T + mixer.prefix.bias_PO[position]
        torch.testing.assert_close(mixer(x)[:, position], expected)


def test_skip_identity_and_constant() -> None:
    x = tokens_for(VIT)
    assert torch.equal(Skip().build(PLAIN)(x), torch.zeros_like(x))
    assert torch.equal(Identity().build(PLAIN)(x), x)
    mixer = randomised(Constant(layout=VIT, dim=DIM).build(PLAIN))
    prefix_BPC, map_BCHW = VIT.to_map(mixer(x))
    assert torch.equal(prefix_BPC, mixer.prefix_PC.expand(2, -1, -1))
    assert torch.equal(map_BCHW, mixer.grid_CHW.expand(2, -1, -1, -1))


# Specs


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: repr(spec)[:60])
def test_every_spec_round_trips_and_builds_what_keeps_shape_and_dtype(spec: MixerSpec) -> None:
    again = TypeAdapter(MixerSpec).validate_json(spec.model_dump_json())
    assert again == spec
    mixer = again.build(PLAIN)
    x = tokens_for(getattr(spec, "layout", VIT))
    assert mixer(x).shape == x.shape
    assert mixer.double()(x.double()).dtype == torch.float64
    assert again.build(TUPLE)(hidden=x)[1] is None
    assert repr(mixer)


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": "conv", "kernel": 0},
        {"kind": "conv", "kernel": 17},
        {"kind": "conv", "kernel": 4},
        {"kind": "conv", "rank": 0},
        {"kind": "conv", "dim": 10**9},
        {"kind": "lambda"},
        {"kind": "conv", "code": "print()"},
        {"kind": "conv", "norm": "layer"},
        {"kind": "conv", "act": "gelu"},
        {"kind": "depthwise", "rank": None, "width": 3, "kernel": 2},
        {"kind": "conv", "prefix": {"kind": "pass", "heads": 2}},
        {"kind": "conv", "prefix": {"kind": "attend", "heads": 2, "head_dim": 3, "scale": float("nan")}},
    ],
    ids=str,
)
def test_malformed_specs_are_refused(fields: dict[str, Any]) -> None:
    good = {"layout": VIT.model_dump(), "dim": DIM, "kernel": 3, "rank": 2}
    TypeAdapter(MixerSpec).validate_python({**good, "kind": "conv"})
    with pytest.raises(ValidationError):
        TypeAdapter(MixerSpec).validate_python({**good, **fields})


# Calling convention

MASKS = {"additive": torch.ones(4, 4), "boolean": torch.zeros(4, 4, dtype=torch.bool), "one zero": torch.zeros(1)}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_a_mask_is_refused_by_name(mask: Any) -> None:
    x = tokens_for(VIT)
    for spec in SPECS[:3]:
        with pytest.raises(UnsupportedArgument, match="'attn_mask'"):
            spec.build(PLAIN)(x, attn_mask=mask)


def test_every_other_argument_is_refused_by_name() -> None:
    x, mixer = tokens_for(VIT), Skip().build(PLAIN)
    with pytest.raises(UnsupportedArgument, match="'is_causal'"):
        mixer(x, is_causal=True)
    with pytest.raises(UnsupportedArgument, match="'rope'"):
        mixer(x, rope=torch.zeros(1))
    with pytest.raises(UnsupportedArgument, match="'positional argument 1'"):
        mixer(x, torch.zeros(1))
    with pytest.raises(UnsupportedArgument, match="no tensor 'x'"):
        mixer()
    with pytest.raises(UnsupportedArgument, match="'x'"):
        mixer(x, x=x)


def test_absent_and_ignored_arguments_are_accepted() -> None:
    x = tokens_for(VIT)
    assert torch.equal(Identity().build(PLAIN)(x, None, attn_mask=None, is_causal=False), x)
    assert torch.equal(Identity().build(IO(ignored=("mask",)))(x, mask=torch.ones(4)), x)
    out, weights = Identity().build(TUPLE)(hidden=x)
    assert weights is None and torch.equal(out, x)


def test_a_new_window_size_is_refused() -> None:
    mixer = Constant(layout=SWIN, dim=DIM).build(PLAIN)
    mixer.set_window_size((3, 3))
    mixer.set_window_size(3)
    with pytest.raises(LayoutMismatch, match="4, 4"):
        mixer.set_window_size((4, 4))


@pytest.mark.parametrize("spec", [Constant, Global])
def test_what_a_grid_holds_lies_in_memory_as_tokens_do(spec: type[Constant] | type[Global]) -> None:
    layout = Layout(grid=(4, 5), prefix=1)
    mixer = spec(layout=layout, dim=DIM, **({"prefix": PassPrefix()} if spec is Global else {})).build(IO())
    again = copy.deepcopy(mixer).to(torch.float64)
    again.load_state_dict({name: value.contiguous() for name, value in mixer.state_dict().items()})
    for grid_CHW in (mixer.grid_CHW, again.grid_CHW):
        assert grid_CHW.shape == (DIM, 4, 5) and grid_CHW.permute(1, 2, 0).is_contiguous()


@torch.no_grad()
@pytest.mark.parametrize("widths", [(3, 5), (5, 3), (4, 4)])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_of_any_widths_is_softmax_attention(widths: tuple[int, int], masked: bool) -> None:
    sizes = Sizes(argument="attn_mask")
    spec = Attend(dim=DIM, heads=2, qk_dim=widths[0], v_dim=widths[1], scale=0.7, sizes=sizes)
    mixer, x = randomised(spec.build(IO(positional=("attn_mask",)))), torch.randn(2, 7, DIM)
    mask = sizes.mask(torch.randint(1, 5, (2, 7)).float()) if masked else None
    q, k, v = (layer(x).unflatten(-1, (2, -1)).transpose(1, 2).double() for layer in (mixer.q, mixer.k, mixer.v))
    scores = 0.7 * torch.einsum("bkne,bkme->bknm", q, k) + (mask if mask is not None else 0)
    read = torch.einsum("bknm,bkmv->bnkv", scores.softmax(-1), v).flatten(2)
    torch.testing.assert_close(mixer(x, mask), mixer.proj(read.float()))
