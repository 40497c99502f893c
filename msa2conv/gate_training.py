"""A plain training loop around a gate search: what `convert(..., search="gates")` runs."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .conversion import Conversion
from .errors import ArchitectureMismatch, InvalidArgument
from .files import read_state, write_state
from .gate_search import Search, prepare
from .plan import weights_sha256
from .search.gates import Gates
from .search.measure import default_measure, first_tensor
from .train.data import Batches
from .train.log import Log
from .train.loop import Task, accelerated, log_of, remembered_buffers, run
from .workbench import own_randomness, unwrap, working_copy

Loss = Callable[[Tensor, Tensor], Tensor]
STATE_FILE = "search.pt"


@own_randomness()
def train_gates(
    search: Search,
    data: Any,
    *,
    epochs: int = 1,
    loss: Loss | None = None,
    lr: float = 1e-4,
    gate_lr: float | None = None,
    seed: int = 0,
    resume: str | os.PathLike[str] | None = None,
    save_every: int = 100,
    progress: bool = True,
    same_gates: bool = False,
) -> Search:
    """Train a prepared search: AdamW, cosine for the weights, constant for the gates, no warm-up.

    Args:
        search: from `prepare(model, target, steps=epochs * len(data))`; trained in place.
        data: a DataLoader or Dataset, or a list of batches, of (images, labels) or of images, as for `finetune`.
        epochs: passes over it.
        loss: loss(output, labels) -> scalar. None: KL to the original's logits (relative error of features), no labels.
        lr, gate_lr: as for `Search.param_groups`.
        seed: seeds the order of every epoch and the gates; torch's global random state is given back afterwards.
        resume: a folder that holds the state of the search. After a kill the same call continues from the last save (at
            most `save_every` steps back) and, on CPU, ends in the same result.
        save_every: steps between saves; on Ctrl-C or an error the state after the last whole step is saved too.
        progress: show a bar.
        same_gates: of several processes (`accelerate launch`), which share every batch, all draw the same gates. By
            default each draws its own, as in the paper's code: more networks are tried in a step.

    Returns:
        The search given.

    Raises:
        InvalidArgument: `epochs` or `save_every` below 1.
        InvalidCalibrationData: no batches, or an epoch that ends before the others did.
        NonFiniteValue: the loss became NaN or Inf; says at which step. The state before that step is kept.
        ArchitectureMismatch, InvalidCheckpoint: `resume` holds something else.
    """
    _check_counts(epochs=epochs, save_every=save_every)
    model = search.model
    with accelerated(next(model.parameters()).device, find_unused=search.gates.skip_inactive) as accelerator:
        ranks = {"rank": accelerator.process_index, "ranks": accelerator.num_processes}
        batches = Batches(data, epochs=epochs, seed=seed, **ranks)
        teacher = working_copy(search.original).requires_grad_(False).to(accelerator.device) if loss is None else None
        optimizer = torch.optim.AdamW(search.param_groups(lr, gate_lr))
        about: dict[str, Any] = {"seed": seed, "steps": batches.steps, "epochs": epochs, "lr": lr, "gate_lr": gate_lr}
        about |= {
            "gates": search.gates.model_dump(exclude_defaults=True),
            "model": weights_sha256(search.original)[:12],
        }
        task = Task(
            "search", _Objective(search, teacher, loss), optimizer, batches, _cosine(optimizer, batches.steps),
            guard=partial(remembered, search), random_per_rank=not same_gates,
        )  # fmt: skip
        run_search(search, task, accelerator, about, resume, save_every, progress)
    return search


def run_search(
    search: Search,
    task: Task,
    accelerator: Any,
    about: dict[str, Any],
    resume: str | os.PathLike[str] | None,
    save_every: int,
    progress: bool,
) -> None:
    """Train the supernet of a search, from where an interrupted run left off.

    Args:
        search: trained in place.
        task: what to do.
        accelerator: see `accelerated`.
        about: plain values; a state that was saved with others is not continued.
        resume, save_every, progress: as for `train_gates`.
    """
    folder = None if resume is None else Path(resume)
    log = log_of(accelerator, folder, progress)
    path = None if folder is None else folder / STATE_FILE
    done = 0 if path is None or not path.is_file() else _restore(search, task.optimizer, log, path, about)

    def save(steps: int) -> None:
        if path is not None and accelerator.is_main_process:
            state = {"search": search.state_dict(), "optimizer": task.optimizer.state_dict(), "lines": log.lines}
            write_state(path, {**about, **state, "done": steps})

    search.model.train()
    try:
        run(task, accelerator, log, done=done, save=save, save_every=save_every)
        save(task.batches.steps)
    finally:
        search.curve = log.lines
        log.close()


class _Objective(nn.Module):
    """The loss of a supernet, and the penalty of its gates."""

    def __init__(self, search: Search, teacher: nn.Module | None, loss: Loss | None) -> None:
        super().__init__()
        self.model = search.model
        self._rest = (search, teacher, loss)  # in a tuple: the teacher's weights do not learn

    def forward(self, images: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        search, teacher, loss = self._rest
        value = _loss(search, teacher, loss, images, labels)
        with torch.autocast(images.device.type, enabled=False):
            penalty = search.penalty()
        return {"loss": value + penalty, "penalty": penalty}


def remembered(search: Search) -> Callable[[], None]:
    """Remember what the forward pass of a step alters: buffers (BatchNorm's), and the budget."""
    undo, budget = remembered_buffers(search.model), search.budget.state()

    def back() -> None:
        undo()
        search.budget.load(budget)

    return back


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
    search = prepare(unwrap(model), flops_target, steps=Batches(data, epochs=epochs).steps, gates=gates, **prepared)
    train_gates(search, data, epochs=epochs, **training)
    return search.finish(Batches(data).probe(64))


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


def _cosine(optimizer: torch.optim.Optimizer, steps: int) -> Callable[[int], None]:
    """Weights by a cosine down to a hundredth, gates constant: the groups of `Search.param_groups`."""
    rates = [float(group["lr"]) for group in optimizer.param_groups[:2]]

    def schedule(step: int) -> None:
        factor = 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group, rate in zip(optimizer.param_groups, rates, strict=False):
            group["lr"] = factor * rate

    return schedule


def _restore(search: Search, optimizer: Any, log: Log, path: Path, about: dict[str, Any]) -> int:
    state = read_state(path)
    other = [name for name in about if state.get(name) != about[name]]
    if other:
        raise ArchitectureMismatch(
            str(path), f"a search with {_named(state, other)}", _named(about, other),
            "Pass the same model, data and arguments, or another folder.",
        )  # fmt: skip
    search.load_state_dict(state["search"])
    optimizer.load_state_dict(state["optimizer"])
    log.resume(state["lines"])
    return int(state["done"])


def _named(values: dict[str, Any], names: list[str]) -> str:
    shown = {name: str(values.get(name)) for name in names}
    return ", ".join(f"{name} {text}" if len(text) < 80 else f"another {name}" for name, text in shown.items())
