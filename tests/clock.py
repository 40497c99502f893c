"""A clock that counts instead of waiting: what a call takes depends on its operators alone, so tests can be exact."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from msa2conv.stopwatch import Samples

SECONDS_PER_OPERATOR, SECONDS_PER_PRODUCT, SECONDS_PER_NUMBER = 1e-6, 1e-9, 1e-10
_VIEWS = (
    "view",
    "reshape",
    "permute",
    "transpose",
    "slice",
    "select",
    "expand",
    "detach",
    "unbind",
    "split",
    "alias",
    "t",
)


class _Counting(TorchDispatchMode):
    seconds = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in _VIEWS:
            return out
        several = out if isinstance(out, (tuple, list)) else (out,)
        first = next((each for each in several if isinstance(each, Tensor)), None)
        numbers = 0 if first is None else first.numel()
        self.seconds += SECONDS_PER_OPERATOR + SECONDS_PER_NUMBER * numbers
        if name in ("mm", "bmm"):
            self.seconds += SECONDS_PER_PRODUCT * numbers * args[0].shape[-1]
        elif name == "addmm":
            self.seconds += SECONDS_PER_PRODUCT * numbers * args[1].shape[-1]
        elif name == "convolution":
            self.seconds += SECONDS_PER_PRODUCT * numbers * args[1][0].numel()
        elif "dot_product" in name:
            self.seconds += 2 * SECONDS_PER_PRODUCT * args[0].numel() * args[1].shape[-2]
        return out


@torch.no_grad()
def seconds(call: Callable[[], Any]) -> float:
    """What a call takes on this clock."""
    with _Counting() as counting:
        call()
    return counting.seconds


class Clock:
    """Stands for `interleaved`; remembers what it was asked to time.

    Args:
        slower: {name of a call: factor}: what makes it slower than its operators say.
        spread: quartiles of the samples, relative to the median.
    """

    def __init__(self, slower: Mapping[str, float] | None = None, spread: float = 0.0) -> None:
        self.slower, self.spread, self.timed = dict(slower or {}), spread, list[str]()

    def __call__(self, calls: Mapping[str, Callable[[], Any]], *_: Any, **__: Any) -> Samples:
        self.timed += list(calls)
        found = {name: self.slower.get(name, 1.0) * seconds(call) for name, call in calls.items()}
        swing = (1 - self.spread, 1.0, 1 + self.spread)
        return Samples({name: [value * factor for factor in swing] for name, value in found.items()})


def use(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> Clock:
    """Let the library look at this clock."""
    for module in ("msa2conv.search.timing", "msa2conv.latency"):
        monkeypatch.setattr(f"{module}.interleaved", clock)
    return clock
