"""The page of a conversion: one self-contained HTML file, and its figures as PNG (the only importer of jinja2)."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..errors import MissingDependency
from ..files import atomic_write, write_text
from ..plan import Plan
from .conversion import Report
from .evaluation import Evaluation
from .figures import Row

PAGE_FILE, FIGURES = "report.html", "figures"
_NEEDED = ("matplotlib", "jinja2")
_MISSING = {
    "plan": "what decided this hybrid did not tell what every site takes.",
    "flops": "what decided this hybrid did not tell what every site takes.",
    "tradeoff": "other budgets are known after a calibrated search only.",
    "heads": "no attention of this model has weights between its own tokens, or none was looked at.",
    "training": "there are no lines of a log.",
    "search": "there are no lines of a log.",
}


def can_draw() -> bool:
    """Whether what a page needs is installed."""
    return all(find_spec(name) is not None for name in _NEEDED)


def write_page(folder: Path, plan: Plan, report: Report, evaluation: Evaluation | None = None) -> Path:
    """Write `report.html` and `figures/*.png`, atomically file by file.

    Args:
        folder: of the artefact.
        plan, report, evaluation: what is shown.

    Raises:
        MissingDependency: matplotlib or jinja2 is not installed.
        InvalidOutputPath: nothing can be written there.
    """
    if not can_draw():
        missing = [name for name in _NEEDED if find_spec(name) is None]
        raise MissingDependency(
            "report", f"no package {' nor '.join(map(repr, missing))}", " and ".join(_NEEDED),
            "pip install 'msa2conv[report]'",
        )  # fmt: skip
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    from .plots import as_png, as_svg, pictures

    drawn = pictures(plan, report)
    shown = {}
    for name, figure in drawn.items():
        inches = float(figure.get_figwidth())
        # legible on a phone, where a wide picture scrolls rather than shrinks
        shown[name] = {"svg": Markup(as_svg(figure, name)), "width": round(72 * inches)}
        with atomic_write(folder / FIGURES / f"{name}.png") as temporary:
            temporary.write_bytes(as_png(figure))
    environment = Environment(loader=PackageLoader("msa2conv", "report"), autoescape=True, undefined=StrictUndefined)
    text = environment.get_template("page.html").render(
        plan=plan,
        report=report,
        ratio=f"{plan.flops / plan.base.flops:.1%}",
        tiles=_tiles(plan, report, evaluation),
        rows=_rows(report, evaluation),
        notes=_notes(report, evaluation),
        warnings=report.warnings,
        pictures=shown,
        missing=_MISSING,
        chance=_chance(report),
        code=_code(plan, report),
        circumstances=_circumstances(plan, report),
    )
    write_text(folder / PAGE_FILE, text)
    return folder / PAGE_FILE


def _tiles(plan: Plan, report: Report, evaluation: Evaluation | None) -> list[dict[str, str]]:
    base = plan.base
    tiles = [
        (f"{plan.flops / base.flops:.1%}", "of the FLOPs", f"{base.flops / 1e9:.3f} → {plan.flops / 1e9:.3f} G"),
        (
            f"{plan.parameters / base.parameters:.1%}",
            "of the parameters",
            f"{base.parameters / 1e6:.2f} → {plan.parameters / 1e6:.2f} M",
        ),
    ]
    if report.latency is not None:
        note = f"batch {report.latency.batch_size}, {report.latency.dtype}"
        tiles.append((f"{report.latency.ratio:.1%}", "of the time", note))
    if evaluation is not None and "hybrid" in evaluation.models:
        hybrid = evaluation.models["hybrid"]
        beside = evaluation.models.get("original")
        note = f"{hybrid.images} images" + (f"; original {_percent(beside)}" if beside else "")
        tiles.append((_percent(hybrid), "top-1", note))
    if report.agreement is not None:
        tiles.append((f"{report.agreement:.1%}", "same prediction", f"{report.images.get('held out', 0)} held out"))
    if report.distance is not None:
        unit = "KL (nats)" if report.measure == "kl" else "relative error"
        tiles.append((f"{report.distance:.4f}", unit, "to the original, held out"))
    return [{"value": value, "name": name, "note": note} for value, name, note in tiles]


def _percent(measured: Any) -> str:
    return f"{100 * measured.correct / measured.images:.1f} %"


def _rows(report: Report, evaluation: Evaluation | None) -> list[Row]:
    rows = report.rows()
    if evaluation is not None and "hybrid" in evaluation.models:
        hybrid, original = evaluation.models["hybrid"], evaluation.models.get("original")
        rows.append(Row("top-1, labelled images", _percent(original) if original else "", _percent(hybrid)))
        for batch, seconds in hybrid.seconds.items():
            name = f"ms, batch {batch}, with the evaluation"
            if original is None:
                rows.append(Row(name, "", f"{1e3 * seconds:.4g}"))
            else:
                rows.append(Row.of(name, 1e3 * original.seconds[batch], 1e3 * seconds, ".4g"))
    return rows


def _notes(report: Report, evaluation: Evaluation | None) -> list[str]:
    notes = []
    if report.target is not None:
        notes.append(
            f"Budget {report.target / 1e9:.3f} G multiply-adds, {report.flops_after / report.target:.2%} used."
        )
    if report.latency is not None:
        notes += [line[:1].upper() + line[1:] + "." for line in str(report.latency).splitlines()]
    if evaluation is None:
        notes.append("Accuracy: msa2conv eval, on labelled images of your own, adds it.")
    else:
        notes.append(f"Top-1 on {evaluation.images}, on {evaluation.device}.")
    return notes


def _chance(report: Report) -> str:
    found = sorted({f"{100 * each.chance:.0f}" for each in report.locality}, key=int)
    return " to ".join(dict.fromkeys((found[0], found[-1]))) if found else ""


def _code(plan: Plan, report: Report) -> str:
    builder, lines = plan.base.builder, ["import msa2conv"]
    if builder is not None:
        arguments = "".join(f", {name}={value!r}" for name, value in builder.kwargs.items())
        lines += ["import timm", "", f"model = timm.create_model({builder.name!r}{arguments})  # and the weights below"]
    else:
        lines += ["", f"model = ...  # {plan.base.model_class}, with the weights below"]
    lines += ['hybrid = msa2conv.load("model.safetensors", model)  # this very hybrid']
    if report.images:
        asked = [] if report.target is None else [str(report.target)]
        if report.latency is not None and report.latency.target is not None:
            asked.append(
                f'latency_target="{1e3 * report.latency.target:.4g}ms", batch_size={report.latency.batch_size}'
            )
        levers = ", ".join(lever if "(" in lever else repr(lever) for lever in report.levers)
        asked += [f"levers=[{levers}]"] if levers else []
        asked += [f"distill_steps={report.distill_steps}"] if report.distill_steps else []
        lines += [f"again = msa2conv.convert(model, {', '.join(asked)}, data=images, seed={report.seed})"]
    return "\n".join(lines)


def _circumstances(plan: Plan, report: Report) -> list[tuple[str, str]]:
    found = [("decided by", report.calibration)]
    if report.images:
        found.append(("images", ", ".join(f"{count} {name}" for name, count in report.images.items())))
    if report.seed is not None:
        found.append(("seed", str(report.seed)))
    found += [
        ("device", report.device),
        ("input", " x ".join(map(str, plan.base.input_size))),
        ("weights before, sha256", plan.base.weights_sha256 or "unknown"),
        ("seconds", ", ".join(f"{name} {value:g}" for name, value in report.seconds.items()) or "not measured"),
        ("versions", ", ".join(f"{name} {version}" for name, version in report.versions.items())),
    ]
    return found


__all__ = ["FIGURES", "PAGE_FILE", "can_draw", "write_page"]
