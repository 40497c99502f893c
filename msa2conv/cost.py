"""What every site costs in multiply-adds: measured once, so that a plan's cost is a sum."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache
from math import prod
from typing import Any

import torch
from torch import nn

from .flops import traced_flops
from .merging import comparisons
from .observation import Observation
from .ops import IO, Attend, Linear, MixerSpec
from .options import Option
from .plan import Edit
from .sites import AttentionSite, FFNSite, Site, StreamSite
from .stream import Drop
from .transforms.apply import apply_edits
from .transforms.lift import lift
from .transforms.mergeable import Called

Samples = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class CostModel:
    """What every site costs, measured once; additive, so a plan's cost is `rest` plus the sum of its options.

    Args:
        base: multiply-adds of the original.
        hosts: {site path: multiply-adds of the attention there, or of all hidden units of the FFN}.
        units: {FFN site path: multiply-adds of one hidden unit}.
        shapes: {site path: shape of its input at batch 1}.
        samples: {site path: ((tokens, multiply-adds of the module there on so many), ...)} of sites that can run on
            fewer tokens: three points of a polynomial of degree two, or two where it is linear.
        beside: {site path: multiply-adds of what stands beside it in its residual line} of sites in a stream.
        heads: {site path: multiply-adds of one head} of attentions that can only lose whole ones.
    """

    base: int
    hosts: dict[str, int]
    units: dict[str, int]
    shapes: dict[str, tuple[int, ...]]
    samples: dict[str, Samples] = field(default_factory=dict)
    beside: dict[str, int] = field(default_factory=dict)
    heads: dict[str, int] = field(default_factory=dict)

    @property
    def rest(self) -> int:
        """Multiply-adds outside all sites."""
        return self.outside(self.hosts)

    def outside(self, paths: Iterable[str]) -> int:
        """Multiply-adds outside these sites."""
        return self.base - sum(self.hosts[path] for path in paths)

    def total(self, choices: Mapping[str, Option]) -> int:
        """Multiply-adds of the network in which these options are chosen, {site path: option}."""
        return self.base + sum(option.flops - self.hosts.get(path, 0) for path, option in choices.items())

    @classmethod
    def measure(
        cls, model: nn.Module, seen: Observation, sites: Iterable[Site], stream: StreamSite | None = None
    ) -> CostModel:
        """Count the model as it is, and with every FFN one unit narrower and one head fewer, for the price of each."""
        sites = tuple(sites)
        counts = traced_flops(lift(model, sites).model, seen.inputs)
        fewer_units = {s.path: s.edits(range(s.hidden - 1)) for s in sites if isinstance(s, FFNSite)}
        able = {site.path: site.head_units for site in sites if isinstance(site, AttentionSite) and site.head_units}
        fewer_heads = {path: each.edits(path, range(each.heads - 1)) for path, each in able.items()}
        saved = _difference(model, seen, sites, counts, {**fewer_units, **fewer_heads})
        units, heads = ({path: saved[path] for path in edits} for edits in (fewer_units, fewer_heads))
        shapes = {}
        for site in sites:
            call = seen.once(site.path)
            assert call is not None and call.x is not None
            shapes[site.path] = call.x
        hosts = {s.path: s.hidden * units[s.path] if isinstance(s, FFNSite) else counts[s.path] for s in sites}
        samples, beside = _samples(model, seen, sites, counts), {} if stream is None else _beside(stream, counts)
        return cls(counts[""], hosts, units, shapes, samples, beside, heads)

    def mixer(self, site: AttentionSite, spec: MixerSpec, tokens: int | None = None) -> int:
        """Multiply-adds of a mixer at a site, on so many tokens (prefix tokens included), or on all."""
        if isinstance(spec, Attend):  # many of them, on many numbers of tokens
            assert site.merging is not None
            every = site.merging.tokens(site.merging.count)
            return self._sequences(site) * spec.flops(every if tokens is None else tokens)
        return _mixer_flops(spec, site.io, self.shapes[site.path])

    def ffn(self, site: FFNSite, kept: int) -> int:
        """Multiply-adds of `kept` hidden units of an FFN."""
        return kept * self.units[site.path]

    def instead(self, site: FFNSite, spec: Linear, tokens: int | None = None) -> int:
        """Multiply-adds of a linear layer in the place of a whole FFN on so many tokens (prefix tokens included), or on
        all; on the account of `hosts`, which does not know what an FFN takes beside its hidden units."""
        assert site.merging is not None
        every = site.merging.tokens(site.merging.count)
        saved = _at(self.samples[site.path], every) - self.hosts[site.path]
        return self._sequences(site) * spec.flops(every if tokens is None else tokens) - saved

    def on(self, site: Site, tokens: int, saved: int = 0) -> int:
        """Multiply-adds of a site whose host sees so many tokens, on the account of `hosts`.

        Args:
            site: one that can run on fewer tokens.
            tokens: how many, prefix tokens included.
            saved: hidden units that an FFN has lost.
        """
        assert site.merging is not None
        samples, all_tokens = self.samples[site.path], site.merging.tokens(site.merging.count)
        found = self.hosts[site.path] + _at(samples, tokens) - _at(samples, all_tokens)
        if saved:
            found -= _whole(Fraction(saved * self.units[site.path] * tokens, all_tokens))
        return found

    def merge(self, site: Site, keep: int) -> int:
        """Multiply-adds of comparing the tokens of a site until `keep` patches of a group are left."""
        assert site.merging is not None
        shape = self.shapes[site.path]
        channels = shape[1] if site.merging.arrangement == "b c h w" else shape[-1]
        return site.merging.spec(keep).flops * channels * self._sequences(site)

    def shortened(self, stream: StreamSite, drops: Iterable[Drop]) -> int:
        """Multiply-adds that merging through the network adds outside all sites: comparisons, and norms on fewer
        tokens (so it may be negative)."""
        drops, spec = tuple(drops), stream.stream
        channels, count, found = self.shapes[stream.blocks[0][1]][-1], spec.count, 0
        for drop in drops:
            found += spec.groups * channels * comparisons(count, drop.keep)
            count = drop.keep
        for path, tokens in stream.fewer(drops).items():
            found -= _whole(Fraction(self.beside[path] * (spec.tokens - tokens), spec.tokens))
        return found

    def _sequences(self, site: Site) -> int:
        """How many there are at batch 1: the windows, where they are folded into the batch."""
        assert site.merging is not None
        return self.shapes[site.path][1 if site.merging.arrangement == "n b c" else 0]


@cache  # blocks are alike
def _mixer_flops(spec: MixerSpec, io: IO, shape: tuple[int, ...]) -> int:
    return 0 if spec.kind in ("skip", "identity") else traced_flops(spec.build(io).eval(), torch.zeros(shape))[""]


def _difference(
    model: nn.Module,
    seen: Observation,
    sites: Iterable[Site],
    counts: Mapping[str, int],
    edits: Mapping[str, Iterable[Edit]],
) -> dict[str, int]:
    """{path: what the edits of that site, all made at once, take away from it}."""
    if not edits:
        return {}
    narrow = copy.deepcopy(model)
    apply_edits(narrow, [edit for each in edits.values() for edit in each])
    narrowed = traced_flops(lift(narrow, sites).model, seen.inputs)
    return {path: counts[path] - narrowed[path] for path in edits}


def _beside(stream: StreamSite, counts: Mapping[str, int]) -> dict[str, int]:
    found = {}
    for name, *paths in stream.blocks:
        for path, line in zip(paths, (stream.stream.attention, stream.stream.ffn), strict=True):
            found[path] = sum(counts[f"{stream.path}.{name}.{other}"] for other in (*line.before, *line.after))
    return found


def _samples(
    model: nn.Module, seen: Observation, sites: Iterable[Site], counts: Mapping[str, int]
) -> dict[str, Samples]:
    known: dict[Any, Samples] = {}
    found = {}
    for site in sites:
        call, merging = seen.once(site.path), site.merging
        if merging is None or call is None or call.x is None:
            continue
        module = model.get_submodule(site.path)
        key = (repr(module), call.x, repr(call.arguments), merging, counts[site.path])
        if key not in known:
            called, every = Called(module, call.arguments), merging.tokens(merging.count)
            fewer = (every - 1,) if isinstance(site, FFNSite) else (every - 1, every - 2)
            inputs = [(tokens, merging.input(call.x, tokens).to(seen.inputs)) for tokens in fewer]
            counted = [(tokens, traced_flops(called, value)[""]) for tokens, value in inputs]
            known[key] = ((every, counts[site.path]), *counted)
        found[site.path] = known[key]
    return found


def _at(samples: Samples, tokens: int) -> int:
    """The polynomial through the samples, exactly (Lagrange)."""
    value = Fraction(0)
    for here, flops in samples:
        others = [there for there, _ in samples if there != here]
        value += flops * Fraction(prod(tokens - there for there in others), prod(here - there for there in others))
    return _whole(value)


def _whole(value: Fraction) -> int:
    assert value.denominator == 1, "multiply-adds are whole numbers"
    return int(value)
