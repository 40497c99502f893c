"""1x1 convolutions of mixers as linear layers, where the tokens already are the map with its channels last.

A convolution wants its channels first or copies to have them last; a linear layer reads tokens as they lie.
"""

from __future__ import annotations

import copy

from torch import Tensor, nn

from ..ops import Conv, Depthwise
from ..plan import Edit, Replace
from .apply import replace_submodule, submodule
from .restate import restated


def tokenwise(edits: tuple[Edit, ...], model: nn.Module) -> tuple[tuple[Edit, ...], nn.Module]:
    """Every 1x1 convolution that a mixer begins with; others follow a 3x3, whose maps lie as the library likes.

    Args:
        edits: of the Plan that made `model`.
        model: a hybrid; not touched.

    Returns:
        (edits of a network with linear layers there, a copy of it).
    """
    linear = copy.deepcopy(model)
    found: list[Edit] = []
    for edit in edits:
        if isinstance(edit, Replace) and _begins_pointwise(edit):
            old = submodule(linear, edit.path)
            edit = edit.model_copy(update={"spec": edit.spec.model_copy(update={"linear": True}), "start": None})
            own = edit.spec.build(edit.io).state_dict()
            state: dict[str, Tensor] = {
                name: value.reshape(own[name].shape) for name, value in old.state_dict().items()
            }
            replace_submodule(linear, edit.path, restated(edit, old, state))
        found.append(edit)
    return tuple(found), linear


def _begins_pointwise(edit: Replace) -> bool:
    spec = edit.spec
    if not isinstance(spec, (Conv, Depthwise)) or spec.linear or not spec.layout.channels_last:
        return False
    return isinstance(spec, Depthwise) or spec.kernel == 1
