"""Adapters by declaration: what a class of attention or FFN is called, where its tokens lie and its weights are."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

from pydantic import ValidationError
from torch import nn

from ..layouts import LONGEST, Layout, Size
from ..observation import SAME, Observation, argument_names, takes_any_keyword
from ..ops import IO
from ..sites import AttentionSite, Claims, FFNSite, Projections, Refusal, Rows, Site, Units
from ..transforms.groups import hidden_units
from .geometry import Geometry, Place, Unknown, prefix_of
from .paths import block_of

_NARROW = 4  # channels; relative positions have two or three, an FFN has more
Known = TypeVar("Known")
ByClass = Mapping[Any, Known]  # by class, qualified name or module path; the keys of a Mapping are invariant
Where = Callable[[Any], Projections | None]


@dataclass(frozen=True)
class Attention:
    """One class of attention.

    Args:
        layout: how its tokens lie on the image (`geometry`).
        heads: attribute that holds the number of heads; None for one head.
        projections: reads off where the weights are kept by heads; None where they are not.
        ignored: arguments that a convolution needs not: a grid size, rotary or relative positions, the mask that keeps
            windows of a rolled map apart. Any other argument is refused by name.
        same: arguments that must be the very input (keys and values of nn.MultiheadAttention); others are refused.
        returns, echo: see `IO`.
    """

    layout: Geometry
    heads: str | None = "num_heads"
    projections: Where | None = None
    ignored: tuple[str, ...] = ()
    same: tuple[str, ...] = ()
    returns: Literal["tensor", "tuple", "echo"] = "tensor"
    echo: str | None = None


@dataclass(frozen=True)
class FFN:
    """One class of FFN. Which parameters hang on its hidden units is found by tracing.

    Args:
        output: the layer that reads the hidden units.
        split: attribute that lists how the module splits what its first layer computes, hidden units first; for blocks
            that compute attention and FFN from one projection.
    """

    output: str = "fc2"
    split: str | None = None


@dataclass(frozen=True)
class Declarations:
    """An adapter that recognises modules by their class.

    Args:
        name: of the family, for messages.
        attentions, ffns: {class: what it is}; a class, its qualified name where importing it would cost something, or
            the path of one module.
        left: {class: why such a module is left as it is}.

    Example:
        mine = Declarations("mine", {MyAttention: Attention(tokens(prefix=1))}, {MyMlp: FFN("down")})
        msa2conv.convert(model, 0.7, adapters=[mine])
    """

    name: str
    attentions: ByClass[Attention] = field(default_factory=dict)
    ffns: ByClass[FFN] = field(default_factory=dict)
    left: ByClass[str] = field(default_factory=dict)

    def claims(self, model: nn.Module, seen: Observation) -> Claims:
        found: list[Site | Refusal] = []
        groups: dict[Any, Units | str] = {}  # FFNs of one shape hang together in the same way
        for path, module in model.named_modules():
            attention, ffn = _of(path, module, self.attentions), _of(path, module, self.ffns)
            left = _of(path, module, self.left)
            if left is not None:
                found.append(Refusal(path, type(module).__name__, left))
            if attention is not None or ffn is not None:
                call = seen.once(path)
                if call is None or call.x is None:
                    times = len(seen.calls.get(path, []))
                    reason = f"it ran {times} times in one forward pass instead of once"
                    found.append(Refusal(path, type(module).__name__, reason))
                    continue
                if ffn is not None and (call.out != call.x or _width(module, ffn) < _NARROW):
                    continue  # a head, or an MLP that makes relative positions
                place = Place(model, module, path, call, seen)
                try:
                    if attention is not None:
                        found.append(_attention(place, attention))
                    elif ffn is not None:
                        found.append(_ffn(place, ffn, groups))
                except Unknown as unknown:
                    found.append(Refusal(path, type(module).__name__, str(unknown)))
                except ValidationError as error:
                    reason = f"its tokens have no Layout: {error.errors()[0]['msg']}"
                    found.append(Refusal(path, type(module).__name__, reason))
        return Claims.of(found)


def _of(path: str, module: nn.Module, known: ByClass[Known]) -> Known | None:
    kind = type(module)
    return next((known[key] for key in (path, kind, f"{kind.__module__}.{kind.__qualname__}") if key in known), None)


def _attention(place: Place, kind: Attention) -> AttentionSite:
    call, module = place.call, place.module
    if call.out != call.x:
        raise Unknown(f"its output {call.out} has not the shape of its input {call.x}")
    others = [name for name in kind.same if call.arguments.get(name, SAME) != SAME]
    if others:
        raise Unknown(f"its {others[0]} is not its input: it is no self-attention")
    heeded = [name for name in call.arguments if name not in (*kind.ignored, *kind.same)]
    if heeded:
        raise Unknown(f"it is called with {heeded[0]!r}, which a convolution cannot honour")
    layout = kind.layout(place)
    dim = place.x[layout.channels]
    count = place.attribute(kind.heads) if kind.heads else 1
    heads = int(count) if isinstance(count, int) and 0 < count <= dim else 1
    named = kind.projections(module) if kind.projections else None
    head_dim = named.head_dim if named else max(1, dim // heads)
    return AttentionSite(place.path, block_of(place.path), dim, heads, head_dim, layout, _io(module, kind), named)


def _io(module: nn.Module, kind: Attention) -> IO:
    x, *names = argument_names(module)
    open_ended = takes_any_keyword(module)
    rest = tuple(names)
    needless = (*kind.ignored, *kind.same)
    absent = tuple(name for name in rest if name not in needless)
    positional = rest if needless else ()
    ignored = tuple(name for name in needless if name in rest or open_ended)
    return IO(returns=kind.returns, x=x, positional=positional, ignored=ignored, absent=absent, echo=kind.echo)


def _width(module: nn.Module, kind: FFN) -> int:
    output: Any = module.get_submodule(kind.output)
    return int(output.weight.shape[0])


def _ffn(place: Place, kind: FFN, groups: dict[Any, Units | str]) -> FFNSite:
    module, call = place.module, place.call
    arguments = tuple(sorted((name, str(value)) for name, value in call.arguments.items()))
    key = (repr(module), call.x, arguments, kind.output, kind.split)
    if key not in groups:
        groups[key] = hidden_units(module, kind.output, place.x, call.arguments, kind.split)
    units = groups[key]
    if isinstance(units, str):
        raise Unknown(f"{units}: left dense")
    output: Any = module.get_submodule(kind.output)
    dim, hidden = output.weight.shape[:2]
    layout = _positions(place, output)
    return FFNSite(place.path, block_of(place.path), dim, hidden, layout, kind.output, units)


def _positions(place: Place, output: nn.Module) -> Layout:
    """How many tokens an FFN sees, and which of them are prefix tokens; not where they lie."""
    x = place.x
    if isinstance(output, nn.Conv2d):
        return Layout(pattern="b c h w", grid=(x[2], x[3]))
    if len(x) != 3 or x[0] != 1:
        return Layout(pattern="b h w c", grid=_any_grid(math.prod(x[:-1])))
    try:
        prefix = prefix_of(place, x[1])
    except Unknown:
        prefix = 0
    prefix = prefix if prefix < x[1] else 0
    return Layout(grid=_any_grid(x[1] - prefix), prefix=prefix)


def _any_grid(positions: int) -> Size:
    """Of so many positions, with sides as a Layout allows them."""
    columns = next(side for side in range(min(positions, LONGEST), 0, -1) if positions % side == 0)
    return positions // columns, columns


# Where weights are kept by heads


def _by_heads(module: Any, layer: str, out: str, times: int, count: str) -> tuple[int, int] | None:
    """(heads, width of all of them) if the Linear `layer` holds `times` projections of the width that `out` reads."""
    joined, last, heads = (getattr(module, name, None) for name in (layer, out, count))
    if not isinstance(joined, nn.Linear) or not isinstance(last, nn.Linear) or not isinstance(heads, int):
        return None
    inner = last.in_features
    return (heads, inner) if joined.out_features == times * inner and inner % heads == 0 else None


def qkv(layer: str = "qkv", out: str = "proj", heads: str = "num_heads", plain: bool = False) -> Where:
    """One Linear for q, k and v, in this order, each by heads.

    Args:
        layer, out: names of the Linear layers.
        heads: attribute that holds the number of heads.
        plain: with no q/k-norm, gate or output norm in the module, it is softmax(scale q k^T) v and nothing else.
    """

    def read(module: Any) -> Projections | None:
        size = _by_heads(module, layer, out, 3, heads)
        if size is None:
            return None
        count, inner = size
        if getattr(module, "head_first", False):
            return None  # q, k and v of a head lie together
        parts = [getattr(module, name, None) for name in ("q_norm", "k_norm", "norm", "gate")]
        bias = "v_bias" if isinstance(getattr(module, "v_bias", None), nn.Parameter) else None
        bare = plain and bias is None and all(isinstance(part, (nn.Identity, type(None))) for part in parts)
        return Projections(
            v=Rows(layer, 2 * inner, 3 * inner, bias),
            out=Rows(out),
            heads=count,
            head_dim=inner // count,
            q=Rows(layer, 0, inner) if bare else None,
            k=Rows(layer, inner, 2 * inner) if bare else None,
            scale=float(module.scale) if bare else None,
        )

    return read


def separate(
    v: str = "v",
    out: str = "proj",
    heads: str = "num_heads",
    half: bool = False,
    q: str | None = None,
    k: str | None = None,
    scale: str | None = None,
) -> Where:
    """A Linear of its own for v.

    Args:
        v, out: names of the Linear layers.
        heads: attribute that holds the number of heads.
        half: v is the second half of a Linear that holds k and v.
        q, k, scale: names of two more, and the attribute that holds the factor of the scores, if the module is
            softmax(scale q k^T) v and nothing else.
    """

    def read(module: Any) -> Projections | None:
        size = _by_heads(module, v, out, 2 if half else 1, heads)
        if size is None:
            return None
        count, inner = size
        rows = Rows(v, inner, 2 * inner) if half else Rows(v)
        named = Projections(v=rows, out=Rows(out), heads=count, head_dim=inner // count)
        if q is None or k is None or scale is None:
            return named
        return replace(named, q=Rows(q), k=Rows(k), scale=float(getattr(module, scale)))

    return read


__all__ = ["FFN", "Attention", "Declarations", "qkv", "separate"]
