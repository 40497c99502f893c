"""Whole heads of attentions that cannot be restated: what hangs on one is found by trial, which go is told by data."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import case_of
from models import images, swin, vit
from torch import Tensor, nn
from versions import NARROW_ATTENTION

import msa2conv
from msa2conv import Calibration, Conversion, ThinAttention
from msa2conv.flops import count_flops
from msa2conv.levers.fewer_heads import HeadStatistics
from msa2conv.observation import Call
from msa2conv.sites import AttentionSite, HeadUnits
from msa2conv.transforms.apply import apply_edits
from msa2conv.transforms.heads import head_units

SWIN_HEADS = {"qkv.weight", "qkv.bias", "proj.weight", "relative_position_bias_table"}


@pytest.fixture(scope="module")
def result() -> Conversion:
    return msa2conv.convert(swin(), 0.85, data=images(size=56), levers="thin_attention")


def test_what_hangs_on_a_head_of_swin() -> None:
    site = msa2conv.inspect(swin()).claims.attentions[2]
    units = site.head_units
    assert units is not None and units.heads == 6 and units.attributes == (("num_heads", 1),)
    assert {name for name, *_ in units.hanging} == SWIN_HEADS
    parts = sorted(part[1:] for part in units.hanging if part[0] == "qkv.bias")
    assert parts == [(0, 0, 8), (0, 48, 8), (0, 96, 8)], "keys too, whose bias cancels in the softmax"


class Rotated(nn.Module):
    """Heads apart from each other, [K, 3, D] in one projection, with a norm of queries that all heads share."""

    def __init__(self, dim: int = 24, heads: int = 4, talking: bool = False, fixed: bool = False) -> None:
        super().__init__()
        self.heads, self.dim, self.fixed = heads, dim, fixed
        self.mixed, self.norm = nn.Linear(dim, 3 * dim), nn.LayerNorm(dim // heads)
        self.gain = nn.Parameter(torch.ones(heads, 1, 1))
        self.talk = nn.Linear(heads, heads) if talking else nn.Identity()
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, count, dim = x.shape
        q, k, v = self.mixed(x).reshape(batch, count, self.heads, 3, -1).permute(3, 0, 2, 1, 4)
        scores = self.talk((self.norm(q) @ k.transpose(-2, -1) * self.gain).movedim(1, -1)).movedim(-1, 1)
        found = (scores.softmax(-1) @ v).transpose(1, 2)
        return self.out(found.reshape(batch, count, dim if self.fixed else -1))


CALL = Call((2, 9, 24), (2, 9, 24))


def test_other_orders_are_found_by_trial() -> None:
    units = head_units(Rotated(), 4, "out", CALL)
    assert units is not None and units.attributes == (("heads", 1),)
    assert set(units.hanging) == {
        ("mixed.weight", 0, 0, 18), ("mixed.bias", 0, 0, 18), ("gain", 0, 0, 1), ("out.weight", 1, 0, 6),
    }  # fmt: skip


@pytest.mark.parametrize("how", [{"talking": True}, {"fixed": True}], ids=["talking heads", "a fixed reshape"])
def test_heads_that_cannot_go_are_left(how: dict[str, bool]) -> None:
    assert head_units(Rotated(**how), 4, "out", CALL) is None


def test_one_head_has_none_to_spare() -> None:
    assert head_units(Rotated(heads=1), 1, "out", CALL) is None


def test_plain_attentions_are_restated_instead() -> None:
    assert all(site.head_units is None for site in msa2conv.inspect(vit()).claims.attentions)


@torch.no_grad()
def test_every_choice_of_heads_is_what_is_left_of_the_sum() -> None:
    """Against silencing them: any heads may stay, in any block, with masks of shifted windows."""
    model = swin()
    for site in msa2conv.inspect(model).claims.attentions:
        units = site.head_units
        assert units is not None
        for kept in ([0], [1], [0, 2], [1, 2]):
            shortened = swin()
            apply_edits(shortened, units.edits(site.path, kept))
            silenced = swin()
            weight = silenced.get_submodule(site.path).proj.weight  # type: ignore[union-attr]
            for head in set(range(units.heads)) - set(kept):
                weight[:, 8 * head : 8 * head + 8] = 0  # type: ignore[index, operator]
            torch.testing.assert_close(shortened(images(2, 56)), silenced(images(2, 56)), rtol=1e-4, atol=1e-4)


def test_a_conversion_drops_heads_and_every_law_holds(result: Conversion) -> None:
    names = [name for name in result.plan.choices.values() if name.startswith("attend")]
    assert names and result.report.laws["lowering"] < 1e-5
    assert count_flops(result.model, images(1, 56)) == result.plan.flops <= 0.85 * result.plan.base.flops


def test_file_and_calibration_hold_it(result: Conversion, tmp_path: Path) -> None:
    loaded = msa2conv.load(result.save(tmp_path / "hybrid.safetensors"), swin())
    torch.testing.assert_close(loaded(images(2, 56)), result.model(images(2, 56)), rtol=0, atol=0)
    assert result.calibration is not None
    saved = result.calibration.save(tmp_path / "calibration.safetensors")
    again = Calibration.load(saved, msa2conv.inspect(swin()).claims)
    assert msa2conv.convert(swin(), 0.85, calibration=again).plan == result.plan


def record_of(host: Rotated, x: Tensor) -> tuple[Tensor, ...]:
    """Heads kept by the data: three of four."""
    site = case_of("swin").seen.claims.attentions[0]
    units = HeadUnits(4, (("out.weight", 1, 0, 6),))
    named = site.projections
    assert named is not None
    site = replace(site, head_units=units, projections=replace(named, out=replace(named.out, path="out")))
    statistics = HeadStatistics(site, host, (0.75,), 1e-8, 1.0)
    statistics.update(x, host(x))
    (kept,) = statistics.fit(host, case_of("swin").seen.costs).candidates
    assert not host.out._forward_pre_hooks
    return torch.tensor(kept.heads), kept.tensors["weight"], kept.tensors["bias"]


@torch.no_grad()
@pytest.mark.parametrize("silent", range(4))
def test_a_head_that_says_nothing_goes_and_nothing_is_lost(silent: int) -> None:
    torch.manual_seed(0)
    host, x = Rotated(), torch.randn(8, 9, 24, generator=torch.Generator().manual_seed(1))
    host.out.weight[:, 6 * silent : 6 * silent + 6] = 0
    heads, weight, bias = record_of(host, x)
    assert heads.tolist() == [head for head in range(4) if head != silent]
    rest = [column for head in heads.tolist() for column in range(6 * head, 6 * head + 6)]
    torch.testing.assert_close(weight, host.out.weight[:, rest], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(bias, host.out.bias, rtol=1e-3, atol=1e-3)


def test_it_applies_where_heads_are_known() -> None:
    lever = ThinAttention()
    site: AttentionSite = msa2conv.inspect(swin()).claims.attentions[0]
    assert lever.applies(site)
    assert lever.applies(case_of("qk_norm").seen.claims.attentions[0]) is NARROW_ATTENTION
    assert not lever.applies(replace(site, head_units=None))
