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
from .data import SHIPPED
from .errors import ArchitectureMismatch, InvalidCheckpoint
from .files import MODEL_FILE, write_json, write_text
from .hub import is_transformers, write_config
from .plan import Plan, weights_sha256
from .planning import Choice, tradeoff
from .report.conversion import Report, model_card
from .report.evaluation import Evaluation
from .report.figures import Locality, SiteCost
from .report.latency import Latency
from .report.page import can_draw, write_page
from .search.calibration import Calibration
from .search.measure import agreement, distance
from .sharing import fetched, upload
from .storage import load, read_plan, save
from .workbench import unwrap

REPORT_FILE, EVALUATION_FILE = "report.json", "evaluation.json"
_LAGGING = 0.1  # of the original's time, behind the FLOPs; on a busy machine more
_ALIKE = 1e-5  # of the largest output: no difference between images


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
                `report.json`, a model card `README.md`, of a transformers model its `config.json`, and with
                msa2conv[report] installed `report.html` and its `figures/`.

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
        (target / EVALUATION_FILE).unlink(missing_ok=True)  # of what lay here before
        if can_draw():
            write_page(target, self.plan, self.report)
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

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload what `save` writes into a folder to the Hugging Face Hub, as one commit.

        Args:
            repo_id: "me/deit_s_70"; created where there is none.
            options: private, token, branch, commit_message, ... of `huggingface_hub.ModelHubMixin.push_to_hub`.

        Returns:
            The address of the commit.

        Example:
            result.push_to_hub("me/deit_s_70", private=True)
        """
        return upload(self.save, repo_id, **options)

    @classmethod
    def from_pretrained(
        cls,
        repo_or_folder: str | os.PathLike[str],
        model: nn.Module | None = None,
        *,
        original: nn.Module | None = None,
        **options: Any,
    ) -> Conversion:
        """`load` from the Hugging Face Hub, or from a folder.

        Args:
            repo_or_folder: "me/deit_s_70", or a folder written by `save`.
            model, original: as for `load`.
            options: revision, token, cache_dir, local_files_only, ... of `huggingface_hub.snapshot_download`.

        Raises:
            InvalidCheckpoint: there is no such folder or repository, or it cannot be reached.
            And what `load` raises.

        Example:
            hybrid = msa2conv.Conversion.from_pretrained("me/deit_s_70").model
        """
        return cls.load(fetched(repo_or_folder, **options), model, original=original)

    def __str__(self) -> str:
        return f"{self.plan}\n\n{self.report}"


def write_report(folder: str | os.PathLike[str]) -> Path:
    """Draw the report of a saved hybrid anew, from its plan, its `report.json` and, where there is one, its
    `evaluation.json`; nothing is run.

    Args:
        folder: written by `Conversion.save`, of this version or an earlier one.

    Returns:
        The path of `report.html`, one self-contained file; its figures lie in `figures/` as PNG.

    Raises:
        InvalidCheckpoint: there is no hybrid, no report, or one that cannot be read.
        UnsupportedSchema: a later version wrote it.
        MissingDependency: matplotlib or jinja2 is not installed.
        InvalidOutputPath: nothing can be written there.

    Example:
        msa2conv.write_report("out")
    """
    source = Path(folder)
    if not (source / REPORT_FILE).is_file():
        raise InvalidCheckpoint(
            str(source), f"no {REPORT_FILE}", "a folder written by Conversion.save or msa2conv convert",
            "Convert with an output folder: a .safetensors file alone holds no figures.",
        )  # fmt: skip
    plan = read_plan(source)
    report, evaluation = _read_report(source / REPORT_FILE, plan), None
    if (source / EVALUATION_FILE).is_file():
        text = (source / EVALUATION_FILE).read_text(encoding="utf-8")
        evaluation = Evaluation.from_json(text, str(source / EVALUATION_FILE))
    return write_page(source, plan, report, evaluation)


def _read_report(path: Path, plan: Plan) -> Report:
    if not path.is_file():
        return decided_report(plan, "an earlier run", {})
    return Report.from_json(path.read_text(encoding="utf-8"), str(path))


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
        levers: what was allowed to change.
        sites: what every site took and takes.
        locality: of the original's heads.
        latency: measured times.
    """

    target: int | None
    distill_steps: int
    seed: int
    seconds: dict[str, float]
    laws: dict[str, float]
    device: torch.device
    warnings: list[str]
    levers: list[str]
    sites: list[SiteCost]
    locality: list[Locality]
    latency: Latency


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
        levers=run.levers,
        distill_steps=run.distill_steps,
        seed=run.seed,
        seconds={name: round(value, 2) for name, value in run.seconds.items()},
        versions=versions(),
        device=_device_name(run.device),
        laws=run.laws,
        latency=run.latency,
        sites=run.sites,
        tradeoff=tradeoff(calibration),
        locality=run.locality,
        warnings=[*run.warnings, *calibration.warnings, *_hints(plan, calibration, found, run.latency, after)],
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


def _hints(plan: Plan, calibration: Calibration, found: float, latency: Latency, after: Tensor) -> list[str]:
    hints, kept = latency.warnings, plan.flops / plan.base.flops
    if float((after - after[:1]).abs().max()) <= _ALIKE * float(after.abs().max()):
        hints.append(
            "the hybrid answers every image alike: nothing of them reaches its output any more; "
            "allow more FLOPs or time"
        )
    if latency.target is None and latency.ratio > kept + max(_LAGGING, latency.spread):
        many = "one image" if latency.batch_size == 1 else f"{latency.batch_size} images"
        hints.append(
            f"{many} at a time, the hybrid takes {latency.ratio:.2f} of the original's time here at {kept:.2f} of its "
            "FLOPs; where time counts, ask for time: latency_target=0.7"
        )
    if SHIPPED in calibration.source:
        hints.append(
            "calibrated on the shipped photos: pass data=your images (64 to 256, no labels) for a better hybrid"
        )
    if calibration.measure == "kl" and found > 0.5:
        hints.append(
            f"the hybrid is far from the original (KL {found:.2f}): polish it (distill_steps=100) or fine-tune it"
        )
    return hints
