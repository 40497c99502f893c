"""Folding a BatchNorm changes neither outputs nor what a plan promises."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models import images, same, vit
from searches import prepared, put_thresholds, scramble
from torch import nn

import msa2conv
from msa2conv import Gates
from msa2conv.layouts import Layout
from msa2conv.ops import IO, Conv
from msa2conv.plan import Replace
from msa2conv.transforms.fold_norm import fold_norms


def searched(name: str = "vit") -> msa2conv.Conversion:
    """Of random BatchNorms, head mixtures and FFN gates; convolutions wherever they can be."""
    search = scramble(prepared(name, 0.6, gates=Gates(exact=False)))
    put_thresholds(search, (2.0, 2.0, -2.0), 1.0)
    search.penalty()
    return search.finish()


@pytest.mark.parametrize("name", ["vit", "swin"])
def test_outputs_stay_and_the_plan_holds(name: str, tmp_path: Path) -> None:
    before = searched(name)
    after = msa2conv.fold_norms(before)
    assert any(isinstance(m, nn.BatchNorm2d) for m in before.model.modules())
    assert not any(isinstance(m, nn.BatchNorm2d) for m in after.model.modules())
    shape = before.plan.base.input_size
    pictures = torch.randn(2, *shape)
    with torch.no_grad():
        expected, found = before.model.eval()(pictures), after.model.eval()(pictures)
    assert (expected - found).abs().max() <= 1e-4 * max(1, expected.abs().max())
    assert msa2conv.count_flops(after.model, pictures) == after.plan.flops < before.plan.flops
    assert after.report.flops_after == after.plan.flops and after.plan.choices == before.plan.choices
    rest, sites = before.plan.flops - sum(site.after for site in before.report.sites), after.report.sites
    assert rest + sum(site.after for site in sites) == after.plan.flops  # what sites take is told anew
    after.save(tmp_path)
    assert before.original is not None and same(msa2conv.load(tmp_path, before.original), after.model)
    assert msa2conv.fold_norms(after) is after


@pytest.mark.parametrize("act", [None, "relu"])
@pytest.mark.parametrize("kernel", [1, 3])
def test_a_mixer_with_and_without_activation(act: str | None, kernel: int) -> None:
    torch.manual_seed(0)
    spec = Conv(
        layout=Layout(grid=(4, 4), prefix=1),
        dim=6,
        kernel=kernel,
        rank=3,
        norm="batch",
        act=act,
        prefix={"kind": "pass"},
    )
    edit = Replace(path="0", spec=spec, io=IO())
    mixer = spec.build(edit.io)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.normal_()
        mixer.norm.running_mean.normal_(), mixer.norm.running_var.uniform_(0.5, 2)
    model = nn.Sequential(mixer).eval()
    mixer.reduce.weight.requires_grad_(False)
    (edit,), folded = fold_norms((edit,), model)
    x = torch.randn(2, 17, 6)
    torch.testing.assert_close(folded(x), model(x), atol=1e-5, rtol=1e-5)
    assert isinstance(edit, Replace) and isinstance(edit.spec, Conv) and edit.spec.norm is None
    assert not folded[0].reduce.weight.requires_grad and folded[0].expand.weight.requires_grad


def test_a_hosts_own_norms_stay() -> None:
    result = msa2conv.convert(vit(), 0.6, data=images(16), progress=False)
    assert msa2conv.fold_norms(result) is result
