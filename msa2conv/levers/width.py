"""Lever "width": residual streams with fewer channels; off unless asked for.

Every width is a network of its own, in which the other levers choose: `narrow` fits it, `msa2conv.search.narrowing`
calibrates it. Which parameters hang on a channel, `msa2conv.transforms.widths` has found out.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from ..sites import Site, WidthGroup
from .base import Alone, between


def _of_channels(keep: tuple[float, ...]) -> tuple[float, ...]:
    return between(keep, "channels")


class Width(BaseModel, Alone):
    """How many channels the residual streams may be left with; each is calibrated by itself.

    Args:
        keep: fractions of the channels, the same of every stream.
        round_to: what numbers of channels are multiples of.

    Example:
        convert(model, 0.5, levers=("ffn", Width(keep=(0.75,))), distill_steps=500)
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Literal["width"] = "width"
    keep: Annotated[tuple[float, ...], Field(min_length=1), AfterValidator(_of_channels)] = (0.875, 0.75)
    round_to: int = Field(default=8, ge=1)

    def applies(self, site: Site) -> bool:
        return False  # to no single one

    def channels(self, group: WidthGroup) -> list[tuple[int, ...]]:
        """How many of every stream may be left, the widest first."""
        found = {tuple(self._rounded(share * stream.channels) for stream in group.streams) for share in self.keep}
        whole = tuple(stream.channels for stream in group.streams)
        return sorted((kept for kept in found if kept != whole), reverse=True)

    def _rounded(self, channels: float) -> int:
        return max(1, round(channels / self.round_to)) * self.round_to


__all__ = ["Width"]
