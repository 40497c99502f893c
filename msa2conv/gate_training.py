"""A plain training loop around a gate search: what `convert(..., search="gates")` runs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .conversion import Conversion
from .errors import ArchitectureMismatch, InvalidArgument, InvalidCalibrationData, NonFiniteValue
from .files import read_state, write_state
from .gate_search import Search, prepare
from .plan import weights_sha256
from .progress import track
from .search.gates import Gates
from .search.measure import default_measure, first_tensor
from .workbench import own_randomness, unwrap, working_copy

Loss = Callable[[Tensor, Tensor], Tensor]
STATE_FILE = "search.pt"


@own_randomness()
def train_gates(
    search: Search,
    data: Iterable[Any],
    *,
    epochs: int = 1,
    loss: Loss | None = None,
    lr: float = 1e-4,
    gate_lr: float | None = None,
    seed: int = 0,
    resume: str | os.PathLike[str] | None = None,
    save_every: int = 100,
    progress: bool = True,
) -> Search:
    """Train a prepared search: AdamW, cosine for the weights, constant for the gates, no warm-up.

    Args:
        search: from `prepare(model, target, steps=epochs * len(data))`; trained in place.
        data: something to iterate over once per epoch: a DataLoader, or a list of (images, labels) or of images.
        epochs: passes over it.
        loss: loss(output, labels) -> scalar. None: KL to the original's logits (relative error of features), no labels.
        lr, gate_lr: as for `Search.param_groups`.
        seed: seeds the order of every epoch and the gates; torch's global random state is given back afterwards.
        resume: a folder that holds the state of the search. After a kill the same call continues from the last save (at
            most `save_every` steps back) and, on CPU, ends in the same result.
        save_every: steps between saves; on Ctrl-C or an error the state after the last whole step is saved too.
        progress: show a bar.

    Returns:
        The search given.

    Raises:
        InvalidArgument: `epochs` or `save_every` below 1.
        InvalidCalibrationData: no batches, or an epoch that ends before the others did.
        NonFiniteValue: the loss became NaN or Inf; says at which step. The state before that step is kept.
        ArchitectureMismatch, InvalidCheckpoint: `resume` holds something else.
    """
    _check_counts(epochs=epochs, save_every=save_every)
    steps = epochs * _length(data)
    teacher = working_copy(search.original).requires_grad_(False) if loss is None else None
    optimizer = torch.optim.AdamW(search.param_groups(lr, gate_lr))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, [_cosine(steps), _cosine(steps), lambda step: 1.0])
    path = None if resume is None else Path(resume) / STATE_FILE
    about: dict[str, Any] = {"seed": seed, "steps": steps, "epochs": epochs, "lr": lr, "gate_lr": gate_lr}
    about |= {"gates": search.gates.model_dump(exclude_defaults=True), "model": weights_sha256(search.original)[:12]}
    done, random = 0, None
    if path is not None and path.is_file():
        done, random = _restore(search, optimizer, schedule, path, about)

    def save() -> None:
        if path is not None:
            state = {"search": search.state_dict(), "optimizer": optimizer.state_dict(), "random": before.random}
            write_state(path, {**about, **state, "schedule": schedule.state_dict(), "done": done})

    search.model.train()
    device = next(search.model.parameters()).device
    before, whole = _Before(search), True
    try:
        for images, labels in track(_batches(data, epochs, seed, done, random), "search", progress, steps - done):
            value = _loss(search, teacher, loss, images.to(device), labels) + search.penalty()
            if not torch.isfinite(value):
                raise NonFiniteValue(
                    f"search step {done}", f"a loss of {float(value.detach())}", "a finite loss",
                    "Lower lr; the state before this step is kept.",
                )  # fmt: skip
            optimizer.zero_grad(set_to_none=True)
            value.backward()  # type: ignore[no-untyped-call]
            whole = False
            optimizer.step()
            schedule.step()
            done += 1
            before, whole = _Before(search), True
            if done % save_every == 0:
                save()
    finally:
        if whole:  # else the weights are half a step further: what was saved before stands
            before.restore()
            save()
    return search


class _Before:
    """What the forward pass of a step alters: buffers (BatchNorm's), the budget, the random state."""

    def __init__(self, search: Search) -> None:
        self.search, self.budget, self.random = search, search.budget.state(), torch.get_rng_state()
        self.buffers = [buffer.clone() for buffer in search.model.buffers()]

    def restore(self) -> None:
        self.search.budget.load(self.budget)
        for buffer, value in zip(self.search.model.buffers(), self.buffers, strict=True):
            buffer.copy_(value)


def _check_counts(**counts: Any) -> None:
    for name, count in counts.items():
        if not isinstance(count, int) or count < 1:
            raise InvalidArgument(name, repr(count), "an integer >= 1", f"Leave {name} out for its default.")


def convert_by_gates(
    model: nn.Module,
    flops_target: float | str,
    data: Any,
    gates: Gates,
    *,
    epochs: int,
    prepared: dict[str, Any],
    **training: Any,
) -> Conversion:
    """`prepare`, `train_gates`, `finish`: see `convert`."""
    if data is None:
        raise InvalidArgument(
            "data", "None", "your training images: a DataLoader, or a list of batches",
            "A gate search trains; without your images use search='calibrated'.",
        )  # fmt: skip
    _check_counts(epochs=epochs)
    search = prepare(unwrap(model), flops_target, steps=epochs * _length(data), gates=gates, **prepared)
    train_gates(search, data, epochs=epochs, **training)
    images, _ = _split(next(iter(data)))
    return search.finish(images[:64])


def _length(data: Any) -> int:
    if isinstance(data, Tensor) or not hasattr(data, "__len__"):
        raise InvalidCalibrationData(
            "data", f"a {type(data).__name__}", "something with a length that can be iterated once per epoch",
            "Pass a DataLoader, or a list of (images, labels) batches.",
        )  # fmt: skip
    if len(data) == 0:
        raise InvalidCalibrationData("data", "no batches", "at least one", "Check the dataset and drop_last.")
    return len(data)


def _batches(
    data: Iterable[Any], epochs: int, seed: int, done: int, random: Tensor | None
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """All batches of all epochs from step `done` on, in an order that depends on (seed, epoch) alone."""
    length = _length(data)
    for epoch in range(done // length, epochs):
        _reseed(data, seed + epoch)
        batches, first = iter(data), done - epoch * length if epoch == done // length else 0
        for count in range(length):
            if count == first and count and random is not None:
                torch.set_rng_state(random)  # as after the last step that was saved
            batch = next(batches, None)
            if batch is None:
                raise InvalidCalibrationData(
                    f"data, epoch {epoch + 1}", f"{count} batches", f"{length}, the length of the data",
                    "Pass something that can be iterated more than once, such as a DataLoader.",
                )  # fmt: skip
            if count >= first:
                yield _split(batch)


def _reseed(data: Any, seed: int) -> None:
    torch.manual_seed(seed)
    generator = getattr(data, "generator", None)  # a DataLoader's own, where it was given one
    if isinstance(generator, torch.Generator):
        generator.manual_seed(seed)


def _split(batch: Any) -> tuple[Tensor, Tensor | None]:
    """(images, labels) of a batch: a tensor, or a tuple that starts with one."""
    parts = list(batch) if isinstance(batch, (tuple, list)) else [batch]
    images, labels = parts[0], parts[1] if len(parts) > 1 else None
    if not isinstance(images, Tensor) or images.ndim != 4:
        found = f"a tensor of shape {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
        raise InvalidCalibrationData(
            "data", f"a batch that starts with {found}", "images [b, C, H, W], alone or with labels",
            "Let the loader give (images, labels).",
        )  # fmt: skip
    return images, labels


def _loss(search: Search, teacher: nn.Module | None, loss: Loss | None, images: Tensor, labels: Any) -> Tensor:
    output = first_tensor(search.model(images))
    if loss is not None:
        if not isinstance(labels, Tensor):
            raise InvalidArgument(
                "loss", "a loss for labels, and data without labels", "(images, labels) batches",
                "Give labels, or leave `loss` out to imitate the original.",
            )  # fmt: skip
        return loss(output, labels.to(output.device))
    assert teacher is not None
    with torch.no_grad():
        reference = first_tensor(teacher(images))
    if default_measure(search.original, output) == "kl":
        return F.kl_div(F.log_softmax(output, -1), F.log_softmax(reference, -1), reduction="batchmean", log_target=True)
    return (output - reference).square().mean() / reference.square().mean().clamp_min(1e-12)


def _cosine(steps: int) -> Callable[[int], float]:
    return lambda step: 0.01 + 0.99 * 0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * min(1.0, step / steps)))))


def _restore(search: Search, optimizer: Any, schedule: Any, path: Path, about: dict[str, Any]) -> tuple[int, Tensor]:
    state = read_state(path)
    other = [name for name in about if state.get(name) != about[name]]
    if other:
        raise ArchitectureMismatch(
            str(path), f"a search with {_named(state, other)}", _named(about, other),
            "Pass the same model, data and arguments, or another folder.",
        )  # fmt: skip
    search.load_state_dict(state["search"])
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    random: Tensor = state["random"]
    return int(state["done"]), random


def _named(values: dict[str, Any], names: list[str]) -> str:
    return ", ".join(f"{name} {values.get(name)}" for name in names)
