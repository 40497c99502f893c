"""Adapters know backbones: each finds the Sites of one family. The only importers of timm."""

from .declared import FFN, Attention, Declarations, qkv, separate
from .geometry import channels_first, channels_last, tokens, windows

__all__ = [
    "FFN",
    "Attention",
    "Declarations",
    "channels_first",
    "channels_last",
    "qkv",
    "separate",
    "tokens",
    "windows",
]
