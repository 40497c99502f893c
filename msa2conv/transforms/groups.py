"""Which parameters hang on one hidden unit? torch-pruning is asked once, at search time (its only importer)."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..observation import Given, tensor_in
from ..plan import Range
from ..sites import Unit, Units
from .apply import apply_edits

_MOST = 256  # indices that hang on one channel


def hidden_units(
    ffn: nn.Module,
    output: str,
    shape: tuple[int, ...],
    arguments: Mapping[str, Any] | None = None,
    split: str | None = None,
) -> Units | str:
    """Everything that goes when one hidden unit goes: the Units of an FFNSite.

    The answer is tried out on random weights: without a unit the module must compute what it computes when the output
    layer does not listen to that unit. A norm over the hidden units, for example, fails that.

    Args:
        ffn: the module; a copy is traced.
        output: path of the layer that reads the hidden units, a Linear or a 1 x 1 convolution.
        shape: shape of the module's input.
        arguments: what it is called with besides.
        split: attribute of the module that lists how it splits what its first layer computes, hidden units first.

    Returns:
        The group, or the reason why its units cannot be dropped safely.
    """
    arguments = dict(arguments or {})
    given = [name for name, value in arguments.items() if isinstance(value, Given)]
    if given:
        return f"it is called with {given[0]!r}, which cannot be traced"
    ffn = random_copy(ffn)
    widths = () if split is None else tuple(getattr(ffn, split))
    layer = ffn.get_submodule(output)
    hidden = _inputs_of(layer)
    if hidden is None:
        return f"its output layer {output} is neither a Linear nor an ungrouped 1 x 1 convolution"
    if hidden < 2:
        return "it has a single hidden unit"
    if widths and widths[0] != hidden:
        return f"the first of its {split} {list(widths)} is not the {hidden} inputs of its output layer {output}"
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    try:
        found = _group(Dependencies(ffn, x, arguments), layer)
    except UNTRACEABLE as error:
        return f"torch-pruning cannot trace it ({type(error).__name__})"
    if isinstance(found, str):
        return found
    units = Units(found, tuple(_beside(ffn, found, hidden)), (split, widths) if split else None)
    if _is_exact(ffn, output, hidden, units, x, arguments):
        return units
    return "its output depends on a hidden unit in more ways than through its output layer"


def _inputs_of(layer: nn.Module) -> int | None:
    if isinstance(layer, nn.Linear):
        return layer.in_features
    if isinstance(layer, nn.Conv2d) and layer.groups == 1 and layer.kernel_size == (1, 1) and layer.stride == (1, 1):
        return layer.in_channels
    return None


def random_copy(ffn: nn.Module) -> nn.Module:
    """A float32 copy on the CPU whose weights and statistics all matter; also of a module on the meta device."""
    ffn = copy.deepcopy(ffn)
    ffn = (ffn.to_empty(device="cpu") if any(p.is_meta for p in ffn.parameters()) else ffn.cpu()).float().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in ffn.parameters():
            parameter.requires_grad_(True)  # torch-pruning walks the autograd graph
            scale = math.sqrt(parameter[0].numel()) if parameter.ndim > 1 else 1.0
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / scale)
        for name, buffer in ffn.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
    return ffn


class Dependencies:
    """What torch-pruning says of a traced module.

    Args:
        module: the module, with gradients on.
        x, arguments: what it is called with.

    Raises:
        One of `UNTRACEABLE`.
    """

    def __init__(self, module: nn.Module, x: Tensor, arguments: Mapping[str, Any] | None = None) -> None:
        import torch_pruning as tp

        given = dict(arguments or {})
        self._tp = tp
        self._paths: dict[Any, str] = {each: path for path, each in module.named_modules()}
        self._names: dict[Any, str] = {parameter: name for name, parameter in module.named_parameters()}
        self._order = {name: position for position, name in enumerate(module.state_dict())}
        with torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it guesses at parameters that no layer owns; what it says is tried out
            self._graph = tp.DependencyGraph().build_dependency(
                module, example_inputs=x, forward_fn=lambda model, inputs: model(inputs, **given)
            )
        for node in self._graph.module2node.values():
            for dependency in node.dependencies:
                dependency.index_mapping = _Bounded(dependency.index_mapping)

    def members(self, layer: nn.Module, *, produces: bool) -> Iterator[tuple[str, Any, bool, list[int]]]:
        """What goes with the first input, or output, of a Linear or convolution: (path, the module or a parameter that
        no layer owns, whether its outputs go, their indices)."""
        tp, kind = self._tp, "linear" if isinstance(layer, nn.Linear) else "conv"
        prune = getattr(tp, f"prune_{kind}_{'out' if produces else 'in'}_channels")
        for dependency, indices in self._graph.get_pruning_group(layer, prune, idxs=[0]):
            member = dependency.target.module
            path = self._paths.get(member, self._names.get(member))
            if path is not None or isinstance(member, nn.Parameter):  # activations and reshapes hold nothing
                goes = self._graph.is_out_channel_pruning_fn(dependency.handler)
                yield path or "", member, goes, [int(i) for i in indices]

    def sort(self, units: Iterable[Unit]) -> tuple[Unit, ...]:
        """In the order of the state dict, each once."""
        return tuple(sorted(set(units), key=lambda unit: (self._order[unit[0]], *unit[1:])))


class _Bounded(list[Any]):
    """Index maps that fail where one channel is said to become very many: where torch-pruning misreads a reshape, its
    lists grow without end."""

    def __iter__(self) -> Iterator[Any]:
        for mapping in super().__iter__():
            yield None if mapping is None else partial(_bounded, mapping)


def _bounded(mapping: Callable[[list[Any]], list[Any]], indices: list[Any]) -> list[Any]:
    found = mapping(indices)
    if len(found) > _MOST:
        raise ValueError(f"more than {_MOST} indices hang on one channel")
    return found


UNTRACEABLE = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def _group(graph: Dependencies, layer: nn.Module) -> tuple[Unit, ...] | str:
    units: list[Unit] = []
    for path, module, produces, indices in graph.members(layer, produces=False):
        if isinstance(module, nn.Parameter):
            if not path or module.ndim != 1:
                return "torch-pruning finds a parameter in the group that no layer owns"
            units += at(path, 0, indices)
            continue
        found = hanging(module, produces)
        if found is None:
            return f"its {type(module).__name__} {path} couples the hidden units"
        for parameter, dim in found:
            units += at(f"{path}.{parameter}", dim, indices)
    return graph.sort(units)


def at(name: str, dim: int, indices: Iterable[int]) -> list[Unit]:
    """Units of a parameter at these places."""
    return [(name, dim, i) if i else (name, dim) for i in indices]


def _beside(ffn: nn.Module, found: Iterable[Unit], hidden: int) -> Iterator[tuple[str, int, Range]]:
    """What is no hidden unit in the parameters that they hang on."""
    values = {**dict(ffn.named_parameters()), **dict(ffn.named_buffers())}
    starts: dict[tuple[str, int], list[int]] = {}
    for name, dim, *offset in found:
        starts.setdefault((name, dim), []).append(sum(offset))
    for (name, dim), own in starts.items():
        edges = [0, *(edge for start in sorted(own) for edge in (start, start + hidden)), values[name].shape[dim]]
        for start, stop in zip(edges[::2], edges[1::2], strict=True):
            if start < stop:
                yield name, dim, (start, stop)


def hanging(module: nn.Module, produces: bool) -> list[tuple[str, int]] | None:
    """(parameter or buffer, dimension) of a module that hang on one of its channels; None if it cannot be narrowed."""
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        depthwise = isinstance(module, nn.Conv2d) and 1 < module.groups == module.in_channels == module.out_channels
        if isinstance(module, nn.Conv2d) and module.groups > 1 and not depthwise:
            return None
        if not (produces or depthwise):
            return [("weight", 1)]
        return [("weight", 0)] + ([("bias", 0)] if module.bias is not None else [])
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        names = ("weight", "bias", "running_mean", "running_var")
        return [(name, 0) for name in names if getattr(module, name) is not None]
    channels = [name for name, value in module.named_parameters(recurse=False) if value.numel() > 1]
    return None if channels else []


@torch.no_grad()
def _is_exact(ffn: nn.Module, output: str, hidden: int, units: Units, x: Tensor, arguments: Mapping[str, Any]) -> bool:
    """Whether dropping units 0 and `hidden` - 2 equals not listening to them."""
    gone = sorted({0, hidden - 2})
    holder = nn.Module()
    holder.ffn = copy.deepcopy(ffn)
    weight = ffn.get_submodule(output).weight
    weight[:, gone] = 0  # type: ignore[operator]
    expected = tensor_in(ffn(x, **arguments))
    try:
        apply_edits(holder, units.edits("ffn", (unit for unit in range(hidden) if unit not in gone)))
        found = tensor_in(holder.ffn(x, **arguments))
    except (RuntimeError, ValueError):
        return False
    assert expected is not None and found is not None
    return bool(torch.allclose(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max())))
