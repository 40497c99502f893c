"""timm's training transforms, with the normalisation that a model wants."""

from __future__ import annotations

from typing import Any

from ..plan import Preprocessing

MILD = {"scale": (0.5, 1.0), "color_jitter": None}  # timm's default crops, down to 0.08, suit 300 epochs of ImageNet


def training_transform(size: tuple[int, ...], preprocessing: Preprocessing, **augment: Any) -> Any:
    """Random resized crops and flips, and what `augment` adds.

    Args:
        size: (C, H, W).
        preprocessing: mean, std and interpolation.
        augment: arguments of timm's `create_transform`, over crops of half the area and more and no colour jitter:
            `auto_augment="rand-m9-mstd0.5-inc1"`, `re_prob=0.25`, `hflip=0.5`, ...
    """
    from timm.data import create_transform

    channels, height, width = size
    return create_transform(
        (channels, height, width), is_training=True, mean=preprocessing.mean, std=preprocessing.std,
        **{"interpolation": preprocessing.interpolation, **MILD, **augment},
    )  # fmt: skip
