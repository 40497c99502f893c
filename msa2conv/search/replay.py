"""Re-run only what lies behind a site: blocks before it are replaced by their recorded outputs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..transforms.lift import max_difference
from .measure import OutputFn, tensor_of


class Replay:
    """Runs a network on fixed batches from any block on.

    The blocks must run one after the other. Their outputs are recorded once; to start at block i, all earlier blocks
    return their recordings, so that whatever lies between them, and long skip connections, see what they always see.
    Where blocks return neither tensors nor tuples of them, or the recorded output is not reproduced, every run is a
    full one.

    Args:
        model: a network that belongs to the caller (its blocks' `forward` is shadowed while a suffix runs).
        blocks: paths of the blocks in execution order.
        batches: the inputs.
        output_fn: picks what is scored from the network's output.
    """

    def __init__(
        self, model: nn.Module, blocks: Iterable[str], batches: list[Tensor], output_fn: OutputFn | None = None
    ) -> None:
        self.model, self.batches, self.output_fn = model, batches, output_fn
        self.blocks = list(dict.fromkeys(blocks))
        self.recorded: list[list[Any]] = []
        self.exact = True
        self.reference = self._record()
        if len(self.blocks) > 1 and self.exact:
            found, tolerance = max_difference(self.run(self.blocks[-1]), self.reference)
            self.exact = found <= 10 * tolerance

    @torch.no_grad()
    def _record(self) -> Tensor:
        outputs = []
        for batch in self.batches:
            seen: dict[str, Any] = {}
            handles = [
                self.model.get_submodule(path).register_forward_hook(
                    lambda _m, _a, out, path=path, seen=seen: seen.__setitem__(path, out)
                )
                for path in self.blocks
            ]
            outputs.append(tensor_of(self.model(batch), self.output_fn))
            for handle in handles:
                handle.remove()
            self.exact &= all(_is_plain(seen.get(path)) for path in self.blocks)
            self.recorded.append([seen[path] for path in self.blocks] if self.exact else [])
        return torch.cat(outputs)

    @torch.no_grad()
    def run(self, block: str) -> Tensor:
        """The network's output on all batches; blocks before `block` are not computed."""
        outputs = []
        for index, batch in enumerate(self.batches):
            with self._shadowed(index, self.blocks.index(block) if self.exact else 0):
                outputs.append(tensor_of(self.model(batch), self.output_fn))
        return torch.cat(outputs)

    @contextmanager
    def _shadowed(self, batch: int, start: int) -> Iterator[None]:
        shadowed = [self.model.get_submodule(path) for path in self.blocks[:start]]
        for position, module in enumerate(shadowed):
            value = self.recorded[batch][position]
            module.forward = lambda *args, value=value, **kwargs: value
        try:
            yield
        finally:
            for module in shadowed:
                del module.forward


def _is_plain(output: Any) -> bool:
    """A tensor, or a tuple with one (of Hugging Face's Swin, for example)."""
    if isinstance(output, tuple):
        return all(value is None or isinstance(value, (Tensor, tuple)) for value in output)
    return isinstance(output, Tensor)
