"""The exact budget: a multiple-choice knapsack, solved to optimality."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from ..errors import InfeasibleBudget
from ..options import Option
from ..settings import AS_IT_IS, Options, Setting, inside, least_flops, on_tokens

Choices = dict[str, Option]
_FINE = 1e-3  # gap of the optimum under a limit: what is measured is not known better


@dataclass(frozen=True)
class Limit:
    """A second budget, additive as FLOPs are, of what is measured: seconds.

    Args:
        of: what an option takes.
        of_setting: what a setting takes outside all sites.
        rest: what the network takes outside all sites.
        most: what may be taken in total.
    """

    of: Callable[[Option], float]
    of_setting: Callable[[Setting], float]
    rest: float
    most: float

    def inside(self, setting: Setting) -> Limit:
        """What is left in a setting."""
        return replace(self, rest=self.rest + self.of_setting(setting))


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
        found = _solve(worth, rest, 0, budget, floor, price, limit)
        if found is None:
            raise too_slow(limit.most, limit.rest + sum(min(map(limit.of, group)) for group in options.values()))
        return found
    least = int(np.ceil(0.99 * budget))
    worth = {site: _undominated(group, price) for site, group in options.items()}
    found = _solve(worth, rest, 0, budget, floor, price)
    if found is None or rest + sum(option.flops for option in found.values()) < least:
        found = _solve(options, rest, least, budget, floor, price) or found
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
    flops = Limit(lambda option: option.flops, lambda setting: setting.flops, rest, budget)
    bounds = _bounds(settings, options, price, flops, used_up=limit is None)
    if limit is not None:
        bounds = np.maximum(bounds, _bounds(settings, options, price, limit, used_up=False))
    for index in np.argsort(bounds, kind="stable"):
        if not np.isfinite(bounds[index]) or (best is not None and bounds[index] >= best[0]):
            break
        setting = settings[index]
        within = None if limit is None else limit.inside(setting)
        try:
            choices = solve(inside(setting, options), rest + setting.flops, budget, price, within)
        except InfeasibleBudget:  # by both budgets together
            continue
        worth = _steps(setting, price) + sum(price(option) for option in choices.values())
        if best is None or worth < best[0]:
            best = worth, setting, choices
    if best is None:
        floor = least_flops(settings, options, rest)
        if limit is None or budget < floor:
            raise infeasible(budget, floor)
        raise too_slow(limit.most, quickest(settings, options, limit))
    return best[1], best[2]


def quickest(settings: Iterable[Setting], options: Options, limit: Limit) -> float:
    """The least that any network takes of a limit, whatever it costs in accuracy."""
    known: dict[tuple[str, int | None], float] = {}

    def least(path: str, tokens: int | None) -> float:
        if (path, tokens) not in known:
            known[path, tokens] = min(map(limit.of, on_tokens(options[path], tokens)))
        return known[path, tokens]

    return min(
        limit.inside(setting).rest + sum(least(path, setting.tokens.get(path)) for path in options)
        for setting in settings
    )


def _steps(setting: Setting, price: Callable[[Option], float]) -> float:
    return sum(price(Option("", "", 0, score=score)) for score in setting.scores)


def _bounds(
    settings: Sequence[Setting], options: Options, price: Callable[[Option], float], budget: Limit, used_up: bool
) -> npt.NDArray[np.float64]:
    """What each setting costs at least; infinite where it does not fit the budget, or (`used_up`) leaves a part of it
    unused that the network as it is could use."""
    tables: dict[tuple[str, int | None], tuple[npt.NDArray[np.float64], float, float]] = {}
    largest = max((price(option) for group in options.values() for option in group), default=0.0) or 1.0
    multipliers = largest / budget.most * np.concatenate(([0.0], np.logspace(-6, 4, 60)))

    def table(path: str, tokens: int | None) -> tuple[npt.NDArray[np.float64], float, float]:
        if (path, tokens) not in tables:
            group = on_tokens(options[path], tokens)
            prices, taken = np.array([price(option) for option in group]), np.array([budget.of(each) for each in group])
            least = (prices[:, None] + taken[:, None] * multipliers).min(0)
            tables[path, tokens] = least, float(taken.min()), float(taken.max())
        return tables[path, tokens]

    found = np.full(len(settings), np.inf)
    for index, setting in enumerate(settings):
        parts = [table(path, setting.tokens.get(path)) for path in options]
        left = budget.most - budget.inside(setting).rest
        least, most = (sum(part[which] for part in parts) for which in (1, 2))
        if least <= left and (setting.option is None or not used_up or most >= left - 0.01 * budget.most):
            bound = np.sum([part[0] for part in parts], 0) - multipliers * left
            found[index] = _steps(setting, price) + float(bound.max())
    return found


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
    floor: int,
    price: Callable[[Option], float],
    limit: Limit | None = None,
) -> Choices | None:
    """The optimum between `least` and `budget`, and within the limit; None where no sum of options lies there."""
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
    constraints = [one_each, LinearConstraint((extra / scale)[None, :], lower / scale, room / scale)]
    if limit is not None:
        shares = np.array([limit.of(option) for option in flat]) / limit.most
        constraints.append(LinearConstraint(shares[None, :], 0, 1 - limit.rest / limit.most))
    result = milp(
        prices * (1e4 / max(float(prices.max()), 1e-12)),  # far above the absolute gap of 1e-6
        constraints=constraints,
        integrality=np.ones(len(flat)),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 0.0 if limit is None else _FINE, "time_limit": 60.0},
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
        "Allow more time or more levers (levers='all' merges tokens through the network).",
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
) -> dict[str, Choices]:
    """{name of the price: its optimal choices}, duplicates dropped; a setting is the first of its choices.

    With several settings also the optimum without any, where there is one: single scores cannot say which comes closer.
    """
    found: dict[str, Choices] = {}
    seen: set[tuple[str, ...]] = set()
    ways = {"": list(settings)} | ({", grid kept": [AS_IT_IS]} if len(settings) > 1 else {})
    for name, price in PRICES.items():
        for suffix, allowed in ways.items():
            try:
                setting, choices = solve_settings(allowed, options, rest, budget, price, limit)
            except InfeasibleBudget:
                if not suffix:
                    raise
                continue
            if setting.option is not None:
                choices = {(option := setting.option()).site: option} | choices
            key = tuple(option.name for option in choices.values())
            if key not in seen:
                seen.add(key)
                found[name + suffix] = choices
    return found
