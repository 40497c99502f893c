"""The command line: inspect, convert, sweep, finetune, train, export, eval, report. Thin over the public functions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

from .. import api, tradeoff
from ..adapters.build import create, preprocessing
from ..conversion import Conversion
from ..data import transform
from ..data.sources import images_at
from ..errors import InvalidArgument, InvalidOutputPath
from ..exporting import export_onnx, export_program
from ..files import check_writable
from ..folding import streamline
from ..inspection import Inspection
from ..plan import Preprocessing
from ..search.calibration import Calibration
from ..search.resume import discard
from ..tradeoff import TARGETS
from ..workbench import usable_device
from .evaluate import evaluate_command, report
from .models import named
from .shown import show
from .train import finetune, train

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Turn a trained Vision Transformer into a cheaper MSA/conv hybrid at an exact FLOPs budget.",
)

Name = Annotated[str, typer.Argument(metavar="NAME", help="timm model name, e.g. deit_small_patch16_224")]
Pretrained = Annotated[bool, typer.Option(help="Load timm's pretrained weights.")]
CheckpointFile = Annotated[
    Path | None, typer.Option("--checkpoint", help=".safetensors, or .pth read with weights_only=True.")
]
Classes = Annotated[int | None, typer.Option("--num-classes", help="Default: as in the checkpoint or timm's.")]


Images = Annotated[
    Path | None,
    typer.Option(help="Folder of images, or of a subfolder per class, to calibrate on; default: shipped."),
]
Number = Annotated[int, typer.Option("--number", "-n", help="How many calibration images at most.")]


class Lever(str, Enum):
    """What may change."""

    mixer = "mixer"
    ffn = "ffn"
    linear_ffn = "linear_ffn"
    merge_in_site = "merge_in_site"
    thin_attention = "thin_attention"
    merge_tokens = "merge_tokens"
    width = "width"


Levers = Annotated[list[Lever] | None, typer.Option(help="What may change; repeat it.")]


@app.command()
def inspect(
    name: Name,
    num_classes: Classes = None,
) -> None:
    """Show every attention found, where the FLOPs are, and which budgets can be reached. Needs no weights."""
    kwargs: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    show(api.inspect(create(name, **kwargs)))


@app.command()
def convert(
    name: Name,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the hybrid, its plan, report and card.")],
    flops: Annotated[str | None, typer.Option(help="Budget: 0.7, 70%, 3.3G or 3.3e9 multiply-adds at batch 1.")] = None,
    latency: Annotated[
        str | None,
        typer.Option(help="Budget of time: 0.7 or 70% of the original's, 4ms or 800us; alone or beside FLOPs."),
    ] = None,
    device: Annotated[str, typer.Option(help="Where it is calibrated, timed and will run: cpu, cuda, cuda:1.")] = "cpu",
    batch_size: Annotated[int, typer.Option(help="Images in a batch, for --latency.")] = 1,
    timetable: Annotated[Path | None, typer.Option(help="File that keeps measured times for further runs.")] = None,
    pretrained: Pretrained = True,
    checkpoint: CheckpointFile = None,
    num_classes: Classes = None,
    images: Images = None,
    number: Number = 256,
    lever: Levers = None,
    calibration: Annotated[
        Path | None, typer.Option(help="What `msa2conv sweep` wrote for this model: then nothing is measured again.")
    ] = None,
    distill_steps: Annotated[int, typer.Option(help="Steps of label-free polish.")] = 0,
    seed: int = 0,
    progress: bool = True,
) -> None:
    """Convert a timm model and write the hybrid to a folder. Interrupted, the same command continues."""
    target = None if flops is None else _number(flops)
    if output.suffix == ".safetensors":
        raise InvalidOutputPath(
            str(output), "the name of a file", "a folder, which gets the hybrid, its plan, report and card",
            f"For example {output.with_suffix('')}.",
        )  # fmt: skip
    check_writable(output / "model.safetensors")
    where = usable_device(device)
    model, data, seen = _prepared(name, pretrained, checkpoint, num_classes, images, seed)
    model = model.to(where)
    known = None if calibration is None else Calibration.load(calibration, seen.claims)
    with _resumable(output / "calibrating") as calibrating:
        result = api.convert(
            model,
            target,
            latency_target=None if latency is None else _number(latency),
            batch_size=batch_size,
            timetable=timetable,
            data=data,
            levers=_levers(lever),
            calibration=known,
            images=number,
            distill_steps=distill_steps,
            seed=seed,
            progress=progress,
            resume=calibrating,
        )
        result.save(output)
    show(result)
    show(f"\nwritten to {output}/   next: msa2conv eval {output} --images DIR")


@app.command()
def sweep(
    name: Name,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the figures and every plan.")],
    flops: Annotated[list[str] | None, typer.Option(help="A budget, as of `convert`; repeat it.")] = None,
    pretrained: Pretrained = True,
    checkpoint: CheckpointFile = None,
    num_classes: Classes = None,
    images: Images = None,
    number: Number = 256,
    lever: Levers = None,
    seed: int = 0,
    progress: bool = True,
) -> None:
    """Plan many budgets of a timm model and show what each would cost. Interrupted, the same command continues."""
    check_writable(output / "sweep.json")
    targets = [_number(text) for text in flops] if flops else TARGETS
    model, data, _ = _prepared(name, pretrained, checkpoint, num_classes, images, seed)
    with _resumable(output / "calibrating") as calibrating:
        found = tradeoff.sweep(
            model,
            targets,
            data=data,
            levers=_levers(lever),
            images=number,
            seed=seed,
            progress=progress,
            resume=calibrating,
        )
        found.calibration.save(output / "calibration.safetensors")
        found.save(output)
    show(found)
    again = f"msa2conv convert {name} --flops {targets[0]} --calibration {output / 'calibration.safetensors'}"
    show(f"\nwritten to {output}/   next: {again} -o out/")


app.command()(finetune)
app.command()(train)


@app.command()
def export(
    path: Annotated[Path, typer.Argument(help="Folder or file written by `msa2conv convert`.")],
    onnx: Annotated[Path | None, typer.Option(help="File to write for onnxruntime, TensorRT, OpenVINO...")] = None,
    program: Annotated[Path | None, typer.Option(help="File (.pt2) to write for torch.export.load.")] = None,
    dynamic_batch: Annotated[bool, typer.Option(help="Let the batch have any size, not one image.")] = False,
    fp16: Annotated[bool, typer.Option(help="ONNX in half precision.")] = False,
    opset: Annotated[int | None, typer.Option(help="Of ONNX; default: PyTorch's choice.")] = None,
    exact_passes: Annotated[bool, typer.Option("--streamline/--as-it-is", help="Apply `msa2conv.streamline`.")] = True,
) -> None:
    """Write a hybrid as ONNX or as a PyTorch program, neither of which needs msa2conv, and check it on photos."""
    if onnx is None and program is None:
        raise InvalidArgument(
            "export", "neither --onnx nor --program", "a file to write", "For example --onnx out.onnx."
        )
    hybrid = Conversion.load(path)
    if exact_passes:
        hybrid = streamline(hybrid)
        for name, sites in hybrid.report.streamlined.items():
            show(f"{name}: {sites} sites")
    example = torch.zeros(1, *hybrid.plan.base.input_size)
    if onnx is not None:
        show(export_onnx(hybrid, onnx, example_inputs=example, dynamic_batch=dynamic_batch, half=fp16, opset=opset))
    if program is not None:
        show(export_program(hybrid, program, example_inputs=example, dynamic_batch=dynamic_batch))


app.command(name="eval")(evaluate_command)
app.command()(report)


def _prepared(
    name: str,
    pretrained: bool,
    checkpoint: Path | None,
    num_classes: int | None,
    images: Path | None,
    seed: int,
) -> tuple[nn.Module, Any, Inspection]:
    """The model, its calibration images (None: those shipped), and what is seen in it."""
    torch.manual_seed(seed)  # the same command means the same model, with --no-pretrained too
    model = named(name, pretrained and checkpoint is None, checkpoint, num_classes)
    seen, known = api.inspect(model), preprocessing(model) or Preprocessing()
    data = None if images is None else images_at(images, transform(seen.input_size, known))
    return model, data, seen


@contextmanager
def _resumable(folder: Path) -> Iterator[Path]:
    """A folder for what is done so far, which goes when all of it is."""
    try:
        yield folder
    except KeyboardInterrupt:
        typer.echo(f"interrupted: the same command continues with what {folder}/ holds", err=True)
        raise
    discard(folder)


def _levers(chosen: list[Lever] | None) -> tuple[str, ...] | None:
    return tuple(item.value for item in chosen) if chosen else None


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


__all__ = ["app"]
