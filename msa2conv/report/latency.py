"""The report of a budget of time: what was allowed, promised and measured."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from ..stopwatch import Timing

CLOSE = 0.05  # of the target
BUSY = 0.1  # spread from which on the machine counts as busy


class Latency(BaseModel):
    """What a hybrid takes in time, measured end to end with the original in turn.

    Args:
        target: seconds allowed.
        before, after: of the original and of the hybrid.
        ratio: of the two: the median over rounds, in which they took turns.
        predicted: the ratio that the sum of the modules' times promised.
        batch_size: images in a batch.
        device: where, with which threads and torch.
        dtype: of the weights.
        attempts: ratio of every network that was tried.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    target: float
    before: Timing
    after: Timing
    ratio: float
    predicted: float
    batch_size: int
    device: str
    dtype: str
    attempts: list[float]

    @property
    def off(self) -> float:
        """How much more than allowed it takes, as a fraction of the target."""
        return self.ratio * self.before.seconds / self.target - 1

    @property
    def spread(self) -> float:
        """How noisy the machine was: interquartile range over the median."""
        return max(self.before.spread, self.after.spread)

    @property
    def warnings(self) -> list[str]:
        """What the user should know."""
        found = []
        if self.spread > BUSY:
            found.append(
                f"the machine was busy: half of the times spread over {self.spread:.0%} of the median; measure again "
                "with nothing else running before you trust the milliseconds"
            )
        if self.off > CLOSE:
            corrections = len(self.attempts) - 1
            found.append(
                f"the hybrid takes {self.off:.0%} more time than asked for, after {corrections} "
                f"correction{'' if corrections == 1 else 's'}"
            )
        return found

    def __str__(self) -> str:
        tried = " -> ".join(f"{ratio:.1%}" for ratio in self.attempts)
        return (
            f"{1 + self.off:.1%} used; predicted {self.predicted:.1%} of the original's time, measured {tried}\n"
            f"timed on {self.device}; quartiles within {self.spread:.0%} of the median"
        )


__all__ = ["BUSY", "CLOSE", "Latency"]
