"""The two-layer FFN that ViT and Swin share: fc1, activation, optional norm, fc2."""

from __future__ import annotations

from torch import nn

from ..layouts import Layout
from ..sites import FFNSite, Observation, Refusal
from ..transforms.groups import hidden_units
from .paths import block_of


def claim_ffn(module: nn.Module, path: str, layout: Layout, seen: Observation) -> FFNSite | Refusal:
    """An FFNSite for timm's `Mlp`, or the reason why it is left dense."""
    kind = type(module).__name__
    call = seen.once(path)
    first, last = module._modules.get("fc1"), module._modules.get("fc2")
    if not isinstance(first, nn.Linear) or not isinstance(last, nn.Linear):
        return Refusal(path, kind, "fc1 and fc2 are not both Linear layers: left dense")
    if not isinstance(module._modules.get("norm"), (nn.Identity, type(None))):
        return Refusal(path, kind, "a norm over the hidden units couples them: left dense")
    if call is None or call.x is None:
        return Refusal(path, kind, f"it ran {len(seen.calls.get(path, []))} times in one forward pass: left dense")
    units = hidden_units(module, "fc1", call.x)
    if units is None:
        return Refusal(path, kind, "torch-pruning finds parameters outside fc1 and fc2 in the group: left dense")
    return FFNSite(path, block_of(path), last.out_features, first.out_features, layout, "fc2", units)
