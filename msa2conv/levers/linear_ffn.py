"""Lever "linear_ffn": a feed-forward network becomes one linear layer, a narrow pair of them, or a constant.

Fitted by ridge regression of its output on its input, of reduced rank for the pair. That takes as many multiply-adds as
dropping most of the hidden units, and much less time: one product instead of two and an activation on ever so few.

Shape suffixes: B batch, N tokens, L rows = B N, C channels, R rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from ..cost import CostModel
from ..ops import Linear, as_sequence
from ..options import Option
from ..plan import Replace
from ..sites import FFNSite, Site
from .base import Alone
from .fitted import FittedRecord
from .ridge import precise, reduce_rank, solve_ridge


class LinearFFN(BaseModel, Alone):
    """What may stand in the place of an FFN whose answer for a token depends on that token alone.

    Args:
        ranks: of the linear function, as fractions of the channels: 1 is one layer, less a narrow pair, 0 a constant.
        ridge: strength of the ridge, relative to the mean variance of an input channel.

    Example:
        convert(model, latency_target=0.7, levers=("ffn", LinearFFN(ranks=(0, 1))))
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Literal["linear_ffn"] = "linear_ffn"
    ranks: tuple[Annotated[float, Field(ge=0, le=1)], ...] = Field(default=(0, 0.25, 1), min_length=1)
    ridge: float = Field(default=1e-3, gt=0)

    @staticmethod
    def read(site: FFNSite, costs: CostModel, meta: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> LinearRecord:
        """What `Record.state()` described."""
        return LinearRecord.read(site, costs, meta, tensors)

    def applies(self, site: Site) -> bool:
        return isinstance(site, FFNSite) and site.merging is not None  # that is how it is known what an answer needs

    def specs(self, site: FFNSite) -> list[Linear]:
        """Of the candidates, the cheapest first."""
        assert site.merging is not None
        ranks = {min(site.dim, max(bool(share), round(share * site.dim))) for share in self.ranks}
        return [Linear(arrangement=site.merging.arrangement, dim=site.dim, rank=rank) for rank in sorted(ranks)]

    def cheapest(self, site: Site, costs: CostModel) -> Option:
        assert isinstance(site, FFNSite)
        spec = self.specs(site)[0]
        return Option(
            site.path,
            _name(site, spec),
            costs.instead(site, spec),
            flops_on=lambda tokens: costs.instead(site, spec, tokens),
        )

    def memory(self, site: Site) -> int:
        assert isinstance(site, FFNSite)
        return 2 * 8 * site.dim**2

    def statistics(self, site: Site, host: nn.Module, prefix_weight: float, ridge_factor: float) -> LinearStatistics:
        assert isinstance(site, FFNSite)
        return LinearStatistics(self.model_copy(update={"ridge": self.ridge * ridge_factor}), site, prefix_weight)


class LinearStatistics:
    """Second moments of (input, output) of a whole FFN; prefix rows count by how much the output listens to them, and
    together for no more than all patches."""

    whole_ffn = True

    def __init__(self, lever: LinearFFN, site: FFNSite, prefix_weight: float) -> None:
        self.lever, self.site, layout = lever, site, site.layout
        # by more, the regression would learn the prefix rows of a few hundred images by heart
        self.prefix_weight = min(prefix_weight, layout.positions / layout.prefix) if layout.prefix else 1.0
        self.gram_CC, self.cross_CC = (torch.zeros(site.dim, site.dim, dtype=torch.double) for _ in range(2))
        self.sum_in_C, self.sum_out_C = (torch.zeros(site.dim, dtype=torch.double) for _ in range(2))
        self.total = 0.0

    def update(self, x: Tensor, out: Tensor) -> None:
        assert self.site.merging is not None
        in_BNC, out_BNC = (as_sequence(each, self.site.merging.arrangement) for each in (x, out))
        weights_BN1 = torch.ones(*in_BNC.shape[:2], 1, device=x.device)
        weights_BN1[:, : self.site.layout.prefix] = self.prefix_weight
        weights_L1, in_LC, out_LC = (precise(each.flatten(0, 1)) for each in (weights_BN1, in_BNC, out_BNC))
        weighted_LC = weights_L1 * in_LC
        self.gram_CC += (in_LC.T @ weighted_LC).cpu()
        self.cross_CC += (weighted_LC.T @ out_LC).cpu()
        self.sum_in_C += weighted_LC.sum(0).cpu()
        self.sum_out_C += (weights_L1 * out_LC).sum(0).cpu()
        self.total += float(weights_L1.sum())

    def fit(self, host: nn.Module, costs: CostModel) -> LinearRecord:
        in_C, out_C = self.sum_in_C / self.total, self.sum_out_C / self.total
        covariance_CC = self.gram_CC / self.total - torch.outer(in_C, in_C)
        cross_CC = self.cross_CC / self.total - torch.outer(in_C, out_C)
        whole_CC = solve_ridge(covariance_CC, cross_CC, self.lever.ridge)
        found = []
        for spec in self.lever.specs(self.site):
            tensors, weight_CC = {}, whole_CC.T
            if spec.bottleneck:
                reduce_RC, expand_CR = reduce_rank(whole_CC, covariance_CC, spec.rank)
                tensors, weight_CC = {"reduce.weight": reduce_RC, "expand.weight": expand_CR}, expand_CR @ reduce_RC
            elif spec.rank:
                tensors = {"expand.weight": weight_CC}
            tensors |= {"expand.bias": out_C - weight_CC @ in_C} if spec.rank else {"bias": out_C}
            values = {name: value.float().contiguous() for name, value in tensors.items()}
            if costs.instead(self.site, spec) < costs.hosts[self.site.path]:
                found.append(Fitted(_name(self.site, spec), spec, values))
        return LinearRecord(self.site, costs, tuple(found))


def _name(site: FFNSite, spec: Linear) -> str:
    """No hidden unit is left: "0/768" is a constant, "linear48/768" a pair of layers, "linear/768" one."""
    stands = f"linear{spec.rank if spec.bottleneck else ''}" if spec.rank else "0"
    return f"{stands}/{site.hidden}"


@dataclass(frozen=True)
class Fitted:
    """A fitted linear function; tensors are named relative to it."""

    name: str
    spec: Linear
    tensors: Mapping[str, Tensor]
    score: float | None = None

    def described(self) -> dict[str, Any]:
        return {"name": self.name, "spec": self.spec.model_dump(mode="json")}

    @classmethod
    def restored(cls, described: Mapping[str, Any], tensors: Mapping[str, Tensor], score: float | None) -> Fitted:
        return cls(described["name"], Linear.model_validate(described["spec"], strict=False), tensors, score)


class LinearRecord(FittedRecord[FFNSite, Fitted]):
    """The linear functions that may stand for one FFN."""

    lever, kind = "linear_ffn", Fitted

    def option(self, candidate: Fitted) -> Option:
        path, spec, merging = self.site, candidate.spec, self.at.merging
        assert merging is not None
        io = merging.io.model_copy(update={"ignored": merging.io.positional})  # it listens to the token alone
        named = {f"{path}.{name}": value for name, value in candidate.tensors.items()}
        return Option(
            path,
            candidate.name,
            self.costs.instead(self.at, spec),
            (Replace(path=path, spec=spec, io=io),),
            lambda: named,
            candidate.score,
            lambda tokens: self.costs.instead(self.at, spec, tokens),
        )


__all__ = ["LinearFFN", "LinearRecord", "LinearStatistics"]
