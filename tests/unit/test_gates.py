"""One gate: what it lets through, what gradient it gives, and when it draws."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from msa2conv.transforms.gates import Gate, is_open, straight_through

numbers = st.floats(-6, 6, allow_nan=False, width=32)
uniform = st.floats(2**-9, 1 - 2**-9, width=32)


def gate_at(thetas: list[float], ordered: bool = False, sampling: str = "concrete") -> Gate:
    gate = Gate(len(thetas), ordered=ordered, sampling=sampling)  # type: ignore[arg-type]
    gate.theta.data = torch.tensor(thetas)
    return gate


def gradient(gate: Gate, values: Tensor, weights: Tensor) -> Tensor:
    return torch.autograd.grad((values * weights).sum(), gate.theta, retain_graph=True)[0]


@settings(max_examples=100, deadline=None)
@given(drawn=st.lists(st.tuples(numbers, uniform), min_size=1, max_size=5))
def test_a_sample_is_hard_and_has_the_gradient_of_the_sigmoid(drawn: list[tuple[float, float]]) -> None:
    thetas, us = ([pair[i] for pair in drawn] for i in (0, 1))
    gate, weights = gate_at(thetas), torch.arange(1.0, len(drawn) + 1)
    gate.uniforms = torch.tensor(us)
    z = gate()
    noisy = [theta + math.log(u / (1 - u)) for theta, u in drawn]
    for value, at in zip(z.tolist(), noisy, strict=True):
        assert value == float(at > 0) or abs(at) < 1e-5
    soft = torch.tensor(noisy).sigmoid()
    torch.testing.assert_close(gradient(gate, z, weights), weights * soft * (1 - soft), rtol=1e-4, atol=1e-6)


OPEN_OR_NOT = [(a, b, c) for a in (2.0, -2.0) for b in (1.0, -1.0) for c in (0.5, -0.5)]


@pytest.mark.parametrize("thetas", OPEN_OR_NOT)
@pytest.mark.parametrize("training", [True, False])
def test_ordered_gates_are_multiplied_cumulatively(thetas: tuple[float, ...], training: bool) -> None:
    """With the product rule for the gradient: d z2 / d theta1 = z'0 z'2 sigmoid'(theta1)."""
    gate, weights = gate_at(list(thetas), ordered=True).train(training), torch.tensor([1.0, 10.0, 100.0])
    gate.uniforms = torch.full((3,), 0.5)
    z = gate()
    z0, z1, z2 = (float(theta > 0) for theta in thetas)
    assert z.tolist() == [z0, z0 * z1, z0 * z1 * z2]
    s = torch.tensor(thetas).sigmoid()
    slope = s * (1 - s)
    each = torch.tensor([1 + 10 * z1 + 100 * z1 * z2, 10 * z0 + 100 * z0 * z2, 100 * z0 * z1])
    torch.testing.assert_close(gradient(gate, z, weights), each * slope)


@settings(max_examples=60, deadline=None)
@given(thetas=st.tuples(numbers, numbers, numbers), ordered=st.booleans())
def test_a_decision_is_thresholded_and_has_the_gradient_of_the_published_formula(
    thetas: tuple[float, float, float], ordered: bool
) -> None:
    """k = 1[p > .5] - sg(s) + s with s = sigmoid(sigmoid(theta) - .5); cumprod over the three."""
    gate, weights = gate_at(list(thetas), ordered), torch.tensor([1.0, 10.0, 100.0])
    p = torch.tensor(thetas).sigmoid()
    k0, k1, k2 = (p > 0.5).double().tolist()
    expected = [k0, k0 * k1, k0 * k1 * k2] if ordered else [k0, k1, k2]
    s = (p - 0.5).sigmoid()
    slope = s * (1 - s) * p * (1 - p)
    each = weights
    if ordered:
        each = torch.tensor([1 + 10 * k1 + 100 * k1 * k2, 10 * k0 + 100 * k0 * k2, 100 * k0 * k1])
    for training in (True, False):
        k = gate.train(training).decision()
        assert k.tolist() == expected
        torch.testing.assert_close(gradient(gate, k, weights), each * slope, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("theta", [-1.0, 0.0, 1.5])
def test_samples_are_open_with_the_probability_that_the_threshold_says(theta: float) -> None:
    torch.manual_seed(0)
    count, p = 100_000, 1 / (1 + math.exp(-theta))
    gate = Gate(count, theta)
    first, second = gate().detach(), gate().detach()
    for z in (first, second):
        assert set(z.unique().tolist()) == {0.0, 1.0}
        assert abs(float(z.mean()) - p) < 4 * math.sqrt(p * (1 - p) / count)
    both = float((first * second).mean())
    assert abs(both - p * p) < 4 * math.sqrt(p * p / count), "one draw tells nothing about the next"


def test_ordered_samples_have_the_probabilities_of_their_products() -> None:
    torch.manual_seed(0)
    gate, count = gate_at([1.0, 0.0, -0.5], ordered=True), 4000
    mean = torch.stack([gate().detach() for _ in range(count)]).mean(0)
    torch.testing.assert_close(mean, gate.theta.detach().sigmoid().cumprod(0), rtol=0, atol=4 * 0.5 / math.sqrt(count))


def test_extreme_draws_and_thresholds_stay_finite() -> None:
    gate = gate_at([0.0, 0.0, 300.0, -300.0])
    gate.uniforms = torch.tensor([0.0, 1.0, 0.0, 1.0])
    z = gate()
    assert z.tolist() == [0, 1, 1, 0]
    assert torch.isfinite(gradient(gate, z, torch.ones(4))).all()


@pytest.mark.parametrize(("sampling", "training"), [("concrete", False), ("annealed", True), ("annealed", False)])
def test_nothing_is_drawn_in_eval_mode_or_when_annealed(sampling: str, training: bool) -> None:
    gate = gate_at([1.0, -1.0, 0.1], sampling=sampling).train(training)
    before = torch.get_rng_state()
    values = [gate().tolist() for _ in range(3)]
    assert values[0] == values[1] == values[2]
    assert torch.equal(torch.get_rng_state(), before)
    if not training:
        assert values[0] == [1, 0, 1] == is_open(gate.theta).double().tolist()


def test_one_draw_a_call() -> None:
    gate = Gate(7)
    torch.manual_seed(3)
    expected = torch.rand(7)
    following = torch.rand(1)
    torch.manual_seed(3)
    noisy = gate.theta.detach() + torch.logit(expected)
    assert torch.equal(gate().detach(), (noisy > 0).float())
    assert torch.equal(torch.rand(1), following)


def test_annealed_gates_harden_with_the_temperature() -> None:
    gate = gate_at([2.0, 0.3, -0.3], sampling="annealed")
    assert torch.equal(gate(), gate.theta.sigmoid())
    distances = []
    for temperature in (1.0, 0.25, 0.05, 0.01):
        gate.temperature.fill_(temperature)
        z = gate()
        torch.testing.assert_close(z, (gate.theta / temperature).sigmoid())
        slope = z.detach() * (1 - z.detach()) / temperature
        torch.testing.assert_close(gradient(gate, z, torch.ones(3)), slope)
        distances.append(float((z.detach() - is_open(gate.theta).float()).abs().max()))
    assert distances == sorted(distances, reverse=True) and distances[-1] < 1e-6


def test_the_temperature_may_change_between_forward_and_backward() -> None:
    gate = gate_at([0.3], sampling="annealed")
    z = gate()
    gate.temperature.fill_(0.01)
    z.sum().backward()
    torch.testing.assert_close(gate.theta.grad, (z * (1 - z)).detach())


def test_pinned_values_replace_thresholds_for_a_while() -> None:
    gate = gate_at([-1.0, -1.0, -1.0], ordered=True)
    for values, expected in (([1, 1, 1], [1, 1, 1]), ([1, 0, 1], [1, 0, 0]), ([0, 1, 1], [0, 0, 0])):
        for training in (True, False):
            with gate.train(training).pinned(torch.tensor(values, dtype=torch.float)):
                assert gate().tolist() == expected
    with pytest.raises(KeyError), gate.pinned(torch.ones(3)):
        raise KeyError
    assert gate.eval()().tolist() == [0, 0, 0]


def test_a_copy_is_independent_and_a_state_dict_holds_all() -> None:
    gate = gate_at([1.0, -1.0])
    twin = copy.deepcopy(gate)
    twin.theta.data.neg_()
    assert gate.eval()().tolist() == [1, 0] and twin.eval()().tolist() == [0, 1]
    gate.temperature.fill_(0.3)
    twin.load_state_dict(gate.state_dict())
    assert torch.equal(twin.theta, gate.theta) and float(twin.temperature) == pytest.approx(0.3)
    assert "2, ordered=False, sampling=concrete" in repr(gate)


def test_straight_through() -> None:
    soft = torch.tensor([0.2, 0.7], requires_grad=True)
    out = straight_through(torch.tensor([True, False]), soft)
    assert out.tolist() == [1, 0]
    out.sum().backward()
    assert soft.grad is not None and soft.grad.tolist() == [1, 1]
