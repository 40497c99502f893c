"""BatchNorms of convolutions folded into their neighbours: the same outputs in eval mode, less to compute."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops import Conv, ConvMixer
from ..plan import Edit, Replace
from .merge_linear import joined
from .restate import Restatement, restated_mixers


def fold_norms(edits: tuple[Edit, ...], model: nn.Module) -> tuple[tuple[Edit, ...], nn.Module]:
    """Fold the BatchNorm of every mixer that has one; others, the host's own, are left alone.

    Args:
        edits: of the Plan that made `model`.
        model: a hybrid; not touched.

    Returns:
        (edits without these norms, a copy without them).
    """
    return restated_mixers(edits, model, _without_norm)


@torch.no_grad()
def _without_norm(edit: Replace, old: nn.Module) -> Restatement | None:
    if not isinstance(edit.spec, Conv) or edit.spec.norm is None:
        return None
    assert isinstance(old, ConvMixer)
    spec = edit.spec.model_copy(update={"norm": None})
    state = {name: value for name, value in old.state_dict().items() if not name.startswith("norm.")}
    scale_R, shift_R = _affine(old.norm)
    weight = state["reduce.weight"]
    state["reduce.weight"] = weight * scale_R.reshape(-1, *(1 for _ in weight.shape[1:]))
    bias_R = shift_R + scale_R * state["reduce.bias"]
    if spec.act is not None:
        return spec, state | {"reduce.bias": bias_R}
    # nothing stands between the two convolutions now: the second one's bias takes it all
    state.pop("reduce.bias")
    state["expand.bias"] = state["expand.bias"] + state["expand.weight"].flatten(1) @ bias_R
    return spec, state if spec.bottleneck else joined(state)


def _affine(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """(scale, shift) of a BatchNorm in eval mode."""
    assert isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None and norm.running_var is not None
    scale_R = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    return scale_R, norm.bias - scale_R * norm.running_mean
