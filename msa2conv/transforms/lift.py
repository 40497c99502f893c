"""model -> supernet: a copy of the model with a Supernode at every site."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..options import Option
from ..sites import Site
from .apply import apply_edits, load_tensors, relative, replace_submodule
from .supernode import HOST, Supernode


class Supernet:
    """A lifted copy of a model. With every gate at the host it computes exactly what the original does (law 1)."""

    def __init__(self, model: nn.Module, nodes: dict[str, Supernode]) -> None:
        self.model, self.nodes = model, nodes

    def branch(self, site: Site, option: Option) -> nn.Module:
        """Build what `option` puts at `site`: its edits and tensors, run on a copy of the host alone."""
        return realise(option, self.nodes[site.path].host, site.path)

    def branches(self, choices: Mapping[str, Option]) -> dict[str, nn.Module]:
        """{site path: branch} of every choice other than the host."""
        return {path: realise(option, self.nodes[path].host, path) for path, option in choices.items() if option.edits}

    @contextmanager
    def pinned(self, choices: Mapping[str, nn.Module]) -> Iterator[nn.Module]:
        """Run with these branches at these sites and the host elsewhere; all gates return to the host afterwards."""
        for path, branch in choices.items():
            self.nodes[path].add("pinned", branch)
            self.nodes[path].gate = "pinned"
        try:
            yield self.model
        finally:
            for path in choices:
                self.nodes[path].remove("pinned")


def lift(model: nn.Module, sites: Iterable[Site | str]) -> Supernet:
    """Copy `model` and put a Supernode at every site (or module path); the original is not touched."""
    lifted = copy.deepcopy(model)
    nodes: dict[str, Supernode] = {}
    for site in sites:
        path = site if isinstance(site, str) else site.path
        node = Supernode(lifted.get_submodule(path)).train(lifted.training)
        replace_submodule(lifted, path, node)
        nodes[path] = node
    return Supernet(lifted, nodes)


def realise(option: Option, host: nn.Module, path: str) -> nn.Module:
    """The module that `option` leaves at `path`, built from a copy of the host."""
    holder = nn.Module()
    holder._modules["site"] = copy.deepcopy(host)
    edits = [edit.model_copy(update={"path": _rebase(edit.path, path)}) for edit in option.edits]
    apply_edits(holder, edits)
    tensors = {_rebase(name, path): value for name, value in option.tensors().items()}
    load_tensors(holder, tensors)
    site: nn.Module = holder._modules["site"]  # type: ignore[assignment]
    return site


def _rebase(path: str, root: str) -> str:
    inner = relative(path, root)
    return f"site.{inner}" if inner else "site"


@torch.no_grad()
def max_difference(found: Tensor, expected: Tensor) -> tuple[float, float]:
    """(largest |difference|, the tolerance of the laws: 1e-5 max(1, max|expected|))."""
    return float((found - expected).abs().max()), 1e-5 * max(1.0, float(expected.abs().max()))


__all__ = ["HOST", "Supernet", "Supernode", "lift", "max_difference", "realise"]
