"""Accuracy on labelled images, and latency of several models measured side by side."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from .errors import ArchitectureMismatch
from .progress import track
from .search.measure import first_tensor
from .stopwatch import Samples, interleaved


@dataclass(frozen=True)
class Accuracy:
    """Correct predictions out of all."""

    correct: int
    total: int

    @property
    def percent(self) -> float:
        return 100 * self.correct / self.total


@torch.no_grad()
def evaluate(
    model: nn.Module, dataset: Any, batch_size: int = 32, progress: bool = True, what: str = "eval"
) -> Accuracy:
    """Top-1 accuracy of a model in eval mode and float32.

    Args:
        model: evaluated on a copy; not touched.
        dataset: a map-style dataset of (image, label), or a DataLoader.
        batch_size: for datasets.
        progress, what: the bar and its text.

    Raises:
        ArchitectureMismatch: a label is outside the model's classes.
    """
    loader = dataset if isinstance(dataset, DataLoader) else DataLoader(dataset, batch_size)
    model = copy.deepcopy(model).float().eval()
    device = next(model.parameters()).device
    correct = total = 0
    for images, labels in track(loader, what, progress, len(loader)):
        logits = first_tensor(model(images.to(device))).cpu()
        if int(labels.max()) >= logits.shape[1]:
            raise ArchitectureMismatch(
                "images",
                f"label {int(labels.max())}",
                f"the {logits.shape[1]} classes of the model",
                "One subfolder per class, named so that alphabetical order is the order of the labels.",
            )
        correct += int((logits.argmax(1) == labels).sum())
        total += len(labels)
    return Accuracy(correct, total)


def latency(
    models: Mapping[str, nn.Module], example: Tensor, batches: tuple[int, ...] = (1, 32), rounds: int = 15
) -> dict[int, Samples]:
    """Times of forward passes, {batch size: of every model}; models take turns, so ratios can be trusted.

    Args:
        models: in eval mode, on one device.
        example: one image [1, C, H, W].
        batches: batch sizes.
        rounds: repetitions at batch 1; a third of them, three at least, for larger batches.

    Example:
        >>> models = {"wide": nn.Linear(64, 512), "narrow": nn.Linear(64, 8)}
        >>> times = latency(models, torch.zeros(1, 64), batches=(1,))[1]
        >>> times.ratio("wide", "wide"), times.timing("narrow").seconds < 1
        (1.0, True)
    """
    device = next(next(iter(models.values())).parameters()).device
    found: dict[int, Samples] = {}
    for batch in batches:
        inputs = example.expand(batch, *example.shape[1:]).contiguous().to(device)
        calls = {name: partial(model, inputs) for name, model in models.items()}
        found[batch] = interleaved(calls, device, rounds if batch == 1 else max(3, rounds // 3))
    return found
