"""What a module that wraps another has in common with it."""

from __future__ import annotations

from typing import Any

from torch import nn


class Standin(nn.Module):
    """Wraps a host; whatever the model asks of it beside calling it is the host's own (timm's `set_window_size`,
    PyTorch's `batch_first`)."""

    host: nn.Module

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "host" or name.startswith("__"):
                raise
            return getattr(self.host, name)
