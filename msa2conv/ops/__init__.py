"""What can stand where an attention or an FFN stood: a spec (data) and the module it builds."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from .attend import Attend, AttendMixer
from .base import IO, Path, Spec, TokenMixer, Width
from .linear import Linear, LinearMixer
from .local import Constant, Conv, ConvMixer, Depthwise, DepthwiseMixer, Global, Identity, IdentityMixer, Skip
from .prefix import AttendPrefix, PassPrefix, Prefix, PrefixAttention, RidgePrefix
from .sequence import Arrangement, Sizes, arranged, as_sequence

MixerSpec = Annotated[
    Skip | Identity | Constant | Global | Conv | Depthwise | Attend | Linear, Field(discriminator="kind")
]

__all__ = [
    "IO",
    "Arrangement",
    "Attend",
    "AttendMixer",
    "AttendPrefix",
    "Constant",
    "Conv",
    "ConvMixer",
    "Depthwise",
    "DepthwiseMixer",
    "Global",
    "Identity",
    "IdentityMixer",
    "Linear",
    "LinearMixer",
    "MixerSpec",
    "PassPrefix",
    "Path",
    "Prefix",
    "PrefixAttention",
    "RidgePrefix",
    "Sizes",
    "Skip",
    "Spec",
    "TokenMixer",
    "Width",
    "arranged",
    "as_sequence",
]
