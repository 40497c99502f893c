"""The exact budget: a multiple-choice knapsack, solved to optimality."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ..errors import InfeasibleBudget
from ..options import Option
from ..settings import AS_IT_IS, Limit, Options, Setting, inside, least, least_flops
from .measure import NEGLIGIBLE
from .relaxation import bounds, filled, price_of, steps, worth_trying

Choices = dict[str, Option]
_FINE = 1e-3  # gap of the optimum under a limit: what is measured is not known better
ROUND = 0.05  # of what is lost: less than what asking for as much less time by FLOPs costs on a ViT-Ti


def solve(
    options: Mapping[str, Sequence[Option]],
    rest: int,
    budget: int,
    price: Callable[[Option], float] | None = None,
    limit: Limit | None = None,
) -> Choices:
    """Choose one option per site so that the sum of prices is minimal and the FLOPs stay within the budget.

    min sum price  s.t.  one option a site,  0.99 budget <= rest + sum flops <= budget. The lower bound is dropped where
    the options do not allow it, and where there is a second budget. Solved as a mixed-integer program by HiGHS (scipy)
    with a zero optimality gap, or with one of 0.1 % under a `limit`.

    Args:
        options: {site: options with scores}.
        rest: multiply-adds outside all sites.
        budget: multiply-adds allowed in total.
        price: what to minimise; the option's score by default.
        limit: a second budget.

    Returns:
        {site: chosen option}, in the order of `options`.

    Raises:
        InfeasibleBudget: even the cheapest options exceed the budget, or the limit.

    Example:
        >>> options = {"a": [Option("a", "host", 10, score=0.0), Option("a", "skip", 0, score=1.0)]}
        >>> solve(options, rest=5, budget=6)["a"].name
        'skip'
    """
    price = price or _score
    floor = rest + sum(min(option.flops for option in group) for group in options.values())
    if budget < floor:
        raise infeasible(budget, floor)
    if limit is not None:
        worth = {site: _undominated(group, price, limit) for site, group in options.items()}
        found = _solve(worth, rest, 0, budget, price, limit, _FINE)
        if found is None:
            raise too_slow(limit.most, limit.rest + sum(min(map(limit.of, group)) for group in options.values()))
        return found
    least = int(np.ceil(0.99 * budget))
    worth = {site: _undominated(group, price) for site, group in options.items()}
    found = _solve(worth_trying(worth, rest, budget, price), rest, 0, budget, price)
    if found is None or rest + sum(option.flops for option in found.values()) < least:
        most = None if found is None else filled(options, found, least - rest, budget - rest, price)
        every = options if most is None else worth_trying(options, rest, budget, price, most)
        found = _solve(every, rest, least, budget, price) or found
    if found is None:
        raise infeasible(budget, floor)
    return found


def solve_settings(
    settings: Iterable[Setting],
    options: Options,
    rest: int,
    budget: int,
    price: Callable[[Option], float] | None = None,
    limit: Limit | None = None,
) -> tuple[Setting, Choices]:
    """Choose a setting, and in it one option per site: `solve` inside an enumeration of the settings.

    A setting costs the sum of the prices of its steps. Exact: settings are solved in the order of a lower bound (of
    the Lagrangian relaxation: the best of 60 multipliers), until no bound lies below the best solution found.

    Args:
        settings: the values to choose from.
        options, rest, budget, price, limit: as for `solve`, of the network as it is.

    Returns:
        (setting, {site: chosen option in it}).

    Raises:
        InfeasibleBudget: the budget is below what any setting can reach.
    """
    price, settings = price or _score, list(settings)
    best: tuple[float, Setting, Choices] | None = None
    flops = Limit.in_flops(rest, budget)
    bound = bounds(settings, options, price, flops, used_up=limit is None)
    if not np.isfinite(bound).any():  # few options: no sum of them uses the budget up
        bound = bounds(settings, options, price, flops, used_up=False)
    if limit is not None:
        bound = np.maximum(bound, bounds(settings, options, price, limit, used_up=False))
    for index in np.argsort(bound, kind="stable"):
        if not np.isfinite(bound[index]) or (best is not None and bound[index] >= best[0]):
            break
        setting = settings[index]
        within = None if limit is None else limit.inside(setting)
        try:
            choices = solve(inside(setting, options), rest + setting.flops, budget, price, within)
        except InfeasibleBudget:  # by both budgets together
            continue
        worth = steps(setting, price) + sum(price(option) for option in choices.values())
        if best is None or worth < best[0]:
            best = worth, setting, choices
    if best is None:
        floor = least_flops(settings, options, rest)
        if limit is None or budget < floor:
            raise infeasible(budget, floor)
        raise too_slow(limit.most, least(settings, options, limit))
    return best[1], best[2]


@dataclass(frozen=True)
class Optimum:
    """The best choices by one price, in the setting where they are best.

    Args:
        price: what is minimal.
        setting: the setting.
        sites: {site: option in it}.
    """

    price: Callable[[Option], float]
    setting: Setting
    sites: Choices

    @cached_property
    def choices(self) -> Choices:
        """All that is to be done: a setting's own option is the first."""
        if self.setting.option is None:
            return self.sites
        option = self.setting.option()
        return {option.site: option} | self.sites

    @property
    def rounds(self) -> int:
        """How often tokens are compared and gathered, inside sites and through the network."""
        return sum(option.rounds for option in self.choices.values())


def few_merges(
    optimum: Optimum, settings: Iterable[Setting], options: Options, rest: int, budget: int
) -> Optimum | None:
    """The optimum where every round of merging has its price.

    Whether what merges less is as good, only the whole network can tell.

    Args:
        optimum: what `solve_settings` found.
        settings, options, rest, budget: those it was found with.

    Returns:
        None where nothing merges.
    """
    if not optimum.rounds:
        return None
    price = optimum.price
    cost = steps(optimum.setting, price) + sum(map(price, optimum.sites.values()))
    each = a_round(cost, optimum.rounds, price_of(NEGLIGIBLE, price))
    dearer = solve_settings(settings, options, rest, budget, lambda option: price(option) + each * option.rounds)
    return Optimum(price, *dearer)


def a_round(lost: float, rounds: int, least: float = NEGLIGIBLE) -> float:
    """What a round of merging costs beside FLOPs: comparing and gathering tokens takes time, but hardly any of them.

    Args:
        lost: in the network that loses least.
        rounds: of that network, which cost `least` in sum at least: where merging comes at nearly no loss, the least
            of it is no reason to merge.
    """
    return max(ROUND * lost, least / max(1, rounds))


def _undominated(group: Sequence[Option], price: Callable[[Option], float], limit: Limit | None = None) -> list[Option]:
    """Without options that cost no less than another and are no better: they only serve to use up a budget."""
    if limit is not None:
        axes = [(option.flops, limit.of(option), price(option)) for option in group]
        costs = np.unique(np.array(axes, dtype=np.float64), axis=0)  # duplicates would outdo each other
        first = dict(zip(reversed(axes), reversed(group), strict=True))
        worse = (costs[:, None] >= costs[None]).all(2).sum(1) > 1
        return [first[int(flops), taken, cost] for flops, taken, cost in costs[~worse]]
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
    price: Callable[[Option], float],
    limit: Limit | None = None,
    gap: float = 0.0,
) -> Choices | None:
    """The optimum between `least` and `budget`, and within the limit; None where no sum of options lies there."""
    if not options:
        return {} if least <= rest and (limit is None or limit.rest <= limit.most) else None
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import coo_array

    flat = [option for group in options.values() for option in group]
    sites = np.repeat(np.arange(len(options)), [len(group) for group in options.values()])
    prices = np.array([price(option) for option in flat])
    flops = np.array([option.flops for option in flat], dtype=np.int64)
    # Integer units keep HiGHS's tolerances far below one unit: divide by the common divisor of all differences.
    cheapest = np.array([min(option.flops for option in group) for group in options.values()])
    base, floor = cheapest[sites], rest + int(cheapest.sum())
    unit = int(np.gcd.reduce(flops - base)) or 1
    extra = (flops - base) // unit
    room = (budget - floor) // unit
    lower = max(0, -(-(least - floor) // unit))
    one_each = LinearConstraint(coo_array((np.ones(len(flat)), (sites, np.arange(len(flat))))), 1, 1)
    scale = max(1.0, room / 1e6)
    constraints = [one_each, LinearConstraint((extra / scale)[None, :], lower / scale, room / scale)]
    if limit is not None:
        shares = np.array([limit.of(option) for option in flat]) / limit.most
        constraints.append(LinearConstraint(shares[None, :], 0, 1 - limit.rest / limit.most))
    result = milp(
        prices * (1e4 / max(float(prices.max()), 1e-12)),  # far above the absolute gap of 1e-6
        constraints=constraints,
        integrality=np.ones(len(flat)),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": gap, "time_limit": 60.0},
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


def too_slow(most: float, floor: float) -> InfeasibleBudget:
    """The error for a latency below the floor, or one that can only be kept at more FLOPs."""
    if floor <= most:
        return InfeasibleBudget(
            "latency_target",
            f"{1e3 * most:.4g} ms together with a FLOPs budget",
            "budgets that one network can keep (each alone can be kept)",
            "Allow more time, more FLOPs or more levers.",
        )
    return InfeasibleBudget(
        "latency_target",
        f"{1e3 * most:.4g} ms",
        f"at least {1e3 * floor:.4g} ms, the floor of the allowed levers on this device",
        "Allow more time or more levers (by default they are all that need no training).",
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


def diverse(
    options: Options,
    rest: int,
    budget: int,
    settings: Sequence[Setting] = (AS_IT_IS,),
    limit: Limit | None = None,
) -> dict[str, Optimum]:
    """{name of the price: its optimum}, duplicates dropped.

    Where a setting is best, also the optimum without any, if there is one. Without a limit, which knows what they take,
    also the optimum of few merges.
    """
    found: dict[str, Optimum] = {}
    for name, price in PRICES.items():
        found[name] = Optimum(price, *solve_settings(settings, options, rest, budget, price, limit))
        if limit is None and (few := few_merges(found[name], settings, options, rest, budget)) is not None:
            found[f"{name}, few merges"] = few
        if found[name].setting.option is not None:
            with suppress(InfeasibleBudget):
                alone = solve_settings([AS_IT_IS], options, rest, budget, price, limit)
                found[f"{name}, nothing through"] = Optimum(price, *alone)
    first: dict[tuple[str, ...], str] = {}
    for name, optimum in found.items():
        first.setdefault(tuple(option.name for option in optimum.choices.values()), name)
    return {name: found[name] for name in first.values()}
