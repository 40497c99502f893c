"""Where tokens can be merged: tried out on random tokens, never believed by name.

An FFN qualifies if a token's answer depends on that token alone; an attention if it treats all patches alike wherever
they lie, and takes fewer of them. Relative positions, rotary embeddings and windows of a fixed size fail that.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..observation import SAME, Call, Given, Observation, argument_names, tensor_in
from ..ops import IO, Arrangement, Sizes, arranged, as_sequence
from ..sites import AttentionSite, FFNSite, Merging, Site

_CLOSE = 1e-4  # of the largest output
_MOST = 256  # patches that are compared with each other
_FEWEST = 4
_MASKS = ("attn_mask", "attention_mask", "key_padding_mask", "mask")  # what an additive mask may be called


def _is_same(value: Any) -> bool:
    return isinstance(value, Given) and value == SAME  # a copy of it, too


class Called(nn.Module):
    """A module as a function of its tokens alone.

    Args:
        module: the module.
        arguments: what it is called with besides; `SAME` stands for the tokens.
    """

    def __init__(self, module: nn.Module, arguments: Mapping[str, Any]) -> None:
        super().__init__()
        self.module, self.arguments = module, dict(arguments)

    def forward(self, x: Tensor, **more: Any) -> Tensor:
        given = {name: x if _is_same(value) else value for name, value in self.arguments.items()}
        out = tensor_in(self.module(x, **given | more))
        assert out is not None
        return out


def with_merging(model: nn.Module, sites: Iterable[Site], seen: Observation) -> tuple[tuple[Site, ...], dict[str, str]]:
    """The sites, those that can run on merged tokens saying how; and {path of another: why not}.

    Args:
        model: float32, in eval mode.
        sites: its sites.
        seen: what one forward pass showed.
    """
    sites, known, refused = tuple(sites), dict[Any, Merging | str](), dict[str, str]()
    prefixes = {site.block: site.layout.prefix for site in sites if isinstance(site, AttentionSite)}
    found: list[Site] = []
    for site in sites:
        module, call = model.get_submodule(site.path), seen.once(site.path)
        assert call is not None and call.x is not None
        holds_others = any(other.path.startswith(f"{site.path}.") for other in sites)
        key = (repr(module), shapes_of(module), repr(call), holds_others, site.layout, prefixes.get(site.block))
        if key not in known:
            reason = "it is a block around other sites" if holds_others else None
            known[key] = reason or _merging(site, module, call, prefixes.get(site.block, 0))
        answer = known[key]
        if isinstance(answer, str):
            refused[site.path] = answer
        found.append(replace(site, merging=None if isinstance(answer, str) else answer))
    return tuple(found), refused


def shapes_of(module: nn.Module) -> str:
    """Of all parameters and buffers, as a key: modules that print alike may differ in them."""
    return repr([(name, tuple(value.shape)) for name, value in module.state_dict().items()])


def _merging(site: Site, module: nn.Module, call: Call, prefix_of_block: int) -> Merging | str:
    given = [name for name, value in call.arguments.items() if isinstance(value, Given) and not _is_same(value)]
    if given:
        return f"it is called with {given[0]!r}, which speaks of places"
    arrangement = _arrangement(site, call.x or ())
    if arrangement is None:
        return f"its tokens {call.x} are no sequence and no map"
    shape = list(call.x or ())
    unseen = isinstance(site, FFNSite) and arrangement == "n b c"  # an FFN's Layout knows no such prefix
    prefix = prefix_of_block if unseen else site.layout.prefix
    patches = math.prod(size for size, axis in zip(shape, arrangement.split(), strict=True) if axis in "nhw") - prefix
    count = _group(patches)
    if count is None:
        return f"its {patches} patches cannot be cut into groups of {_FEWEST} to {_MOST}"
    merging = Merging(arrangement, prefix, patches // count, count, _io(site, module, call))
    try:
        with torch.no_grad():
            return _tried(site, merging, Called(module, call.arguments), shape)
    except Exception as error:  # a stranger's module may raise anything
        return f"it does not run on fewer tokens ({type(error).__name__})"


def _arrangement(site: Site, x: tuple[int, ...]) -> Arrangement | None:
    if len(x) == 4:
        return "b c h w" if site.layout.channels == 1 else "b h w c" if site.layout.channels == 3 else None
    if len(x) != 3:
        return None
    if isinstance(site, AttentionSite):
        return "n b c" if site.layout.pattern == "(h w) b c" else "b n c"
    return "n b c" if x[1] == 1 < x[0] else "b n c"


def _group(patches: int) -> int | None:
    """How many patches are compared with each other: all of them, or the largest part of equal size."""
    if patches < _FEWEST:
        return None
    if patches <= _MOST:
        return patches
    best = next(count for count in range(_MOST, 0, -1) if patches % count == 0)
    return best if best >= _MOST // 4 else patches if patches <= 4 * _MOST else None


def _io(site: Site, module: nn.Module, call: Call) -> IO:
    """The host's calling convention, every positional argument by its name."""
    x, *names = argument_names(module)
    returns = site.io.returns if isinstance(site, AttentionSite) else "tensor"
    return IO(returns="tuple" if returns == "tuple" else "tensor", x=x, positional=tuple(names))


def _tried(site: Site, merging: Merging, call: Called, shape: list[int]) -> Merging | str:
    generator = torch.Generator().manual_seed(0)
    like = next(call.module.parameters())
    total, keep = merging.tokens(merging.count), max(2, merging.count // 2)
    sequences = shape[1 if merging.arrangement == "n b c" else 0]
    channels = shape[1] if merging.arrangement == "b c h w" else shape[-1]
    tokens_BNC = torch.randn(sequences, total, channels, generator=generator).to(like)
    few = merging.prefix + merging.groups * keep
    chosen = _shuffled(merging.prefix, total, generator)[:few]
    few_BNC = tokens_BNC[:, chosen]

    def run(tokens: Tensor, **more: Any) -> Tensor:
        return as_sequence(call(arranged(tokens, merging.arrangement), **more), merging.arrangement)

    whole_BNC = as_sequence(call(arranged(tokens_BNC, merging.arrangement, torch.Size(shape))), merging.arrangement)
    if isinstance(site, FFNSite):
        if same(run(few_BNC), whole_BNC[:, chosen]):
            return merging
        return "a token's answer depends on other tokens or on its place"
    if not same(run(tokens_BNC), whole_BNC):
        return "its tokens are several sequences"
    order = _shuffled(merging.prefix, few, generator)
    plain = run(few_BNC)
    if not same(run(few_BNC[:, order]), plain[:, order]):
        return "it treats patches differently by their places"
    for sizes in _told(call.module):
        if sizes.argument not in call.arguments:
            try:
                repeated = run(torch.cat((few_BNC, few_BNC[:, -1:]), 1))[:, :few]
                size_BN = few_BNC.new_ones(sequences, few)
                size_BN[:, -1] = 2
                told = run(few_BNC, **{sizes.argument: sizes.mask(size_BN)})
            except Exception:  # another form, or no mask at all
                continue
            if same(told, repeated) and not same(plain, repeated):
                return replace(merging, sizes=sizes)
    return merging


def _told(module: nn.Module) -> Iterator[Sizes]:
    for name in argument_names(module):
        if name in _MASKS:
            yield Sizes(argument=name, shape="b 1 1 n")
            yield Sizes(argument=name, shape="b n")


def _shuffled(prefix: int, tokens: int, generator: torch.Generator) -> Tensor:
    """The prefix tokens, then the patches in any order."""
    return torch.cat((torch.arange(prefix), prefix + torch.randperm(tokens - prefix, generator=generator)))


def same(found: Tensor, expected: Tensor) -> bool:
    if found.shape != expected.shape or not torch.isfinite(found).all():
        return False
    return float((found - expected).abs().max()) <= _CLOSE * max(1e-6, float(expected.abs().max()))
