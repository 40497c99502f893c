"""Kernels made from W_v and W_o, against loops over positions and heads."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn

from msa2conv.kernels import OFFSETS, Kernels, Offsets, Rows, SharedStart, Values
from msa2conv.layouts import Layout
from msa2conv.ops import IO, Conv

# What the published code says: the offset (down, right) from the centre that column p of a head mixture stands for.
CENTRE_FIRST = [(0, 0), (-1, -1), (0, -1), (1, -1), (-1, 0), (1, 0), (-1, 1), (0, 1), (1, 1)]
OFFSET = {
    "rows": lambda p: (p // 3 - 1, p % 3 - 1),
    "columns": lambda p: (p % 3 - 1, p // 3 - 1),
    "centre first": lambda p: CENTRE_FIRST[p],
}


class Host(nn.Module):
    """An attention's layers: q, k and v in one, as in timm."""

    def __init__(self, heads: int, head_dim: int, dim: int, bias: bool = True) -> None:
        super().__init__()
        self.inner = heads * head_dim
        self.qkv = nn.Linear(dim, 3 * self.inner, bias=bias)
        self.proj = nn.Linear(self.inner, dim, bias=bias)

    @property
    def names(self) -> dict[str, Any]:
        return {"v": Rows("qkv", 2 * self.inner, 3 * self.inner), "out": Rows("proj")}


class Case(NamedTuple):
    host: Host
    heads: int
    head_dim: int
    mixture_KS: Tensor
    map_BCHW: Tensor

    def kernels(self, offsets: Offsets) -> Kernels:
        return Values.read(self.host, **self.host.names, heads=self.heads).conv(self.mixture_KS, offsets)


@st.composite
def cases(draw: st.DrawFn, positions: int = 9) -> Case:
    heads, head_dim, dim = draw(st.integers(1, 4)), draw(st.integers(1, 5)), draw(st.integers(1, 6))
    torch.manual_seed(draw(st.integers(0, 99)))
    host = Host(heads, head_dim, dim, draw(st.booleans()))
    map_BCHW = torch.randn(2, dim, draw(st.integers(1, 4)), draw(st.integers(1, 4)))
    return Case(host, heads, head_dim, torch.randn(heads, positions), map_BCHW)


def slow(case: Case, offsets: Offsets) -> tuple[Tensor, Tensor]:
    """(hidden, output of a linear bottleneck), head by head, position by position, pixel by pixel; zeros outside."""
    host, mixture_KS, map_BCHW = case.host, case.mixture_KS, case.map_BCHW
    v, out, rows = host.qkv.weight[2 * host.inner :], host.proj.weight, case.head_dim
    v_bias = torch.zeros(host.inner) if host.qkv.bias is None else host.qkv.bias[2 * host.inner :]
    out_bias = torch.zeros(len(out)) if host.proj.bias is None else host.proj.bias
    batch, dim, height, width = map_BCHW.shape
    hidden = torch.zeros(batch, case.head_dim, height, width)
    total = torch.zeros(dim, case.head_dim)
    for p in range(mixture_KS.shape[1]):
        down, right = OFFSET[offsets](p) if mixture_KS.shape[1] == 9 else (0, 0)
        for head in range(case.heads):
            weight, own = mixture_KS[head, p], slice(head * rows, (head + 1) * rows)
            total += weight * out[:, own]
            for row in range(height):
                for column in range(width):
                    hidden[:, :, row, column] += weight * v_bias[own]
                    i, j = row + down, column + right
                    if 0 <= i < height and 0 <= j < width:
                        hidden[:, :, row, column] += weight * (map_BCHW[:, :, i, j] @ v[own].T)
    return hidden, torch.einsum("od,bdhw->bohw", total, hidden) + out_bias[:, None, None]


def assert_equal_to_loops(case: Case, offsets: Offsets) -> None:
    kernels, (hidden, expected) = case.kernels(offsets), slow(case, offsets)
    side = 3 if case.mixture_KS.shape[1] == 9 else 1
    assert kernels.reduce_DCHW.shape[2:] == (side, side)
    found = nn.functional.conv2d(case.map_BCHW, kernels.reduce_DCHW, kernels.reduce_bias_D, padding=side // 2)
    torch.testing.assert_close(found, hidden, rtol=1e-4, atol=1e-4)
    out = nn.functional.conv2d(found, kernels.expand_OD[:, :, None, None], kernels.expand_bias_O)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("offsets", OFFSETS)
@settings(max_examples=8, deadline=None)
@given(case=cases())
def test_the_merged_3x3_is_the_sum_over_positions_and_heads(offsets: Offsets, case: Case) -> None:
    assert_equal_to_loops(case, offsets)


@torch.no_grad()
@settings(max_examples=8, deadline=None)
@given(case=cases(positions=1))
def test_the_merged_1x1_is_the_sum_over_heads(case: Case) -> None:
    assert_equal_to_loops(case, "rows")


def test_every_order_names_every_position_once() -> None:
    for offsets, of in OFFSET.items():
        assert [(row - 1, column - 1) for row, column in OFFSETS[offsets]] == [of(p) for p in range(9)]
        assert len(set(OFFSETS[offsets])) == 9
    assert [OFFSETS[offsets].index((1, 1)) for offsets in ("rows", "columns", "centre first")] == [4, 4, 0]


def test_gradients_reach_the_hosts_own_weights_and_the_mixture() -> None:
    """Nothing is copied: V and P are the host's, and its q and k have no part in it."""
    host, mixture_KS = Host(2, 3, 4), torch.randn(2, 9, requires_grad=True)
    kernels = Values.read(host, **host.names, heads=2).conv(mixture_KS, "columns")
    sum(value.square().sum() for value in kernels.state().values()).backward()
    assert mixture_KS.grad is not None and bool((mixture_KS.grad != 0).all())
    assert bool((host.qkv.weight.grad[12:] != 0).all()) and not bool(host.qkv.weight.grad[:12].any())
    assert bool((host.proj.weight.grad != 0).all()) and bool((host.proj.bias.grad != 0).all())


def test_rows_are_views_of_the_current_weights() -> None:
    host = Host(2, 3, 4, bias=False)
    weight, bias = Rows("qkv", 12, 18).read(host)
    assert bias is None and weight.shape == (6, 4)
    host.qkv.weight.data.fill_(7)
    assert bool((weight == 7).all())
    assert Rows("proj").read(host)[0].shape == (4, 6)


@torch.no_grad()
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("bias", [True, False])
def test_a_shared_start_mixes_all_heads_equally(kernel: int, bias: bool) -> None:
    """Every tap is the mean of the heads' W_v; W_o and b_v are summed once per tap."""
    heads, head_dim, dim = 3, 4, 5
    host = Host(heads, head_dim, dim, bias)
    state = SharedStart(**host.names, heads=heads).tensors(host, kernel)
    mean_v = host.qkv.weight[24:].reshape(heads, head_dim, dim).mean(0)
    for tap in state["reduce.weight"].flatten(2).unbind(2):
        torch.testing.assert_close(tap, mean_v)
    mean_out = host.proj.weight.reshape(dim, heads, head_dim).mean(1)
    torch.testing.assert_close(state["expand.weight"], kernel**2 * mean_out[:, :, None, None])
    b_v, b_o = torch.zeros(head_dim), torch.zeros(dim)
    if bias:
        b_v, b_o = kernel**2 * host.qkv.bias[24:].reshape(heads, head_dim).mean(0), host.proj.bias
    torch.testing.assert_close(state["reduce.bias"], b_v)
    torch.testing.assert_close(state["expand.bias"], b_o)
    spec = Conv(layout=Layout(grid=(4, 4)), dim=dim, kernel=kernel, rank=head_dim, norm="batch", act="relu")
    own = spec.build(IO()).state_dict()
    assert {name: value.shape for name, value in state.items()}.items() <= {n: v.shape for n, v in own.items()}.items()
    assert all(name.startswith("norm.") for name in own.keys() - state.keys())


def test_a_start_survives_json_and_refuses_what_it_does_not_know() -> None:
    start = SharedStart(v=Rows("qkv", 12, 18), out=Rows("proj"), heads=2)
    assert SharedStart.model_validate_json(start.model_dump_json()) == start
    for change in ({"heads": 0}, {"code": "1"}, {"v": {"path": "a..b"}}, {"v": {"path": "qkv", "start": -1}}):
        with pytest.raises(ValueError):
            SharedStart.model_validate({**start.model_dump(), **change})
