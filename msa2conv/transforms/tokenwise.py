"""1x1 convolutions of mixers as linear layers, where the tokens already are the map with its channels last.

A convolution wants its channels first or copies to have them last; a linear layer reads tokens as they lie.
"""

from __future__ import annotations

from torch import nn

from ..ops import Conv, Depthwise, Spec
from ..plan import Edit, Replace
from .restate import Restatement, restated_mixers


def tokenwise(edits: tuple[Edit, ...], model: nn.Module) -> tuple[tuple[Edit, ...], nn.Module]:
    """Every 1x1 convolution that a mixer begins with; others follow a 3x3, whose maps lie as the library likes.

    Args:
        edits: of the Plan that made `model`.
        model: a hybrid; not touched.

    Returns:
        (edits of a network with linear layers there, a copy of it).
    """
    return restated_mixers(edits, model, _linear)


def _linear(edit: Replace, old: nn.Module) -> Restatement | None:
    if not _begins_pointwise(edit.spec):
        return None
    spec = edit.spec.model_copy(update={"tokenwise": True})
    shapes = {name: value.shape for name, value in spec.build(edit.io).state_dict().items()}
    return spec, {name: value.reshape(shapes[name]) for name, value in old.state_dict().items()}


def _begins_pointwise(spec: Spec) -> bool:
    if not isinstance(spec, (Conv, Depthwise)) or spec.tokenwise or not spec.layout.channels_last:
        return False
    return isinstance(spec, Depthwise) or spec.kernel == 1
