"""Search: what its penalty asks for, what it decides, and what it hands to a user's own loop."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch
from searches import assert_close, options, prepared, put_thresholds, run, scramble
from torch import Tensor, nn

from msa2conv import FFN, Gates, Search
from msa2conv.errors import NonFiniteValue
from msa2conv.observation import Observation
from msa2conv.ops import IdentityMixer
from msa2conv.options import Option
from msa2conv.search.gates import GateCosts
from msa2conv.sites import AttentionSite, Claims
from msa2conv.transforms.gates import Gate

IMAGES = tiny.images("vit", 8)


@pytest.fixture(scope="module")
def fresh() -> Search:
    return prepared(steps=20)


@pytest.fixture
def search(fresh: Search) -> Search:
    """Of the plain ViT; each test may alter its own."""
    return copy.deepcopy(fresh)


def total(search: Search, choices: dict[str, Option]) -> int:
    return search.inspection.costs.rest + sum(option.flops for option in choices.values())


def weights_of(model: nn.Module) -> list[Tensor]:
    return [parameter.detach() for parameter in model.parameters()]


# The penalty


@pytest.mark.parametrize("seed", range(5))
def test_a_penalty_is_never_negative_and_speaks_to_thresholds_only(search: Search, seed: int) -> None:
    gates = {id(gate.theta) for gate in search.named_gates.values()}
    for step in range(25):
        scramble(search, 100 * seed + step)
        value = search.penalty()
        assert value.ndim == 0 and value.dtype == torch.float32 and float(value.detach()) >= 0
        value.backward()
    assert {id(parameter) for parameter in search.model.parameters() if parameter.grad is not None} == gates


def test_it_pushes_towards_the_budget() -> None:
    """Thresholds of a network above its budget down, and of one below it never further down."""
    search = prepared()  # without steps: the target holds at once
    for theta, sign in ((1.0, 1), (-1.0, -1)):
        put_thresholds(search, (theta, theta, theta), theta)
        search.model.zero_grad()
        search.penalty().backward()
        slopes = torch.cat([gate.theta.grad for gate in search.named_gates.values()])
        assert bool((sign * slopes >= 0).all())
        assert bool(slopes.any()) or sign < 0


@pytest.mark.parametrize("target", [0.6, 0.9])
def test_followed_downhill_alone_it_reaches_the_budget_and_stops_there(target: float) -> None:
    """From thresholds that differ a little, by small steps; equal ones would all close at once."""
    search = prepared(target=target, steps=150)
    base, generator = search.inspection.costs.base, torch.Generator().manual_seed(0)
    thresholds = [gate.theta for gate in search.named_gates.values()]
    for theta in thresholds:
        theta.data += torch.rand(theta.shape, generator=generator)
    assert search.flops() == base
    for _ in range(150):
        slopes = torch.autograd.grad(search.penalty(), thresholds)
        for theta, slope in zip(thresholds, slopes, strict=True):
            theta.data -= 0.02 * slope.sign()
    assert 0.9 * target * base < search.flops() <= 1.02 * target * base


def test_the_papers_penalty_is_the_squared_distance_in_gflops() -> None:
    search = prepared("foreign", 0.8, gates=Gates(penalty=20.0))
    put_thresholds(search, (1.0, 1.0, -1.0))
    expected = 20 * ((search.target - search.flops()) / 1e9) ** 2
    assert float(search.penalty().detach()) == pytest.approx(expected, rel=1e-4) and expected > 0


def test_flops_of_gates_and_their_gradient() -> None:
    """rest + k0 c1 + k1 (c3 - c1) + k2 (m - c3) + unit sum(k)."""
    costs = GateCosts(base=1000, rest=100, mixers={"a": (10, 90, 300)}, units={"f": 7})
    k, units = torch.tensor([1.0, 1.0, 0.0], requires_grad=True), torch.ones(5, requires_grad=True)
    value = costs.flops({"a": k, "f": units})
    value.backward()
    assert float(value.detach()) == 100 + 90 + 35 and value.dtype == torch.float64
    assert k.grad is not None and k.grad.tolist() == [10, 80, 210]
    assert units.grad is not None and units.grad.tolist() == [7] * 5


@pytest.mark.parametrize(
    ("name", "windowed"), [("registers", False), ("swin_padded", False), ("swin_padded", True), ("foreign", False)]
)
def test_flops_are_those_of_the_thresholded_network(name: str, windowed: bool) -> None:
    search = prepared(name, gates=Gates(exact=False, windowed=windowed))
    assert search.flops() == search.inspection.costs.base
    for seed in range(5):
        scramble(search, seed)
        assert search.flops() == total(search, search.decide())


def test_costs_may_come_from_elsewhere() -> None:
    mixers, units = {f"blocks.{i}.attn": (1, 2, 3) for i in range(3)}, {f"blocks.{i}.mlp": 10 for i in range(3)}
    search = prepared(costs=GateCosts(10**7, 1000, mixers, units))
    assert search.flops() == 1000 + 3 * 3 + 3 * 192 * 10


def test_annealed_gates_cool_and_harden_over_the_steps() -> None:
    search = prepared(steps=10, gates=Gates(sampling="annealed"))
    scramble(search).model.train()
    temperatures, softness = [], []
    for _ in range(11):
        search.penalty()
        temperatures.append({float(gate.temperature) for gate in search.named_gates.values()})
        z = torch.cat([gate._values().detach() for gate in search.named_gates.values()])
        softness.append(float((z * (1 - z)).mean()))
    assert all(len(each) == 1 for each in temperatures)
    assert temperatures == sorted(temperatures, key=max, reverse=True) and temperatures[0] != temperatures[-1]
    assert softness == sorted(softness, reverse=True) and softness[-1] < 0.2 * softness[0] and softness[-1] < 0.01


# Parameter groups


@pytest.mark.parametrize("lived_in", [False, True])
@pytest.mark.parametrize("name", ["vit", "swin", "foreign"])
def test_every_trainable_parameter_is_in_one_group(name: str, lived_in: bool) -> None:
    model = tiny.live_in(tiny.build(name)) if lived_in else tiny.build(name)
    search = prepared(name, model=model)
    groups = search.param_groups(lr=3e-4, gate_lr=0.02, weight_decay=0.1)
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in search.model.parameters() if p.requires_grad)
    assert len(set(grouped)) == len(grouped)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert bool(frozen) == lived_in
    assert not any(parameter.requires_grad for path, parameter in search.model.named_parameters() if path in frozen)
    decayed, plain, gates = groups
    assert [group["lr"] for group in groups] == [3e-4, 3e-4, 0.02]
    assert [group["weight_decay"] for group in groups] == [0.1, 0, 0]
    assert [id(p) for p in gates["params"]] == [id(gate.theta) for gate in search.named_gates.values()]
    mixtures = {id(node.head_probs) for node in search.nodes.values()}
    assert {id(p) for p in plain["params"] if p.ndim > 1} == mixtures
    assert all(p.ndim > 1 for p in decayed["params"]) and not mixtures & {id(p) for p in decayed["params"]}
    torch.optim.AdamW(groups)


def test_the_gates_of_a_frozen_model_learn() -> None:
    search = prepared(model=tiny.build("vit").requires_grad_(False))
    before = search.dense().state_dict()
    optimizer = torch.optim.AdamW(search.param_groups(gate_lr=0.5))
    for _ in range(5):
        optimizer.zero_grad()
        (search.model(IMAGES).square().mean() + search.penalty()).backward()
        optimizer.step()
    assert all(bool((gate.theta != 1.5).any()) for gate in search.named_gates.values())
    assert all(torch.equal(value, before[name]) for name, value in search.dense().state_dict().items())


@pytest.mark.parametrize("steps", [None, 10, 10**3, 10**6])
def test_the_default_rate_lets_thresholds_close_in_time(steps: int | None) -> None:
    search = prepared("foreign", steps=steps)
    rate = search.param_groups()[2]["lr"]
    assert 1e-3 <= rate <= 0.1
    if steps and steps >= 10**3:
        assert rate * steps > 2 * search.gates.init  # Adam moves a threshold by about its rate a step


# What is decided


def probability(gate: Gate, values: list[int]) -> float:
    """Of these values under independent thresholds; None: whatever comes."""
    p = gate.theta.detach().double().sigmoid()
    return math.prod(float(each if value else 1 - each) for each, value in zip(p, values, strict=False))


def test_options_are_priced_by_their_probability(search: Search) -> None:
    scramble(search)
    for path, group in options(search).items():
        gate = search.named_gates[path]
        if path in search.mixers:
            values = {"skip": [0], "conv1x1": [1, 0], "conv3x3": [1, 1, 0], "attention": [1, 1, 1]}
            priced = {option.name: option.score for option in group}
            assert priced == pytest.approx({name: -math.log(probability(gate, bits)) for name, bits in values.items()})
            assert sum(math.exp(-(score or 0)) for score in priced.values()) == pytest.approx(1)
            continue
        for option in group[::40]:
            kept = search._values(path, option)
            theta = gate.theta.detach().double()
            logs = torch.where(kept.bool(), theta, -theta).sigmoid().log()
            assert option.score == pytest.approx(-float(logs.sum()), rel=1e-4)
            assert int(kept.sum()) == int(option.name.split("/")[0])
            assert kept.all() or bool(theta[kept.bool()].min() >= theta[~kept.bool()].max())


def test_the_decision_is_the_most_probable_network_within_the_budget() -> None:
    """Against all 512 of a small choice."""
    search = prepared(levers=("mixer", FFN(round_to=96, min_keep=0.5)), target=0.75)
    for seed in range(3):
        scramble(search, seed)
        groups = options(search)
        assert [len(group) for group in groups.values()] == [4] * 3 + [2] * 3
        fitting = [
            (sum(option.score or 0 for option in chosen), [option.name for option in chosen])
            for chosen in itertools.product(*groups.values())
            if 0.99 * search.target <= total(search, {option.site: option for option in chosen}) <= search.target
        ]
        decided = search.decide()
        assert [decided[path].name for path in groups] == min(fitting)[1]


def test_without_the_solver_the_thresholds_decide() -> None:
    search = prepared(gates=Gates(exact=False), target=0.3)
    thresholds = {"blocks.0.attn": [-1.0, 1, 1], "blocks.1.attn": [1.0, -1, 1], "blocks.2.attn": [1.0, 1, -1]}
    with torch.no_grad():
        for path, values in thresholds.items():
            search.named_gates[path].theta.copy_(torch.tensor(values))
        search.named_gates["blocks.0.mlp"].theta[5:] = -1
        search.named_gates["blocks.1.mlp"].theta.copy_(torch.linspace(-2, -1, 192))
    search.penalty()
    names = {"blocks.0.attn": "skip", "blocks.1.attn": "conv1x1", "blocks.2.attn": "conv3x3"}
    names |= {"blocks.0.mlp": "5/192", "blocks.1.mlp": "1/192", "blocks.2.mlp": "192/192"}
    result = search.finish()
    assert result.plan.choices == names
    assert torch.equal(search._values("blocks.0.mlp", search.decide()["blocks.0.mlp"]), (torch.arange(192) < 5).float())
    assert int(search._values("blocks.1.mlp", search.decide()["blocks.1.mlp"]).argmax()) == 191
    assert result.plan.flops > search.target, "nobody asked for the budget"


def test_a_skip_may_be_left_as_the_identity() -> None:
    search = put_thresholds(prepared(gates=Gates(skip="identity", exact=False)), (-1.0, 1.0, 1.0))
    search.penalty()
    result = search.finish()
    assert set(result.plan.choices.values()) == {"identity", "192/192"}
    assert all(isinstance(block.attn, IdentityMixer) for block in result.model.blocks)
    assert "lowering" not in result.report.laws


@pytest.mark.parametrize("levers", ["ffn", "mixer"])
def test_one_lever_leaves_the_other_sites_alone(levers: str) -> None:
    search = scramble(prepared(levers=levers, target=0.75))
    assert (len(search.nodes), len(search.units)) == ((0, 3) if levers == "ffn" else (3, 0))
    search.penalty()
    result = search.finish()
    kept = "attn" if levers == "ffn" else "mlp"
    assert not any(kept in edit.path for edit in result.plan.edits) and result.plan.edits
    assert all(kept not in path for path in result.plan.choices)
    assert result.plan.flops <= search.target
    if levers == "ffn":
        assert result.plan.flops >= 0.99 * search.target


def test_attentions_without_projections_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    class Shy(tiny.GridAdapter):
        def claims(self, model: nn.Module, seen: Observation) -> Claims:
            sites = super().claims(model, seen).sites
            return Claims.of(replace(s, projections=None) if "0.mixer" in s.path else s for s in sites)

    assert all(isinstance(s, AttentionSite) for s in prepared("foreign").mixers.values())
    monkeypatch.setattr(tiny, "adapters", lambda name: (Shy(),))
    search = scramble(prepared("foreign", 0.5))
    assert set(search.mixers) == {"blocks.1.mixer", "blocks.2.mixer"}
    search.penalty()
    result = search.finish()
    assert "blocks.0.mixer" not in result.plan.choices
    assert type(result.model.blocks[0].mixer) is tiny.GridAttention
    assert 0.99 * search.target <= result.plan.flops <= search.target


def test_closed_gates_are_reopened_with_a_warning(search: Search) -> None:
    put_thresholds(search, (-2.0, -2.0, -2.0), -2.0)
    search.penalty()
    result = search.finish()
    text = "every gate had closed: the solver reopened the most probable ones; lower gate_lr or search longer"
    assert result.report.warnings == [text] and f"warning: {text}" in str(result.report)
    assert 0.99 * search.target <= result.plan.flops <= search.target
    put_thresholds(search, units=-2.0)
    assert search.finish().report.warnings == []


# Finish


@pytest.mark.parametrize(
    ("target", "sampling"), [(0.6, "concrete"), (0.6, "annealed"), (0.75, "concrete"), (0.9, "concrete")]
)
def test_a_short_search_ends_on_its_budget(target: float, sampling: Any) -> None:
    search = prepared(target=target, steps=8, gates=Gates(sampling=sampling))
    optimizer = torch.optim.AdamW(search.param_groups(lr=1e-4))
    reference = run(tiny.build("vit"), IMAGES)
    torch.manual_seed(0)
    for _ in range(8):
        optimizer.zero_grad()
        ((search.model(IMAGES) - reference).square().mean() + search.penalty()).backward()
        optimizer.step()
    result = search.finish(IMAGES)
    assert 0.99 <= result.plan.flops / search.target <= 1
    report = result.report
    assert (report.target, report.flops_after) == (search.target, result.plan.flops)
    assert report.calibration == "a gate search of 8 steps"
    expected = torch.nn.functional.kl_div(
        run(result.model, IMAGES).log_softmax(1), reference.log_softmax(1), reduction="batchmean", log_target=True
    )
    assert report.measure == "kl" and report.distance == pytest.approx(float(expected), rel=1e-3)
    assert max(report.laws["lifting"], report.laws["lowering"]) <= 1e-5 and result.calibration is None
    assert str(report)


def test_finish_twice_gives_the_same(search: Search) -> None:
    scramble(search).penalty()
    state = copy.deepcopy(search.state_dict())
    first, mode = search.finish(), search.model.training
    again = search.finish()
    assert first.plan == again.plan and mode == search.model.training
    for value, other in zip(weights_of(first.model), weights_of(again.model), strict=True):
        assert torch.equal(value, other) and value.data_ptr() != other.data_ptr()
    torch.testing.assert_close(dict(search.state_dict()["model"]), dict(state["model"]), rtol=0, atol=0)
    assert search.state_dict()["budget"] == state["budget"]


@pytest.mark.parametrize("where", ["gate", "weight"])
def test_values_that_are_not_finite_are_named(search: Search, where: str) -> None:
    search.penalty()
    tensor = search.nodes["blocks.1.attn"].gate.theta if where == "gate" else search.model.blocks[1].mlp.fc1.weight
    tensor.data[0] = math.nan
    with pytest.raises(NonFiniteValue, match=r"^blocks.1.(attn \(gate\)|mlp.fc1.weight): found .*NaN or Inf"):
        search.finish()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_supernet_trained_in_another_precision_is_lowered(search: Search, dtype: torch.dtype) -> None:
    scramble(search).model.to(dtype)
    (search.model(IMAGES.to(dtype)).sum() + search.penalty()).backward()
    choices = search.decide()
    result = search.finish()
    assert {parameter.dtype for parameter in result.model.parameters()} == {torch.float32}
    with search.pinned(choices) as net:
        expected = run(copy.deepcopy(net).float(), IMAGES)
    assert_close(run(result.model, IMAGES), expected)


def test_a_model_in_half_precision_gets_a_hybrid_in_half_precision() -> None:
    model = tiny.build("vit").to(torch.bfloat16)
    search = prepared(model=model)
    assert {parameter.dtype for parameter in search.model.parameters()} == {torch.float32}
    search.penalty()
    assert {parameter.dtype for parameter in search.finish().model.parameters()} == {torch.bfloat16}


def test_wrappers_are_taken_off() -> None:
    search = prepared(model=nn.DataParallel(tiny.build("vit")))
    search.penalty()
    assert type(search.model) is type(search.finish().model) is type(tiny.build("vit"))


def test_pinning_is_undone(search: Search) -> None:
    scramble(search)
    choices = {path: group[0] for path, group in options(search).items()}
    expected = run(search.model, IMAGES)
    for mode in (True, False):
        search.model.train(mode)
        with search.pinned(choices) as net:
            assert not net.training and not torch.equal(net(IMAGES), expected)
        assert search.model.training == mode
        with pytest.raises(KeyError), search.pinned(choices):
            raise KeyError
        assert search.model.training == mode
    assert torch.equal(run(search.model, IMAGES), expected)


# State


def losses(search: Search, count: int) -> Iterator[float]:
    optimizer = torch.optim.SGD(search.param_groups(lr=1e-3, gate_lr=0.5))
    search.model.train()
    for seed in range(count):
        torch.manual_seed(seed)
        optimizer.zero_grad()
        value = search.model(IMAGES).square().mean() + search.penalty()
        value.backward()
        optimizer.step()
        yield float(value.detach())


def test_a_saved_state_continues(search: Search) -> None:
    list(losses(search, 4))
    state = copy.deepcopy(search.state_dict())
    other = prepared(steps=20)
    assert list(losses(copy.deepcopy(other), 3)) != list(losses(search, 3))
    other.load_state_dict(state)
    assert other.budget.step == 4
    search.load_state_dict(state)
    assert list(losses(search, 3)) == list(losses(other, 3))
    assert other.finish().plan == search.finish().plan
