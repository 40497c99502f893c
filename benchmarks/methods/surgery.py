"""What several methods share: FFNs narrowed to chosen hidden units, and how many to keep for a budget."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import msa2conv
from msa2conv.inspection import Inspection
from msa2conv.search.measure import first_tensor
from msa2conv.search.solve import infeasible
from msa2conv.sites import FFNSite
from msa2conv.transforms.apply import apply_edits

from .base import Context


@dataclass(frozen=True)
class FFNs:
    """All FFNs of a parent, and what its hidden units are worth.

    Args:
        seen: its inspection.
        sites: {path: FFN}.
    """

    seen: Inspection
    sites: Mapping[str, FFNSite]

    @classmethod
    def of(cls, parent: nn.Module, context: Context) -> FFNs:
        seen = msa2conv.inspect(parent, example_inputs=context.example)
        return cls(seen, {site.path: site for site in seen.claims.ffns})

    def uniform(self, budget: int) -> dict[str, int]:
        """{path: units to keep}: the same share of every FFN, largest that keeps the budget."""
        return self._most(lambda share: {p: max(1, int(share * s.hidden)) for p, s in self.sites.items()}, budget)

    def ranked(self, scores: Mapping[str, Tensor], budget: int) -> dict[str, int]:
        """{path: units to keep} by one ranking of the units of all FFNs."""
        everything = torch.cat([scores[path].flatten().double() for path in self.sites]).sort(descending=True).values

        def widths(share: float) -> dict[str, int]:
            least = everything[min(len(everything) - 1, int(share * len(everything)))]
            return {path: max(1, int((scores[path].double() > least).sum())) for path in self.sites}

        return self._most(widths, budget)

    def flops(self, widths: Mapping[str, int]) -> int:
        costs = self.seen.costs
        return costs.base - sum((s.hidden - widths[p]) * costs.units[p] for p, s in self.sites.items())

    def _most(self, widths: Callable[[float], dict[str, int]], budget: int) -> dict[str, int]:
        low, high = 0.0, 1.0
        if self.flops(widths(low)) > budget:
            raise infeasible(budget, self.flops(widths(low)))
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if self.flops(widths(middle)) <= budget else (low, middle)
        return widths(low)

    def narrowed(self, parent: nn.Module, kept: Mapping[str, Sequence[int]]) -> nn.Module:
        """A copy of the parent with these hidden units."""
        model = copy.deepcopy(parent)
        apply_edits(model, [edit for path, site in self.sites.items() for edit in site.edits(sorted(kept[path]))])
        return model

    def best(self, scores: Mapping[str, Tensor], widths: Mapping[str, int]) -> dict[str, list[int]]:
        """{path: the units with the largest scores}."""
        return {
            p: scores[p].argsort(descending=True, stable=True)[: widths[p]].sort().values.tolist() for p in self.sites
        }

    def hidden(self, parent: nn.Module, images: Tensor) -> dict[str, Tensor]:
        """{path: activations of the hidden units [rows, K]}, rows: tokens of all images."""
        found: dict[str, list[Tensor]] = {path: [] for path in self.sites}
        with _listening(parent, self.sites, lambda path, x: found[path].append(_rows(x).cpu())), torch.no_grad():
            for batch in images.split(32):
                parent(batch)
        return {path: torch.cat(parts) for path, parts in found.items()}

    def taylor(self, parent: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """{path: |sum over tokens of activation * gradient|, mean over images [K]} (Molchanov et al., CVPR 2019)."""
        model = copy.deepcopy(parent).requires_grad_(True)
        scores = {path: torch.zeros(site.hidden, dtype=torch.double) for path, site in self.sites.items()}
        seen: dict[str, Tensor] = {}

        def keep(path: str, x: Tensor) -> None:
            x.retain_grad()
            seen[path] = x

        with _listening(model, self.sites, keep), torch.enable_grad():
            for batch, answers in zip(images.split(32), labels.split(32), strict=True):
                F.cross_entropy(first_tensor(model(batch)), answers.to(batch.device), reduction="sum").backward()
                for path, x in seen.items():
                    assert x.grad is not None
                    each = (x * x.grad).detach().reshape(len(batch), -1, x.shape[-1]).sum(1)
                    scores[path] += each.abs().double().sum(0).cpu() / len(images)
        return scores


def magnitudes(parent: nn.Module, sites: Mapping[str, FFNSite]) -> dict[str, Tensor]:
    """{path: L2 norm of all weights that hang on a hidden unit [K]}."""
    scores = {}
    for path, site in sites.items():
        module, total = parent.get_submodule(path), torch.zeros(site.hidden)
        for name, dim, *offset in site.units.hanging:
            weight: Tensor = module.get_parameter(name).detach().cpu().movedim(dim, 0)
            start = sum(offset)
            total += weight[start : start + site.hidden].reshape(site.hidden, -1).square().sum(1)
        scores[path] = total.sqrt()
    return scores


class _listening:
    """Hand what enters the layers behind the hidden units to a function."""

    def __init__(self, model: nn.Module, sites: Mapping[str, FFNSite], hear: Callable[[str, Tensor], None]) -> None:
        self.model, self.sites, self.hear = model, sites, hear

    def __enter__(self) -> None:
        def hook(path: str) -> Any:
            return lambda _module, args: self.hear(path, args[0])

        self.handles = [
            self.model.get_submodule(site.reader).register_forward_pre_hook(hook(path))
            for path, site in self.sites.items()
        ]

    def __exit__(self, *error: object) -> None:
        for handle in self.handles:
            handle.remove()


def _rows(x: Tensor) -> Tensor:
    return x.detach().reshape(-1, x.shape[-1])
