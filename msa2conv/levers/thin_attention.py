"""Lever "thin_attention": an attention keeps fewer heads, or narrower queries, keys and values; all in closed form.

An attention that is more than its projections (relative positions, a norm of queries) can only lose whole heads, where
these are a matter of slices: see `fewer_heads`.

Scores: q^T k is replaced by its best approximation of lower rank in the metric of the queries and keys that occur: with
Cq = Lq Lq^T the second moment of q and Ck = Lk Lk^T the covariance of k inside an image (a constant in k cancels in the
softmax), the truncated SVD of Lq^T Lk. Values: each head keeps the directions of its average that the output projection
carries furthest (truncated SVD of W_o L); heads go by an optimal-brain-surgeon score on groups of inputs of the output
projection. W_o is refitted to what is left by ridge regression.

Shape suffixes: B batch, N tokens, L rows, C channels, K heads, D head dim, E width of a query, V of a value, I = K D.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor, nn

from ..cost import CostModel
from ..ops import Attend, as_sequence
from ..options import Option
from ..plan import Replace
from ..sites import AttentionSite, Projections, Site
from .base import Alone, Record, Statistics, host_option, is_plain, whole_attention
from .fewer_heads import HeadRecord, HeadStatistics, kept_heads
from .fitted import FittedRecord
from .ridge import floor_of, gram_of, precise, solve_ridge

Share = tuple[float, float, float]
_PLAIN = 1e-4  # relative difference up to which the host is softmax(scale q k^T) v and nothing else


class ThinAttention(BaseModel, Alone):
    """How thin an attention may become.

    Args:
        shares: fractions of (heads, width of queries and keys, width of values) that are kept of a plain softmax
            attention whose projections are stated.
        heads: fractions of the heads that are kept of another one, where its heads are a matter of slices.
        ridge: strength of the ridge, relative to the mean variance of an input of the output projection.

    Example:
        convert(model, 0.7, levers=("mixer", "ffn", ThinAttention(shares=((1, 0.5, 1), (0.5, 1, 1)))))
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Literal["thin_attention"] = "thin_attention"
    shares: tuple[Share, ...] = Field(default=((1, 0.5, 1), (1, 0.25, 1), (1, 0.5, 0.5), (0.34, 0.5, 1)), min_length=1)
    heads: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = (0.75, 0.5, 0.25)
    ridge: float = Field(default=1e-3, gt=0)

    @field_validator("shares")
    @classmethod
    def _shares(cls, shares: tuple[Share, ...]) -> tuple[Share, ...]:
        for share in shares:
            if not all(0 < part <= 1 for part in share):
                raise ValueError(f"{share} are no fractions of (heads, queries, values): use numbers in (0, 1]")
        return shares

    @staticmethod
    def read(site: AttentionSite, costs: CostModel, meta: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Record:
        """What `Record.state()` described."""
        kind = HeadRecord if site.head_units is not None else AttentionRecord
        return kind.read(site, costs, meta, tensors)

    def applies(self, site: Site) -> bool:
        if not isinstance(site, AttentionSite):
            return False
        return site.head_units is not None or (site.merging is not None and is_plain(site))

    def cheapest(self, site: Site, costs: CostModel) -> Option:
        host = host_option(site, costs)  # whether it is plain indeed is known once it has been seen
        assert isinstance(site, AttentionSite)
        if site.head_units is None or not self.heads:
            return host
        gone = site.head_units.heads - max(1, round(min(self.heads) * site.head_units.heads))
        return replace(host, flops=host.flops - gone * costs.heads[site.path], flops_on=None)

    def memory(self, site: Site) -> int:
        assert isinstance(site, AttentionSite)
        return 8 * (site.heads * site.head_dim) ** 2

    def statistics(self, site: Site, host: nn.Module, prefix_weight: float, ridge_factor: float) -> Statistics:
        assert isinstance(site, AttentionSite)
        if site.head_units is not None:
            return HeadStatistics(site, host, self.heads, self.ridge * ridge_factor, prefix_weight)
        lever = self.model_copy(update={"ridge": self.ridge * ridge_factor})
        return AttentionStatistics(lever, site, host, prefix_weight)

    def sizes(self, named: Projections) -> list[tuple[int, int, int]]:
        """(heads, width of a query, width of a value) of every candidate; the host's own is none."""
        own = (named.heads, named.head_dim, named.head_dim)
        found = [
            tuple(max(1, round(part * size)) for part, size in zip(share, own, strict=True)) for share in self.shares
        ]
        return [size for size in dict.fromkeys(found) if size != own]  # type: ignore[misc]


class AttentionStatistics:
    """Second moments of queries, keys and averaged values by heads; prefix rows count by how much they are heard."""

    whole_ffn = False

    def __init__(self, lever: ThinAttention, site: AttentionSite, host: nn.Module, prefix_weight: float) -> None:
        self.lever, self.site, self.prefix_weight = lever, site, prefix_weight
        self.spec, self.whole = whole_attention(site, host)
        assert site.projections is not None
        heads, width = site.projections.heads, site.projections.head_dim
        self.query_KDD = torch.zeros(heads, width, width, dtype=torch.double)
        self.key_KDD = torch.zeros(heads, width, width, dtype=torch.double)
        self.value_II = torch.zeros(heads * width, heads * width, dtype=torch.double)
        self.value_I = torch.zeros(heads * width, dtype=torch.double)
        self.total, self.error = 0.0, 0.0

    def update(self, x: Tensor, out: Tensor) -> None:
        whole = self.whole.to(x.device)
        tokens_BNC, out_BNC = (as_sequence(each, self.whole.arrangement) for each in (x, out))
        value_BNI = whole.attended(tokens_BNC)
        scale = out_BNC.abs().max().clamp_min(1.0)
        self.error = max(self.error, float((whole.proj(value_BNI) - out_BNC).abs().max() / scale))
        weights_BN1 = torch.ones(*tokens_BNC.shape[:2], 1, device=x.device)
        weights_BN1[:, : self.site.layout.prefix] = self.prefix_weight
        key_BNI = whole.k(tokens_BNC)
        query_KLD, key_KLD = map(self._by_heads, (whole.q(tokens_BNC), key_BNI - key_BNI.mean(1, keepdim=True)))
        weights_L1 = precise(weights_BN1.reshape(-1, 1))
        value_LI = precise(value_BNI.reshape(-1, value_BNI.shape[-1]))
        self.query_KDD += gram_of(precise(query_KLD) * weights_L1.sqrt()).cpu()
        self.key_KDD += gram_of(precise(key_KLD)).cpu()
        self.value_II += gram_of(value_LI * weights_L1.sqrt()).cpu()
        self.value_I += (value_LI * weights_L1).sum(0).cpu()
        self.total += float(weights_L1.sum())

    def _by_heads(self, x_BNI: Tensor) -> Tensor:
        batch, count, _ = x_BNI.shape
        return x_BNI.reshape(batch * count, self.whole.heads, -1).transpose(0, 1)

    def fit(self, host: nn.Module, costs: CostModel) -> AttentionRecord:
        if self.error > _PLAIN:  # the host does more than it states
            return AttentionRecord(self.site, costs, ())
        named, weights = self.site.projections, {n: v.cpu().double() for n, v in self.whole.state_dict().items()}
        assert named is not None
        mean_I = self.value_I / self.total
        covariance_II = self.value_II / self.total - torch.outer(mean_I, mean_I)
        moments = Moments(self.query_KDD, self.key_KDD, covariance_II, mean_I, self.lever.ridge)
        candidates = []
        for heads, qk_dim, v_dim in self.lever.sizes(named):
            spec = self.spec.model_copy(update={"heads": heads, "qk_dim": qk_dim, "v_dim": v_dim})
            if costs.mixer(self.site, spec) < costs.hosts[self.site.path]:
                candidates.append(Thin(spec, thinned(weights, moments, heads, qk_dim, v_dim)))
        return AttentionRecord(self.site, costs, tuple(candidates))


@dataclass(frozen=True)
class Moments:
    """What occurred: second moments of queries, covariances of keys, covariance and mean of the averaged values."""

    query_KDD: Tensor
    key_KDD: Tensor
    value_II: Tensor
    value_I: Tensor
    ridge: float


def thinned(weights: Mapping[str, Tensor], moments: Moments, heads: int, qk_dim: int, v_dim: int) -> dict[str, Tensor]:
    """Parameters of a thinner `Attend` mixer.

    Args:
        weights: of the whole one, float64.
        moments: of its activations.
        heads, qk_dim, v_dim: what is kept.
    """
    total, width = moments.query_KDD.shape[:2]
    inputs = moments.value_II + floor_of(moments.value_II, moments.ridge)
    kept = kept_heads(weights["proj.weight"], inputs, total, heads)
    found: dict[str, list[Tensor]] = {"q.weight": [], "q.bias": [], "k.weight": [], "v.weight": [], "v.bias": []}
    readers = []
    for head in kept:
        rows = slice(head * width, (head + 1) * width)
        to_query_ED, to_key_ED = _narrow_scores(moments.query_KDD[head], moments.key_KDD[head], qk_dim)
        to_value_VD = _narrow_values(weights["proj.weight"][:, rows], inputs[rows, rows], v_dim)
        for name, map_ED in (("q", to_query_ED), ("k", to_key_ED), ("v", to_value_VD)):
            found[f"{name}.weight"].append(map_ED @ weights[f"{name}.weight"][rows])
            if f"{name}.bias" in weights:
                found[f"{name}.bias"].append(map_ED @ weights[f"{name}.bias"][rows])
        readers.append(torch.zeros(v_dim, total * width, dtype=torch.double))
        readers[-1][:, rows] = to_value_VD
    reader_JI = torch.cat(readers)
    seen_JI = reader_JI @ moments.value_II
    refit_JO = solve_ridge(seen_JI @ reader_JI.T, seen_JI @ weights["proj.weight"].T, moments.ridge)
    lost_O = weights["proj.weight"] @ moments.value_I - refit_JO.T @ (reader_JI @ moments.value_I)
    tensors = {name: torch.cat(parts) for name, parts in found.items() if parts}
    tensors |= {"proj.weight": refit_JO.T, "proj.bias": weights["proj.bias"] + lost_O}
    return {name: value.float().contiguous() for name, value in tensors.items()}


def _narrow_scores(query_DD: Tensor, key_DD: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Maps of queries and keys to `rank` numbers whose products approximate q^T k best -> [E, D] twice."""
    query_L, key_L = (torch.linalg.cholesky(moment + floor_of(moment, 1e-6)) for moment in (query_DD, key_DD))
    left_DE, strength_E, right_ED = torch.linalg.svd(query_L.T @ key_L)
    root_E = strength_E[:rank].sqrt()
    # q' = S^1/2 U^T Lq^-1 q and k' = S^1/2 V^T Lk^-1 k
    return (
        (root_E[:, None] * left_DE[:, :rank].T) @ torch.linalg.inv(query_L),
        (root_E[:, None] * right_ED[:rank]) @ torch.linalg.inv(key_L),
    )


def _narrow_values(weight_OD: Tensor, covariance_DD: Tensor, rank: int) -> Tensor:
    """The map of a head's average to `rank` numbers that the output projection carries furthest -> [V, D]."""
    if rank == len(covariance_DD):
        return torch.eye(rank, dtype=torch.double)
    value_L = torch.linalg.cholesky(covariance_DD)
    directions_VD: Tensor = torch.linalg.svd(weight_OD @ value_L, full_matrices=False)[2][:rank]
    narrow_VD: Tensor = directions_VD @ torch.linalg.inv(value_L)
    return narrow_VD


@dataclass(frozen=True)
class Thin:
    """A fitted thinner attention; tensors are named relative to it."""

    spec: Attend
    tensors: Mapping[str, Tensor]
    score: float | None = None

    @property
    def name(self) -> str:
        return f"attend{self.spec.heads}x{self.spec.qk_dim}x{self.spec.v_dim}"

    def described(self) -> dict[str, Any]:
        return {"spec": self.spec.model_dump(mode="json")}

    @classmethod
    def restored(cls, described: Mapping[str, Any], tensors: Mapping[str, Tensor], score: float | None) -> Thin:
        return cls(Attend.model_validate(described["spec"], strict=False), tensors, score)


class AttentionRecord(FittedRecord[AttentionSite, Thin]):
    """The thinner attentions of one site."""

    lever, kind = "thin_attention", Thin

    def option(self, candidate: Thin) -> Option:
        path, spec, io = self.site, candidate.spec, self.at.io
        named = {f"{path}.{name}": value for name, value in candidate.tensors.items()}
        return Option(
            path,
            candidate.name,
            self.costs.mixer(self.at, spec),
            (Replace(path=path, spec=spec, io=io),),
            lambda: named,
            candidate.score,
            lambda tokens: self.costs.mixer(self.at, spec, tokens),
        )


__all__ = ["AttentionRecord", "ThinAttention"]
