"""How tokens lie on the image: the only place that knows it.

Shape suffixes: B batch, P prefix tokens, C channels, H W grid; a token tensor has no fixed shape, its pattern says it.
"""

from __future__ import annotations

import math
import re
from functools import cached_property
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from .errors import LayoutMismatch

Size = tuple[int, int]
LONGEST = 16384  # side of a grid
_SEQUENCES = ("b (h w) c", "(h w) b c")
SIDE_BY_SIDE, APART = "b c (nh h) (nw w)", "b c (h nh) (w nw)"
_AXES = re.compile(r"\(([^()]*)\)|(\S+)")


def _axes(pattern: str) -> list[list[str]]:
    """The axes of every dimension: "b (h w) c" -> [["b"], ["h", "w"], ["c"]]."""
    return [(inner or single).split() for inner, single in _AXES.findall(pattern)]


class Layout(BaseModel):
    """A bijection between a token tensor and (prefix tokens, a C x H x W map).

    The pattern names the axes of the token tensor, outermost first; axes that share a tensor dimension stand in
    parentheses. `b` is the batch, `c` the channels, `h w` the position inside a window, `nh nw` the window; `h1 w1`,
    `h2 w2`, ... are further subdivisions of the map, whose sizes `strides` gives.

        "b (h w) c"             ViT: one window that is the whole grid; "(h w) b c" with the sequence first
        "(b nh nw) (h w) c"     Swin: windows folded into the batch
        "b (nh nw) (h w) c"     NesT: windows in a dimension of their own
        "b h w c", "b c h w"    maps

    `map` says how these axes lie on the map. Going to tokens the map is rolled by `-shift`, padded with zeros at the
    bottom and right to whole windows, and cut; going to the map all of that is undone and padded positions are dropped.

    Args:
        pattern: see above.
        grid: (H, W) of the real positions.
        prefix: number of tokens (class, distillation, registers) before the patches; needs the pattern `b (h w) c` or
            `(h w) b c`.
        window: (h, w) of a window; None means the whole grid.
        shift: cyclic shift (rows, columns) that the backbone applied before cutting windows.
        rolled: what it shifted: the map, or the padded map (Hugging Face's Swin).
        map: `b c (nh h) (nw w)`, windows side by side; `b c (h nh) (w nw)`, the positions of a window lie nh and nw
            apart (MaxViT's grid attention, MobileViT's patches); `b c (nh h h2 h1) (nw w w2 w1)`, Hiera's unrolled
            tokens.
        strides: sizes of (h1, w1), (h2, w2), ...

    Raises:
        LayoutMismatch: tokens that do not have this geometry.

    Example:
        >>> import torch
        >>> layout = Layout(grid=(14, 14), prefix=1)
        >>> prefix, patches = layout.to_map(torch.zeros(2, 197, 8))
        >>> prefix.shape, patches.shape
        (torch.Size([2, 1, 8]), torch.Size([2, 8, 14, 14]))
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    pattern: str = Field(default="b (h w) c", max_length=64)
    grid: tuple[int, int]
    prefix: int = Field(default=0, ge=0, le=1024)
    window: tuple[int, int] | None = None
    shift: tuple[int, int] = (0, 0)
    rolled: Literal["map", "padded"] = "map"
    map: str = Field(default=SIDE_BY_SIDE, max_length=64)
    strides: tuple[Size, ...] = Field(default=(), max_length=4)

    @model_validator(mode="after")
    def _check(self) -> Layout:
        of_h, of_w = (["h", "nh", *self._finer("h")], ["w", "nw", *self._finer("w")])
        axes = sorted(axis for group in self._groups for axis in group)
        assert self._order  # cached now: `torch.compile` cannot fill a cache
        whole = sorted(["b", "c", *of_h, *of_w])
        if axes not in (whole, sorted(set(whole) - {"nh", "nw"})):
            raise ValueError(f"pattern {self.pattern!r} must name b, c, h and w once (nh and nw belong to windows)")
        if ["c"] not in self._groups:
            raise ValueError(f"pattern {self.pattern!r} must leave the channels c a dimension of their own")
        if [sorted(group) for group in _axes(self.map)] != [["b"], ["c"], sorted(of_h), sorted(of_w)]:
            raise ValueError(f"map {self.map!r} must be 'b c (...) (...)' with {of_h} and {of_w} in some order")
        for name, size in (("grid", self.grid), ("window", self._window), *(("stride", s) for s in self.strides)):
            if not all(1 <= side <= LONGEST for side in size):
                raise ValueError(f"{name} {size} must lie in 1..{LONGEST}")
        if not all(0 <= shift < side for shift, side in zip(self.shift, self.grid, strict=True)):
            raise ValueError(f"shift {self.shift} must lie in 0..grid-1")
        if self.prefix and self.pattern not in _SEQUENCES:
            raise ValueError(f"prefix tokens need the pattern {' or '.join(map(repr, _SEQUENCES))}")
        if self._counts != (1, 1) and not {"nh", "nw"} <= {axis for group in self._groups for axis in group}:
            raise ValueError(f"pattern {self.pattern!r} must name nh and nw, since there are {self._counts} windows")
        return self

    def _finer(self, side: str) -> list[str]:
        return [f"{side}{level}" for level in range(1, len(self.strides) + 1)]

    @cached_property
    def _groups(self) -> list[list[str]]:
        return _axes(self.pattern)

    @cached_property
    def _order(self) -> list[str]:
        """The axes as they lie on the padded map, outermost first."""
        return [axis for group in _axes(self.map) for axis in group]

    @property
    def _fine(self) -> Size:
        """How many positions of the grid one position of a window stands for."""
        rows, columns = 1, 1
        for stride in self.strides:
            rows, columns = rows * stride[0], columns * stride[1]
        return rows, columns

    @property
    def _window(self) -> Size:
        (height, width), (fine_h, fine_w) = self.grid, self._fine
        return self.window or (height // max(fine_h, 1), width // max(fine_w, 1))

    @cached_property
    def _counts(self) -> Size:
        (grid_h, grid_w), (h, w), (fine_h, fine_w) = self.grid, self._window, self._fine
        return math.ceil(grid_h / max(h * fine_h, 1)), math.ceil(grid_w / max(w * fine_w, 1))

    @property
    def _padded(self) -> Size:
        (h, w), (nh, nw), (fine_h, fine_w) = self._window, self._counts, self._fine
        return nh * h * fine_h, nw * w * fine_w

    @property
    def channels(self) -> int:
        """Which dimension of the token tensor holds the channels."""
        return self._groups.index(["c"])

    @property
    def channels_last(self) -> bool:
        """Whether a map is a view of its tokens, which then are the map with its channels last."""
        whole = self._counts == (1, 1) and self._padded == self.grid and not any(self.shift) and not self.strides
        return whole and self.pattern in ("b (h w) c", "b h w c")

    @property
    def _sequence(self) -> int:
        """Which dimension of a sequence its tokens lie in."""
        return 1 - self._groups.index(["b"])

    def batch_first(self, tokens: Tensor) -> Tensor:
        """A sequence as [B, N, C]."""
        return tokens if self._sequence else tokens.transpose(0, 1)

    @property
    def positions(self) -> int:
        """Number of real grid positions, H * W."""
        return self.grid[0] * self.grid[1]

    def _sizes(self, channels: int) -> dict[str, int]:
        (h, w), (nh, nw) = self._window, self._counts
        fine_h = dict(zip(self._finer("h"), (stride[0] for stride in self.strides), strict=True))
        fine_w = dict(zip(self._finer("w"), (stride[1] for stride in self.strides), strict=True))
        return {"h": h, "w": w, "nh": nh, "nw": nw, "c": channels} | fine_h | fine_w

    def check(self, tokens: Tensor) -> None:
        """Raise LayoutMismatch unless `tokens` has this geometry."""
        if tokens.ndim == len(self._groups):
            sizes = self._sizes(tokens.shape[self.channels])
            expected = [math.prod([sizes.get(axis, 1) for axis in group]) for group in self._groups]
            if self.prefix:
                expected[self._sequence] += self.prefix
            if all(
                found % size == 0 if "b" in group else found == size
                for found, size, group in zip(tokens.shape, expected, self._groups, strict=True)
            ):
                return
        (h, w), prefix = self.grid, f" + {self.prefix} prefix tokens" if self.prefix else ""
        windows = f" in windows of {self._window[0]} x {self._window[1]}" if self.window else ""
        raise LayoutMismatch(
            f"tokens '{self.pattern}'",
            f"a tensor of shape {tuple(tokens.shape)}",
            f"{h} x {w} positions{prefix}{windows}",
            "A hybrid runs at the image size it was converted for, with all patches: convert again with example_inputs "
            "of the new size, and train it without patch dropout.",
        )

    def to_map(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens -> (prefix_BPC, map_BCHW)."""
        self.check(tokens)
        if self.prefix:
            # one split, whose gradient is one concatenation; two slices would each fill a tensor with zeros
            prefix_BPC, tokens = torch.split(tokens, [self.prefix, self.positions], self._sequence)
            prefix_BPC = prefix_BPC if self._sequence else prefix_BPC.transpose(0, 1)
        else:
            prefix_BPC = tokens.new_zeros((0,))
        channels = tokens.shape[self.channels]
        sizes = self._sizes(channels)
        shape: list[int] = []
        for group in self._groups:
            shape += [sizes.get(axis, -1) for axis in group]
        flat = [axis for group in self._groups for axis in group]
        order = [flat.index(axis) for axis in self._order if axis in flat]
        map_BCHW = tokens.reshape(shape).permute(order).reshape(-1, channels, *self._padded)
        if any(self.shift) and self.rolled == "padded":
            map_BCHW = torch.roll(map_BCHW, self.shift, (2, 3))
        map_BCHW = map_BCHW[:, :, : self.grid[0], : self.grid[1]]
        if any(self.shift) and self.rolled == "map":
            map_BCHW = torch.roll(map_BCHW, self.shift, (2, 3))
        return prefix_BPC, map_BCHW

    def from_map(self, prefix_BPC: Tensor, map_BCHW: Tensor) -> Tensor:
        """(prefix_BPC, map_BCHW) -> tokens; the inverse of `to_map`, with zeros at padded positions."""
        back = (-self.shift[0], -self.shift[1])
        if any(back) and self.rolled == "map":
            map_BCHW = torch.roll(map_BCHW, back, (2, 3))
        pad_h, pad_w = self._padded[0] - self.grid[0], self._padded[1] - self.grid[1]
        if pad_h or pad_w:
            map_BCHW = F.pad(map_BCHW, (0, pad_w, 0, pad_h))
        if any(back) and self.rolled == "padded":
            map_BCHW = torch.roll(map_BCHW, back, (2, 3))
        batch, channels = map_BCHW.shape[:2]
        sizes = {**self._sizes(channels), "b": batch}
        flat = [axis for group in self._groups for axis in group]
        source = [axis for axis in self._order if axis in flat]
        tokens = map_BCHW.reshape([sizes[axis] for axis in source]).permute([source.index(axis) for axis in flat])
        tokens = tokens.reshape([math.prod([sizes[axis] for axis in group]) for group in self._groups])
        if not self.prefix:
            return tokens
        prefix = prefix_BPC if self._sequence else prefix_BPC.transpose(0, 1)
        return torch.cat((prefix, tokens), self._sequence)
