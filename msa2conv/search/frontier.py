"""The trade-off that a calibration promises: at every number of FLOPs the least that any plan is predicted to lose."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ..options import Option
from ..settings import Options, Setting
from .relaxation import summed

_MULTIPLIERS = 48


def frontier(settings: Sequence[Setting], options: Options, rest: int) -> list[tuple[int, float]]:
    """Plans that no mixture of other plans outdoes: (multiply-adds, sum of scores), the cheapest first.

    For a price of a multiply-add every site takes its own best option (the Lagrangian relaxation of the knapsack), so a
    whole curve takes as long as one solution. What a solver finds for a budget in between lies on the curve or a little
    above it.

    Args:
        settings: values of what is chosen for the whole network at once.
        options: {site: options with scores}.
        rest: multiply-adds outside all sites of the network as it is.

    Returns:
        Points with rising multiply-adds and falling scores; the last is the original, at a score of 0.

    Example:
        >>> from msa2conv.options import Option
        >>> from msa2conv.settings import AS_IT_IS
        >>> group = [Option("a", "host", 10, score=0.0), Option("a", "skip", 0, score=1.0)]
        >>> frontier([AS_IT_IS], {"a": group}, rest=5)
        [(5, 1.0), (15, 0.0)]
    """
    scores = [option.score or 0.0 for group in options.values() for option in group]
    base = rest + sum(max(option.flops for option in group) for group in options.values())
    prices = max(max(scores, default=0.0), 1e-12) / base * np.concatenate(([0.0], np.logspace(-5, 4, _MULTIPLIERS)))

    def best(group: Sequence[Option]) -> npt.NDArray[np.float64]:
        """(multiply-adds, score) of the best option at every price."""
        flops, lost = np.array([each.flops for each in group]), np.array([each.score or 0.0 for each in group])
        picked = (lost[:, None] + flops[:, None] * prices).argmin(0)
        return np.stack((flops[picked], lost[picked]))

    sums = summed(settings, options, best, (2, len(prices)))
    flops = rest + np.array([[setting.flops] for setting in settings]) + sums[:, 0].astype(np.int64)
    lost = np.array([[sum(setting.scores)] for setting in settings]) + sums[:, 1]
    picked = (lost + flops * prices).argmin(0)
    columns = np.arange(len(prices))
    kept: list[tuple[int, float]] = []
    for count, score in sorted(zip(flops[picked, columns].tolist(), lost[picked, columns].tolist(), strict=True)):
        if not kept or score < kept[-1][1]:
            kept.append((count, score))
    return kept


__all__ = ["frontier"]
