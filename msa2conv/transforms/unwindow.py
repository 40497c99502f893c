"""Blocks that cut their map into windows although nothing attends inside them any more: the map stays whole.

A convolution or a constant in the place of a windowed attention puts the windows together again, and cuts what it
returns. Of a block whose window is the whole map, timm's Swin for one, nothing is rolled, padded or copied: so the
block is told that it has such a window, and the mixer that its tokens are a sequence.

Shape suffixes: B batch, H W grid, C channels.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..layouts import Layout
from ..plan import Edit, Replace, SetAttr
from .apply import apply_edits, replace_submodule, submodule
from .mergeable import same
from .restate import restated

_WINDOW = ("window_size", "shift_size", "window_area")  # what a block knows about it


def unwindow(
    edits: tuple[Edit, ...], model: nn.Module, input_size: tuple[int, ...]
) -> tuple[tuple[Edit, ...], nn.Module]:
    """Let every block whose windowed attention was replaced work on its whole map, where that changes nothing.

    Tried out on random tokens and never believed by name: what answers otherwise, a convolution inside every window for
    one, is left as it is.

    Args:
        edits: of the Plan that made `model`.
        model: a hybrid; not touched.
        input_size: (C, H, W) of an image.

    Returns:
        (edits of a network without these windows, a copy of it).
    """
    whole = copy.deepcopy(model).eval()
    replaced = [edit for edit in edits if isinstance(edit, Replace)]
    blocks = {edit.path: edit.path.rpartition(".")[0] for edit in replaced}
    cut = {path: block for path, block in blocks.items() if block and _cuts(submodule(whole, block))}
    shapes = _maps(whole, set(cut.values()), input_size)
    found: list[Edit] = []
    for edit in edits:
        changed: list[Edit] | None = None
        if isinstance(edit, Replace) and edit.path in cut and cut[edit.path] in shapes:
            changed = _unwindowed(whole, edit, cut[edit.path], shapes[cut[edit.path]])
        found += [edit] if changed is None else changed
    modes = {path: module.training for path, module in model.named_modules()}
    for path, module in whole.named_modules():
        module.training = modes[path]
    return tuple(found), whole


def _cuts(block: nn.Module) -> bool:
    """Whether a block has windows of a size of its own."""
    window, shift, area = (vars(block).get(name) for name in _WINDOW)
    return isinstance(window, tuple) and isinstance(shift, tuple) and area == math.prod(window)


@torch.no_grad()
def _maps(model: nn.Module, blocks: set[str], input_size: tuple[int, ...]) -> Mapping[str, tuple[int, ...]]:
    """{block: the channels-last map [1, H, W, C] that it is given}."""
    shapes: dict[str, tuple[int, ...]] = {}

    def see(path: str, args: tuple[object, ...]) -> None:
        if args and isinstance(args[0], Tensor) and args[0].ndim == 4:
            shapes[path] = tuple(args[0].shape)

    handles = [
        submodule(model, path).register_forward_pre_hook(lambda _, args, path=path: see(path, args)) for path in blocks
    ]
    try:
        if blocks:
            model(torch.zeros(1, *input_size).to(next(model.parameters())))
    finally:
        for handle in handles:
            handle.remove()
    return shapes


@torch.no_grad()
def _unwindowed(model: nn.Module, edit: Replace, path: str, shape: tuple[int, ...]) -> list[Edit] | None:
    """The edits that make it so, done; None where nothing can be gained, or something else would come out."""
    block, grid = submodule(model, path), (shape[1], shape[2])
    spec, old = edit.spec, submodule(model, edit.path)
    if vars(block)["window_size"] == grid and not any(vars(block)["shift_size"]):
        return None
    if isinstance(getattr(spec, "layout", None), Layout):
        spec = spec.model_copy(update={"layout": Layout(grid=grid)})
    new = edit.model_copy(update={"spec": spec})
    values: tuple[int | tuple[int, ...], ...] = (grid, (0, 0), math.prod(grid))
    told = [SetAttr(path=path, name=name, value=value) for name, value in zip(_WINDOW, values, strict=True)]
    before = {name: vars(block)[name] for name in _WINDOW}
    x_BHWC = torch.randn(2, *shape[1:], generator=torch.Generator().manual_seed(0)).to(next(model.parameters()))
    expected = block(x_BHWC)
    try:
        replace_submodule(model, edit.path, restated(new, old, old.state_dict()))
        apply_edits(model, told)
        if same(block(x_BHWC), expected):
            return [new, *told]
    except (RuntimeError, ValueError):  # tables of another size, or a block that wants its windows
        pass
    replace_submodule(model, edit.path, old)
    vars(block).update(before)
    return None
