"""Option: one thing that can be done at one site. All that solver, apply, save and report know about a lever."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from torch import Tensor

from .merging import round_count
from .plan import Edit, Wrap


def no_tensors() -> Mapping[str, Tensor]:
    """For options that keep the host's values."""
    return {}


@dataclass(frozen=True)
class Option:
    """Args:
    site: path of the site.
    name: what it is, unique at its site ("conv3x3", "attention", "512/768").
    flops: multiply-adds of the site under this option, batch 1.
    edits: what `apply` does; empty for the host itself.
    tensors: called when the option is used: {state-dict name in the hybrid: fitted values}.
    score: what it costs in accuracy: KL of the logits (nats) or relative error of the features; None until measured.
    flops_on: its multiply-adds on so many tokens, prefix tokens included, on the account of `flops`; None where it
        cannot run on others than all.
    inner: of an option that merges tokens: what runs on them.
    starts_at: path of the site from which on the network runs otherwise; None: the option's own.
    tokens: how many its site sees, prefix tokens included; None: all.
    rounds: how often tokens are compared and gathered in it, which takes time and hardly any FLOPs.
    """

    site: str
    name: str
    flops: int
    edits: tuple[Edit, ...] = ()
    tensors: Callable[[], Mapping[str, Tensor]] = no_tensors
    score: float | None = None
    flops_on: Callable[[int], int] | None = None
    inner: Option | None = None
    starts_at: str | None = None
    tokens: int | None = None
    rounds: int = 0

    def on(self, tokens: int) -> Option | None:
        """The same where its site sees so many tokens, prefix tokens included; None where it cannot run on them."""
        if self.flops_on is None:
            return None
        if tokens not in self._on:
            self._on[tokens] = replace(self, flops=self.flops_on(tokens), tokens=tokens)
        return self._on[tokens]

    @cached_property
    def _on(self) -> dict[int, Option]:
        """What `on` has made: a search asks for the same again for every price and every budget."""
        return {}

    def merged(self, wrap: Wrap, flops: int, score: float | None) -> Option:
        """The same on merged tokens.

        Args:
            wrap: the Edit that merges.
            flops: of the comparisons and of this option on the tokens that are left.
            score: what all of it costs in accuracy.
        """

        def tensors() -> dict[str, Tensor]:
            path = f"{wrap.path}."
            return {
                f"{path}host.{name.removeprefix(path)}" if name.startswith(path) else name: value
                for name, value in self.tensors().items()
            }

        name = f"{self.name}@{wrap.spec.keep * wrap.spec.groups}"
        rounds = round_count(wrap.spec.count, wrap.spec.keep)
        return Option(self.site, name, flops, (*self.edits, wrap), tensors, score, inner=self, rounds=rounds)
