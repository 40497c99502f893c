"""Fewer heads of an attention that cannot be restated: whole heads are cut out of its own parameters.

Heads go by the optimal-brain-surgeon score (Hassibi & Stork 1993) on their groups of inputs of the output projection:
the one whose removal, after the best refit of the others, changes the output least goes first. The output projection is
then refitted to those that are left by ridge regression.

Shape suffixes: L rows, K heads, D head dim, I = K D, J inputs that are left, O channels out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..cost import CostModel
from ..options import Option
from ..sites import AttentionSite
from .fitted import FittedRecord
from .ridge import floor_of, gram_of, precise, solve_ridge


def kept_heads(weight_OI: Tensor, covariance_II: Tensor, total: int, heads: int) -> list[int]:
    """Heads without those whose removal, the others refitted, changes the output least: one after the other."""
    inverse_II, weight_OI = torch.linalg.inv(covariance_II), weight_OI.clone()
    width, alive = len(covariance_II) // total, list(range(total))
    while len(alive) > heads:
        costs = []
        for head in alive:
            rows = slice(head * width, (head + 1) * width)
            costs.append(
                float((weight_OI[:, rows] @ torch.linalg.inv(inverse_II[rows, rows]) * weight_OI[:, rows]).sum())
            )
        head = alive.pop(min(range(len(costs)), key=costs.__getitem__))
        rows = slice(head * width, (head + 1) * width)
        step_DI = torch.linalg.solve(inverse_II[rows, rows], inverse_II[rows])
        weight_OI -= weight_OI[:, rows] @ step_DI
        inverse_II -= inverse_II[:, rows] @ step_DI
    return alive


class HeadStatistics:
    """Second moments of what the output projection reads."""

    whole_ffn = False

    def __init__(
        self, site: AttentionSite, host: nn.Module, shares: Iterable[float], ridge: float, prefix_weight: float
    ) -> None:
        assert site.head_units is not None and site.projections is not None
        self.site, self.ridge, self.prefix_weight = site, ridge, prefix_weight
        self.heads = site.head_units.heads
        self.counts = sorted({max(1, round(share * self.heads)) for share in shares} - {self.heads}, reverse=True)
        out = host.get_submodule(site.projections.out.path)
        assert isinstance(out, nn.Linear)
        self.out, size = out, out.in_features
        self.gram_II, self.sum_I = torch.zeros(size, size, dtype=torch.double), torch.zeros(size, dtype=torch.double)
        self.total = 0.0
        self.handle = self.out.register_forward_pre_hook(lambda _m, args: self._read(args[0]))

    def _read(self, read: Tensor) -> None:
        rows_LI = precise(read.reshape(-1, read.shape[-1]))
        weights_L1 = torch.ones(len(rows_LI), 1, device=rows_LI.device, dtype=rows_LI.dtype)
        prefix = self.site.layout.prefix
        if prefix and read.ndim == 3:
            weights_L1.view(*read.shape[:2])[:, :prefix] = self.prefix_weight
        self.gram_II += gram_of(rows_LI * weights_L1.sqrt()).cpu()
        self.sum_I += (rows_LI * weights_L1).sum(0).cpu()
        self.total += float(weights_L1.sum())

    def update(self, x: Tensor, out: Tensor) -> None:
        pass  # the hook has read what it needs

    def fit(self, host: nn.Module, costs: CostModel) -> HeadRecord:
        self.handle.remove()
        out = self.out
        weight_OI = out.weight.detach().cpu().double()
        mean_I = self.sum_I / self.total
        covariance_II = self.gram_II / self.total - torch.outer(mean_I, mean_I)
        regular_II = covariance_II + floor_of(covariance_II, self.ridge)
        width, candidates = len(mean_I) // self.heads, []
        for count in self.counts:
            kept = kept_heads(weight_OI, regular_II, self.heads, count)
            rows = torch.tensor([index for head in kept for index in range(head * width, (head + 1) * width)])
            refit_JO = solve_ridge(covariance_II[rows][:, rows], covariance_II[rows] @ weight_OI.T, self.ridge)
            tensors = {"weight": refit_JO.T.float().contiguous()}
            if out.bias is not None:
                lost_O = weight_OI @ mean_I - refit_JO.T @ mean_I[rows]
                tensors["bias"] = (out.bias.detach().cpu().double() + lost_O).float()
            name = f"attend{count}x{self.site.head_dim}x{self.site.head_dim}"
            candidates.append(Kept(name, tuple(kept), tensors))
        return HeadRecord(self.site, costs, tuple(candidates))


@dataclass(frozen=True)
class Kept:
    """Heads that are left, and the output projection refitted to them."""

    name: str
    heads: tuple[int, ...]
    tensors: Mapping[str, Tensor]
    score: float | None = None

    def described(self) -> dict[str, Any]:
        return {"name": self.name, "heads": list(self.heads)}

    @classmethod
    def restored(cls, described: Mapping[str, Any], tensors: Mapping[str, Tensor], score: float | None) -> Kept:
        return cls(described["name"], tuple(described["heads"]), tensors, score)


class HeadRecord(FittedRecord[AttentionSite, Kept]):
    """One attention with fewer heads."""

    lever, kind = "thin_attention", Kept

    def option(self, candidate: Kept) -> Option:
        units, named = self.at.head_units, self.at.projections
        assert units is not None and named is not None
        path = f"{self.site}.{named.out.path}"
        gone = units.heads - len(candidate.heads)
        return Option(
            self.site,
            candidate.name,
            self.costs.hosts[self.site] - gone * self.costs.heads[self.site],
            units.edits(self.site, candidate.heads),
            lambda: {f"{path}.{name}": value for name, value in candidate.tensors.items()},
            candidate.score,
        )


__all__ = ["HeadRecord", "HeadStatistics", "kept_heads"]
