"""Another module for a mixer, with the values that it is to have: what passes over a finished hybrid put in."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from ..plan import Replace


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
