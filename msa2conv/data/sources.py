"""Images on disk, by a path: folders of classes or of photos, torchvision's datasets, Hugging Face datasets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from ..errors import InvalidArgument, MissingDependency

_OF_DATASETS = ("dataset_info.json", "dataset_dict.json", "state.json")  # what `save_to_disk` writes
_IMAGES, _LABELS = ("image", "img", "pixel_values"), ("label", "labels", "fine_label")


def images_at(source: str | Path, transform: Any, split: str = "train") -> Any:
    """A Dataset of (image, label), or of images alone.

    Args:
        source: a folder with one subfolder per class (in alphabetical order of the labels), or one of images, which
            then have no labels; `torch/CIFAR10:ROOT`, a torchvision dataset that was downloaded to ROOT; or a folder
            that `save_to_disk` of Hugging Face datasets has written, with an image and perhaps a label column.
        transform: PIL image -> tensor.
        split: "train" or "val": which part of a torchvision dataset or DatasetDict.

    Raises:
        InvalidArgument: nothing of the kind is there.
        MissingDependency: a Hugging Face dataset, without `datasets` installed.
    """
    text = str(source)
    if text.startswith("torch/"):
        return _of_torchvision(text, transform, split)
    folder = Path(source)
    if any((folder / name).is_file() for name in _OF_DATASETS):
        return _of_datasets(folder, transform, split)
    from torchvision.datasets import ImageFolder
    from torchvision.datasets.folder import default_loader, is_image_file

    inside = sorted(folder.glob("[!.]*"))
    photos = [path for path in inside if is_image_file(path.name) and path.is_file()]
    if photos and not any(path.is_dir() for path in inside):
        return Photos(photos, default_loader, transform)
    try:
        return ImageFolder(text, transform)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InvalidArgument(
            text, f"no images ({error})", "a folder of images, or with one subfolder of them per class, "
            "torch/NAME:ROOT, or a Hugging Face dataset on disk", "Check the path.",
        ) from error  # fmt: skip


def _of_torchvision(text: str, transform: Any, split: str) -> Any:
    from torchvision import datasets

    name, _, root = text.removeprefix("torch/").partition(":")
    kind = getattr(datasets, name, None)
    if kind is None or not root:
        raise InvalidArgument(
            text, "no such dataset of torchvision" if root else "no folder", "torch/NAME:ROOT",
            "For example torch/CIFAR10:data, after torchvision.datasets.CIFAR10('data', download=True).",
        )  # fmt: skip
    import inspect

    takes = inspect.signature(kind.__init__).parameters
    which = (
        {"train": split == "train"} if "train" in takes else {"split": split if name == "ImageNet" else _test(split)}
    )
    try:
        return kind(root, transform=transform, **which)
    except (RuntimeError, FileNotFoundError, ValueError) as error:
        raise InvalidArgument(
            text,
            str(error),
            f"{name} downloaded to {root}",
            f"Run torchvision.datasets.{name}({root!r}, download=True).",
        ) from error


def _test(split: str) -> str:
    return "test" if split == "val" else split


def _of_datasets(folder: Path, transform: Any, split: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise MissingDependency(
            str(folder), "a Hugging Face dataset", "the package datasets", "pip install datasets"
        ) from error
    data = datasets.load_from_disk(str(folder))
    if isinstance(data, dict):
        names = ("train",) if split == "train" else ("validation", "val", "test")
        found = next((name for name in names if name in data), None)
        if found is None:
            raise InvalidArgument(
                str(folder),
                f"splits {', '.join(data)}",
                f"a split {' or '.join(names)}",
                "Pass the split's own folder.",
            )
        data = data[found]
    return Rows(data, transform, str(folder))


class Photos(Dataset[Any]):
    """Image files, without labels; `samples` as torchvision's folders have it."""

    def __init__(self, files: Sequence[Path], loader: Any, transform: Any) -> None:
        self.samples, self.loader, self.transform = [(str(path),) for path in files], loader, transform

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        return self.transform(self.loader(self.samples[index][0]))


class Rows(Dataset[Any]):
    """Rows of a Hugging Face dataset as (image, label), or images alone."""

    def __init__(self, data: Any, transform: Any, where: str) -> None:
        columns = list(data.features)
        self.image = next((name for name in _IMAGES if name in columns), None)
        self.label = next((name for name in _LABELS if name in columns), None)
        if self.image is None:
            raise InvalidArgument(
                where, f"columns {', '.join(columns)}", f"an image column ({', '.join(_IMAGES)})", "Rename the column."
            )
        self.data, self.transform = data, transform
        names = getattr(data.features[self.label], "names", None) if self.label else None
        if names is not None:
            self.classes = list(names)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        row = self.data[index]
        image = self.transform(row[self.image].convert("RGB"))
        return image if self.label is None else (image, int(row[self.label]))
