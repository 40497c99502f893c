"""The label-free polish."""

from __future__ import annotations

import copy
import functools

import pytest
import tiny
import torch
from conftest import Case, case_of
from torch import nn

from msa2conv.errors import NonFiniteValue
from msa2conv.search.measure import Measure, distance, farther
from msa2conv.train import distill as distillation
from msa2conv.train.distill import augment, distill
from msa2conv.train.teacher import Teacher, shared_taps, tapped


def skipping(case: Case) -> nn.Module:
    """A hybrid far from the original: no attention at all."""
    sites = case.seen.claims.attentions
    return case.hybrid({s.path: next(o for o in case.options[s.path] if o.name == "skip") for s in sites}).model


@torch.no_grad()
def loss(case: Case, model: nn.Module, measure: Measure) -> float:
    return distance(case.work(case.images), model(case.images), measure)


@pytest.mark.parametrize(("name", "measure"), [("vit", "kl"), ("features", "relative"), ("foreign", "kl")])
def test_it_lowers_the_loss_and_touches_neither_model(name: str, measure: Measure) -> None:
    case = case_of(name)
    hybrid = skipping(case)
    before = tiny.snapshot(hybrid), tiny.snapshot(case.work)
    polished = distill(hybrid, case.work, case.images, 30, lr=2e-3, measure=measure, progress=False)
    assert loss(case, polished, measure) < 0.6 * loss(case, hybrid, measure)
    assert (tiny.snapshot(hybrid), tiny.snapshot(case.work)) == before
    assert not polished.training
    assert all(parameter.grad is None for parameter in polished.parameters())
    flags = [[parameter.requires_grad for parameter in model.parameters()] for model in (hybrid, polished)]
    assert flags[0] == flags[1]


def test_hidden_states_are_imitated_where_sites_are_given(vit: Case) -> None:
    hybrid, sites = skipping(vit), [site.path for site in vit.seen.claims.sites]
    taps = shared_taps(hybrid, Teacher(vit.work, torch.device("cpu")), sites, vit.images[:2])
    assert taps == ("blocks.0", "blocks.1", "blocks.2")

    def error(model: nn.Module) -> float:
        with torch.no_grad(), tapped(model, taps) as own, tapped(vit.work, taps) as theirs:
            model(vit.images)
            vit.work(vit.images)
        return sum(float((own[path] - theirs[path]).square().mean()) for path in taps)

    polish = functools.partial(distill, hybrid, vit.work, vit.images, 20, lr=1e-3, progress=False)
    assert error(polish(sites=sites)) < 0.9 * error(polish()) < error(hybrid)


def test_the_seed_decides(vit: Case) -> None:
    hybrid = skipping(vit)
    runs = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(runs))  # the global random state has no say
        runs.append(distill(hybrid, vit.work, vit.images, 3, seed=seed, progress=False).state_dict())
    assert all(torch.equal(value, runs[1][name]) for name, value in runs[0].items())
    assert not all(torch.equal(value, runs[2][name]) for name, value in runs[0].items())


def test_a_loss_that_explodes_names_the_step(vit: Case) -> None:
    with pytest.raises(NonFiniteValue, match="distillation step 0"):
        distill(skipping(vit), vit.work, vit.images * float("inf"), 3, progress=False)


@pytest.mark.parametrize("lr", [2e-3, 10.0], ids=["learns", "breaks"])
def test_what_takes_it_farther_is_not_kept(vit: Case, lr: float) -> None:
    hybrid = skipping(vit)
    polished = distill(hybrid, vit.work, vit.images, 10, held_out=vit.images, lr=lr, progress=False)
    before, after = (loss(vit, model, "kl") for model in (hybrid, polished))
    assert after == before if lr == 10.0 else after < 0.9 * before


def test_what_is_nearly_exact_is_not_shaken(vit: Case) -> None:
    hybrid = copy.deepcopy(vit.work)
    with torch.no_grad():
        for parameter in hybrid.parameters():
            parameter *= 1 + 1e-3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    polished = distill(hybrid, vit.work, vit.images, 10, lr=2e-3, progress=False)
    assert 0 < loss(vit, polished, "kl") < 3 * loss(vit, hybrid, "kl")


def test_judging_touches_no_network_that_is_in_training() -> None:
    def network() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)).train()

    hybrid, original, images = network(), network(), torch.randn(8, 3, 2, 2)
    before = tiny.snapshot(hybrid), tiny.snapshot(original)
    distill(hybrid, original, images, 1, held_out=images, progress=False)
    assert (tiny.snapshot(hybrid), tiny.snapshot(original)) == before and hybrid.training and original.training


@pytest.mark.parametrize(("now", "kept"), [([0.0, 0.0, 2.5, 2.5], True), ([1.4, 1.4, 1.4, 1.5], False)])
def test_chance_does_not_undo_it(vit: Case, now: list[float], kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are farther than the 1 of before: one by half a standard error, the other by many."""
    hybrid, found = skipping(vit), iter([torch.ones(4), torch.tensor(now)])
    monkeypatch.setattr(distillation, "distances", lambda *_: next(found))
    polished = distill(hybrid, vit.work, vit.images, 2, held_out=vit.images, progress=False)
    assert all(map(torch.equal, polished.parameters(), hybrid.parameters())) is not kept


def test_convert_polishes_and_reports_it(vit: Case) -> None:
    import msa2conv

    arguments = {"data": vit.images, "calibration": vit.calibration, **vit.keywords}
    result = msa2conv.convert(vit.model, 0.3, distill_steps=40, **arguments)
    assert result.report.distance_polished is not None
    assert result.report.distance_polished < result.report.distance
    assert result.plan.flops <= 0.3 * vit.seen.costs.base
    assert result.model.training == vit.model.training


def test_augmentation_keeps_shape_and_range_and_treats_images_apart() -> None:
    images = torch.rand(6, 3, 16, 24)
    augmented = augment(images, torch.Generator().manual_seed(0))
    assert augmented.shape == images.shape
    assert images.min() - 1e-5 <= augmented.min() and augmented.max() <= images.max() + 1e-5
    same = augment(images[:1].expand(6, -1, -1, -1), torch.Generator().manual_seed(0))
    assert not torch.equal(same[0], same[1])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_farther(value: float) -> None:
    assert farther(torch.ones(4), torch.tensor([0.0, 0.0, 0.0, value]))
    assert not farther(torch.ones(4), torch.ones(4))
