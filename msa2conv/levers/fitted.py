"""Records whose options are the host and fitted candidates beside it, each measured by itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from torch import Tensor

from ..cost import CostModel
from ..options import Option
from ..sites import Site
from .base import Alone, host_option


class Candidate(Protocol):
    """One of them, a frozen dataclass. `tensors` are named relative to the module that they belong to."""

    @property
    def name(self) -> str: ...

    @property
    def tensors(self) -> Mapping[str, Tensor]: ...

    @property
    def score(self) -> float | None: ...

    def described(self) -> dict[str, Any]:
        """JSON-able: all but tensors and score."""
        ...

    @classmethod
    def restored(cls, described: Mapping[str, Any], tensors: Mapping[str, Tensor], score: float | None) -> Candidate:
        """What was described."""
        ...


S = TypeVar("S", bound=Site)
C = TypeVar("C", bound=Candidate)
R = TypeVar("R", bound="FittedRecord[Any, Any]")


@dataclass(frozen=True)
class FittedRecord(Alone, ABC, Generic[S, C]):
    """The fitted candidates of one site.

    Args:
        at: the site.
        costs: of the model.
        candidates: what was fitted.
    """

    lever: ClassVar[str]
    kind: ClassVar[Any]  # of the candidates

    at: S
    costs: CostModel
    candidates: tuple[C, ...]

    @classmethod
    def read(cls: type[R], site: Any, costs: CostModel, meta: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> R:
        """What `state` described."""

        def own(index: int) -> dict[str, Tensor]:
            return {key.split("|", 1)[1]: v for key, v in tensors.items() if key.split("|", 1)[0] == str(index)}

        found = (cls.kind.restored(item, own(i), item["score"]) for i, item in enumerate(meta["candidates"]))
        return cls(site, costs, tuple(found))

    @property
    def site(self) -> str:
        return self.at.path

    def options(self) -> list[Option]:
        return [host_option(self.at, self.costs), *self.to_measure()]

    def to_measure(self) -> list[Option]:
        return [self.option(candidate) for candidate in self.candidates]

    @abstractmethod
    def option(self, candidate: C) -> Option:
        """The candidate as an Option."""

    def with_scores(self: R, scores: Mapping[str, float]) -> R:
        scored = (replace(each, score=scores[each.name]) for each in self.candidates)
        return replace(self, candidates=tuple(scored))

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        described = [{**each.described(), "score": each.score} for each in self.candidates]
        tensors = {
            f"{i}|{name}": value for i, each in enumerate(self.candidates) for name, value in each.tensors.items()
        }
        return {"lever": self.lever, "site": self.site, "candidates": described}, tensors


__all__ = ["Candidate", "FittedRecord"]
