"""Convolution kernels made from an attention's own W_v and W_o: what "weight-shared" means.

He et al., "Pruning Self-attentions into Convolutional Layers in Single Path" (TPAMI 2024): position p of the kernel
mixes the heads h by m[h, p]: V_p = sum_h m[h, p] V_h and P_p = sum_h m[h, p] P_h, where V_h and P_h are a head's rows
of W_v and columns of W_o.

Shape suffixes: K heads, D head dim, C channels in, O channels out, S kernel positions (1 or 9).
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from .ops import Path, Width

Index = Annotated[int, Field(ge=0, le=2**31)]
Offsets = Literal["rows", "columns", "centre first"]

# Which kernel position (kh, kw) the p-th column of a head mixture stands for.
OFFSETS: dict[Offsets, tuple[tuple[int, int], ...]] = {
    "rows": tuple((p // 3, p % 3) for p in range(9)),
    "columns": tuple((p % 3, p // 3) for p in range(9)),  # SPViT's DeiT code
    "centre first": ((1, 1), *((p % 3, p // 3) for p in range(9) if p != 4)),  # then by columns: SPViT's Swin
}


def centre(offsets: Offsets) -> int:
    """Which column of a head mixture stands for the centre of the kernel: the one that a 1x1 convolution uses."""
    return OFFSETS[offsets].index((1, 1))


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Rows:
    """Names one projection inside a host: rows `start:stop` (None: all of them) of a Linear, or of a weight of its own.

    Args:
        path: the Linear, or the parameter (`in_proj_weight` of nn.MultiheadAttention).
        start, stop: the rows.
        bias: a parameter of the host that is added instead of the Linear's own bias: these rows of it, or all of it
            where it has no others (BEiT's and EVA's `v_bias`).
    """

    path: Path
    start: Index | None = None
    stop: Index | None = None
    bias: Path | None = None

    def read(self, host: nn.Module) -> tuple[Tensor, Tensor | None]:
        """-> (weight [O, I], bias [O] or None), views of the host's current parameters."""
        parent, _, name = self.path.rpartition(".")
        weight = host.get_submodule(parent)._parameters.get(name)
        bias: Tensor | None = None if self.bias is None else host.get_parameter(self.bias)
        if weight is None:
            linear = host.get_submodule(self.path)
            weight, bias = linear._parameters["weight"], linear._parameters["bias"] if bias is None else bias
        assert weight is not None
        rows = weight[self.start : self.stop]
        if bias is not None and len(bias) != len(rows):
            bias = bias[self.start : self.stop]
        return rows, bias


class SharedStart(BaseModel):
    """A new convolution starts from its host's own values, every head mixed in equally: SPViT's start of fine-tuning.

    Args:
        v, out: where W_v and W_o are.
        heads: how many heads share them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    v: Rows
    out: Rows
    heads: Width

    def tensors(self, host: nn.Module, kernel: int) -> dict[str, Tensor]:
        """{parameter name in a Conv with a norm: value} for a kernel of side 1 or 3."""
        values = Values.read(host, self.v, self.out, self.heads)
        mixture_KS = values.v_KDC.new_full((self.heads, kernel**2), 1 / self.heads)
        return values.conv(mixture_KS, "rows").state()


class Values:
    """W_v and W_o of a host by heads; reads the parameters anew every time it is made."""

    def __init__(self, v_KDC: Tensor, v_bias_KD: Tensor, out_OKD: Tensor, out_bias_O: Tensor) -> None:
        self.v_KDC, self.v_bias_KD, self.out_OKD, self.out_bias_O = v_KDC, v_bias_KD, out_OKD, out_bias_O

    @classmethod
    def read(cls, host: nn.Module, v: Rows, out: Rows, heads: int) -> Values:
        (v_IC, v_bias_I), (out_OI, out_bias_O) = v.read(host), out.read(host)
        v_KDC, out_OKD = v_IC.reshape(heads, -1, v_IC.shape[1]), out_OI.reshape(len(out_OI), heads, -1)
        v_bias_KD = v_KDC.new_zeros(v_KDC.shape[:2]) if v_bias_I is None else v_bias_I.reshape(heads, -1)
        return cls(v_KDC, v_bias_KD, out_OKD, out_OI.new_zeros(len(out_OI)) if out_bias_O is None else out_bias_O)

    def conv(self, mixture_KS: Tensor, offsets: Offsets) -> Kernels:
        """Merge a head mixture into the two kernels of a bottleneck convolution.

        Args:
            mixture_KS: weight of every head at every position: 1 (the centre) or 9 (see OFFSETS) columns.
            offsets: how those 9 columns lie on the kernel.
        """
        head_dim, dim = self.v_KDC.shape[1:]
        ordered_KS = ordered(mixture_KS, offsets)
        side = 3 if ordered_KS.shape[1] == 9 else 1
        taps_SDC = (ordered_KS.T @ self.v_KDC.flatten(1)).reshape(-1, head_dim, dim)
        bias_D, expand_OD = self.summed(mixture_KS)
        reduce_DCHW = taps_SDC.permute(1, 2, 0).reshape(head_dim, dim, side, side)
        return Kernels(reduce_DCHW, bias_D, expand_OD, self.out_bias_O)

    def summed(self, mixture_KS: Tensor) -> tuple[Tensor, Tensor]:
        """(sum_p b_p [D], sum_p P_p [O, D]): the bias of the first convolution and the second kernel."""
        total_K = mixture_KS.sum(1)
        return total_K @ self.v_bias_KD, (self.out_OKD * total_K[:, None]).sum(1)

    def convolve(self, map_BCHW: Tensor, mixture_KS: Tensor, offsets: Offsets) -> Tensor:
        """The first, 3x3 convolution of `conv(mixture_KS, offsets)`, bias included, without merging its kernel.

        sum_p shift_p(sum_h m[h, p] V_h x) = sum_h depthwise(V_h x; m[h]): with fewer than 9 heads that takes fewer
        multiply-adds than the merged kernel.
        """
        heads, head_dim, _ = self.v_KDC.shape
        values_BHWI = F.linear(map_BCHW.permute(0, 2, 3, 1), self.v_KDC.flatten(0, 1))
        taps_IHW = ordered(mixture_KS, offsets)[:, None].expand(heads, head_dim, 9).reshape(-1, 1, 3, 3)
        mixed_BIHW = F.conv2d(values_BHWI.permute(0, 3, 1, 2), taps_IHW, padding=1, groups=heads * head_dim)
        by_head = mixed_BIHW.permute(0, 2, 3, 1).reshape(*values_BHWI.shape[:3], heads, head_dim)
        return (by_head.sum(3) + self.summed(mixture_KS)[0]).permute(0, 3, 1, 2)


def ordered(mixture_KS: Tensor, offsets: Offsets) -> Tensor:
    """The nine columns of a mixture in row-major order of the kernel; a single column stays."""
    if mixture_KS.shape[1] == 1 or offsets == "rows":
        return mixture_KS
    columns = mixture_KS.unbind(1)  # of K numbers each: no gather on weights, no index on a device
    return torch.stack([columns[OFFSETS[offsets].index((p // 3, p % 3))] for p in range(9)], 1)


class Kernels:
    """reduce_DCHW * x + reduce_bias_D, (norm, activation,) then expand_OD and expand_bias_O."""

    def __init__(self, reduce_DCHW: Tensor, reduce_bias_D: Tensor, expand_OD: Tensor, expand_bias_O: Tensor) -> None:
        self.reduce_DCHW, self.reduce_bias_D = reduce_DCHW, reduce_bias_D
        self.expand_OD, self.expand_bias_O = expand_OD, expand_bias_O

    def state(self) -> dict[str, Tensor]:
        """As parameters of a Conv mixer."""
        return {
            "reduce.weight": self.reduce_DCHW.contiguous(),
            "reduce.bias": self.reduce_bias_D,
            "expand.weight": self.expand_OD[:, :, None, None],
            "expand.bias": self.expand_bias_O,
        }
