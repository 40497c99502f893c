"""Lever "ffn": which units go, and what the refit makes of the rest."""

from __future__ import annotations

import copy
from itertools import pairwise

import numpy as np
import pytest
import torch
from conftest import Case
from hypothesis import given, strategies as st
from torch import Tensor, nn

from msa2conv.cost import CostModel
from msa2conv.layouts import Layout
from msa2conv.levers import FFN
from msa2conv.levers.ffn import FFNRecord
from msa2conv.sites import FFNSite, Units
from msa2conv.transforms.apply import apply_edits, load_tensors

DIM, HIDDEN = 6, 16
UNITS = Units((("up.weight", 0), ("up.bias", 0), ("down.weight", 1)))


class Mlp(nn.Module):
    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(DIM, HIDDEN), nn.Linear(HIDDEN, DIM, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.hidden(x))

    def hidden(self, x: Tensor) -> Tensor:
        return torch.tanh(self.up(x))


def fitted(host: Mlp, x: Tensor, prefix: int = 0, weight: float = 1.0, step: int = 4) -> FFNRecord:
    layout = Layout(grid=(1, x.shape[1] - prefix), prefix=prefix)
    site = FFNSite("mlp", "mlp", DIM, HIDDEN, layout, "down", UNITS)
    costs = CostModel(10**6, {"mlp": 1600}, {"mlp": 100}, {"mlp": (1, *x.shape[1:])})
    statistics = FFN(round_to=step, min_keep=0.25, ridge=1e-9).statistics(site, host.down, weight, 1.0)
    with torch.no_grad():
        for batch in x.split(16):
            statistics.update(host.hidden(batch), host(batch))
        return statistics.fit(host.down, costs)


def narrowed(record: FFNRecord, host: Mlp, width: int) -> Mlp:
    option, holder = record._option(width, None), nn.Module()
    holder.mlp = copy.deepcopy(host)
    apply_edits(holder, option.edits)
    load_tensors(holder, option.tensors())
    return holder.mlp


@torch.no_grad()
def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).square().sum() / (expected - expected.mean((0, 1))).square().sum())


@pytest.mark.parametrize("step", [1, 4])
def test_units_that_others_can_stand_in_for_go_first_and_cost_nothing(step: int) -> None:
    """Four units repeat others (two with the sign flipped): one of each pair may go, never both."""
    torch.manual_seed(0)
    host = Mlp()
    pairs = {(0, 1), (5, 6), (9, 10), (14, 15)}
    with torch.no_grad():
        for (twin, original), sign in zip(sorted(pairs), (1, -1, 1, -1), strict=True):
            host.up.weight[twin] = sign * host.up.weight[original]
            host.up.bias[twin] = sign * host.up.bias[original]
    x = 3 * torch.randn(64, 9, DIM)
    record = fitted(host, x, step=step)
    gone = set(record.order[:4].tolist())
    assert [len(gone & set(pair)) for pair in sorted(pairs)] == [1, 1, 1, 1]
    assert relative_error(narrowed(record, host, 12)(x), host(x)) < 1e-6
    assert relative_error(narrowed(record, host, 8)(x), host(x)) > 1e-4


@pytest.mark.parametrize(("bias", "prefix", "weight"), [(True, 0, 1.0), (True, 2, 50.0)])
def test_the_refit_is_weighted_least_squares(bias: bool, prefix: int, weight: float) -> None:
    torch.manual_seed(1)
    host, x = Mlp(bias), 2 * torch.randn(64, 9, DIM)
    record = fitted(host, x, prefix, weight)
    small = narrowed(record, host, 8)
    rows = torch.ones(64, 9)
    rows[:, :prefix] = weight
    scale = rows.sqrt().reshape(-1, 1).numpy()
    with torch.no_grad():
        hidden, out = small.hidden(x).reshape(-1, 8).numpy(), host(x).reshape(-1, DIM).numpy()
    inputs = np.hstack([hidden, np.ones((len(hidden), 1))])
    expected = np.linalg.lstsq(scale * inputs, scale * out, rcond=None)[0]
    np.testing.assert_allclose(small.down.weight.detach().numpy(), expected[:-1].T, atol=1e-3)
    np.testing.assert_allclose(small.down.bias.detach().numpy(), expected[-1], atol=1e-3)


def test_without_a_bias_none_is_made_up() -> None:
    host, x = Mlp(bias=False), torch.randn(32, 9, DIM)
    small = narrowed(fitted(host, x), host, 8)
    assert small.down.bias is None and small.down.weight.shape == (DIM, 8)


def test_narrower_ffns_keep_a_subset_and_cost_less() -> None:
    torch.manual_seed(2)
    host, x = Mlp(), torch.randn(32, 9, DIM)
    record = fitted(host, x)
    kept = [set(record.order[HIDDEN - width :].tolist()) for width in (4, 8, 12, 16)]
    assert all(small < large for small, large in pairwise(kept))
    errors = [relative_error(narrowed(record, host, width)(x), host(x)) for width in (4, 8, 12, 16)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-6
    assert [record._option(width, None).flops for width in (4, 16)] == [400, 1600]


def test_narrowing_reports_honest_sizes() -> None:
    host = Mlp()
    small = narrowed(fitted(host, torch.randn(32, 9, DIM)), host, 8)
    assert (small.up.out_features, small.down.in_features) == (8, 8)
    assert small.up.weight.shape == (8, DIM) and small.up.bias.shape == (8,)
    assert host.up.weight.shape == (HIDDEN, DIM)


@given(hidden=st.integers(1, 3000), step=st.integers(1, 128), keep=st.floats(0.01, 1))
def test_widths(hidden: int, step: int, keep: float) -> None:
    widths = FFN(round_to=step, min_keep=keep).widths(hidden)
    assert widths == sorted(set(widths)) and widths[-1] == hidden
    assert all(width % min(step, hidden) == 0 for width in widths[:-1])
    assert widths[0] >= min(keep * hidden, hidden)


def test_scores_between_measured_widths_are_interpolated(case: Case) -> None:
    for record in case.calibration.records:
        if isinstance(record, FFNRecord):
            options = record.options()
            measured = dict(record.scores)
            assert options[0].score == 0 and len(options) == len(FFN().widths(record.at.hidden))
            for option in options[1:]:
                width = int(option.name.split("/")[0])
                around = sorted((*measured, record.at.hidden), key=lambda each: abs(each - width))
                if width in measured:
                    assert option.score == pytest.approx(measured[width])
                else:
                    near = [measured.get(each, 0.0) for each in around[:4]]
                    assert min(near) <= option.score <= max(near)
