"""timm's backbones, declared: one table of attentions, one of FFNs, one of what is left as it is and why."""

from __future__ import annotations

from ..declared import Declarations
from .ffns import FFNS
from .left import LEFT
from .maps import MAPS
from .sequences import SEQUENCES
from .windows import WINDOWS

TIMM = Declarations("timm", {**SEQUENCES, **WINDOWS, **MAPS}, FFNS, LEFT)

__all__ = ["TIMM"]
