"""The width of a model: which parameters hang on the channels of its residual streams.

torch-pruning is asked which (its groups, one for every stream: Fang et al., "Isomorphic Pruning for Vision Models",
ECCV 2024, prune such groups by the same share). What it says is tried out, never believed: with the channels of all
streams in another order the model must compute what it computed before, and with half of them it must still run.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from ..observation import Observation, tensor_in
from ..plan import WIDTHS
from ..sites import FFNSite, ResidualStream, Site, Unit, WidthGroup
from .apply import apply_edits, submodule
from .groups import UNTRACEABLE, Dependencies, at, hanging, random_copy

_UNUSUAL = "its channels are no matter of slices: "


def find_width(model: nn.Module, sites: Iterable[Site], seen: Observation) -> WidthGroup | str:
    """The residual streams of a model, or why it cannot be made narrower.

    Args:
        model: float32, in eval mode; a copy with random weights is tried.
        sites: its sites; the streams are what its FFNs write to.
        seen: what one forward pass showed.
    """
    sites = tuple(sites)
    probe = random_copy(model)
    x = seen.inputs.cpu()
    try:
        graph = Dependencies(probe, x)
        streams = _streams(probe, graph, sites)
    except UNTRACEABLE as error:
        return f"torch-pruning cannot trace it ({type(error).__name__})"
    if isinstance(streams, str):
        return streams
    group = WidthGroup(streams)
    try:
        return _refused(probe.double().requires_grad_(False), group, x.double()) or group
    except Exception as error:  # a stranger's model may raise anything at a width that it does not know
        return f"{_UNUSUAL}with half of them it fails ({type(error).__name__})"


def _streams(model: nn.Module, graph: Dependencies, sites: tuple[Site, ...]) -> tuple[ResidualStream, ...] | str:
    found: list[ResidualStream] = []
    for site in sites:
        if not isinstance(site, FFNSite) or any(site.path in stream.sites for stream in found):
            continue
        stream = _stream(model, graph, site, sites)
        if isinstance(stream, str):
            return stream
        found.append(stream)
    homeless = [site.path for site in sites if sum(site.path in stream.sites for stream in found) != 1]
    if homeless:
        return f"{_UNUSUAL}{homeless[0]} is on no residual stream, or on several"
    return tuple(found)


def _stream(model: nn.Module, graph: Dependencies, site: FFNSite, sites: tuple[Site, ...]) -> ResidualStream | str:
    values = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    channels, units, scaled = site.dim, list[Unit](), list[str]()
    for path, member, produces, indices in graph.members(submodule(model, site.reader), produces=True):
        if isinstance(member, nn.Parameter):
            dims = [dim for dim, size in enumerate(member.shape) if size == channels]
            if not path or not dims:
                return f"{_UNUSUAL}torch-pruning finds a parameter among them that no layer owns"
            units += at(path, dims[-1], indices)
            scaled.append(path.rpartition(".")[0])
            continue
        found = hanging(member, produces)
        if found is None:
            vectors = [name for name, value in member.named_parameters(recurse=False) if value.ndim == 1]
            if len(vectors) < len(list(member.parameters())):
                return f"{_UNUSUAL}its {type(member).__name__} {path} couples them"
            found = [(name, 0) for name in vectors]  # a norm
            scaled.append(path)
        for name, dim in found:
            units += at(f"{path}.{name}", dim, indices)
    units = [more for unit in units for more in _repeated(unit, values[unit[0]].shape[unit[1]], channels)]
    on_it = tuple(
        other.path for other in sites if other.dim == channels and any(u[0].startswith(f"{other.path}.") for u in units)
    )
    stated = [("", name, False) for name in WIDTHS if vars(model).get(name) == channels]
    attributes = tuple(dict.fromkeys([*stated, *_attributes(model, scaled, channels)]))
    return ResidualStream(channels, graph.sort(units), attributes, on_it)


def _repeated(unit: Unit, size: int, channels: int) -> Iterator[Unit]:
    """torch-pruning follows a channel to its first place only where several tokens lie side by side (patch merging)."""
    name, dim, *offset = unit
    starts = range(0, size, channels) if size % channels == 0 and not sum(offset) else [sum(offset)]
    yield from at(name, dim, starts)


def _attributes(model: nn.Module, paths: Iterable[str], channels: int) -> Iterator[tuple[str, str, bool]]:
    """Plain attributes of norms and scales that state how many channels they take."""
    for path in paths:
        module = submodule(model, path)
        if not path or isinstance(module, nn.LayerNorm) or any(module.children()):
            continue  # of a LayerNorm `apply` knows
        for name, value in vars(module).items():
            if name[0] != "_" and (value == channels or value == (channels,)) and not isinstance(value, Tensor):
                yield path, name, isinstance(value, tuple)


@torch.no_grad()
def _refused(model: nn.Module, group: WidthGroup, x: Tensor) -> str | None:
    """Why the group cannot be right; None where nothing speaks against it. The model is a random one, in float64."""
    expected = _answer(model, x)
    generator = torch.Generator().manual_seed(0)
    other = copy.deepcopy(model)
    values: Mapping[str, Tensor] = {**dict(other.named_parameters()), **dict(other.named_buffers())}
    for stream in group.streams:
        order = torch.randperm(stream.channels, generator=generator)
        for name, dim, *offset in stream.hanging:
            index = torch.arange(values[name].shape[dim])
            index[sum(offset) : sum(offset) + stream.channels] = sum(offset) + order
            values[name].copy_(values[name].index_select(dim, index))
    found = _answer(other, x)
    if found.shape != expected.shape or not torch.allclose(found, expected, rtol=1e-6, atol=1e-6):
        return f"{_UNUSUAL}in another order the output is another"
    apply_edits(other, group.edits(range(stream.channels // 2) for stream in group.streams))
    if _answer(other, x).shape != expected.shape:
        return f"{_UNUSUAL}its output gets narrower, too"
    return None


def _answer(model: nn.Module, x: Tensor) -> Tensor:
    output = model(x)
    found = tensor_in(tuple(output.values()) if isinstance(output, Mapping) else output)
    assert found is not None, "a model returns a tensor"
    return found


__all__ = ["find_width"]
