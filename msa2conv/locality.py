"""How local attention heads are: the part of their attention that stays where a convolution would look."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .layouts import Layout
from .report.figures import Locality
from .sites import AttentionSite

IMAGES = 8
_LONGEST = 4096  # tokens; the weights of a longer sequence would fill gigabytes
_SOFTMAX = (torch.softmax, F.softmax, Tensor.softmax)


@torch.no_grad()
def head_locality(model: nn.Module, sites: Iterable[AttentionSite], images: Tensor) -> list[Locality]:
    """Which heads are convolutional already: the attention that stays within 3 x 3 patches around the query.

    Weights are caught where they arise, in `softmax` or in fused attention, so it does not matter how a backbone
    computes them (Cordonnier et al., "On the relationship between self-attention and convolutional layers", ICLR 2020,
    ask the same of attention centres).

    Args:
        model: in eval mode; not touched.
        sites: its attentions.
        images: [n, C, H, W], of which the first 8 are looked at.

    Returns:
        One entry for every attention whose weights are between its own tokens; others (pooled keys, linear attention,
        more than 4096 tokens) are left out.
    """
    device = next(model.parameters()).device
    caught: dict[str, list[Tensor]] = {}
    found = {site.path: near for site in sites if (near := _near(site.layout)) is not None}
    heads = {site.path: site.heads for site in sites}
    with ExitStack() as stack:
        watch = stack.enter_context(_Watch(caught))
        for path in found:
            module = model.get_submodule(path)
            stack.enter_context(module.register_forward_pre_hook(watch.enter))
            stack.enter_context(module.register_forward_hook(watch.leave(path, found[path], heads[path])))
        for image in images[:IMAGES]:
            model(image[None].to(device))
    return [
        Locality(path=path, near=torch.stack(values).mean(0).tolist(), chance=_share(found[path], None).item())
        for path, values in caught.items()
    ]


def _near(layout: Layout) -> Tensor | None:
    """[windows, N, N]: 1 where a key lies within one patch of a query, -1 where it or the query is no patch."""
    height, width = layout.grid
    rows, columns = torch.meshgrid(torch.arange(height) + 1, torch.arange(width) + 1, indexing="ij")
    places = layout.from_map(torch.zeros(1, layout.prefix, 2), torch.stack((rows, columns))[None].float())
    places = layout.batch_first(places) if layout.prefix else places.movedim(layout.channels, -1)
    tokens = places if places.ndim == 3 else places.flatten(0 if places.ndim == 2 else 1, -2)
    if tokens.shape[-2] > _LONGEST:
        return None
    apart = (tokens[:, :, None] - tokens[:, None]).abs().amax(-1)
    real = (tokens > 0).all(-1)  # prefix tokens and padding lie at 0
    return torch.where(real[:, :, None] & real[:, None], (apart <= 1).float(), -1.0)


def _share(near: Tensor, weights: Tensor | None) -> Tensor:
    """Of the attention that patches pay (of equal attention to all without weights), the part that stays near."""
    real = (near.diagonal(dim1=-2, dim2=-1) >= 0).float()
    close = (near > 0).float()
    if weights is None:
        keys = (near >= 0).sum(-1).clamp_min(1)
        return (close.sum(-1) / keys * real).sum() / real.sum()
    paid = (weights * close[:, None]).sum(-1)  # windows, heads, queries
    return (paid * real[:, None]).sum((0, 2)) / real.sum()


class _Watch(TorchFunctionMode):
    """Catches attention weights inside the sites."""

    def __init__(self, caught: dict[str, list[Tensor]]) -> None:
        super().__init__()
        self.caught, self.inside, self.weights = caught, False, list[Any]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if self.inside and func is F.scaled_dot_product_attention:
            self.weights.append(_fused_weights(*args, **kwargs))
        elif self.inside and func is F.multi_head_attention_forward:  # hides what it calls
            self.weights.append(func(*args, **{**kwargs, "need_weights": True, "average_attn_weights": False})[1])
        elif self.inside and func in _SOFTMAX and isinstance(out, Tensor) and out.ndim >= 3:
            self.weights.append(out)
        return out

    def enter(self, module: nn.Module, args: Any) -> None:
        self.inside = True
        self.weights.clear()

    def leave(self, path: str, near: Tensor, heads: int) -> Any:
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            self.inside = False
            windows, tokens, _ = near.shape
            for weights in self.weights[-1:]:
                if weights.shape[-2:] == (tokens, tokens) and weights.numel() == windows * heads * tokens**2:
                    by_head = weights.float().reshape(windows, heads, tokens, tokens)
                    self.caught.setdefault(path, []).append(_share(near.to(weights.device), by_head).cpu())
            self.weights.clear()

        return hook


def _fused_weights(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    **_: Any,
) -> Tensor:
    """softmax(scale q k^T + mask), which fused attention does not return."""
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    return scores.softmax(-1)


__all__ = ["head_locality"]
