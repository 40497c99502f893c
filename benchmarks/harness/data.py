"""Labelled images in memory and in folders. B batch, C channels, H height, W width, n images, N rows, K classes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from msa2conv.search.measure import first_tensor
from msa2conv.train.distill import augment

Batch = tuple[Tensor, Tensor]
Lesson = tuple[Tensor, Tensor, Tensor | None]
HALF = (0.5,)


class Split(Protocol):
    """Labelled images, prepared as the parent expects them."""

    def __len__(self) -> int: ...

    def to(self, device: str) -> Split:
        """The same, with batches prepared on a device where that is worth it; samples, and labels, are on the CPU."""
        ...

    def batches(self, size: int, seed: int | None = None) -> Iterator[Batch]:
        """(images [B, C, H, W], labels [B]); with a seed in its random order and augmented."""
        ...

    def lessons(self, size: int, seed: int, teacher: nn.Module | None) -> Iterator[Lesson]:
        """The same in random order and augmented, with the teacher's answers [B, classes], if there is one."""
        ...

    def sample(self, count: int, seed: int = 0) -> Batch:
        """So many of them at random, as for evaluation."""
        ...

    def loader(self, size: int) -> DataLoader[Batch]:
        """For a method that trains: augmented, in a random order."""
        ...


@dataclass(frozen=True)
class Arrays:
    """Images in memory.

    Args:
        images: uint8 [n, C, H, W].
        labels: int64 [n].
        mean, std: of a channel, for values in [0, 1].
        crops: augment by random resized crops; by flips alone otherwise.
    """

    images: Tensor
    labels: Tensor
    mean: tuple[float, ...] = HALF
    std: tuple[float, ...] = HALF
    crops: bool = False
    _answers: dict[int, tuple[nn.Module, Tensor]] = field(default_factory=dict, compare=False, repr=False)

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: str) -> Arrays:
        return replace(self, images=self.images.to(device), _answers={})

    def prepared(self, images: Tensor) -> Tensor:
        mean, std = (torch.tensor(value, device=images.device)[:, None, None] for value in (self.mean, self.std))
        return (images.float() / 255 - mean) / std

    def batches(self, size: int, seed: int | None = None) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed or 0)
        order = torch.arange(len(self)) if seed is None else torch.randperm(len(self), generator=generator)
        for rows in order.split(size):
            images = self.prepared(self.images[rows])
            if seed is not None:
                images = augment(images, generator) if self.crops else flipped(images, generator)[0]
            yield images, self.labels[rows]

    def lessons(self, size: int, seed: int, teacher: nn.Module | None) -> Iterator[Lesson]:
        if self.crops or teacher is None:
            yield from _asked(self.batches(size, seed), teacher)
            return
        answers_2NC = self._remembered(teacher)
        generator = torch.Generator().manual_seed(seed)
        for rows in torch.randperm(len(self), generator=generator).split(size):
            images, mirrored = flipped(self.prepared(self.images[rows]), generator)
            yield images, self.labels[rows], answers_2NC[mirrored.long(), rows]

    def _remembered(self, teacher: nn.Module) -> Tensor:
        """A teacher's answers to every image and every mirrored one, [2, n, classes]: asked once, not every epoch."""
        if id(teacher) not in self._answers:
            images = [self.prepared(part) for part in self.images.split(250)]
            both = [torch.cat([_ask(teacher, batch) for batch in images])]
            both.append(torch.cat([_ask(teacher, batch.flip(3)) for batch in images]))
            self._answers[id(teacher)] = (teacher, torch.stack(both))  # and the teacher, so that its id stays its own
        return self._answers[id(teacher)][1]

    def sample(self, count: int, seed: int = 0) -> Batch:
        rows = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))[:count]
        return self.prepared(self.images[rows]).cpu(), self.labels[rows]

    def loader(self, size: int) -> DataLoader[Batch]:
        return DataLoader(_Rows(self), size, shuffle=True, drop_last=True)

    def at(self, rows: slice | Tensor) -> Arrays:
        """Some of them."""
        return Arrays(self.images[rows], self.labels[rows], self.mean, self.std, self.crops)

    def mixed(self) -> Arrays:
        """All of them in another order, always the same: files that are sorted by class have a first half, too."""
        return self.at(torch.randperm(len(self), generator=torch.Generator().manual_seed(0)))


@torch.no_grad()
def _ask(teacher: nn.Module, images: Tensor) -> Tensor:
    return first_tensor(teacher(images.to(next(teacher.parameters()).device))).cpu()


def _asked(batches: Iterator[Batch], teacher: nn.Module | None) -> Iterator[Lesson]:
    for images, labels in batches:
        yield images, labels, None if teacher is None else _ask(teacher, images)


class _Rows(Dataset[Batch]):
    """Image by image, mirrored or not as the global random state says."""

    def __init__(self, split: Arrays) -> None:
        self.split = split

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, row: int) -> Batch:
        image = self.split.prepared(self.split.images[row]).cpu()
        return image.flip(2) if torch.rand(()) < 0.5 else image, self.split.labels[row]


@dataclass(frozen=True)
class Folder:
    """A folder of images with one subfolder a class, read as they are needed."""

    root: Path
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    limit: int | None = None
    workers: int = field(default_factory=lambda: min(8, os.cpu_count() or 1))

    def to(self, device: str) -> Folder:
        return self

    def _dataset(self, training: bool) -> Dataset[Batch]:
        from timm.data import create_transform
        from torchvision.datasets import ImageFolder

        found = ImageFolder(
            self.root, create_transform(self.size, training, mean=self.mean, std=self.std, interpolation="bicubic")
        )
        if self.limit is None or self.limit >= len(found):
            return found
        rows = torch.randperm(len(found), generator=torch.Generator().manual_seed(0))[: self.limit]
        return Subset(found, rows.tolist())

    def __len__(self) -> int:
        return len(self._dataset(False))  # type: ignore[arg-type]

    def batches(self, size: int, seed: int | None = None) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed or 0)
        images = self._dataset(seed is not None)
        yield from DataLoader(images, size, shuffle=seed is not None, num_workers=self.workers, generator=generator)

    def lessons(self, size: int, seed: int, teacher: nn.Module | None) -> Iterator[Lesson]:
        yield from _asked(self.batches(size, seed), teacher)

    def loader(self, size: int) -> DataLoader[Batch]:
        return DataLoader(self._dataset(True), size, shuffle=True, drop_last=True, num_workers=self.workers)

    def sample(self, count: int, seed: int = 0) -> Batch:
        dataset = self._dataset(False)
        rows = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))[:count]
        pairs = [dataset[int(row)] for row in rows]
        return torch.stack([image for image, _ in pairs]), torch.tensor([int(label) for _, label in pairs])


@dataclass(frozen=True)
class Data:
    """Args:
    train, test: labelled images.
    name: what to call them.
    """

    name: str
    train: Split
    test: Split

    def to(self, device: str) -> Data:
        return replace(self, train=self.train.to(device), test=self.test.to(device))


def flipped(images_BCHW: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(images, every other one mirrored at random; whether it is [B], on the CPU)."""
    mirrored = torch.rand(len(images_BCHW), generator=generator) < 0.5
    return torch.where(mirrored.to(images_BCHW.device)[:, None, None, None], images_BCHW.flip(3), images_BCHW), mirrored
