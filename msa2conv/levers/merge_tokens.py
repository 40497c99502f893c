"""Lever "merge_tokens": from some blocks on, the network runs on fewer tokens.

Nothing is fitted; see `msa2conv.stream` for what runs and its source. It is one choice for the whole network (where
tokens become fewer, and how many are left), and inside it every site chooses among what runs on any tokens: itself, a
narrower FFN, a thinner attention.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import combinations
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ..cost import CostModel
from ..merging import round_count
from ..options import Option
from ..settings import Setting
from ..sites import Claims, Site, StreamSite
from ..stream import Drop, transitions
from .base import Alone, Fractions, host_option


class MergeTokens(BaseModel, Alone):
    """Where tokens may become fewer, and how many may be left.

    Args:
        keep: fractions of the patches that may be left.
        drops: behind how many attentions of the network tokens may merge at most.
        places: among how many attentions these are chosen, spread evenly from the first to the last; all that there are
            of fewer. Every further one multiplies what has to be compared.

    Example:
        convert(model, 0.6, levers=("mixer", "ffn", "merge_in_site", MergeTokens(drops=2)))
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Literal["merge_tokens"] = "merge_tokens"
    keep: Fractions = (0.75, 0.5, 0.35, 0.2, 0.1)
    drops: int = Field(default=4, ge=1, le=6)
    places: int = Field(default=12, ge=2, le=48)

    def applies(self, site: Site) -> bool:
        return False  # to no single one

    def record(self, claims: Claims, costs: CostModel) -> StreamRecord | None:
        """What can be done with the tokens of a sequence of blocks; nothing is measured yet. None: there is none."""
        return None if claims.stream is None else StreamRecord(claims, self, costs)

    def counts(self, stream: StreamSite) -> list[int]:
        """How many patches (of a group) may be left, descending."""
        count = stream.stream.count
        return sorted({max(1, round(fraction * count)) for fraction in self.keep} - {count}, reverse=True)

    def blocks(self, stream: StreamSite) -> list[str]:
        """Names of the blocks behind whose attentions tokens may merge, in order."""
        names = [name for name, _, _ in stream.blocks]
        gaps = min(self.places, len(names)) - 1
        return [names[(2 * i * (len(names) - 1) + gaps) // (2 * gaps)] for i in range(gaps + 1)] if gaps else names


@dataclass(frozen=True)
class StreamRecord:
    """What merging through the network costs.

    Args:
        claims: the sequence of blocks, and the sites in it.
        lever: what may happen there.
        costs: of the model.
        scores: {name of a single drop: score}.
    """

    claims: Claims
    lever: MergeTokens
    costs: CostModel
    scores: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def read(cls, claims: Claims, costs: CostModel, meta: Mapping[str, Any]) -> StreamRecord | None:
        """What `state` described; None where the model has no such sequence of blocks."""
        record = MergeTokens.model_validate(meta["config"], strict=False).record(claims, costs)
        return None if record is None else record.with_scores(meta["scores"])

    @property
    def at(self) -> StreamSite:
        assert self.claims.stream is not None
        return self.claims.stream

    def hosts(self) -> list[Option]:
        """The sites of the sequence as they are: fewer tokens make them cheaper, whether a lever applies or not."""
        inside = self.at.tokens(())
        return [host_option(site, self.costs) for site in self.claims.sites if site.path in inside]

    def state(self) -> dict[str, Any]:
        """JSON-able description."""
        return {"config": self.lever.model_dump(mode="json"), "scores": dict(self.scores)}

    def to_measure(self) -> list[Option]:
        """Every single drop: many of them at one block tell what a second drop adds to a first one."""
        names, counts = self.lever.blocks(self.at), self.lever.counts(self.at)
        return [self._option((Drop(block=name, keep=k),)) for name in names for k in counts]

    def with_scores(self, scores: Mapping[str, float]) -> StreamRecord:
        """A copy that holds the measured {option name: score}."""
        known = {name: float(score) for name, score in scores.items()}
        return StreamRecord(self.claims, self.lever, self.costs, known)

    def settings(self) -> tuple[Setting, ...]:
        """All sequences of drops.

        A further drop is charged with what its number of tokens costs at its block, less what is lost already there.
        """
        return self._settings

    @cached_property  # thousands, asked for at every budget
    def _settings(self) -> tuple[Setting, ...]:
        names, counts = self.lever.blocks(self.at), self.lever.counts(self.at)
        single = {(name, k): Drop(block=name, keep=k) for name in names for k in counts}
        sequences = (
            tuple(single[pair] for pair in zip(blocks, kept, strict=True))
            for many in range(1, min(self.lever.drops, len(counts), len(names)) + 1)
            for blocks in combinations(names, many)
            for kept in combinations(counts, many)
        )
        return tuple(
            Setting(
                scores=tuple(self._increments(drops)),
                flops=self.costs.shortened(self.at, drops),
                tokens=self.at.fewer(drops),
                option=partial(self._option, drops),
                rounds=self._rounds(drops),
            )
            for drops in sequences
        )

    def _increments(self, drops: tuple[Drop, ...]) -> Iterator[float]:
        before: int | None = None
        for drop in drops:
            lost = self.scores.get(_name((drop,)), 0.0)
            known = 0.0 if before is None else self.scores.get(_name((Drop(block=drop.block, keep=before),)), 0.0)
            yield max(0.0, lost - known)
            before = drop.keep

    def _rounds(self, drops: tuple[Drop, ...]) -> tuple[int, ...]:
        return tuple(round_count(*pair) for pair in transitions(self.at.stream.count, drops))

    def _option(self, drops: tuple[Drop, ...]) -> Option:
        first = next(attention for name, attention, _ in self.at.blocks if name == drops[0].block)
        score = sum(self._increments(drops)) if self.scores else None
        return Option(
            self.at.path, _name(drops), self.costs.shortened(self.at, drops), (self.at.edit(drops),), score=score,
            starts_at=first, rounds=sum(self._rounds(drops)),
        )  # fmt: skip


def _name(drops: Iterable[Drop]) -> str:
    """'98 from 3, 39 from 7': patches left, and behind the attention of which block."""
    return ", ".join(f"{drop.keep} from {drop.block}" for drop in drops)


__all__ = ["MergeTokens", "StreamRecord"]
