"""The report of a conversion: figures, how they were measured, what to rerun."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from ..plan import Plan
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
    distill_steps, seed: arguments.
    seconds: {"calibrate": ..., "solve": ..., "distill": ...}, of this machine.
    versions: of the packages used.
    device: where it ran.
    laws: {law: largest difference or exact figure} as verified on this model.
    warnings: what the user should know.
    latency: measured times, where there was a budget of time.
    training: what a fine-tuning did since, None without.
    streamlined: {exact pass of `streamline`: at how many sites it did something}.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

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
    distill_steps: int = 0
    seed: int | None = None
    seconds: dict[str, float]
    versions: dict[str, str]
    device: str
    laws: dict[str, float]
    warnings: list[str] = []
    latency: Latency | None = None
    training: Training | None = None
    streamlined: dict[str, int] = {}

    def __str__(self) -> str:
        unit = "KL to the original (nats)" if self.measure == "kl" else "relative feature error"
        before, after = self.flops_before, self.flops_after
        rows = [
            ("GFLOPs (multiply-adds, batch 1)", f"{before / 1e9:.3f}", f"{after / 1e9:.3f}", f"{after / before:.1%}"),
            (
                "M params",
                f"{self.parameters_before / 1e6:.2f}",
                f"{self.parameters_after / 1e6:.2f}",
                f"{self.parameters_after / self.parameters_before:.1%}",
            ),
        ]
        if self.distance is not None:
            rows.append((f"{unit}, held out", "0", f"{self.distance:.4f}", ""))
        if self.distance_polished is not None:
            rows.append(
                (f"... after {self.distill_steps} distillation steps", "0", f"{self.distance_polished:.4f}", "")
            )
        if self.agreement is not None:
            rows.append(("same prediction, held out", "100%", f"{self.agreement:.1%}", ""))
        if self.latency is not None:
            old, new = (1e3 * timing.seconds for timing in (self.latency.before, self.latency.after))
            what = f"ms, batch {self.latency.batch_size}, {self.latency.dtype}"
            rows.append((what, f"{old:.4g}", f"{new:.4g}", f"{self.latency.ratio:.1%}"))
        lines = [f"{'':<44}{'before':>10}{'after':>10}{'ratio':>9}"]
        lines += [f"{name:<44}{old:>10}{new:>10}{ratio:>9}" for name, old, new, ratio in rows]
        if self.target is not None:
            lines.append(f"budget {self.target / 1e9:.3f} GFLOPs, {after / self.target:.2%} used")
        if self.latency is not None:
            lines.append(f"budget {1e3 * self.latency.target:.4g} ms, {self.latency}")
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


def model_card(plan: Plan, report: Report) -> str:
    """The README.md that is written beside an artefact."""
    builder = plan.base.builder
    base = f'timm.create_model("{builder.name}", **{dict(builder.kwargs)})' if builder else plan.base.model_class
    code = "hybrid = msa2conv.load(path)" if builder else f"hybrid = msa2conv.load(path, model)  # model: {base}"
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    seed = "" if report.seed is None else f"Seed {report.seed}; "
    return (
        f"# {plan.base.name}, {report.flops_after / report.flops_before:.1%} of its FLOPs\n\n"
        f"Made by msa2conv from `{base}`.\n\n"
        f"```python\nimport msa2conv\n{code}\n```\n\n"
        f"```\n{plan}\n```\n\n```\n{report}\n```\n\n"
        f"{seed}{versions}; {report.device}. Source weights sha256 `{plan.base.weights_sha256}`.\n"
        "Distances compare the hybrid with the original on unlabelled images; measure accuracy on your "
        "own test set with `msa2conv eval`.\n"
    )
