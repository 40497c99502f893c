"""Lever "mixer": closed-form fits recover what can be recovered, and prefix tokens keep what can be kept."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import Case, case_of
from pydantic import ValidationError
from torch import Tensor, nn

from msa2conv.cost import CostModel
from msa2conv.kernels import Rows
from msa2conv.layouts import Layout
from msa2conv.levers import Mixer
from msa2conv.levers.mixer import Candidate, MixerRecord
from msa2conv.ops import IO, AttendPrefix, Constant, Conv, Depthwise, Global, MixerSpec, RidgePrefix
from msa2conv.sites import AttentionSite, Projections
from msa2conv.transforms.lift import realise

DIM = 12
GRID = Layout(grid=(5, 6))
TOKENS = Layout(grid=(5, 6), prefix=1)
SWIN = Layout(pattern="(b nh nw) (h w) c", grid=(5, 6), window=(3, 3), shift=(1, 1))


def host_of(spec: MixerSpec, seed: int = 0) -> nn.Module:
    """A "host" that truly is a mixer, with random weights."""
    host, generator = spec.build(IO()), torch.Generator().manual_seed(seed)
    for parameter in host.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return host


def pictures(layout: Layout, count: int = 200) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    map_BCHW = torch.randn(count, DIM, *layout.grid, generator=generator)
    map_BCHW += torch.randn(count, DIM, 1, 1, generator=generator) + 2
    prefix_BPC = torch.randn(count, layout.prefix, DIM, generator=generator) if layout.prefix else torch.zeros(0)
    return layout.from_map(prefix_BPC, map_BCHW)


@torch.no_grad()
def fitted(
    host: nn.Module, layout: Layout, lever: Mixer, heads: int = 3, projections: Projections | None = None
) -> MixerRecord:
    site = AttentionSite("attn", "attn", DIM, heads, DIM // heads, layout, IO(), projections)
    x = pictures(layout)
    windows = len(layout.from_map(torch.zeros(0), torch.zeros(1, 1, *layout.grid))) if layout.window else 1
    costs = CostModel(10**9, {"attn": 10**8}, {}, {"attn": (windows, *x.shape[1:])})
    statistics = lever.statistics(site, host, 1.0, 1.0)
    for batch in x.split(50 * windows):
        statistics.update(batch, host(batch))
    return statistics.fit(host, costs)


def candidate(record: MixerRecord, op: str) -> Candidate:
    return next(each for each in record.candidates if each.name == op)


@torch.no_grad()
def error_of(record: MixerRecord, op: str, host: nn.Module, layout: Layout) -> float:
    """Relative to the variance of the host's output on the map."""
    option = next(option for option in record.options() if option.name == op)
    x = pictures(layout)
    expected, found = layout.to_map(host(x))[1], layout.to_map(realise(option, record.at, host)(x))[1]
    return float((found - expected).square().sum() / (expected - expected.mean()).square().sum())


EXACT = {"ridge": 1e-9}


@pytest.mark.parametrize("layout", [GRID, TOKENS, SWIN], ids=["grid", "prefix", "windows"])
def test_a_host_that_is_a_low_rank_convolution_is_recovered(layout: Layout) -> None:
    prefix = RidgePrefix() if layout.prefix else None
    host = host_of(Conv(layout=layout, dim=DIM, kernel=3, rank=4, prefix=prefix))
    record = fitted(host, layout, Mixer(**EXACT))
    assert error_of(record, "conv3x3", host, layout) < 1e-3**2
    assert error_of(record, "conv1x1", host, layout) > 0.1


def test_a_full_rank_convolution_needs_the_full_rank() -> None:
    host = host_of(Conv(layout=GRID, dim=DIM, kernel=3, rank=DIM))
    errors = [error_of(fitted(host, GRID, Mixer(rank=rank, **EXACT)), "conv3x3", host, GRID) for rank in (1, 2, 3)]
    assert errors[0] > errors[1] > 0.01
    assert errors[2] < 1e-3**2


def test_a_smaller_kernel_is_fitted_beside_a_larger_one() -> None:
    host = host_of(Conv(layout=GRID, dim=DIM, kernel=1, rank=4))
    record = fitted(host, GRID, Mixer(ops=("conv1x1", "conv5x5"), **EXACT))
    assert error_of(record, "conv1x1", host, GRID) < 1e-3**2
    assert error_of(record, "conv5x5", host, GRID) < 1e-3**2


def test_context_is_found() -> None:
    host = host_of(Conv(layout=TOKENS, dim=DIM, kernel=3, rank=4, context=True, prefix=RidgePrefix()))
    with_context, without = (fitted(host, TOKENS, Mixer(context=each, **EXACT)) for each in (True, False))
    assert error_of(with_context, "conv3x3", host, TOKENS) < 0.2 * error_of(without, "conv3x3", host, TOKENS)
    assert candidate(with_context, "conv3x3").spec.context and not candidate(without, "conv3x3").spec.context


def test_a_host_that_is_global_or_constant_is_recovered() -> None:
    host = host_of(Global(layout=TOKENS, dim=DIM, prefix=RidgePrefix()))
    record = fitted(host, TOKENS, Mixer(**EXACT))
    assert error_of(record, "global", host, TOKENS) < 1e-3
    host = host_of(Constant(layout=TOKENS, dim=DIM))
    record = fitted(host, TOKENS, Mixer(**EXACT))
    constant = candidate(record, "constant").tensors
    torch.testing.assert_close(constant["grid_CHW"], host.grid_CHW.detach())
    torch.testing.assert_close(constant["prefix_PC"], host.prefix_PC.detach())
    assert "context.weight" not in candidate(record, "global").tensors, "there is nothing left to predict"


def prefix_kinds(case: Case) -> set[str | None]:
    specs = [
        each.spec
        for record in case.calibration.records
        if isinstance(record, MixerRecord)
        for each in record.candidates
    ]
    return {spec.prefix and spec.prefix.kind for spec in specs if isinstance(spec, (Conv, Depthwise, Global))}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, "attend") for name in ("vit", "distilled", "deit3", "registers", "non_square", "features")),
        ("qk_norm", "ridge"),
        *((name, None) for name in ("avg_pool", "swin", "foreign")),
    ],
)
def test_prefix_tokens_keep_their_attention_where_it_is_plain(name: str, kind: str | None) -> None:
    assert prefix_kinds(case_of(name)) == {kind}


@torch.no_grad()
def test_projections_that_lie_are_noticed() -> None:
    """An adapter that calls a q/k-normed attention plain is not believed."""
    honest, lied = case_of("vit"), case_of("qk_norm")
    for case, projections, kind in [
        (honest, honest.seen.claims.attentions[0].projections, AttendPrefix),
        (lied, honest.seen.claims.attentions[0].projections, RidgePrefix),
    ]:
        site = replace(case.seen.claims.attentions[0], projections=projections)
        host = case.work.get_submodule(site.path)
        statistics = Mixer().statistics(site, host, 1.0, 1.0)
        x = torch.randn(12, 17, 48, generator=torch.Generator().manual_seed(0))
        statistics.update(x, host(x))
        assert isinstance(statistics._prefix_spec(), kind)


def test_attended_prefix_tokens_come_out_as_the_host_makes_them() -> None:
    case = case_of("registers")
    site = case.seen.claims.attentions[1]
    host = case.work.get_submodule(site.path)
    x = torch.randn(3, 19, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for option in case.options[site.path]:
            if option.name in ("global", "conv1x1", "conv3x3", "depthwise3x3"):
                found = realise(option, site, host)(x)
                torch.testing.assert_close(found[:, :3], host(x)[:, :3], rtol=1e-4, atol=1e-4)


def test_only_mixers_cheaper_than_the_host_are_options(case: Case) -> None:
    for record in case.calibration.records:
        if isinstance(record, MixerRecord):
            assert record.candidates and all(each.flops < record.costs.hosts[record.site] for each in record.candidates)


@pytest.mark.parametrize("fields", [{"ops": ("conv2x2",)}, {"ops": ("conv3x5",)}, {"rank": 0}, {"ridge": -1}], ids=str)
def test_malformed_levers_are_refused(fields: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Mixer.model_validate(fields)


class Averaging(nn.Module):
    """Is a `Depthwise` mixer whose output layer is a Linear, as an attention's is; bias of values included."""

    def __init__(self, layout: Layout, context: bool = False) -> None:
        super().__init__()
        prefix = RidgePrefix() if layout.prefix else None
        spec = Depthwise(layout=layout, dim=DIM, kernel=3, width=DIM, context=context, prefix=prefix)
        self.inner, self.layout = host_of(spec), layout
        self.v, self.proj = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)
        self.inner.value.weight.data = self.v.weight.data[:, :, None, None]
        self.weights = nn.Parameter(torch.randn(DIM, 1 + layout.prefix, generator=torch.Generator().manual_seed(1)))

    def forward(self, x: Tensor) -> Tensor:
        prefix_BPC, map_BCHW = self.layout.to_map(x)
        read_BVHW = self.inner.taps(self.inner.value(map_BCHW)) + self.v.bias[:, None, None]
        seen_BCF = map_BCHW.mean((2, 3))[..., None]
        if self.layout.prefix:
            seen_BCF = torch.cat((prefix_BPC.transpose(1, 2), seen_BCF), 2)
        read_BVHW = read_BVHW + ((self.v.weight @ seen_BCF) * self.weights).sum(2)[:, :, None, None]
        return self.proj(self.layout.from_map(prefix_BPC, read_BVHW))


NAMED = Projections(Rows("v"), Rows("proj"), heads=3, head_dim=DIM // 3)


@pytest.mark.parametrize("layout", [GRID, TOKENS, SWIN], ids=["grid", "prefix", "windows"])
def test_a_host_that_averages_by_a_convolution_is_recovered(layout: Layout) -> None:
    host = Averaging(layout)
    lever = Mixer(ops=("conv1x1", "depthwise3x3", "depthwise5x5"), **EXACT)
    record = fitted(host, layout, lever, projections=NAMED)
    assert error_of(record, "depthwise3x3", host, layout) < 1e-3**2
    assert error_of(record, "depthwise5x5", host, layout) < 1e-3**2
    assert error_of(record, "conv1x1", host, layout) > 0.1
    taps = candidate(record, "depthwise3x3").tensors["taps.weight"]
    torch.testing.assert_close(taps, host.inner.taps.weight.detach(), rtol=1e-3, atol=1e-3)
    assert not host.proj._forward_pre_hooks, "nothing listens any more"


def test_without_context_a_depthwise_convolution_sees_its_neighbours_only() -> None:
    host, ops = Averaging(TOKENS), ("depthwise3x3",)
    seeing, blind = (
        fitted(host, TOKENS, Mixer(ops=ops, context=each, **EXACT), projections=NAMED) for each in (True, False)
    )
    assert candidate(seeing, "depthwise3x3").spec.context and not candidate(blind, "depthwise3x3").spec.context
    errors = [error_of(record, "depthwise3x3", host, TOKENS) for record in (seeing, blind)]
    assert errors[0] < 1e-3 * errors[1]


class Gated(Averaging):
    """More than W_o stands behind what is read."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 1.1


def test_a_depthwise_convolution_needs_the_host_to_read_by_its_output_layer_alone() -> None:
    for host, named in [
        (Gated(GRID), NAMED),
        (Averaging(GRID), None),
        (Averaging(GRID), replace(NAMED, out=Rows("v"))),
    ]:
        record = fitted(host, GRID, Mixer(ops=("conv1x1", "depthwise3x3")), projections=named)
        assert [each.name for each in record.candidates] == ["conv1x1"]


@pytest.mark.parametrize("name", ["vit", "qk_norm", "swin"])
def test_attentions_of_every_kind_may_become_depthwise(name: str) -> None:
    offered = {option.name for options in case_of(name).options.values() for option in options}
    assert "depthwise3x3" in offered
