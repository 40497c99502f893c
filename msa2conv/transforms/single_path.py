"""The supernode of the gate search: the host and two convolutions made from the host's own weights, behind one gate.

SPViT's single path (He et al., TPAMI 2024, section 3): with gates z = cumprod(z'),
out = z2 MSA + z1 (1 - z2) C3 + z0 (1 - z1)(1 - z2) C1, all closed -> 0.

Shape suffixes as in kernels.py; B batch, P prefix tokens, H W grid.
"""

from __future__ import annotations

import contextlib
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InvalidInput
from ..kernels import Offsets, Values, centre
from ..layouts import Layout
from ..sites import AttentionSite, Projections
from ..standin import Standin
from .gates import Gate

Branch = Literal["skip", "conv1x1", "conv3x3", "attention"]
NAMES: tuple[Branch, ...] = ("skip", "conv1x1", "conv3x3", "attention")
# Thresholds that choose each of them: [1x1 or richer, 3x3 or richer, attention].
OPEN = {"skip": (0, 0, 0), "conv1x1": (1, 0, 0), "conv3x3": (1, 1, 0), "attention": (1, 1, 1)}


class SharedSupernode(Standin):
    """Stands where its host stood; the host is wrapped, never copied, and its W_v and W_o serve all branches.

    Args:
        host: the attention.
        site: where it is; states its projections.
        gate: three ordered thresholds.
        alpha: temperature of the softmax over heads.
        offsets: how the nine columns of the head mixture lie on the kernel.
        layout: what the convolutions see: the site's layout (the whole map), or one window.
        skip_inactive: run branches whose gate is closed without autograd. Gradients are the same (their factor is zero)
            but absent instead of zero; costs one synchronisation with the device per forward pass.
    """

    def __init__(
        self,
        host: nn.Module,
        site: AttentionSite,
        gate: Gate,
        alpha: float = 0.01,
        offsets: Offsets = "rows",
        layout: Layout | None = None,
        skip_inactive: bool = False,
    ) -> None:
        super().__init__()
        assert site.projections is not None
        self.host, self.gate = host, gate
        self.named: Projections = site.projections
        self.layout, self.io = layout or site.layout, site.io
        self.alpha, self.offsets, self.skip_inactive = alpha, offsets, skip_inactive
        like = next(host.parameters())
        self.head_probs = nn.Parameter(torch.ones(self.named.heads, 9, device=like.device))
        self.bn_1x1 = nn.BatchNorm2d(self.named.head_dim, device=like.device)
        self.bn_3x3 = nn.BatchNorm2d(self.named.head_dim, device=like.device)

    def _mixtures(self) -> tuple[Tensor, Tensor]:
        """Weight of every head at the centre [K, 1] and at the nine positions [K, 9]."""
        mixture_KS = (self.head_probs / self.alpha).softmax(0)
        at = centre(self.offsets)
        return mixture_KS[:, at : at + 1], mixture_KS

    def _values(self) -> Values:
        return Values.read(self.host, self.named.v, self.named.out, self.named.heads)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        z0, z1, z2 = self.gate().unbind()
        rest = 1 - z2
        factor_1x1, factor_3x3 = z0 * (1 - z1) * rest, z1 * rest
        run_host = run_1x1 = run_3x3 = True
        if self.skip_inactive:
            run_host, run_1x1, run_3x3 = (torch.stack((z2, factor_1x1, factor_3x3)).detach() != 0).tolist()
        with _autograd(run_host):
            found = self.host(*args, **kwargs)
        attended = found[0] if isinstance(found, tuple) else found
        x = args[0] if args else kwargs[self.io.x]
        convolved = self._convolve(x, factor_1x1, factor_3x3, run_1x1, run_3x3)
        out = torch.addcmul(convolved.to(attended.dtype), attended, z2.to(attended.dtype))
        return (out, *found[1:]) if isinstance(found, tuple) else out

    def _convolve(self, x: Tensor, factor_1x1: Tensor, factor_3x3: Tensor, run_1x1: bool, run_3x3: bool) -> Tensor:
        """factor_1x1 C1 + factor_3x3 C3 on tokens; the factors are folded into the second kernels."""
        prefix_BPC, map_BCHW = self.layout.to_map(x)
        if self.training and map_BCHW.numel() == map_BCHW.shape[1]:
            raise InvalidInput(
                f"{type(self).__name__}, training", "a batch of one image with a single position",
                "two values per channel for BatchNorm", "Train with larger batches (drop_last=True).",
            )  # fmt: skip
        map_BCHW = map_BCHW.contiguous(memory_format=torch.channels_last)  # once, for both branches
        values, (centre_KS, mixture_KS) = self._values(), self._mixtures()
        narrow = values.conv(centre_KS, self.offsets)
        with _autograd(run_1x1):
            # a 1x1 convolution as a matrix product on channels-last maps: several times faster on CPU
            reduced = F.linear(map_BCHW.permute(0, 2, 3, 1), narrow.reduce_DCHW[:, :, 0, 0], narrow.reduce_bias_D)
            hidden_1x1 = self.bn_1x1(reduced.permute(0, 3, 1, 2)).relu_()
        with _autograd(run_3x3):
            hidden_3x3 = self.bn_3x3(self._wide(values, map_BCHW, mixture_KS)).relu_()
        both = factor_1x1 + factor_3x3
        expand_OI = torch.cat((factor_1x1 * narrow.expand_OD, factor_3x3 * values.summed(mixture_KS)[1]), 1)
        bias_O = both * narrow.expand_bias_O
        hidden_BHWI = torch.cat((hidden_1x1, hidden_3x3), 1).permute(0, 2, 3, 1)
        out_BHWO = F.linear(hidden_BHWI, expand_OI.to(hidden_BHWI.dtype), bias_O.to(hidden_BHWI.dtype))
        # prefix tokens pass through convolutions unchanged
        return self.layout.from_map((both * prefix_BPC).to(out_BHWO.dtype), out_BHWO.permute(0, 3, 1, 2))

    def _wide(self, values: Values, map_BCHW: Tensor, mixture_KS: Tensor) -> Tensor:
        """The first convolution of the 3x3 branch, in the way that takes fewer multiply-adds."""
        if self.named.heads < 9:
            return values.convolve(map_BCHW, mixture_KS, self.offsets)
        merged = values.conv(mixture_KS, self.offsets)
        return F.conv2d(map_BCHW, merged.reduce_DCHW, merged.reduce_bias_D, padding=1)

    @torch.no_grad()
    def merged(self, kernel: int) -> dict[str, Tensor]:
        """Parameters and BatchNorm statistics of the Conv mixer that equals the branch of this kernel side."""
        mixture, norm = (self._mixtures()[0], self.bn_1x1) if kernel == 1 else (self._mixtures()[1], self.bn_3x3)
        state = self._values().conv(mixture, self.offsets).state()
        state |= {f"norm.{name}": value for name, value in norm.state_dict().items()}
        return {name: value.detach().clone() for name, value in state.items()}


class GatedLinear(nn.Module):
    """The layer that reads an FFN's hidden units, each of which has a gate: W diag(z) h + b.

    A Linear, or a 1 x 1 convolution, which is the same on a map.
    """

    def __init__(self, linear: nn.Linear | nn.Conv2d, gate: Gate) -> None:
        super().__init__()
        self.linear, self.gate = linear, gate

    def forward(self, hidden: Tensor) -> Tensor:
        # on the weights, not on the activations: the same product, thousands of times cheaper
        if isinstance(self.linear, nn.Conv2d):
            return F.conv2d(hidden, self.linear.weight * self.gate()[:, None, None], self.linear.bias)
        return F.linear(hidden, self.linear.weight * self.gate(), self.linear.bias)


def _autograd(on: bool) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext() if on else torch.no_grad()
