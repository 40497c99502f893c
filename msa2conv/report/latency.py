"""What a hybrid takes in time, and of a budget of time what was allowed and promised."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from ..stopwatch import Timing

CLOSE = 0.05  # of the target
BUSY = 0.1  # spread from which on the machine counts as busy


class Latency(BaseModel):
    """What a hybrid takes in time, measured end to end with the original in turn.

    Args:
        before, after: of the original and of the hybrid.
        ratio: of the two: the median over rounds, in which they took turns.
        batch_size: images in a batch.
        device: where, with which threads and torch.
        dtype: of the weights.
        target: seconds allowed; None without a budget of time.
        predicted: the ratio that the sum of the modules' times promised; None without a budget of time.
        attempts: ratio of every network that was tried for the budget, this one among them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    before: Timing
    after: Timing
    ratio: float
    batch_size: int
    device: str
    dtype: str
    target: float | None = None
    predicted: float | None = None
    attempts: list[float] = []

    @property
    def off(self) -> float:
        """How much more than allowed it takes, as a fraction of the target; 0 without one."""
        return 0.0 if self.target is None else self.ratio * self.before.seconds / self.target - 1

    @property
    def spread(self) -> float:
        """How noisy the machine was: interquartile range over the median."""
        return max(self.before.spread, self.after.spread)

    @property
    def warnings(self) -> list[str]:
        """What the user should know."""
        found: list[str] = []
        if self.target is None:
            return found
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
        timed = f"timed on {self.device}; quartiles within {self.spread:.0%} of the median"
        if self.target is None or self.predicted is None:
            return timed
        tried = f" (tried: {', '.join(f'{ratio:.1%}' for ratio in self.attempts)})" if len(self.attempts) > 1 else ""
        return (
            f"budget {1e3 * self.target:.4g} ms, {1 + self.off:.1%} used; "
            f"predicted {self.predicted:.1%} of the original's time, measured {self.ratio:.1%}{tried}\n{timed}"
        )


__all__ = ["BUSY", "CLOSE", "Latency"]
