"""Levers: what can be done at a site. One lever, one file; each turns activations into fitted Options."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..errors import InvalidArgument
from .base import Lever, Record, Statistics
from .ffn import FFN
from .mixer import Mixer

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


__all__ = ["FFN", "Lever", "Mixer", "Record", "Statistics", "resolve_levers"]
