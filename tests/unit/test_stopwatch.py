"""Times of calls that take turns."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch

from msa2conv import stopwatch
from msa2conv.stopwatch import Samples, inside, interleaved

CPU = torch.device("cpu")


Calls = tuple[Callable[[str, float], Callable[[], None]], list[str]]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """(what makes a call that takes so many seconds, the names of those that were called)."""
    now, called = [0.0], list[str]()

    def make(name: str, seconds: float) -> Callable[[], None]:
        def call() -> None:
            called.append(name)
            now[0] += seconds

        return call

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return make, called


def test_median_spread_and_ratio() -> None:
    samples = Samples({"a": [1.0, 2.0, 3.0, 4.0, 10.0], "b": [2.0, 4.0, 6.0, 8.0, 20.0]})
    assert samples.timing("a").seconds == 3.0
    assert samples.timing("a").spread == pytest.approx((7.0 - 1.5) / 3.0)
    assert samples.ratio("b", "a") == 2.0, "round by round: what slows both down cancels"
    assert Samples({"a": [2.0]}).timing("a").spread == 0.0


def test_calls_take_turns_and_quick_ones_are_repeated_within_a_sample(calls: Calls) -> None:
    make, called = calls
    samples = interleaved({"quick": make("quick", 0.0005), "slow": make("slow", 0.01)}, CPU, rounds=3)
    assert samples.seconds["quick"] == pytest.approx([0.0005] * 3)
    assert samples.seconds["slow"] == pytest.approx([0.01] * 3)
    warm, rest = called[: 2 * stopwatch.WARM_UP], called[2 * stopwatch.WARM_UP :]
    assert warm == ["quick", "slow"] * stopwatch.WARM_UP
    assert rest == (["quick"] * 4 + ["slow"]) * 3


def test_nothing_is_recorded_for_autograd() -> None:
    layer, seen = torch.nn.Linear(2, 2), []
    interleaved({"": lambda: seen.append(layer(torch.ones(1, 2)).requires_grad)}, CPU, rounds=1)
    assert not any(seen)


def test_what_is_called_ahead_is_not_timed(calls: Calls) -> None:
    make, called = calls
    pair = {"one": make("one", 0.25), "two": make("two", 0.5)}
    samples = interleaved(pair, CPU, rounds=2, repeated=False, ahead=make("ahead", 8.0))
    assert samples.seconds == {"one": [0.25, 0.25], "two": [0.5, 0.5]}
    assert called == ["ahead", "one", "ahead", "two"] * (stopwatch.WARM_UP + 2)


class Takes(torch.nn.Module):
    """Takes so many seconds, beside what its modules take."""

    def __init__(self, now: list[float], own: float, times: int = 1, **modules: torch.nn.Module) -> None:
        super().__init__()
        self.now, self.own, self.times = now, own, times
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.now[0] += self.own
        for _ in range(self.times):
            for module in self.children():
                x = module(x)
        return x


def test_modules_are_timed_where_they_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    one = Takes(now, 1.0, a=Takes(now, 2.0, inner=Takes(now, 4.0)), twice=Takes(now, 0.5, 2, x=Takes(now, 0.25)))
    networks = {"one": one, "two": Takes(now, 1.0, a=Takes(now, 3.0))}
    samples = inside(networks, ["", "a", "a.inner", "twice.x", "nowhere"], torch.ones(1), rounds=3)
    assert samples.seconds == {
        "one ": [8.0] * 3, "one a": [6.0] * 3, "one a.inner": [4.0] * 3, "two ": [4.0] * 3, "two a": [3.0] * 3,
    }, "neither what a network has not, nor what it calls twice"  # fmt: skip
    assert samples.ratio("two a", "one a") == 0.5
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in one.modules())
