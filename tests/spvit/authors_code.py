"""What the authors' code gave (tests/fixtures), and timm's networks of the same sizes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from msa2conv import spvit
from msa2conv.spvit import Recipe

FIXTURES = Path(__file__).parents[1] / "fixtures"
torch.set_num_threads(1)


@cache
def fixture(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = torch.load(FIXTURES / f"{name}.pt", weights_only=True)
    return loaded


@cache
def published_counts() -> dict[str, dict[str, Any]]:
    return dict(json.loads((FIXTURES / "published_architectures.json").read_text()))


def is_swin(constructor: dict[str, Any]) -> bool:
    return "depths" in constructor


def build(constructor: dict[str, Any]) -> nn.Module:
    """timm's network of the size that the authors' constructor states, in eval mode; its weights do not matter."""
    from timm.models.swin_transformer import SwinTransformer
    from timm.models.vision_transformer import VisionTransformer

    names = ["img_size", "patch_size", "num_classes", "embed_dim", "num_heads", "mlp_ratio"]
    names += ["depths", "window_size"] if is_swin(constructor) else ["depth"]
    kind = SwinTransformer if is_swin(constructor) else VisionTransformer
    model: nn.Module = kind(**{name: constructor[name] for name in names}, drop_path_rate=0.0)
    return model.eval()


def blocks(model: nn.Module) -> list[nn.Module]:
    return [m for path, m in model.named_modules() if path.split(".")[-1].isdigit() and path.split(".")[-2] == "blocks"]


@contextmanager
def block_outputs(model: nn.Module) -> Iterator[list[Tensor]]:
    """Tokens [B, N, C] behind every block of the next forward pass."""
    found: list[Tensor] = []

    def record(module: nn.Module, args: Any, out: Tensor) -> None:
        found.append(out.flatten(1, -2))

    handles = [block.register_forward_hook(record) for block in blocks(model)]
    yield found
    for handle in handles:
        handle.remove()


def recipe_of(data: dict[str, Any]) -> Recipe:
    name = "swin_tiny" if is_swin(data["constructor"]) else "deit_tiny"
    return spvit.config(name, gflops=data["target_gflops"], penalty=data["loss_lambda"])


def thresholds(data: dict[str, Any], signs: list[list[int]]) -> dict[str, Tensor]:
    """{name in the authors' state dict: thresholds} of one setting of the gates."""
    names = [name for name in data["state_dict"] if ".attn.kernel_thresholds" in name]
    size = data["forced_threshold"]
    return {name: torch.tensor(row) * 2 * size - size for name, row in zip(names, signs, strict=True)}


def assert_close(found: Tensor | float, wanted: Tensor | float, relative: float = 1e-5, absolute: float = 0.0) -> None:
    """|found - wanted| <= relative max|wanted| + absolute, everywhere."""
    found, wanted = torch.as_tensor(found).detach().double(), torch.as_tensor(wanted).detach().double()
    assert found.shape == wanted.shape
    difference, limit = float((found - wanted).abs().max()), relative * float(wanted.abs().max()) + absolute
    assert difference <= limit, f"a difference of {difference:.3g}, at most {limit:.3g}"
