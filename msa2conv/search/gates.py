"""Gate search: what gates cost, how a multiplier keeps them to a budget, and what they propose as Options.

The paper's penalty weight had to be tuned by hand over a factor of 333 and every published model still misses its
target by 4 to 40 %. Here the weight is a Lagrange multiplier that adapts, and the exact solver finishes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from ..cost import CostModel
from ..kernels import Offsets, SharedStart
from ..layouts import Layout
from ..levers import FFN
from ..ops import Conv, Identity, MixerSpec, PassPrefix, Skip
from ..options import Option
from ..plan import Replace
from ..sites import AttentionSite, FFNSite
from ..transforms.gates import Gate, Sampling, is_open
from ..transforms.single_path import NAMES, Branch

_FIRST, _LOWEST = math.log(0.1), math.log(1e-3)  # of the multiplier, as logarithms
_RATE, _WIDTH = 20.0, 0.02  # how fast it moves: e-folds over all steps, at an excess of so much or more
_HOT, _COLD = 0.25, 0.02  # temperatures between which annealed gates cool


class Gates(BaseModel):
    """How a gate search works. The defaults need no tuning; `msa2conv.spvit.config(name)` is the paper's.

    Args:
        init: start value of all thresholds; sigmoid(init) is the probability of being open.
        sampling: "concrete": straight-through samples, drawn once per forward pass. "annealed": no sampling, soft gates
            that harden over the steps.
        alpha: temperature of the softmax over heads in the shared kernels; small: heads are picked, large: averaged.
        offsets: how the nine columns of the head mixture lie on a 3x3 kernel.
        windowed: convolve inside every (shifted) window instead of on the whole map.
        skip: what a skipped attention leaves after the search: "zero" (as during it) or "identity" (LN1(x), the paper's
            fine-tuned form).
        penalty: "adaptive", or the paper's fixed weight lambda of (target - FLOPs)^2 in GFLOPs.
        ramp: share of the steps over which an adaptive budget falls from the original's FLOPs to the target.
        exact: finish with the exact solver, within 1 % below the target; False: the thresholds alone decide.
        skip_inactive: run closed branches without autograd: cheaper; one device synchronisation per site.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    init: float = Field(default=1.5, gt=0, allow_inf_nan=False)
    sampling: Sampling = "concrete"
    alpha: float = Field(default=0.01, gt=0, allow_inf_nan=False)
    offsets: Offsets = "rows"
    windowed: bool = False
    skip: Literal["zero", "identity"] = "zero"
    penalty: Literal["adaptive"] | float = "adaptive"
    ramp: float = Field(default=0.5, ge=0, le=1)
    exact: bool = True
    skip_inactive: bool = False


@dataclass(frozen=True)
class GateCosts:
    """Multiply-adds as a function of gates: rest + sum of the chosen mixers + units x open hidden units.

    Args:
        base: of the original.
        rest: of everything that no gate decides.
        mixers: {site path: (conv1x1, conv3x3, attention)}.
        units: {site path: one hidden unit}.
    """

    base: int
    rest: int
    mixers: Mapping[str, tuple[int, int, int]]
    units: Mapping[str, int]

    def flops(self, decisions: Mapping[str, Tensor]) -> Tensor:
        """Multiply-adds of {site path: values of its gate}; a differentiable scalar, float64 where there is float64."""
        dtype = torch.float if any(value.is_mps for value in decisions.values()) else torch.double
        decisions = {path: value.to(dtype) for path, value in decisions.items()}
        parts = [decisions[path].sum() * unit for path, unit in self.units.items()]
        for path, (narrow, wide, host) in self.mixers.items():
            k0, k1, k2 = decisions[path].unbind()
            parts.append(k0 * narrow + k1 * (wide - narrow) + k2 * (host - wide))
        return torch.stack(parts).sum() + self.rest

    @classmethod
    def measured(
        cls, costs: CostModel, mixers: Mapping[str, AttentionSite], ffns: Mapping[str, FFNSite], windowed: bool = False
    ) -> GateCosts:
        """By the project's own counter; `windowed` as in Gates."""
        of_mixers = {}
        for path, site in mixers.items():
            narrow, wide = (costs.mixer(site, conv_spec(site, kernel, windowed)) for kernel in (1, 3))
            of_mixers[path] = (narrow, wide, costs.hosts[path])
        gated = sum(costs.hosts[path] for path in mixers) + sum(s.hidden * costs.units[p] for p, s in ffns.items())
        return cls(costs.base, costs.base - gated, of_mixers, {path: costs.units[path] for path in ffns})


class Budget:
    """The penalty: how much the thresholded network costs beyond what it may, times a multiplier that adapts.

    Mirror ascent on the multiplier of |FLOPs - budget|: its logarithm grows while the network is above the budget and
    falls while it is below, so it finds its scale whatever the loss and the model. The budget itself falls from the
    original's FLOPs to the target over the first `ramp` of the steps. Being below is penalised, too: where the loss has
    no opinion, thresholds that start equal would otherwise all close together.

    Args:
        costs: of the gates.
        target: multiply-adds allowed.
        gates: configuration.
        steps: how many optimiser steps are expected; None: the target holds from the first step on.
    """

    def __init__(self, costs: GateCosts, target: int, gates: Gates, steps: int | None) -> None:
        self.costs, self.target, self.gates, self.steps = costs, target, gates, steps
        self.step = 0
        self.log_multiplier = _FIRST

    @property
    def allowed(self) -> float:
        """Multiply-adds allowed at the current step."""
        over = self.steps * self.gates.ramp if self.steps else 0
        done = min(1.0, self.step / over) if over else 1.0
        return self.costs.base + (self.target - self.costs.base) * done

    @property
    def temperature(self) -> float:
        """Of annealed gates at the current step."""
        done = min(1.0, self.step / self.steps) if self.steps else 1.0
        return _HOT * math.pow(_COLD / _HOT, done)

    def __call__(self, decisions: Mapping[str, Tensor]) -> Tensor:
        flops = self.costs.flops(decisions)
        if self.gates.penalty != "adaptive":
            self.step += 1
            return (self.gates.penalty * ((self.target - flops) / 1e9) ** 2).float()
        excess = (flops - self.allowed) / self.costs.base
        rate = _RATE / (self.steps or 1000)
        found = float(excess.detach())
        self.log_multiplier += rate * max(-1.0, min(1.0, found / _WIDTH))
        self.log_multiplier = max(self.log_multiplier, _LOWEST)
        self.step += 1
        return (math.exp(self.log_multiplier) * excess.abs()).float()

    def state(self) -> dict[str, float]:
        """What a resumed search needs."""
        return {"step": self.step, "log_multiplier": self.log_multiplier}

    def load(self, state: Mapping[str, float]) -> None:
        self.step, self.log_multiplier = int(state["step"]), float(state["log_multiplier"])


def conv_spec(site: AttentionSite, kernel: int, windowed: bool = False) -> Conv:
    """The plain mixer that a shared branch becomes."""
    assert site.projections is not None
    layout = window_layout(site.layout) if windowed else site.layout
    prefix = PassPrefix() if layout.prefix else None
    rank = site.projections.head_dim
    return Conv(layout=layout, dim=site.dim, kernel=kernel, rank=rank, norm="batch", act="relu", prefix=prefix)


def window_layout(layout: Layout) -> Layout:
    """Every window as a map of its own; the layout itself where there are no windows."""
    return layout if layout.window is None else Layout(pattern="b (h w) c", grid=layout.window)


def mixer_options(site: AttentionSite, gate: Gate, costs: CostModel, gates: Gates) -> list[Option]:
    """Skip, both convolutions and the attention, priced by -log of their probability under the gates."""
    theta = gate.theta.detach().double().cpu()
    opened, closed = F.logsigmoid(theta), F.logsigmoid(-theta)
    prices = [-closed[0], -opened[0] - closed[1], -opened[:2].sum() - closed[2], -opened.sum()]
    return [mixer_option(site, name, costs, gates, float(p)) for name, p in zip(NAMES, prices, strict=True)]


def mixer_option(site: AttentionSite, name: Branch, costs: CostModel, gates: Gates, price: float = 0.0) -> Option:
    """What one branch of a supernode becomes when it is lowered as `gates` say."""
    named = site.projections
    assert named is not None
    if name == "attention":
        return Option(site.path, name, costs.hosts[site.path], score=price)
    spec: MixerSpec = Skip() if gates.skip == "zero" else Identity()
    start = None
    if name != "skip":
        spec = conv_spec(site, 1 if name == "conv1x1" else 3, gates.windowed)
        start = SharedStart(v=named.v, out=named.out, heads=named.heads)
    edit = Replace(path=site.path, spec=spec, io=site.io, start=start)
    return Option(site.path, spec.kind if name == "skip" else name, costs.mixer(site, spec), (edit,), score=price)


def ffn_options(site: FFNSite, gate: Gate, costs: CostModel, lever: FFN) -> list[Option]:
    """Every allowed width, keeping the units with the largest thresholds, priced likewise."""
    theta = gate.theta.detach().double().cpu()
    order = theta.argsort(descending=True, stable=True)
    opened = (-F.logsigmoid(theta[order])).cumsum(0)
    closed = (-F.logsigmoid(-theta[order])).flip(0).cumsum(0).flip(0)
    options = []
    for width in lever.widths(site.hidden):
        price = float(opened[width - 1]) + (float(closed[width]) if width < site.hidden else 0.0)
        options.append(width_option(site, order[:width].tolist(), costs, price))
    return options


def open_units(site: FFNSite, gate: Gate, costs: CostModel) -> Option:
    """The units whose gate is open; at least one."""
    theta = gate.theta.detach()
    kept = is_open(theta).nonzero().flatten().tolist() or [int(theta.argmax())]
    return width_option(site, kept, costs)


def thresholded(gate: Gate, options: list[Option]) -> Option:
    """Out of (skip, conv1x1, conv3x3, attention): the one that the thresholds stand for."""
    return options[int(is_open(gate.theta.detach()).int().cumprod(0).sum())]


def width_option(site: FFNSite, kept: list[int], costs: CostModel, price: float = 0.0) -> Option:
    """An FFN that keeps these hidden units."""
    width = len(kept)
    edits = () if width == site.hidden else site.edits(kept)
    return Option(site.path, f"{width}/{site.hidden}", costs.ffn(site, width), edits, score=price)
