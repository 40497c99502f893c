"""Lever "merge_in_site": an attention or an FFN runs on fewer tokens, and the grid is restored behind it.

Nothing is fitted; see `msa2conv.merging` for what runs and its source. It goes together with every other option that
can run on any tokens: a narrower FFN may also see fewer of them. The scores of both are added.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from ..cost import CostModel
from ..ops import Linear
from ..options import Option
from ..plan import Replace
from ..sites import Site
from .base import Fractions, host_option


class MergeInSite(BaseModel):
    """How many patches a site may be left with.

    Args:
        keep: fractions of the patches.

    Example:
        convert(model, 0.7, levers=("mixer", "ffn", MergeInSite(keep=(0.75, 0.5, 0.25))))
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Literal["merge_in_site"] = "merge_in_site"
    keep: Fractions = (0.84, 0.67, 0.5, 0.35, 0.2, 0.1)

    @staticmethod
    def read(site: Site, costs: CostModel, meta: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> MergeRecord:
        """What `Record.state()` described."""
        lever = MergeInSite.model_validate(meta["config"], strict=False)
        return MergeRecord(site, lever, costs, {name: float(score) for name, score in meta["scores"].items()})

    def applies(self, site: Site) -> bool:
        return site.merging is not None

    def cheapest(self, site: Site, costs: CostModel) -> Option:
        return host_option(site, costs)  # `around` makes it cheaper

    def memory(self, site: Site) -> int:
        return 0

    def statistics(self, site: Site, host: nn.Module, prefix_weight: float, ridge_factor: float) -> NothingToFit:
        return NothingToFit(self, site)

    def around(
        self, option: Option, site: Site, costs: CostModel, scores: Mapping[str, float] | None = None
    ) -> list[Option]:
        """`option` on merged tokens, wherever that is cheaper.

        Args:
            option: at the site.
            site: where tokens can be merged.
            costs: of the model.
            scores: {name of the host on merged tokens: score}; None where none were measured.
        """
        merging = site.merging
        if option.flops_on is None or merging is None or _is_linear(option):
            return []
        host, found = host_option(site, costs).name, []
        for count in sorted({max(1, round(fraction * merging.count)) for fraction in self.keep} - {merging.count}):
            flops = costs.merge(site, count) + option.flops_on(merging.tokens(count))
            if flops < option.flops:
                alone = None if scores is None else scores[f"{host}@{count * merging.groups}"]
                score = None if alone is None or option.score is None else option.score + alone
                found.append(option.merged(merging.wrap(site.path, count), flops, score))
        return found


def _is_linear(option: Option) -> bool:
    """One product of matrices: comparing tokens would take longer."""
    return any(isinstance(edit, Replace) and isinstance(edit.spec, Linear) for edit in option.edits)


@dataclass
class NothingToFit:
    lever: MergeInSite
    site: Site
    whole_ffn = False

    def update(self, x: Tensor, out: Tensor) -> None:
        pass

    def fit(self, host: nn.Module, costs: CostModel) -> MergeRecord:
        return MergeRecord(self.site, self.lever, costs)


@dataclass(frozen=True)
class MergeRecord:
    """What merging costs at one site."""

    at: Site
    lever: MergeInSite
    costs: CostModel
    scores: Mapping[str, float] = field(default_factory=dict)

    @property
    def site(self) -> str:
        return self.at.path

    def options(self) -> list[Option]:
        return [host_option(self.at, self.costs)]

    def to_measure(self) -> list[Option]:
        return self.lever.around(host_option(self.at, self.costs), self.at, self.costs, None)

    def around(self, options: Sequence[Option]) -> list[Option]:
        return [more for one in options for more in self.lever.around(one, self.at, self.costs, self.scores)]

    def with_scores(self, scores: Mapping[str, float]) -> MergeRecord:
        names = {option.name for option in self.to_measure()}
        known = {name: score for name, score in scores.items() if name in names}
        return MergeRecord(self.at, self.lever, self.costs, known)

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        config = self.lever.model_dump(mode="json")
        return {"lever": self.lever.name, "site": self.site, "config": config, "scores": dict(self.scores)}, {}


__all__ = ["MergeInSite", "MergeRecord"]
