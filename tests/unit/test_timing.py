"""What options take in time: sums over modules are what a network takes, on a clock that counts operators."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from clock import Clock, seconds, use
from models import images, swin, vit
from sampled import sampled
from torch import nn

import msa2conv
from msa2conv import Calibration, Option
from msa2conv.errors import InvalidCheckpoint
from msa2conv.search import timing
from msa2conv.search.timetable import MERGING, SiteTimes, Timetable, steps
from msa2conv.search.timing import measure_times
from msa2conv.settings import inside
from msa2conv.stopwatch import Samples

DEVICE = torch.device("cpu")
WIDE = {"embed_dim": 96, "img_size": 64}  # modules that take longer than the operators around them


def timed(model: nn.Module, calibration: Calibration, batch: int = 2, table: Timetable | None = None) -> SiteTimes:
    size = msa2conv.inspect(model).input_size
    return measure_times(
        model,
        msa2conv.inspect(model).claims,
        calibration.options(),
        calibration.settings(),
        torch.randn(batch, *size),
        table=table or Timetable(device="a clock"),
        progress=False,
    )


def network(model: nn.Module, choices: dict[str, Option]) -> nn.Module:
    plan, tensors = msa2conv.make_plan(model, msa2conv.inspect(model), choices)
    return msa2conv.apply(plan, model, tensors)


@pytest.mark.parametrize("name", sampled(["vit", "swin"], 1))
def test_a_network_takes_what_its_modules_take(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, Clock())
    model = vit(**WIDE) if name == "vit" else swin()
    size = msa2conv.inspect(model).input_size
    calibration = msa2conv.calibrate(model, images(16, size[-1]), levers="all", progress=False)
    times, chance = timed(model, calibration), random.Random(0)
    inputs = torch.randn(2, *size)
    assert times.base == pytest.approx(seconds(lambda: model(inputs)))
    for setting in chance.sample(calibration.settings(), min(6, len(calibration.settings()))):
        choices = {path: chance.choice(options) for path, options in inside(setting, calibration.options()).items()}
        expected = times.base + sum(times.of(option) - times.hosts[path] for path, option in choices.items())
        expected += times.of_setting(setting)
        if setting.option is not None:
            merged = setting.option()
            choices[merged.site] = merged
        assert times.total(choices) == pytest.approx(expected)
        hybrid = network(model, choices)
        assert times.total(choices) == pytest.approx(seconds(lambda hybrid=hybrid: hybrid(inputs)), rel=0.02)


def test_residual_lines_on_fewer_tokens_take_no_less_than_their_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here, where each takes as long to start as to run on hundreds of tokens, fewer of these save hardly anything."""
    use(monkeypatch, Clock())
    model = vit(depth=3)
    calibration = msa2conv.calibrate(model, images(), levers="merge_tokens", progress=False)
    times = timed(model, calibration)
    every = max(times.lines)
    assert every == 17 and times.lines[every] == 1.0
    shares = [times.lines[count] for count in sorted(times.lines)]
    assert shares == sorted(shares) and min(shares) > 0.85
    setting = max(calibration.settings(), key=lambda setting: len(setting.tokens))
    merges = sum(times.drops[pair] for pair in steps(setting.option()))  # type: ignore[misc]
    saved = sum(times.beside[path] * (1 - times.lines[count]) for path, count in setting.tokens.items())
    assert 0 < saved < 0.15 * sum(times.beside.values()) and times.of_setting(setting) == pytest.approx(merges - saved)


def test_modules_on_fewer_tokens_have_a_correction_of_their_own() -> None:
    host = Option("a", "attention", 10, flops_on=lambda tokens: tokens)
    fewer = host.on(5)
    assert fewer is not None
    options = {("a", "attention", None): 4.0, ("a", "attention", 5): 1.0}
    times = SiteTimes(10.0, {"a": 4.0}, options, {("a", "attention"): ""})
    seen = times.seen({"a": fewer}, {"a": 0.5})
    assert seen.of(fewer) == 2.0 and seen.of(host) == 4.0
    merging = replace(times, slower={MERGING: 8.0})
    assert merging.of(fewer) == 1.0, "what merging takes says nothing of modules"


def test_alike_sites_share_times_and_a_few_widths_stand_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    model = vit(depth=4)
    calibration = msa2conv.calibrate(model, images(), levers="ffn", progress=False)
    clock = use(monkeypatch, Clock())
    times = timed(model, calibration)
    options = calibration.options()
    widths = options["blocks.0.mlp"]
    assert len(widths) > 7
    modules = [name for name in clock.timed if name.startswith("[")]
    assert len([name for name in modules if "slice" in name]) == 5, "of all widths in all blocks"
    for index in range(4):
        found = [times.of(option) for option in options[f"blocks.{index}.mlp"]]
        assert found == [times.of(option) for option in widths]
    in_order = sorted(widths, key=lambda option: option.flops)
    assert [times.of(option) for option in in_order] == sorted(times.of(option) for option in widths)


def test_a_module_is_timed_behind_the_nearest_of_another_geometry() -> None:
    model, inputs = vit(depth=3), images(1)
    sites = {site.path: site for site in msa2conv.inspect(model).claims.sites}
    caught = timing._catch(model, ["", *sites], inputs)
    ahead = {path: timing._in_front(model, sites, caught, path) for path in sites}
    found = {path: None if ready is None else ready.args[1] for path, ready in ahead.items()}  # type: ignore[attr-defined]
    assert found["blocks.1.attn"] == "blocks.0.mlp" and found["blocks.1.mlp"] == "blocks.1.attn"
    assert found["blocks.0.attn"] == "blocks.0.mlp", "nothing stands before the first: the nearest behind it"
    attentions = {path: site for path, site in sites.items() if path.endswith("attn")}
    assert timing._in_front(model, attentions, caught, "blocks.1.attn") is None


@pytest.mark.parametrize(("seconds_of_it", "rounds"), [(1e-3, 40), (0.025, 20), (1.0, 9)])
def test_modules_of_quick_networks_are_sampled_more_often(
    seconds_of_it: float, rounds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = list[int]()

    class Counting(Clock):
        def __call__(self, calls: Any, device: Any, rounds: int, **also: Any) -> Samples:  # type: ignore[override]
            asked.append(rounds)
            samples = super().__call__(calls)
            return Samples({"": [seconds_of_it]}) if list(calls) == [""] else samples

        def inside(self, networks: Any, paths: Any, inputs: Any, rounds: int, **also: Any) -> Samples:  # type: ignore[override]
            asked.append(rounds)
            return super().inside(networks, paths, inputs)

    use(monkeypatch, Counting())
    model = vit()
    timed(model, msa2conv.calibrate(model, images(16), levers=("mixer", "ffn"), progress=False))
    assert asked[0] == 9 and set(asked[1:]) == {rounds}


def test_what_was_timed_once_is_not_timed_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model, path = vit(), tmp_path / "times.json"
    calibration = msa2conv.calibrate(model, images(), levers=("mixer", "merge_tokens"), progress=False)
    clock = use(monkeypatch, Clock())
    first = timed(model, calibration)
    assert first.table is not None
    first.table.model_copy(update={"device": Timetable.of(DEVICE).device}).save(path)
    clock.timed.clear()
    second = timed(vit(), calibration, table=Timetable.of(DEVICE, path))
    assert clock.timed == [""], "only how fast the machine is now"
    assert (second.hosts, second.options, second.drops) == (first.hosts, first.options, first.drops)
    timed(vit(), calibration, batch=3, table=Timetable.of(DEVICE, path))
    assert len(clock.timed) > 10, "another batch is another time"


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.once, self.again = nn.Linear(64, 64), nn.Linear(64, 64, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.again(self.again(self.once(x)))


def test_what_a_network_calls_twice_is_timed_by_itself() -> None:
    model = Twice().eval()
    inputs = torch.randn(64, 64)
    caught = timing._catch(model, ["", "once", "again"], inputs)
    bench = timing._Bench(Timetable(device="here"), DEVICE, 3, False, [])
    shares = bench.shares(model, caught, inputs)
    assert shares.keys() == {each.key for each in caught.values()}
    assert all(0 < share < 10 for share in shares.values())
    assert shares == bench.shares(model, caught, inputs), "kept"


def test_kinds_that_are_slower_in_a_network_are_slower_from_then_on() -> None:
    names = ("as it is", "thin", "thinner", "other")
    times = SiteTimes(
        10.0, {"a": 2.0, "b": 2.0},
        {(site, name, None): seconds for site in "ab" for name, seconds in zip(names, (2, 1.5, 1, 0.5), strict=True)},
        {(site, name): kind for site in "ab" for name, kind in zip(names, ("", "thin", "thin", "other"), strict=True)},
    )  # fmt: skip
    thin, thinner, other, host = (Option("a", name, 0) for name in ("thin", "thinner", "other", "as it is"))
    seen = times.seen({"a": thin, "b": Option("b", "thinner", 0)}, {"a": 0.9, "b": 0.6})  # 1.8 and 1.2 of 2
    assert (seen.of(host), seen.of(thin), seen.of(thinner)) == pytest.approx((2.0, 1.8, 1.2))
    assert seen.of(other) == pytest.approx(0.6), "what no network has shown is as much slower as others"
    assert seen.total({"a": thin, "b": Option("b", "other", 0)}) == pytest.approx(10 - 4 + 1.8 + 0.6)
    quicker = times.seen({"a": thin}, {"a": 0.6})
    assert (quicker.of(thin), quicker.of(other)) == pytest.approx((1.2, 0.5)), "but never quicker"
    both = quicker.seen({"a": other}, {"a": 0.5})
    assert (both.of(thin), both.of(other)) == pytest.approx((1.2, 1.0)), "what was seen is kept"
    assert times.of(thin) == 1.5 and times.seen({"a": host}, {"a": 0.5}).of(thin) == 1.5


def test_times_of_another_device_are_not_used_and_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "times.json"
    Timetable(device="another", entries={"x": 1.0}).save(path)
    assert Timetable.of(DEVICE, path).entries == {}
    assert Timetable.of(DEVICE, tmp_path / "none.json").entries == {}
    path.write_text("[1, 2]")
    with pytest.raises(InvalidCheckpoint) as caught:
        Timetable.of(DEVICE, path)
    assert str(caught.value) == (
        f"{path}: found a file that is no timetable; expected what an earlier run wrote there. "
        "Delete it, or name another file."
    )
