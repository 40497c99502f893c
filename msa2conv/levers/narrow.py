"""A narrower network in closed form: the channels that are read least go, what reads the others is fitted anew.

A channel counts by what its readers make of it: the sum over all layers that read its stream of |its column of
weights|^2 E[x^2], over the power of what the layer answers. Readers are then refitted one after the other, in the
order in which they run, by ridge regression: from what they see in the narrower network to what they answer in the
original, so that each makes up for the errors of those before it. Prefix tokens count as much as all patches together.

Shape suffixes: L rows, I inputs, K inputs that are left, O outputs, C channels of a stream.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from ..options import Option
from ..plan import WHOLE, Range, Slice
from ..progress import track
from ..sites import Claims, WidthGroup
from ..transforms.lift import edited
from .ridge import precise, solve_ridge

_BATCH = 32
_ROWS = 8  # for every input; a head, which reads one row of an image, stays as it is
_RIDGE = 1e-4


@torch.no_grad()
def narrowed(
    model: nn.Module, claims: Claims, group: WidthGroup, channels: Sequence[int], images: Tensor, *, progress: bool
) -> Option:
    """The Option of the whole network that leaves so many channels of every stream; its score is not measured.

    Args:
        model, claims: float32, in eval mode, and its sites; not touched.
        group: its residual streams.
        channels: how many of every stream are left.
        images: what to fit on.
        progress: show a bar.
    """
    readers = _readers(model, group)
    batches = [batch.to(next(model.parameters()).device) for batch in torch.split(images, _BATCH)]
    heard = _heard(model, readers, batches)
    kept = []
    for stream, count in zip(group.streams, channels, strict=True):
        strength_C = torch.zeros(stream.channels, dtype=torch.double)
        for name, dim, *offset in stream.hanging:
            path = name.rpartition(".")[0]
            if dim == 1 and path in heard:
                strength_C += heard[path][sum(offset) : sum(offset) + stream.channels]
        kept.append(strength_C.topk(count).indices.sort().values.tolist())
    edits = group.edits(kept)
    narrow, tensors = edited(model, WHOLE, edits), dict[str, Tensor]()
    answers = {edit.path: edit.kept for edit in edits if isinstance(edit, Slice) and edit.dim == 0}
    prefixes = {f"{site.path}.": site.layout.prefix for site in claims.sites}
    for path in track(heard, f"narrow to {_listed(channels)} channels", progress):
        prefix = next((count for site, count in prefixes.items() if path.startswith(site)), 0)
        sums = _Regression(narrow.get_submodule(path), answers.get(f"{path}.weight"), prefix)
        for batch in batches:
            (asked, _), (_, answered) = _reached(narrow, path, batch), _reached(model, path, batch)
            sums.update(asked, answered)
        tensors |= {f"{path}.{name}": value for name, value in sums.refit().items()}
    name = f"{_listed(channels)} of {_listed(stream.channels for stream in group.streams)} channels"
    return Option(WHOLE, name, 0, edits, lambda: tensors)


def _listed(channels: Iterable[int]) -> str:
    return "/".join(map(str, channels))


def _readers(model: nn.Module, group: WidthGroup) -> dict[str, nn.Module]:
    """{path: layer} of what maps channels of a stream to something else, row by row."""
    inputs = {name.removesuffix(".weight") for each in group.streams for name, dim, *_ in each.hanging if dim == 1}
    layers = {path: module for path, module in model.named_modules() if path in inputs}
    return {
        path: layer
        for path, layer in layers.items()
        if isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1))
    }


def _rows(layer: nn.Module, x: Tensor) -> Tensor:
    """[L, channels] of what a layer took or gave."""
    return (x.flatten(2).mT if isinstance(layer, nn.Conv2d) else x).flatten(0, -2)


def _heard(model: nn.Module, readers: dict[str, nn.Module], batches: Sequence[Tensor]) -> dict[str, Tensor]:
    """{path: how much of a reader's answer comes from each input [I]} of those that run once, in this order."""
    moments: dict[str, list[Any]] = {}

    def see(path: str, layer: nn.Module, x: Tensor, out: Tensor) -> None:
        sums = moments.setdefault(path, [0.0, 0.0, 0])
        sums[0] = sums[0] + precise(_rows(layer, x)).square().sum(0).cpu()
        sums[1] += float(precise(_rows(layer, out)).square().sum())
        sums[2] += 1

    handles = [
        layer.register_forward_hook(lambda module, args, out, path=path: see(path, module, args[0], out))
        for path, layer in readers.items()
    ]
    try:
        for batch in batches:
            model(batch)
    finally:
        for handle in handles:
            handle.remove()
    weights = {path: precise(readers[path].weight).flatten(1).cpu() for path in moments}  # type: ignore[arg-type]
    return {
        path: weights[path].square().sum(0) * power_I / max(power, 1e-300)
        for path, (power_I, power, calls) in moments.items()
        if calls == len(batches)
    }


class _Reached(Exception):
    """Ends a forward pass, of which no more is needed."""


def _reached(model: nn.Module, path: str, batch: Tensor) -> tuple[Tensor, Tensor]:
    """What a layer took and gave; nothing behind it is computed."""
    found: list[tuple[Tensor, Tensor]] = []

    def stop(_module: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
        found.append((args[0], out))
        raise _Reached

    handle = model.get_submodule(path).register_forward_hook(stop)
    try:
        with suppress(_Reached):
            model(batch)
    finally:
        handle.remove()
    return found[0]


class _Regression:
    """What a layer has to add to its weights so that it answers as it did.

    Args:
        layer: of the narrower network; `refit` changes it.
        answers: which outputs are left, of one that writes to a stream itself; None: all.
        prefix: rows of a sequence that are prefix tokens.
    """

    def __init__(self, layer: nn.Module, answers: Sequence[Range] | None, prefix: int) -> None:
        self.layer, self.answers, self.prefix = layer, answers, prefix
        weight: Any = layer.weight
        self.weight_OK = precise(weight.detach()).flatten(1)
        self.gram_KK: Any = 0.0
        self.cross_KO: Any = 0.0
        self.sum_K: Any = 0.0
        self.sum_O: Any = 0.0
        self.weights = 0.0
        self.rows = 0

    def update(self, x: Tensor, wanted: Tensor) -> None:
        """Add a batch: what the layer sees, and what it should answer."""
        x_LK, wanted_LO = precise(_rows(self.layer, x)), precise(_rows(self.layer, wanted))
        if self.answers is not None:
            wanted_LO = torch.cat([wanted_LO[:, start:stop] for start, stop in self.answers], 1)
        missing_LO = wanted_LO - x_LK @ self.weight_OK.mT
        weights_L1 = torch.ones_like(x_LK[:, :1])
        if self.prefix and x.ndim == 3:
            each = weights_L1.view(len(x), -1)
            each[:, : self.prefix] = (each.shape[1] - self.prefix) / self.prefix
        self.gram_KK = self.gram_KK + x_LK.mT @ (weights_L1 * x_LK)
        self.cross_KO = self.cross_KO + x_LK.mT @ (weights_L1 * missing_LO)
        self.sum_K = self.sum_K + (weights_L1 * x_LK).sum(0)
        self.sum_O = self.sum_O + (weights_L1 * missing_LO).sum(0)
        self.weights += float(weights_L1.sum())
        self.rows += len(x_LK)

    def refit(self) -> dict[str, Tensor]:
        """Change the layer -> its new parameters; none where there were too few rows."""
        if self.rows < _ROWS * self.weight_OK.shape[1]:
            return {}
        bias = self.layer.bias
        mean_K, mean_O = (sums / self.weights if bias is not None else 0 * sums for sums in (self.sum_K, self.sum_O))
        gram_KK = self.gram_KK / self.weights - torch.outer(mean_K, mean_K)
        cross_KO = self.cross_KO / self.weights - torch.outer(mean_K, mean_O)
        more_OK = solve_ridge(gram_KK.cpu(), cross_KO.cpu(), _RIDGE).mT
        weight: Any = self.layer.weight
        found = {"weight": (self.weight_OK.cpu() + more_OK).float().reshape(weight.shape)}
        if bias is not None:
            found["bias"] = (mean_O - more_OK.to(mean_K) @ mean_K).float().cpu()
        for name, value in found.items():
            getattr(self.layer, name).copy_(value)
        return found


__all__ = ["narrowed"]
