"""Look at a model: what could be changed, and what budgets can be reached."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from torch import Tensor, nn

from .adapters.base import Adapter, find_sites
from .adapters.discovery import Discovery, propose
from .cost import CostModel
from .levers import Lever, floor, resolve_levers, width_of
from .observation import observe
from .plan import WHOLE, parameter_count
from .report.inspection import Inspection
from .sites import WidthGroup
from .transforms.heads import with_heads
from .transforms.lift import edited
from .transforms.mergeable import with_merging
from .transforms.streams import find_stream
from .transforms.widths import find_width
from .workbench import example_input, own_randomness, unwrap, working_copy

Levers = str | Lever | Iterable[str | Lever]


@own_randomness()
def inspect(
    model: nn.Module,
    *,
    example_inputs: Tensor | None = None,
    levers: Levers | None = None,
    adapters: Iterable[Adapter] | None = None,
) -> Inspection:
    """Show every attention found, its geometry, where the FLOPs are, and what budget can be reached. Changes nothing.

    Args:
        model: any module; timm's backbones are known, others take an adapter.
        example_inputs: a float tensor [B, C, H, W]; by default noise of the size the model declares.
        levers: what may change; decides the floor.
        adapters: who looks for sites; the built-in ones by default.

    Raises:
        NoSitesFound: lists what was seen and why each candidate was refused.
        InvalidInput: the model cannot run on the input.
        NonFiniteValue: NaN or Inf in the weights.
    """
    work = working_copy(unwrap(model))
    return inspect_copy(work, unwrap(model), example_input(work, example_inputs), resolve_levers(levers), adapters)


@own_randomness()
def discover(model: nn.Module, *, example_inputs: Tensor | None = None) -> Discovery:
    """Propose how an unknown backbone would be declared. Changes nothing, and nothing is converted until you agree.

    One forward pass is traced: the innermost module that maps a grid of tokens to itself through a softmax over its
    positions is an attention, and modules whose hidden units can be dropped are FFNs. Windows, and arguments that a
    convolution would have to honour, are named and left for you to declare.

    Args:
        model: any module.
        example_inputs: a float tensor [B, C, H, W]; by default noise of the size the model declares.

    Returns:
        A Discovery: `print` it for the declaration to paste; `.adapter` is that declaration.

    Raises:
        NoSitesFound: nothing mixes a map by a softmax in a module of its own.
        InvalidInput, NonFiniteValue: as `inspect`.

    Example:
        proposal = msa2conv.discover(model, example_inputs=torch.zeros(1, 3, 224, 224))
        print(proposal)
        result = msa2conv.convert(model, 0.7, adapters=[proposal.adapter], data=images)
    """
    work = working_copy(unwrap(model))
    return propose(work, observe(work, example_input(work, example_inputs)))


def inspect_copy(
    work: nn.Module, original: nn.Module, example: Tensor, levers: tuple[Lever, ...], adapters: Iterable[Adapter] | None
) -> Inspection:
    """`inspect` on a working copy that the caller has made."""
    seen = observe(work, example)
    claims = find_sites(work, seen, adapters)
    sites, unmerged = with_merging(work, claims.sites, seen)
    sites = with_heads(work, sites, seen)
    stream = find_stream(work, sites, seen)
    claims = replace(claims, sites=sites, stream=None if isinstance(stream, str) else stream)
    costs = CostModel.measure(work, seen, claims.sites, claims.stream)
    width = width_of(levers)
    streams = None if width is None else find_width(work, claims.sites, seen)
    lowest = floor(claims, costs, levers)
    narrower: dict[tuple[int, ...], CostModel] = {}
    if width is not None and isinstance(streams, WidthGroup):
        for channels in width.channels(streams):
            narrow = edited(work, WHOLE, streams.edits(map(range, channels)))  # which are left does not matter
            own = claims.of_width(streams.left(channels))
            narrower[channels] = CostModel.measure(narrow, observe(narrow, example), own.sites, own.stream)
            lowest = min(lowest, floor(own, narrower[channels], levers))
    return Inspection(
        name=_name(original),
        claims=claims,
        costs=costs,
        floor=lowest,
        input_size=tuple(example.shape[1:]),
        parameters=parameter_count(original),
        unmerged=unmerged,
        not_through=stream if isinstance(stream, str) else None,
        width=streams,
        narrower=narrower,
    )


def _name(model: nn.Module) -> str:
    config = getattr(model, "pretrained_cfg", None) or {}
    return str(config.get("architecture") or type(model).__name__)


__all__ = ["Inspection", "Levers", "discover", "inspect", "inspect_copy"]
