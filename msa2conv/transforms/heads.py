"""Which parameters hang on one head of an attention? Found by gradients, and tried out before it is believed.

Where something stands between q and k (a norm, a rotary embedding, a bias of positions, a cosine), an attention cannot
be restated, but whole heads can go: with the columns of the output projection that read a head at zero, exactly that
head's parameters have no gradient any more.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..observation import Call, Given, Observation, tensor_in
from ..plan import Range, ranges
from ..sites import AttentionSite, HeadUnits, Site
from .apply import apply_edits
from .groups import random_copy
from .mergeable import shapes_of

_MOST = 1024  # tokens that are tried out
Part = tuple[str, int, int, int]  # parameter, dimension, offset, width: head j is offset + [j width, (j + 1) width)


def with_heads(model: nn.Module, sites: Iterable[Site], seen: Observation) -> tuple[Site, ...]:
    """The sites; those attentions whose heads can go, and that cannot be restated, say what hangs on one.

    Args:
        model: float32, in eval mode.
        sites: its sites.
        seen: what one forward pass showed.
    """
    known: dict[Any, HeadUnits | None] = {}
    found: list[Site] = []
    for site in sites:
        call = seen.once(site.path)
        if not isinstance(site, AttentionSite) or site.projections is None or call is None or call.x is None:
            found.append(site)
            continue
        named = site.projections
        if named.plain and site.merging is not None:  # restated, with any number of heads
            found.append(site)
            continue
        module = model.get_submodule(site.path)
        # One sequence, or window, tells as much as many.
        shape = call.x if site.layout.pattern == "(h w) b c" else (1, *call.x[1:])
        key = (repr(module), shapes_of(module), shape, named)
        if key not in known:
            small = math.prod(shape) <= _MOST * site.dim
            known[key] = head_units(module, named.heads, named.out.path, replace(call, x=shape)) if small else None
        found.append(replace(site, head_units=known[key]))
    return tuple(found)


def head_units(attention: nn.Module, heads: int, out: str, call: Call) -> HeadUnits | None:
    """Everything that goes when one head goes; None where that is not a matter of slices.

    Args:
        attention: the module; a copy with random weights is tried.
        heads: how many it has.
        out: path of its output projection, whose inputs are the heads in order.
        call: how it was called. What speaks of places (masks, rotary embeddings) hangs on no head and is left out.
    """
    layer = dict(attention.named_modules()).get(out)
    if heads < 2 or not isinstance(layer, nn.Linear) or layer.in_features % heads:
        return None
    given = {name: value for name, value in call.arguments.items() if not isinstance(value, Given)}
    try:
        probe = _Probe(random_copy(attention).double(), heads, out, call.x or (), given)
        parts = list(probe.parts())
    except Exception:  # a stranger's module, called in another way, may raise anything
        return None
    inner = layer.in_features
    own = list(_attributes(attention, heads, 1))
    also = list(_attributes(attention, inner, inner // heads))
    buffers = [
        (name, 0, 0, inner // heads) for name, value in attention.named_buffers() if tuple(value.shape) == (inner,)
    ]
    for attributes in (own, [*own, *(pair for pair in also if pair[0].rpartition(".")[2] != "dim")], [*own, *also]):
        for more in ([], buffers) if buffers else ([],):
            units = HeadUnits(heads, (*parts, (f"{out}.weight", 1, 0, inner // heads), *more), tuple(attributes))
            if probe.holds(units):
                return units
    return None


def _attributes(module: nn.Module, value: int, per_head: int) -> Iterator[tuple[str, int]]:
    """(path of an attribute, its value for one head) of plain integers that may count heads, or their channels."""
    for path, part in module.named_modules():
        if isinstance(part, (nn.Linear, nn.LayerNorm)):
            continue
        for name, found in vars(part).items():
            if type(found) is int and found == value and (per_head > 1 or "head" in name):
                yield f"{path}.{name}".lstrip("."), per_head


class _Probe:
    """A random copy of an attention, in float64, and what it answers with a head silenced."""

    def __init__(
        self, module: nn.Module, heads: int, out: str, shape: tuple[int, ...], given: Mapping[str, Any]
    ) -> None:
        self.module, self.heads, self.out, self.given = module, heads, out, dict(given)
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(shape, generator=generator, dtype=torch.double)
        layer: Any = module.get_submodule(out)
        self.weight_OI: Tensor = layer.weight
        self.width = self.weight_OI.shape[1] // heads

    def parts(self) -> Iterator[Part]:
        every = self._gradients(None)
        silent = {head: self._gradients(head) for head in {0, 1, self.heads - 1}}
        # A bias of keys cancels in the softmax, so that gradients do not show it: biases go with their weights.
        mirrored: dict[str, tuple[Range, ...]] = {}
        for name, gradient in every.items():
            for dim in range(gradient.ndim):
                runs = ranges(_silent(silent[0][name], gradient, dim))
                if not runs or len(runs) * self.heads > gradient.shape[dim]:
                    continue
                if any(ranges(_silent(silent[head][name], gradient, dim)) != _moved(runs, head) for head in silent):
                    continue
                owner, _, kind = name.rpartition(".")
                bias = f"{owner}.bias".lstrip(".")
                if kind == "bias" and name in every and f"{owner}.weight".lstrip(".") in every:
                    continue  # with its weight
                yield from ((name, dim, start, stop - start) for start, stop in runs)
                if kind == "weight" and dim == 0 and bias in every and len(every[bias]) == len(gradient):
                    mirrored[bias] = runs
        yield from ((name, 0, start, stop - start) for name, runs in mirrored.items() for start, stop in runs)

    def _gradients(self, silenced: int | None) -> dict[str, Tensor]:
        with self._silenced(() if silenced is None else (silenced,)), torch.enable_grad():
            out = tensor_in(self.module(self.x, **self.given))
            assert out is not None
            weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
            names = {n: p for n, p in self.module.named_parameters() if n != f"{self.out}.weight"}
            found = torch.autograd.grad((out * weights).sum(), list(names.values()), allow_unused=True)
        grads = {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(names.items(), found, strict=True)}
        return grads

    def _silenced(self, heads: tuple[int, ...]) -> _Zeroed:
        return _Zeroed(self.weight_OI, [slice(head * self.width, (head + 1) * self.width) for head in heads])

    @torch.no_grad()
    def holds(self, units: HeadUnits) -> bool:
        """Whether dropping the first head and the last but one equals not listening to them."""
        gone = tuple(sorted({0, self.heads - 2})) if self.heads > 2 else (0,)
        holder = nn.Module()
        holder.attention = copy.deepcopy(self.module)
        try:
            with self._silenced(gone):
                expected = tensor_in(self.module(self.x, **self.given))
            apply_edits(holder, units.edits("attention", (h for h in range(self.heads) if h not in gone)))
            found = tensor_in(holder.attention(self.x, **self.given))
        except Exception:  # widths that no longer fit
            return False
        assert expected is not None and found is not None
        return found.shape == expected.shape and bool(torch.allclose(found, expected, rtol=1e-9, atol=1e-9))


class _Zeroed:
    """Columns of a weight at zero, inside a with block."""

    def __init__(self, weight_OI: Tensor, columns: list[slice]) -> None:
        self.weight_OI, self.columns = weight_OI, columns

    def __enter__(self) -> None:
        self.before = self.weight_OI.detach().clone()
        with torch.no_grad():
            for part in self.columns:
                self.weight_OI[:, part] = 0

    def __exit__(self, *_: object) -> None:
        with torch.no_grad():
            self.weight_OI.copy_(self.before)


def _silent(gradient: Tensor, every: Tensor, dim: int) -> list[int]:
    """Indices along a dimension at which nothing is heard any more, though it was."""
    others = [axis for axis in range(gradient.ndim) if axis != dim]
    now, before = (value.abs().amax(others) if others else value.abs() for value in (gradient, every))
    return ((now == 0) & (before > 0)).nonzero().flatten().tolist()


def _moved(runs: tuple[Range, ...], head: int) -> tuple[Range, ...]:
    """Where what is head 0's lies for another head."""
    return tuple((start + head * (stop - start), stop + head * (stop - start)) for start, stop in runs)
