"""Tiny backbones with random weights that matter, and one backbone that msa2conv has never seen.

Small enough that every option of every site can be tried: depth 2 to 4, width 24 to 48, images of 24 to 72 pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from msa2conv.layouts import Layout
from msa2conv.observation import Observation
from msa2conv.ops import IO
from msa2conv.sites import AttentionSite, Claims, FFNSite, Projections, Rows, Units

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "num_heads": 3, "depth": 3, "num_classes": 10}
SWIN = {"patch_size": 4, "embed_dim": 24, "depths": (2, 2), "num_heads": (3, 6), "window_size": 7, "num_classes": 10}


def _vit(**changes: Any) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(**{**VIT, **changes})


def _distilled() -> nn.Module:
    from timm.models.deit import VisionTransformerDistilled

    return VisionTransformerDistilled(**VIT)


def _swin(img_size: int | tuple[int, int]) -> nn.Module:
    from timm.models.swin_transformer import SwinTransformer

    return SwinTransformer(img_size=img_size, **SWIN)


class GridAttention(nn.Module):
    """Attention on channels-last maps that returns (output, weights), as Hugging Face's attentions do."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.project = nn.Linear(dim, 3 * dim)
        self.merge = nn.Linear(dim, dim)

    def forward(self, hidden: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        batch, height, width, _ = hidden.shape
        qkv = self.project(hidden).reshape(batch, height * width, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(-1)
        out = (weights @ v).transpose(1, 2).reshape(batch, height, width, -1)
        return self.merge(out), weights


class GridMlp(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


class GridBlock(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.mixer, self.mlp = GridAttention(dim, 4), GridMlp(dim, 6 * dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(hidden=self.norm1(x), mask=None)[0]
        return x + self.mlp(self.norm2(x))


class GridNet(nn.Module):
    """Convolutional stem, three blocks on a 6 x 4 map, mean, linear head. Not timm, not a sequence of tokens."""

    def __init__(self, dim: int = 32, classes: int = 7) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 16, 2, 2, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, dim, 2, 2)
        )
        self.blocks = nn.ModuleList(GridBlock(dim) for _ in range(3))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).permute(0, 2, 3, 1)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean((1, 2)))


class GridAdapter:
    """Everything that msa2conv has to be told about GridNet."""

    name = "GridNet"

    def claims(self, model: nn.Module, seen: Observation) -> Claims:
        found = []
        for path, module in model.named_modules():
            call, block = seen.once(path), path.rpartition(".")[0]
            if isinstance(module, GridAttention) and call is not None:
                _, height, width, dim = call.out
                layout = Layout(pattern="b h w c", grid=(height, width))
                io = IO(returns="tuple", x="hidden", absent=("mask",))
                v, head_dim = Rows("project", 2 * dim, 3 * dim), dim // module.heads
                named = Projections(v=v, out=Rows("merge"), heads=module.heads, head_dim=head_dim)
                found.append(AttentionSite(path, block, dim, module.heads, head_dim, layout, io, named))
            elif isinstance(module, GridMlp) and call is not None:
                layout = Layout(pattern="b h w c", grid=call.x[1:3])
                units = Units((("up.weight", 0), ("up.bias", 0), ("down.weight", 1)))
                dim, hidden = module.up.in_features, module.up.out_features
                found.append(FFNSite(path, block, dim, hidden, layout, "down", units))
        return Claims.of(found)


BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "vit": _vit,
    "distilled": _distilled,
    "deit3": partial(_vit, init_values=0.5, no_embed_class=True),
    "qk_norm": partial(_vit, qk_norm=True),
    "registers": partial(_vit, reg_tokens=2),
    "avg_pool": partial(_vit, class_token=False, global_pool="avg"),
    "non_square": partial(_vit, img_size=(32, 48)),
    "features": partial(_vit, num_classes=0),
    "swin": partial(_swin, 56),
    "swin_padded": partial(_swin, (56, 72)),
    "foreign": GridNet,
}
NAMES = tuple(BUILDERS)
VARIANTS = ("deit3", "registers", "avg_pool", "swin")  # of what others in the list have too: for `make test-all`
SIZES = {"non_square": (32, 48), "swin": (56, 56), "swin_padded": (56, 72), "foreign": (24, 16)}


def adapters(name: str) -> tuple[GridAdapter, ...] | None:
    """What to pass as `adapters=`."""
    return (GridAdapter(),) if name == "foreign" else None


def build(name: str, seed: int = 0) -> nn.Module:
    """A model in eval mode whose random weights make attention sharp and outputs differ between images."""
    model = BUILDERS[name]()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            parameter.copy_(_values(path, parameter, generator))
        for path, buffer in model.named_buffers():
            if path.endswith(("running_mean", "running_var")):
                buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
    return model.eval()


def _values(path: str, parameter: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn(parameter.shape, generator=generator)
    leaf = path.rpartition(".")[2]
    if leaf in ("cls_token", "dist_token", "reg_token", "pos_embed", "relative_position_bias_table"):
        return noise
    if parameter.ndim == 1:
        return 0.2 * noise if leaf == "bias" else 1 + 0.2 * noise
    values = noise / math.sqrt(parameter[0].numel())
    if path.endswith(("qkv.weight", "project.weight")):
        values[: 2 * len(values) // 3] *= 1.7  # queries and keys: softmax far from uniform
    if path.endswith((".attn.proj.weight", "merge.weight")):
        values *= 2  # what attention adds is not small beside the residual stream
    return values


def images(name: str, count: int = 24, seed: int = 1) -> Tensor:
    """Random pictures, each with its own smooth background, [count, 3, H, W]."""
    height, width = SIZES.get(name, (32, 32))
    generator = torch.Generator().manual_seed(seed)
    background = nn.functional.interpolate(torch.randn(count, 3, 3, 3, generator=generator), (height, width))
    return background + 0.5 * torch.randn(count, 3, height, width, generator=generator)


def hear_nothing(module: nn.Module, args: Any, out: Any) -> None:
    """A hook that a user might have left on a model."""


def live_in(model: nn.Module) -> nn.Module:
    """Leave the traces of use: training mode, a frozen part, gradients, hooks."""
    model.train()
    first, *_, last = model.children()
    first.eval().requires_grad_(False)
    for parameter in last.parameters():
        parameter.grad = torch.ones_like(parameter)
    first.register_forward_hook(hear_nothing)
    return model


def snapshot(model: nn.Module) -> dict[str, Any]:
    """All of a model that a user could see change, as plain comparable values."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    state: dict[str, Any] = {}
    for path, tensor in tensors.items():
        state[f"tensor {path}"] = (id(tensor), tensor.requires_grad, tensor.dtype, tensor.detach().numpy().tobytes())
        state[f"gradient {path}"] = None if tensor.grad is None else tensor.grad.numpy().tobytes()
    for path, module in model.named_modules():
        hooks = [list(value.values()) for name, value in vars(module).items() if name.endswith("_hooks")]
        plain = {name: value for name, value in vars(module).items() if isinstance(value, (bool, int, float, tuple))}
        state[f"module {path}"] = (
            id(module),
            type(module),
            list(module._modules),
            plain,
            hooks,
            "forward" in vars(module),
        )
    return state
