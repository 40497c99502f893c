"""Bottlenecks without anything in between, as one convolution where that takes fewer multiply-adds."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..ops import Conv
from ..plan import Edit, Replace
from .restate import Restatement, restated_mixers


def merge_linear(edits: tuple[Edit, ...], model: nn.Module) -> tuple[tuple[Edit, ...], nn.Module]:
    """C -> rank -> C becomes C -> C where the rank is wide: of 1x1 convolutions from C / 2 on.

    Args:
        edits: of the Plan that made `model`.
        model: a hybrid; not touched.

    Returns:
        (edits of the merged network, a copy of it).
    """
    return restated_mixers(edits, model, _merged)


def _merged(edit: Replace, old: nn.Module) -> Restatement | None:
    if not isinstance(edit.spec, Conv) or not _cheaper(edit.spec):
        return None
    return edit.spec.model_copy(update={"rank": edit.spec.dim}), joined(old.state_dict())


def _cheaper(spec: Conv) -> bool:
    linear, area = spec.norm is None and spec.act is None, spec.kernel**2
    return linear and spec.bottleneck and area * spec.dim < spec.rank * (area + 1)


@torch.no_grad()
def joined(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The values of a linear `ConvMixer` with its second convolution worked into the first, which has no bias."""
    expand_OR, reduce = state["expand.weight"].flatten(1), state["reduce.weight"]  # the latter [R, I, H, W] or [R, I]
    weight = torch.einsum("or,r...->o...", expand_OR.double(), reduce.double())
    others = {name: value for name, value in state.items() if not name.startswith(("reduce.", "expand."))}
    return {**others, "reduce.weight": weight.to(reduce), "reduce.bias": state["expand.bias"]}
