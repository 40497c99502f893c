"""What users may write as `flops_target`."""

from __future__ import annotations

import math
import re

from .errors import InvalidTarget

_TEXT = re.compile(r"\s*([0-9]*\.?[0-9]+(?:e[0-9]+)?)\s*(%|[kmgt])?\s*(?:flops|macs)?\s*", re.IGNORECASE)
_UNITS = {"k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}
_ACCEPTED = "a fraction in (0, 1), text such as '70%' or '3.3G', or multiply-adds above 1e6"


def parse_target(target: float | str, base: int | None = None) -> int:
    """`flops_target` -> multiply-adds.

    Args:
        target: 0.7, "70%", "3.3G" or 3.3e9.
        base: multiply-adds of the original.

    Raises:
        InvalidTarget: not a number, <= 0, 1, in (1, 1e6], or at or above the original.

    Example:
        >>> parse_target("70%", 1000)
        700
    """
    fraction_only = False
    if isinstance(target, str):
        match = _TEXT.fullmatch(target)
        if match is None:
            raise InvalidTarget("flops_target", repr(target), _ACCEPTED, "Write for example 0.7, '70%' or '3.3G'.")
        value = float(match[1])
        unit = (match[2] or "").lower()
        fraction_only = unit == "%"
        value = value / 100 if fraction_only else value * _UNITS.get(unit, 1.0)
        absolute = unit in _UNITS
    elif isinstance(target, (int, float)) and not isinstance(target, bool):
        value, absolute = _float(target), target > 1e6
    else:
        raise InvalidTarget("flops_target", type(target).__name__, _ACCEPTED, "Write for example 0.7, '70%' or '3.3G'.")
    if not math.isfinite(value) or value <= 0:
        raise InvalidTarget("flops_target", repr(target), _ACCEPTED, "Write for example 0.7, '70%' or '3.3G'.")
    if value == 1 and not absolute:
        raise InvalidTarget(
            "flops_target", repr(target), _ACCEPTED, "1 would keep the whole model: ask for less, for example 0.7."
        )
    if absolute or (value > 1e6 and not fraction_only):
        return _below(target, int(value), base)
    if value > 1:
        if base is None:
            return 0
        guess = f"'{value:g}%'" if value < 100 and not fraction_only else "0.7"
        giga = f" or '{value:g}G'" if value < base / 1e9 and not fraction_only else ""
        raise InvalidTarget("flops_target", repr(target), _ACCEPTED, f"Did you mean {guess}{giga}?")
    return _below(target, int(value * (base or 2**62)), base)


def _below(target: float | str, flops: int, base: int | None) -> int:
    if base is not None and flops >= base:
        raise InvalidTarget(
            "flops_target",
            f"{target!r}, which is {flops / 1e9:.4g} GFLOPs",
            f"less than the original's {base / 1e9:.4g} GFLOPs",
            f"Ask for less, for example '{0.7 * base / 1e9:.2g}G' or 0.7.",
        )
    if flops < 1:
        raise InvalidTarget("flops_target", repr(target), _ACCEPTED, "Ask for more, for example 0.7.")
    return flops


def _float(number: float) -> float:
    try:
        return float(number)
    except OverflowError:
        return math.inf
