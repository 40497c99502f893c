"""Gate searches on the tiny models, in a state in which everything that a search learns makes a difference."""

from __future__ import annotations

from typing import Any

import tiny
import torch
from torch import Tensor, nn

import msa2conv
from msa2conv import FFN, Search
from msa2conv.options import Option
from msa2conv.search.gates import ffn_options, mixer_options

ANY_WIDTH = FFN(round_to=1)


def prepared(name: str = "vit", target: float | str = 0.7, model: nn.Module | None = None, **other: Any) -> Search:
    """A search of a tiny model whose FFNs may get any width."""
    arguments = {"levers": ("mixer", ANY_WIDTH), "example_inputs": tiny.images(name)[:1], **other}
    return msa2conv.prepare(model or tiny.build(name), target, adapters=tiny.adapters(name), **arguments)


@torch.no_grad()
def scramble(search: Search, seed: int = 0) -> Search:
    """Random thresholds, head mixtures and BatchNorms."""
    generator = torch.Generator().manual_seed(seed)

    def noise(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator).to(like)

    for gate in search.named_gates.values():
        gate.theta.copy_(2 * noise(gate.theta))
    for node in search.nodes.values():
        node.head_probs.copy_(search.gates.alpha * noise(node.head_probs))
        for norm in (node.bn_1x1, node.bn_3x3):
            norm.weight.copy_(1 + 0.3 * noise(norm.weight)), norm.bias.copy_(0.3 * noise(norm.bias))
            norm.running_mean.copy_(noise(norm.running_mean)), norm.running_var.copy_(noise(norm.running_var) ** 2 + 1)
    return search


@torch.no_grad()
def put_thresholds(search: Search, mixers: tuple[float, float, float] = (1.5, 1.5, 1.5), units: float = 1.5) -> Search:
    """The same thresholds everywhere."""
    for path, gate in search.named_gates.items():
        gate.theta.copy_(torch.tensor(mixers if path in search.nodes else [units]).expand_as(gate.theta))
    return search


def options(search: Search) -> dict[str, list[Option]]:
    """{site: everything that the search may choose there}."""
    costs = search.inspection.costs
    found = {p: mixer_options(site, search.nodes[p].gate, costs, search.gates) for p, site in search.mixers.items()}
    lever = search._ffn or FFN()
    return found | {p: ffn_options(site, search.units[p].gate, costs, lever) for p, site in search.ffns.items()}


def run(model: nn.Module, images: Tensor) -> Tensor:
    """In eval mode, without gradients."""
    with torch.no_grad():
        out: Tensor = model.eval()(images)
    return out


def assert_close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """The tolerance of the laws."""
    difference, scale = float((found - expected).abs().max()), max(1.0, float(expected.abs().max()))
    assert difference <= tolerance * scale, f"differs by {difference:.2e} at a scale of {scale:.2e}"
