"""A depthwise convolution in the place of an attention's averages: W_v and W_o are kept, its taps are fitted.

Channel by channel, what the output projection reads is regressed, over all patches, on the values of the same channel
in the neighbourhood, on their mean over the image, on those of the prefix tokens and on a constant: a ridge regression
of a dozen unknowns. Nothing need be known of how the attention weighs its values, so positions, windows and norms of
queries do not matter; whether what is read becomes the output by W_o alone is checked numerically.

Shape suffixes: B batch, P prefix, C channels, H W grid, L positions, V channels of a value, T taps, F unknowns, O out.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..sites import AttentionSite
from .base import is_plain, whole_attention
from .ridge import precise

_CHUNK = 2**24  # numbers of one regression's inputs that are held at a time
_EXACT = 1e-4  # relative difference up to which the output is W_o of what is read


class ValueStatistics:
    """Second moments, channel by channel, of values in the neighbourhood and of what the output projection reads."""

    def __init__(self, site: AttentionSite, host: nn.Module, kernel: int, context: bool) -> None:
        assert site.projections is not None
        self.site, self.kernel, self.context = site, kernel, context
        weight_VC, _ = site.projections.v.read(host)
        weight_OV, bias_O = site.projections.out.read(host)
        self.value_VC, self.out_OV = weight_VC.detach().clone(), weight_OV.detach().clone()
        self.bias_O = weight_OV.new_zeros(site.dim) if bias_O is None else bias_O.detach().clone()
        self.unknowns = kernel**2 + (1 + site.layout.prefix if context else 0) + 1
        width = len(self.value_VC)
        self.gram_VFF = torch.zeros(width, self.unknowns, self.unknowns, dtype=torch.double)
        self.cross_VF = torch.zeros(width, self.unknowns, dtype=torch.double)
        self.means_BVT: list[Tensor] = []
        self.prefix_BVP: list[Tensor] = []
        self.error = 0.0
        self.whole = whole_attention(site, host)[1] if is_plain(site) and site.merging is not None else None
        self.read: Tensor | None = None
        output = dict(host.named_modules()).get(site.projections.out.path)
        self.handle = None if output is None else output.register_forward_pre_hook(self._keep)

    @staticmethod
    def applies(site: AttentionSite, host: nn.Module) -> bool:
        """Whether the site names W_v and W_o, both of what its tokens hold."""
        if site.projections is None:
            return False
        value_VC, out_OV = (rows.read(host)[0] for rows in (site.projections.v, site.projections.out))
        return value_VC.shape[1] == len(out_OV) == site.dim and len(value_VC) == out_OV.shape[1]

    def _keep(self, _module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.read = args[0]

    def update(self, x: Tensor, out: Tensor) -> None:
        read, self.read = self.read, None
        if read is None and self.whole is not None:  # nn.MultiheadAttention never calls its output layer
            read = self.whole.to(x.device).attended(x)
        if read is None or read.shape[:-1] != out.shape[:-1] or read.shape[-1] != len(self.value_VC):
            self.error = float("inf")
            return
        value_VC, out_OV, bias_O = (each.to(x) for each in (self.value_VC, self.out_OV, self.bias_O))
        scale = out.abs().max().clamp_min(1.0)
        self.error = max(self.error, float((F.linear(read, out_OV, bias_O) - out).abs().max() / scale))
        prefix_BPC, x_BCHW = self.site.layout.to_map(x)
        _, read_BVHW = self.site.layout.to_map(read)
        value_BVHW = F.conv2d(x_BCHW, value_VC[:, :, None, None])
        prefix_BVP = value_BVHW[:, :, 0, :0]
        if self.site.layout.prefix:
            prefix_BVP = (prefix_BPC @ value_VC.T).transpose(1, 2)
        self.prefix_BVP.append(prefix_BVP.cpu())
        step = max(1, _CHUNK // (value_BVHW[0].numel() * self.unknowns))
        for index in range(0, len(x_BCHW), step):
            part = slice(index, index + step)
            self._add(value_BVHW[part], prefix_BVP[part], read_BVHW[part])

    def _add(self, value_BVHW: Tensor, prefix_BVP: Tensor, read_BVHW: Tensor) -> None:
        batch, width = value_BVHW.shape[:2]
        near_BIL = F.unfold(value_BVHW, self.kernel, padding=self.kernel // 2)
        near_BVTL = near_BIL.reshape(batch, width, -1, near_BIL.shape[2])
        self.means_BVT.append(near_BVTL.mean(3).cpu())
        constant_BV1 = torch.ones_like(value_BVHW[:, :, 0, :1])
        beside_BVF = constant_BV1
        if self.context:
            beside_BVF = torch.cat((prefix_BVP, value_BVHW.mean((2, 3))[..., None], constant_BV1), 2)
        seen_BVFL = torch.cat((near_BVTL, beside_BVF[..., None].expand(-1, -1, -1, near_BVTL.shape[3])), 2)
        seen_VFL = precise(seen_BVFL).permute(1, 2, 0, 3).reshape(width, self.unknowns, -1)
        read_VL = precise(read_BVHW).transpose(0, 1).reshape(width, -1)
        self.gram_VFF += torch.bmm(seen_VFL, seen_VFL.transpose(1, 2)).cpu()
        self.cross_VF += torch.bmm(seen_VFL, read_VL[:, :, None])[:, :, 0].cpu()

    def close(self) -> bool:
        """Stop listening; whether the output is W_o of what is read."""
        if self.handle is not None:
            self.handle.remove()
        return self.error <= _EXACT

    def fit(self, kernel: int, ridge: float) -> tuple[dict[str, Tensor], Tensor]:
        """The tensors of a `Depthwise` mixer without those of its prefix tokens, and its mean outputs [B, O].

        Args:
            kernel: of the convolution, up to the one that was asked for.
            ridge: strength, relative to the mean variance of a value.
        """
        edge = (self.kernel - kernel) // 2
        inner = torch.arange(self.kernel**2).reshape(self.kernel, self.kernel)
        taps = inner[edge : self.kernel - edge, edge : self.kernel - edge].flatten()
        index = torch.cat((taps, torch.arange(self.kernel**2, self.unknowns)))
        gram_VFF, cross_VF = self.gram_VFF[:, index][:, :, index], self.cross_VF[:, index]
        # all but the constant, which comes last, are held back
        held_F = torch.ones(len(index), dtype=torch.double)
        held_F[-1] = 0
        strength_V = ridge * gram_VFF.diagonal(dim1=1, dim2=2)[:, : len(taps)].mean(1).clamp_min(1e-12)
        found_VF = torch.linalg.solve(gram_VFF + strength_V[:, None, None] * held_F.diag(), cross_VF)
        taps_VT, beside_VF, constant_V = found_VF[:, : len(taps)], found_VF[:, len(taps) : -1], found_VF[:, -1]
        value_VC, out_OV, bias_O = (each.cpu().double() for each in (self.value_VC, self.out_OV, self.bias_O))
        means_BVT = torch.cat(self.means_BVT).double()
        averaged_BV = (means_BVT[:, :, taps] * taps_VT).sum(2) + constant_V
        tensors = {
            "value.weight": value_VC[:, :, None, None],
            "taps.weight": taps_VT.reshape(-1, 1, kernel, kernel),
            "expand.weight": out_OV[:, :, None, None],
            "expand.bias": bias_O + out_OV @ constant_V,
        }
        if self.context:
            seen_BVF = torch.cat((torch.cat(self.prefix_BVP), means_BVT[:, :, self.kernel**2 // 2, None]), 2)
            averaged_BV = averaged_BV + (seen_BVF * beside_VF).sum(2)
            folded = [out_OV * weights_V @ value_VC for weights_V in beside_VF.unbind(1)]  # W_o diag(weights) W_v
            tensors["context.weight"] = torch.cat(folded, 1)
        return tensors, averaged_BV @ out_OV.T + bias_O


__all__ = ["ValueStatistics"]
