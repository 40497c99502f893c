"""Random networks of the same kinds against the formulas of the paper, written down as loops over positions.

With m the softmax over heads of head_probs / alpha: V_p = sum_h m[h, p] V_h, P_p and b_p likewise; a 3x3 convolution is
(sum_p P_p) ReLU(BN(sum_p V_p y[i + dy, j + dx] + sum_p b_p)) + b_proj. Nothing here is shared with msa2conv.
"""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch
from authors_code import assert_close
from sampled import sampled
from torch import Tensor, nn

from msa2conv import spvit

ALPHA = {"deit": 0.01, "swin": 100.0}
KINDS = ("skip", "1x1", "3x3", "attention")
State = dict[str, Tensor]


def tap(family: str, p: int) -> tuple[int, int]:
    """(dy, dx) of position p; in Swin the centre comes first and the others follow in DeiT's order."""
    if family == "swin":
        p = 4 if p == 0 else p - 1 if p <= 4 else p
    return p % 3 - 1, p // 3 - 1


def convolve(family: str, kind: str, state: State, path: str, y_HWC: Tensor) -> Tensor:
    heads = len(state[f"{path}.head_probs"])
    height, width, dim = y_HWC.shape
    v, bias = state[f"{path}.v.weight"], state[f"{path}.v.bias"]
    proj, size = state[f"{path}.proj.weight"], dim // heads
    mixture = torch.softmax(state[f"{path}.head_probs"] / ALPHA[family], 0)
    centre = 0 if family == "swin" else 4

    def mixed(p: int) -> tuple[Tensor, Tensor, Tensor]:
        rows = [(mixture[h, p], slice(h * size, (h + 1) * size)) for h in range(heads)]
        return sum(m * v[r] for m, r in rows), sum(m * bias[r] for m, r in rows), sum(m * proj[:, r] for m, r in rows)

    positions = range(9) if kind == "3x3" else [centre]
    parts = {p: mixed(p) for p in positions}
    norm = {leaf: state[f"{path}.bn_{kind}.{leaf}"] for leaf in ("weight", "bias", "running_mean", "running_var")}
    out = torch.empty_like(y_HWC)
    for i, j in itertools.product(range(height), range(width)):
        hidden = sum(b for _, b, _ in parts.values())
        for p, (v_p, _, _) in parts.items():
            dy, dx = tap(family, p)
            if 0 <= i + dy < height and 0 <= j + dx < width:
                hidden = hidden + v_p @ y_HWC[i + dy, j + dx]
        hidden = (hidden - norm["running_mean"]) / torch.sqrt(norm["running_var"] + 1e-5)
        hidden = torch.relu(hidden * norm["weight"] + norm["bias"])
        out[i, j] = sum(p_p for _, _, p_p in parts.values()) @ hidden + state[f"{path}.proj.bias"]
    return out


def authors_state(model: nn.Module, heads: int, kinds: list[str], form: str, seed: int) -> State:
    """A state dict in the authors' names with the weights of a timm model, and random values where it has none."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    swin = any(name.startswith("layers.") for name in model.state_dict())
    state: State = {}
    for name, value in model.state_dict().items():
        value = value + 0.1 * noise(*value.shape)
        if ".attn.qkv." in name:
            third = len(value) // 3
            state[name.replace("qkv", "qk")], state[name.replace("qkv", "v")] = value[: 2 * third], value[2 * third :]
        else:
            state[name.replace("head.fc.", "head.")] = value
    paths = [name.removesuffix(".qk.weight") for name in state if name.endswith(".qk.weight")]
    for path, kind in zip(paths, kinds, strict=True):
        size = len(state[f"{path}.v.weight"]) // heads
        added = {f"{path}.head_probs": 1 + ALPHA["swin" if swin else "deit"] * noise(heads, 9)}
        for side in ("1x1", "3x3"):
            values = {"weight": 1 + 0.3 * noise(size), "bias": 0.3 * noise(size), "running_mean": 0.3 * noise(size)}
            values |= {"running_var": 0.5 + noise(size) ** 2, "num_batches_tracked": torch.tensor(7)}
            if form == "search" or kind == side:
                added |= {f"{path}.bn_{side}.{leaf}": value for leaf, value in values.items()}
        if form == "search":
            opened = torch.tensor([k < KINDS.index(kind) for k in range(3)])
            state[f"{path}.kernel_thresholds" + ("_full" if swin else "")] = torch.where(opened, 0.4, -0.4)
            hidden = f"{path.removesuffix('attn')}mlp"
            state[f"{hidden}.ffn_thresholds"] = noise(len(state[f"{hidden}.fc1.bias"]))
        if form == "search" or kind in ("1x1", "3x3"):
            state |= added
        if form != "search" and kind == "skip":
            state = {name: value for name, value in state.items() if not name.startswith(f"{path}.")}
    return state


def deit(draw: random.Random, heads: int) -> tuple[nn.Module, tuple[int, int]]:
    from timm.models.vision_transformer import VisionTransformer

    grid = (draw.randint(2, 5), draw.randint(2, 5))
    sizes = {"img_size": (grid[0] * 4, grid[1] * 4), "patch_size": 4, "embed_dim": heads * draw.choice((4, 6))}
    return VisionTransformer(**sizes, depth=4, num_heads=heads, mlp_ratio=2.0, num_classes=5), grid


def swin(draw: random.Random, heads: int) -> tuple[nn.Module, tuple[int, int]]:
    from timm.models.swin_transformer import SwinTransformer

    window = draw.choice((2, 3, 4))
    grid = (window * draw.randint(2, 3), window * draw.randint(2, 3))
    sizes = {"img_size": (grid[0] * 2, grid[1] * 2), "patch_size": 2, "embed_dim": heads * draw.choice((4, 6))}
    options = {"depths": (4,), "num_heads": (heads,), "window_size": window, "num_classes": 5}
    return SwinTransformer(**sizes, **options, mlp_ratio=2.0), grid


def naive_mixer(
    family: str, form: str, kind: str, state: State, path: str, y: Tensor, window: Any, shift: int
) -> Tensor:
    """What the attention unit returns for tokens [N, C] with a class token (DeiT) or a map [H, W, C] (Swin)."""
    if kind == "skip":
        return torch.zeros_like(y) if form == "search" else y
    if window is None:
        return convolve(family, kind, state, path, y)
    rolled = torch.roll(y, (-shift, -shift), (0, 1))
    for top, left in itertools.product(range(0, y.shape[0], window), range(0, y.shape[1], window)):
        cut = (slice(top, top + window), slice(left, left + window))
        rolled[cut] = convolve(family, kind, state, path, rolled[cut].clone())
    return torch.roll(rolled, (shift, shift), (0, 1))


@pytest.mark.parametrize("form", ["search", "fine-tune"])
@pytest.mark.parametrize("family", ["deit", "swin"])
@pytest.mark.parametrize("seed", sampled(range(4), 2))
@torch.no_grad()
def test_random_networks(seed: int, family: str, form: str) -> None:
    draw = random.Random(seed)
    heads = draw.choice((1, 2, 3, 5))
    model, (height, width) = (deit if family == "deit" else swin)(draw, heads)
    kinds = draw.sample(KINDS, 4)
    state = authors_state(model.eval(), heads, kinds, form, seed)
    result = spvit.load_checkpoint(state, model)
    assert form in result.report.calibration
    hybrid, state = result.model.double().eval(), {name: value.double() for name, value in state.items()}
    torch.manual_seed(seed)
    for index, kind in enumerate(kinds):
        if kind == "attention":
            continue  # the host itself, in its own weights: the fixtures hold it
        at = f"{'blocks' if family == 'deit' else 'layers.0.blocks'}.{index}"
        block: Any = hybrid.get_submodule(at)
        path = f"{at}.attn"
        shape = (1, 1 + height * width) if family == "deit" else (1, height, width)
        x = torch.randn(*shape, block.norm1.weight.numel(), dtype=torch.float64)
        y = block.norm1(x)[0]
        if family == "deit" and kind != "skip":
            patches = y[1:].reshape(height, width, -1)
            mixed = naive_mixer(family, form, kind, state, path, patches, None, 0).reshape(height * width, -1)
            mixed = torch.cat((y[:1], mixed))
        else:
            window = block.window_size[0] if family == "swin" and form == "search" else None
            mixed = naive_mixer(family, form, kind, state, path, y, window, block.shift_size[0] if window else 0)
        after = x + mixed[None]
        assert_close(block(x), after + block.mlp(block.norm2(after)))
