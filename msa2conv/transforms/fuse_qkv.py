"""The three linear layers in front of a thin attention as one: fewer and larger products, as the original has them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops import Attend
from ..plan import Edit, Replace
from .restate import Restatement, restated_mixers


def fuse_qkv(edits: tuple[Edit, ...], model: nn.Module) -> tuple[tuple[Edit, ...], nn.Module]:
    """Every `Attend` mixer, also where it runs on merged tokens.

    Args:
        edits: of the Plan that made `model`.
        model: a hybrid; not touched.

    Returns:
        (edits of a network with one layer for q, k and v, a copy of it).
    """
    return restated_mixers(edits, model, _fused)


def _fused(edit: Replace, old: nn.Module) -> Restatement | None:
    if not isinstance(edit.spec, Attend) or edit.spec.fused:
        return None
    return edit.spec.model_copy(update={"fused": True}), _joined(old.state_dict())


def _joined(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same values; a key has no bias, since it would cancel."""
    joined = {name: value for name, value in state.items() if name.startswith("proj.")}
    joined["qkv.weight"] = torch.cat([state[f"{part}.weight"] for part in "qkv"])
    if "q.bias" in state:
        none = state["q.bias"].new_zeros(len(state["k.weight"]))
        joined["qkv.bias"] = torch.cat((state["q.bias"], none, state["v.bias"]))
    return joined
