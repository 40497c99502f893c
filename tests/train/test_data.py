"""What every process sees at every step, whatever happened before."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Subset, TensorDataset, WeightedRandomSampler
from torchvision.datasets import ImageFolder
from torchvision.transforms import ToTensor

from msa2conv.errors import InvalidArgument, InvalidTrainingData
from msa2conv.train.data import Batches, classes_of, split

COUNT = 22


class Noisy(Dataset[Any]):
    """Images of one value, their own index, with noise from every source of random numbers there is."""

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        noise = random.random() + float(np.random.rand()) + float(torch.rand(()))
        return torch.full((3, 2, 2), index + noise / 10), index


def seen(batches: Batches, first: int = 0) -> list[tuple[Tensor, Tensor]]:
    return [(images.clone(), labels) for images, labels in batches(first) if labels is not None]


def equal(one: list[tuple[Tensor, Tensor]], other: list[tuple[Tensor, Tensor]]) -> bool:
    pairs = list(zip(one, other, strict=True))
    return all(torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in pairs)


KINDS: dict[str, Any] = {
    "dataset": Noisy,
    "loader": lambda: DataLoader(Noisy(), batch_size=4, shuffle=True),
    "in order": lambda: DataLoader(Noisy(), batch_size=4, drop_last=True),
    "sampler": lambda: DataLoader(Noisy(), 4, sampler=WeightedRandomSampler([1.0] * COUNT, 20)),
    "own generator": lambda: DataLoader(Noisy(), 4, shuffle=True, generator=torch.Generator().manual_seed(9)),
    "batches": lambda: [(torch.full((4, 3, 2, 2), float(i)), torch.full((4,), i)) for i in range(5)],
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_depends_on_the_seed_and_nothing_else(kind: str) -> None:
    """So training can go on at any step, after anything."""
    make = {"batch_size": 4, "epochs": 2, "seed": 3}
    whole = seen(Batches(KINDS[kind](), **make))
    assert len(whole) == Batches(KINDS[kind](), **make).steps == 2 * (6 if kind in ("loader", "own generator") else 5)
    for first in (0, 1, 5, 7):
        torch.manual_seed(first), random.seed(first), np.random.seed(first)
        assert equal(seen(Batches(KINDS[kind](), **make), first), whole[first:])
    if kind != "batches":
        assert not equal(seen(Batches(KINDS[kind](), **{**make, "seed": 4})), whole)


@pytest.mark.parametrize("kind", KINDS)
def test_processes_share_every_batch(kind: str) -> None:
    make = {"batch_size": 4, "epochs": 1, "seed": 3}
    alone = seen(Batches(KINDS[kind](), **make))
    shares = [seen(Batches(KINDS[kind](), **make, rank=rank, ranks=2)) for rank in range(2)]
    for (images, labels), first, second in zip(alone, *shares, strict=True):
        assert torch.equal(images[0::2], first[0]) and torch.equal(images[1::2], second[0])
        assert torch.equal(labels[0::2], first[1]) and torch.equal(labels[1::2], second[1])


def test_workers_do_not_matter() -> None:
    make = {"batch_size": 4, "epochs": 1, "seed": 3}
    assert equal(seen(Batches(Noisy(), **make, workers=2)), seen(Batches(Noisy(), **make)))


def test_the_global_random_state_is_left_alone_by_reading() -> None:
    batches = Batches(Noisy(), batch_size=4)
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()  # type: ignore[union-attr]
    batches.probe(8)
    assert random.getstate() == states[0] and np.array_equal(np.random.get_state()[1], states[1])  # type: ignore[arg-type]
    assert torch.equal(torch.get_rng_state(), states[2])


def test_an_epoch_sees_every_image_once_and_in_another_order() -> None:
    batches = Batches(Noisy(), batch_size=2, epochs=2)
    labels = [int(label) for _, part in seen(batches) for label in part]
    assert sorted(labels[:COUNT]) == sorted(labels[COUNT:]) == list(range(COUNT)) and labels[:COUNT] != labels[COUNT:]


def test_what_does_not_fill_a_batch() -> None:
    """Of a Dataset it waits for another epoch; a DataLoader's last batch is filled up with its first images."""
    assert [len(images) for images, _ in Batches(Noisy(), batch_size=5)(0)] == [5] * 4
    loader = DataLoader(Noisy(), batch_size=5, shuffle=True)
    labels = [part.tolist() for _, part in seen(Batches(loader))]
    assert [len(part) for part in labels] == [5] * 5 == [5] * len(loader) and labels[4][2:] == labels[0][:3]
    dropping = DataLoader(Noisy(), batch_size=5, shuffle=True, drop_last=True)
    assert Batches(dropping).steps == len(dropping) == 4
    assert [len(images) for images, _ in Batches(Noisy(), batch_size=99)(0)] == [COUNT]


def test_steps_may_be_limited_and_epochs_end() -> None:
    assert Batches(Noisy(), batch_size=5, epochs=3).ends == [4, 8, 12]
    limited = Batches(Noisy(), batch_size=5, epochs=3, max_steps=6)
    assert limited.steps == 6 == len(seen(limited)) and limited.ends == [4, 6]


# Images that cannot be read


@pytest.fixture
def folder(tmp_path: Path) -> ImageFolder:
    """Six photos; the third is empty, the fifth cut in half."""
    for index in range(6):
        path = tmp_path / f"class{index % 2}" / f"{index}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), (40 * index, 0, 0)).save(path)
    (tmp_path / "class0" / "2.png").write_bytes(b"")
    whole = (tmp_path / "class0" / "4.png").read_bytes()
    (tmp_path / "class0" / "4.png").write_bytes(whole[: len(whole) // 2])
    return ImageFolder(str(tmp_path), ToTensor())


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_replaced_and_named(folder: ImageFolder, workers: int) -> None:
    batches = Batches(folder, batch_size=6, workers=workers)
    ((images, labels),) = seen(batches)
    assert images.shape == (6, 3, 8, 8) and len(labels) == 6
    assert sorted(Path(bad.where).name for bad in batches.skipped) == ["2.png", "4.png"]


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_stops_if_told_so(folder: ImageFolder, workers: int) -> None:
    with pytest.raises(
        InvalidTrainingData,
        match=r"class0/[24]\.png: found an image that cannot be read \(.+\); expected a readable image\. "
        r"Repair or remove it, or pass on_bad_image='skip'\.",
    ):
        list(Batches(folder, batch_size=6, workers=workers, on_bad_image="stop")(0))


def test_a_batch_of_nothing_else_stops(folder: ImageFolder) -> None:
    with pytest.raises(InvalidTrainingData, match=r"2\.png: found an image that cannot be read"):
        list(Batches(Subset(folder, [1]), batch_size=1)(0))


# What is refused


def test_a_sampler_that_shares_already_is_refused() -> None:
    loader = DataLoader(Noisy(), 4, sampler=DistributedSampler(Noisy(), 2, 0))
    with pytest.raises(
        InvalidArgument, match=r"^train: found a DataLoader with a DistributedSampler; expected the dat"
    ):
        Batches(loader)


def test_batches_that_cannot_be_shared() -> None:
    with pytest.raises(
        InvalidArgument, match=r"^batch_size: found 5; expected a multiple of the 2 processes\. It count"
    ):
        Batches(Noisy(), batch_size=5, ranks=2)
    with pytest.raises(
        InvalidArgument, match=r"^data: found a batch of 3 images; expected a multiple of the 2 process"
    ):
        list(Batches([torch.zeros(3, 3, 2, 2)], ranks=2)(0))


def test_no_images() -> None:
    with pytest.raises(InvalidTrainingData, match=r"^train: found no images; expected at least one\. Check the path"):
        Batches(torch.zeros(0, 3, 2, 2))


# Batches and labels


def test_what_a_batch_may_be() -> None:
    images, labels = torch.zeros(2, 3, 4, 4), torch.arange(2)
    assert split(images) == (images, None)
    for batch in ((images, labels), [images, labels, "names"], {"labels": labels, "pixel_values": images}):
        assert split(batch) == (images, labels)
    assert split({"image": images}) == (images, None) == split((images, "a note"))


class Named(TensorDataset):
    classes = ("cat", "dog", "bird")


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (torch.zeros(4, 3, 2, 2), None),
        (TensorDataset(torch.zeros(4, 3, 2, 2)), None),
        (TensorDataset(torch.zeros(4, 3, 2, 2), torch.arange(4)), 10),
        (TensorDataset(torch.zeros(4, 3, 2, 2), 9 + torch.arange(4)), 13),
        (Named(torch.zeros(4, 3, 2, 2), torch.arange(4)), 3),
        (Subset(Named(torch.zeros(4, 3, 2, 2), torch.arange(4)), [0]), 3),
        (DataLoader(Named(torch.zeros(4, 3, 2, 2), torch.arange(4))), 3),
        (Noisy(), 10),
        ([(torch.zeros(4, 3, 2, 2), torch.arange(4))], 10),
        ([torch.zeros(4, 3, 2, 2)], None),
        ([{"pixel_values": torch.zeros(4, 3, 2, 2)}], None),
        ([{"pixel_values": torch.zeros(4, 3, 2, 2), "labels": torch.arange(4)}], 10),
    ],
)
def test_how_many_classes_the_labels_have(data: Any, expected: int | None) -> None:
    assert classes_of(data, 10) == expected
