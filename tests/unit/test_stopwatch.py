"""Times of calls that take turns."""

from __future__ import annotations

import time

import pytest
import torch

from msa2conv import stopwatch
from msa2conv.stopwatch import Samples, interleaved

CPU = torch.device("cpu")


def test_median_spread_and_ratio() -> None:
    samples = Samples({"a": [1.0, 2.0, 3.0, 4.0, 10.0], "b": [2.0, 4.0, 6.0, 8.0, 20.0]})
    assert samples.timing("a").seconds == 3.0
    assert samples.timing("a").spread == pytest.approx((7.0 - 1.5) / 3.0)
    assert samples.ratio("b", "a") == 2.0, "round by round: what slows both down cancels"
    assert Samples({"a": [2.0]}).timing("a").spread == 0.0


def test_calls_take_turns_and_quick_ones_are_repeated_within_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    now, called = [0.0], []

    def call(name: str, seconds: float) -> None:
        called.append(name)
        now[0] += seconds

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    calls = {"quick": lambda: call("quick", 0.0005), "slow": lambda: call("slow", 0.01)}
    samples = interleaved(calls, CPU, rounds=3)
    assert samples.seconds["quick"] == pytest.approx([0.0005] * 3)
    assert samples.seconds["slow"] == pytest.approx([0.01] * 3)
    warm, rest = called[: 2 * stopwatch.WARM_UP], called[2 * stopwatch.WARM_UP :]
    assert warm == ["quick", "slow"] * stopwatch.WARM_UP
    assert rest == (["quick"] * 4 + ["slow"]) * 3


def test_nothing_is_recorded_for_autograd() -> None:
    layer, seen = torch.nn.Linear(2, 2), []
    interleaved({"": lambda: seen.append(layer(torch.ones(1, 2)).requires_grad)}, CPU, rounds=1)
    assert not any(seen)
