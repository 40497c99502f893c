"""The paper's search as it was run, and the hybrid from which its fine-tuning starts."""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW

from ..conversion import Conversion, decided_report
from ..flops import count_flops
from ..gate_search import Search
from ..gate_training import remembered, run_search
from ..plan import weights_sha256
from ..search.measure import first_tensor
from ..train.data import Batches
from ..train.loop import Task, accelerated
from ..train.objectives import Mix, checked
from ..train.optimize import mixup
from ..train.stages import Stage
from ..transforms.apply import apply
from ..workbench import own_randomness, working_copy
from .recipe import Recipe
from .search import finetune_plan, optimizers


@own_randomness()
@torch.enable_grad()
def train(
    search: Search,
    recipe: Recipe,
    data: Any,
    *,
    batch_size: int | None = None,
    micro_batch: int | None = None,
    clip: float | None = None,
    workers: int = 0,
    precision: str | None = None,
    max_steps: int | None = None,
    seed: int = 0,
    resume: str | os.PathLike[str] | None = None,
    save_every: int = 500,
    progress: bool = True,
) -> Search:
    """Run the paper's search: constant rates, mixed images, cross entropy plus the fixed penalty.

    Args:
        search: from `spvit.prepare(model, recipe)`; trained in place.
        recipe: its schedule, rates and mixing count. It ends after `picked_epoch`, where there is one.
        data: a Dataset of (image, label), as for `finetune`; augmented as `recipe.augmentation` says.
        batch_size: images of a step over all processes; None: the recipe's, for which its rates are meant.
        micro_batch: images that a process runs at a time, if a batch does not fit into memory.
        clip: largest norm of the gradient; the authors' Swin code clips at 5.
        workers, precision, max_steps: as for `finetune`.
        seed, resume, save_every, progress: as for `train_gates`.

    Returns:
        The search given.

    Raises:
        InvalidTrainingData: labels are missing, or of other classes than the model's.
        NonFiniteValue: the loss became NaN or Inf; the state before that step is kept.
        ArchitectureMismatch, InvalidCheckpoint: `resume` holds something else.

    Example:
        search = spvit.prepare(model, recipe)
        train(search, recipe, images, resume="searching")
        result = msa2conv.finetune(start_of_finetuning(search), images, teacher=None, stages=["labels"])
    """
    device, classes = next(search.model.parameters()).device, int(getattr(search.original, "num_classes", 0))
    with accelerated(device, precision, find_unused=search.gates.skip_inactive) as accelerator:
        epochs = recipe.picked_epoch or recipe.search.epochs
        batches = Batches(
            data, batch_size=batch_size or recipe.batch_size, epochs=epochs, seed=seed, workers=workers,
            max_steps=max_steps, rank=accelerator.process_index, ranks=accelerator.num_processes,
        )  # fmt: skip
        mix = recipe.augmentation
        mixing = Stage(kind="labels", mixup=mix.mixup, cutmix=mix.cutmix, smoothing=mix.label_smoothing)
        groups = [group for one in optimizers(search, recipe) for group in one.param_groups]
        task = Task(
            "search", _Objective(search, mixing, classes), AdamW(groups), batches,
            guard=partial(remembered, search), clip=clip, micro_batch=micro_batch,
        )  # fmt: skip
        about: dict[str, Any] = {
            "recipe": recipe.model_dump(mode="json"), "seed": seed, "steps": batches.steps, "batch": batches.batch,
            "model": weights_sha256(search.original)[:12],
        }  # fmt: skip
        run_search(search, task, accelerator, about, resume, save_every, progress)
    return search


def start_of_finetuning(search: Search) -> Conversion:
    """What the paper fine-tunes after a search: its plan, applied to the original weights.

    Args:
        search: trained.

    Returns:
        A Conversion without calibration, whose FLOPs are what the thresholds made of the target.
    """
    plan = finetune_plan(search)
    hybrid = apply(plan, search.original)
    device = next(hybrid.parameters()).device
    image = torch.zeros(1, *search.inspection.input_size, device=device)
    laws = {"flops": float(count_flops(working_copy(hybrid), image))}
    decided_by = "SPViT's search, whose thresholds decide; the weights are the original's"
    report = decided_report(plan, decided_by, laws, target=search.target, device=device)
    return Conversion(hybrid, plan, report, None, search.original)


class _Objective(nn.Module):
    """Cross entropy of mixed images, and the penalty of the gates."""

    def __init__(self, search: Search, mixing: Stage, classes: int) -> None:
        super().__init__()
        self.model, self.mixing, self.classes = search.model, mixing, classes
        self.mix: Mix | None = mixup(mixing, classes)
        self._search = (search,)  # in a tuple: it is no module of this one

    def forward(self, images: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        targets, smoothing = checked(labels, self.classes), self.mixing.smoothing
        if self.mix is not None:  # which smooths the labels itself
            (images, targets), smoothing = self.mix(images, targets), 0.0
        output = first_tensor(self.model(images)).float()
        loss = F.cross_entropy(output, targets, label_smoothing=smoothing)
        with torch.autocast(images.device.type, enabled=False):
            penalty = self._search[0].penalty()
        return {"loss": loss + penalty, "penalty": penalty}
