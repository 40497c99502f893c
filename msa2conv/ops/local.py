"""Mixers that no token asks anything: nothing, a constant, a global average, a convolution.

Shape suffixes: B batch, P prefix tokens, N tokens, C channels, H W grid, R rank, O I out in.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated, Literal

import torch
from pydantic import AfterValidator, Field
from torch import Tensor, nn

from ..layouts import Layout
from .base import IO, Spec, TokenMixer, Width
from .prefix import Prefix, PrefixPass, prefix_module


def _odd(kernel: int) -> int:
    if kernel % 2 == 0:
        raise ValueError(f"kernel {kernel} must be odd")
    return kernel


Kernel = Annotated[int, Field(ge=1, le=15), AfterValidator(_odd)]


class Skip(Spec):
    """The mixer adds nothing: zeros."""

    kind: Literal["skip"] = "skip"

    def build(self, io: IO) -> TokenMixer:
        return SkipMixer(self, io)


class Identity(Spec):
    """The mixer returns its input: what the published SPViT code does for a skipped block after its search."""

    kind: Literal["identity"] = "identity"

    def build(self, io: IO) -> TokenMixer:
        return IdentityMixer(self, io)


class Constant(Spec):
    """One learned vector per prefix token and one per grid position; 0 FLOPs."""

    kind: Literal["constant"] = "constant"
    layout: Layout
    dim: Width

    def build(self, io: IO) -> TokenMixer:
        return ConstantMixer(self, io)


class Global(Spec):
    """Constant per grid position + (if `context`) a linear function of (prefix tokens, mean of the patches)."""

    kind: Literal["global"] = "global"
    layout: Layout
    dim: Width
    context: bool = True
    prefix: Prefix | None = None

    def build(self, io: IO) -> TokenMixer:
        return GlobalMixer(self, io)


class Conv(Spec):
    """Bottleneck convolution C -> rank -> C on the map, plus (if `context`) the linear part of `Global`.

    Args:
        layout: how tokens lie on the map; a window as its grid makes a convolution inside every window.
        kernel: odd side of the first kernel; the second is 1x1.
        rank: bottleneck width; equal to dim and linear, it is one C -> C convolution.
        norm, act: between the two convolutions; without them they are linear.
        context: add a linear function of (prefix tokens, mean of the patches) to every position.
        tokenwise: hold 1x1 convolutions as linear layers, which read tokens as they lie in memory.
        prefix: how prefix tokens are computed; None where there are none.
    """

    kind: Literal["conv"] = "conv"
    layout: Layout
    dim: Width
    kernel: Kernel
    rank: Width
    norm: Literal["batch"] | None = None
    act: Literal["relu"] | None = None
    context: bool = False
    tokenwise: bool = False
    prefix: Prefix | None = None

    @property
    def bottleneck(self) -> bool:
        """Whether there are two convolutions."""
        return self.rank < self.dim or self.norm is not None or self.act is not None

    def build(self, io: IO) -> TokenMixer:
        return ConvMixer(self, io)


class Depthwise(Spec):
    """An attention whose averages are taken by a convolution: values by a 1x1, their neighbours weighted channel by
    channel, out by a 1x1; plus (if `context`) the linear part of `Global`.

    Args:
        layout, kernel, context, tokenwise, prefix: as of `Conv`.
        width: channels of the values.
    """

    kind: Literal["depthwise"] = "depthwise"
    layout: Layout
    dim: Width
    kernel: Kernel
    width: Width
    context: bool = False
    tokenwise: bool = False
    prefix: Prefix | None = None

    def build(self, io: IO) -> TokenMixer:
        return DepthwiseMixer(self, io)


class SkipMixer(TokenMixer):
    def mix(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


class IdentityMixer(TokenMixer):
    def mix(self, x: Tensor) -> Tensor:
        return x


def _grid(spec: Constant | Global) -> nn.Parameter:
    """[C, H, W], its channels last in memory: as tokens have them, so that nothing is transposed on the way there."""
    return nn.Parameter(torch.zeros(*spec.layout.grid, spec.dim).permute(2, 0, 1))


class ConstantMixer(TokenMixer):
    """Parameters: grid_CHW [C, H, W]; prefix_PC [P, C] where there are prefix tokens."""

    def __init__(self, spec: Constant, io: IO) -> None:
        super().__init__(spec, io)
        self.layout = spec.layout
        self.grid_CHW = _grid(spec)
        self.prefix_PC = nn.Parameter(torch.zeros(spec.layout.prefix, spec.dim)) if spec.layout.prefix else None

    def mix(self, x: Tensor) -> Tensor:
        prefix_BPC, map_BCHW = self.layout.to_map(x)
        if self.prefix_PC is not None:
            prefix_BPC = self.prefix_PC.to(x.dtype).expand_as(prefix_BPC)
        return self.layout.from_map(prefix_BPC, self.grid_CHW.to(x.dtype).expand_as(map_BCHW))


class _MapMixer(TokenMixer):
    """patches = local(map) + context(prefix tokens, mean of the patches); prefix tokens by their own module."""

    def __init__(self, spec: Global | Conv | Depthwise, io: IO) -> None:
        super().__init__(spec, io)
        self.layout = spec.layout
        inputs = (spec.layout.prefix + 1) * spec.dim
        self.context = nn.Linear(inputs, spec.dim, bias=False) if spec.context else None
        self.prefix = prefix_module(spec.prefix, spec.layout, spec.dim)

    @abstractmethod
    def local(self, map_BCHW: Tensor) -> Tensor:
        """The part that sees positions: map -> map."""

    def mix(self, x: Tensor) -> Tensor:
        prefix_BPC, map_BCHW = self.layout.to_map(x)
        out_BCHW = self.local(map_BCHW)
        mean_BC = None
        if self.context is not None or not isinstance(self.prefix, (PrefixPass, type(None))):
            mean_BC = map_BCHW.mean((2, 3))
        if self.context is not None and mean_BC is not None:
            seen_BI = torch.cat((prefix_BPC.flatten(1), mean_BC), 1) if self.layout.prefix else mean_BC
            out_BCHW = out_BCHW + self.context(seen_BI)[:, :, None, None]
        if self.prefix is not None:
            prefix_BPC = self.prefix(prefix_BPC, mean_BC, self.layout.batch_first(x))
        return self.layout.from_map(prefix_BPC, out_BCHW)


class GlobalMixer(_MapMixer):
    def __init__(self, spec: Global, io: IO) -> None:
        super().__init__(spec, io)
        self.grid_CHW = _grid(spec)

    def local(self, map_BCHW: Tensor) -> Tensor:
        return self.grid_CHW.to(map_BCHW.dtype).expand_as(map_BCHW)


class Pointwise(nn.Linear):
    """A 1x1 convolution of a map whose channels lie last in memory: the same sums, and nothing is copied for them."""

    def forward(self, map_BCHW: Tensor) -> Tensor:
        return super().forward(map_BCHW.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _conv(inputs: int, outputs: int, kernel: int, bias: bool, tokenwise: bool) -> nn.Module:
    if tokenwise and kernel == 1:
        return Pointwise(inputs, outputs, bias)
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=bias)


class ConvMixer(_MapMixer):
    def __init__(self, spec: Conv, io: IO) -> None:
        super().__init__(spec, io)
        between = spec.norm is not None or spec.act is not None
        bias = between or not spec.bottleneck  # two linear layers need only the second one's
        self.reduce = _conv(spec.dim, spec.rank, spec.kernel, bias, spec.tokenwise)
        self.norm = nn.BatchNorm2d(spec.rank) if spec.norm else nn.Identity()
        self.act = nn.ReLU() if spec.act else nn.Identity()
        self.expand = _conv(spec.rank, spec.dim, 1, True, spec.tokenwise) if spec.bottleneck else nn.Identity()

    def local(self, map_BCHW: Tensor) -> Tensor:
        out: Tensor = self.expand(self.act(self.norm(self.reduce(map_BCHW))))
        return out


class DepthwiseMixer(_MapMixer):
    def __init__(self, spec: Depthwise, io: IO) -> None:
        super().__init__(spec, io)
        # no biases in front of the taps: what lies outside the map is then zero for the values as well
        self.value = _conv(spec.dim, spec.width, 1, False, spec.tokenwise)
        self.taps = nn.Conv2d(
            spec.width, spec.width, spec.kernel, padding=spec.kernel // 2, groups=spec.width, bias=False
        )
        self.expand = _conv(spec.width, spec.dim, 1, True, spec.tokenwise)

    def local(self, map_BCHW: Tensor) -> Tensor:
        out: Tensor = self.expand(self.taps(self.value(map_BCHW)))
        return out
