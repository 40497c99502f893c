"""The three linear layers in front of a thin attention as one: fewer and larger products, as the original has them."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from ..merging import Merged
from ..ops import Attend
from ..plan import Edit, Replace
from .apply import replace_submodule, submodule
from .restate import restated


def fuse_qkv(edits: tuple[Edit, ...], model: nn.Module) -> tuple[tuple[Edit, ...], nn.Module]:
    """Every `Attend` mixer, also where it runs on merged tokens.

    Args:
        edits: of the Plan that made `model`.
        model: a hybrid; not touched.

    Returns:
        (edits of a network with one layer for q, k and v, a copy of it).
    """
    fused = copy.deepcopy(model)
    found: list[Edit] = []
    for edit in edits:
        if isinstance(edit, Replace) and isinstance(edit.spec, Attend) and not edit.spec.fused:
            path = f"{edit.path}.host" if isinstance(submodule(fused, edit.path), Merged) else edit.path
            old = submodule(fused, path)
            edit = edit.model_copy(update={"spec": edit.spec.model_copy(update={"fused": True}), "start": None})
            replace_submodule(fused, path, restated(edit, old, _joined(old.state_dict())))
        found.append(edit)
    return tuple(found), fused


def _joined(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same values; a key has no bias, since it would cancel."""
    joined = {name: value for name, value in state.items() if name.startswith("proj.")}
    joined["qkv.weight"] = torch.cat([state[f"{part}.weight"] for part in "qkv"])
    if "q.bias" in state:
        none = state["q.bias"].new_zeros(len(state["k.weight"]))
        joined["qkv.bias"] = torch.cat((state["q.bias"], none, state["v.bias"]))
    return joined
