"""model -> supernet: a copy of the model with a Supernode at every site."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..options import Option
from ..plan import Edit, Replace, Shorten, Slice, Wrap
from ..sites import FFNSite, Site
from .apply import apply_edits, load_tensors, relative, replace_submodule, submodule
from .supernode import HOST, Supernode


@dataclass(frozen=True)
class Wrapping:
    """A branch that runs on merged tokens; `inner` is None where that is the host."""

    wrap: Wrap
    inner: Branch | None


@dataclass(frozen=True)
class InPlace:
    """A branch in the place of a whole FFN, and not of its output layer alone."""

    path: str
    module: nn.Module


Branch = nn.Module | Wrapping | InPlace | Shorten


class Supernet:
    """A lifted copy of a model. With every gate at the host it computes exactly what the original does (law 1).

    Args:
        model: the lifted copy.
        sites, nodes: {site path: site}, {site path: its supernode}.
    """

    def __init__(self, model: nn.Module, sites: dict[str, Site], nodes: dict[str, Supernode]) -> None:
        self.model, self.sites, self.nodes = model, sites, nodes

    def branch(self, option: Option) -> Branch:
        """Build what `option` puts at its site: its edits and tensors, run on a copy of the host alone."""
        if option.site not in self.sites:
            (shorten,) = option.edits
            assert isinstance(shorten, Shorten)
            return shorten
        if option.inner is not None:
            wrap = option.edits[-1]
            assert isinstance(wrap, Wrap)
            return Wrapping(wrap, self.branch(option.inner) if option.inner.edits else None)
        site = self.sites[option.site]
        if isinstance(site, FFNSite) and isinstance(option.edits[0], Replace):
            host = submodule(self.model, site.path)
            return InPlace(site.path, edited(host, site.path, option.edits, option.tensors()))
        return realise(option, site, self.nodes[option.site].host)

    def branches(self, choices: Mapping[str, Option]) -> dict[str, Branch]:
        """{site path: branch} of every choice other than the host."""
        return {path: self.branch(option) for path, option in choices.items() if option.edits}

    @contextmanager
    def pinned(self, choices: Mapping[str, Branch]) -> Iterator[nn.Module]:
        """Run with these branches at these sites and the host elsewhere; all gates return to the host afterwards."""
        with ExitStack() as stack:
            for path, branch in choices.items():
                self._pin(path, branch, stack)
            yield self.model

    def _pin(self, path: str, branch: Branch, stack: ExitStack) -> None:
        if isinstance(branch, Shorten):
            blocks = submodule(self.model, path)
            replace_submodule(self.model, path, branch.spec.build(blocks).train(blocks.training))
            stack.callback(replace_submodule, self.model, path, blocks)
            return
        if isinstance(branch, InPlace):
            stack.callback(replace_submodule, self.model, branch.path, submodule(self.model, branch.path))
            replace_submodule(self.model, branch.path, branch.module)
            return
        if isinstance(branch, Wrapping):
            if branch.inner is not None:
                self._pin(path, branch.inner, stack)
            wrap = branch.wrap
            bare = submodule(self.model, wrap.path)
            replace_submodule(self.model, wrap.path, wrap.spec.build(bare, wrap.io).train(bare.training))
            stack.callback(replace_submodule, self.model, wrap.path, bare)
            return
        self.nodes[path].add("pinned", branch)
        self.nodes[path].gate = "pinned"
        stack.callback(self.nodes[path].remove, "pinned")


def lift(model: nn.Module, sites: Iterable[Site]) -> Supernet:
    """Copy `model` and put a Supernode at every attention and at the output layer of every FFN.

    The original is not touched.
    """
    lifted, found = copy.deepcopy(model), {site.path: site for site in sites}
    nodes: dict[str, Supernode] = {}
    for path, site in found.items():
        place = _place(site)
        nodes[path] = Supernode(lifted.get_submodule(place)).train(lifted.training)
        replace_submodule(lifted, place, nodes[path])
    return Supernet(lifted, found, nodes)


def realise(option: Option, site: Site, host: nn.Module) -> nn.Module:
    """What `option` leaves of the host of `site`'s supernode, built from a copy."""
    place = _place(site)
    edits = [edit for edit in option.edits if edit.path.startswith(f"{place}.") or edit.path == place]
    branch = edited(host, place, edits, option.tensors())
    if isinstance(site, FFNSite):
        (read,) = (edit for edit in edits if isinstance(edit, Slice))
        return Selective(branch, [unit for start, stop in read.kept for unit in range(start, stop)])
    return branch


def edited(
    host: nn.Module, place: str, edits: Iterable[Edit], tensors: Mapping[str, Tensor] | None = None
) -> nn.Module:
    """What edits leave of a copy of the module at `place`, with these values where they are given."""
    holder, edits = nn.Module(), tuple(edits)
    replaced = bool(edits) and isinstance(edits[0], Replace) and edits[0].path == place  # nothing of it is left
    holder._modules["host"] = host if replaced else copy.deepcopy(host)
    apply_edits(holder, [edit.model_copy(update={"path": _rebase(edit.path, place)}) for edit in edits])
    load_tensors(holder, {_rebase(name, place): value for name, value in (tensors or {}).items()})
    found: nn.Module = holder._modules["host"]  # type: ignore[assignment]
    return found


class Selective(nn.Module):
    """A layer that listens to some of its inputs only: a narrowed FFN before anything is cut.

    Args:
        layer: a Linear or a 1 x 1 convolution of `len(kept)` inputs.
        kept: which of the hidden units they are.
    """

    kept: Tensor

    def __init__(self, layer: nn.Module, kept: list[int]) -> None:
        super().__init__()
        self.layer = layer
        weight: Any = layer.weight
        self.register_buffer("kept", torch.tensor(kept, device=weight.device), persistent=False)

    def forward(self, hidden: Tensor) -> Tensor:
        channels = 1 if isinstance(self.layer, nn.Conv2d) else -1
        out: Tensor = self.layer(hidden.index_select(channels, self.kept))
        return out


def _place(site: Site) -> str:
    return site.reader if isinstance(site, FFNSite) else site.path


def _rebase(path: str, root: str) -> str:
    inner = relative(path, root)
    return f"host.{inner}" if inner else "host"


@torch.no_grad()
def max_difference(found: Tensor, expected: Tensor) -> tuple[float, float]:
    """(largest |difference|, the tolerance of the laws: 1e-5 max(1, max|expected|))."""
    return float((found - expected).abs().max()), 1e-5 * max(1.0, float(expected.abs().max()))


__all__ = ["HOST", "Supernet", "Supernode", "edited", "lift", "max_difference", "realise"]
