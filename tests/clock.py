"""A clock that counts instead of waiting: what a call takes depends on its operators alone, so tests can be exact."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
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
    """Stands for `interleaved` and `inside`; remembers what it was asked to time.

    Args:
        slower: {name of a call: factor}: what makes it slower than its operators say.
        spread: quartiles of the samples, relative to the median.
        in_networks: {class of a module: factor}: how much slower it is in a hybrid than by itself.
    """

    def __init__(
        self,
        slower: Mapping[str, float] | None = None,
        spread: float = 0.0,
        in_networks: Mapping[str, float] | None = None,
    ) -> None:
        self.slower, self.spread, self.timed = dict(slower or {}), spread, list[str]()
        self.in_networks = dict(in_networks or {})

    def __call__(self, calls: Mapping[str, Callable[[], Any]], *_: Any, **__: Any) -> Samples:
        self.timed += list(calls)
        found: dict[str, float] = {}
        for name, call in calls.items():
            if name == "hybrid":
                model, inputs = call.func, *call.args  # type: ignore[attr-defined]
                found[name] = self._of(name, model, [""], inputs)[""]
            else:
                found[name] = self.slower.get(name, 1.0) * seconds(call)
        return self._swinging(found)

    def inside(
        self, networks: Mapping[str, nn.Module], paths: Iterable[str], inputs: Tensor, *_: Any, **__: Any
    ) -> Samples:
        found: dict[str, float] = {}
        for network, model in networks.items():
            times = self._of(network, model, list(paths), inputs)
            found |= {f"{network} {path}": taken for path, taken in times.items()}
        self.timed += list(found)
        return self._swinging(found)

    @torch.no_grad()
    def _of(self, network: str, model: nn.Module, paths: list[str], inputs: Tensor) -> dict[str, float]:
        """{path: seconds} of modules where they stand."""
        found, handles, factor = dict[str, float](), list[Any](), self.slower.get(network, 1.0)

        def watch(path: str, module: nn.Module, drag: float | None = None) -> None:
            def start(*_: Any) -> None:
                found[path] = -counting.seconds

            def stop(*_: Any) -> None:
                taken = found.pop(path) + counting.seconds
                if drag is None:
                    found[path] = taken
                else:
                    counting.seconds += (drag - 1) * taken

            handles.extend((module.register_forward_pre_hook(start), module.register_forward_hook(stop)))

        with _Counting() as counting:
            for path, module in model.named_modules():
                if type(module).__name__ in self.in_networks:
                    watch(f"drag {path}", module, self.in_networks[type(module).__name__])
            for path in paths:
                watch(path, model.get_submodule(path))
            model(inputs)
        for handle in handles:
            handle.remove()
        return {path: factor * taken for path, taken in found.items()}

    def _swinging(self, found: Mapping[str, float]) -> Samples:
        swing = (1 - self.spread, 1.0, 1 + self.spread)
        return Samples({name: [value * factor for factor in swing] for name, value in found.items()})


def use(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> Clock:
    """Let the library look at this clock."""
    for module in ("msa2conv.search.timing", "msa2conv.latency"):
        monkeypatch.setattr(f"{module}.interleaved", clock)
        monkeypatch.setattr(f"{module}.inside", clock.inside)
    return clock
