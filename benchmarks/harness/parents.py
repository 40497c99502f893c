"""The dense networks that are made cheaper, and where their weights are.

    python -m benchmarks train deit_fashion --data FOLDER      # trains a micro parent and writes its weights

A micro parent is small enough that a laptop trains it in half an hour, and has what a large one has: windows, shifts
and a pyramid (Swin), a class token and six blocks (DeiT). Their weights lie in half precision beside this package.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from msa2conv.errors import ArchitectureMismatch, InvalidArgument, InvalidCheckpoint
from msa2conv.files import read_state_dict, write_tensors

WEIGHTS = Path(__file__).parents[1] / "parents"
CLOTHING = Path(__file__).parents[2] / "examples" / "clothing" / "vit_tiny_clothing10.safetensors"


def deit(channels: int) -> nn.Module:
    """A DeiT for images of 28 pixels: 49 patches and a class token, 6 blocks of width 64."""
    shape: dict[str, Any] = {"img_size": 28, "patch_size": 4, "in_chans": channels, "num_classes": 10}
    return VisionTransformer(**shape, embed_dim=64, depth=6, num_heads=4)


def swin(channels: int) -> nn.Module:
    """A Swin for images of 32 pixels: 8 x 8 patches in (shifted) windows of 4 x 4, 2 blocks of width 48 and 4 of 96."""
    shape: dict[str, Any] = {"img_size": 32, "patch_size": 4, "in_chans": channels, "num_classes": 10}
    return SwinTransformer(**shape, embed_dim=48, depths=(2, 4), num_heads=(3, 6), window_size=4)


@dataclass(frozen=True)
class Parent:
    """How to build a parent.

    Args:
        build: without its weights.
        input: (C, H, W).
        weights: a file; None: the user says which.
        expected: what that file is, for an error.
        epochs, lr: of its training, where it is trained here.
    """

    build: Callable[[], nn.Module]
    input: tuple[int, int, int]
    weights: Path | None
    expected: str = "weights written by `python -m benchmarks train NAME`"
    epochs: int = 0
    lr: float = 1e-3

    @property
    def example(self) -> Tensor:
        """One made-up image [1, C, H, W]."""
        return torch.randn(1, *self.input, generator=torch.Generator().manual_seed(0))


def _micro(name: str, build: Callable[[], nn.Module], size: tuple[int, int, int], epochs: int) -> Parent:
    return Parent(build, size, WEIGHTS / f"{name}.safetensors", epochs=epochs)


def _timm(name: str, **kwargs: Any) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, **kwargs)


PHOTO = (3, 224, 224)
PARENTS = {
    "deit_fashion": _micro("deit_fashion", lambda: deit(1), (1, 28, 28), 6),
    "swin_cifar": _micro("swin_cifar", lambda: swin(3), (3, 32, 32), 12),
    "deit_cifar": _micro("deit_cifar", lambda: deit(3), (3, 28, 28), 12),
    "swin_fashion": _micro("swin_fashion", lambda: swin(1), (1, 32, 32), 6),
    "vit_tiny_clothing": Parent(_timm("vit_tiny_patch16_224", num_classes=10), PHOTO, CLOTHING, "the clothing ViT-Ti"),
    "vit_tiny": Parent(
        _timm("vit_tiny_patch16_224"), PHOTO, None,
        "timm's vit_tiny_patch16_224.augreg_in21k_ft_in1k, saved as safetensors",
    ),
    "deit_tiny": Parent(_timm("deit_tiny_patch16_224"), PHOTO, None, "timm's deit_tiny_patch16_224.fb_in1k"),
    "deit_small": Parent(_timm("deit_small_patch16_224"), PHOTO, None, "timm's deit_small_patch16_224.fb_in1k"),
    "swin_tiny": Parent(
        _timm("swin_tiny_patch4_window7_224"), PHOTO, None, "timm's swin_tiny_patch4_window7_224.ms_in1k"
    ),
}  # fmt: skip


def parent_of(name: str) -> Parent:
    """A known parent; raises InvalidArgument."""
    if name not in PARENTS:
        raise InvalidArgument("parent", repr(name), " or ".join(map(repr, PARENTS)), "Name one of them in the config.")
    return PARENTS[name]


def load_parent(name: str, weights: Path | None = None) -> nn.Module:
    """A parent in eval mode.

    Args:
        name: one of PARENTS.
        weights: a file to read instead of its own.

    Raises:
        InvalidCheckpoint: no weights; says which are expected.
        ArchitectureMismatch: those of another network.
    """
    parent = parent_of(name)
    path = weights or parent.weights
    if path is None or not path.is_file():
        hint = f"`python -m benchmarks train {name} --data FOLDER`" if parent.epochs else "--weights FILE"
        raise InvalidCheckpoint(str(path or name), "no such file", parent.expected, f"Get it by {hint}.")
    model, state = parent.build(), read_state_dict(path)
    if {key: value.shape for key, value in state.items()} != {k: v.shape for k, v in model.state_dict().items()}:
        raise ArchitectureMismatch(str(path), "weights of another architecture", parent.expected, "Pass another file.")
    model.load_state_dict({key: value.float() if value.is_floating_point() else value for key, value in state.items()})
    return model.eval()


def save_parent(model: nn.Module, path: Path, about: dict[str, str]) -> None:
    """Weights in half precision: what is read back is what is measured."""
    halves = {key: value.half() if value.is_floating_point() else value for key, value in model.state_dict().items()}
    write_tensors(path, halves, about)
