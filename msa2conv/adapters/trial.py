"""Trials of what an adapter says about a module, on tensors that were seen to reach it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..observation import tensor_in
from ..ops import Skip
from ..sites import AttentionSite, Projections
from ..transforms.apply import replace_submodule

Given = tuple[tuple[Any, ...], dict[str, Any]]  # arguments of one call
_CLOSE = 1e-3  # of the output's largest value
_SHORTCUT = 0.5  # cosine
FAR = 0.2  # of a side: tokens that lie elsewhere


def runner(module: nn.Module, given: Given) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """(the tokens of a call, the module as a function of them alone)."""
    args, kwargs = given
    x = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))

    def run(value: Tensor) -> Tensor:
        out = tensor_in(
            module(
                *(value if each is x else each for each in args),
                **{name: value if each is x else each for name, each in kwargs.items()},
            )
        )
        assert out is not None
        return out

    return x, run


@torch.no_grad()
def has_shortcut(module: nn.Module, given: Given, positions: tuple[int, ...]) -> bool:
    """Whether a change of one position comes out there much as it went in.

    Args:
        module: maps tokens to tokens.
        given: arguments of one call.
        positions: dimensions of the tokens that hold positions.
    """
    x, run = runner(module, given)
    at = tuple(x.shape[axis] // 2 if axis in positions else slice(None) for axis in range(x.ndim))
    change = torch.zeros_like(x)
    change[at] = torch.randn(x[at].shape, generator=torch.Generator().manual_seed(0)).to(x) * 0.1 * x.std()
    heard = run(x + change) - run(x)
    return float(torch.cosine_similarity(heard[at].flatten(), change[at].flatten(), 0)) > _SHORTCUT


@torch.no_grad()
def projections_hold(module: nn.Module, named: Projections, given: Given) -> bool:
    """Whether W_v and W_o are where they are said to be, by heads, with nothing between the tokens and W_v.

    Without W_v the output is constant; without W_o it is the bias; a head is silenced alike by its rows of W_v and its
    columns of W_o; and with every other weight at zero (equal scores) the output is affine in the tokens.
    """
    x, run = runner(module, given)
    scale = float(run(x).abs().max())

    def with_zeros(*places: tuple[str, slice]) -> Tensor:
        probe = copy.deepcopy(module)
        for place, part in places:
            rows = named.v if place == "v" else named.out
            weight, bias = rows.read(probe)
            if place == "v":
                weight[part] = 0
                if bias is not None:
                    bias[part] = 0
            else:
                weight[:, part] = 0
        return runner(probe, given)[1](x)

    def same(one: Tensor, other: Tensor) -> bool:
        return float((one - other).abs().max()) <= _CLOSE * scale

    everything, head = slice(None), slice(0, named.head_dim)
    silent, bias = with_zeros(("out", everything)), named.out.read(module)[1]
    no_values = with_zeros(("v", everything))
    return (
        same(silent, torch.zeros_like(silent) if bias is None else bias.expand_as(silent))
        and same(no_values, silent)
        and same(with_zeros(("v", head)), with_zeros(("out", head)))
        and not same(with_zeros(("v", head)), run(x))
        and _is_affine(module, named, given, scale)
    )


def _is_affine(module: nn.Module, named: Projections, given: Given, scale: float) -> bool:
    probe = copy.deepcopy(module)
    kept = [
        (weight, weight.clone()) for rows in (named.v, named.out) for weight in rows.read(probe) if weight is not None
    ]
    for layer in probe.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d, nn.MultiheadAttention)):
            for parameter in layer.parameters(recurse=False):
                parameter.zero_()
    for weight, value in kept:
        weight.copy_(value)
    x, run = runner(probe, given)
    at_zero = run(torch.zeros_like(x))
    once, twice = run(x) - at_zero, run(2 * x) - at_zero
    return float((twice - 2 * once).abs().max()) <= _CLOSE * max(scale, float(twice.abs().max()))


def silenced(model: nn.Module, sites: Iterable[AttentionSite]) -> nn.Module:
    """A copy whose attentions at these sites add nothing."""
    probe = copy.deepcopy(model)
    for site in sites:
        replace_submodule(probe, site.path, Skip().build(site.io))
    return probe


@torch.no_grad()
def displaced(model: nn.Module, sites: Iterable[AttentionSite], image: Tensor) -> dict[str, float]:
    """How far tokens lie from where their Layout says, at most: {site path: share of a side}.

    With every attention silenced what is left is local: a change of the image is heard by the tokens at its place.

    Args:
        model: a working copy.
        sites: all of its attentions.
        image: [1, C, H, W].
    """
    sites = tuple(sites)
    probe, heard = silenced(model, sites).double(), dict[str, Tensor]()
    for site in sites:

        def listen(_mixer: nn.Module, args: Any, kwargs: Any, site: AttentionSite = site) -> None:
            heard[site.path] = site.layout.to_map(args[0] if args else kwargs[site.io.x])[1][0]

        probe.get_submodule(site.path).register_forward_pre_hook(listen, with_kwargs=True)
    image = image.double()
    probe(image)
    before, worst = dict(heard), dict.fromkeys(heard, 0.0)
    for place in ((0.25, 0.25), (0.25, 0.75), (0.75, 0.25), (0.75, 0.75)):
        changed = image.clone()
        rows, columns = (
            slice(int(side * at) - max(2, side // 32), int(side * at) + max(2, side // 32))
            for side, at in zip(image.shape[-2:], place, strict=True)
        )
        changed[:, :, rows, columns] += 1
        probe(changed)
        for path, map_CHW in heard.items():
            change_HW = (map_CHW - before[path]).square().sum(0)
            for axis, at in enumerate(place):
                share = change_HW.sum(1 - axis)
                if share.sum() > 0 and len(share) > 4:  # a convolution before it hears all of fewer
                    middles = (torch.arange(len(share), device=share.device) + 0.5) / len(share)
                    worst[path] = max(worst[path], abs(float((middles * share).sum() / share.sum()) - at))
    return worst


__all__ = ["FAR", "displaced", "has_shortcut", "projections_hold", "runner", "silenced"]
