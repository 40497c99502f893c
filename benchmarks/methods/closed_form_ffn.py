"""Published closed forms for FFNs: units that vary least go, and what they did is folded into those that stay.

VBP (Berisha et al., "Variance-Based Pruning", ICCV 2025): one ranking of all units by the variance of their activation;
the means of those that go are added to the bias behind them.
CORP (Zhang and Yang, arXiv 2602.05243): the same share of every FFN, by the variance that reaches the output; those
that go are an affine function of those that stay, found by ridge regression and folded into the weights behind them.
(CORP also drops dimensions of queries and keys; this is its FFN half.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from msa2conv.sites import FFNSite

from .base import Context
from .surgery import FFNs

_RIDGE = 1e-3  # of the mean variance


@dataclass(frozen=True)
class ClosedFormFFN:
    """Args:
    name: in tables.
    affine: compensate by ridge regression (CORP); else by the means alone (VBP).
    """

    name: str
    affine: bool
    keeps_grid: bool = True

    @torch.no_grad()
    def shrink(self, parent: nn.Module, budget: int, context: Context) -> nn.Module:
        ffns = FFNs.of(parent, context)
        hidden = ffns.hidden(parent, context.calibration()[0].to(context.device))
        scores = {path: x.double().var(0) for path, x in hidden.items()}
        if self.affine:
            scores = {p: v * _weight(parent, ffns.sites[p]).double().square().sum(0) for p, v in scores.items()}
        widths = ffns.uniform(budget) if self.affine else ffns.ranked(scores, budget)
        kept = ffns.best(scores, widths)
        model = ffns.narrowed(parent, kept)
        for path, site in ffns.sites.items():
            _compensate(model, parent, site, hidden[path], kept[path], self.affine)
        context.note(widths=widths)
        return model


def _weight(model: nn.Module, site: FFNSite) -> Tensor:
    layer: Any = model.get_submodule(site.reader)
    return layer.weight.detach().flatten(1).cpu()


def _compensate(
    model: nn.Module, parent: nn.Module, site: FFNSite, hidden_LK: Tensor, kept: list[int], affine: bool
) -> None:
    """h_gone ~ mean_gone + B (h_kept - mean_kept), with B = 0 where only means are folded."""
    layer: Any = model.get_submodule(site.reader)
    gone = sorted(set(range(site.hidden)) - set(kept))
    weight_OK, mean_K = _weight(parent, site).double(), hidden_LK.double().mean(0)
    folded_OS, shift_O = weight_OK[:, kept], weight_OK[:, gone] @ mean_K[gone]
    if affine and gone:
        centred_LK = hidden_LK.double() - mean_K
        gram_SS = centred_LK[:, kept].T @ centred_LK[:, kept] / len(centred_LK)
        cross_SG = centred_LK[:, kept].T @ centred_LK[:, gone] / len(centred_LK)
        ridge = _RIDGE * gram_SS.diagonal().mean()
        b_SG = torch.linalg.solve(gram_SS + ridge * torch.eye(len(kept), dtype=torch.double), cross_SG)
        folded_OS = folded_OS + weight_OK[:, gone] @ b_SG.T
        shift_O = shift_O - weight_OK[:, gone] @ (b_SG.T @ mean_K[kept])
    layer.weight.copy_(folded_OS.reshape(layer.weight.shape))
    layer.bias += shift_O.to(layer.bias)


METHODS = [ClosedFormFFN("vbp", affine=False), ClosedFormFFN("corp-ffn", affine=True)]
