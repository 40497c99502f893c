"""Where the tokens of an attention lie: from what was observed, and from what a family declares.

Each function here returns a Geometry, a function from a Place to the Layout there; it raises Unknown with a reason
where what it sees does not fit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from ..errors import LayoutMismatch
from ..layouts import APART, SIDE_BY_SIDE, Layout, Size
from ..observation import Call, Observation


class Unknown(Exception):
    """Why a module is left as it is."""


@dataclass(frozen=True)
class Place:
    """A module in its model, and its one call in the observed forward pass."""

    model: nn.Module
    module: nn.Module
    path: str
    call: Call
    seen: Observation

    @property
    def above(self) -> Iterator[tuple[nn.Module, Call | None]]:
        """The modules around it, innermost first, and their call if it was one."""
        path = self.path
        while path:
            path = path.rpartition(".")[0]
            yield self.model.get_submodule(path), self.seen.once(path)

    def attribute(self, name: str) -> Any:
        """An attribute of the module or of the innermost one around it that has it (dots go inside), else None."""
        for module in (self.module, *(module for module, _ in self.above)):
            value: Any = module
            for part in name.split("."):
                value = getattr(value, part, None)
            if value is not None:
                return value
        return None

    @property
    def x(self) -> tuple[int, ...]:
        assert self.call.x is not None
        return self.call.x


Geometry = Callable[[Place], Layout]


def tokens(prefix: int | Callable[[Place], int] | None = None, pattern: str = "b (h w) c") -> Geometry:
    """A sequence [B, prefix + H W, C], row by row.

    Args:
        prefix: number of tokens before the patches, or how to find it; None: see `prefix_of`.
        pattern: "(h w) b c" for [prefix + H W, B, C].
    """
    sequence = 1 if pattern.startswith("b") else 0

    def layout(place: Place) -> Layout:
        if len(place.x) != 3 or place.x[1 - sequence] != 1:
            raise Unknown(f"its tokens {place.x} are not one sequence an image")
        length = place.x[sequence]
        before = prefix(place) if callable(prefix) else prefix_of(place, length) if prefix is None else prefix
        return checked(place, Layout(pattern=pattern, grid=grid_of(place, length - before), prefix=before))

    return layout


def prefix_of(place: Place, length: int) -> int:
    """How many of so many tokens come before the patches: what the model says; else the fewest that leave a grid.

    At most two then.
    """
    for name in ("num_prefix_tokens", "has_cls_token", "num_tokens"):
        count = place.attribute(name)
        if isinstance(count, int):
            return int(count)
    image = _image(place)
    for grids in (_strided, _shaped_alike):
        for count in (0, 1, 2):
            if len(grids(length - count, image)) == 1:
                return count
    raise Unknown(f"its {length} tokens are no grid of a {image[0]} x {image[1]} image, less up to two tokens")


def channels_last(place: Place) -> Layout:
    """A map [B, H, W, C]."""
    if len(place.x) != 4 or place.x[0] != 1:
        raise Unknown(f"its input {place.x} is not one channels-last map an image")
    return checked(place, Layout(pattern="b h w c", grid=(place.x[1], place.x[2])))


def channels_first(place: Place) -> Layout:
    """A map [B, C, H, W]."""
    if len(place.x) != 4 or place.x[0] != 1:
        raise Unknown(f"its input {place.x} is not one channels-first map an image")
    return checked(place, Layout(pattern="b c h w", grid=(place.x[2], place.x[3])))


def windows(
    pattern: str = "(b nh nw) (h w) c",
    size: str = "window_size",
    shift: str | None = None,
    around: str = "b h w c",
    dilated: str | None = None,
    rolled: Literal["map", "padded"] = "map",
) -> Geometry:
    """Windows of a map, padded with zeros at the bottom and right to whole ones.

    Args:
        pattern: how the windows arrive.
        size, shift: attributes that hold the window's sides and the roll before cutting.
        around: how the map arrives at the innermost module around that gets one.
        rolled: what is rolled.
        dilated: attribute that is False where windows are dilated (MaxViT's `partition_block`).
    """

    def found(place: Place) -> Layout:
        plain = pattern.replace("(b nh nw)", "b")
        if place.attribute(size) is None:  # no windows: it gets the map itself
            grid = place.x[plain.split().index("h")], place.x[plain.split().index("w")]
            return checked(place, Layout(pattern=plain, grid=grid))
        grid = _map_around(place, around)
        window = pair(place.attribute(size)) or grid
        if not all(window):
            window = grid  # 0 is SAM's way to say that there are no windows
        offset = (pair(place.attribute(shift)) if shift else None) or (0, 0)
        apart = dilated is not None and place.attribute(dilated) is False
        arrangement = APART if apart else SIDE_BY_SIDE
        layout = Layout(pattern=pattern, grid=grid, window=window, shift=offset, rolled=rolled, map=arrangement)
        return checked(place, layout)

    return found


def unrolled(place: Place, size: Sequence[int], schedule: Sequence[Sequence[int]]) -> Layout:
    """Hiera's tokens, ordered so that every pooling takes the maximum over the outermost axis.

    Args:
        place: the attention.
        size: sides of the first map.
        schedule: strides of the poolings, the first one first.
    """
    grid, left = (int(size[0]), int(size[1])), [(int(rows), int(columns)) for rows, columns in schedule]
    while grid[0] * grid[1] > place.x[1] and left:
        grid = (grid[0] // left[0][0], grid[1] // left.pop(0)[1])
    levels = range(1, len(left) + 1)
    inside = " ".join(f"h{level} w{level}" for level in levels)
    fine_h, fine_w = (" ".join(f"{side}{level}" for level in reversed(levels)) for side in "hw")
    layout = Layout(
        pattern=f"b ({inside} h w) c",
        grid=grid,
        map=f"b c (nh h {fine_h}) (nw w {fine_w})",
        strides=tuple(left),
    )
    return checked(place, layout)


def grid_of(place: Place, positions: int) -> Size:
    """(H, W) of this many positions: as an argument says, as a map around has them, or as the image is shaped."""
    arguments = place.call.arguments
    for value in (*arguments.values(), (arguments.get("height"), arguments.get("width"))):
        sides = pair(value)
        if sides and sides[0] * sides[1] == positions:
            return sides
    for _, call in place.above:
        if call is not None and call.x is not None and len(call.x) == 4 and call.x != tuple(place.seen.inputs.shape):
            _, a, b, c = call.x
            for rows, columns, depth in ((a, b, c), (b, c, a)):
                if rows * columns == positions and depth == place.x[-1]:
                    return rows, columns
    image = _image(place)
    for grids in (_strided, _shaped_alike):
        found = grids(positions, image)
        if len(found) == 1:
            return found.pop()
    raise Unknown(f"its {positions} positions are no grid of a {image[0]} x {image[1]} image")


def _image(place: Place) -> Size:
    height, width = place.seen.inputs.shape[-2:]
    return int(height), int(width)


def _strided(positions: int, image: Size) -> set[Size]:
    """Grids of so many positions that one stride makes of the image, whole or padded."""
    height, width = image
    grids = set()
    for stride in range(1, max(image) + 1):
        grids |= {(-(-height // stride), -(-width // stride)), (height // stride, width // stride)}
    return {(rows, columns) for rows, columns in grids if rows * columns == positions}


def _shaped_alike(positions: int, image: Size) -> set[Size]:
    """Grids of so many positions that have the image's shape to within a row or column (overlapping patches)."""
    height, width = image
    pairs = {(rows, positions // rows) for rows in range(1, positions + 1) if positions % rows == 0}
    return {(rows, columns) for rows, columns in pairs if abs(rows * width - columns * height) < min(image)}


def _map_around(place: Place, pattern: str) -> Size:
    axes = pattern.split()
    for _, call in place.above:
        if call is None or call.x is None or call.x[0] != 1:
            continue
        if len(call.x) == 4:
            return call.x[axes.index("h")], call.x[axes.index("w")]
        for value in call.arguments.values():  # its size comes beside a sequence
            sides = pair(value)
            if len(call.x) == 3 and sides and sides[0] * sides[1] == call.x[1]:
                return sides
    raise Unknown("no module around it gets a map")


def pair(value: Any) -> Size | None:
    """(height, width) of an int or of two ints; None for anything else."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value, value
    if isinstance(value, (tuple, list)) and len(value) == 2 and all(isinstance(side, int) for side in value):
        return value[0], value[1]
    return None


def checked(place: Place, layout: Layout) -> Layout:
    """The layout, if the observed input has it."""
    try:
        layout.check(torch.empty(place.x, device="meta"))
    except LayoutMismatch as error:
        raise Unknown(f"its input {place.x} is not {error.expected}") from None
    return layout
