"""Sites: where something can be changed, and its geometry. No weights, no knowledge of any backbone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .kernels import Rows as Rows
from .layouts import Layout
from .merging import Merge
from .ops import IO, Arrangement, Sizes, arranged
from .plan import Edit, Range, SetAttr, Shorten, Slice, Wrap, ranges
from .stream import Drop, Stream


@dataclass(frozen=True)
class Projections:
    """Where a host keeps its weights, by heads.

    v, out: W_v and W_o, which the kernels of a gate search are made from. q, k, scale: stated only for hosts that
    compute softmax(scale q k^T) v and nothing else in between: no q/k-norm, rotary or relative position, no gate; then
    prefix tokens can keep their attention. Calibration checks that numerically and does without where it is wrong.
    """

    v: Rows
    out: Rows
    heads: int
    head_dim: int
    q: Rows | None = None
    k: Rows | None = None
    scale: float | None = None

    @property
    def plain(self) -> bool:
        """Whether this states all of a plain softmax attention."""
        return self.q is not None and self.k is not None and self.scale is not None


@dataclass(frozen=True)
class Merging:
    """How the tokens of a site can be merged, as `transforms.mergeable` has tried out.

    Args:
        arrangement, prefix, groups, count, sizes: see `Merge`.
        io: the host's calling convention, every positional argument by its name.
    """

    arrangement: Arrangement
    prefix: int
    groups: int
    count: int
    io: IO
    sizes: Sizes | None = None

    def tokens(self, keep: int) -> int:
        """How many tokens there are with `keep` patches in a group."""
        return self.prefix + self.groups * keep

    def input(self, x: tuple[int, ...], tokens: int) -> Tensor:
        """Zeros as the host takes them, like its input of shape `x` but with so many tokens."""
        sequences = x[1] if self.arrangement == "n b c" else x[0]
        channels = x[1] if self.arrangement == "b c h w" else x[-1]
        return arranged(torch.zeros(sequences, tokens, channels), self.arrangement)

    def spec(self, keep: int) -> Merge:
        return Merge(
            arrangement=self.arrangement,
            prefix=self.prefix,
            groups=self.groups,
            count=self.count,
            keep=keep,
            sizes=self.sizes,
        )

    def wrap(self, path: str, keep: int) -> Wrap:
        """The Edit that leaves `keep` patches of a group at the module at `path`."""
        return Wrap(path=path, spec=self.spec(keep), io=self.io)


@dataclass(frozen=True)
class HeadUnits:
    """What hangs on the heads of an attention; paths are relative to it.

    Args:
        heads: how many there are.
        hanging: (parameter or buffer, dimension, offset, width): head j is offset + [j width, (j + 1) width) there.
        attributes: (attribute, its value for one head) of plain numbers that count heads or their channels.
    """

    heads: int
    hanging: tuple[tuple[str, int, int, int], ...]
    attributes: tuple[tuple[str, int], ...] = ()

    def edits(self, path: str, kept: Iterable[int]) -> tuple[Edit, ...]:
        """The Edits that leave these heads of the attention at `path`."""
        kept = sorted(kept)
        blocks: dict[tuple[str, int], list[int]] = {}
        for name, dim, offset, width in self.hanging:
            parts = [range(offset + head * width, offset + (head + 1) * width) for head in kept]
            blocks.setdefault((name, dim), []).extend(index for part in parts for index in part)
        edits: list[Edit] = [
            Slice(path=f"{path}.{name}", dim=dim, kept=ranges(found)) for (name, dim), found in blocks.items()
        ]
        for attribute, per_head in self.attributes:
            inner, _, name = attribute.rpartition(".")
            edits.append(SetAttr(path=f"{path}.{inner}".rstrip("."), name=name, value=per_head * len(kept)))
        return tuple(edits)


@dataclass(frozen=True)
class AttentionSite:
    """One self-attention over an image grid.

    Args:
        path: module path of the attention.
        block: path of the block around it (the unit that a suffix re-run starts from).
        dim: channels of its input and output.
        heads, head_dim: geometry, for default bottleneck widths.
        layout: how its tokens lie on the image.
        io: its calling convention.
        projections: names of its weights; None where they are not kept by heads in Linear layers.
        merging: how its tokens can be merged; None where they cannot, or before that was tried.
        head_units: what hangs on its heads, of a host that is more than its projections; None where that is unknown.
    """

    path: str
    block: str
    dim: int
    heads: int
    head_dim: int
    layout: Layout
    io: IO
    projections: Projections | None = None
    merging: Merging | None = None
    head_units: HeadUnits | None = None


Unit = tuple[str, int] | tuple[str, int, int]


@dataclass(frozen=True)
class Units:
    """What hangs on the hidden units of an FFN; paths are relative to it.

    Args:
        hanging: (parameter or buffer, dimension[, offset]): unit j is index j + offset there. A layer that computes
            gate and value at once stands here twice.
        beside: (parameter or buffer, dimension, range) of what lies there beside hidden units, and stays.
        split: (attribute, widths) of the module: how it splits what its first layer computes, hidden units first.
    """

    hanging: tuple[Unit, ...]
    beside: tuple[tuple[str, int, Range], ...] = ()
    split: tuple[str, tuple[int, ...]] | None = None

    def edits(self, path: str, kept: Iterable[int]) -> tuple[Edit, ...]:
        """The Edits that leave these hidden units of the FFN at `path`."""
        kept = sorted(kept)
        indices: dict[tuple[str, int], list[int]] = {}
        for name, dim, *offset in self.hanging:
            indices.setdefault((name, dim), []).extend(unit + sum(offset) for unit in kept)
        for name, dim, (start, stop) in self.beside:
            indices[name, dim].extend(range(start, stop))
        edits: list[Edit] = [
            Slice(path=f"{path}.{name}".lstrip("."), dim=dim, kept=ranges(found))
            for (name, dim), found in indices.items()
        ]
        if self.split is not None:
            attribute, widths = self.split
            edits.append(SetAttr(path=path, name=attribute, value=(len(kept), *widths[1:])))
        return tuple(edits)


@dataclass(frozen=True)
class FFNSite:
    """One feed-forward network whose hidden units can be dropped.

    Args:
        path: module path of the FFN, or of the block that computes it itself; other sites may lie inside.
        block: path of the block around it.
        dim: channels of its input and output.
        hidden: number of hidden units.
        layout: how its tokens lie on the image; tells prefix tokens from patches.
        output: path of the layer that reads the hidden units, relative to `path`; its weights are refitted.
        units: what hangs on the hidden units.
        merging: as of an AttentionSite.
    """

    path: str
    block: str
    dim: int
    hidden: int
    layout: Layout
    output: str
    units: Units
    merging: Merging | None = None

    @property
    def reader(self) -> str:
        """Module path of the layer that reads the hidden units."""
        return f"{self.path}.{self.output}"

    def edits(self, kept: Iterable[int]) -> tuple[Edit, ...]:
        """The Edits that leave these hidden units."""
        return self.units.edits(self.path, kept)


Site = AttentionSite | FFNSite


@dataclass(frozen=True)
class StreamSite:
    """A sequence of blocks whose tokens can be merged in between, as `transforms.streams` has tried out.

    Args:
        path: module path of the sequence.
        blocks: (name in the sequence, path of its attention site, path of its FFN site) of every block, in order.
        stream: how they run, without any drop.
    """

    path: str
    blocks: tuple[tuple[str, str, str], ...]
    stream: Stream

    def tokens(self, drops: Iterable[Drop]) -> dict[str, int]:
        """{site path: tokens that it sees, prefix tokens included}, with these drops."""
        stream, keep = self.stream, {drop.block: drop.keep for drop in drops}
        count, found = stream.count, {}
        for name, attention, ffn in self.blocks:
            found[attention] = stream.prefix + stream.groups * count
            count = keep.get(name, count)
            found[ffn] = stream.prefix + stream.groups * count
        return found

    def fewer(self, drops: Iterable[Drop]) -> dict[str, int]:
        """Of `tokens` those sites that see fewer than all."""
        return {path: count for path, count in self.tokens(drops).items() if count < self.stream.tokens}

    def edit(self, drops: Iterable[Drop]) -> Shorten:
        """The Edit that merges tokens so."""
        return Shorten(path=self.path, spec=self.stream.model_copy(update={"drops": tuple(drops)}))


@dataclass(frozen=True)
class ResidualStream:
    """What hangs on the channels that blocks add to and read from; paths are of the whole model.

    Args:
        channels: how many there are.
        hanging: as of `Units`.
        attributes: (module path, name, whether it is a tuple of one) of plain attributes that state how many there are.
        sites: paths of the sites that read it.
    """

    channels: int
    hanging: tuple[Unit, ...]
    attributes: tuple[tuple[str, str, bool], ...]
    sites: tuple[str, ...]

    def edits(self, kept: Iterable[int]) -> tuple[Edit, ...]:
        """The Edits that leave these channels."""
        kept = sorted(kept)
        stated = [
            SetAttr(path=path, name=name, value=(len(kept),) if inside else len(kept))
            for path, name, inside in self.attributes
        ]
        return (*Units(self.hanging).edits("", kept), *stated)


@dataclass(frozen=True)
class WidthGroup:
    """All residual streams of a model (one, or one a stage), as `transforms.widths` has tried out: they get narrower
    by the same share."""

    streams: tuple[ResidualStream, ...]

    def edits(self, kept: Iterable[Iterable[int]]) -> tuple[Edit, ...]:
        """The Edits that leave these channels of every stream."""
        return tuple(edit for stream, own in zip(self.streams, kept, strict=True) for edit in stream.edits(own))

    def left(self, channels: Iterable[int]) -> dict[str, int]:
        """{site path: channels that its stream has left}, if every stream has so many."""
        return {path: kept for each, kept in zip(self.streams, channels, strict=True) for path in each.sites}


@dataclass(frozen=True)
class Refusal:
    """A module that looked convertible and is left alone, and why."""

    path: str
    kind: str
    reason: str


def listed(refusals: Iterable[Refusal]) -> list[str]:
    """One text for every reason: the first module that it holds for, and how many more there are."""
    groups: dict[tuple[str, str], list[str]] = {}
    for item in refusals:
        groups.setdefault((item.kind, item.reason), []).append(item.path)
    return [
        f"{paths[0]}{f' and {len(paths) - 1} more' if len(paths) > 1 else ''} ({kind}): {reason}"
        for (kind, reason), paths in groups.items()
    ]


@dataclass(frozen=True)
class Claims:
    """Sites in execution order, what was refused, and the sequence of blocks that they lie in, where there is one."""

    sites: tuple[Site, ...]
    refusals: tuple[Refusal, ...]
    stream: StreamSite | None = None

    @classmethod
    def of(cls, found: Iterable[Site | Refusal]) -> Claims:
        """Sort what an adapter found into sites and refusals."""
        found = tuple(found)
        refusals = tuple(item for item in found if isinstance(item, Refusal))
        return cls(tuple(item for item in found if not isinstance(item, Refusal)), refusals)

    def of_width(self, channels: Mapping[str, int]) -> Claims:
        """The same in a model whose residual streams are narrower.

        Args:
            channels: {site path: how many its residual stream has left}.
        """
        return replace(self, sites=tuple(replace(site, dim=channels[site.path]) for site in self.sites))

    @property
    def attentions(self) -> tuple[AttentionSite, ...]:
        return tuple(site for site in self.sites if isinstance(site, AttentionSite))

    @property
    def ffns(self) -> tuple[FFNSite, ...]:
        return tuple(site for site in self.sites if isinstance(site, FFNSite))
