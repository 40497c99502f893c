"""Small models with seeded weights, and the helpers that the tests of the public API, files and messages share."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import msa2conv
from msa2conv import Conversion
from msa2conv.ops import TokenMixer

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 10}
SWIN = {"img_size": 56, "patch_size": 4, "embed_dim": 24, "depths": (2, 2), "num_heads": (3, 6), "window_size": 7}


def vit(**changes: Any) -> nn.Module:
    """A ViT of 1.2 MFLOPs."""
    from timm.models.vision_transformer import VisionTransformer

    return seeded(VisionTransformer(**{**VIT, **changes}))


def swin(**changes: Any) -> nn.Module:
    """A Swin of 11 MFLOPs, with shifted windows in its first stage."""
    from timm.models.swin_transformer import SwinTransformer

    return seeded(SwinTransformer(**{**SWIN, "num_classes": 10, **changes}))


def seeded(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights of a size that makes every part matter; eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            norm = parameter.ndim == 1 and name.endswith("weight")
            parameter.copy_(1 + 0.1 * noise if norm else 0.15 * noise)
    return model.eval()


def images(count: int = 16, size: int = 32, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


@functools.cache
def converted(kind: str = "vit") -> Conversion:
    """A conversion that all tests share and none alters: half the FLOPs, so that mixers are in use."""
    return _converted(kind, None)


@functools.cache
def replaced(kind: str = "vit") -> Conversion:
    """The same without merging, further from the original: something is left to learn."""
    return _converted(kind, ("mixer", "ffn"))


def _converted(kind: str, levers: tuple[str, ...] | None) -> Conversion:
    model, size = (vit(), 32) if kind == "vit" else (swin(), 56)
    result = msa2conv.convert(model, 0.5, data=images(size=size), levers=levers)
    assert any(isinstance(module, TokenMixer) for module in result.model.modules())
    return result


def same(first: nn.Module, second: nn.Module) -> bool:
    """Equal state dicts: names, dtypes and bits."""
    a, b = first.state_dict(), second.state_dict()
    return a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and a[name].equal(b[name]) for name in a)


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything of a model that must survive a call, in comparable form."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    state: dict[str, Any] = {name: _facts(tensor) for name, tensor in tensors.items()}
    for path, module in model.named_modules():
        hooks = (list(module._forward_hooks.values()), list(module._forward_pre_hooks.values()))
        state[f"module {path}"] = (id(module), module.training, hooks, "forward" in vars(module))
    return state


def _facts(tensor: Tensor) -> tuple[Any, ...]:
    values = b"" if tensor.is_meta else tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes()
    return id(tensor), tensor.dtype, tensor.requires_grad, tensor.grad is None, values


def files(folder: Path) -> dict[str, bytes | None]:
    """{relative path: content} of everything below a folder, hidden files included."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}
