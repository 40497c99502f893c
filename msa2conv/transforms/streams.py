"""Whether tokens can be merged through the network: tried out, never believed by name.

It takes one sequence of pre-norm blocks, an attention and an FFN each, that can all run on fewer tokens, and two
residual lines, x + after(module(before(x))), that compute what every block does.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..observation import Observation, argument_names, observe, tensors_of
from ..ops import Sizes
from ..sites import AttentionSite, FFNSite, Site, StreamSite
from ..stream import Drop, Line, Stream
from .apply import replace_submodule
from .mergeable import same

Step = tuple[str, dict[str, Any]]  # a child of a block, and the arguments that it was called with besides its first


def find_stream(model: nn.Module, sites: Sequence[Site], seen: Observation) -> StreamSite | str:
    """The sequence of blocks whose tokens can be merged in between, or why there is none.

    Args:
        model: float32, in eval mode; as it was afterwards.
        sites: those of the model, with how the tokens of each can be merged.
        seen: what one forward pass showed.
    """
    modules = dict(model.named_modules())
    path = next((_sequence(site.path, modules) for site in sites if isinstance(site, AttentionSite)), None)
    if path is None:
        return "its attentions lie in no Sequential and no ModuleList"
    blocks = modules[path]
    inside = [site for site in sites if site.path.startswith(f"{path}.")]
    pairs = [[site for site in inside if site.path.startswith(f"{path}.{name}.")] for name in blocks._modules]
    found: list[tuple[str, AttentionSite, FFNSite]] = []
    for name, pair in zip(blocks._modules, pairs, strict=True):
        if len(pair) != 2 or not isinstance(pair[0], AttentionSite) or not isinstance(pair[1], FFNSite):
            return f"{path}.{name} is not one attention and then one FFN"
        found.append((name, pair[0], pair[1]))
    unable = next((site for site in inside if site.merging is None), None)
    if unable is not None:
        return f"{unable.path} cannot run on merged tokens"
    if len({_tokens(site) for site in inside}) > 1 or len({_sizes(attention) for _, attention, _ in found}) > 1:
        return f"the sites in {path} take their tokens differently"
    lines = None
    for name, attention, ffn in found:
        root = f"{path}.{name}"
        own = _lines(modules[root], (attention.path[len(root) + 1 :], ffn.path[len(root) + 1 :]), seen, root)
        if own is None or (lines is not None and own != lines):
            return f"{root} is not x + attention(norm(x)), then x + ffn(norm(x)), in the same way as the blocks before"
        lines = own
    merging = inside[0].merging
    assert lines is not None and merging is not None
    stream = Stream(
        attention=lines[0], ffn=lines[1], prefix=merging.prefix, groups=merging.groups, count=merging.count,
        sizes=_sizes(found[0][1]),
    )  # fmt: skip
    site = StreamSite(path, tuple((name, attention.path, ffn.path) for name, attention, ffn in found), stream)
    return _runs(model, site, seen) or site


def _sequence(path: str, modules: Mapping[str, nn.Module]) -> str | None:
    """The innermost Sequential or ModuleList around a module."""
    while path:
        path = path.rpartition(".")[0]
        if isinstance(modules[path], (nn.Sequential, nn.ModuleList)):
            return path
    return None


def _sizes(site: AttentionSite) -> Sizes | None:
    return site.merging.sizes if site.merging is not None else None


def _tokens(site: Site) -> tuple[Any, ...]:
    merging = site.merging
    assert merging is not None
    return (merging.arrangement == "b n c", merging.prefix, merging.groups, merging.count)


@torch.no_grad()
def _lines(block: nn.Module, pair: tuple[str, str], seen: Observation, path: str) -> tuple[Line, Line] | None:
    """The two residual lines that compute what a block does, tried on random tokens."""
    call = seen.once(path)
    if call is None or call.x is None or len(call.x) != 3 or call.returned != 1 or call.arguments:
        return None
    x = torch.randn(call.x, generator=torch.Generator().manual_seed(0)).to(seen.inputs)
    try:
        expected, steps = _steps(block, x)
    except Exception:  # it cannot be called with tokens alone
        return None
    names = [name for name, _ in steps]
    attention, ffn = pair
    if not isinstance(expected, Tensor) or names.count(attention) != 1 or names.count(ffn) != 1:
        return None
    at, then = names.index(attention), names.index(ffn)
    best: tuple[float, tuple[Line, Line] | None] = (math.inf, None)
    # What is the identity at rest, dropout above all, belongs to the line that it ends: of equals the latest seam.
    for seam in range(then, at, -1):
        first = Line(before=tuple(names[:at]), module=attention, after=tuple(names[at + 1 : seam]), **_given(steps[at]))
        second = Line(before=tuple(names[seam:then]), module=ffn, after=tuple(names[then + 1 :]), **_given(steps[then]))
        try:
            found = second.run(block, first.run(block, x))
        except Exception:  # a stranger's modules, called in another order, may raise anything
            continue
        if same(found, expected):
            best = min(best, (float((found - expected).abs().max()), (first, second)), key=lambda each: each[0])
    return best[1]


def _steps(block: nn.Module, x: Tensor) -> tuple[Any, list[Step]]:
    steps: list[Step] = []
    handles = []
    for name, child in block.named_children():

        def see(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], name: str = name) -> None:
            named = dict(zip(argument_names(module), args, strict=False)) | dict(kwargs)
            first = next(iter(named), None)
            inner = named.pop(first) if first is not None else None
            steps.append((name, {key: "again" if value is inner else value for key, value in named.items()}))

        handles.append(child.register_forward_pre_hook(see, with_kwargs=True))
    parameters = list(inspect.signature(block.forward).parameters.values())[1:]
    required = [
        each.name for each in parameters if each.default is each.empty and each.kind is each.POSITIONAL_OR_KEYWORD
    ]
    try:
        return block(x, **dict.fromkeys(required)), steps
    finally:
        for handle in handles:
            handle.remove()


def _given(step: Step) -> dict[str, Any]:
    arguments = {name: value for name, value in step[1].items() if value is not None}
    again = tuple(name for name, value in arguments.items() if value == "again")
    return {"again": again, "given": {name: value for name, value in arguments.items() if name not in again}}


def _runs(model: nn.Module, site: StreamSite, seen: Observation) -> str | None:
    """None if the whole network runs with half of the patches behind its first block; else what it does instead."""
    stream, blocks = site.stream, model.get_submodule(site.path)
    drops = [Drop(block=site.blocks[0][0], keep=max(1, stream.count // 2))]
    replace_submodule(model, site.path, site.edit(drops).spec.build(blocks).train(blocks.training))
    try:
        fewer = observe(model, seen.inputs)
    except Exception as error:
        return f"the network does not run with {site.path} merging tokens ({type(error.__cause__ or error).__name__})"
    finally:
        replace_submodule(model, site.path, blocks)
    whole = _alike(fewer.output, seen.output)
    if not whole or not all(_saw(path, count, stream, fewer, seen) for path, count in site.tokens(drops).items()):
        return f"the network does not run through {site.path} once and as a whole"
    return None


def _saw(path: str, count: int, stream: Stream, fewer: Observation, seen: Observation) -> bool:
    """Whether a site ran once, on so many tokens."""
    call, before = fewer.once(path), seen.once(path)
    if call is None or before is None or call.x is None or before.x is None:
        return False
    return math.prod(call.x) * stream.tokens == math.prod(before.x) * count


def _alike(out: Any, expected: Any) -> bool:
    shapes = [[tensor.shape for tensor in tensors_of(each)] for each in (out, expected)]
    return shapes[0] == shapes[1] and (bool(shapes[0]) or type(out) is type(expected))
