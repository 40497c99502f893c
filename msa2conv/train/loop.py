"""The training loop of gate search and fine-tuning, from one CPU to many GPUs, through Hugging Face accelerate."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..errors import InvalidArgument, MissingDependency, NonFiniteValue
from .data import Batches, seed_all
from .log import Log, OnFullDisk

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass
class Task:
    """One training.

    Args:
        name: for bars, logs and errors.
        objective: holds what learns; forward(images, labels or None) -> {"loss": what to descend, parts to log}.
        optimizer: of its parameters.
        batches: what it sees.
        schedule: called with the number of a step before it is made; sets the learning rates.
        after_step: called after every optimiser step, for averages of the weights and the like.
        guard: called before every step; what it returns undoes what a forward pass alters (buffers, by default).
        clip: largest norm of the gradient, None for any.
        micro_batch: images per forward pass of a process; gradients are summed up to a whole batch.
        random_per_rank: False: every process draws the same random numbers (gates, dropout).
        advice: what to do about a loss that is not finite.
    """

    name: str
    objective: nn.Module
    optimizer: torch.optim.Optimizer
    batches: Batches
    schedule: Callable[[int], None] = lambda step: None
    after_step: Callable[[int], None] = lambda step: None
    guard: Callable[[], Callable[[], None]] | None = None
    clip: float | None = None
    micro_batch: int | None = None
    random_per_rank: bool = True
    advice: str = "Lower lr."
    _wrapped: nn.Module | None = field(default=None, init=False)


@contextmanager
def accelerated(
    device: torch.device, precision: str | None = None, find_unused: bool = False, given: Accelerator | None = None
) -> Iterator[Accelerator]:
    """The Accelerator to train with: the one given, or one for this process as `accelerate launch` has set it up.

    Args:
        device: where the model is; a process that is alone stays there.
        precision: "no", "bf16" or "fp16"; None: as accelerate is configured.
        find_unused: some parameters may get no gradient in a step.
        given: the user's own.

    Raises:
        MissingDependency: accelerate is not installed.
        InvalidArgument: it is set up for a way of sharing parameters that is not supported.
    """
    try:
        from accelerate import Accelerator, DistributedDataParallelKwargs, DistributedType
        from accelerate.state import AcceleratorState
    except ImportError as error:
        raise MissingDependency(
            "training", "no accelerate", "Hugging Face accelerate", "pip install 'msa2conv[train]'"
        ) from error
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    ours = given is None and alone and not AcceleratorState._shared_state
    if given is None:
        given = Accelerator(
            mixed_precision=precision,
            cpu=device.type == "cpu" and (alone or not torch.cuda.is_available()),
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=find_unused)],
        )
    allowed = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
    if given.distributed_type not in allowed or given.gradient_accumulation_steps != 1:
        raise InvalidArgument(
            "accelerate", f"{given.distributed_type.value}, gradients accumulated over "
            f"{given.gradient_accumulation_steps} steps", "one process, or DDP on CPUs or GPUs, without accumulation",
            "Run `accelerate config` again; micro_batch accumulates gradients within a step.",
        )  # fmt: skip
    try:
        yield given
    finally:
        if ours:  # else a later call in this process could not choose another precision or device
            AcceleratorState._reset_state(reset_partial_state=True)


def run(
    task: Task,
    accelerator: Accelerator,
    log: Log,
    *,
    done: int = 0,
    stop: int | None = None,
    save: Callable[[int], None] | None = None,
    save_every: int = 500,
) -> None:
    """Train from step `done` to step `stop` (the end).

    Random numbers of a step (dropout, gates, mixing of images) depend on (seed, step, process) alone, so that a run
    that was interrupted goes on as if it had not been.

    Args:
        task: what to train, in place.
        accelerator, log: see `accelerated` and `Log`.
        save: called with the number of steps done, every `save_every` steps, and on Ctrl-C or an error with the state
            after the last whole step; not at the end.

    Raises:
        NonFiniteValue: the loss became NaN or Inf; weights and buffers are those before that step.
    """
    if task._wrapped is None:
        task._wrapped = accelerator.prepare_model(task.objective)
        task.optimizer = accelerator.prepare_optimizer(task.optimizer)
    objective, optimizer, device = task._wrapped, task.optimizer, accelerator.device
    stop = task.batches.steps if stop is None else stop
    guard = task.guard or (lambda: remembered_buffers(task.objective))
    rank = accelerator.process_index if task.random_per_rank else 0
    undo, whole = guard(), True
    try:
        with log.bar(task.name, task.batches.steps, done) as bar:
            for step, (images, labels) in zip(range(done, stop), task.batches(done), strict=False):
                seed_all(task.batches.seed, step, rank)
                task.schedule(step)
                parts = _forward_backward(task, accelerator, objective, images.to(device), labels, step)
                if task.clip is not None:
                    accelerator.clip_grad_norm_(objective.parameters(), task.clip)
                whole = False
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                task.after_step(step)
                done = step + 1
                undo, whole = guard(), True
                bar.update(len(images) * accelerator.num_processes, parts, optimizer.param_groups[0]["lr"], done)
                if save is not None and done % save_every == 0:
                    save(done)
    except BaseException:
        optimizer.zero_grad(set_to_none=True)
        if whole:  # else the weights are half a step further: what was saved before stands
            undo()
            if save is not None:
                save(done)
        raise


def _forward_backward(
    task: Task, accelerator: Accelerator, objective: nn.Module, images: Tensor, labels: Tensor | None, step: int
) -> dict[str, Tensor]:
    micro = task.micro_batch or len(images)
    count = -(-len(images) // micro)
    total: dict[str, Tensor] = {}
    for index in range(count):
        at = slice(index * micro, (index + 1) * micro)
        share = len(images[at]) / len(images)
        with nullcontext() if index + 1 == count else accelerator.no_sync(objective):
            parts = objective(images[at], None if labels is None else labels[at].to(images.device))
            value = parts["loss"]
            if not torch.isfinite(value):
                raise NonFiniteValue(
                    f"{task.name} step {step}", f"a loss of {float(value.detach())}", "a finite loss",
                    f"{task.advice[:-1]}; the state before this step is kept.",
                )  # fmt: skip
            accelerator.backward(share * value)
        for name, part in parts.items():
            total[name] = total.get(name, torch.zeros((), device=part.device)) + share * part.detach()
    return total


def remembered_buffers(module: nn.Module) -> Callable[[], None]:
    """Remember the buffers (BatchNorm's statistics); call the answer to bring them back."""
    before = [buffer.clone() for buffer in module.buffers()]

    def undo() -> None:
        for buffer, value in zip(module.buffers(), before, strict=True):
            buffer.copy_(value)

    return undo


def main_process() -> bool:
    """Whether this process writes files and prints: the only one, or the first of those that were launched together."""
    return int(os.environ.get("RANK", "0")) == 0


def log_of(accelerator: Accelerator, folder: Path | None, show: bool, on_full_disk: OnFullDisk = "stop") -> Log:
    """Of all processes together, written by the first."""

    def mean(value: Tensor) -> Tensor:
        reduced: Tensor = accelerator.reduce(value, "mean")
        return reduced

    return Log(folder, show=show, main=accelerator.is_main_process, mean=mean, on_full_disk=on_full_disk)
