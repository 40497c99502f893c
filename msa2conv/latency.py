"""Milliseconds as a budget: plans are solved on measured times, and corrected by the time that they really take."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .errors import InfeasibleBudget, InvalidArgument, InvalidTarget
from .options import Option
from .planning import Choice, choose_at, in_every_width, network_of
from .report.inspection import Inspection
from .report.latency import CLOSE, Latency
from .search.calibration import Calibration
from .search.measure import NEGLIGIBLE, OutputFn
from .search.solve import too_slow
from .search.timetable import SiteTimes, Timetable, described
from .search.timing import measure_times
from .settings import least
from .stopwatch import Samples, inside, interleaved
from .workbench import hookless_copy, usable_device

CORRECTIONS = 3
_ABOVE = 0.02  # of the target; it is a budget, so that less of what lies above it is let pass than of what lies below
_MORE, _MUCH = 0.03, 0.8  # so much more time is worth a look if it leaves at most so much of the distance
_ROUNDS, _GLANCE = 15, 7  # for a budget of time, and for a report
_TEXT = re.compile(r"\s*([0-9]*\.?[0-9]+)\s*(%|s|ms|us|µs)\s*", re.IGNORECASE)
_UNITS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "\u00b5s": 1e-6, "\u03bcs": 1e-6}  # the sign micro, and the letter mu
_ACCEPTED = "a fraction in (0, 1) of the original's time, or text such as '70%', '4ms' or '800us'"


def parse_latency(target: float | str, original: float | None = None) -> float:
    """`latency_target` -> seconds.

    Args:
        target: 0.7, "70%", "4ms", "800us" or "0.01s".
        original: seconds of the original; without them fractions are only checked, and 0 is returned.

    Raises:
        InvalidTarget: anything else, or not less than the original takes.

    Example:
        >>> parse_latency("50%", 0.010)
        0.005
    """
    value, fraction = _read(target)
    if original is None:
        return 0.0
    seconds = value * original if fraction else value
    if seconds >= original:
        raise InvalidTarget(
            "latency_target", f"{target!r}", f"less than the original's {1e3 * original:.4g} ms on this device",
            f"Ask for less, for example '{0.7e3 * original:.2g}ms' or 0.7.",
        )  # fmt: skip
    return seconds


def _read(target: float | str) -> tuple[float, bool]:
    """(number, whether it is a fraction of the original's time; else it is seconds)."""
    hint = "Write for example 0.7, '70%' or '4ms'."
    if isinstance(target, str):
        match = _TEXT.fullmatch(target)
        if match is None:
            raise InvalidTarget("latency_target", repr(target), _ACCEPTED, hint)
        fraction = match[2] == "%"
        value = float(match[1]) * (0.01 if fraction else _UNITS[match[2].lower()])
    elif isinstance(target, (int, float)) and not isinstance(target, bool):
        fraction, value = True, float(target)
        if value > 1:
            raise InvalidTarget("latency_target", repr(target), _ACCEPTED, f"Did you mean '{target:g}ms'?")
    else:
        raise InvalidTarget("latency_target", type(target).__name__, _ACCEPTED, hint)
    if not value > 0 or (fraction and value >= 1):
        raise InvalidTarget("latency_target", repr(target), _ACCEPTED, hint)
    return value, fraction


class Stopwatch:
    """Times the original and hybrids of it where they will run.

    Args:
        original: the user's model; copied.
        example: one image [1, C, H, W].
        device: where; None: where the model is.
        batch_size: images in a batch.
        progress: show bars.

    Raises:
        InvalidArgument: no such device, or no such batch size.
    """

    def __init__(
        self, original: nn.Module, example: Tensor, device: str | torch.device | None, batch_size: int, progress: bool
    ) -> None:
        if not isinstance(batch_size, int) or batch_size < 1:
            raise InvalidArgument("batch_size", repr(batch_size), "an integer >= 1", "Time what you will run.")
        first = next(original.parameters())
        self.device = first.device if device is None else usable_device(device)
        self.original = self.network = self.ready(hookless_copy(original))
        self.inputs = example.to(self.device, first.dtype).expand(batch_size, *example.shape[1:]).contiguous()
        self.progress = progress

    def at(self, width: Option | None) -> Stopwatch:
        """The same, where sites choose in a narrower network."""
        other = copy.copy(self)
        if width is not None:
            other.network = self.ready(network_of(self.original, width))
        return other

    def ready(self, model: nn.Module) -> nn.Module:
        return model.to(self.device).eval().requires_grad_(False)

    def beside(self, hybrid: nn.Module, rounds: int = _ROUNDS) -> Samples:
        """Of "original" and "hybrid", in turn."""
        models = {"original": self.original, "hybrid": self.ready(hybrid)}
        calls = {name: partial(model, self.inputs) for name, model in models.items()}
        return interleaved(calls, self.device, rounds, what="time", progress=self.progress)

    def shares(self, hybrid: nn.Module, paths: Sequence[str]) -> dict[str, float]:
        """What modules of a hybrid, and all of it (""), take where they stand, over those of the network in which sites
        choose; none on a GPU, which does not tell."""
        if self.device.type != "cpu":
            return {}
        networks = {"original": self.network, "hybrid": self.ready(hybrid)}
        every = ("", *paths)
        samples = inside(networks, every, self.inputs, _ROUNDS, progress=self.progress)
        pairs = {path: (f"hybrid {path}", f"original {path}") for path in every}
        return {path: samples.ratio(*pair) for path, pair in pairs.items() if samples.seconds.keys() >= set(pair)}

    def compare(self, hybrid: nn.Module) -> Latency:
        """What a hybrid, which is not touched, takes beside the original."""
        return self.report(self.beside(hookless_copy(hybrid), _GLANCE))

    def report(self, samples: Samples) -> Latency:
        """What `beside` found."""
        return Latency(
            before=samples.timing("original"),
            after=samples.timing("hybrid"),
            ratio=samples.ratio("hybrid", "original"),
            batch_size=len(self.inputs),
            device=described(self.device),
            dtype=str(self.inputs.dtype).removeprefix("torch."),
        )

    def check(self, target: float | str, seen: Inspection) -> None:
        """Refuse, before any calibration, what no lever could reach: less than all that is outside the sites takes.

        Raises:
            InvalidTarget, InfeasibleBudget.
        """
        options: dict[str, Any] = {site.path: () for site in seen.claims.sites}
        table = Timetable(device=described(self.device))
        times = measure_times(
            self.original, seen.claims, options, (), self.inputs, table=table, rounds=5, progress=self.progress
        )
        seconds, floor = parse_latency(target, times.base), times.base - sum(times.hosts.values())
        if seconds < 0.9 * floor:  # measured, so within the noise it may be possible
            raise too_slow(seconds, floor)

    def times(self, seen: Inspection, calibration: Calibration, cache: str | os.PathLike[str] | None) -> SiteTimes:
        """Of every option of a calibration of the network; `cache` is a file that keeps them for further runs."""
        times = measure_times(
            self.network,
            seen.claims,
            calibration.options(),
            calibration.settings(),
            self.inputs,
            table=Timetable.of(self.device, cache),
            progress=self.progress,
        )
        if cache is not None and times.table is not None:
            times.table.save(cache)
        return times


def choose_in_time(
    work: nn.Module,
    seen: Inspection,
    calibration: Calibration,
    flops: int,
    target: float | str,
    watch: Stopwatch,
    build: Callable[[Choice], nn.Module],
    *,
    timetable: str | os.PathLike[str] | None = None,
    output_fn: OutputFn | None = None,
) -> tuple[Choice, Latency]:
    """`choose` under a budget of time: in the model as it is and in every narrower one that was calibrated, what comes
    closest to the original of those that keep it.

    Args:
        work, seen: the original, float32, eval, and its inspection.
        calibration: of it.
        flops: multiply-adds allowed.
        target: as `parse_latency` takes it.
        watch: on the device.
        build: a choice as a network of the original's dtype.
        timetable: a file that keeps measured times.
        output_fn: the one that calibrated.

    Raises:
        InfeasibleBudget: the target lies below the floor of the calibration's options.
    """
    whole: float | None = None

    def find(width: Option | None, own: Calibration) -> tuple[Choice, Latency]:
        nonlocal whole
        inside_it = watch.at(width)
        times = inside_it.times(seen, own, timetable)
        whole = times.base if whole is None else whole
        choice, latency = choose_within(
            network_of(work, width), own, flops, target, inside_it, times, lambda choice: build(choice.at(width)),
            whole=whole, output_fn=output_fn,
        )  # fmt: skip
        return choice.at(width), latency

    found = in_every_width(calibration, find)
    return min(found, key=_preference)


def choose_within(
    work: nn.Module,
    calibration: Calibration,
    flops: int,
    target: float | str,
    watch: Stopwatch,
    times: SiteTimes,
    build: Callable[[Choice], nn.Module],
    *,
    whole: float,
    output_fn: OutputFn | None = None,
) -> tuple[Choice, Latency]:
    """Solve for the time allowed, measure the network, and solve again for what its error says, at most three times.

    Modules timed by themselves are a little faster or slower than in the network, and some kinds more than others. What
    the modules take in the network corrects the times of their kinds, and what is left of the error the time that the
    solver may give out. Where a network keeps the budget, corrections that are left ask for what is predicted to take a
    little more, if that is much closer to the original: it may be measured to keep the budget, too.

    Args:
        work: the original or a narrower network, float32, eval.
        calibration: of this one; narrower ones are left out.
        flops: multiply-adds allowed.
        target: as `parse_latency` takes it.
        watch, times: on the device.
        build: a choice as a network of the original's dtype.
        whole: seconds of the original.
        output_fn: the one that calibrated.

    Raises:
        InfeasibleBudget: the target lies below the floor of the calibration's options.
    """
    sites, allowed, (value, fraction) = list(calibration.options()), parse_latency(target, whole), _read(target)
    tried: list[tuple[Choice, Latency]] = []
    while True:
        limit = times.limit(sites, allowed)
        try:
            choice = choose_at(work, calibration, flops, limit=limit, progress=watch.progress, output_fn=output_fn)
        except InfeasibleBudget:
            if not tried:
                raise
            break  # by what is known now, and both budgets together
        if any(_same(choice, other) for other, _ in tried):
            break
        kept = [other.distance for other, latency in tried if _missed(latency) <= 1]
        if kept and choice.distance > _MUCH * min(kept):
            break
        hybrid = build(choice)
        found, predicted = watch.report(watch.beside(hybrid)), times.total(choice.choices)
        ratio, before = found.ratio, found.before.seconds
        wanted = value if fraction else value / before
        known = {
            "target": wanted * before,
            "predicted": predicted / whole,
            "attempts": [*(earlier.ratio for _, earlier in tried), ratio],
        }
        latency = found.model_copy(update=known)
        tried.append((choice, latency))
        unlimited = latency.off < 0 and predicted < (1 - CLOSE) * allowed  # what is left would not be used
        close = _missed(latency) <= 1
        if unlimited or (kept and not close) or len(tried) > CORRECTIONS:
            break
        if close:  # predictions err by as much: is there something much closer to the original right behind?
            allowed = max((1 + _MORE) * allowed, (1 + _ABOVE / 2) * wanted / ratio * predicted)
            if choice.distance <= NEGLIGIBLE or allowed >= whole:
                break
            continue
        times = times.seen(choice.choices, watch.shares(hybrid, sites))
        measured = [(times.total(each.choices) / whole, latency.ratio) for each, latency in tried]
        floor = least(calibration.settings(), calibration.options(), times.limit(sites, allowed))
        allowed = max(whole * _corrected(measured, wanted), 1.001 * floor)
    choice, best = min(tried, key=_preference)
    return choice, best.model_copy(update={"attempts": tried[-1][1].attempts})


def _same(one: Choice, other: Choice) -> bool:
    names = [{path: option.name for path, option in choice.choices.items()} for choice in (one, other)]
    return names[0] == names[1]


def _preference(found: tuple[Choice, Latency]) -> tuple[float, float]:
    """What keeps the budget, and of that what is closest to the original, comes first."""
    return max(1.0, _missed(found[1])), found[0].distance


def _missed(latency: Latency) -> float:
    """How far a network is from what was asked for; up to 1 it is close."""
    return max(latency.off / _ABOVE, -latency.off / CLOSE)


def _corrected(measured: Sequence[tuple[float, float]], wanted: float) -> float:
    """The share of the original's time to allow next.

    Args:
        measured: (share predicted by what is known now, share measured) of every attempt.
        wanted: the share that is to be measured.
    """
    slower = [pair for pair in measured if pair[1] > wanted]
    faster = [pair for pair in measured if pair[1] <= wanted]
    if slower and faster:  # between the nearest two, but not right beside either
        (most, high), (least, low) = min(slower), max(faster)
        return least + min(0.8, max(0.2, (wanted - low) / (high - low))) * (most - least)
    allowed, found = measured[-1]
    slope = 1.0
    if len(measured) > 1 and allowed != measured[-2][0]:
        slope = min(2.0, max(0.5, (found - measured[-2][1]) / (allowed - measured[-2][0])))
    return allowed + (wanted - found) / slope


__all__ = ["Stopwatch", "choose_in_time", "choose_within", "parse_latency"]
