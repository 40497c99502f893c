"""The commands that judge a hybrid: eval and report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.table import Table
from torch import nn

from ..conversion import EVALUATION_FILE, write_report
from ..data import image_folder
from ..evaluate import Accuracy, evaluate, latency
from ..files import write_json
from ..flops import count_flops
from ..plan import Preprocessing, parameter_count
from ..report.evaluation import Evaluation, Measured
from ..report.page import PAGE_FILE, can_draw
from ..search.timetable import described
from ..stopwatch import Samples
from ..storage import load, read_plan
from .models import original_of
from .shown import say, show

Row = tuple[Accuracy, int, nn.Module]


def evaluate_command(
    path: Annotated[Path, typer.Argument(help="Folder or file written by `msa2conv convert`.")],
    images: Annotated[Path, typer.Option(help="ImageFolder: one subfolder per class, in the order of the labels.")],
    original: Annotated[
        Path | None, typer.Option(help="The original's checkpoint, to put it beside the hybrid.")
    ] = None,
    batch_size: int = 32,
    progress: bool = True,
) -> None:
    """Top-1, FLOPs, params and latency of a hybrid, beside the original's where its weights can be had."""
    plan = read_plan(path)
    hybrid = load(path)
    dataset = image_folder(images, plan.base.input_size, plan.base.preprocessing or Preprocessing())
    models: dict[str, nn.Module] = {}
    if original is not None:
        models["original"] = original_of(plan, original)
    models["hybrid"] = hybrid
    example = dataset[0][0][None]
    rows = {
        label: (evaluate(model, dataset, batch_size, progress, label), count_flops(model, example), model)
        for label, model in models.items()
    }
    times = latency({label: model.float() for label, model in models.items()}, example)
    say(_table(rows, times))
    if path.is_dir():
        _keep(path, str(images), rows, times)
    if original is None:
        say(f"[dim]add --original FILE to compare with {plan.base.name} itself[/dim]")


def report(path: Annotated[Path, typer.Argument(help="Folder written by `msa2conv convert`.")]) -> None:
    """Draw report.html and its figures anew, from the figures and plan in the folder; nothing is run."""
    show(f"written to {write_report(path)}")


def _keep(folder: Path, images: str, rows: dict[str, Row], times: dict[int, Samples]) -> None:
    """Put what was measured beside the hybrid, and into its report."""
    models = {
        label: Measured(
            correct=accuracy.correct,
            images=accuracy.total,
            flops=flops,
            parameters=parameter_count(model),
            seconds={batch: samples.timing(label).seconds for batch, samples in times.items()},
        )
        for label, (accuracy, flops, model) in rows.items()
    }
    found = Evaluation(images=images, models=models, device=described(torch.device("cpu")))
    write_json(folder / EVALUATION_FILE, found.model_dump(mode="json"))
    if (folder / PAGE_FILE).is_file() and can_draw():
        show(f"report with these figures: {write_report(folder)}")


def _table(rows: dict[str, Row], times: dict[int, Samples]) -> Table:
    first = next(iter(rows))
    table = Table(title="FLOPs are multiply-adds at batch 1; latency is the median, interleaved")
    for column in ("", "top-1 %", "GFLOPs", "M params", "ms, batch 1", "ms, batch 32"):
        table.add_column(column, justify="right")
    for label, (accuracy, flops, model) in rows.items():
        shown = [f"{1e3 * each.timing(label).seconds:.1f} ({each.ratio(label, first):.2f})" for each in times.values()]
        table.add_row(
            label, f"{accuracy.percent:.2f} ({accuracy.correct}/{accuracy.total})", f"{flops / 1e9:.3f}",
            f"{parameter_count(model) / 1e6:.2f}", *shown,
        )  # fmt: skip
    return table


__all__ = ["evaluate_command", "report"]
