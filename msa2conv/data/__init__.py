"""Images: what users give as `data`, folders of photos, and the photos that are shipped for calibration."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InvalidCalibrationData, NonFiniteValue
from ..plan import Preprocessing
from .prepare import transform
from .shipped import SHIPPED, shipped_views, views_or_noise
from .sources import images_at

FEWEST, COMFORTABLE = 8, 64


def load_images(data: Any, limit: int, size: tuple[int, ...], seed: int = 0) -> Tensor:
    """Gather up to `limit` calibration images.

    Args:
        data: a tensor [n, C, H, W], a map-style Dataset (a random subset is drawn, since data sets are often sorted by
            class), or any iterable of batches [b, C, H, W] or of tuples whose first entry is one. It is read only as
            far as needed.
        limit: number of images to take.
        size: (C, H, W) that every image must have.
        seed: for the subset of a Dataset.

    Returns:
        float32 images [n, C, H, W] on the CPU.

    Raises:
        InvalidCalibrationData: too few images, or a batch of another shape or type; names the batch.
        NonFiniteValue: NaN or Inf in an image.
    """
    batches: list[Tensor] = []
    count = 0
    for index, batch in enumerate(_batches(data, limit, seed)):
        batch = _image(batch)
        if not isinstance(batch, Tensor) or not batch.is_floating_point() or tuple(batch.shape[1:]) != tuple(size):
            found = f"{type(batch).__name__}"
            if isinstance(batch, Tensor):
                found = f"a {str(batch.dtype).removeprefix('torch.')} tensor of shape {tuple(batch.shape)}"
            raise InvalidCalibrationData(
                f"data, batch {index}",
                found,
                f"float images [b, {', '.join(map(str, size))}], normalised as the model expects",
                "Make every batch (or the first entry of its tuple) such a tensor.",
            )
        if not torch.isfinite(batch).all():
            raise NonFiniteValue(
                f"data, batch {index}", "NaN or Inf in the images", "finite numbers", "Check the loader."
            )
        batches.append(batch[: limit - count].detach().float().cpu())
        count += len(batches[-1])
        if count >= limit:
            break
    if count < FEWEST:
        raise InvalidCalibrationData(
            "data",
            f"{count} images",
            f"at least {FEWEST}, better {COMFORTABLE} to 256",
            "Give more images (labels are not needed), or data=None for the shipped photos.",
        )
    return torch.cat(batches)


def _image(item: Any) -> Any:
    """The images in (images, ...) or {"pixel_values": images}."""
    if isinstance(item, (tuple, list)) and item:
        return item[0]
    if isinstance(item, dict):
        return next((item[key] for key in ("pixel_values", "image", "images") if key in item), None)
    return item


def _batches(data: Any, limit: int, seed: int) -> Iterator[Any]:
    if isinstance(data, Tensor):
        yield from torch.split(data, 32) if data.ndim else [data]
    elif hasattr(data, "__getitem__") and hasattr(data, "__len__") and not isinstance(data, (list, tuple, dict)):
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))[:limit]
        for index in order.tolist():
            item = data[index]
            image = _image(item)
            yield image[None] if isinstance(image, Tensor) else image
    elif isinstance(data, Iterable):
        yield from data
    else:
        raise InvalidCalibrationData(
            "data", type(data).__name__, "an iterable of image batches, a Dataset or a DataLoader", "See load_images."
        )


def image_folder(root: str | Path, size: tuple[int, ...], preprocessing: Preprocessing) -> Any:
    """Labelled images by a path, as `images_at` reads them, with the model's own transform for evaluation."""
    return images_at(root, transform(size, preprocessing), "val")


__all__ = ["SHIPPED", "image_folder", "load_images", "shipped_views", "transform", "views_or_noise"]
