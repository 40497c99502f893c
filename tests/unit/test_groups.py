"""What hangs on one hidden unit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

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


def test_a_plain_ffn() -> None:
    from timm.layers import Mlp

    assert set(hidden_units(Mlp(8, 12), "fc1", (1, 5, 8)) or ()) == PAIR
    assert set(hidden_units(Mlp(8, 12, bias=False), "fc1", (1, 5, 8)) or ()) == PAIR - {("fc1.bias", 0)}
    assert set(hidden_units(Mlp(8, 12, drop=0.5), "fc1", (1, 4, 4, 8)) or ()) == PAIR


def test_a_gate_goes_with_its_units() -> None:
    assert set(hidden_units(Gated(), "fc1", (1, 5, 8)) or ()) == {*PAIR, ("gate.weight", 0)}


def test_a_norm_over_the_hidden_units_is_not_safe() -> None:
    assert hidden_units(Normed(), "fc1", (1, 5, 8)) is None


@pytest.mark.parametrize("build", [Gated, Normed])
def test_the_module_is_only_looked_at(build: type[nn.Module]) -> None:
    module = build().train().requires_grad_(False)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    hidden_units(module, "fc1", (1, 5, 8))
    assert module.training and not any(parameter.requires_grad for parameter in module.parameters())
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
