"""The exact budget against brute force."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import random

import pytest
from conftest import Case
from hypothesis import given, settings, strategies as st

from msa2conv import planning
from msa2conv.errors import InfeasibleBudget
from msa2conv.options import Option
from msa2conv.search import solve as solve_module
from msa2conv.search.measure import NEGLIGIBLE
from msa2conv.search.solve import PRICES, ROUND, Optimum, a_round, diverse, few_merges, solve, solve_settings
from msa2conv.settings import AS_IT_IS, Limit, Setting, least_flops

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
    plans = {name: optimum.choices for name, optimum in diverse(options, 0, 150).items()}
    found = {name: tuple(option.name for option in plan.values()) for name, plan in plans.items()}
    assert found == {"additive": ("half", "half"), "square root": ("none", "host")}


# Few merges


@settings(max_examples=80, deadline=None)
@given(instances(), st.randoms(use_true_random=False))
def test_the_optimum_of_few_merges_is_brute_forces(instance: tuple[Options, int, int], draw: random.Random) -> None:
    options, rest, budget = instance
    options = {
        site: [dataclasses.replace(option, rounds=draw.randint(0, 3)) for option in group]
        for site, group in options.items()
    }
    best = Optimum(price, AS_IT_IS, solve(options, rest, budget))
    found = few_merges(best, [AS_IT_IS], options, rest, budget)
    if best.rounds == 0:
        assert found is None
        return
    assert found is not None and list(found.sites) == list(options) and total(found.sites, rest) <= budget
    each = a_round(sum(map(price, best.sites.values())), best.rounds)
    dearer = {
        site: [dataclasses.replace(o, score=price(o) + each * o.rounds) for o in group]
        for site, group in options.items()
    }
    cost = sum(price(option) + each * option.rounds for option in found.sites.values())
    assert cost == pytest.approx(brute_force(dearer, rest, budget), abs=1e-5)


def price(option: Option) -> float:
    return option.score or 0.0


def test_a_round_costs_a_share_of_what_is_lost_and_all_together_what_nobody_sees() -> None:
    assert a_round(1.0, 4) == ROUND and a_round(1.0, 0) == ROUND
    assert a_round(0.0, 4) == NEGLIGIBLE / 4 and a_round(0.0, 0) == NEGLIGIBLE
    assert a_round(0.0, 4, least=2.0) == 0.5


MERGED = Option("b", "host@8", 50, score=1.0, rounds=2)


@pytest.mark.parametrize(("more", "few"), [(1.9 * ROUND, "half"), (2.1 * ROUND, None)])
def test_a_merge_has_to_be_worth_its_rounds(more: float, few: str | None) -> None:
    """What merges less is offered where it is dearer by at most a share of the optimum; with a limit it is not."""
    half = Option("b", "half", 50, score=1.0 + more)
    options = {"a": [Option("a", "host", 100, score=0.0)], "b": [Option("b", "host", 100, score=0.0), half, MERGED]}
    found = diverse(options, 0, 150)
    assert found["additive"].sites["b"] == MERGED and found["additive"].rounds == 2
    offered = found.get("additive, few merges")
    assert (offered and offered.sites["b"].name) == few and (offered is None or offered.rounds == 0)
    timed = diverse(options, 0, 150, limit=Limit(lambda option: 1.0, lambda setting: 0.0, 0.0, 9.0))
    assert not any("few" in name for name in timed)


@pytest.mark.parametrize(("more", "few"), [(0.9 * NEGLIGIBLE, "half"), (1.1 * NEGLIGIBLE, None)])
@pytest.mark.parametrize("name", PRICES)
def test_nothing_merges_for_what_nobody_sees(name: str, more: float, few: str | None) -> None:
    merged = dataclasses.replace(MERGED, score=0.0)
    host, half = Option("b", "host", 100, score=0.0), Option("b", "half", 50, score=more)
    best = Optimum(PRICES[name], AS_IT_IS, {"b": merged})
    found = few_merges(best, [AS_IT_IS], {"b": [host, half, merged]}, 0, 50)
    assert found is not None and found.sites["b"].name == (few or "host@8")


@pytest.mark.parametrize(("more", "few"), [(1.9 * ROUND, True), (2.1 * ROUND, False)])
def test_merging_through_the_network_has_to_be_worth_its_rounds(more: float, few: bool) -> None:
    host = Option("a", "host", 100, score=0.0, flops_on=lambda tokens: 10 * tokens)
    half = Option("a", "half", 50, score=1.0 + more)
    through = Setting((1.0,), 0, {"a": 5}, lambda: Option("net", "5 from 0", 0, rounds=2), rounds=(2,))
    known, options = [AS_IT_IS, through], {"a": [host, half]}
    best = Optimum(price, *solve_settings(known, options, 0, 50))
    assert best.setting is through and best.rounds == 2
    found = few_merges(best, known, options, 0, 50)
    assert found is not None and (found.setting is AS_IT_IS) == few


@pytest.mark.parametrize("share", [0.9, 1.1])
@pytest.mark.parametrize("timed", [False, True])
@pytest.mark.parametrize("negligible", [False, True])
def test_the_network_as_a_whole_has_to_be_worth_its_rounds(
    share: float, timed: bool, negligible: bool, vit: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a plan that is nearer and one that merges less, by what a round costs; a limit knows what merging takes."""
    cuts = [
        {path: cut if number < many else host for number, (path, (host, *_, cut)) in enumerate(vit.options.items())}
        for many in (1, 2)
    ]
    found = {
        name: Counted(price, AS_IT_IS, cut, rounds)
        for name, cut, rounds in zip(("near", "few"), cuts, (5, 2), strict=True)
    }
    monkeypatch.setattr(planning, "diverse", lambda *_: found)
    limit = Limit(lambda option: 0.0, lambda setting: 0.0, 0.0, 1.0) if timed else None
    choose_at = functools.partial(
        planning.choose_at, vit.work, vit.calibration, vit.seen.costs.base, progress=False, limit=limit
    )
    near, few = choose_at().distances.values()
    assert 0 < near < few
    each = (few - near) / (5 - 2) / share
    monkeypatch.setattr(solve_module, "ROUND", 0.0 if negligible else each / near)
    monkeypatch.setattr(planning, "a_round", functools.partial(a_round, least=5 * each if negligible else 0.0))
    assert choose_at().price == ("near" if timed or share > 1 else "few")


@dataclasses.dataclass(frozen=True)
class Counted(Optimum):
    """An optimum that is said to merge so often."""

    count: int = 0

    @property
    def rounds(self) -> int:
        return self.count


# Settings


@st.composite
def several(draw: st.DrawFn) -> tuple[Options, list[Setting], int, int]:
    """(options, settings, rest, budget): up to 4 settings in which some sites see half of their 10 tokens."""
    options, rest, budget = draw(instances())
    on_tokens = {
        site: [
            dataclasses.replace(option, flops_on=lambda tokens, flops=option.flops: tokens * flops // 10)
            if index == 0 or draw(st.booleans())
            else option
            for index, option in enumerate(group)
        ]
        for site, group in options.items()
    }
    found = [AS_IT_IS]
    for number in range(draw(st.integers(0, 3))):
        sites = draw(st.lists(st.sampled_from(sorted(options)), unique=True))
        scores = draw(st.lists(st.integers(0, 256).map(lambda value: value / 64), max_size=2))
        rounds = tuple(draw(st.integers(1, 3)) for _ in scores)
        own, flops = Option("net", str(number), 0, rounds=sum(rounds)), draw(st.integers(-5, 5))
        found.append(Setting(tuple(scores), flops, dict.fromkeys(sites, 5), lambda own=own: own, rounds))
    return on_tokens, found, rest + 5, budget + 5


def inside_by_hand(options: Options, setting: Setting) -> Options:
    fewer = {path: [o for o in group if o.flops_on is not None] for path, group in options.items()}
    return {
        path: [dataclasses.replace(o, flops=o.flops_on(5)) for o in fewer[path]] if path in setting.tokens else group
        for path, group in options.items()
    }


@settings(max_examples=80, deadline=None)
@given(several(), st.sampled_from(sorted(PRICES)), st.sampled_from([0.0, 0.5]))
def test_the_best_setting_is_brute_forces(
    instance: tuple[Options, list[Setting], int, int], name: str, each: float
) -> None:
    """Over all settings that can use the budget: those that cannot are not worth a bound of their own."""
    options, known, rest, budget = instance

    def price(option: Option) -> float:
        return PRICES[name](option) + each * option.rounds

    def steps(setting: Setting) -> float:
        scores = sum(PRICES[name](Option("", "", 0, score=score)) for score in setting.scores)
        return scores + each * sum(setting.rounds)

    def best(setting: Setting) -> float | None:
        plans = [
            (rest + setting.flops + total(plan), sum(map(price, plan)))
            for plan in itertools.product(*inside_by_hand(options, setting).values())
        ]
        if setting.option is not None and max(flops for flops, _ in plans) < 0.99 * budget:
            return None
        within = [plan for plan in plans if plan[0] <= budget]
        tight = [plan for plan in within if 100 * plan[0] >= 99 * budget]
        return steps(setting) + min(worth for _, worth in tight or within) if within else None

    expected = [found for setting in known if (found := best(setting)) is not None]
    setting, choices = solve_settings(known, options, rest, budget, price)
    assert rest + setting.flops + total(choices) <= budget
    assert steps(setting) + sum(map(price, choices.values())) == pytest.approx(min(expected), abs=1e-5)


def test_no_setting_reaches_a_budget_below_all_floors() -> None:
    host = Option("a", "host", 100, score=0.0, flops_on=lambda tokens: 10 * tokens)
    known = [AS_IT_IS, Setting((0.5,), 3, {"a": 4}, lambda: Option("net", "fewer", 3))]
    assert least_flops(known, {"a": [host]}, 50) == 93
    with pytest.raises(InfeasibleBudget, match=r"at least 9\.3e-08 GFLOPs"):
        solve_settings(known, {"a": [host]}, 50, 92)
    for budget in (93, 120):  # the second is not used up by anything that fits
        setting, choices = solve_settings(known, {"a": [host]}, 50, budget)
        assert setting is known[1] and choices["a"].flops == 40


# A second budget


@st.composite
def timed(draw: st.DrawFn) -> tuple[Options, dict[int, float], float]:
    """(options, {id of an option: seconds}, a limit that some plan keeps)."""
    options, _, _ = draw(instances())
    every = [option for group in options.values() for option in group]
    seconds = {id(option): draw(st.integers(0, 64)) / 1024 for option in every}
    plan = [draw(st.sampled_from(group)) for group in options.values()]
    return options, seconds, 0.25 + sum(seconds[id(option)] for option in plan) + draw(st.integers(0, 8)) / 1024


@settings(max_examples=80, deadline=None)
@given(timed(), st.integers(0, 100))
def test_under_a_limit_the_optimum_is_brute_forces(
    instance: tuple[Options, dict[int, float], float], slack: int
) -> None:
    options, seconds, most = instance
    limit = Limit(lambda option: seconds[id(option)], lambda setting: 0.0, 0.25, most)
    floor = sum(min(option.flops for option in group) for group in options.values())
    budget = max(1, floor + slack)
    fitting = [
        sum(option.score or 0.0 for option in plan)
        for plan in itertools.product(*options.values())
        if total(plan) <= budget and 0.25 + sum(seconds[id(option)] for option in plan) <= most + 1e-9
    ]
    if not fitting:
        with pytest.raises(InfeasibleBudget, match="latency_target"):
            solve(options, 0, budget, limit=limit)
        return
    choices = solve(options, 0, budget, limit=limit)
    assert total(choices) <= budget
    assert 0.25 + sum(seconds[id(option)] for option in choices.values()) <= most * (1 + 1e-6)
    assert sum(option.score or 0.0 for option in choices.values()) == pytest.approx(min(fitting), rel=1.1e-3, abs=1e-5)


@settings(max_examples=30, deadline=None)
@given(timed(), st.lists(st.tuples(st.integers(0, 64), st.integers(0, 8)), max_size=3))
def test_under_a_limit_the_best_setting_is_brute_forces(
    instance: tuple[Options, dict[int, float], float], further: list[tuple[int, int]]
) -> None:
    options, seconds, most = instance
    taken = {(1 + score) / 8: step / 1024 for step, score in further}
    several = [AS_IT_IS, *(Setting(scores=(score,), option=lambda: Option("", "", 0)) for score in taken)]
    limit = Limit(lambda option: seconds[id(option)], lambda setting: taken.get(sum(setting.scores), 0.0), 0.25, most)
    budget = max(1, sum(max(option.flops for option in group) for group in options.values()))
    fitting = [
        sum(setting.scores) + sum(option.score or 0.0 for option in plan)
        for setting in several
        for plan in itertools.product(*options.values())
        if limit.inside(setting).rest + sum(seconds[id(option)] for option in plan) <= most + 1e-9
    ]
    setting, choices = solve_settings(several, options, 0, budget, limit=limit)
    found = sum(setting.scores) + sum(option.score or 0.0 for option in choices.values())
    assert found == pytest.approx(min(fitting), rel=1.1e-3, abs=1e-5)


def test_two_budgets_that_exclude_each_other() -> None:
    options = {"s": [Option("s", "slow", 3, score=0.0), Option("s", "dear", 9, score=1.0)]}
    limit = Limit(lambda option: {"slow": 0.02, "dear": 0.004}[option.name], lambda setting: 0.0, 0.0, 0.005)
    for attempt in (solve, lambda *given, **named: solve_settings([AS_IT_IS], *given, **named)):
        with pytest.raises(InfeasibleBudget) as caught:
            attempt(options, 0, 5, limit=limit)
        assert str(caught.value) == (
            "latency_target: found 5 ms together with a FLOPs budget; expected budgets that one network can keep "
            "(each alone can be kept). Allow more time, more FLOPs or more levers."
        )


def test_a_latency_below_the_floor_names_the_floor() -> None:
    options = {"s": [Option("s", "a", 5, score=0.0), Option("s", "b", 3, score=1.0)]}
    limit = Limit(lambda option: option.flops / 1e3, lambda setting: 0.0, 1e-3, 3.5e-3)
    for attempt in (solve, lambda *given, **named: solve_settings([AS_IT_IS], *given, **named)):
        with pytest.raises(InfeasibleBudget) as caught:
            attempt(options, 0, 10, limit=limit)
        assert str(caught.value) == (
            "latency_target: found 3.5 ms; expected at least 4 ms, the floor of the allowed levers on this device. "
            "Allow more time or more levers (by default they are all that need no training)."
        )
