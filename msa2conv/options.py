"""Option: one thing that can be done at one site. All that solver, apply, save and report know about a lever."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from .plan import Edit


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
    """

    site: str
    name: str
    flops: int
    edits: tuple[Edit, ...] = ()
    tensors: Callable[[], Mapping[str, Tensor]] = no_tensors
    score: float | None = None
