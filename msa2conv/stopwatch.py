"""Times of calls that take turns, so that their ratios can be trusted on a machine that is busy with other things."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from .progress import track

WARM_UP = 2  # rounds
_AT_LEAST = 2e-3  # seconds of a sample: a quicker call is repeated within it
_MOST_REPEATS = 50


class Timing(BaseModel):
    """Args:
    seconds: median of a call.
    spread: interquartile range over the median: how noisy the machine was.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    seconds: float
    spread: float


@dataclass(frozen=True)
class Samples:
    """Seconds of calls, {name: one for every round}."""

    seconds: Mapping[str, Sequence[float]]

    def timing(self, name: str) -> Timing:
        """Median and spread of a call."""
        found = self.seconds[name]
        middle = median(found)
        first, _, third = quantiles(found, n=4) if len(found) > 1 else (middle,) * 3
        return Timing(seconds=middle, spread=(third - first) / middle)

    def ratio(self, name: str, anchor: str) -> float:
        """Median over rounds of one call's time over another's: what slows both down at a time cancels."""
        return median(one / other for one, other in zip(self.seconds[name], self.seconds[anchor], strict=True))


@torch.no_grad()
def interleaved(
    calls: Mapping[str, Callable[[], Any]],
    device: torch.device,
    rounds: int = 15,
    *,
    repeated: bool = True,
    ahead: Callable[[], Any] | None = None,
    what: str = "time",
    progress: bool = False,
) -> Samples:
    """Time every call once a round, in turn.

    Args:
        calls: what to time.
        device: where it runs; waited for around every sample.
        rounds: samples of each call, after two that warm up.
        repeated: let a sample of a quick call be the mean of several in a row; what it reads is then in a cache.
        ahead: called before every sample, and not timed: what is usually called before.
        what, progress: a bar.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    repeats = dict.fromkeys(calls, 1)
    for turn in track(range(WARM_UP + rounds), what, progress):
        for name, call in calls.items():
            if ahead is not None:
                ahead()
            _wait(device)
            started = time.perf_counter()
            for _ in range(repeats[name]):
                call()
            _wait(device)
            seconds = (time.perf_counter() - started) / repeats[name]
            if turn == WARM_UP - 1 and repeated:
                repeats[name] = max(1, min(_MOST_REPEATS, math.ceil(_AT_LEAST / max(seconds, 1e-9))))
            elif turn >= WARM_UP:
                samples[name].append(seconds)
    return Samples(samples)


@torch.no_grad()
def inside(
    networks: Mapping[str, nn.Module],
    paths: Collection[str],
    inputs: Tensor,
    rounds: int = 15,
    *,
    what: str = "time",
    progress: bool = False,
) -> Samples:
    """Time modules where they stand, in networks that take turns. On a CPU: a GPU is not done when a module returns.

    Args:
        networks: what to run.
        paths: of modules in them; "" is the network itself.
        inputs: a batch.
        rounds: samples of each module, after two that warm up.
        what, progress: a bar.

    Returns:
        {"network path": seconds}, without modules that a network has not, or does not call once.
    """
    samples: dict[str, list[float]] = {}
    handles: list[Any] = []

    def watch(name: str, module: nn.Module) -> None:
        found, started = samples.setdefault(name, []), list[float]()
        handles.append(module.register_forward_pre_hook(lambda *_: started.append(time.perf_counter())))
        handles.append(module.register_forward_hook(lambda *_: found.append(time.perf_counter() - started.pop())))

    try:
        for network, model in networks.items():
            modules = dict(model.named_modules(remove_duplicate=False))
            for path in paths:
                if path in modules:
                    watch(f"{network} {path}", modules[path])
        for _ in track(range(WARM_UP + rounds), what, progress):
            for model in networks.values():
                model(inputs)
    finally:
        for handle in handles:
            handle.remove()
    return Samples({name: found[WARM_UP:] for name, found in samples.items() if len(found) == WARM_UP + rounds})


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


__all__ = ["Samples", "Timing", "inside", "interleaved"]
