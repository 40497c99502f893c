"""Milliseconds as a budget, on a clock that counts operators: kept, corrected, reported, refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from clock import Clock, seconds, use
from models import files, images, snapshot, vit
from sampled import sampled

import msa2conv
from msa2conv import FFN, Calibration, Conversion, calibrate, convert, latency as latency_module
from msa2conv.errors import InfeasibleBudget, InvalidArgument, InvalidTarget, Msa2ConvError
from msa2conv.latency import _corrected, parse_latency
from msa2conv.planning import choose_at
from msa2conv.report.conversion import Report

WIDE = {"embed_dim": 96, "img_size": 64, "depth": 3}
ACCEPTED = "a fraction in (0, 1) of the original's time, or text such as '70%', '4ms' or '800us'"
EXAMPLE = "Write for example 0.7, '70%' or '4ms'."


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    """Without mixers and merging in a site, since some are free here: then a target leaves something to choose."""
    levers = ("ffn", "thin_attention", "merge_tokens")
    return calibrate(vit(**WIDE), images(16, 64), levers=levers, progress=False)


def ratio(result: Conversion, batch: int = 1) -> float:
    """On the clock itself, from outside."""
    model, inputs = vit(**WIDE), torch.randn(batch, 3, 64, 64)
    return seconds(lambda: result.model(inputs)) / seconds(lambda: model(inputs))


@pytest.mark.parametrize(
    ("target", "batch"),
    sampled([(0.8, 1), ("60%", 4), ("60%", 1), (0.8, 4)], 2),
)
def test_the_target_is_met_and_little_of_it_is_left(
    target: Any, batch: int, calibration: Calibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, Clock())
    model = vit(**WIDE)
    before = snapshot(model)
    result = convert(model, latency_target=target, batch_size=batch, calibration=calibration, progress=False)
    assert snapshot(model) == before
    latency = result.report.latency
    assert latency is not None and len(latency.attempts) <= 4 and latency.batch_size == batch
    assert latency.ratio == pytest.approx(ratio(result, batch))
    assert -0.05 <= latency.off <= 0.02
    assert latency.ratio == pytest.approx((0.8 if target == 0.8 else 0.6) * (1 + latency.off))
    assert result.report.target is None and "budget used" not in result.report.laws


def test_time_and_flops_together(calibration: Calibration, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, Clock())
    result = convert(vit(**WIDE), 0.7, latency_target=0.9, calibration=calibration, progress=False)
    assert result.plan.flops <= 0.7 * result.plan.base.flops
    assert ratio(result) <= 0.9 * 1.05
    assert result.report.target == int(0.7 * result.plan.base.flops)


def test_absolute_targets(calibration: Calibration, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, Clock())
    model, inputs = vit(**WIDE), torch.randn(1, 3, 64, 64)
    whole = seconds(lambda: model(inputs))
    result = convert(vit(**WIDE), latency_target=f"{700 * whole}ms", calibration=calibration, progress=False)
    assert ratio(result) == pytest.approx(0.7, rel=0.05)


def test_an_original_that_speeds_up_meanwhile_is_no_error(
    calibration: Calibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A busy machine that becomes free: the milliseconds asked for are then more than the original takes."""
    model, inputs = vit(**WIDE), torch.randn(1, 3, 64, 64)
    whole = seconds(lambda: model(inputs))
    use(monkeypatch, Clock({"original": 0.5, "hybrid": 0.5}))
    result = convert(model, latency_target=f"{900 * whole}ms", calibration=calibration, progress=False)
    assert result.report.latency is not None and result.report.latency.off < 0


@pytest.mark.parametrize("slower", sampled([1.04, 0.9, 1.15], 2))
def test_a_network_that_is_slower_or_faster_than_its_modules_is_corrected(
    slower: float, calibration: Calibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, Clock({"hybrid": slower}))
    result = convert(vit(**WIDE), latency_target=0.75, calibration=calibration, progress=False)
    latency = result.report.latency
    assert latency is not None and 2 <= len(latency.attempts) <= 4
    assert latency.ratio == pytest.approx(slower * ratio(result)) == pytest.approx(0.75, rel=0.05)
    assert not -0.05 <= latency.attempts[0] / 0.75 - 1 <= 0.02 and -0.05 <= latency.off <= 0.02


def test_one_kind_that_is_slower_in_the_network_is_corrected_and_not_the_others(
    calibration: Calibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, Clock(in_networks={"AttendMixer": 1.6}))
    model = vit(**WIDE)
    own = replace(calibration, stream=None)
    result = convert(model, latency_target=0.7, calibration=own, progress=False)
    latency = result.report.latency
    assert latency is not None and latency.predicted is not None
    assert len(latency.attempts) == 2 and latency.attempts[0] > 0.72, "one look at the network says it all"
    assert latency.ratio == pytest.approx(latency.predicted, rel=0.01) == pytest.approx(0.7, rel=0.05)


def test_merging_that_takes_longer_in_the_network_is_corrected(
    calibration: Calibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is left when the modules are taken off the network is on its account, and a plan without it is not."""
    use(monkeypatch, Clock(in_networks={"MergedStream": 1.2}))
    own = replace(calibration, records=[])
    result = convert(vit(**WIDE), latency_target=0.7, calibration=own, progress=False)
    latency = result.report.latency
    assert latency is not None and latency.predicted is not None and "blocks" in result.plan.choices
    assert len(latency.attempts) == 2, "one look at the network says it all"
    assert latency.ratio == pytest.approx(latency.predicted, rel=0.02)


def test_what_no_correction_reaches_is_said(calibration: Calibration, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, Clock({"hybrid": 12.0}, spread=0.4))
    own = replace(calibration, stream=None)
    result = convert(vit(**WIDE), latency_target=0.75, calibration=own, progress=False)
    latency = result.report.latency
    assert latency is not None and len(latency.attempts) == 2, "the second is the fastest that there is"
    busy, missed = latency.warnings
    assert {busy, missed} <= set(result.report.warnings)
    assert busy.startswith("the machine was busy: half of the times spread over 80% of the median; measure again ")
    more = latency.ratio / 0.75 - 1
    assert missed == f"the hybrid takes {more:.0%} more time than asked for, after 1 correction"


def test_two_looks_that_differ_by_noise_move_the_next_by_twice_what_is_left_at_most() -> None:
    assert _corrected([(0.6, 0.617), (0.58, 0.618)], 0.6) == pytest.approx(0.58 - 2 * 0.018)


def test_the_same_plan_again_ends_the_corrections(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a few widths no correction can use what is left; what was timed is not timed again."""
    clock = use(monkeypatch, Clock({"hybrid": 0.9}))
    coarse = calibrate(vit(**WIDE), images(16, 64), levers=FFN(round_to=192, min_keep=0.5), progress=False)
    result = convert(vit(**WIDE), latency_target=0.95, calibration=coarse, progress=False)
    latency = result.report.latency
    assert latency is not None and latency.off < -0.05, "still not close, so that it would go on"
    assert clock.timed.count("hybrid") == len(set(latency.attempts)) == len(latency.attempts) == 2


def test_a_correction_that_both_budgets_forbid_ends_them(
    calibration: Calibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, Clock({"hybrid": 1.2}))
    asked: list[float] = []

    def once(*args: Any, **given: Any) -> Any:
        asked.append(given["limit"].most)
        if len(asked) > 1:
            raise InfeasibleBudget("latency_target", "what is left", "more", "Allow more.")
        return choose_at(*args, **given)

    monkeypatch.setattr(latency_module, "choose_at", once)
    result = convert(vit(**WIDE), 0.8, latency_target=0.8, calibration=calibration, progress=False)
    latency = result.report.latency
    assert latency is not None and len(latency.attempts) == 1 and asked[1] < asked[0]
    assert "after 0 corrections" in latency.warnings[-1]


@pytest.mark.parametrize(
    ("target", "factor", "distances", "attempts", "taken"),
    [
        (0.75, 0.988, [1.0, 0.5, 0.45], 2, 1),  # a little more keeps the budget, and is much closer
        (0.75, 0.96, [1.0, 0.5, 0.45], 2, 1),  # as much more as was left of the budget
        (0.75, 0.97, [1.0, 0.9], 1, 0),  # it is not much closer
        (0.75, 1.01, [1.0, 0.5], 2, 0),  # it takes more, as predicted
        (0.75, 0.97, [1e-4, 1e-6], 1, 0),  # nobody would see a difference
        (0.99, 1.0, [1.0, 0.0], 1, 0),  # that would be the original itself
    ],
)
def test_what_is_much_closer_and_hardly_slower_is_looked_at(
    target: float,
    factor: float,
    distances: list[float],
    attempts: int,
    taken: int,
    calibration: Calibration,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    use(monkeypatch, Clock({"hybrid": factor}))
    asked: list[float] = []
    chosen: list[Any] = []

    def told(*args: Any, **given: Any) -> Any:
        choice = choose_at(*args, **given)
        distance = distances[len(asked)]
        asked.append(given["limit"].most)
        chosen.append({path: option.name for path, option in choice.choices.items()})
        return replace(choice, distances={choice.price: distance})

    monkeypatch.setattr(latency_module, "choose_at", told)
    own = replace(calibration, stream=None)
    result = convert(vit(**WIDE), latency_target=target, calibration=own, progress=False)
    latency = result.report.latency
    assert latency is not None and len(latency.attempts) == attempts
    more = max(1.03, 1.01 * target / latency.attempts[0])
    assert asked[1:2] in ([], [pytest.approx(more * asked[0], rel=0.01)])
    assert result.plan.choices == chosen[taken] and latency.ratio == latency.attempts[taken] <= target * 1.02
    tried = f" (tried: {latency.attempts[0]:.1%}, {latency.attempts[1]:.1%})" if attempts == 2 else ""
    assert f"of the original's time, measured {latency.ratio:.1%}{tried}\n" in str(latency)


def test_what_is_free_is_taken_though_it_leaves_time_unused(monkeypatch: pytest.MonkeyPatch) -> None:
    """An option that costs nothing in accuracy: no correction could make use of the time that is left."""
    use(monkeypatch, Clock())
    free = calibrate(vit(**WIDE), images(16, 64), levers="mixer", progress=False)
    result = convert(vit(**WIDE), latency_target=0.97, calibration=free, progress=False)
    latency = result.report.latency
    assert latency is not None and latency.off < -0.05 and len(latency.attempts) == 1 and latency.warnings == []


@pytest.mark.parametrize(("clock", "told"), [(Clock({"hybrid": 1.5}), True), (Clock(), False)])
def test_who_asked_for_flops_is_told_when_time_lags_behind(
    clock: Clock, told: bool, calibration: Calibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, clock)
    result = convert(vit(**WIDE), 0.5, calibration=calibration, progress=False, batch_size=2)
    latency, kept = result.report.latency, result.plan.flops / result.plan.base.flops
    assert latency is not None and latency.target is None and latency.batch_size == 2
    text = (
        f"2 images at a time, the hybrid takes {latency.ratio:.2f} of the original's time here at {kept:.2f} of its "
        "FLOPs; where time counts, ask for time: latency_target=0.7"
    )
    assert (text in result.report.warnings) is told


def test_where_time_was_asked_for_nobody_is_told_to_ask_for_it(
    calibration: Calibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, Clock({"hybrid": 1.5}))
    result = convert(vit(**WIDE), 0.5, latency_target=0.9, calibration=calibration, progress=False)
    assert not any("ask for time" in text for text in result.report.warnings)


def test_it_is_printed_and_saved(calibration: Calibration, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use(monkeypatch, Clock())
    times = tmp_path / "times.json"
    result = convert(
        vit(**WIDE), latency_target=0.75, calibration=calibration, timetable=times, progress=False, device="cpu"
    )
    text = str(result)
    assert "ms, batch 1, float32" in text and "timed on cpu (" in text and "% of the original's time" in text
    assert times.is_file()
    result.save(tmp_path / "out")
    again = Report.model_validate_json((tmp_path / "out" / "report.json").read_text())
    assert again.latency == result.report.latency


def test_seconds_are_read_in_many_forms() -> None:
    assert parse_latency("4ms", 1.0) == pytest.approx(0.004)
    assert parse_latency(" 800 us ", 1.0) == parse_latency("800\u00b5s", 1.0) == pytest.approx(0.0008)
    assert parse_latency("800\u03bcs", 1.0) == pytest.approx(0.0008)
    assert parse_latency("0.01s", 1.0) == pytest.approx(0.01)
    assert [parse_latency(target, 2.0) for target in ("70%", 0.7)] == pytest.approx([1.4, 1.4])


REFUSED: list[tuple[dict[str, Any], type[Msa2ConvError], str]] = [
    (
        {},
        InvalidTarget,
        "flops_target: found None; expected a budget: flops_target, latency_target or both. Write for example 0.7.",
    ),
    *(
        ({"latency_target": target}, InvalidTarget, f"latency_target: found {found}; expected {ACCEPTED}. {hint}")
        for target, found, hint in [
            ("fast", "'fast'", EXAMPLE),
            ("4", "'4'", EXAMPLE),
            (4, "4", "Did you mean '4ms'?"),
            (1, "1", EXAMPLE),
            (0, "0", EXAMPLE),
            ("100%", "'100%'", EXAMPLE),
            (None.__class__, "type", EXAMPLE),
        ]
    ),
    (
        {"latency_target": "1s"},
        InvalidTarget,
        "latency_target: found '1s'; expected less than the original's {whole:.4g} ms on this device. "
        "Ask for less, for example '{less:.2g}ms' or 0.7.",
    ),
    (
        {"latency_target": 0.7, "batch_size": 0},
        InvalidArgument,
        "batch_size: found 0; expected an integer >= 1. Time what you will run.",
    ),
    (
        {"latency_target": 0.7, "search": "gates", "data": [(images(4, 64), torch.zeros(4, dtype=torch.long))]},
        InvalidArgument,
        "latency_target: found a gate search; expected a calibrated search. Gates learn under a budget of FLOPs.",
    ),
]


@pytest.mark.parametrize(("given", "kind", "text"), REFUSED, ids=[str(i) for i in range(len(REFUSED))])
def test_bad_targets_are_refused_before_any_work(
    given: dict[str, Any], kind: type[Msa2ConvError], text: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    use(monkeypatch, Clock())
    _never_calibrate(monkeypatch)
    model, inputs = vit(**WIDE), torch.randn(1, 3, 64, 64)
    whole = 1e3 * seconds(lambda: model(inputs))
    before = snapshot(model), files(tmp_path)
    with pytest.raises(Msa2ConvError) as caught:
        convert(model, **{"data": images(16, 64), **given})
    assert type(caught.value) is kind
    assert str(caught.value) == (text.format(whole=whole, less=0.7 * whole) if "{" in text else text)
    assert (snapshot(model), files(tmp_path)) == before


def _never_calibrate(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("calibrated before the target was checked")

    monkeypatch.setattr(msa2conv.api, "calibrate_sites", never)


@pytest.mark.parametrize("device", ["cuda:7", "abacus"])
def test_a_device_that_is_not_there(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _never_calibrate(monkeypatch)
    with pytest.raises(InvalidArgument) as caught:
        convert(vit(**WIDE), latency_target=0.7, device=device)
    text = str(caught.value)
    assert text.startswith(f"device: found '{device}' (")
    assert text.endswith("); expected a device of this machine. Write for example 'cpu' or 'cuda'.")


@pytest.mark.parametrize("known", [False, True])
def test_a_target_below_the_floor_names_the_floor(known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, Clock())
    narrow = calibrate(vit(**WIDE), images(16, 64), levers="ffn", progress=False)
    if not known:
        _never_calibrate(monkeypatch)
    given: dict[str, Any] = {"calibration": narrow} if known else {"data": images(16, 64)}
    with pytest.raises(InfeasibleBudget) as caught:
        convert(vit(**WIDE), latency_target=0.3 if known else 0.02, **given)
    text = str(caught.value)
    assert text.startswith("latency_target: found ") and " ms; expected at least " in text
    assert text.endswith(
        " ms, the floor of the allowed levers on this device. Allow more time or more levers (by default they "
        "are all that need no training)."
    )


def test_the_timetable_is_refused_where_it_cannot_be_written(
    calibration: Calibration, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    use(monkeypatch, Clock())
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="output path"):
        convert(vit(**WIDE), latency_target=0.7, calibration=calibration, timetable=tmp_path / "file" / "times.json")
