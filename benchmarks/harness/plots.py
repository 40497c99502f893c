"""Plots of a tier. Every file says in its metadata which results it shows."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from PIL import Image

from msa2conv.errors import MissingDependency
from msa2conv.files import atomic_write

from .config import DENSE
from .documents import picture
from .result import Result
from .tables import Row, rows_of

_KEY = "Description"
_OURS = "ours"  # what its names start with: drawn in colour, the others in grey tones
_COLOURS = "012345689"  # of matplotlib's cycle; 7 is grey, as rivals are
_MARKERS = "os^vD<>pPXhd*"
_ABOVE = 0.5  # points above the best that are shown, for error bars
_BEHIND = (0, 1, 2, 3, 5, 8, 12, 20, 30, 50, 80)  # points behind the best: where the scale has its marks


def digest(results: Sequence[Result]) -> str:
    """Of all that a plot may show."""
    whole = hashlib.sha256()
    for result in sorted(results, key=lambda result: (result.name.experiment, result.name.stem)):
        whole.update(result.model_dump_json().encode())
    return f"results {whole.hexdigest()}"


def shown_digest(path: Path) -> str:
    """What a plot says that it shows; "" of a file that says nothing."""
    with Image.open(path) as image:
        return str(image.info.get(_KEY, ""))


def draw(tier: str, results: Sequence[Result], docs: Path) -> list[Path]:
    """Two plots an experiment: accuracy over FLOPs and over time, and where the FLOPs are.

    Raises:
        MissingDependency: matplotlib is not installed.
    """
    plt = _pyplot()
    written = []
    for experiment in dict.fromkeys(result.name.experiment for result in results):
        own = [result for result in results if result.name.experiment == experiment]
        rows = rows_of(own)
        for what, figure in (("accuracy", _accuracy(plt, rows)), ("blocks", _blocks(plt, rows))):
            path = picture(tier, experiment, what, docs)
            figure.suptitle(f"{tier} / {experiment}")
            with atomic_write(path) as temporary:
                figure.savefig(temporary, format="png", dpi=110, metadata={_KEY: digest(own)})
            plt.close(figure)
            written.append(path)
    return written


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise MissingDependency(
            "matplotlib", "not installed", "matplotlib >= 3.8", "pip install matplotlib, or write tables alone."
        ) from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _accuracy(plt: Any, rows: Sequence[Row]) -> Any:
    """Top-1 with all training over FLOPs, time of single images and of batches, with error bars over seeds."""
    figure, axes = plt.subplots(1, 3, figsize=(15, 5.2), sharey=True, layout="constrained")
    dense = [row for row in rows if row.method == DENSE]
    for method, style in _styles(rows).items():
        own = sorted((row for row in rows if row.method == method), key=lambda row: row.budget)
        places = ([row.kept.mean for row in own], *([row.speed(batch).mean for row in own] for batch in (1, 32)))
        errors = [row.final.deviation or 0.0 for row in own]
        for axis, x in zip(axes, places, strict=True):
            y = [row.final.mean for row in own]
            axis.errorbar(x, y, errors, label=method, capsize=2, **style)
    labels = ("share of the parent's FLOPs", "time of one image / parent's", "time of 32 images / parent's")
    for axis, label in zip(axes, labels, strict=True):
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
        for row in dense:
            axis.axhline(row.final.mean, color="black", lw=0.8, ls=":")
    axes[0].set_ylabel("top-1, %, logarithmic in what is lost")
    _stretch(axes[0], [row.final.mean for row in rows])
    axes[-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _styles(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """{method: how it is drawn}: ours in colour, then rivals in grey, from the best on, the better the darker."""
    heights = defaultdict(list)
    for row in rows:
        heights[row.method].append(row.final.mean)
    ours = sorted(method for method in heights if method.startswith(_OURS))
    rivals = sorted(heights.keys() - {DENSE, *ours}, key=lambda method: (-mean(heights[method]), method))
    found: dict[str, dict[str, Any]] = {}
    for index, method in enumerate(ours):
        found[method] = {"color": f"C{_COLOURS[index % len(_COLOURS)]}", "lw": 2, "zorder": 3}
    for rank, method in enumerate(rivals):
        shade = 0.75 * rank / max(1, len(rivals) - 1)
        found[method] = {"color": f"{shade:.3f}", "lw": 0.8, "ls": "--", "ms": 4}
    for index, style in enumerate(found.values()):
        style["marker"] = _MARKERS[index % len(_MARKERS)]
    return found


def _stretch(axis: Any, heights: Sequence[float]) -> None:
    """Points behind the best on a logarithmic scale: rows far below would press the others into one line."""
    best, worst = max(heights), min(heights)
    axis.set_yscale(
        "function",
        functions=(lambda y: -np.log1p(np.maximum(best - y, -_ABOVE)), lambda scaled: best - np.expm1(-scaled)),
    )
    axis.set_ylim(max(0.0, worst - 1), best + _ABOVE)
    ticks = [tick for behind in _BEHIND if (tick := round(best) - behind) >= worst]
    axis.set_yticks(ticks, labels=[str(tick) for tick in ticks])
    axis.minorticks_off()


def _blocks(plt: Any, rows: Sequence[Row]) -> Any:
    """Stacked bars: multiply-adds left in every block, method by method, at the smallest budget."""
    least = min((row.budget for row in rows if row.method != DENSE), default=1.0)
    shown = [row for row in rows if row.budget == least or row.method == DENSE]
    figure, axis = plt.subplots(figsize=(11, 0.34 * len(shown) + 1.6), layout="constrained")
    blocks = list(shown[0].results[0].parent_blocks)
    colours = [plt.cm.viridis(i / max(1, len(blocks) - 1)) for i in range(len(blocks))]
    names = [row.method for row in shown]
    left = [0.0] * len(shown)
    for block, colour in zip(blocks, colours, strict=True):
        parts = [row.results[0].blocks.get(block, 0) / row.results[0].parent_flops for row in shown]
        axis.barh(names, parts, left=left, color=colour if block != "elsewhere" else "lightgrey", label=block)
        left = [a + b for a, b in zip(left, parts, strict=True)]
    axis.invert_yaxis()
    axis.set_xlabel(f"share of the parent's FLOPs, by block; budget {least:.0%}")
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure
