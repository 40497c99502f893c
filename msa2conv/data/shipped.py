"""The photos that are shipped, and what of them calibrates a model when no images are given."""

from __future__ import annotations

import io
import random
from collections.abc import Sequence
from importlib import resources
from itertools import cycle, pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InvalidCalibrationData
from ..plan import Preprocessing
from .prepare import normalise, transform

SHIPPED = "views of photos shipped with msa2conv"
_PERIOD = ("whole", "crop", "mosaic", "crop", "mosaic", "crop", "mosaic", "whole")
_AREA = (0.1, 1.0)  # of a photo, in a crop


def shipped_views(size: tuple[int, ...], preprocessing: Preprocessing, count: int) -> Tensor:
    """Views of the shipped photos, prepared for a model: [n, C, H, W], always the same ones.

    A quarter are photos of clothing as they are, three eighths crops of a dozen photos of other things (faces, animals,
    textures, the sky, ...), three eighths mosaics of four crops. What is fitted is at home where it was fitted, so
    these differ as the images that a model may see: a dozen photos do what hundreds of one kind do not.

    Args:
        size: (C, H, W).
        preprocessing: the model's.
        count: how many; n is less where this is more than what shows every photo of clothing once (280).

    Raises:
        InvalidCalibrationData: the model does not take three channels.
    """
    if size[0] != 3:
        raise InvalidCalibrationData(
            "data", f"None, for a model of {size[0]} channels", "RGB for the shipped photos", "Pass data=your images."
        )
    clothes, scenes = _photos()
    dressed, elsewhere = iter(clothes), cycle(scenes)
    as_it_is, to_tensor, (height, width) = transform(size, preprocessing), normalise(preprocessing), size[-2:]
    views = []
    most = len(clothes) * len(_PERIOD) // _PERIOD.count("whole")
    for index, kind in zip(range(min(count, most)), cycle(_PERIOD), strict=False):
        draw = random.Random(index)
        if kind == "whole":
            views.append(as_it_is(next(dressed)))
        elif kind == "crop":
            views.append(to_tensor(_crop(next(elsewhere), (width, height), draw)))
        else:
            views.append(to_tensor(_mosaic(clothes, scenes, (width, height), draw)))
    return torch.stack(views)


def views_or_noise(size: tuple[int, ...], preprocessing: Preprocessing | None, count: int = 32) -> Tensor:
    """Images to compare two networks on: shipped views, or noise where three channels are not what they take.

    Args:
        size: (C, H, W).
        preprocessing: the networks', if it is known.
        count: how many.
    """
    if size[0] == 3:
        return shipped_views(size, preprocessing or Preprocessing(), count)
    return torch.randn(count, *size, generator=torch.Generator().manual_seed(0))


def _photos() -> tuple[list[Any], list[Any]]:
    """(photos of clothing, photos of other things), as PIL images."""
    from PIL import Image

    with resources.files(__package__).joinpath("photos.npz").open("rb") as file:
        packed = np.load(io.BytesIO(file.read()), allow_pickle=False)
        jpeg, offsets, scenes = packed["jpeg"].tobytes(), packed["offsets"].tolist(), int(packed["scenes"])
    photos = [Image.open(io.BytesIO(jpeg[start:stop])).convert("RGB") for start, stop in pairwise(offsets)]
    return photos[:-scenes], photos[-scenes:]


def _crop(photo: Any, size: tuple[int, int], draw: random.Random) -> Any:
    """A part of a photo, of the shape of `size` (width, height), mirrored every other time."""
    from PIL import Image

    side = draw.uniform(*_AREA) ** 0.5
    scale = side * min(photo.width / size[0], photo.height / size[1])
    width, height = scale * size[0], scale * size[1]
    left, top = draw.uniform(0, photo.width - width), draw.uniform(0, photo.height - height)
    box = (left, top, left + width, top + height)
    part = photo.resize(size, Image.Resampling.BICUBIC, box=box)
    return part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if draw.random() < 0.5 else part


def _mosaic(clothes: Sequence[Any], scenes: Sequence[Any], size: tuple[int, int], draw: random.Random) -> Any:
    """Four crops beside each other, of clothing every fourth time."""
    from PIL import Image

    (width, height), canvas = size, Image.new("RGB", size)
    for left, right in ((0, width // 2), (width // 2, width)):
        for top, bottom in ((0, height // 2), (height // 2, height)):
            photo = draw.choice(clothes if draw.random() < 0.25 else scenes)
            canvas.paste(_crop(photo, (right - left, bottom - top), draw), (left, top))
    return canvas
