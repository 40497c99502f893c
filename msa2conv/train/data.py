"""Training images: which process sees which of them at which step, so that every step can be repeated exactly."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    TensorDataset,
    default_collate,
)

from ..errors import InvalidArgument, InvalidCalibrationData, InvalidTrainingData

OnBadImage = Literal["skip", "stop"]
_IMAGES = ("pixel_values", "image", "images")
_LABELS = ("labels", "label")


@dataclass(frozen=True)
class Unreadable:
    """Stands for an image that could not be read."""

    where: str
    reason: str


class Batches:
    """What a process trains on, step by step.

    Every step's batch depends on (seed, step) alone, whatever ran before and however many processes share it: after an
    interruption training goes on with the very images, augmented in the very way, that it would have seen.

    Args:
        data: a map-style Dataset of images [C, H, W], (image, label) or {"pixel_values": ..., "labels": ...}; a tensor
            [n, C, H, W]; a DataLoader over such a Dataset (its workers, collate_fn and batch size are taken over); or
            anything with a length that gives whole batches, the same ones in every process, once per epoch.
        batch_size: images of an optimiser step, over all processes; None: the loader's own, or 64.
        epochs: passes over the data. Images of a Dataset that do not fill a batch are left out, other ones every epoch;
            a DataLoader's last batch is filled up with the first images.
        seed: of order and augmentation.
        rank, ranks: this process, and how many there are.
        workers: processes that read images (of a Dataset; a DataLoader has its own number).
        on_bad_image: "skip": another image of the batch takes the place of one that cannot be read; "stop": an error.
        max_steps: end after so many.

    Raises:
        InvalidTrainingData: no images, or no batches.
        InvalidArgument: a batch cannot be shared evenly.
    """

    def __init__(
        self,
        data: Any,
        *,
        batch_size: int | None = None,
        epochs: int = 1,
        seed: int = 0,
        rank: int = 0,
        ranks: int = 1,
        workers: int = 0,
        on_bad_image: OnBadImage = "skip",
        max_steps: int | None = None,
    ) -> None:
        self.max_steps = max_steps
        self.seed, self.epochs, self.rank, self.ranks = seed, epochs, rank, ranks
        self.workers, self.on_bad_image = workers, on_bad_image
        self.skipped: list[Unreadable] = []
        self.loader: DataLoader[Any] | None = None
        if isinstance(data, Tensor):
            data = TensorDataset(data)
        if isinstance(data, DataLoader) and _takes_apart(data):
            self.loader, batch_size, data = data, batch_size or data.batch_size, data.dataset
            self.workers = self.loader.num_workers
        self.data, self.indexed = data, _is_indexed(data)
        if self.indexed:
            count = len(data)
            if not count:
                raise InvalidTrainingData("train", "no images", "at least one", "Check the path, or the dataset.")
            self.batch = max(ranks, min(batch_size or 64, count // ranks * ranks))
            whole, rest = divmod(count, self.batch)
            self.per_epoch = whole + bool(rest and self.loader is not None and not self.loader.drop_last)
            if self.batch % ranks:
                raise InvalidArgument(
                    "batch_size", str(self.batch), f"a multiple of the {ranks} processes",
                    "It counts the images of a step over all processes.",
                )  # fmt: skip
        else:
            self.batch, self.per_epoch = 0, length(data)

    @property
    def steps(self) -> int:
        """Optimiser steps of all epochs."""
        return min(self.epochs * self.per_epoch, self.max_steps or self.epochs * self.per_epoch)

    @property
    def ends(self) -> list[int]:
        """Steps after which an epoch is over, or all is."""
        return [min(end, self.steps) for end in range(self.per_epoch, self.steps + self.per_epoch, self.per_epoch)]

    def __call__(self, first: int = 0) -> Iterator[tuple[Tensor, Tensor | None]]:
        """(images, labels or None) of this process, from step `first` on."""
        return self._indexed(first) if self.indexed else self._given(first)

    def probe(self, count: int) -> Tensor:
        """Some images, the same in every process."""
        if self.indexed:
            picked = [(0, index) for index in range(min(count, len(self.data)))]
            return split(self._collate([self._sample(at) for at in picked])[0])[0]
        reseed(self.data, self.seed)
        return split(next(iter(self.data)))[0][:count]

    def _indexed(self, first: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        like = self.loader
        loader = DataLoader(
            _Sampled(self._sample),
            batch_sampler=_Order(self, first),
            num_workers=self.workers,
            collate_fn=self._collate,
            pin_memory=torch.cuda.is_available() if like is None else like.pin_memory,
            worker_init_fn=None if like is None else like.worker_init_fn,
            multiprocessing_context=None if like is None else like.multiprocessing_context,
        )
        for batch, skipped in loader:
            self.skipped += skipped
            yield split(batch)

    def _sample(self, at: tuple[int, int]) -> Any:
        """One image, augmented as (seed, epoch, index) say."""
        epoch, index = at
        with seeded(self.seed, epoch, index):
            try:
                return self.data[index]
            except OSError as error:  # PIL.UnidentifiedImageError is one
                return Unreadable(_name(self.data, index), str(error))

    def _collate(self, samples: list[Any]) -> tuple[Any, list[Unreadable]]:
        bad = [sample for sample in samples if isinstance(sample, Unreadable)]
        good = [sample for sample in samples if not isinstance(sample, Unreadable)]
        collate = default_collate if self.loader is None else self.loader.collate_fn
        if good and not (bad and self.on_bad_image == "stop"):
            filled = [*good, *(good[i % len(good)] for i in range(len(bad)))]
            return collate(filled), bad
        return bad[0], []

    def _given(self, first: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        for epoch in range(first // self.per_epoch, self.epochs):
            reseed(self.data, self.seed + epoch)
            batches = iter(self.data)
            skip = first - epoch * self.per_epoch
            for count in range(self.per_epoch):
                if count:  # else a batch's augmentation would depend on what was drawn since the last one
                    seed_all(self.seed, epoch, count)
                batch = next(batches, None)
                if batch is None:
                    raise InvalidCalibrationData(
                        f"data, epoch {epoch + 1}", f"{count} batches", f"{self.per_epoch}, the length of the data",
                        "Pass something that can be iterated more than once, such as a DataLoader.",
                    )  # fmt: skip
                if count >= skip:
                    yield self._share(*split(batch))

    def _share(self, images: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if len(images) % self.ranks:
            raise InvalidArgument(
                "data", f"a batch of {len(images)} images", f"a multiple of the {self.ranks} processes",
                "Every process is given the same batches and takes its share; set drop_last=True.",
            )  # fmt: skip
        return images[self.rank :: self.ranks], None if labels is None else labels[self.rank :: self.ranks]


class _Order(Sampler[list[tuple[int, int]]]):
    """[(epoch, index), ...] of this process for every step from `first` on: a new permutation every epoch."""

    def __init__(self, batches: Batches, first: int) -> None:
        self.batches, self.first = batches, first

    def __len__(self) -> int:
        return self.batches.steps - self.first

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        all_, order, current = self.batches, torch.empty(0), -1
        for step in range(self.first, all_.steps):
            epoch, place = divmod(step, all_.per_epoch)
            if epoch != current:
                generator = torch.Generator().manual_seed(mixed(all_.seed, epoch))
                order, current = torch.randperm(len(all_.data), generator=generator), epoch
            wanted = torch.arange(place * all_.batch, (place + 1) * all_.batch) % len(order)
            yield [(epoch, int(index)) for index in order[wanted][all_.rank :: all_.ranks]]


class _Sampled(Dataset[Any]):
    def __init__(self, sample: Callable[[tuple[int, int]], Any]) -> None:
        self.sample = sample

    def __getitem__(self, at: Any) -> Any:
        return self.sample(at)


def split(batch: Any) -> tuple[Tensor, Tensor | None]:
    """(images, labels) of a batch: a tensor, a tuple that starts with one, or {"pixel_values": ..., "labels": ...}."""
    if isinstance(batch, Unreadable):
        raise InvalidTrainingData(
            batch.where, f"an image that cannot be read ({batch.reason})", "a readable image",
            "Repair or remove it, or pass on_bad_image='skip'.",
        )  # fmt: skip
    if isinstance(batch, dict):
        parts = [next((batch[key] for key in keys if key in batch), None) for keys in (_IMAGES, _LABELS)]
    else:
        parts = list(batch) if isinstance(batch, (tuple, list)) else [batch]
    images, labels = parts[0], parts[1] if len(parts) > 1 else None
    if not isinstance(images, Tensor) or images.ndim != 4:
        found = f"a tensor of shape {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
        raise InvalidCalibrationData(
            "data", f"a batch that starts with {found}", "images [b, C, H, W], alone or with labels",
            "Let the loader give (images, labels).",
        )  # fmt: skip
    return images, labels if isinstance(labels, Tensor) else None


def length(data: Any) -> int:
    """Batches in one pass over `data`; raises InvalidCalibrationData where that is unknown or zero."""
    if isinstance(data, Tensor) or not hasattr(data, "__len__"):
        raise InvalidCalibrationData(
            "data", f"a {type(data).__name__}", "something with a length that can be iterated once per epoch",
            "Pass a DataLoader, or a list of (images, labels) batches.",
        )  # fmt: skip
    if len(data) == 0:
        raise InvalidCalibrationData("data", "no batches", "at least one", "Check the dataset and drop_last.")
    return len(data)


def reseed(data: Any, seed: int) -> None:
    """Let the order of `data` depend on the seed alone, whatever was drawn before."""
    seed_all(seed)
    generator = getattr(data, "generator", None)  # a DataLoader's own, where it was given one
    if isinstance(generator, torch.Generator):
        generator.manual_seed(seed)


def mixed(*numbers: int) -> int:
    """One seed from several: neighbours lead to unrelated streams."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint32)[0])


def seed_all(*numbers: int) -> None:
    """Seed Python, numpy and torch (on all devices)."""
    seed = mixed(*numbers)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@contextmanager
def seeded(*numbers: int) -> Iterator[None]:
    """Python's, numpy's and torch's CPU random state as these numbers say; given back afterwards."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seed = mixed(*numbers)
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


def _takes_apart(loader: DataLoader[Any]) -> bool:
    """Whether a DataLoader does nothing that an order of our own would lose: no sampler or batches of the user's."""
    if isinstance(loader.sampler, DistributedSampler):
        raise InvalidArgument(
            "train", "a DataLoader with a DistributedSampler", "the dataset, or a DataLoader that gives every process "
            "the same batches", "Leave the sampler out: the loop shares every batch among the processes.",
        )  # fmt: skip
    shuffled = isinstance(loader.sampler, RandomSampler) and not loader.sampler.replacement
    return shuffled and loader.batch_size is not None and _is_indexed(loader.dataset)


def _is_indexed(data: Any) -> bool:
    batches = (list, tuple, dict, DataLoader, IterableDataset)
    return hasattr(data, "__getitem__") and hasattr(data, "__len__") and not isinstance(data, batches)


def _name(data: Any, index: int) -> str:
    """The file of an image, as far as the dataset says."""
    while hasattr(data, "dataset") and hasattr(data, "indices"):  # torch.utils.data.Subset
        data, index = data.dataset, data.indices[index]
    samples = getattr(data, "samples", None)  # torchvision's folders
    return str(samples[index][0]) if samples is not None else f"image {index} of {type(data).__name__}"


def classes_of(data: Any, expected: int) -> int | None:
    """How many classes the labels of `data` have: None without labels; `expected` where nothing speaks against it."""
    if isinstance(data, DataLoader):
        data = data.dataset
    while hasattr(data, "dataset") and hasattr(data, "indices"):  # torch.utils.data.Subset
        data = data.dataset
    if isinstance(data, Tensor):
        return None
    names = getattr(data, "classes", None)  # torchvision's datasets
    if names is not None:
        return len(names)
    features = getattr(data, "features", None)  # Hugging Face datasets
    known = [features[key] for key in _LABELS if key in features] if isinstance(features, dict) else []
    if known and getattr(known[0], "num_classes", None):
        return int(known[0].num_classes)
    labels = getattr(
        data, "targets", data.tensors[1] if isinstance(data, TensorDataset) and len(data.tensors) > 1 else None
    )
    if labels is not None and len(labels):
        return max(expected, int(torch.as_tensor(labels).max()) + 1)
    if hasattr(data, "__len__") and not len(data):
        return expected
    first = data[0] if _is_indexed(data) or isinstance(data, (list, tuple)) else next(iter(data))
    if isinstance(first, dict):
        return expected if any(key in first for key in _LABELS) else None
    return expected if isinstance(first, (tuple, list)) and len(first) > 1 and _is_label(first[1]) else None


def _is_label(value: Any) -> bool:
    return isinstance(value, (int, Tensor, np.integer))
