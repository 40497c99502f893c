"""Give a converted model its accuracy back: `finetune(conversion, train, val) -> Conversion`."""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from ..adapters.weights import downloaded
from ..conversion import Conversion
from ..errors import ArchitectureMismatch, InvalidArgument, WeightsUnavailable
from ..plan import weights_sha256
from ..search.measure import OutputFn
from ..workbench import own_randomness, unwrap
from .data import Batches, OnBadImage
from .lessons import Lessons, changed
from .log import OnFullDisk
from .loop import accelerated, log_of
from .stages import Stage, stages_of
from .trainer import Trainer

if TYPE_CHECKING:
    from accelerate import Accelerator

Precision = Literal["no", "bf16", "fp16"]


@own_randomness()
@torch.enable_grad()
def finetune(
    conversion: Conversion,
    train: Any,
    val: Any = None,
    *,
    teacher: nn.Module | Literal["original"] | None = "original",
    epochs: int = 10,
    stages: Iterable[Stage | str | dict[str, Any]] | None = None,
    labels: bool | None = None,
    batch_size: int | None = None,
    micro_batch: int | None = None,
    lr: float | None = None,
    workers: int = 0,
    precision: Precision | None = None,
    on_bad_image: OnBadImage = "skip",
    on_full_disk: OnFullDisk = "stop",
    max_steps: int | None = None,
    seed: int = 0,
    resume: str | os.PathLike[str] | None = None,
    save_every: int = 500,
    progress: bool = True,
    accelerator: Accelerator | None = None,
    output_fn: OutputFn | None = None,
) -> Conversion:
    """Train a converted model to give it its accuracy back.

    By default every replaced module imitates the original by itself for one epoch; then, for `epochs`, the whole
    network learns from the original's outputs and, where they fit, from the labels.

    Under `accelerate launch` or `torchrun` every process calls it with the same arguments; they share every batch, and
    the result is that of one process (up to rounding, and to what a network draws or normalises over a batch).

    Args:
        conversion: from `convert`, `Search.finish` or `Conversion.load`; it is not touched.
        train: a Dataset of (image, label) or images, normalised as the model expects; a DataLoader; a tensor; or a list
            of batches. See `msa2conv.train.data.Batches`.
        val: the same, of held-out images: after every epoch the network is judged on them, and the best state is
            returned, the one before any training included. None: the last state is returned.
        teacher: "original", the model that was converted; another model with the same classes; or None. The original of
            a conversion that was loaded from a file is asked for here, unless timm can download it.
        epochs: of the last stage, where `stages` is not given.
        stages: what to do, in order: `Stage`s, or kinds ("local", "distill", "labels") with their defaults.
        labels: whether to learn from labels. None: where the data have them and as many classes as the model; the
            report says why not.
        batch_size: images of an optimiser step, over all processes; None: the DataLoader's own, or 64.
        micro_batch: images that a process runs at a time, if a batch does not fit into memory.
        lr: of the stages that do not state theirs; None: what suits their kind.
        workers: processes that read images.
        precision: "bf16" or "fp16" for mixed precision; None: as accelerate is configured.
        on_bad_image: "skip": an image that cannot be read is replaced by another and reported; "stop": an error.
        on_full_disk: when a state or a line of the log cannot be written, "stop" (what was saved before stays whole),
            or "continue" and report it at the end.
        max_steps: end every stage after so many steps, to try a recipe out.
        seed: of the order of images, their augmentation, and dropout. Every step's depend on it and on nothing before,
            whatever augments the images draws from (torch, numpy, `random`).
        resume: a folder for what is done so far and for train_log.jsonl (and TensorBoard's files, if it is installed).
            The same call continues after Ctrl-C, a kill or a power cut, with any number of processes; on a CPU with the
            same number the result is the same bit for bit. Delete it when you are done.
        save_every: steps between saves, beside those after every epoch.
        progress: show bars.
        accelerator: your own, if you need more of accelerate than `precision`.
        output_fn: picks what is imitated of the output, as for `convert`.

    Returns:
        A Conversion with the same plan, the trained model, and `report.training`.

    Raises:
        InvalidArgument, InvalidTrainingData, InvalidCalibrationData: malformed arguments or data.
        ArchitectureMismatch: the original is needed and not known, or `resume` belongs to another training.
        NonFiniteValue: the loss became NaN or Inf, at which step; the state before is kept in `resume`.
        InvalidOutputPath: `resume` cannot be written.
        MissingDependency: accelerate is not installed.

    Example:
        result = msa2conv.convert(model, 0.7, data=train)
        better = msa2conv.finetune(result, train, val, epochs=10)
        better.save("out")
    """
    counts = {"epochs": epochs, "save_every": save_every, "batch_size": batch_size, "micro_batch": micro_batch}
    for name, count in (counts | {"max_steps": max_steps}).items():
        if count is not None and (not isinstance(count, int) or count < 1):
            raise InvalidArgument(name, repr(count), "an integer >= 1", f"Leave {name} out for its default.")
    chosen = stages_of(_usual(conversion, teacher, epochs) if stages is None else stages)
    chosen = tuple(s if s.lr is not None or lr is None else s.model_copy(update={"lr": lr}) for s in chosen)
    taught = isinstance(teacher, str) or any(stage.kind == "local" or stage.anneal for stage in chosen)
    lessons = Lessons(
        conversion, chosen, labels,
        original=original_of(conversion, teacher) if taught else None,
        teacher=teacher if isinstance(teacher, nn.Module) else None,
        imitate=teacher is not None, output_fn=output_fn,
    )  # fmt: skip
    device = next(unwrap(conversion.model).parameters()).device
    with accelerated(device, precision, given=accelerator) as accelerator:
        folder = None if resume is None else Path(resume)
        log = log_of(accelerator, folder, progress, on_full_disk)
        batches = partial(
            Batches, train, batch_size=batch_size, workers=workers, on_bad_image=on_bad_image, max_steps=max_steps,
            rank=accelerator.process_index, ranks=accelerator.num_processes,
        )  # fmt: skip
        trainer = Trainer(lessons, batches, accelerator, log, seed=seed, micro_batch=micro_batch, folder=folder)
        if val is not None:
            trainer.validate_on(val, workers)
        try:
            return trainer.train(save_every)
        finally:
            log.close()


def _usual(conversion: Conversion, teacher: Any, epochs: int) -> list[dict[str, Any]]:
    """One epoch at every site by itself, where there is something to learn, and then all together."""
    if teacher is None:
        return [{"kind": "labels", "epochs": epochs}]
    local: list[dict[str, Any]] = [{"kind": "local"}] if changed(conversion) and isinstance(teacher, str) else []
    return [*local, {"kind": "distill", "epochs": epochs}]


def original_of(conversion: Conversion, given: nn.Module | str | None = None) -> nn.Module:
    """The model that was converted: the Conversion's own, the one given if it has its weights, or timm's download.

    Raises:
        ArchitectureMismatch: none of these.
    """
    base = conversion.plan.base
    if conversion.original is not None:
        return unwrap(conversion.original)
    if isinstance(given, nn.Module) and weights_sha256(unwrap(given)) == base.weights_sha256:
        return unwrap(given)
    found = "none: the conversion was read from a file"
    if base.builder is not None:
        try:
            kwargs: dict[str, Any] = dict(base.builder.kwargs)
            model = downloaded(base.builder.name, **kwargs)
            if weights_sha256(model) == base.weights_sha256:
                return model
            found = f"timm's {base.builder.name}, which has other weights than those that were converted"
        except WeightsUnavailable:
            found = f"no weights of {base.builder.name} that timm can download"
    raise ArchitectureMismatch(
        "original", found, f"the {base.model_class} that was converted, with its weights",
        "Conversion.load(path, original=model), or teacher=None.",
    )  # fmt: skip
