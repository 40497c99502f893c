"""Whom the hybrid learns from: the original, or any other model of the same classes."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapters.paths import block_of
from ..plan import Preprocessing
from ..search.measure import OutputFn, first_tensor, tensor_of

_SAFE = 1e-3  # relative squared error of its outputs below which a teacher may run in bfloat16


class Teacher:
    """A frozen copy in eval mode.

    On a GPU it runs in bfloat16 where that alters its outputs by less than 0.1 % (squared, relative) on the images of
    `check`; elsewhere in float32.

    Args:
        model: float32; not touched.
        device: where to run it.
        output_fn: picks what is imitated from its output.
        seen, own: how the student's images are prepared, and how this model wants them.
        size: (height, width) that it wants.
    """

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        output_fn: OutputFn | None = None,
        *,
        seen: Preprocessing | None = None,
        own: Preprocessing | None = None,
        size: tuple[int, int] | None = None,
    ) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False).to(device)
        self.device, self.output_fn, self.half, self.size = device, output_fn, False, size
        self._change: tuple[Tensor, Tensor] | None = None
        if seen is not None and own is not None and (seen.mean, seen.std) != (own.mean, own.std):
            mean, std, own_mean, own_std = (
                torch.tensor(value, device=device)[:, None, None] for value in (seen.mean, seen.std, own.mean, own.std)
            )
            self._change = (std / own_std, (mean - own_mean) / own_std)

    def check(self, images: Tensor) -> bool:
        """Decide on these images whether bfloat16 is safe; returns that."""
        if self.device.type != "cuda":
            return False
        exact = self(images)
        self.half = True
        error = (self(images).float() - exact).square().sum() / exact.square().sum().clamp_min(1e-12)
        self.half = bool(error < _SAFE)
        return self.half

    def __call__(self, images: Tensor) -> Tensor:
        """What is imitated of its output."""
        return tensor_of(self.run(images), self.output_fn).float()

    @torch.no_grad()
    def run(self, images: Tensor, exact: bool = False) -> Any:
        """Its output, as it is; `exact`: in float32 in any case, for those who see its activations."""
        if self._change is not None:
            images = images * self._change[0] + self._change[1]
        if self.size is not None and tuple(images.shape[-2:]) != self.size:
            images = F.interpolate(images, self.size, mode="bicubic", antialias=True)
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.half and not exact):
            return self.model(images)


@contextmanager
def tapped(model: nn.Module, paths: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """The first tensor that every module at `paths` gives, while the model runs inside."""
    seen: dict[str, Tensor] = {}

    def keep(path: str) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            seen[path] = first_tensor(output)

        return hook

    handles = [model.get_submodule(path).register_forward_hook(keep(path)) for path in paths]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def shared_taps(student: nn.Module, teacher: Teacher, sites: Iterable[str], images: Tensor) -> tuple[str, ...]:
    """Modules of both whose outputs can be compared: of every converted site the block around it, or as much of it as
    is called (a ModuleList is not) and gives one shape in both."""
    known = dict(teacher.model.named_modules())
    around = [list(_down_to(site, block_of(site))) for site in sites]
    every = {path for paths in around for path in paths if path in known}
    with tapped(student, every) as own, tapped(teacher.model, every) as theirs:
        student(images)
        teacher.run(images)
    alike = {path for path in every if path in own and path in theirs and own[path].shape == theirs[path].shape}
    found = [next((path for path in paths if path in alike), None) for paths in around]
    return tuple(dict.fromkeys(path for path in found if path is not None))


def _down_to(path: str, top: str) -> Iterator[str]:
    """'blocks.0', 'blocks.0.mlp' for the path 'blocks.0.mlp' below 'blocks.0'."""
    parts = path.split(".")
    for count in range(len(top.split(".")), len(parts) + 1):
        yield ".".join(parts[:count])


@contextmanager
def overheard(
    model: nn.Module, paths: Iterable[str]
) -> Iterator[dict[str, tuple[tuple[Any, ...], Mapping[str, Any], Tensor]]]:
    """{path: (arguments, keywords, first tensor given)} of every module at `paths`, while the model runs inside."""
    heard: dict[str, tuple[tuple[Any, ...], Mapping[str, Any], Tensor]] = {}

    def keep(path: str) -> Any:
        def hook(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            heard[path] = (args, kwargs, first_tensor(output).clone())  # a residual may be added in place

        return hook

    handles = [model.get_submodule(p).register_forward_hook(keep(p), with_kwargs=True) for p in paths]
    try:
        yield heard
    finally:
        for handle in handles:
            handle.remove()
