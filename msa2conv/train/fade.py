"""From attention to convolution by degrees: a mixer that begins as the attention it replaces."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from ..standin import Standin
from ..transforms.apply import replace_submodule


class Fading(Standin):
    """While it trains, (1 - share) attention + share mixer; in eval mode the mixer alone.

    Args:
        mixer: what stays.
        attention: what fades; frozen.
    """

    def __init__(self, mixer: nn.Module, attention: nn.Module) -> None:
        super().__init__()
        self.host, self.attention, self.share = mixer, attention.requires_grad_(False), 0.0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        new = self.host(*args, **kwargs)
        if not self.training or self.share >= 1:
            return new
        old = self.attention(*args, **kwargs)
        if isinstance(new, Tensor):
            return self.share * new + (1 - self.share) * old
        return (self.share * new[0] + (1 - self.share) * old[0], *new[1:])


def fade_in(student: nn.Module, original: nn.Module, paths: Iterable[str]) -> list[Fading]:
    """Put the original's attentions beside the mixers at `paths`, in place."""
    found = []
    for path in paths:
        found.append(Fading(student.get_submodule(path), original.get_submodule(path)))
        replace_submodule(student, path, found[-1])
    return found


def fade_out(student: nn.Module) -> None:
    """Leave the mixers alone, in place."""
    for path, module in list(student.named_modules()):
        if isinstance(module, Fading):
            replace_submodule(student, path, module.host)
