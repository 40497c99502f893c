"""What the controls of our own search share: its options, some of them forbidden, and the same exact solver."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

import msa2conv
from msa2conv import FFN, Mixer, Option
from msa2conv.search.calibration import Calibration
from msa2conv.sites import AttentionSite

from .base import Context
from .ours import calibrated

_FFN = FFN(round_to=2)  # what a control saves at attentions has to be spent to 1 %, however small the network
Options = Mapping[str, Sequence[Option]]


@dataclass(frozen=True)
class Searched:
    """A calibration of `mixer` and `ffn`, and the plan that msa2conv makes of it.

    Args:
        parent: the original.
        context: of the run.
        calibration: of it.
        budget: multiply-adds allowed.
    """

    parent: nn.Module
    context: Context
    calibration: Calibration
    budget: int

    @classmethod
    def of(cls, parent: nn.Module, budget: int, context: Context, mixer: Mixer | None = None) -> Searched:
        return cls(parent, context, calibrated(parent, context, (mixer or Mixer(), _FFN)), budget)

    @property
    def attentions(self) -> dict[str, AttentionSite]:
        """{path: attention} of those that there is an option for."""
        sites = {site.path: site for site in self.calibration.sites if isinstance(site, AttentionSite)}
        return {path: sites[path] for path in self.calibration.options() if path in sites}

    def chosen(self) -> dict[str, Option]:
        """What msa2conv does at every attention."""
        choice = msa2conv.choose(self.parent, self.calibration, self.budget, progress=False)
        return {path: choice.choices[path] for path in self.attentions}

    def most(self, options: Options) -> int:
        """Multiply-adds where every site takes its dearest option."""
        return self._rest + sum(max(option.flops for option in group) for group in options.values())

    @property
    def _rest(self) -> int:
        return self.calibration.costs.outside(self.calibration.options())

    def with_attentions(self, allowed: Mapping[str, Sequence[Option]]) -> dict[str, Sequence[Option]]:
        """All options of the FFNs, and these at attentions."""
        return {path: allowed.get(path, group) for path, group in self.calibration.options().items()}

    def solved(self, options: Options) -> nn.Module:
        """The best sum of scores under the budget, as a network."""
        choices = msa2conv.solve({path: list(group) for path, group in options.items()}, self._rest, self.budget)
        seen = msa2conv.inspect(self.parent, example_inputs=self.context.example)
        plan, tensors = msa2conv.make_plan(self.parent, seen, choices)
        self.context.note_plan(plan)
        return msa2conv.apply(plan, self.parent, tensors).eval()


def named(options: Sequence[Option], name: str) -> list[Option]:
    """The option of that name, if there is one."""
    return [option for option in options if option.name == name]
