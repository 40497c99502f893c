"""The trade-off in one call: many budgets for the price of one calibration, so that people choose by looking."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .adapters.base import Adapter
from .api import CALIBRATION_IMAGES, calibrate_inspected, choose, convert, make_plan, versions
from .conversion import Conversion
from .errors import InvalidArgument
from .files import atomic_write, check_writable, write_json, write_text
from .inspection import Levers, inspect_copy
from .levers import resolve_levers
from .plan import Plan
from .planning import tradeoff
from .progress import track
from .report.page import can_draw
from .search.calibration import Calibration
from .search.measure import OutputFn
from .search.solve import infeasible
from .targets import parse_target
from .workbench import example_input, own_randomness, unwrap, working_copy

TARGETS = (0.9, 0.8, 0.7, 0.6, 0.5)
_BAR = 24  # characters of the longest bar


@dataclass(frozen=True)
class Point:
    """One budget of a sweep.

    Args:
        target: multiply-adds allowed.
        plan: the plan that was chosen for it.
        distance: of its network to the original on held-out images.
        predicted: sum of single-site scores.
        agreement: share of held-out images on which both predict the same class; None without logits.
    """

    target: int
    plan: Plan
    distance: float
    predicted: float
    agreement: float | None


@dataclass(frozen=True)
class Sweep:
    """What `sweep` returns; `print` it for the table and the curve.

    Args:
        points: one for every target, the largest first.
        measure: "kl" (nats) or "relative".
        calibration: what all of them were chosen by; reuse it in `convert`.
        original: the model.
        options: arguments with which `build` calls `convert`.
    """

    points: tuple[Point, ...]
    measure: str
    calibration: Calibration = field(repr=False)
    original: nn.Module = field(repr=False)
    options: dict[str, Any] = field(default_factory=dict, repr=False)

    def build(self, target: float | str) -> Conversion:
        """The hybrid of one budget, one of the sweep's or any other: seconds, since all is measured."""
        return convert(self.original, target, calibration=self.calibration, **self.options)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write a folder, atomically file by file: `sweep.json` (figures, seed and versions), every plan, and with
        msa2conv[report] installed the curve, `sweep.png`.

        Raises:
            InvalidOutputPath: it cannot be written.
        """
        folder, rows = Path(path), []
        check_writable(folder / "sweep.json")
        for point, row in zip(self.points, self.rows(), strict=True):
            name = f"plan_{point.target / point.plan.base.flops:.4f}.json"
            write_text(folder / name, point.plan.model_dump_json(indent=2) + "\n")
            rows.append(row | {"plan": name})
        base = self.points[0].plan.base
        known: dict[str, Any] = {"name": base.name, "measure": self.measure, "images": self.calibration.source}
        known |= {"levers": self.calibration.levers, "seed": self.options.get("seed")}
        promised = tradeoff(self.calibration)
        curve = [promise.model_dump() for promise in promised]
        write_json(folder / "sweep.json", known | {"points": rows, "predicted": curve, "versions": versions()})
        if can_draw():
            from .report.plots import as_png, sweep_picture

            measured = [(point.plan.flops, point.distance) for point in self.points]
            with atomic_write(folder / "sweep.png") as temporary:
                temporary.write_bytes(as_png(sweep_picture(promised, measured, base.flops, self.measure)))
        return folder / "sweep.json"

    def rows(self) -> list[dict[str, Any]]:
        """The figures: multiply-adds at batch 1, parameters, distances."""
        return [
            {
                "target": point.target,
                "flops": point.plan.flops,
                "of the original": point.plan.flops / point.plan.base.flops,
                "parameters": point.plan.parameters,
                "distance": point.distance,
                "predicted": point.predicted,
                "agreement": point.agreement,
            }
            for point in self.points
        ]

    def __str__(self) -> str:
        base = self.points[0].plan.base
        unit = "KL (nats)" if self.measure == "kl" else "rel. error"
        worst = max(point.distance for point in self.points) or 1.0
        flops, parameters = base.flops / 1e9, base.parameters / 1e6
        lines = [
            f"{base.name}   {flops:.3f} GFLOPs (multiply-adds, batch 1)   {parameters:.2f} M params",
            f"{'FLOPs':>7}{'GFLOPs':>9}{'M params':>10}{'same class':>12}{unit:>12}",
        ]
        for point in self.points:
            plan, same = point.plan, "" if point.agreement is None else f"{point.agreement:.1%}"
            lines.append(
                f"{plan.flops / base.flops:>7.1%}{plan.flops / 1e9:>9.3f}{plan.parameters / 1e6:>10.2f}{same:>12}"
                f"{point.distance:>12.4f}  {'█' * round(_BAR * point.distance / worst)}"
            )
        held_out, source = len(self.calibration.images), self.calibration.source
        return "\n".join(
            [*lines, f"against the original on {held_out} held-out images ({source}), before any training"]
        )


@own_randomness()
def sweep(
    model: nn.Module,
    targets: Iterable[float | str] = TARGETS,
    *,
    data: Any = None,
    example_inputs: Tensor | None = None,
    levers: Levers | None = None,
    calibration: Calibration | None = None,
    adapters: Iterable[Adapter] | None = None,
    images: int = CALIBRATION_IMAGES,
    seed: int = 0,
    progress: bool = True,
    resume: str | os.PathLike[str] | None = None,
    output_fn: OutputFn | None = None,
) -> Sweep:
    """Plan many budgets of one model and say what each would cost in accuracy; one calibration serves all.

    Args:
        model: as for `convert`; not touched.
        targets: budgets, each as the `flops_target` of `convert`.
        data, example_inputs, levers, calibration, adapters, images: as for `convert`.
        seed, progress, resume, output_fn: as for `convert`.

    Returns:
        A Sweep: `print` it, `.save(folder)` it, `.build(0.7)` a hybrid out of it.

    Raises:
        InvalidArgument: no target.
        InvalidTarget, InfeasibleBudget: of any target, before any work.
        And what `convert` raises.

    Example:
        sweep = msa2conv.sweep(model, [0.9, 0.8, 0.7, 0.6, 0.5], data=images)
        print(sweep)
        result = sweep.build(0.7)
    """
    original, adapters = unwrap(model), None if adapters is None else tuple(adapters)
    wanted = [targets] if isinstance(targets, (str, int, float)) else list(targets)
    if not wanted:
        raise InvalidArgument("targets", "none", "at least one budget", "Write for example [0.9, 0.7, 0.5].")
    for target in wanted:
        parse_target(target)
    work = working_copy(original)
    chosen = resolve_levers(levers)
    seen = inspect_copy(work, original, example_input(work, example_inputs), chosen, adapters)
    budgets = sorted({parse_target(target, seen.costs.base) for target in wanted}, reverse=True)
    if calibration is None:
        if budgets[-1] < seen.floor:
            raise infeasible(budgets[-1], seen.floor)
        calibration, _ = calibrate_inspected(
            work, original, seen, data, images, chosen, seed, progress, resume, output_fn
        )
    else:
        calibration.check_model(original)
    points = []
    for budget in track(budgets, "plan", progress):
        choice = choose(work, calibration, budget, progress=False, output_fn=output_fn)
        plan, _ = make_plan(original, seen, choice.choices)
        points.append(Point(budget, plan, choice.distance, choice.predicted, choice.agreement))
    same = {"example_inputs": example_inputs, "adapters": adapters, "output_fn": output_fn, "progress": progress}
    return Sweep(tuple(points), calibration.measure, calibration, original, same | {"levers": levers, "seed": seed})


__all__ = ["Point", "Sweep", "sweep"]
