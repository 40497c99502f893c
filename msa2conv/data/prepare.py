"""From a picture to the tensor that a model expects: timm's evaluation transform."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..plan import Preprocessing


def transform(size: tuple[int, ...], preprocessing: Preprocessing) -> Any:
    """Resize the short side to size / crop_pct, crop the centre, normalise: timm's evaluation transform."""
    from torchvision import transforms

    modes = {"bilinear": "BILINEAR", "lanczos": "LANCZOS", "nearest": "NEAREST"}
    mode = transforms.InterpolationMode[modes.get(preprocessing.interpolation, "BICUBIC")]
    height, width = size[-2:]
    return transforms.Compose(
        [
            transforms.Resize(int(np.floor(max(height, width) / preprocessing.crop_pct)), interpolation=mode),
            transforms.CenterCrop((height, width)),
            normalise(preprocessing),
        ]
    )


def normalise(preprocessing: Preprocessing) -> Any:
    """A picture of the right size as a tensor [C, H, W] with the model's mean and deviation."""
    from torchvision import transforms

    return transforms.Compose([transforms.ToTensor(), transforms.Normalize(preprocessing.mean, preprocessing.std)])


__all__ = ["normalise", "transform"]
