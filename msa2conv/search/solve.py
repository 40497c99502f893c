"""The exact budget: a multiple-choice knapsack, solved to optimality."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from ..errors import InfeasibleBudget
from ..options import Option

Choices = dict[str, Option]


def solve(
    options: Mapping[str, Sequence[Option]],
    rest: int,
    budget: int,
    price: Callable[[Option], float] | None = None,
) -> Choices:
    """Choose one option per site so that the sum of prices is minimal and the FLOPs stay within the budget.

    min sum price  s.t.  one option a site,  0.99 budget <= rest + sum flops <= budget. The lower bound is dropped where
    the options do not allow it. Solved as a mixed-integer program by HiGHS (scipy) with a zero optimality gap.

    Args:
        options: {site: options with scores}.
        rest: multiply-adds outside all sites.
        budget: multiply-adds allowed in total.
        price: what to minimise; the option's score by default.

    Returns:
        {site: chosen option}, in the order of `options`.

    Raises:
        InfeasibleBudget: even the cheapest options exceed the budget.

    Example:
        >>> options = {"a": [Option("a", "host", 10, score=0.0), Option("a", "skip", 0, score=1.0)]}
        >>> solve(options, rest=5, budget=6)["a"].name
        'skip'
    """
    price = price or _score
    floor = rest + sum(min(option.flops for option in group) for group in options.values())
    if budget < floor:
        raise infeasible(budget, floor)
    least = int(np.ceil(0.99 * budget))
    worth = {site: _undominated(group, price) for site, group in options.items()}
    found = _solve(worth, rest, 0, budget, floor, price)
    if found is None or rest + sum(option.flops for option in found.values()) < least:
        found = _solve(options, rest, least, budget, floor, price) or found
    if found is None:
        raise infeasible(budget, floor)
    return found


def _undominated(group: Sequence[Option], price: Callable[[Option], float]) -> list[Option]:
    """Without options that cost no less than another and are no better: they only serve to use up a budget."""
    kept: list[Option] = []
    for option in sorted(group, key=lambda option: (option.flops, price(option))):
        if not kept or price(option) < price(kept[-1]):
            kept.append(option)
    return kept


def _solve(
    options: Mapping[str, Sequence[Option]],
    rest: int,
    least: int,
    budget: int,
    floor: int,
    price: Callable[[Option], float],
) -> Choices | None:
    """The optimum between `least` and `budget`; None where no sum of options lies there."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import coo_array

    flat = [option for group in options.values() for option in group]
    sites = np.repeat(np.arange(len(options)), [len(group) for group in options.values()])
    prices = np.array([price(option) for option in flat])
    flops = np.array([option.flops for option in flat], dtype=np.int64)
    # Integer units keep HiGHS's tolerances far below one unit: divide by the common divisor of all differences.
    base = np.array([min(option.flops for option in group) for group in options.values()])[sites]
    unit = int(np.gcd.reduce(flops - base)) or 1
    extra = (flops - base) // unit
    room = (budget - floor) // unit
    lower = max(0, -(-(least - floor) // unit))
    one_each = LinearConstraint(coo_array((np.ones(len(flat)), (sites, np.arange(len(flat))))), 1, 1)
    scale = max(1.0, room / 1e6)
    within = LinearConstraint((extra / scale)[None, :], lower / scale, room / scale)
    result = milp(
        prices * (1e4 / max(float(prices.max()), 1e-12)),  # far above the absolute gap of 1e-6
        constraints=[one_each, within],
        integrality=np.ones(len(flat)),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 0.0, "time_limit": 60.0},
    )
    if result.x is None:
        return None
    picked = np.flatnonzero(result.x > 0.5)
    return {flat[index].site: flat[index] for index in picked} if int(extra[picked].sum()) <= room else None


def infeasible(budget: int, floor: int) -> InfeasibleBudget:
    """The error for a budget below the floor."""
    return InfeasibleBudget(
        "flops_target",
        f"{budget / 1e9:.4g} GFLOPs",
        f"at least {floor / 1e9:.4g} GFLOPs, the floor of the allowed levers",
        "Ask for more FLOPs, or allow more levers or a smaller FFN(min_keep=...).",
    )


def _score(option: Option) -> float:
    if option.score is None:
        raise ValueError(f"option {option.name} of {option.site} has no score")
    return option.score


# Single-site scores are not additive, so several ways of adding them up are tried and compared on whole networks.
PRICES: Mapping[str, Callable[[Option], float]] = {
    "additive": _score,
    "square root": lambda option: _score(option) ** 0.5,
    "three quarters": lambda option: _score(option) ** 0.75,
}


def diverse(options: Mapping[str, Sequence[Option]], rest: int, budget: int) -> dict[str, Choices]:
    """{name of the price: its optimal choices}, duplicates dropped."""
    found: dict[str, Choices] = {}
    seen: set[tuple[str, ...]] = set()
    for name, price in PRICES.items():
        choices = solve(options, rest, budget, price)
        key = tuple(option.name for option in choices.values())
        if key not in seen:
            seen.add(key)
            found[name] = choices
    return found
