"""Fixtures: every tiny model, calibrated and converted once per session."""

from __future__ import annotations

import gc
import random
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

import msa2conv
from msa2conv import latency
from msa2conv.levers import DEFAULT
from msa2conv.options import Option
from msa2conv.plan import Plan
from msa2conv.report.inspection import Inspection
from msa2conv.search.calibration import Calibration
from msa2conv.workbench import working_copy

AT_SITES = tuple(name for name in DEFAULT if name != "merge_tokens")  # so that plans are sums of options of sites
TARGET = 0.7
latency._GLANCE = 1  # the report's times are believed by no test
torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """What importing made stays, and the rest is small: the collector need not look through it again and again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 50, 50)


@dataclass(frozen=True)
class Hybrid:
    """One way to convert a model: what was chosen, and what came out."""

    choices: Mapping[str, Option]
    plan: Plan
    tensors: Mapping[str, Tensor]
    model: nn.Module


@dataclass(frozen=True)
class Case:
    """A tiny model in the state in which a user might hand it over, and all that was derived from it."""

    name: str
    model: nn.Module
    before: Mapping[str, Any]
    after: Mapping[str, Any]
    work: nn.Module
    images: Tensor
    seen: Inspection
    calibration: Calibration
    result: msa2conv.Conversion

    @cached_property
    def options(self) -> dict[str, list[Option]]:
        return self.calibration.options()

    @property
    def keywords(self) -> dict[str, Any]:
        """What `convert` has to be told beside the target."""
        return keywords_of(self.name)

    def hybrid(self, choices: Mapping[str, Option]) -> Hybrid:
        """Plan and build any choice of options."""
        plan, tensors = msa2conv.make_plan(self.work, self.seen, choices)
        return Hybrid(choices, plan, tensors, msa2conv.apply(plan, self.work, tensors))

    def with_option(self, option: Option) -> nn.Module:
        """The model with this one option applied."""
        plan = self.result.plan.model_copy(update={"edits": option.edits})
        return msa2conv.apply(plan, self.work, option.tensors())

    @cached_property
    def random_hybrids(self) -> list[Hybrid]:
        """Three hybrids with an option drawn for every site."""
        draw = random.Random(self.name)
        return [self.hybrid({site: draw.choice(group) for site, group in self.options.items()}) for _ in range(3)]


def keywords_of(name: str) -> dict[str, Any]:
    return {
        "example_inputs": tiny.images(name)[:1],
        "adapters": tiny.adapters(name),
        "levers": AT_SITES,
        "progress": False,
    }


@cache
def case_of(name: str) -> Case:
    """Build, snapshot, calibrate and convert one tiny model."""
    model = tiny.live_in(tiny.build(name))
    images = tiny.images(name)
    before = tiny.snapshot(model)
    result = msa2conv.convert(model, TARGET, data=images, **keywords_of(name))
    after = tiny.snapshot(model)
    work = working_copy(model)
    seen = msa2conv.inspect(model, example_inputs=images[:1], adapters=tiny.adapters(name), levers=AT_SITES)
    return Case(name, model, before, after, work, images, seen, result.calibration, result)


@pytest.hookimpl(tryfirst=True)  # before those that are not asked for are left out
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of one tiny model run on one worker, so that it is calibrated and converted once."""
    for item in items:
        params = getattr(getattr(item, "callspec", None), "params", {})
        every = params.get("case", params.get("a"))  # the fixtures that are every tiny model in turn
        name = params.get("name", every)
        if name in tiny.NAMES:
            item.add_marker(pytest.mark.xdist_group(f"tiny {name}"))
        if every in tiny.VARIANTS:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(params=tiny.NAMES)
def case(request: pytest.FixtureRequest) -> Case:
    """Every tiny model in turn."""
    return case_of(request.param)


@pytest.fixture
def vit() -> Case:
    """The plain ViT."""
    return case_of("vit")
