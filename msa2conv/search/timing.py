"""Time what may be chosen, module by module.

The modules of the original are timed where they stand (on a GPU, which runs on while modules return, by themselves),
options by themselves, behind a module that usually is in front of them, on inputs caught in a forward pass. All that
is kept are ratios of calls that took turns: of a site's module to the network, and of its options to the module; so
that a machine that is slower at one time than at another does not matter. Sites of one geometry share their times, and
of options that differ in one size only (hidden units, for example) a few are measured and the others interpolated in
their FLOPs.

Shape suffixes: B batch, N tokens, C channels.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..options import Option
from ..plan import Edit, Replace, Slice, Wrap
from ..settings import Setting, on_tokens
from ..sites import AttentionSite, Claims, Site, StreamSite
from ..stopwatch import inside, interleaved
from ..stream import Drop, Line, Stream
from ..transforms.apply import replace_submodule
from ..transforms.lift import edited
from .timetable import SiteTimes, Timetable, steps

_CURVE = 7  # so many options that differ in one size only are all measured; of more, `_POINTS`
_POINTS = 5
_LONG, _MOST = 0.5, 40  # seconds that the network should be sampled for, if that takes no more rounds than so many


def measure_times(
    model: nn.Module,
    claims: Claims,
    options: Mapping[str, Sequence[Option]],
    settings: Sequence[Setting],
    inputs: Tensor,
    *,
    table: Timetable,
    rounds: int = 9,
    progress: bool = True,
) -> SiteTimes:
    """Time what may be chosen.

    In a quick network a module takes microseconds, and is the more easily disturbed: it is sampled more often.

    Args:
        model: the original as it will run: in eval mode, on the device, in its dtype.
        claims: its sites.
        options, settings: what may be chosen.
        inputs: a batch of the size that counts, on the device.
        table: what is known already.
        rounds: samples of each module, at least.
        progress: show bars.
    """
    sites = {site.path: site for site in claims.sites if site.path in options}
    merging = claims.stream if any(setting.option for setting in settings) else None
    blocks = [] if merging is None else [f"{merging.path}.{name}" for name, _, _ in merging.blocks]
    caught = _catch(model, ["", *sites, *blocks], inputs)
    bench = _Bench(table, inputs.device, rounds, progress, [str(inputs.dtype), *map(str, inputs.shape)])
    base = bench.seconds(partial(_called, model, "", caught[""]))
    bench.rounds = max(rounds, min(_MOST, math.ceil(_LONG / base)))
    shares = bench.shares(model, caught, inputs)
    hosts = {path: base * shares[caught[path].key] for path in sites}
    alike: dict[str, list[str]] = {}
    for path in sites:
        alike.setdefault(caught[path].key, []).append(path)
    found: dict[tuple[str, str, int | None], float] = {}
    for paths in alike.values():
        group = [
            (path, option)
            for path in paths
            for tokens in {None, *(setting.tokens.get(path) for setting in settings)}
            for option in on_tokens(options[path], tokens)
        ]
        ahead = _in_front(model, sites, caught, paths[0])
        ratios = _options(bench, model, claims, sites, caught, paths[0], group, ahead)
        for path, option in group:
            found[path, option.name, option.tokens] = hosts[path] * ratios[_signature(sites[path], option)]
    kinds = {(path, option.name): _kind(sites[path], option) for path in sites for option in options[path]}
    if merging is None:
        return SiteTimes(base, hosts, found, kinds, table=bench.table)
    beside: dict[str, float] = {}
    for block, (_, *inner) in zip(blocks, merging.blocks, strict=True):  # half of the rest on the account of each
        rest = base * shares[caught[block].key] - sum(hosts[path] for path in inner)
        beside |= dict.fromkeys(inner, max(0.0, rest) / 2)
    first = merging.blocks[0][1]
    drops = _drops(bench, model, merging, settings, caught[first], _in_front(model, sites, caught, first))
    drops = {pair: hosts[first] * ratio for pair, ratio in drops.items()}
    lines = _lines(bench, model, merging, settings, caught[blocks[0]], partial(_called, model, first, caught[first]))
    return SiteTimes(base, hosts, found, kinds, beside, lines, drops, table=bench.table)


@dataclass(frozen=True)
class _Caught:
    """How a module was called; `key` is its geometry."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    key: str


def _catch(model: nn.Module, paths: Iterable[str], inputs: Tensor) -> dict[str, _Caught]:
    found: dict[str, _Caught] = {}
    kept: dict[str, _Caught] = {}  # one set of tensors for every geometry

    def keep(path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        heads = [value for name, value in sorted(vars(module).items()) if isinstance(value, int) and name != "training"]
        shapes = [(name, _shape(value)) for name, value in (*enumerate(args), *sorted(kwargs.items()))]
        key = json.dumps([repr(module), heads, str(shapes)])
        found[path] = kept.setdefault(key, _Caught(args, kwargs, key))

    handles = [
        model.get_submodule(path).register_forward_pre_hook(
            lambda module, args, kwargs, path=path: keep(path, module, args, kwargs), with_kwargs=True
        )
        for path in dict.fromkeys(paths)
    ]
    try:
        with torch.no_grad():
            model(inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _shape(value: Any) -> Any:
    if isinstance(value, Tensor):
        return tuple(value.shape), str(value.dtype)
    if isinstance(value, (tuple, list)):
        return [_shape(each) for each in value]
    return value if isinstance(value, (bool, int, float, str, type(None))) else type(value).__name__


_AS_IT_IS = json.dumps([None, []])  # the signature of the host
Ready = Callable[[], Callable[[], Any]]  # makes a call ready, once it is known that it is needed


class _Bench:
    """Times calls in turn, unless that was done before."""

    def __init__(self, table: Timetable, device: torch.device, rounds: int, progress: bool, context: list[str]) -> None:
        self.device, self.entries = table.device, dict(table.entries)
        self.where, self.rounds, self.progress, self.context = device, rounds, progress, context

    @property
    def table(self) -> Timetable:
        return Timetable(device=self.device, entries=self.entries)

    def _keys(self, *where: str, names: Iterable[str]) -> dict[str, str]:
        texts = {name: json.dumps([*self.context, *where, name]) for name in names}
        return {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}

    def shares(self, model: nn.Module, caught: Mapping[str, _Caught], inputs: Tensor) -> dict[str, float]:
        """Times of modules over that of the network, {geometry: share}."""
        calls: dict[str, Ready] = {each.key: partial(_called, model, path, each) for path, each in caught.items()}
        whole = caught[""].key
        if self.where.type != "cpu":
            return self.ratios(whole, calls)
        alike: dict[str, list[str]] = {}
        for path, each in caught.items():
            alike.setdefault(each.key, []).append(path)
        keys = self._keys("in the network", whole, names=alike)
        if not self.entries.keys() >= set(keys.values()):
            samples = inside(
                {"": model}, caught, inputs, self.rounds, what="time modules in the network", progress=self.progress
            )
            for geometry, paths in alike.items():
                found = [samples.ratio(f" {path}", " ") for path in paths if f" {path}" in samples.seconds]
                if not found:  # called several times in a forward pass
                    found = [self.ratios(whole, {each: calls[each] for each in (whole, geometry)})[geometry]]
                self.entries[keys[geometry]] = float(np.mean(found))
        return {geometry: self.entries[key] for geometry, key in keys.items()}

    def ratios(
        self, anchor: str, calls: Mapping[str, Ready], where: str = "", ahead: Ready | None = None
    ) -> dict[str, float]:
        """Times of calls over that of one of them, `anchor`."""
        keys = self._keys(where, anchor, names=calls)
        missing = {name: calls[name]() for name, key in keys.items() if key not in self.entries}
        if missing:
            missing[anchor] = calls[anchor]()
            # On a CPU one by one, behind something else: in a network, too, a module finds neither its weights nor its
            # code in a cache. On a GPU in a row, as the kernels of a network follow each other.
            alone = self.where.type == "cpu"
            samples = interleaved(
                missing,
                self.where,
                self.rounds,
                repeated=not alone,
                ahead=ahead() if alone and ahead is not None else None,
                what="time modules",
                progress=self.progress,
            )
            self.entries |= {keys[name]: samples.ratio(name, anchor) for name in missing}
        return {name: self.entries[key] for name, key in keys.items()}

    def seconds(self, call: Ready) -> float:
        """Of one call, now."""
        samples = interleaved({"": call()}, self.where, self.rounds, what="time", progress=self.progress)
        return samples.timing("").seconds


def _called(model: nn.Module, path: str, call: _Caught) -> Callable[[], Any]:
    return partial(model.get_submodule(path), *call.args, **call.kwargs)


def _in_front(model: nn.Module, sites: Mapping[str, Site], caught: Mapping[str, _Caught], first: str) -> Ready | None:
    """The nearest module of another geometry, if there is one: the FFN before an attention, the attention before it."""
    order = list(sites)
    place = order.index(first)
    others = (path for path in (*order[:place][::-1], *order[place:]) if caught[path].key != caught[first].key)
    path = next(others, None)
    return None if path is None else partial(_called, model, path, caught[path])


def _options(
    bench: _Bench,
    model: nn.Module,
    claims: Claims,
    sites: Mapping[str, Site],
    caught: Mapping[str, _Caught],
    first: str,
    group: Sequence[tuple[str, Option]],
    ahead: Ready | None,
) -> dict[str, float]:
    """{signature: time over the host's} of the options of sites of the geometry of the `first`."""
    distinct = {_signature(sites[path], option): (path, option) for path, option in group}
    curves: dict[str, list[str]] = {}
    for signature, (path, option) in distinct.items():
        curves.setdefault(_signature(sites[path], option, sizes=False), []).append(signature)
    picked: list[str] = []
    for signatures in curves.values():
        signatures.sort(key=lambda signature: distinct[signature][1].flops)
        if len(signatures) > _CURVE:
            places = np.linspace(0, len(signatures) - 1, _POINTS).round().astype(int)
            signatures = [signatures[place] for place in places]
        picked += signatures
    calls: dict[str, Ready] = {}
    for signature in picked:
        path, option = distinct[signature]
        calls[signature] = partial(_ready, model, claims, sites[path], caught[path], option)
    calls[_AS_IT_IS] = partial(_called, model, first, caught[first])
    ratios = bench.ratios(_AS_IT_IS, calls, caught[first].key, ahead)
    for signatures in curves.values():
        known = [signature for signature in signatures if signature in ratios]
        flops = [distinct[signature][1].flops for signature in known]
        for signature in signatures:
            if signature not in ratios:
                at = distinct[signature][1].flops
                ratios[signature] = float(np.interp(at, flops, [ratios[each] for each in known]))
    return ratios


def _ready(model: nn.Module, claims: Claims, site: Site, call: _Caught, option: Option) -> Callable[[], Any]:
    """The module that an option leaves at a site, as it is called there."""
    host = model.get_submodule(site.path)
    module = edited(host, site.path, option.edits).to(next(host.parameters()))
    if option.tokens is None:
        return partial(module, *call.args, **call.kwargs)
    assert claims.stream is not None
    stream = claims.stream.stream
    line = stream.attention if isinstance(site, AttentionSite) else stream.ffn
    x = call.args[0][:, : option.tokens].contiguous()
    more: dict[str, Any] = dict(line.given) | dict.fromkeys(line.again, x)
    if stream.sizes is not None and isinstance(site, AttentionSite):
        more[stream.sizes.argument] = stream.sizes.mask(torch.ones_like(x[..., 0]))
    return partial(module, x, **more)


def _signature(site: Site, option: Option, sizes: bool = True) -> str:
    """What the time of an option depends on; without sizes: what it shares with those that differ in these only."""
    return json.dumps([option.tokens, [_edit(site, edit, sizes) for edit in option.edits]])


def _kind(site: Site, option: Option) -> str:
    """What an option does, whatever its sizes; "" if it leaves the module as it is."""
    done = {getattr(getattr(edit, "spec", None), "kind", edit.kind) for edit in option.edits}
    return " ".join([type(site).__name__, *sorted(done)]) if done else ""


def _edit(site: Site, edit: Edit, sizes: bool) -> Any:
    path = edit.path.removeprefix(site.path)
    if isinstance(edit, Replace):
        return ["replace", path, edit.spec.model_dump(mode="json") if sizes else edit.spec.kind]
    if isinstance(edit, Wrap):
        return ["wrap", path, edit.spec.model_dump(mode="json")]
    if isinstance(edit, Slice):
        return ["slice", path, edit.dim, sum(stop - start for start, stop in edit.kept) if sizes else 0]
    return [type(edit).__name__, path, str(getattr(edit, "value", "")) if sizes else 0]


def _drops(
    bench: _Bench,
    model: nn.Module,
    stream: StreamSite,
    settings: Sequence[Setting],
    call: _Caught,
    ahead: Ready | None,
) -> dict[tuple[int, int], float]:
    """Times of merging so many patches into so many, and of restoring the grid, over the first attention's."""
    pairs = {pair for setting in settings if setting.option is not None for pair in steps(setting.option())}
    tokens = call.args[0]
    calls: dict[str, Ready] = {str(pair): partial(_ready_to_drop, stream.stream, *pair, tokens) for pair in pairs}
    calls[_AS_IT_IS] = partial(_called, model, stream.blocks[0][1], call)
    text = f"merging {stream.stream.prefix} {stream.stream.groups} {call.key}"
    ratios = bench.ratios(_AS_IT_IS, calls, text, ahead)
    return {pair: ratios[str(pair)] for pair in pairs}


def _lines(
    bench: _Bench, model: nn.Module, stream: StreamSite, settings: Sequence[Setting], call: _Caught, ahead: Ready
) -> dict[int, float]:
    """{tokens: time of a block's residual lines without their modules, over that on all tokens}."""
    every = stream.stream.tokens
    counts = {count for setting in settings for count in setting.tokens.values()} | {every}
    calls: dict[str, Ready] = {
        str(count): partial(_ready_lines, model, stream, call.args[0], count) for count in counts
    }
    ratios = bench.ratios(str(every), calls, f"residual lines {call.key}", ahead)
    return {count: ratios[str(count)] for count in counts}


def _ready_lines(model: nn.Module, site: StreamSite, x_BNC: Tensor, count: int) -> Callable[[], Any]:
    (name, *_), stream = site.blocks[0], site.stream
    block = copy.deepcopy(model.get_submodule(f"{site.path}.{name}"))
    for line in (stream.attention, stream.ffn):
        replace_submodule(block, line.module, _Nothing())
    x = x_BNC[:, :count].contiguous()
    return lambda: stream.ffn.run(block, stream.attention.run(block, x))


class _Nothing(nn.Module):
    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        return x


def _ready_to_drop(stream: Stream, before: int, after: int, x_BNC: Tensor) -> Callable[[], Any]:
    """A stream of one block that does nothing but merge."""
    nothing = nn.Module()
    nothing.add_module("nothing", nn.Identity())
    line = Line(module="nothing")
    spec = Stream(
        attention=line, ffn=line, prefix=stream.prefix, groups=stream.groups, count=before,
        drops=(Drop(block="0", keep=after),),
    )  # fmt: skip
    x = x_BNC[:, : spec.tokens].contiguous()
    return partial(spec.build(nn.Sequential(OrderedDict([("0", nothing)]))), x)


__all__ = ["measure_times"]
