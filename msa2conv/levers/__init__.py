"""Levers: what can be done at a site. One lever, one file; each turns activations into fitted Options."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from ..cost import CostModel
from ..errors import InvalidArgument
from ..sites import AttentionSite, FFNSite, Site
from .base import Lever, Record, Statistics
from .ffn import FFN, FFNRecord
from .mixer import Mixer, MixerRecord

_BY_NAME: dict[str, type[Mixer] | type[FFN]] = {"mixer": Mixer, "ffn": FFN}


def resolve_levers(levers: Any) -> tuple[Lever, ...]:
    """Names or configured levers -> levers; "all" stands for every one. Raises InvalidArgument."""
    wanted = list(_BY_NAME) if levers == "all" else [levers] if isinstance(levers, (str, Mixer, FFN)) else levers
    if not isinstance(wanted, Iterable):
        raise InvalidArgument("levers", repr(levers), "names or levers", "For example levers=('mixer', 'ffn').")
    resolved: list[Any] = []
    for lever in wanted:
        if isinstance(lever, str):
            if lever not in _BY_NAME:
                raise InvalidArgument(
                    "levers",
                    repr(lever),
                    f"names out of {sorted(_BY_NAME)} or 'all'",
                    "For example levers=('mixer', 'ffn').",
                )
            lever = _BY_NAME[lever]()
        elif not hasattr(lever, "statistics"):
            raise InvalidArgument("levers", repr(lever), "a name or a lever", "For example levers=('mixer', 'ffn').")
        resolved.append(lever)
    names = [lever.name for lever in resolved]
    if not resolved or len(set(names)) < len(names):
        raise InvalidArgument(
            "levers", repr(names), "at least one lever, each once", "For example levers=('mixer', 'ffn')."
        )
    return tuple(resolved)


def read_record(
    site: Site | None, costs: CostModel, meta: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> Record | None:
    """What `Record.state()` described, at the site it was made for; None where site and lever do not go together."""
    if isinstance(site, AttentionSite) and meta["lever"] == "mixer":
        return MixerRecord.from_state(site, costs, meta, tensors)
    if isinstance(site, FFNSite) and meta["lever"] == "ffn":
        return FFNRecord.from_state(site, costs, meta, tensors)
    return None


__all__ = ["FFN", "Lever", "Mixer", "Record", "Statistics", "read_record", "resolve_levers"]
