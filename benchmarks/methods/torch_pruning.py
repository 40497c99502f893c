"""torch-pruning (Fang et al., CVPR 2023; isomorphic: ECCV 2024) as its own examples use it on timm's ViT and Swin.

Head dimensions (or whole heads), hidden units and, unless `inner`, the width of the residual stream. The ratio is
bisected until the budget is met, and where steps are coarse, FFNs get units back until it is used to 1 %. The
temperature of the softmax stays that of the parent (folded into the queries), which pruning heads' dimensions by the
examples would change; tested against a parent whose pruned dimensions are silenced.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.layers import Attention, Mlp
from timm.models.swin_transformer import PatchMerging, WindowAttention
from torch import Tensor, nn

from msa2conv import count_flops
from msa2conv.search.measure import first_tensor
from msa2conv.search.solve import infeasible

from .base import Context

_MOST = 0.95  # of anything, so that nothing is pruned away whole


@dataclass(frozen=True)
class TorchPruning:
    """Args:
    name: in tables.
    importance: what decides.
    isomorphic: one ranking of each kind of group over all blocks; else the same share of every layer.
    heads: whole heads go instead of dimensions of all of them.
    inner: leave the residual stream as wide as it is.
    """

    name: str
    importance: Literal["magnitude", "taylor", "random"]
    isomorphic: bool = False
    heads: bool = False
    inner: bool = False
    keeps_grid: bool = True

    def shrink(self, parent: nn.Module, budget: int, context: Context) -> nn.Module:
        gradients = _gradients(parent, *context.calibration()) if self.importance == "taylor" else {}

        def pruned(ratio: float, of_ffns: float | None = None) -> tuple[nn.Module, int]:
            torch.manual_seed(context.seed)
            model = self.pruned(parent, context.example, ratio, ratio if of_ffns is None else of_ffns, gradients)
            return model, count_flops(model, context.example)

        model, flops, ratio = _least(pruned, budget)
        if flops < 0.995 * budget:
            model, flops, ffns = _least(lambda ffns: pruned(ratio, ffns), budget, most=ratio)
            context.note(ffn_ratio=ffns)
        context.note(ratio=ratio)
        return model

    def pruned(
        self, parent: nn.Module, example: Tensor, ratio: float, of_ffns: float, gradients: dict[str, Tensor]
    ) -> nn.Module:
        """A pruned copy of the parent.

        Args:
            parent: a ViT or Swin of timm's.
            example: one image.
            ratio, of_ffns: shares to prune, of everything and of hidden units.
            gradients: {parameter: of the loss}, for Taylor scores.
        """
        import torch_pruning as tp

        model = copy.deepcopy(parent).requires_grad_(True)
        for name, parameter in model.named_parameters():
            parameter.grad = gradients[name].clone() if gradients else None
        attentions = [module for module in model.modules() if isinstance(module, (Attention, WindowAttention))]
        ffns = tuple(module.fc1 for module in model.modules() if isinstance(module, Mlp))
        before = {module: module.qkv.out_features // (3 * module.num_heads) for module in attentions}
        scores = {
            "magnitude": lambda: tp.importance.GroupMagnitudeImportance(p=2),
            "taylor": tp.importance.GroupTaylorImportance,
            "random": tp.importance.RandomImportance,
        }
        with warnings.catch_warnings(), torch.enable_grad():
            warnings.simplefilter("ignore")
            pruner = tp.pruner.BasePruner(
                model, example, scores[self.importance](), global_pruning=self.isomorphic, isomorphic=self.isomorphic,
                pruning_ratio=ratio, pruning_ratio_dict={ffns if self.isomorphic else layer: of_ffns for layer in ffns},
                max_pruning_ratio=_MOST, ignored_layers=self._ignored(model, attentions),
                num_heads={module.qkv: module.num_heads for module in attentions}, prune_head_dims=not self.heads,
                prune_num_heads=self.heads,
                head_pruning_ratio_dict=_fewer_heads(attentions, ratio) if self.heads else None,
                in_channel_groups={}, out_channel_groups={}, customized_pruners={PatchMerging: _patch_merging(tp)},
            )  # fmt: skip
            for group in pruner.step(interactive=True):
                group.prune()
        for module in attentions:
            _restore(module, pruner.num_heads[module.qkv], before[module])
        for parameter in model.parameters():
            parameter.grad = None
        return model.requires_grad_(False).eval()

    def _ignored(self, model: Any, attentions: list[Any]) -> list[Any]:
        ignored: list[Any] = [model.get_classifier()]
        ignored += [a.relative_position_bias_table for a in attentions if isinstance(a, WindowAttention)]
        if self.inner:
            ignored += [model.patch_embed.proj, *(module.proj for module in attentions)]
            ignored += [module.fc2 for module in model.modules() if isinstance(module, Mlp)]
            ignored += [module for module in model.modules() if isinstance(module, PatchMerging)]
        return ignored


def _fewer_heads(attentions: list[Any], ratio: float) -> dict[Any, float]:
    """At least one head of each stays."""
    return {module.qkv: min(ratio, 1 - 1 / module.num_heads) for module in attentions}


@torch.no_grad()
def _restore(attention: Any, heads: int, head_dim: int) -> None:
    """Plain attributes follow the weights; q k^T keeps its temperature, which timm derives from the head dimension."""
    now = attention.qkv.out_features // (3 * heads)
    queries = slice(0, heads * now)
    attention.qkv.weight[queries] *= (now / head_dim) ** 0.5
    if attention.qkv.bias is not None:
        attention.qkv.bias[queries] *= (now / head_dim) ** 0.5
    attention.num_heads, attention.scale = heads, now**-0.5
    if isinstance(attention, Attention):
        attention.head_dim, attention.attn_dim = now, heads * now


def _gradients(parent: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Of the mean cross entropy, as torch-pruning's examples accumulate them."""
    model = copy.deepcopy(parent).requires_grad_(True)
    device = next(model.parameters()).device
    with torch.enable_grad():
        for batch, answers in zip(images.split(64), labels.split(64), strict=True):
            F.cross_entropy(first_tensor(model(batch.to(device))), answers.to(device)).backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}


def _least(
    pruned: Callable[[float], tuple[nn.Module, int]], budget: int, most: float = _MOST
) -> tuple[nn.Module, int, float]:
    """The smallest ratio that keeps the budget, with its model and FLOPs."""
    low = 0.0
    # A ratio that would take a head's last dimension leaves the attention as it is: there less prunes more.
    tried = []
    for high in (most, *(ratio for ratio in (0.9, 0.85, 0.8) if ratio < most)):
        best = (*pruned(high), high)
        tried.append(best[1])
        if best[1] <= budget:
            break
    else:
        raise infeasible(budget, min(tried))
    for _ in range(12):
        if best[1] >= 0.995 * budget:
            break
        ratio = (low + high) / 2
        model, flops = pruned(ratio)
        if flops <= budget:
            high, best = ratio, (model, flops, ratio)
        else:
            low = ratio
    return best


def _patch_merging(tp: Any) -> Any:
    """How Swin's downsampling hangs on the channels in front of it: its Linear sees each of them four times."""

    class Pruner(tp.pruner.function.BasePruningFunc):  # type: ignore[misc]
        def prune_out_channels(self, layer: Any, idxs: list[int]) -> Any:
            tp.prune_linear_out_channels(layer.reduction, idxs)
            return layer

        def prune_in_channels(self, layer: Any, idxs: list[int]) -> Any:
            width = self.get_in_channels(layer)
            every = [index + part * width for part in range(4) for index in idxs]
            tp.prune_linear_in_channels(layer.reduction, every)
            tp.prune_layernorm_out_channels(layer.norm, every)
            return layer

        def get_out_channels(self, layer: Any) -> int:
            return int(layer.reduction.out_features)

        def get_in_channels(self, layer: Any) -> int:
            return int(layer.norm.normalized_shape[0]) // 4

    return Pruner()


METHODS = [
    TorchPruning("tp-magnitude", "magnitude"),
    TorchPruning("tp-taylor", "taylor"),
    TorchPruning("tp-isomorphic", "taylor", isomorphic=True),
    TorchPruning("tp-random", "random"),
    TorchPruning("tp-taylor-heads", "taylor", heads=True),
    TorchPruning("tp-taylor-inner", "taylor", inner=True),
    TorchPruning("tp-isomorphic-inner", "taylor", isomorphic=True, inner=True),
]
