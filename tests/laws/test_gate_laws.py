"""The laws for gate searches, on every tiny model: whatever gates, head mixtures and BatchNorms were learned."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hypothesis import HealthCheck, example, given, settings, strategies as st
from searches import ANY_WIDTH, assert_close, options, put_thresholds, run, scramble
from torch import Tensor, nn

import msa2conv
from msa2conv import Conversion, Gates, Search
from msa2conv.errors import InfeasibleBudget
from msa2conv.flops import count_flops
from msa2conv.options import Option
from msa2conv.plan import Plan
from msa2conv.workbench import working_copy

GATES = {
    "distilled": Gates(offsets="columns", sampling="annealed"),
    "deit3": Gates(alpha=1.0, skip_inactive=True),
    "swin": Gates(offsets="centre first", alpha=100),
    "swin_padded": Gates(windowed=True),
}


@dataclass
class Run:
    """A tiny model as a user might hand it over, a short search on it, and what both left behind.

    Args:
        before, after: the model and the random state, around all of it.
        fresh: output of the supernet before its first step.
        result: what the search ended in.
    """

    name: str
    model: nn.Module
    work: nn.Module
    images: Tensor
    search: Search
    before: Any
    after: Any
    fresh: Tensor
    result: Conversion


def keywords(name: str) -> dict[str, Any]:
    levers = ("mixer", ANY_WIDTH)
    return {"example_inputs": tiny.images(name)[:1], "adapters": tiny.adapters(name), "levers": levers}


@cache
def run_of(name: str) -> Run:
    """Prepare, take two steps in a user's own loop, finish."""
    model, images = tiny.live_in(tiny.build(name)), tiny.images(name, 6)
    before = tiny.snapshot(model), torch.get_rng_state().tolist()
    search = msa2conv.prepare(model, 0.6, steps=2, gates=GATES.get(name), **keywords(name))
    fresh, random_state = run(search.model, images), torch.get_rng_state()
    optimizer = torch.optim.SGD(search.param_groups(lr=1e-2, gate_lr=1.0))
    search.model.train()
    for _ in range(2):
        (search.model(images).square().mean() + search.penalty()).backward()
        optimizer.step()
    torch.set_rng_state(random_state)  # what the user's own loop drew does not count
    result = search.finish(images)
    after = tiny.snapshot(model), torch.get_rng_state().tolist()
    return Run(name, model, working_copy(model), images, search, before, after, fresh, result)


@pytest.fixture(params=tiny.NAMES)
def a(request: pytest.FixtureRequest) -> Run:
    """A search of every tiny model in turn, with other gates in every test."""
    found = run_of(request.param)
    scramble(found.search)
    return found


@cache
def random_hybrids(name: str) -> list[tuple[dict[str, Option], Conversion]]:
    """Two hybrids of a scrambled search; between them every mixer stands somewhere."""
    search, draw = scramble(run_of(name).search, seed=1), random.Random(name)
    found = []
    for turn in (0, 1):
        groups = options(search)
        chosen = {path: draw.choice(group) for path, group in groups.items()}
        for place, path in enumerate(search.mixers):
            chosen[path] = groups[path][(place + turn) % len(groups[path])]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(search, "decide", lambda chosen=chosen: chosen)
            patch.setattr(search, "target", search.inspection.costs.base)
            found.append((chosen, search.finish()))
    return found


def test_every_attention_and_ffn_has_a_gate(a: Run) -> None:
    blocks = 4 if a.name.startswith("swin") else 3
    assert (len(a.search.nodes), len(a.search.units)) == (blocks, blocks)
    assert [len(node.gate.theta) for node in a.search.nodes.values()] == [3] * blocks


# Law 1


def test_a_fresh_supernet_is_the_original(a: Run) -> None:
    assert_close(a.fresh, run(a.work, a.images))


def test_with_every_gate_open_the_supernet_is_its_host(a: Run) -> None:
    """In eval mode and by its own thresholds, whatever was learned besides."""
    dense = run(a.search.dense(), a.images)
    put_thresholds(a.search, (0.01, 0.01, 0.01), 0.01)
    assert_close(run(a.search.model, a.images), dense)
    put_thresholds(a.search, mixers=(0.01, 0.01, -0.01))
    assert float((run(a.search.model, a.images) - dense).abs().max()) > 0.05
    put_thresholds(a.search, units=-0.01)
    assert float((run(a.search.model, a.images) - dense).abs().max()) > 0.05


# Law 2


def test_lowering_is_exact(a: Run) -> None:
    names = set[str]()
    for choices, result in random_hybrids(a.name):
        scramble(a.search, seed=1)
        with a.search.pinned(choices) as net:
            expected = run(net, a.images)
        assert_close(run(result.model, a.images), expected)
        assert float((expected - run(a.work, a.images)).abs().max()) > 0.05
        names |= {option.name for path, option in choices.items() if path in a.search.mixers}
    assert names == {"skip", "conv1x1", "conv3x3", "attention"}


# Law 3


def test_a_plan_costs_what_it_says(a: Run) -> None:
    rest = a.search.inspection.costs.rest
    for choices, result in random_hybrids(a.name):
        counted = count_flops(result.model, a.images[:1])
        assert counted == result.plan.flops == rest + sum(option.flops for option in choices.values())
        assert result.plan.parameters == sum(parameter.numel() for parameter in result.model.parameters())
        assert result.plan.choices == {path: option.name for path, option in choices.items()}


# Law 4


@cache
def sums_of(name: str) -> tuple[int, int]:
    """(unit, the costs that can be reached as bits of a number); they do not depend on what was learned."""
    groups = options(run_of(name).search)
    unit = math.gcd(*(option.flops for group in groups.values() for option in group))
    sums = 1
    for group in groups.values():
        shifted = [sums << (option.flops // unit) for option in group]
        sums = 0
        for each in shifted:
            sums |= each
    return unit, sums


def reachable(a: Run, target: int) -> bool:
    """Whether any choice costs between 0.99 of the target and the target."""
    (unit, sums), rest = sums_of(a.name), a.search.inspection.costs.rest
    first, last = -(-max(math.ceil(0.99 * target) - rest, 0) // unit), (target - rest) // unit
    return last >= first and (sums >> first) & ((1 << (last - first + 1)) - 1) != 0


@settings(max_examples=2, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(share=0.0, seed=0)
@given(share=st.floats(0, 1), seed=st.integers(0, 99))
def test_the_budget_is_never_exceeded_and_is_used(a: Run, share: float, seed: int) -> None:
    costs, floor = a.search.inspection.costs, a.search._floor()
    scramble(a.search, seed)
    target = floor + int(share * (costs.base - 1 - floor))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(a.search, "target", target)
        flops = costs.rest + sum(option.flops for option in a.search.decide().values())
    assert flops <= target
    assert flops >= 0.99 * target or not reachable(a, target)


def test_most_budgets_can_be_used(a: Run) -> None:
    """Else the test above would be empty."""
    assert all(reachable(a, int(share * a.search.inspection.costs.base)) for share in (0.4, 0.55, 0.7, 0.85, 0.99))
    assert not reachable(a, a.search._floor() - 1)


def test_the_result_keeps_its_budget(a: Run) -> None:
    assert a.search.target == int(0.6 * a.result.plan.base.flops)
    assert 0.99 * a.search.target <= count_flops(a.result.model, a.images[:1]) <= a.search.target


@pytest.mark.parametrize("name", ["vit", "swin_padded", "foreign"])
def test_a_budget_below_the_floor_is_refused_and_the_floor_itself_is_not(name: str) -> None:
    a = run_of(name)
    floor = a.search._floor()
    assert msa2conv.prepare(a.model, f"{floor / 1e3:.3f}k", **keywords(name)).target == floor
    with pytest.raises(InfeasibleBudget):
        msa2conv.prepare(a.model, f"{(floor - 1) / 1e3:.3f}k", **keywords(name))


# Law 5


def test_a_plan_round_trips_and_load_returns_what_was_saved(a: Run, tmp_path: Path) -> None:
    for result in (a.result, random_hybrids(a.name)[0][1]):
        assert Plan.from_json(result.plan.model_dump_json()) == result.plan
        path = result.save(tmp_path / "hybrid.safetensors")
        loaded = msa2conv.load(path, tiny.build(a.name, seed=7))
        assert torch.equal(run(loaded, a.images), run(result.model, a.images))
        assert msa2conv.read_plan(path) == result.plan


# Law 6


def test_the_users_model_is_not_touched(a: Run) -> None:
    assert a.before == a.after


def test_the_hybrid_has_the_trained_weights_of_what_was_not_frozen(a: Run) -> None:
    weights, hybrid = dict(a.model.named_parameters()), dict(a.result.model.named_parameters())
    kept = {
        name: weights[name] for name, value in hybrid.items() if name in weights and value.shape == weights[name].shape
    }
    assert {value.requires_grad for value in kept.values()} == {True, False}
    for name, value in kept.items():
        assert hybrid[name].requires_grad == value.requires_grad
        assert torch.equal(hybrid[name], value) or value.requires_grad
    assert not all(torch.equal(hybrid[name], value) for name, value in kept.items())


def test_nothing_shares_memory_with_the_users_model(a: Run) -> None:
    own = {tensor.data_ptr() for tensor in a.model.state_dict().values() if tensor.numel()}
    for other in (a.search.model, a.search.dense(), a.result.model):
        assert not own & {tensor.data_ptr() for tensor in other.state_dict().values() if tensor.numel()}
    trained = {tensor.data_ptr() for tensor in a.search.model.state_dict().values() if tensor.numel()}
    assert not trained & {tensor.data_ptr() for tensor in a.result.model.state_dict().values() if tensor.numel()}


class Sabotage(RuntimeError):
    pass


def fail(*_: object, **__: object) -> None:
    raise Sabotage


STAGES = [
    "cost.CostModel.measure",
    "gate_search.SharedSupernode",
    "gate_training._loss",
    "gate_search.solve",
    "gate_search.make_plan",
    "gate_search.apply",
    "gate_search.check_costs",
    "gate_search.decided_report",
]


@pytest.mark.parametrize("stage", STAGES)
def test_the_users_model_is_not_touched_when_something_fails(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    a = run_of("foreign")
    state = torch.get_rng_state()
    monkeypatch.setattr(f"msa2conv.{stage}", fail)
    with pytest.raises(Sabotage):
        msa2conv.convert(a.model, 0.6, data=[a.images], search="gates", progress=False, **keywords("foreign"))
    assert tiny.snapshot(a.model) == a.before[0] and torch.equal(torch.get_rng_state(), state)


# Law 8


def test_an_image_does_not_depend_on_its_batch(a: Run) -> None:
    """In the supernet in eval mode, and in hybrids."""
    for model in [a.search.model, *(result.model for _, result in random_hybrids(a.name))]:
        together = run(model, a.images)
        assert_close(torch.cat([run(model, image[None]) for image in a.images]), together)
        assert_close(run(model, a.images.flip(0)), together.flip(0))
