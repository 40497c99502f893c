"""What depends on the version of timm."""

from __future__ import annotations

import timm

# Before 1.0.23 a ViT's attention reshapes to the width of its input: neither whole heads nor channels can go.
NARROW_ATTENTION = tuple(map(int, timm.__version__.split(".")[:3])) >= (1, 0, 23)
