"""What every method implements, and what it is given. A method is one file in this package; see docs/benchmarks."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn

from msa2conv import Plan

from ..harness.data import Split
from ..harness.training import Schedule

T = TypeVar("T")


class Method(Protocol):
    """One way to make a network cheaper.

    Attributes:
        name: in configs, result files and tables.
        keeps_grid: whether every patch still has a vector of its own at the end, as dense heads need.
    """

    @property
    def name(self) -> str: ...

    @property
    def keeps_grid(self) -> bool: ...

    def shrink(self, parent: nn.Module, budget: int, context: Context) -> nn.Module:
        """A physically smaller network in eval mode that takes the parent's images and gives its classes.

        Args:
            parent: float32, in eval mode; not to be touched (work on a copy).
            budget: multiply-adds of one forward pass at batch 1. The harness accepts 99 to 101 % of it.
            context: data, seed, and what else there is.

        Raises:
            InfeasibleBudget, or any other Msa2ConvError: it cannot; becomes a line in the table.
        """
        ...


@dataclass
class Context:
    """What a method may use, the same for all of them.

    Args:
        train: labelled training images; none but these may be looked at.
        example: one made-up image [1, C, H, W] on the parent's device.
        images: how many training images a method without training may calibrate on.
        schedule: the fine-tuning that follows.
        seed: of everything random.
        progress: show bars.
        time_on: where times are measured; None: where the example is.
        kept: what methods made once and use at every budget, {key: (value, the seconds that it took)}.

    Attributes:
        searched: epochs that the method spent by itself.
        in_time: set by a method that keeps a budget of time, too: it may use less than its budget of multiply-adds.
        spared: seconds that went into what it took from `kept`; they count as its own.
        notes: for the result file.
    """

    train: Split
    example: Tensor
    images: int = 256
    schedule: Schedule = field(default_factory=lambda: Schedule(epochs=0, lr=1e-3))
    seed: int = 0
    progress: bool = False
    time_on: torch.device | None = None
    kept: dict[Hashable, tuple[Any, float]] = field(default_factory=dict)
    searched: int = field(default=0, init=False)
    in_time: bool = field(default=False, init=False)
    spared: float = field(default=0.0, init=False)
    notes: dict[str, Any] = field(default_factory=dict, init=False)

    @property
    def device(self) -> torch.device:
        return self.example.device

    def calibration(self) -> tuple[Tensor, Tensor]:
        """(images [n, C, H, W], labels [n]): the same ones for every method and budget of a seed."""
        return self.train.sample(self.images, self.seed)

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """What does not depend on the budget, made the first time that a seed asks for it."""
        key = (self.seed, key)
        if key in self.kept:
            value, seconds = self.kept[key]
            self.spared += seconds
            return cast("T", value)
        started = time.perf_counter()
        value = make()
        self.kept[key] = value, time.perf_counter() - started
        return value

    def search_for(self, epochs: int) -> int:
        """Say that the method itself trains for so many epochs: the fine-tuning gets as many less."""
        self.searched = min(epochs, self.schedule.epochs)
        return self.searched

    def target(self, budget: int) -> str:
        """A budget as msa2conv takes it: absolute, however small."""
        return f"{budget / 1e3:.3f}k"

    def note_plan(self, plan: Plan) -> None:
        """What msa2conv decided, as data and as a picture."""
        self.note(plan=plan.model_dump(mode="json"), picture=str(plan))

    def note(self, **facts: Any) -> None:
        """Anything that belongs into the result file (plain values): a plan, a ratio, a schedule."""
        self.notes |= facts
