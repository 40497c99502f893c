"""The command line: inspect, convert, eval. Thin over the public functions."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import nn

from . import api
from .adapters.build import build, create, preprocessing
from .cost import count_flops
from .data import image_folder
from .errors import ArchitectureMismatch, InvalidCheckpoint, InvalidOutputPath, Msa2ConvError, WeightsUnavailable
from .evaluate import Accuracy, evaluate, latency
from .files import check_writable, read_state_dict
from .plan import Preprocessing, fingerprint, parameter_count, weights_sha256
from .search.resume import discard
from .storage import load, read_plan

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Turn a trained Vision Transformer into a cheaper MSA/conv hybrid at an exact FLOPs budget.",
)
console = Console()

Name = Annotated[str, typer.Argument(metavar="NAME", help="timm model name, e.g. deit_small_patch16_224")]
Pretrained = Annotated[bool, typer.Option(help="Load timm's pretrained weights.")]
CheckpointFile = Annotated[
    Path | None, typer.Option("--checkpoint", help=".safetensors, or .pth read with weights_only=True.")
]
Classes = Annotated[int | None, typer.Option("--num-classes", help="Default: as in the checkpoint or timm's.")]


class Lever(str, Enum):
    """What may change."""

    mixer = "mixer"
    ffn = "ffn"


@app.command()
def inspect(
    name: Name,
    num_classes: Classes = None,
) -> None:
    """Show every attention found, where the FLOPs are, and which budgets can be reached. Needs no weights."""
    kwargs: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    console.print(str(api.inspect(create(name, **kwargs))), highlight=False, soft_wrap=True)


@app.command()
def convert(
    name: Name,
    flops: Annotated[str, typer.Option(help="Budget: 0.7, 70%, 3.3G or 3.3e9 multiply-adds at batch 1.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the hybrid, its plan, report and card.")],
    pretrained: Pretrained = True,
    checkpoint: CheckpointFile = None,
    num_classes: Classes = None,
    images: Annotated[Path | None, typer.Option(help="ImageFolder to calibrate on; default: shipped photos.")] = None,
    number: Annotated[int, typer.Option("--number", "-n", help="How many calibration images at most.")] = 256,
    lever: Annotated[list[Lever] | None, typer.Option(help="What may change; repeat it. Default: all.")] = None,
    distill_steps: Annotated[int, typer.Option(help="Steps of label-free polish.")] = 0,
    seed: int = 0,
    progress: bool = True,
) -> None:
    """Convert a timm model and write the hybrid to a folder. Interrupted, the same command continues."""
    target = _number(flops)
    if output.suffix == ".safetensors":
        raise InvalidOutputPath(
            str(output), "the name of a file", "a folder, which gets the hybrid, its plan, report and card",
            f"For example {output.with_suffix('')}.",
        )  # fmt: skip
    check_writable(output / "model.safetensors")
    torch.manual_seed(seed)  # the same command means the same model, with --no-pretrained too
    model = _model(name, pretrained and checkpoint is None, checkpoint, num_classes)
    prepared = preprocessing(model) or Preprocessing()
    size = api.inspect(model).input_size
    data = None if images is None else image_folder(images, size, prepared)
    levers = tuple(item.value for item in lever) if lever else ("mixer", "ffn")
    calibrating = output / "calibrating"
    try:
        result = api.convert(
            model,
            target,
            data=data,
            levers=levers,
            images=number,
            distill_steps=distill_steps,
            seed=seed,
            progress=progress,
            resume=calibrating,
        )
        result.save(output)
    except KeyboardInterrupt:
        typer.echo(f"interrupted: the same command continues with what {calibrating}/ holds", err=True)
        raise
    discard(calibrating)
    console.print(str(result), highlight=False, soft_wrap=True)
    console.print(
        f"\nwritten to {output}/   next: msa2conv eval {output} --images DIR", highlight=False, soft_wrap=True
    )


@app.command(name="eval")
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
        models["original"] = _original(plan, original)
    models["hybrid"] = hybrid
    example = dataset[0][0][None]
    rows = {
        label: (evaluate(model, dataset, batch_size, progress, label), count_flops(model, example), model)
        for label, model in models.items()
    }
    times = latency({label: model.float() for label, model in models.items()}, example)
    console.print(_table(rows, times))
    if original is None:
        console.print(f"[dim]add --original FILE to compare with {plan.base.name} itself[/dim]")


def _original(plan: Any, checkpoint: Path) -> nn.Module:
    if plan.base.builder is None:
        raise ArchitectureMismatch(
            str(checkpoint),
            f"a Plan for {plan.base.model_class} without a builder",
            "a timm model",
            "Evaluate in Python.",
        )
    model = build(plan.base.builder)
    _load_weights(model, checkpoint)
    if weights_sha256(model) != plan.base.weights_sha256:
        console.print(f"[yellow]warning:[/yellow] {checkpoint} holds other weights than those that were converted")
    return model.eval()


def _model(name: str, pretrained: bool, checkpoint: Path | None, num_classes: int | None) -> nn.Module:
    kwargs: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    if checkpoint is not None:
        state = read_state_dict(checkpoint)
        head = state.get("head.weight", state.get("head.fc.weight"))
        if head is not None and num_classes is None:
            kwargs["num_classes"] = head.shape[0]
        model = create(name, **kwargs)
        _load_weights(model, checkpoint, state)
        return model.eval()
    create(name)  # an unknown name is told apart from missing weights
    try:
        return create(name, pretrained=pretrained, **kwargs).eval()
    except Msa2ConvError:
        raise
    except Exception as error:  # timm and its hub client raise many kinds when there is no network
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise WeightsUnavailable(
            name,
            f"no pretrained weights ({reason})",
            "weights that timm can download or has cached",
            "Go online once, or pass --checkpoint FILE, or --no-pretrained for random weights.",
        ) from error


def _load_weights(model: nn.Module, checkpoint: Path, state: dict[str, torch.Tensor] | None = None) -> None:
    state = read_state_dict(checkpoint) if state is None else state
    own = model.state_dict()
    wrong = [key for key in sorted(own.keys() | state.keys()) if key not in own or key not in state]
    wrong += [key for key in own if key in state and own[key].shape != state[key].shape]
    if wrong:
        raise InvalidCheckpoint(
            str(checkpoint),
            f"keys that do not fit {type(model).__name__}: {', '.join(wrong[:3])}",
            f"the {len(own)} tensors of this architecture (fingerprint {fingerprint(model)[:12]})",
            "Check the model name and --num-classes.",
        )
    model.load_state_dict({name: value.to(own[name].dtype) for name, value in state.items()})


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _table(rows: dict[str, tuple[Accuracy, int, nn.Module]], times: dict[str, dict[int, float]]) -> Table:
    first = next(iter(rows))
    table = Table(title="FLOPs are multiply-adds at batch 1; latency is the median, interleaved")
    for column in ("", "top-1 %", "GFLOPs", "M params", "ms, batch 1", "ms, batch 32"):
        table.add_column(column, justify="right")
    for label, (accuracy, flops, model) in rows.items():
        ratio = [times[label][batch] / times[first][batch] for batch in (1, 32)]
        shown = [f"{1e3 * times[label][batch]:.1f} ({r:.2f})" for batch, r in zip((1, 32), ratio, strict=True)]
        table.add_row(
            label, f"{accuracy.percent:.2f} ({accuracy.correct}/{accuracy.total})", f"{flops / 1e9:.3f}",
            f"{parameter_count(model) / 1e6:.2f}", *shown,
        )  # fmt: skip
    return table


__all__ = ["app"]
