"""The mixers that can stand where an attention stood: a spec (data) and the module it builds.

Shape suffixes: B batch, P prefix tokens, N tokens, C channels, H W grid, R rank, K heads, D head dim, O I out in.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from torch import Tensor, nn

from .errors import LayoutMismatch, UnsupportedArgument
from .layouts import Layout

Width = Annotated[int, Field(ge=1, le=65536)]
Path = Annotated[str, Field(min_length=1, max_length=512, pattern=r"^[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*$")]


def _odd(kernel: int) -> int:
    if kernel % 2 == 0:
        raise ValueError(f"kernel {kernel} must be odd")
    return kernel


class _Spec(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class IO(_Spec):
    """The calling convention of the module that a mixer replaces.

    Args:
        returns: "tensor"; "tuple" for hosts that return (output, attention weights): a mixer returns (output, None);
            "echo" for hosts that return (output, `echo`): a mixer returns that argument as it came.
        x: name of the token argument, where it may be passed by keyword.
        positional: names of the positional arguments behind x.
        ignored: arguments that a mixer may ignore because its Layout already honours them (Swin's shift mask, a grid
            size) or because they only place the host's own scores (rotary and relative positions).
        absent: arguments that are accepted only as None or False (an attention mask, causality).
        echo: name of the argument that comes back beside the output (the grid size in MViTv2).
    """

    returns: Literal["tensor", "tuple", "echo"] = "tensor"
    x: str = "x"
    positional: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    echo: str | None = None

    def arguments(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Every argument beside x by its name; by its position where `positional` does not name it."""
        names = (self.x, *self.positional)
        given = {names[i] if i < len(names) else f"positional argument {i}": args[i] for i in range(1, len(args))}
        for name, value in kwargs.items():  # torch 2.6 compiles no union of dicts
            if args or name != self.x:
                given[name] = value
        return given


class RidgePrefix(_Spec):
    """Each prefix token: one linear function of (its own value, mean of the patches, 1)."""

    kind: Literal["ridge"] = "ridge"


class AttendPrefix(_Spec):
    """Prefix tokens keep the host's own attention, as queries only: exact for plain softmax attention.

    Keys and values are folded into the query and the output (q W_k is formed once per query, W_v is applied after
    averaging), so its cost is about P (4 C K D + 2 K N C) multiply-adds instead of N-token projections.
    """

    kind: Literal["attend"] = "attend"
    heads: Width
    head_dim: Width
    bias: bool = True
    scale: float = Field(gt=0, allow_inf_nan=False)


class PassPrefix(_Spec):
    """Prefix tokens come out as they went in: what SPViT's convolutions do with the class token."""

    kind: Literal["pass"] = "pass"


Prefix = Annotated[RidgePrefix | AttendPrefix | PassPrefix, Field(discriminator="kind")]


class Skip(_Spec):
    """The mixer adds nothing: zeros."""

    kind: Literal["skip"] = "skip"

    def build(self, io: IO) -> TokenMixer:
        return SkipMixer(self, io)


class Identity(_Spec):
    """The mixer returns its input: what the published SPViT code does for a skipped block after its search."""

    kind: Literal["identity"] = "identity"

    def build(self, io: IO) -> TokenMixer:
        return IdentityMixer(self, io)


class Constant(_Spec):
    """One learned vector per prefix token and one per grid position; 0 FLOPs."""

    kind: Literal["constant"] = "constant"
    layout: Layout
    dim: Width

    def build(self, io: IO) -> TokenMixer:
        return ConstantMixer(self, io)


class Global(_Spec):
    """Constant per grid position + (if `context`) a linear function of (prefix tokens, mean of the patches)."""

    kind: Literal["global"] = "global"
    layout: Layout
    dim: Width
    context: bool = True
    prefix: Prefix | None = None

    def build(self, io: IO) -> TokenMixer:
        return GlobalMixer(self, io)


class Conv(_Spec):
    """Bottleneck convolution C -> rank -> C on the map, plus (if `context`) the linear part of `Global`.

    Args:
        layout: how tokens lie on the map; a window as its grid makes a convolution inside every window.
        kernel: odd side of the first kernel; the second is 1x1.
        rank: bottleneck width; equal to dim and linear, it is one C -> C convolution.
        norm, act: between the two convolutions; without them they are linear.
        context: add a linear function of (prefix tokens, mean of the patches) to every position.
        prefix: how prefix tokens are computed; None where there are none.
    """

    kind: Literal["conv"] = "conv"
    layout: Layout
    dim: Width
    kernel: Annotated[int, Field(ge=1, le=15), AfterValidator(_odd)]
    rank: Width
    norm: Literal["batch"] | None = None
    act: Literal["relu"] | None = None
    context: bool = False
    prefix: Prefix | None = None

    @property
    def bottleneck(self) -> bool:
        """Whether there are two convolutions."""
        return self.rank < self.dim or self.norm is not None or self.act is not None

    def build(self, io: IO) -> TokenMixer:
        return ConvMixer(self, io)


MixerSpec = Annotated[Skip | Identity | Constant | Global | Conv, Field(discriminator="kind")]


class TokenMixer(nn.Module, ABC):
    """A token mixer with the calling convention of the attention that it replaces."""

    batch_first = False  # keeps nn.TransformerEncoderLayer off a fast path that would read attention weights

    def __init__(self, spec: BaseModel, io: IO) -> None:
        super().__init__()
        self.spec, self.io = spec, io

    @abstractmethod
    def mix(self, x: Tensor) -> Tensor:
        """Tokens -> tokens of the same shape."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        x = self._bind(args, kwargs)
        out = self.mix(x)
        if self.io.returns == "tensor":
            return out
        return out, self.io.arguments(args, kwargs).get(self.io.echo or "")

    def _bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        io = self.io
        extra = [
            name
            for name, value in io.arguments(args, kwargs).items()
            if value is not None and name not in io.ignored and not (name in io.absent and value is False)
        ]
        x = args[0] if args else kwargs.get(io.x)
        if extra or not isinstance(x, Tensor):
            raise UnsupportedArgument(
                f"{type(self).__name__}.forward",
                f"the argument {extra[0]!r}" if extra else f"no tensor {io.x!r}",
                f"only the tokens {io.x!r}" + (f" (besides {', '.join(io.ignored)})" if io.ignored else ""),
                "A convolution cannot honour it: keep this site's attention (exclude it) or call the model without it.",
            )
        return x

    def set_window_size(self, window_size: int | tuple[int, int]) -> None:
        """Answer timm's Swin blocks, which announce a new window size: only the size of the Layout is accepted."""
        layout: Layout | None = getattr(self.spec, "layout", None)
        sides = (window_size, window_size) if isinstance(window_size, int) else tuple(window_size)
        if layout is not None and layout.window is not None and sides != tuple(layout.window):
            raise LayoutMismatch(
                f"{type(self).__name__}.set_window_size",
                f"window {sides}",
                f"window {tuple(layout.window)}",
                "A hybrid keeps the image and window size it was converted for: resize the original, then convert it.",
            )

    def extra_repr(self) -> str:
        fields = self.spec.model_dump(exclude={"layout", "kind"}, exclude_none=True)
        return ", ".join(f"{name}={value}" for name, value in fields.items())


class SkipMixer(TokenMixer):
    def mix(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


class IdentityMixer(TokenMixer):
    def mix(self, x: Tensor) -> Tensor:
        return x


class ConstantMixer(TokenMixer):
    """Parameters: grid_CHW [C, H, W]; prefix_PC [P, C] where there are prefix tokens."""

    def __init__(self, spec: Constant, io: IO) -> None:
        super().__init__(spec, io)
        self.layout = spec.layout
        self.grid_CHW = nn.Parameter(torch.zeros(spec.dim, *spec.layout.grid))
        self.prefix_PC = nn.Parameter(torch.zeros(spec.layout.prefix, spec.dim)) if spec.layout.prefix else None

    def mix(self, x: Tensor) -> Tensor:
        prefix_BPC, map_BCHW = self.layout.to_map(x)
        if self.prefix_PC is not None:
            prefix_BPC = self.prefix_PC.to(x.dtype).expand_as(prefix_BPC)
        return self.layout.from_map(prefix_BPC, self.grid_CHW.to(x.dtype).expand_as(map_BCHW))


class PrefixRidge(nn.Module):
    """out_p = W_p (own value, mean of the patches) + b_p; weight_POI [P, C, 2C]."""

    def __init__(self, prefix: int, dim: int) -> None:
        super().__init__()
        self.weight_POI = nn.Parameter(torch.zeros(prefix, dim, 2 * dim))
        self.bias_PO = nn.Parameter(torch.zeros(prefix, dim))

    def forward(self, prefix_BPC: Tensor, mean_BC: Tensor, tokens_BNC: Tensor) -> Tensor:
        own_and_mean_PBI = torch.cat((prefix_BPC, mean_BC[:, None].expand_as(prefix_BPC)), -1).transpose(0, 1)
        return torch.bmm(own_and_mean_PBI, self.weight_POI.transpose(1, 2)).transpose(0, 1) + self.bias_PO


class Folded(nn.Module):
    """The weights of a Linear that is folded into others and never called; tools that replace Linears leave it."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias


class PrefixAttention(nn.Module):
    """The rows of softmax attention that belong to the prefix tokens, with keys and values folded away.

    With x_n the tokens: score = (W_k^T q) . x_n (the key bias adds the same to every n and cancels in the softmax),
    out = W_o (W_v sum_n softmax(score)_n x_n + b_v) + b_o.
    """

    def __init__(self, spec: AttendPrefix, dim: int) -> None:
        super().__init__()
        self.heads, self.head_dim, self.scale = spec.heads, spec.head_dim, spec.scale
        inner = spec.heads * spec.head_dim
        self.q = nn.Linear(dim, inner, bias=spec.bias)
        self.k = Folded(nn.Linear(dim, inner, bias=False))
        self.v = Folded(nn.Linear(dim, inner, bias=spec.bias))
        self.proj = nn.Linear(inner, dim)

    def forward(self, prefix_BPC: Tensor, mean_BC: Tensor, tokens_BNC: Tensor) -> Tensor:
        batch, count, dim = prefix_BPC.shape
        heads, head_dim = self.heads, self.head_dim
        q_BPKD = (self.q(prefix_BPC) * self.scale).reshape(batch, count, heads, head_dim)
        q_KLD = q_BPKD.permute(2, 0, 1, 3).reshape(heads, batch * count, head_dim)
        folded_KLC = torch.bmm(q_KLD, self.k.weight.reshape(heads, head_dim, dim))
        folded_BLC = folded_KLC.reshape(heads, batch, count, dim).permute(1, 0, 2, 3).reshape(batch, -1, dim)
        weights_BLN = torch.bmm(folded_BLC, tokens_BNC.transpose(1, 2)).softmax(-1)
        averaged_BKPC = torch.bmm(weights_BLN, tokens_BNC).reshape(batch, heads, count, dim)
        averaged_KLC = averaged_BKPC.transpose(0, 1).reshape(heads, batch * count, dim)
        v_KLD = torch.bmm(averaged_KLC, self.v.weight.reshape(heads, head_dim, dim).transpose(1, 2))
        v_BPI = v_KLD.reshape(heads, batch, count, head_dim).permute(1, 2, 0, 3).reshape(batch, count, -1)
        if self.v.bias is not None:
            v_BPI = v_BPI + self.v.bias
        out: Tensor = self.proj(v_BPI)
        return out


class PrefixPass(nn.Module):
    def forward(self, prefix_BPC: Tensor, mean_BC: Tensor | None, tokens_BNC: Tensor) -> Tensor:
        return prefix_BPC


def _prefix_module(prefix: Prefix | None, layout: Layout, dim: int) -> nn.Module | None:
    if not layout.prefix:
        return None
    if isinstance(prefix, PassPrefix):
        return PrefixPass()
    return PrefixAttention(prefix, dim) if isinstance(prefix, AttendPrefix) else PrefixRidge(layout.prefix, dim)


class _MapMixer(TokenMixer):
    """patches = local(map) + context(prefix tokens, mean of the patches); prefix tokens by their own module."""

    def __init__(self, spec: Global | Conv, io: IO) -> None:
        super().__init__(spec, io)
        self.layout = spec.layout
        inputs = (spec.layout.prefix + 1) * spec.dim
        self.context = nn.Linear(inputs, spec.dim, bias=False) if spec.context else None
        self.prefix = _prefix_module(spec.prefix, spec.layout, spec.dim)

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
        self.grid_CHW = nn.Parameter(torch.zeros(spec.dim, *spec.layout.grid))

    def local(self, map_BCHW: Tensor) -> Tensor:
        return self.grid_CHW.to(map_BCHW.dtype).expand_as(map_BCHW)


class ConvMixer(_MapMixer):
    def __init__(self, spec: Conv, io: IO) -> None:
        super().__init__(spec, io)
        between = spec.norm is not None or spec.act is not None
        bias = between or not spec.bottleneck  # two linear layers need only the second one's
        self.reduce = nn.Conv2d(spec.dim, spec.rank, spec.kernel, padding=spec.kernel // 2, bias=bias)
        self.norm = nn.BatchNorm2d(spec.rank) if spec.norm else nn.Identity()
        self.act = nn.ReLU() if spec.act else nn.Identity()
        self.expand = nn.Conv2d(spec.rank, spec.dim, 1) if spec.bottleneck else nn.Identity()

    def local(self, map_BCHW: Tensor) -> Tensor:
        out: Tensor = self.expand(self.act(self.norm(self.reduce(map_BCHW))))
        return out
