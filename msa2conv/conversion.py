"""What `convert` returns, and the report in it."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import __version__
from .data import EMBEDDED
from .errors import ArchitectureMismatch, InvalidCheckpoint
from .files import MODEL_FILE, write_json, write_text
from .hub import is_transformers, write_config
from .plan import Plan, Wrap, weights_sha256
from .planning import Choice
from .report.conversion import Report, model_card
from .report.latency import Latency
from .search.calibrate import Calibration
from .search.measure import agreement, distance
from .storage import load, read_plan, save
from .workbench import unwrap

REPORT_FILE = "report.json"


@dataclass(frozen=True)
class Conversion:
    """What `convert` returns.

    Args:
        model: the hybrid: a plain module of the original's class, in its dtype, device and training mode.
        plan: what was decided, as data; `print` it.
        report: the figures; `print` it.
        calibration: reuse it for another budget: `convert(model, 0.5, calibration=result.calibration)`; None after a
            gate search, and where a checkpoint was read.
        original: the very model that was given to `convert`, to learn from; None where that is not known.
    """

    model: nn.Module
    plan: Plan
    report: Report
    calibration: Calibration | None
    original: nn.Module | None = field(default=None, repr=False)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the hybrid atomically.

        Args:
            path: a `.safetensors` file (tensors + Plan), or a folder, which gets `model.safetensors`, `plan.json`,
                `report.json`, a model card `README.md`, and of a transformers model its `config.json`.

        Returns:
            The path of the .safetensors file.

        Raises:
            InvalidOutputPath: the path cannot be written.
        """
        target = Path(path)
        if target.suffix == ".safetensors":
            return save(self.model, self.plan, target)
        written = save(self.model, self.plan, target / MODEL_FILE)
        write_text(target / "plan.json", self.plan.model_dump_json(indent=2) + "\n")
        write_json(target / REPORT_FILE, self.report.model_dump(mode="json"))
        write_text(target / "README.md", model_card(self.plan, self.report))
        if is_transformers(self.model):
            write_config(self.model, target)
        return written

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], model: nn.Module | None = None, *, original: nn.Module | None = None
    ) -> Conversion:
        """Read what `save` wrote.

        Args:
            path: the folder, or the `.safetensors` file (without its report).
            model: an instance of the original architecture, as for `msa2conv.load`; not needed with `original`.
            original: the very model that was converted, with its weights, if there is more to learn from it.

        Raises:
            InvalidCheckpoint, UnsupportedSchema, InvalidPlan: the files cannot be used.
            ArchitectureMismatch: `model` or `original` is another one.
        """
        plan = read_plan(path)
        if original is not None:
            original = unwrap(original)
            if weights_sha256(original) != plan.base.weights_sha256:
                raise ArchitectureMismatch(
                    "original", f"a {type(original).__name__} with other weights",
                    f"the {plan.base.name} that was converted", "Load the weights that were given to `convert`.",
                )  # fmt: skip
        hybrid = load(path, original if model is None else model)
        return cls(hybrid, plan, _read_report(Path(path) / REPORT_FILE, plan), None, original)

    def __str__(self) -> str:
        return f"{self.plan}\n\n{self.report}"


def _read_report(path: Path, plan: Plan) -> Report:
    if not path.is_file():
        return decided_report(plan, "an earlier run", {})
    try:
        return Report.model_validate_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InvalidCheckpoint(
            str(path), "a report that this version cannot read", "the report.json that `save` wrote",
            "Delete it: the hybrid itself does not need it.",
        ) from error  # fmt: skip


@dataclass(frozen=True)
class Run:
    """Circumstances of a conversion that its report states.

    Args:
        target: multiply-adds allowed; None without such a budget.
        distill_steps, seed: arguments of `convert`.
        seconds: {stage: wall time}.
        laws: what `verify` returned.
        device: where it ran.
        warnings: what its inspection warned of.
        latency: measured times, where there was a budget of time.
    """

    target: int | None
    distill_steps: int
    seed: int
    seconds: dict[str, float]
    laws: dict[str, float]
    device: torch.device
    warnings: list[str]
    latency: Latency | None = None


def make_report(
    plan: Plan, calibration: Calibration, choice: Choice, before: Tensor, after: Tensor, run: Run
) -> Report:
    """The figures of a conversion.

    Args:
        plan, calibration, choice: what was decided, on what grounds.
        before, after: the hybrid's outputs on the held-out images before and after the polish.
        run: circumstances.
    """
    reference, measure = calibration.reference, calibration.measure
    found = distance(reference, before, measure)
    return Report(
        name=plan.base.name,
        flops_before=plan.base.flops,
        flops_after=plan.flops,
        target=run.target,
        parameters_before=plan.base.parameters,
        parameters_after=plan.parameters,
        measure=measure,
        distance=found,
        distance_polished=distance(reference, after, measure) if run.distill_steps else None,
        agreement=agreement(reference, after) if measure == "kl" else None,
        predicted=choice.predicted,
        candidates=choice.distances,
        price=choice.price,
        calibration=calibration.source,
        images={"fit": calibration.fitted, "held out": len(calibration.images)},
        distill_steps=run.distill_steps,
        seed=run.seed,
        seconds={name: round(value, 2) for name, value in run.seconds.items()},
        versions=versions(),
        device=_device_name(run.device),
        laws=run.laws,
        latency=run.latency,
        warnings=[*run.warnings, *calibration.warnings, *_hints(plan, calibration, found, run.latency)],
    )


def decided_report(plan: Plan, decided_by: str, laws: Mapping[str, float], **known: Any) -> Report:
    """The figures of a hybrid that no Calibration decided.

    Args:
        plan: what was decided.
        decided_by: by what, for people.
        laws: what was verified.
        known: further fields of Report.
    """
    device = known.pop("device", torch.device("cpu"))
    return Report(
        name=plan.base.name,
        flops_before=plan.base.flops,
        flops_after=plan.flops,
        parameters_before=plan.base.parameters,
        parameters_after=plan.parameters,
        calibration=decided_by,
        laws=dict(laws),
        versions=versions(),
        device=_device_name(device),
        **{"target": plan.flops, "measure": "kl", "seconds": {}, **known},
    )


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that figures depend on."""
    found = {"python": platform.python_version(), "msa2conv": __version__}
    for name in ("torch", "timm", "fvcore", "torch-pruning", "scipy", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} ({os.cpu_count()} cores)"


def _hints(plan: Plan, calibration: Calibration, found: float, latency: Latency | None) -> list[str]:
    hints = [] if latency is None else latency.warnings
    merging = sum(isinstance(edit, Wrap) for edit in plan.edits)
    if merging and latency is None:
        hints.append(
            f"tokens are merged inside {merging} modules: this saves FLOPs, and time in large batches on a CPU, but "
            "costs time on a GPU and for single images; where time counts, ask for time: latency_target=0.7"
        )
    if calibration.source.startswith(EMBEDDED):
        hints.append(
            "calibrated on the shipped photos: pass data=your images (64 to 256, no labels) for a better hybrid"
        )
    if calibration.measure == "kl" and found > 0.5:
        hints.append(
            f"the hybrid is far from the original (KL {found:.2f}): polish it (distill_steps=100) or fine-tune it"
        )
    return hints
