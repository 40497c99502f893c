"""What the relaxation leaves out is in no solution, by listing all of them."""

from __future__ import annotations

import itertools

from hypothesis import given, settings, strategies as st
from test_solve import Options, instances, price, total

from msa2conv.options import Option
from msa2conv.search.relaxation import filled, worth_trying
from msa2conv.search.solve import PRICES, solve


@settings(max_examples=150, deadline=None)
@given(instances(), st.sampled_from([None, 0.0, 0.2, 1.0]), st.sampled_from(sorted(PRICES)))
def test_no_option_of_a_good_solution_is_left_out(
    instance: tuple[Options, int, int], slack: float | None, name: str
) -> None:
    options, rest, budget = instance
    own = PRICES[name]
    plans = [plan for plan in itertools.product(*options.values()) if total(plan, rest) <= budget]
    best = min(sum(map(own, plan)) for plan in plans)
    most = best if slack is None else (1 + slack) * best
    kept = worth_trying(options, rest, budget, own, None if slack is None else most)
    assert list(kept) == list(options)
    for plan in plans:
        if sum(map(own, plan)) <= most:
            assert all(option in kept[option.site] for option in plan)


def test_hundreds_of_options_become_a_few() -> None:
    """24 sites of 300 options on a convex curve each, as hidden units are."""
    options = {
        f"s{site}": [
            Option(f"s{site}", str(units), 1000 * units, score=(1 + site) / 1e4 * (300 - units) ** 2)
            for units in range(1, 301)
        ]
        for site in range(24)
    }
    budget = 24 * 1000 * 200
    kept = worth_trying(options, 0, budget, price)
    assert max(map(len, kept.values())) < 20
    found = solve(options, 0, budget)
    assert total(found) <= budget
    assert all(option in kept[site] for site, option in found.items())


def test_one_exchange_uses_a_budget_up() -> None:
    """What it costs bounds the optimum from above, so that few of the options that only fill the budget are left."""
    options = {
        site: [Option(site, str(units), units, score=(units - 40) ** 2 / 64) for units in range(1, 101)]
        for site in ("a", "b")
    }
    best = solve(options, 0, 160)  # 40 and 40 would be better, and leave a half of the budget unused
    assert 159 <= total(best) <= 160
    at_best = {site: group[39] for site, group in options.items()}
    assert filled(options, at_best, 159, 160, price) is None, "one site alone cannot"
    found = filled(options, at_best, 100, 110, price)
    assert found == 20**2 / 64  # 40 and 60
    assert max(map(len, worth_trying(options, 0, 110, price, found).values())) == 41
