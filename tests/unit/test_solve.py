"""The exact budget against brute force."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings, strategies as st

from msa2conv.errors import InfeasibleBudget
from msa2conv.options import Option
from msa2conv.search.solve import diverse, solve

Options = dict[str, list[Option]]


def total(choices: tuple[Option, ...] | dict[str, Option], rest: int = 0) -> int:
    options = choices.values() if isinstance(choices, dict) else choices
    return rest + sum(option.flops for option in options)


def brute_force(options: Options, rest: int, budget: int) -> float:
    """The smallest price of any plan that uses 99 % of the budget; of any plan within it where there is none."""
    within = [plan for plan in itertools.product(*options.values()) if total(plan, rest) <= budget]
    tight = [plan for plan in within if 100 * total(plan, rest) >= 99 * budget]
    return min(sum(option.score or 0.0 for option in plan) for plan in tight or within)


@st.composite
def instances(draw: st.DrawFn, scale: int = 1) -> tuple[Options, int, int]:
    """(options, rest, budget): up to 5 sites of up to 4 options; the budget often hits a plan exactly."""
    flops, score = st.integers(0, 40 * scale), st.integers(0, 512).map(lambda value: value / 64)
    options: Options = {}
    for site in range(draw(st.integers(1, 5))):
        pairs = draw(st.lists(st.tuples(flops, score), min_size=1, max_size=4))
        options[f"s{site}"] = [Option(f"s{site}", str(i), pair[0], score=pair[1]) for i, pair in enumerate(pairs)]
    rest = draw(st.integers(1, 100 * scale))
    floor = rest + sum(min(option.flops for option in group) for group in options.values())
    exact = total(tuple(draw(st.sampled_from(group)) for group in options.values()), rest)
    slack = draw(st.integers(-1, 3 * scale))
    return options, rest, max(floor, exact + slack)


def assert_optimal(options: Options, rest: int, budget: int) -> None:
    choices = solve(options, rest, budget)
    assert list(choices) == list(options)
    assert all(choice in options[site] for site, choice in choices.items())
    assert total(choices, rest) <= budget
    found = sum(option.score or 0.0 for option in choices.values())
    assert found == pytest.approx(brute_force(options, rest, budget), abs=1e-5)


@settings(max_examples=120, deadline=None)
@given(instances())
def test_the_optimum_is_brute_forces(instance: tuple[Options, int, int]) -> None:
    assert_optimal(*instance)


@settings(max_examples=60, deadline=None)
@given(instances(scale=10**8))
def test_the_optimum_is_brute_forces_at_the_size_of_real_networks(instance: tuple[Options, int, int]) -> None:
    """Billions of FLOPs without a common divisor: one FLOP too many must still be seen."""
    assert_optimal(*instance)


def pair(site: str, host: int, cheap: int, score: float) -> list[Option]:
    return [Option(site, "host", host, score=0.0), Option(site, "cheap", cheap, score=score)]


def test_the_budget_is_used_even_where_a_cheaper_plan_scores_better() -> None:
    """The harmless option alone would leave 10 % unused, so the plan that uses the budget is taken."""
    options = {"a": [*pair("a", 100, 40, 0.0), Option("a", "odd", 50, score=1.0)]}
    assert solve(options, rest=50, budget=100)["a"].name == "odd"
    assert solve(options, rest=50, budget=95)["a"].name == "cheap"


def test_a_budget_below_the_floor_names_the_floor() -> None:
    with pytest.raises(InfeasibleBudget, match="9e-08 GFLOPs") as caught:
        solve({"a": pair("a", 100, 40, 1.0)}, rest=50, budget=89)
    assert isinstance(caught.value, ValueError)
    assert solve({"a": pair("a", 100, 40, 1.0)}, rest=50, budget=90)["a"].name == "cheap"


def test_an_option_without_a_score_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="has no score"):
        solve({"a": [Option("a", "host", 1)]}, rest=1, budget=5)


def test_prices_disagree_and_duplicates_are_dropped() -> None:
    """One large score or two small ones: the roots of small ones weigh more."""
    options = {
        "a": [
            Option("a", "host", 100, score=0.0),
            Option("a", "half", 75, score=0.5),
            Option("a", "none", 50, score=1.2),
        ],
        "b": [Option("b", "host", 100, score=0.0), Option("b", "half", 75, score=0.5)],
    }
    found = {name: tuple(option.name for option in plan.values()) for name, plan in diverse(options, 0, 150).items()}
    assert found == {"additive": ("half", "half"), "square root": ("none", "host")}
