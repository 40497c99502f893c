"""What hangs on one hidden unit, and what cannot be dropped safely."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from msa2conv.observation import Given
from msa2conv.sites import Unit, Units
from msa2conv.transforms.apply import apply_edits
from msa2conv.transforms.groups import hidden_units

PAIR = {("fc1.weight", 0), ("fc1.bias", 0), ("fc2.weight", 1)}


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.gate, self.fc2 = nn.Linear(8, 12), nn.Linear(8, 12, bias=False), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.gate(x).sigmoid() * self.fc1(x))


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.norm, self.fc2 = nn.Linear(8, 12), nn.LayerNorm(12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.norm(self.fc1(x)))


class Deep(nn.Module):
    """1x1 convolution, BatchNorm, depthwise 3x3, 1x1 convolution: the FFN of a convolutional pyramid."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.norm = nn.Conv2d(8, 12, 1), nn.BatchNorm2d(12)
        self.mid, self.fc2 = nn.Conv2d(12, 12, 3, padding=1, groups=12), nn.Conv2d(12, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.mid(self.norm(self.fc1(x)).relu()))


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.mid, self.fc2 = nn.Conv2d(8, 12, 1), nn.Conv2d(12, 12, 3, 1, 1, groups=4), nn.Conv2d(12, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.mid(self.fc1(x)))


class Softmaxed(nn.Module):
    """Couples its hidden units by a function that no graph of layers shows."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x).softmax(-1))


class OfSize(nn.Module):
    """Told the size of its map, as PVTv2's."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 12), nn.Linear(12, 8)
        self.dwconv = nn.Conv2d(12, 12, 3, 1, 1, groups=12)

    def forward(self, x: Tensor, feat_size: list[int]) -> Tensor:
        hidden = self.fc1(x).transpose(1, 2).unflatten(2, feat_size)
        return self.fc2(self.dwconv(hidden).flatten(2).transpose(1, 2))


def glu() -> nn.Module:
    from timm.layers import GluMlp

    return GluMlp(8, 24)


def hanging(*args: Any) -> set[Unit]:
    units = hidden_units(*args)
    assert isinstance(units, Units) and not units.beside and units.split is None
    return set(units.hanging)


def test_a_plain_ffn() -> None:
    from timm.layers import Mlp

    assert hanging(Mlp(8, 12), "fc2", (1, 5, 8)) == PAIR
    assert hanging(Mlp(8, 12, bias=False), "fc2", (1, 5, 8)) == PAIR - {("fc1.bias", 0)}
    assert hanging(Mlp(8, 12, drop=0.5), "fc2", (1, 4, 4, 8)) == PAIR


def test_a_gate_goes_with_its_units() -> None:
    assert hanging(Gated(), "fc2", (1, 5, 8)) == {*PAIR, ("gate.weight", 0)}


def test_a_layer_that_holds_gate_and_value_stands_there_twice() -> None:
    expected = {*PAIR, ("fc1.weight", 0, 12), ("fc1.bias", 0, 12)}
    assert hanging(glu(), "fc2", (1, 5, 8)) == expected


def test_batch_norms_and_depthwise_convolutions_go_with_their_channel() -> None:
    found = hanging(Deep(), "fc2", (1, 8, 4, 4))
    norm = {(f"norm.{name}", 0) for name in ("weight", "bias", "running_mean", "running_var")}
    assert found == {*PAIR, *norm, ("mid.weight", 0), ("mid.bias", 0)}


@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_a_block_that_computes_attention_and_ffn_at_once(bias: bool) -> None:
    """What is no hidden unit in its first projection stays; without a joint bias the units have one of their own."""
    from timm.models.vision_transformer import ParallelScalingBlock

    block = ParallelScalingBlock(8, 2, mlp_ratio=1.5, qkv_bias=bias).eval()
    for parameter in block.parameters():
        parameter.normal_()
    units = hidden_units(block, "mlp_out_proj", (1, 5, 8), {}, "in_split")
    if hasattr(block, "qkv_bias") and not bias:  # timm 1.0.21 concatenates its biases, which cannot be traced
        assert units == "its LayerNorm in_norm couples the hidden units"
        return
    assert isinstance(units, Units)
    joint = {("in_proj.weight", 0), ("in_proj.bias" if bias else "mlp_bias", 0)}
    assert set(units.hanging) == {*joint, ("mlp_out_proj.weight", 1)}
    assert {(name, span) for name, _, span in units.beside} == {
        (name, (12, 36)) for name, _ in joint if name.startswith("in_proj")
    }
    kept, deaf, holder, x = [0, 3, 4, 11], copy.deepcopy(block), nn.Module(), torch.randn(2, 5, 8)
    deaf.mlp_out_proj.weight[:, [unit for unit in range(12) if unit not in kept]] = 0
    holder.block = copy.deepcopy(block)
    apply_edits(holder, units.edits("block", kept))
    assert holder.block.in_split == [4, 8, 8, 8] and holder.block.in_proj.out_features == 28
    torch.testing.assert_close(holder.block(x), deaf(x), rtol=1e-5, atol=1e-5)


def test_a_split_that_is_not_what_it_is_said_to_be_is_named() -> None:
    from timm.models.vision_transformer import ParallelScalingBlock

    block = ParallelScalingBlock(8, 2, mlp_ratio=1.5)
    block.in_split = [8, 12, 8, 8]
    expected = "the first of its in_split [8, 12, 8, 8] is not the 12 inputs of its output layer mlp_out_proj"
    assert hidden_units(block, "mlp_out_proj", (1, 5, 8), {}, "in_split") == expected


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], dict[str, object]]] = {
    "gated": (Gated, (2, 5, 8), {}),
    "packed gate": (glu, (2, 5, 8), {}),
    "convolutions": (Deep, (2, 8, 4, 3), {}),
    "told its size": (OfSize, (2, 12, 8), {"feat_size": [4, 3]}),
}


@pytest.mark.parametrize(("build", "shape", "arguments"), CASES.values(), ids=CASES.keys())
@torch.no_grad()
def test_without_units_it_computes_what_it_did_without_listening_to_them(
    build: Callable[[], nn.Module], shape: tuple[int, ...], arguments: dict[str, object]
) -> None:
    module = build().eval()
    units = hidden_units(module, "fc2", (1, *shape[1:]), arguments)
    assert isinstance(units, Units)
    kept = [0, 1, 4, 5, 6, 9, 11]
    deaf, holder, x = copy.deepcopy(module), nn.Module(), torch.randn(shape)
    gone = [unit for unit in range(12) if unit not in kept]
    deaf.fc2.weight[:, gone] = 0
    holder.ffn = copy.deepcopy(module)
    apply_edits(holder, units.edits("ffn", kept))
    torch.testing.assert_close(holder.ffn(x, **arguments), deaf(x, **arguments), rtol=1e-5, atol=1e-6)
    assert sum(p.numel() for p in holder.parameters()) < sum(p.numel() for p in module.parameters())


REFUSED = {
    "norm": (Normed(), (1, 5, 8), {}, "its LayerNorm norm couples the hidden units"),
    "grouped": (Grouped(), (1, 8, 4, 4), {}, "its Conv2d mid couples the hidden units"),
    "softmax": (
        Softmaxed(),
        (1, 5, 8),
        {},
        "its output depends on a hidden unit in more ways than through its output layer",
    ),
    "tensor": (OfSize(), (1, 12, 8), {"feat_size": Given("Tensor")}, "it is called with 'feat_size', which cannot be"),
    "wrong size": (OfSize(), (1, 12, 8), {"feat_size": [5, 3]}, "torch-pruning cannot trace it (RuntimeError)"),
}


@pytest.mark.parametrize(("module", "shape", "arguments", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_dropped_safely_is_named(
    module: nn.Module, shape: tuple[int, ...], arguments: dict[str, object], reason: str
) -> None:
    found = hidden_units(module, "fc2", shape, arguments)
    assert isinstance(found, str) and found.startswith(reason)


def test_an_output_layer_that_mixes_positions_is_refused() -> None:
    module = nn.Sequential(nn.Conv2d(8, 12, 1), nn.Conv2d(12, 8, 3, padding=1))
    assert "neither a Linear nor an ungrouped 1 x 1 convolution" in str(hidden_units(module, "1", (1, 8, 4, 4)))


@pytest.mark.parametrize("build", [Gated, Normed, Deep])
def test_the_module_is_only_looked_at(build: type[nn.Module]) -> None:
    module = build().train().requires_grad_(False)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    hidden_units(module, "fc2", (1, 8, 4, 8))
    assert module.training and not any(parameter.requires_grad for parameter in module.parameters())
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_weights_on_the_meta_device_do() -> None:
    from timm.layers import Mlp

    with torch.device("meta"):
        module = Mlp(8, 12)
    assert hanging(module, "fc2", (1, 5, 8)) == PAIR
