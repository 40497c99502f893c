"""Build a base model by name, and find out how a model given could be built again."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..errors import InvalidArgument
from ..plan import Builder, Preprocessing, fingerprint
from .geometry import pair


def build(builder: Builder) -> nn.Module:
    """`timm.create_model(name, **kwargs)` without pretrained weights."""
    kwargs: dict[str, Any] = dict(builder.kwargs)
    return create(builder.name, **kwargs)


def create(name: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """A timm model; raises InvalidArgument with close names when timm does not know the name."""
    import timm

    if not timm.is_model(name):
        import difflib

        close = difflib.get_close_matches(name.split(".")[0], timm.list_models(), n=3)
        raise InvalidArgument(
            "NAME",
            f"{name!r}, which timm {timm.__version__} does not know",
            f"a timm model name{', perhaps ' + ' or '.join(close) if close else ''}",
            "timm.list_models('*vit*') lists them.",
        )
    model: nn.Module = timm.create_model(name, pretrained=pretrained, **kwargs)
    return model


def find_builder(model: nn.Module, input_size: tuple[int, ...]) -> Builder | None:
    """How timm can build this architecture again, or None; checked by comparing all parameter names and shapes."""
    import timm

    config = getattr(model, "pretrained_cfg", None) or {}
    name, classes = config.get("architecture"), getattr(model, "num_classes", None)
    if not name or classes is None or not timm.is_model(name):
        return None
    wanted = fingerprint(model)
    size = (int(input_size[-2]), int(input_size[-1]))
    for kwargs in ({"num_classes": classes}, {"num_classes": classes, "img_size": size}):
        builder = Builder(name=name, kwargs=kwargs)
        try:
            with torch.device("meta"):
                candidate = build(builder)
        except (TypeError, RuntimeError, NotImplementedError, AssertionError):
            continue
        if fingerprint(candidate) == wanted:
            return builder
    return None


def preprocessing(model: nn.Module) -> Preprocessing | None:
    """Mean, std and crop of the model's `pretrained_cfg`, or None where it has none."""
    config = getattr(model, "pretrained_cfg", None) or {}
    if not config.get("mean") or not config.get("std"):
        return None
    return Preprocessing(
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        crop_pct=config.get("crop_pct") or 0.875,
        interpolation=config.get("interpolation") or "bicubic",
    )


def example_size(model: nn.Module) -> tuple[int, ...] | None:
    """(C, H, W) that the model was built for, where it says so."""
    config = getattr(model, "config", None)  # of transformers
    said = (
        getattr(getattr(model, "patch_embed", None), "img_size", None),
        getattr(model, "image_size", None),
        getattr(config, "image_size", None),
    )
    size = next((sides for sides in map(pair, said) if sides is not None), None)
    declared = (getattr(model, "pretrained_cfg", None) or {}).get("input_size")
    channels = next((module.in_channels for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    if size is not None:
        return (int(channels or 3), *size)
    return tuple(declared) if declared else None
