"""The pictures of a report (the only importer of matplotlib), as SVG for a page and as PNG for everything else."""

from __future__ import annotations

import io
import re
from itertools import groupby
from typing import Any, NamedTuple

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Patch

from ..plan import Plan, symbol, units
from .conversion import Report
from .figures import Promise, SiteCost, unit_of

# Okabe and Ito's colours, which people with colour blindness can tell apart
_FAMILIES = {
    "attention": ("attention", "#7d8ea3"),
    "thin": ("thinner attention", "#56b4e9"),
    "conv": ("convolution", "#e69f00"),
    "depthwise": ("depthwise convolution on V", "#cc79a7"),
    "mean": ("constant or global mean", "#009e73"),
    "none": ("nothing", "#c9ced6"),
}
_FFN = "#3d9bd6"
_LINEAR = "#e69f00"
_EMPTY = "#d9e6ef"
_INK, _LINE = "#111213", "#c1c2c3"  # stand-ins: a page replaces them by its own colours, light or dark
_COLOURS = {_INK: "currentColor", _LINE: "var(--line)"}
_FONT = re.compile(r"'DejaVu Sans'[^;\"]*")
_STYLE: Any = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), _INK),
    **dict.fromkeys(("axes.edgecolor", "grid.color"), _LINE),
}


def pictures(plan: Plan, report: Report) -> dict[str, Figure]:
    """{name: figure} of everything that a report has figures for: plan, flops, tradeoff, heads, search, training."""
    drawn: dict[str, Figure] = {}
    with matplotlib.rc_context(_STYLE):
        if report.sites:
            drawn |= {"plan": _plan(plan, report), "flops": _flops(report)}
        if len(report.tradeoff) > 1:
            drawn["tradeoff"] = _tradeoff(report)
        if report.locality:
            drawn["heads"] = _heads(report)
        if report.search:
            drawn["search"] = _curves(report.search)
        if report.training is not None and report.training.curve:
            drawn["training"] = _curves(report.training.curve)
    return drawn


def as_svg(figure: Figure, name: str) -> str:
    """For a page: no size of its own, colours of the page's text, and the same bytes every time."""
    file = io.StringIO()
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": name}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    figure.set_layout_engine("none")  # laid out once, which takes half of the time, is enough for every format
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r' (width|height)="[\d.]+pt"', "", text, count=2)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    for stand_in, colour in _COLOURS.items():
        text = text.replace(stand_in, colour)
    return _FONT.sub("system-ui, sans-serif", text)


def as_png(figure: Figure) -> bytes:
    """On white, for slides and documents."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=160, facecolor="white", metadata={"Software": None})
    return file.getvalue()


def blocks(sites: list[SiteCost]) -> list[tuple[SiteCost | None, SiteCost | None]]:
    """(attention, FFN) block by block; a block may lack one, or be two columns where it has two of a kind."""
    found: list[tuple[SiteCost | None, SiteCost | None]] = []
    for _, group in groupby(sites, key=lambda site: site.block):
        members = list(group)
        attentions = [site for site in members if site.kind == "attention"]
        ffns = [site for site in members if site.kind == "ffn"]
        for index in range(max(len(attentions), len(ffns))):
            pair = (attentions[index : index + 1], ffns[index : index + 1])
            found.append((pair[0][0] if pair[0] else None, pair[1][0] if pair[1] else None))
    return found


def _family(option: str) -> str:
    option = option.partition("@")[0]
    for start, family in (("attend", "thin"), ("depthwise", "depthwise"), ("conv", "conv"), ("attention", "attention")):
        if option.startswith(start):
            return family
    return "mean" if option in ("constant", "global") else "none"


def _kept(option: str) -> float:
    """Of the hidden units; a linear layer is all there is."""
    kept, _, total = option.partition("@")[0].partition("/")
    return int(kept) / int(total) if kept.isdecimal() else 1.0


def _plan(plan: Plan, report: Report) -> Figure:
    columns = blocks(report.sites)
    figure, axes = _canvas(len(columns), 2.3)
    for x, (attention, ffn) in enumerate(columns):
        if attention is not None:
            _cell(axes, x, 1, symbol(attention.choice), attention.choice, _FAMILIES[_family(attention.choice)][1])
        if ffn is not None:
            colour = _FFN if ffn.choice[0].isdecimal() else _LINEAR
            _cell(axes, x, 0, units(ffn.choice), ffn.choice, colour, _kept(ffn.choice))
    used = dict.fromkeys(_family(site.choice) for site in report.sites if site.kind == "attention")
    handles = [Patch(color=colour, label=label) for name, (label, colour) in _FAMILIES.items() if name in used]
    handles += [Patch(color=_FFN, label="hidden units kept, %")]
    if any(ffn is not None and not ffn.choice[0].isdecimal() for _, ffn in columns):
        handles += [Patch(color=_LINEAR, label="linear layer, or two")]
    axes.set(xlim=(-0.55, len(columns) - 0.45), ylim=(-0.75, 1.5), xticks=range(len(columns)), yticks=(0, 1))
    axes.set_yticklabels(("FFN", "attention"))
    below = ["block; small numbers: patches that are left inside, where tokens are merged", *plan.everywhere]
    axes.set_xlabel("\n".join(below))
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    figure.legend(handles=handles, loc="outside upper left", ncols=min(4, len(handles)), frameon=False)
    return figure


def _cell(axes: Any, x: int, y: int, text: str, option: str, colour: str, filled: float = 1.0) -> None:
    box: Any = {"boxstyle": "round,pad=0,rounding_size=0.08", "linewidth": 0}
    for height, fill in ((0.62, _EMPTY), (0.62 * filled, colour)):
        axes.add_patch(FancyBboxPatch((x - 0.42, y - 0.31), 0.84, max(height, 0.02), color=fill, **box))
    axes.text(x, y, text, ha="center", va="center", color="#000000", fontsize=10, fontweight="bold")
    axes.text(x, y - 0.43, option.partition("@")[2], ha="center", va="center", fontsize=7)


def _flops(report: Report) -> Figure:
    columns = blocks(report.sites)
    rest = [
        total - sum(getattr(site, when) for site in report.sites)
        for total, when in ((report.flops_before, "before"), (report.flops_after, "after"))
    ]
    figure, axes = _canvas(len(columns) + 1, 3.0)
    colours = {"attention": _FAMILIES["attention"][1], "FFN": _FFN}
    for offset, when, alpha in ((-0.2, "before", 0.45), (0.2, "after", 1.0)):
        bottom = [0.0] * len(columns)
        for kind, colour in enumerate(colours.values()):
            heights = [getattr(pair[kind], when) / 1e6 if pair[kind] else 0.0 for pair in columns]
            axes.bar([x + offset for x in range(len(columns))], heights, 0.38, bottom, color=colour, alpha=alpha)
            bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
        axes.bar(len(columns) + offset, rest[when == "after"] / 1e6, 0.38, color="#999999", alpha=alpha)
    labels = [str(x) for x in range(len(columns))]
    axes.set_xticks(range(len(columns) + 1), [*labels, "rest"])
    axes.set(xlabel="block; left, pale: before; right: after", ylabel="million multiply-adds")
    handles = [Patch(color=colour, label=name) for name, colour in colours.items()]
    figure.legend(handles=handles, loc="outside upper left", ncols=2, frameon=False)
    return figure


def _tradeoff(report: Report) -> Figure:
    here = [
        Mark(report.flops_after, value, *look)
        for value, look in (
            (report.predicted, ("D", "#d55e00", "this hybrid, predicted")),
            (report.distance, ("*", "#cc79a7", "this hybrid, measured")),
            (report.distance_polished, ("P", "#009e73", "... after the polish")),
        )
        if value is not None
    ]
    return _curve(report.tradeoff, here, report.flops_before, report.measure)


def sweep_picture(
    promised: list[Promise], measured: list[tuple[int, float]], flops_before: int, measure: str
) -> Figure:
    """The trade-off of a sweep.

    Args:
        promised: predictions for any budget.
        measured: (multiply-adds, distance to the original) of the plans that were tried.
        flops_before: multiply-adds of the original.
        measure: of the distances.
    """
    marks = [Mark(flops, loss, "*", "#cc79a7", "measured") for flops, loss in measured]
    with matplotlib.rc_context(_STYLE):
        return _curve(promised, marks, flops_before, measure)


class Mark(NamedTuple):
    """A network on the trade-off curve."""

    flops: int
    loss: float
    marker: str
    colour: str
    label: str


def _curve(promised: list[Promise], marks: list[Mark], flops_before: int, measure: str) -> Figure:
    figure, axes = _canvas(8, 3.2)
    largest = max(point.loss for point in promised)
    points = [point for point in promised if point.loss > 1e-6 * largest]  # what follows is free
    shares = [100 * point.flops / flops_before for point in points]
    axes.plot(shares, [point.loss for point in points], "-o", color=_FFN, markersize=3, label="predicted, any budget")
    told = set[str]()
    for mark in marks:
        if mark.loss > 0:
            label = None if mark.label in told else mark.label
            size = 13 if mark.marker == "*" else 9
            at = 100 * mark.flops / flops_before
            axes.plot(at, mark.loss, mark.marker, color=mark.colour, markersize=size, label=label, linestyle="none")
            told.add(mark.label)
    axes.set(yscale="log", xlabel="% of the original's multiply-adds", ylabel=unit_of(measure))
    axes.invert_xaxis()
    axes.grid(True, linewidth=0.5)
    axes.legend(frameon=False)
    return figure


def _heads(report: Report) -> Figure:
    most = max(len(each.near) for each in report.locality)
    grid = [[float("nan")] * len(report.locality) for _ in range(most)]
    for x, each in enumerate(report.locality):
        for y, value in enumerate(each.near):
            grid[y][x] = 100 * value
    figure, axes = _canvas(len(report.locality), 1.2 + 0.3 * most)
    image = axes.imshow(grid, cmap="viridis", vmin=0, vmax=100, aspect="auto")
    for y, row in enumerate(grid):
        for x, value in enumerate(row):
            if value == value:
                colour = "#ffffff" if value < 60 else "#000000"
                axes.text(x, y, f"{value:.0f}", ha="center", va="center", color=colour, fontsize=8)
    chosen = {site.path: symbol(site.choice) for site in report.sites}
    labels = [f"{x}\n{chosen.get(each.path, '')}" for x, each in enumerate(report.locality)]
    axes.set_xticks(range(len(labels)), labels)
    axes.set_yticks(range(most))
    axes.set(xlabel="attention, and what became of it", ylabel="head")
    for spine in axes.spines.values():
        spine.set_visible(False)
    bar = figure.colorbar(image, ax=axes, fraction=0.04, pad=0.02)
    bar.set_label("% within 3 x 3", color=_INK)
    bar.outline.set_visible(False)
    return figure


def _curves(lines: list[dict[str, Any]]) -> Figure:
    figure, axes = _canvas(8, 3.0)
    beside, validated = axes.twinx(), False
    start, palette = 0, iter(("#0072b2", "#e69f00", "#009e73", "#cc79a7") * 4)
    for stage, group in groupby(lines, key=lambda line: str(line.get("stage", ""))):
        members, colour = list(group), next(palette)
        losses = [(start + line["step"], line["loss"]) for line in members if "loss" in line]
        if losses:
            axes.plot(*zip(*losses, strict=True), color=colour, linewidth=1.2, label=f"{stage}: loss")
        checks = [(start + line["step"], *_validation(line["val"])) for line in members if "val" in line]
        if checks:
            validated, (steps, values, names) = True, tuple(zip(*checks, strict=True))
            beside.plot(steps, values, "o--", color=colour, markersize=5, linewidth=0.8, label=f"{stage}: {names[0]}")
            beside.set_ylabel(names[0])
        start += max((int(line.get("step", 0)) for line in members), default=0)
    axes.set(xlabel="step", ylabel="loss")
    axes.grid(True, linewidth=0.5)
    beside.set_visible(validated)
    handles = [handle for each in (axes, beside) for handle in each.get_legend_handles_labels()[0]]
    figure.legend(handles=handles, loc="outside upper left", ncols=min(4, max(1, len(handles))), frameon=False)
    return figure


def _validation(val: dict[str, float]) -> tuple[float, str]:
    return (100 * val["top1"], "top-1 %") if "top1" in val else (val["distance"], "distance to the teacher")


def _canvas(columns: int, height: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(max(7.0, 1.2 + 0.52 * columns), height), layout="constrained")
    return figure, figure.add_subplot()


__all__ = ["as_png", "as_svg", "blocks", "pictures", "sweep_picture"]
