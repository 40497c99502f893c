"""The commands that train."""

from __future__ import annotations

import shutil
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from ..adapters.build import create
from ..adapters.weights import downloaded, from_checkpoint
from ..conversion import Conversion
from ..data import transform
from ..data.sources import images_at
from ..errors import InvalidArgument
from ..files import check_writable
from ..folding import fold_norms
from ..plan import Preprocessing
from ..storage import read_plan
from ..train.augment import training_transform
from ..train.finetune import finetune as finetune_
from ..train.head import reset_head as with_new_head
from ..train.loop import main_process
from ..train.recipe import read_recipe
from ..train.run_recipe import run_recipe
from .models import original_of
from .shown import show

Images = Annotated[
    str, typer.Option(metavar="DIR", help="Folder of classes, torch/NAME:ROOT, or a Hugging Face dataset on disk.")
]


class Precision(str, Enum):
    """Of the arithmetic."""

    no = "no"
    bf16 = "bf16"
    fp16 = "fp16"


class OnFullDisk(str, Enum):
    """What to do when the state of the training cannot be written."""

    stop = "stop"
    continue_ = "continue"


class OnBadImage(str, Enum):
    """What to do about an image that cannot be read."""

    skip = "skip"
    stop = "stop"


def finetune(
    path: Annotated[Path, typer.Argument(help="Folder written by `msa2conv convert`.")],
    train: Images,
    val: Annotated[
        str | None, typer.Option(metavar="DIR", help="Held-out images; the best epoch on them is kept.")
    ] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Default: PATH/finetuned.")] = None,
    epochs: Annotated[int, typer.Option(help="Passes over the images, beside one for every site by itself.")] = 10,
    stages: Annotated[str | None, typer.Option(help="Instead: kinds in order, e.g. local,distill=10,labels=2.")] = None,
    teacher: Annotated[
        str, typer.Option(help="original, none, or the name of a timm model of the same classes.")
    ] = "original",
    original: Annotated[Path | None, typer.Option(help="The original's checkpoint; default: timm's weights.")] = None,
    teacher_checkpoint: Annotated[Path | None, typer.Option(help="Weights of another teacher.")] = None,
    labels: Annotated[bool | None, typer.Option(help="Default: where their classes are the model's.")] = None,
    reset_head: Annotated[bool, typer.Option(help="Train a new classifier for the classes of the images.")] = False,
    fold: Annotated[
        bool, typer.Option(help="Fold BatchNorms of convolutions afterwards (it cannot learn on).")
    ] = False,
    batch_size: Annotated[int, typer.Option(help="Images of a step, over all processes.")] = 64,
    micro_batch: Annotated[int | None, typer.Option(help="Images at a time, where memory is short.")] = None,
    lr: Annotated[float | None, typer.Option(help="Default: 3e-4 local, 5e-5 distill, 2e-5 labels.")] = None,
    augment: Annotated[
        str | None, typer.Option(help="timm's policy, e.g. rand-m9-mstd0.5-inc1. Default: crops, flips.")
    ] = None,
    precision: Annotated[Precision | None, typer.Option(help="Default: as accelerate is configured.")] = None,
    workers: Annotated[int, typer.Option(help="Processes that read images.")] = 2,
    on_bad_image: OnBadImage = OnBadImage.skip,
    on_full_disk: OnFullDisk = OnFullDisk.stop,
    max_steps: Annotated[int | None, typer.Option(help="End every stage after so many steps.")] = None,
    save_every: Annotated[int, typer.Option(help="Steps between saves.")] = 500,
    seed: int = 0,
    resume: Annotated[bool, typer.Option(help="Continue an interrupted run of this command.")] = True,
    progress: bool = True,
) -> None:
    """Train a hybrid to give it its accuracy back. Interrupted, the same command continues."""
    output = path / "finetuned" if output is None else output
    check_writable(output / "model.safetensors")
    chosen = None if stages is None else [_stage(text) for text in stages.split(",")]
    plan = read_plan(path)
    conversion = Conversion.load(path, original=None if original is None else original_of(plan, original))
    prepared, size = plan.base.preprocessing or Preprocessing(), plan.base.input_size
    policy: dict[str, Any] = {} if augment is None else {"auto_augment": augment}
    images = images_at(train, training_transform(size, prepared, **policy))
    held_out = None if val is None else images_at(val, transform(size, prepared), "val")
    if reset_head:
        conversion = with_new_head(conversion, _count(images, train), seed)
    training = output / "training"
    if not resume and main_process():
        shutil.rmtree(training, ignore_errors=True)
    try:
        result = finetune_(
            conversion,
            images,
            held_out,
            teacher=_teacher(teacher, teacher_checkpoint),
            epochs=epochs,
            stages=chosen,
            labels=labels,
            batch_size=batch_size,
            micro_batch=micro_batch,
            lr=lr,
            workers=workers,
            precision=None if precision is None else precision.value,
            on_bad_image=on_bad_image.value,
            on_full_disk=on_full_disk.value,
            max_steps=max_steps,
            seed=seed,
            resume=training,
            save_every=save_every,
            progress=progress,
        )
    except KeyboardInterrupt:
        typer.echo(f"interrupted: the same command continues with what {training}/ holds", err=True)
        raise
    if not main_process():
        return
    result = fold_norms(result) if fold else result
    result.save(output)
    keep_log(training, output)
    show(result)
    show(f"\nwritten to {output}/   next: msa2conv eval {output} --images DIR")


def train(
    recipe: Annotated[Path, typer.Argument(help="A YAML file, such as recipes/imagenet/deit_tiny.yaml.")],
    variant: Annotated[str, typer.Option(help="Which of those in the file.")],
    train: Images,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the trained hybrid.")],
    val: Annotated[
        str | None, typer.Option(metavar="DIR", help="Held-out images; the best epoch on them is kept.")
    ] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Weights of the model, instead of timm's.")] = None,
    pretrained: Annotated[
        bool | None, typer.Option(help="--no-pretrained: random weights, to try a recipe out.")
    ] = None,
    teacher: Annotated[str | None, typer.Option(help="timm's name, for --teacher-checkpoint.")] = None,
    teacher_checkpoint: Annotated[Path | None, typer.Option(help="Weights of the recipe's teacher.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Instead of the recipe's; learning rates stay.")] = None,
    micro_batch: Annotated[int | None, typer.Option(help="Images at a time, where memory is short.")] = None,
    workers: Annotated[int, typer.Option(help="Processes that read images.")] = 4,
    max_steps: Annotated[int | None, typer.Option(help="End search and stages after so many steps.")] = None,
    seed: int = 0,
    progress: bool = True,
) -> None:
    """Convert and train as a recipe says. Interrupted, the same command continues."""
    stated = read_recipe(recipe, variant)
    if teacher_checkpoint is not None and teacher is None:
        teacher = stated.finetune.teacher
    try:
        result = run_recipe(
            stated,
            train,
            val,
            output,
            checkpoint=checkpoint,
            teacher_model=None if teacher is None else _teacher(teacher, teacher_checkpoint),
            pretrained=pretrained,
            workers=workers,
            max_steps=max_steps,
            batch_size=batch_size,
            micro_batch=micro_batch,
            seed=seed,
            progress=progress,
        )
    except KeyboardInterrupt:
        typer.echo(f"interrupted: the same command continues with what {output}/ holds", err=True)
        raise
    if main_process():
        show(result)
        show(f"\nwritten to {output}/   next: msa2conv eval {output} --images DIR")


def keep_log(training: Path, output: Path) -> None:
    """The log moves beside the result; the state, which is large, goes."""
    for name in ("train_log.jsonl", "tensorboard"):
        if (training / name).exists():
            target = output / name
            if target.is_dir():
                shutil.rmtree(target)
            shutil.move(str(training / name), target)
    shutil.rmtree(training, ignore_errors=True)


def _stage(text: str) -> dict[str, Any]:
    kind, _, epochs = text.strip().partition("=")
    if epochs and not epochs.isdigit():
        raise InvalidArgument("--stages", repr(text), "KIND or KIND=EPOCHS", "For example local,distill=10,labels=2.")
    return {"kind": kind, **({"epochs": int(epochs)} if epochs else {})}


def _teacher(name: str, checkpoint: Path | None) -> Any:
    if name in ("original", "none"):
        return None if name == "none" else "original"
    if checkpoint is not None:
        return from_checkpoint(name, checkpoint)
    create(name)  # an unknown name is told apart from missing weights
    return downloaded(name, "pass --teacher-checkpoint FILE")


def _count(images: Any, where: str) -> int:
    classes = getattr(images, "classes", None)
    if not classes:
        raise InvalidArgument(where, "images without classes", "labelled images", "Leave --reset-head out.")
    return len(classes)
