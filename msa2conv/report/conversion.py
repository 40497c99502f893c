"""The report of a conversion: figures, how they were measured, what to rerun."""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from ..errors import InvalidCheckpoint, UnsupportedSchema
from ..plan import Plan
from .figures import HEAD, Locality, Promise, Row, SiteCost, unit_of
from .latency import Latency
from .training import Training


class Report(BaseModel):
    """Args:
    flops_before, flops_after, target: multiply-adds of one forward pass at batch 1; target is None without a budget of
        FLOPs.
    parameters_before, parameters_after: number of parameters.
    measure: "kl" (nats, of the logits) or "relative" (squared error of the features over their square).
    distance: the hybrid's distance to the original on held-out images, before any polish; None if none were given.
    distance_polished: the same after `distill_steps`, None without.
    agreement: share of held-out images on which both predict the same class, None without logits.
    predicted: sum of single-site scores; far below `distance` means that sites interact. None without scores.
    candidates: distance of every plan that was compared.
    price: which of them was taken.
    calibration: what decided: the images, or the search.
    images: {"fit": n, "held out": n}; empty for a gate search.
    levers: what was allowed to change: names, or configured levers as they are written.
    distill_steps, seed: arguments.
    seconds: {"calibrate": ..., "solve": ..., "distill": ...}, of this machine.
    versions: of the packages used.
    device: where it ran.
    laws: {law: largest difference or exact figure} as verified on this model.
    warnings: what the user should know.
    latency: measured times of the original and the hybrid; None where nothing was measured.
    sites: what every site took and takes.
    tradeoff: the least that other budgets are predicted to lose, by the same calibration.
    locality: of the original's heads.
    search: lines of the log of a gate search.
    training: what a fine-tuning did since, None without.
    streamlined: {exact pass of `streamline`: at how many sites it did something}.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    name: str
    flops_before: int
    flops_after: int
    target: int | None
    parameters_before: int
    parameters_after: int
    measure: str
    distance: float | None = None
    distance_polished: float | None = None
    agreement: float | None = None
    predicted: float | None = None
    candidates: dict[str, float] = {}
    price: str = ""
    calibration: str
    images: dict[str, int] = {}
    levers: list[str] = []
    distill_steps: int = 0
    seed: int | None = None
    seconds: dict[str, float]
    versions: dict[str, str]
    device: str
    laws: dict[str, float]
    warnings: list[str] = []
    latency: Latency | None = None
    sites: list[SiteCost] = []
    tradeoff: list[Promise] = []
    locality: list[Locality] = []
    search: list[dict[str, Any]] = []
    training: Training | None = None
    streamlined: dict[str, int] = {}

    @classmethod
    def from_json(cls, text: str, where: str) -> Report:
        """Parse a report.json, of this version or an earlier one, whose report simply says less.

        Raises:
            UnsupportedSchema: a later version wrote it.
            InvalidCheckpoint: it is no report.
        """
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            version = _version(text)
            if version not in (None, 1):
                raise UnsupportedSchema(
                    where, f"report schema version {version}", "version 1",
                    "Read it with the msa2conv release that wrote it; the hybrid itself does not need it.",
                ) from error  # fmt: skip
            raise InvalidCheckpoint(
                where, "a report that this version cannot read", "the report.json that `save` wrote",
                "Delete it: the hybrid itself does not need it.",
            ) from error  # fmt: skip

    def rows(self) -> list[Row]:
        """What changed, in words and figures."""
        rows = [
            Row.of("GFLOPs (multiply-adds, batch 1)", self.flops_before / 1e9, self.flops_after / 1e9, ".3f"),
            Row.of("M params", self.parameters_before / 1e6, self.parameters_after / 1e6, ".2f"),
        ]
        if self.distance is not None:
            rows.append(Row(f"{unit_of(self.measure)}, held out", "0", f"{self.distance:.4f}"))
        if self.distance_polished is not None:
            rows.append(Row(f"... after {self.distill_steps} distillation steps", "0", f"{self.distance_polished:.4f}"))
        if self.agreement is not None:
            rows.append(Row("same prediction, held out", "100%", f"{self.agreement:.1%}"))
        if self.latency is not None:
            before, after = 1e3 * self.latency.before.seconds, 1e3 * self.latency.after.seconds
            row = Row.of(f"ms, batch {self.latency.batch_size}, {self.latency.dtype}", before, after, ".4g")
            rows.append(row._replace(ratio=f"{self.latency.ratio:.1%}"))  # the median of ratios
        return rows

    def __str__(self) -> str:
        lines = [f"{row.name:<44}{row.before:>10}{row.after:>10}{row.ratio:>9}" for row in (HEAD, *self.rows())]
        if self.target is not None:
            lines.append(f"budget {self.target / 1e9:.3f} GFLOPs, {self.flops_after / self.target:.2%} used")
        if self.latency is not None:
            lines.append(str(self.latency))
        if self.images:
            used = f"{self.images['fit']} to fit, {self.images['held out']} held out"
            lines.append(f"calibrated on {self.calibration}: {used}")
        else:
            lines.append(f"decided by {self.calibration}")
        lines += [f"warning: {text}" for text in self.warnings]
        if self.training is not None:
            lines.append(str(self.training))
        if self.streamlined:
            lines.append("streamlined: " + ", ".join(f"{name} ({sites})" for name, sites in self.streamlined.items()))
        return "\n".join(lines)


def _version(text: str) -> Any:
    try:
        return json.loads(text).get("schema_version")
    except (ValueError, AttributeError):
        return None


def model_card(plan: Plan, report: Report) -> str:
    """The README.md that is written beside an artefact; its header is what the Hugging Face Hub reads."""
    builder = plan.base.builder
    base = f'timm.create_model("{builder.name}", **{dict(builder.kwargs)})' if builder else plan.base.model_class
    code = "hybrid = msa2conv.load(path)" if builder else f"hybrid = msa2conv.load(path, model)  # model: {base}"
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    seed = "" if report.seed is None else f"Seed {report.seed}; "
    task = "pipeline_tag: image-classification\n" if report.agreement is not None else ""
    return (
        f"---\nlibrary_name: msa2conv\n{task}tags:\n- vision\n- vision-transformer\n- pruning\n---\n"
        f"# {plan.base.name}, {report.flops_after / report.flops_before:.1%} of its FLOPs\n\n"
        f"Made by msa2conv from `{base}`.\n\n"
        f"```python\nimport msa2conv\n{code}\n```\n\n"
        f"```\n{plan}\n```\n\n```\n{report}\n```\n\n"
        f"{seed}{versions}; {report.device}. Source weights sha256 `{plan.base.weights_sha256}`.\n"
        "Distances compare the hybrid with the original on unlabelled images; measure accuracy on your "
        "own test set with `msa2conv eval`. The figures as pictures: `report.html`, if it lies beside this file.\n"
    )
