"""Another module for a mixer, with the values that it is to have: what passes over a finished hybrid put in."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

from torch import Tensor, nn

from ..merging import Merged
from ..ops import MixerSpec
from ..plan import Edit, Replace
from .apply import replace_submodule, submodule

Restatement = tuple[MixerSpec, Mapping[str, Tensor]]  # what is to stand there, and all its values


def restated_mixers(
    edits: tuple[Edit, ...], model: nn.Module, change: Callable[[Replace, nn.Module], Restatement | None]
) -> tuple[tuple[Edit, ...], nn.Module]:
    """What most passes do: other modules for some of the mixers, also where they run on merged tokens.

    Args:
        edits: of the Plan that made `model`.
        model: a hybrid; not touched.
        change: asked about every mixer, with its edit and its module; None: it stays.

    Returns:
        (edits of the new network, a copy of it).
    """
    changed = copy.deepcopy(model)
    found: list[Edit] = []
    for edit in edits:
        if isinstance(edit, Replace):
            path = f"{edit.path}.host" if isinstance(submodule(changed, edit.path), Merged) else edit.path
            old = submodule(changed, path)
            new = change(edit, old)
            if new is not None:
                spec, state = new
                edit = edit.model_copy(update={"spec": spec, "start": None})
                replace_submodule(changed, path, restated(edit, old, state))
        found.append(edit)
    return tuple(found), changed


def restated(edit: Replace, old: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """The module that `edit` describes, where `old` stood: its device, dtype, mode, and what of it may be trained.

    Args:
        edit: with the spec of the new module.
        old: the mixer that stands there.
        state: all values.
    """
    known, like = dict(old.named_parameters()), next(old.parameters(), None)
    new = edit.spec.build(edit.io).train(old.training)
    new = new if like is None else new.to(like.device, like.dtype)
    new.load_state_dict(dict(state))
    for name, parameter in new.named_parameters():
        parameter.requires_grad_(known.get(name, like if like is not None else parameter).requires_grad)
    return new
