"""The Lagrangian relaxation of a budget: what a solution costs at least, and which options none can contain.

With a price on every multiply-add in the place of the budget each site decides by itself, in no time at all; whatever
that price, the result bounds every solution from below. An option is out of the question where the bound of the plans
that contain it lies above a solution that is known (fixing of variables by reduced costs: Wolsey, "Integer
Programming", 1998, section 7.4): the exact solver then has a handful of options a site instead of hundreds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest

import numpy as np
import numpy.typing as npt

from ..options import Option
from ..settings import Limit, Options, Setting, on_tokens

_HALVINGS = 60
_ROUNDING = 1e-9  # of a sum of prices


def steps(setting: Setting, price: Callable[[Option], float]) -> float:
    """What the steps of a setting cost."""
    pairs = zip_longest(setting.scores, setting.rounds, fillvalue=0)
    return sum(price_of(score, price, int(rounds)) for score, rounds in pairs)


def price_of(score: float, price: Callable[[Option], float], rounds: int = 0) -> float:
    """What an option of this score and so many rounds of merging costs."""
    return price(Option("", "", 0, score=score, rounds=rounds))


def bounds(
    settings: Sequence[Setting], options: Options, price: Callable[[Option], float], budget: Limit, used_up: bool
) -> npt.NDArray[np.float64]:
    """What each setting costs at least; infinite where it does not fit the budget, or (`used_up`) leaves a part of it
    unused that the network as it is could use."""
    largest = max((price(option) for group in options.values() for option in group), default=0.0) or 1.0
    multipliers = largest / budget.most * np.concatenate(([0.0], np.logspace(-6, 4, 60)))

    def row(group: Sequence[Option]) -> npt.NDArray[np.float64]:
        """The least that a group takes of the budget, the most, and what it costs at every multiplier."""
        prices, taken = np.array([price(option) for option in group]), np.array([budget.of(each) for each in group])
        return np.concatenate(([taken.min(), taken.max()], (prices[:, None] + taken[:, None] * multipliers).min(0)))

    sums = summed(settings, options, row, (2 + len(multipliers),))
    least, most, costs = sums[:, 0], sums[:, 1], sums[:, 2:]
    left = budget.most - np.array([budget.inside(setting).rest for setting in settings])
    possible = least <= left
    if used_up:
        as_it_is = np.array([setting.option is None for setting in settings])
        possible &= as_it_is | (most >= left - 0.01 * budget.most)
    own = np.array([steps(setting, price) for setting in settings])
    return np.where(possible, own + (costs - multipliers * left[:, None]).max(1), np.inf)


def summed(
    settings: Sequence[Setting],
    options: Options,
    row: Callable[[Sequence[Option]], npt.NDArray[np.float64]],
    shape: tuple[int, ...],
) -> npt.NDArray[np.float64]:
    """[settings, *shape]: of every setting the sum over all sites of what `row` says of the options there."""
    found = np.zeros((len(settings), *shape))
    for path, group in options.items():
        seen = [setting.tokens.get(path) for setting in settings]
        where = {tokens: index for index, tokens in enumerate(dict.fromkeys(seen))}
        rows = np.array([row(on_tokens(group, tokens)) for tokens in where])
        found += rows[[where[tokens] for tokens in seen]]
    return found


def worth_trying(
    options: Mapping[str, Sequence[Option]],
    rest: int,
    budget: int,
    price: Callable[[Option], float],
    most: float | None = None,
) -> dict[str, list[Option]]:
    """Without the options that no solution contains whose prices sum to at most so much.

    Args:
        options, rest, budget, price: as for `solve`; the budget has to be within reach.
        most: None: what the best solution takes, of which the relaxation finds an upper bound.
    """
    groups = list(options.values())
    prices = [np.array([price(option) for option in group], dtype=np.float64) for group in groups]
    flops = [np.array([option.flops for option in group], dtype=np.float64) for group in groups]
    room = float(budget - rest)

    def at(multiplier: float) -> tuple[float, list[int]]:
        """(bound, what each site takes; the cheaper of equals)."""
        sums = [worth + multiplier * taken for worth, taken in zip(prices, flops, strict=True)]
        picked = [int(np.lexsort((taken, total))[0]) for total, taken in zip(sums, flops, strict=True)]
        bound = sum(float(total[at]) for total, at in zip(sums, picked, strict=True)) - multiplier * room
        return bound, picked

    def left(picked: Sequence[int]) -> float:
        return room - sum(float(taken[at]) for taken, at in zip(flops, picked, strict=True))

    bound, picked = at(0.0)
    best = bound, 0.0
    if left(picked) < 0:
        low = 0.0
        high = max(float(worth.max()) for worth in prices) / max(1.0, room) or 1.0
        while left(at(high)[1]) < 0:
            low, high = high, 2 * high
            if high > 1e30:  # prices cannot bring it about: no bound
                return {site: list(group) for site, group in options.items()}
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            bound, picked = at(middle)
            best = max(best, (bound, middle))
            low, high = (middle, high) if left(picked) < 0 else (low, middle)
        bound, picked = at(high)
        best = max(best, (bound, high))
    if most is None:
        most = _improved(prices, flops, picked, left(picked))
    bound, multiplier = best
    allowed = most - bound + _ROUNDING * (abs(most) + abs(bound))
    kept = {}
    for (site, group), worth, taken in zip(options.items(), prices, flops, strict=True):
        total = worth + multiplier * taken
        kept[site] = [option for option, more in zip(group, total - total.min(), strict=True) if more <= allowed]
    return kept


def filled(
    options: Mapping[str, Sequence[Option]],
    choices: Mapping[str, Option],
    least: int,
    most: int,
    price: Callable[[Option], float],
) -> float | None:
    """What choices take that one exchange brings between `least` and `most` multiply-adds; None if none does."""
    total, worth = (sum(of(option) for option in choices.values()) for of in (lambda option: option.flops, price))
    return min(
        (
            worth + price(option) - price(choices[site])
            for site, group in options.items()
            for option in group
            if least <= total + option.flops - choices[site].flops <= most
        ),
        default=None,
    )


def _improved(
    prices: list[npt.NDArray[np.float64]], flops: list[npt.NDArray[np.float64]], picked: list[int], left: float
) -> float:
    """What a solution takes when the multiply-adds that it leaves are spent on the best exchange, as long as there is
    one."""
    picked = list(picked)
    while True:
        best = 0.0, -1, -1
        for index, (worth, taken, at) in enumerate(zip(prices, flops, picked, strict=True)):
            gains = np.where(taken <= taken[at] + left, worth[at] - worth, -np.inf)
            other = int(gains.argmax())
            best = max(best, (float(gains[other]), index, other))
        gain, index, other = best
        if gain <= 0:
            return float(sum(worth[at] for worth, at in zip(prices, picked, strict=True)))
        left -= float(flops[index][other] - flops[index][picked[index]])
        picked[index] = other


__all__ = ["bounds", "filled", "price_of", "steps", "summed", "worth_trying"]
