"""Lever "mixer": an attention becomes nothing, a constant, a global average or a convolution, fitted in closed form.

A convolution is a bottleneck fitted as a whole, or a depthwise one between the attention's own W_v and W_o.

Shape suffixes: B batch, P prefix, C channels, H W grid, I features of a neighbourhood (C k k), O outputs, R rank.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, field_validator
from torch import Tensor, nn

from ..cost import CostModel
from ..ops import (
    AttendPrefix,
    Constant,
    Conv,
    Depthwise,
    Global,
    MixerSpec,
    Prefix,
    PrefixAttention,
    RidgePrefix,
    Skip,
)
from ..options import Option
from ..plan import Replace
from ..sites import AttentionSite, Site
from .base import Alone, attention_weights, is_plain
from .depthwise import ValueStatistics
from .fitted import FittedRecord
from .ridge import reduce_rank, ridge_by_leave_one_out, solve_ridge

_CONV = re.compile(r"(conv|depthwise)([13579])x\2")
_SPEC: TypeAdapter[MixerSpec] = TypeAdapter(MixerSpec)


class Mixer(BaseModel, Alone):
    """What may stand in the place of an attention.

    Args:
        ops: candidates beside the attention: "skip", "constant", "global", "conv1x1", "conv3x3", "conv5x5"...,
            "depthwise3x3", "depthwise5x5"... (where an adapter states W_v and W_o).
        rank: bottleneck width of convolutions in head dims.
        ridge: strength of the ridge, relative to the mean variance of an input feature.
        prefix: "attend" keeps the attention of prefix tokens where it can be folded exactly, and falls back to "ridge"
            (a linear function of own value and patch mean) elsewhere.
        context: let every position also see a linear function of (prefix tokens, patch mean), where it predicts better.

    Example:
        convert(model, 0.7, levers=(Mixer(ops=("conv1x1", "conv3x3"), rank=2.0), "ffn"))
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Literal["mixer"] = "mixer"
    ops: tuple[str, ...] = ("skip", "constant", "global", "conv1x1", "conv3x3", "depthwise3x3")
    rank: float = Field(default=1.0, gt=0)
    ridge: float = Field(default=1e-3, gt=0)
    prefix: Literal["attend", "ridge"] = "attend"
    context: bool = True

    @field_validator("ops")
    @classmethod
    def _known(cls, ops: tuple[str, ...]) -> tuple[str, ...]:
        for op in ops:
            if op not in ("skip", "constant", "global") and not _CONV.fullmatch(op):
                raise ValueError(
                    f"unknown op {op!r}: use skip, constant, global, conv1x1, conv3x3, conv5x5, ..., depthwise3x3, ..."
                )
        return ops

    @staticmethod
    def read(
        site: AttentionSite, costs: CostModel, meta: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> MixerRecord:
        """What `Record.state()` described."""
        return MixerRecord.read(site, costs, meta, tensors)

    def applies(self, site: Site) -> bool:
        return isinstance(site, AttentionSite)

    def cheapest(self, site: Site, costs: CostModel) -> Option:
        assert isinstance(site, AttentionSite)
        # what calibration will offer at most: the dearer of the two prefixes, with context
        prefixes = [None, _attend(site)] if self.prefix == "attend" and is_plain(site) else [None]
        ops = [op for op in self.ops if not op.startswith("depthwise")]  # possible only where W_v and W_o prove right
        flops = [max(costs.mixer(site, self.spec(op, site, prefix)) for prefix in prefixes) for op in ops]
        return Option(site.path, "cheapest", min([*flops, costs.hosts[site.path]]))

    def memory(self, site: Site) -> int:
        assert isinstance(site, AttentionSite)
        width, taps = site.heads * site.head_dim, self._kernel("depthwise") ** 2
        by_channel = width * (taps + site.layout.prefix + 2) ** 2 if taps else 0
        return 8 * ((site.dim * self._kernel("conv") ** 2) ** 2 + by_channel)

    def statistics(self, site: Site, host: nn.Module, prefix_weight: float, ridge_factor: float) -> MixerStatistics:
        assert isinstance(site, AttentionSite)
        return MixerStatistics(self.model_copy(update={"ridge": self.ridge * ridge_factor}), site, host)

    def _kernel(self, kind: str) -> int:
        """The largest kernel of a kind; 0 if there is none."""
        found = (match for match in map(_CONV.fullmatch, self.ops) if match)
        return max((int(match[2]) for match in found if match[1] == kind), default=0)

    def spec(self, op: str, site: AttentionSite, prefix: Prefix | None, context: bool | None = None) -> MixerSpec:
        """The spec of a candidate at a site; `prefix=None` means the cheaper ridge where there are prefix tokens."""
        layout, dim = site.layout, site.dim
        if op == "skip":
            return Skip()
        if op == "constant":
            return Constant(layout=layout, dim=dim)
        if layout.prefix and prefix is None:
            prefix = RidgePrefix()
        seen = self.context if context is None else context
        if op == "global":
            return Global(layout=layout, dim=dim, context=seen, prefix=prefix)
        match = _CONV.fullmatch(op)
        assert match is not None
        kernel = int(match[2])
        if match[1] == "depthwise":
            width = site.heads * site.head_dim
            return Depthwise(layout=layout, dim=dim, kernel=kernel, width=width, context=seen, prefix=prefix)
        rank = min(dim, max(1, round(self.rank * site.head_dim)))
        return Conv(layout=layout, dim=dim, kernel=kernel, rank=rank, context=seen, prefix=prefix)


class MixerStatistics:
    """Second moments of (neighbourhood of the input, output) over patches; per-image means for context and prefix."""

    whole_ffn = False

    def __init__(self, lever: Mixer, site: AttentionSite, host: nn.Module) -> None:
        self.lever, self.site = lever, site
        self.kernel, depthwise = lever._kernel("conv"), lever._kernel("depthwise")
        size = site.dim * self.kernel**2
        self.gram_II = torch.zeros(size, size, dtype=torch.double) if self.kernel else None
        self.cross_IO = torch.zeros(size, site.dim, dtype=torch.double) if self.kernel else None
        self.values = None
        if depthwise and ValueStatistics.applies(site, host):
            self.values = ValueStatistics(site, host, depthwise, lever.context)
        self.shift_I: Tensor | None = None
        self.map_CHW = torch.zeros(site.dim, *site.layout.grid, dtype=torch.double)
        self.images = 0
        self.features_BI: list[Tensor] = []
        self.prefix_in: list[Tensor] = []
        self.prefix_out: list[Tensor] = []
        self.mean_in: list[Tensor] = []
        self.mean_out: list[Tensor] = []
        self.attention = _prefix_attention(site, host) if lever.prefix == "attend" else None
        self.attention_error = 0.0

    def update(self, x: Tensor, out: Tensor) -> None:
        prefix_BPC, x_BCHW = self.site.layout.to_map(x)
        prefix_out_BPC, out_BCHW = self.site.layout.to_map(out)
        self.images += len(x_BCHW)
        self.map_CHW += out_BCHW.double().sum(0).cpu()
        self.prefix_in.append(prefix_BPC.cpu())
        self.prefix_out.append(prefix_out_BPC.cpu())
        self.mean_in.append(x_BCHW.mean((2, 3)).cpu())
        self.mean_out.append(out_BCHW.mean((2, 3)).cpu())
        if self.attention is not None:
            tokens_BNC = self.site.layout.batch_first(x)
            own = self.attention.to(x.device)(prefix_BPC, self.mean_in[-1], tokens_BNC)
            scale = prefix_out_BPC.abs().max().clamp_min(1.0)
            self.attention_error = max(self.attention_error, float((own - prefix_out_BPC).abs().max() / scale))
        if self.gram_II is not None and self.cross_IO is not None:
            self._update_gram(x_BCHW, out_BCHW, self.gram_II, self.cross_IO)
        if self.values is not None:
            self.values.update(x, out)

    def _update_gram(self, x_BCHW: Tensor, out_BCHW: Tensor, gram_II: Tensor, cross_IO: Tensor) -> None:
        features_BIL = F.unfold(x_BCHW, self.kernel, padding=self.kernel // 2)
        if self.shift_I is None:  # near the mean, so that float32 products lose nothing to cancellation
            self.shift_I = features_BIL.mean((0, 2))
        self.features_BI.append(features_BIL.mean(2).cpu())
        features_LI = (features_BIL - self.shift_I[:, None]).transpose(1, 2).reshape(-1, features_BIL.shape[1])
        out_LO = out_BCHW.flatten(2).transpose(1, 2).reshape(-1, out_BCHW.shape[1])
        gram_II += (features_LI.T @ features_LI).cpu()
        cross_IO += (features_LI.T @ out_LO).cpu()

    def fit(self, host: nn.Module, costs: CostModel) -> MixerRecord:
        prefix = self._prefix_spec()
        if self.values is not None and not self.values.close():
            self.values = None
        candidates = []
        for op in self.lever.ops:
            if op.startswith("depthwise") and self.values is None:
                continue
            spec, tensors = self._fit(op, prefix)
            flops = costs.mixer(self.site, spec)
            if flops < costs.hosts[self.site.path]:
                candidates.append(Candidate(op, flops, spec, tensors))
        return MixerRecord(self.site, costs, tuple(candidates))

    def _prefix_spec(self) -> Prefix | None:
        if not self.site.layout.prefix:
            return None
        if self.attention is None or self.attention_error > 1e-4:
            return RidgePrefix()  # the host does more than plain softmax attention
        return _attend(self.site, bias=self.attention.q.bias is not None)

    def _fit(self, op: str, prefix: Prefix | None) -> tuple[MixerSpec, dict[str, Tensor]]:
        if op == "skip":
            return Skip(), {}
        mean_out_BO, per_position_CHW = torch.cat(self.mean_out), self.map_CHW / self.images
        if op == "constant":
            tensors = {"grid_CHW": per_position_CHW}
            if self.site.layout.prefix:
                tensors["prefix_PC"] = torch.cat(self.prefix_out).double().mean(0)
            return self._spec_and_floats(op, prefix, None, tensors)
        tensors = self._prefix_tensors(prefix)
        if op == "global":
            tensors["grid_CHW"] = per_position_CHW
            context = self._context(mean_out_BO.double() - mean_out_BO.double().mean(0))
            if context is not None:
                tensors["context.weight"] = context[0]
                tensors["grid_CHW"] = per_position_CHW + context[1][:, None, None]
            return self._spec_and_floats(op, prefix, context is not None, tensors)
        if op.startswith("depthwise"):
            return self._fit_depthwise(op, prefix, tensors, mean_out_BO)
        return self._fit_conv(op, prefix, tensors, mean_out_BO)

    def _fit_conv(
        self, op: str, prefix: Prefix | None, tensors: dict[str, Tensor], mean_out_BO: Tensor
    ) -> tuple[MixerSpec, dict[str, Tensor]]:
        spec = self.lever.spec(op, self.site, prefix)
        assert isinstance(spec, Conv) and self.gram_II is not None and self.cross_IO is not None
        dim, k = self.site.dim, spec.kernel
        select_I = self._inner(k)
        features_BI = torch.cat(self.features_BI).double()[:, select_I]
        count = self.images * self.site.layout.positions
        mean_I, mean_O = features_BI.mean(0), mean_out_BO.double().mean(0)
        shift_I = self.shift_I.double().cpu()[select_I]  # type: ignore[union-attr]
        gram_II = self.gram_II[select_I][:, select_I] - count * torch.outer(mean_I - shift_I, mean_I - shift_I)
        cross_IO = self.cross_IO[select_I] - count * torch.outer(mean_I - shift_I, mean_O)
        solution_IO = solve_ridge(gram_II, cross_IO, self.lever.ridge)
        if spec.rank < dim:
            first_RI, second_OR = reduce_rank(solution_IO, gram_II, spec.rank)
            tensors["expand.weight"] = second_OR[:, :, None, None]
            full_OI, bias_name = second_OR @ first_RI, "expand.bias"
        else:
            first_RI, full_OI, bias_name = solution_IO.T, solution_IO.T, "reduce.bias"
        tensors["reduce.weight"] = first_RI.reshape(-1, dim, k, k)
        bias_O = mean_O - full_OI @ mean_I
        context = self._context(mean_out_BO.double() - features_BI @ full_OI.T - bias_O)
        if context is not None:
            tensors["context.weight"] = context[0]
            bias_O = bias_O + context[1]
        tensors[bias_name] = bias_O
        return self._spec_and_floats(op, prefix, context is not None, tensors)

    def _fit_depthwise(
        self, op: str, prefix: Prefix | None, tensors: dict[str, Tensor], mean_out_BO: Tensor
    ) -> tuple[MixerSpec, dict[str, Tensor]]:
        spec = self.lever.spec(op, self.site, prefix)
        assert isinstance(spec, Depthwise) and self.values is not None
        fitted, predicted_BO = self.values.fit(spec.kernel, self.lever.ridge)
        tensors |= fitted
        context = self._context(mean_out_BO.double() - predicted_BO)
        if context is not None:
            tensors["context.weight"] = tensors["context.weight"] + context[0]
            tensors["expand.bias"] = tensors["expand.bias"] + context[1]
        return self._spec_and_floats(op, prefix, None, tensors)

    def _inner(self, kernel: int) -> Tensor:
        """Indices of the central `kernel` x `kernel` neighbourhood among the features of the largest one."""
        edge = (self.kernel - kernel) // 2
        index = torch.arange(self.site.dim * self.kernel**2).reshape(self.site.dim, self.kernel, self.kernel)
        return index[:, edge : edge + kernel, edge : edge + kernel].flatten()

    def _context(self, left_BO: Tensor) -> tuple[Tensor, Tensor] | None:
        """What (prefix tokens, patch mean) predict of the per-image mean output that is left; None if nothing."""
        if not self.lever.context:
            return None
        seen = [torch.cat(self.mean_in)]
        if self.site.layout.prefix:
            seen.insert(0, torch.cat(self.prefix_in).flatten(1))
        return ridge_by_leave_one_out(torch.cat(seen, 1), left_BO)

    def _prefix_tensors(self, prefix: Prefix | None) -> dict[str, Tensor]:
        if prefix is None:
            return {}
        if isinstance(prefix, AttendPrefix):
            assert self.attention is not None
            return {f"prefix.{name}": value for name, value in self.attention.state_dict().items()}
        prefix_in, prefix_out, mean = torch.cat(self.prefix_in), torch.cat(self.prefix_out), torch.cat(self.mean_in)
        weights, biases = [], []
        for own_BC, target_BC in zip(prefix_in.unbind(1), prefix_out.unbind(1), strict=True):
            fit = ridge_by_leave_one_out(torch.cat((own_BC, mean), 1), target_BC)
            nothing = torch.zeros(self.site.dim, 2 * self.site.dim), target_BC.mean(0)
            weight_OI, bias_O = nothing if fit is None else fit
            weights.append(weight_OI)
            biases.append(bias_O)
        return {"prefix.weight_POI": torch.stack(weights), "prefix.bias_PO": torch.stack(biases)}

    def _spec_and_floats(
        self, op: str, prefix: Prefix | None, context: bool | None, tensors: dict[str, Tensor]
    ) -> tuple[MixerSpec, dict[str, Tensor]]:
        spec = self.lever.spec(op, self.site, prefix, context)
        return spec, {name: value.detach().float().cpu().contiguous() for name, value in tensors.items()}


def _attend(site: AttentionSite, bias: bool = True) -> AttendPrefix:
    named = site.projections
    assert named is not None and named.scale is not None
    return AttendPrefix(heads=named.heads, head_dim=named.head_dim, bias=bias, scale=named.scale)


def _prefix_attention(site: AttentionSite, host: nn.Module) -> PrefixAttention | None:
    """The host's projections in a PrefixAttention, or None where the site does not name all of them."""
    if not is_plain(site) or not site.layout.prefix:
        return None
    weights = attention_weights(site, host)
    attention = PrefixAttention(_attend(site, bias="q.bias" in weights), site.dim)
    attention.load_state_dict(weights)
    return attention.requires_grad_(False)


@dataclass(frozen=True)
class Candidate:
    """A fitted mixer at one site; tensors are named relative to the mixer."""

    name: str
    flops: int
    spec: MixerSpec
    tensors: Mapping[str, Tensor]
    score: float | None = None

    def described(self) -> dict[str, Any]:
        return {"op": self.name, "flops": self.flops, "spec": self.spec.model_dump(mode="json")}

    @classmethod
    def restored(cls, described: Mapping[str, Any], tensors: Mapping[str, Tensor], score: float | None) -> Candidate:
        spec = _SPEC.validate_python(described["spec"], strict=False)
        return cls(described["op"], described["flops"], spec, tensors, score)


class MixerRecord(FittedRecord[AttentionSite, Candidate]):
    """The fitted mixers of one attention site."""

    lever, kind = "mixer", Candidate

    def option(self, candidate: Candidate) -> Option:
        path = self.site
        edit = Replace(path=path, spec=candidate.spec, io=self.at.io)
        named = {f"{path}.{name}": value for name, value in candidate.tensors.items()}
        return Option(path, candidate.name, candidate.flops, (edit,), lambda: named, candidate.score)


__all__ = ["Candidate", "Mixer", "MixerRecord", "MixerStatistics"]
