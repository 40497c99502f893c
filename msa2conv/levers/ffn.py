"""Lever "ffn": drop hidden units of a feed-forward network and refit the layer that reads them.

Units are ranked by an optimal-brain-surgeon score on the covariance of the hidden activations (Hassibi & Stork 1993):
the unit whose removal, after the best refit of the others, changes the output least goes first. The refit is a ridge.
Shape suffixes: L rows (tokens of a batch), K hidden units, O outputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from ..cost import CostModel
from ..options import Option
from ..sites import FFNSite, Site
from .base import Alone, host_option
from .ridge import solve_ridge

_SHORTLIST = 4  # units looked at one by one, as a multiple of those that go together
MEASURED_FRACTIONS = (0.9, 0.8, 0.65, 0.5, 0.35, 0.2, 0.1)


class FFN(BaseModel, Alone):
    """How far feed-forward networks may be narrowed.

    Args:
        round_to: widths are multiples of it.
        min_keep: smallest fraction of hidden units kept.
        ridge: strength of the ridge, relative to the mean variance of a hidden unit.
        weigh_prefix: count a prefix token by how much the output listens to it; False counts it as one patch.

    Example:
        convert(model, 0.7, levers=("mixer", FFN(round_to=32, min_keep=0.25)))
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Literal["ffn"] = "ffn"
    round_to: int = Field(default=8, ge=1)
    min_keep: float = Field(default=0.1, gt=0, le=1)
    ridge: float = Field(default=1e-3, gt=0)
    weigh_prefix: bool = True

    @staticmethod
    def read(site: FFNSite, costs: CostModel, meta: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> FFNRecord:
        """What `Record.state()` described."""
        scores = tuple((int(width), float(score)) for width, score in meta["scores"])
        lever = FFN.model_validate(meta["config"])
        return FFNRecord(
            site, lever, costs, **tensors, has_bias=meta["has_bias"], is_conv=meta.get("is_conv", False), scores=scores
        )

    def applies(self, site: Site) -> bool:
        return isinstance(site, FFNSite)

    def cheapest(self, site: Site, costs: CostModel) -> Option:
        assert isinstance(site, FFNSite)
        return _narrowed(site, costs, self.widths(site.hidden)[0])

    def memory(self, site: Site) -> int:
        assert isinstance(site, FFNSite)
        return 8 * site.hidden**2

    def widths(self, hidden: int) -> list[int]:
        """All allowed widths, ascending; the last is the host's own."""
        step = min(self.round_to, hidden)
        smallest = max(step, -(-int(np.ceil(self.min_keep * hidden)) // step) * step)
        return [*range(smallest, hidden, step), hidden]

    def statistics(self, site: Site, host: nn.Module, prefix_weight: float, ridge_factor: float) -> FFNStatistics:
        assert isinstance(site, FFNSite)
        lever = self.model_copy(update={"ridge": self.ridge * ridge_factor})
        weight = prefix_weight if self.weigh_prefix else 1.0
        return FFNStatistics(lever, site, weight, isinstance(host, nn.Conv2d))


class FFNStatistics:
    """Weighted second moments of the hidden units: prefix rows count by how much the output listens to them."""

    whole_ffn = False

    def __init__(self, lever: FFN, site: FFNSite, prefix_weight: float, channels_first: bool) -> None:
        self.lever, self.site, self.prefix_weight = lever, site, prefix_weight
        self.channels_first = channels_first
        self.shift_K: Tensor | None = None
        self.gram_KK = torch.zeros(site.hidden, site.hidden, dtype=torch.double)
        self.sum_K = torch.zeros(site.hidden, dtype=torch.double)
        self.total = 0.0

    def update(self, x: Tensor, out: Tensor) -> None:
        hidden = x.movedim(1, -1) if self.channels_first else x
        weights = torch.ones(hidden.shape[:-1], device=hidden.device)
        if self.site.layout.prefix:
            weights[:, : self.site.layout.prefix] = self.prefix_weight
        rows_LK, weights_L = hidden.reshape(-1, hidden.shape[-1]), weights.reshape(-1, 1)
        if self.shift_K is None:  # near the mean, so that float32 products lose nothing to cancellation
            self.shift_K = rows_LK.mean(0)
        rows_LK = rows_LK - self.shift_K
        weighted_LK = rows_LK * weights_L
        self.gram_KK += (rows_LK.T @ weighted_LK).cpu()
        self.sum_K += weighted_LK.sum(0).double().cpu()
        self.total += float(weights_L.sum())

    def fit(self, host: nn.Module, costs: CostModel) -> FFNRecord:
        layer: Any = host
        weight_OK = layer.weight.detach().float().cpu().flatten(1)  # of a 1 x 1 convolution too
        assert self.shift_K is not None
        above_K = self.sum_K / self.total
        covariance_KK = (self.gram_KK / self.total - torch.outer(above_K, above_K)).float()
        mean_K = self.shift_K.double().cpu() + above_K
        order = _elimination_order(covariance_KK.double(), weight_OK.double(), self.lever)
        bias = layer.bias
        bias_O = torch.zeros(len(weight_OK)) if bias is None else bias.detach().float().cpu()
        return FFNRecord(
            self.site,
            self.lever,
            costs,
            torch.tensor(order),
            covariance_KK,
            mean_K.float(),
            weight_OK,
            bias_O,
            bias is not None,
            self.channels_first,
        )


def _narrowed(site: FFNSite, costs: CostModel, width: int) -> Option:
    """So many hidden units, without saying which."""
    gone = site.hidden - width
    flops_on = None if site.merging is None else lambda tokens: costs.on(site, tokens, gone)
    return Option(site.path, f"{width}/{site.hidden}", costs.ffn(site, width), flops_on=flops_on)


def _elimination_order(covariance_KK: Tensor, weight_OK: Tensor, lever: FFN) -> list[int]:
    """Units in the order in which they go, `round_to` at a time with the others refitted in between; survivors last."""
    hidden = len(covariance_KK)
    widths = lever.widths(hidden)
    ridge = lever.ridge * covariance_KK.diagonal().mean().clamp_min(1e-12)
    inverse_KK = torch.linalg.inv(covariance_KK + ridge * torch.eye(hidden, dtype=torch.double))
    weight_OK = weight_OK.clone()
    alive = torch.ones(hidden, dtype=torch.bool)
    order: list[int] = []
    for width, wider in zip(widths[-2::-1], widths[:0:-1], strict=True):
        saliency_K = (weight_OK**2).sum(0) / inverse_KK.diagonal()
        saliency_K[~alive] = torch.inf
        near = saliency_K.topk(min(int(alive.sum()), _SHORTLIST * (wider - width)), largest=False).indices
        going = near[_one_by_one(inverse_KK[near][:, near], weight_OK[:, near], wider - width)]
        step = torch.linalg.solve(inverse_KK[going][:, going], inverse_KK[going])
        weight_OK -= weight_OK[:, going] @ step
        inverse_KK -= inverse_KK[:, going] @ step
        alive[going] = False
        weight_OK[:, ~alive] = 0
        order += going.tolist()
    return order + alive.nonzero().flatten().tolist()


def _one_by_one(inverse_SS: Tensor, weight_OS: Tensor, count: int) -> list[int]:
    """`count` of the shortlisted units, each the cheapest after those before it are gone: of twins only one goes."""
    inverse_SS, weight_OS = inverse_SS.clone(), weight_OS.clone()
    going: list[int] = []
    for _ in range(count):
        saliency_S = (weight_OS**2).sum(0) / inverse_SS.diagonal().clamp_min(1e-300)
        saliency_S[going] = torch.inf
        unit = int(saliency_S.argmin())
        step_S = inverse_SS[unit] / inverse_SS[unit, unit]
        weight_OS -= torch.outer(weight_OS[:, unit], step_S)
        inverse_SS -= torch.outer(inverse_SS[:, unit], step_S)
        going.append(unit)
    return going


@dataclass(frozen=True)
class FFNRecord(Alone):
    """Everything needed to build an FFN of any allowed width."""

    at: FFNSite
    lever: FFN
    costs: CostModel
    order: Tensor
    covariance_KK: Tensor
    mean_K: Tensor
    weight_OK: Tensor
    bias_O: Tensor
    has_bias: bool
    is_conv: bool = False
    scores: tuple[tuple[int, float], ...] = ()

    @property
    def site(self) -> str:
        return self.at.path

    def _measured_widths(self) -> list[int]:
        widths = self.lever.widths(self.at.hidden)[:-1]
        wanted = [fraction * self.at.hidden for fraction in MEASURED_FRACTIONS] + [min(widths, default=0)]
        return sorted({min(widths, key=lambda width: abs(width - target)) for target in wanted} if widths else set())

    def to_measure(self) -> list[Option]:
        return [self._option(width, None) for width in self._measured_widths()]

    def options(self) -> list[Option]:
        host = self.at.hidden
        measured = sorted([*self.scores, (host, 0.0)])
        widths, scores = zip(*measured, strict=True)
        result = [host_option(self.at, self.costs)]
        for width in self.lever.widths(host)[:-1]:
            result.append(self._option(width, float(np.interp(width, widths, scores))))
        return result

    def _option(self, width: int, score: float | None) -> Option:
        kept = self.order[len(self.order) - width :].sort().values
        edits = self.at.edits(kept.tolist())
        bare = _narrowed(self.at, self.costs, width)
        return replace(bare, edits=edits, tensors=lambda: self._refit(kept), score=score)

    def _refit(self, kept: Tensor) -> dict[str, Tensor]:
        """W' = W C[:, kept] (C[kept, kept] + ridge)^-1; the mean of what left goes into the bias."""
        covariance_KK, mean_K = self.covariance_KK.double(), self.mean_K.double()
        target_KO = covariance_KK[kept] @ self.weight_OK.double().T
        refit_KO = solve_ridge(covariance_KK[kept][:, kept], target_KO, self.lever.ridge)
        path = self.at.reader
        weight_OK = refit_KO.T.float().contiguous()
        tensors = {f"{path}.weight": weight_OK[:, :, None, None] if self.is_conv else weight_OK}
        if self.has_bias:
            lost_O = self.weight_OK.double() @ mean_K - refit_KO.T @ mean_K[kept]
            tensors[f"{path}.bias"] = (self.bias_O + lost_O).float()
        return tensors

    def with_scores(self, scores: Mapping[str, float]) -> FFNRecord:
        widths = {f"{width}/{self.at.hidden}": width for width in self._measured_widths()}
        found = sorted((width, scores[name]) for name, width in widths.items() if name in scores)
        return replace(self, scores=tuple(found))

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        meta: dict[str, Any] = {"lever": "ffn", "site": self.site, "config": self.lever.model_dump()}
        meta |= {"has_bias": self.has_bias, "is_conv": self.is_conv}
        meta["scores"] = [list(pair) for pair in self.scores]
        names = ("order", "covariance_KK", "mean_K", "weight_OK", "bias_O")
        return meta, {name: getattr(self, name) for name in names}
