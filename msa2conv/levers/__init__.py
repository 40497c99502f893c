"""Levers: what can be done at a site. One lever, one file; each turns activations into fitted Options."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from ..cost import CostModel
from ..errors import InvalidArgument
from ..options import Option
from ..settings import AS_IT_IS, least_flops
from ..sites import Claims, Site
from .base import Lever, Record, Statistics, host_option
from .ffn import FFN
from .linear_ffn import LinearFFN
from .merge_in_site import MergeInSite
from .merge_tokens import MergeTokens, StreamRecord
from .mixer import Mixer
from .thin_attention import ThinAttention
from .width import Width

Configured = Mixer | FFN | LinearFFN | MergeInSite | ThinAttention | MergeTokens | Width
_BY_NAME: dict[str, type[Configured]] = {
    "mixer": Mixer,
    "ffn": FFN,
    "linear_ffn": LinearFFN,
    "merge_in_site": MergeInSite,
    "thin_attention": ThinAttention,
    "merge_tokens": MergeTokens,
    "width": Width,
}
DEFAULT = ("mixer", "ffn", "linear_ffn", "merge_in_site", "thin_attention", "merge_tokens")  # all that need no training
BY_GATES = ("mixer", "ffn")  # what the gate search can decide
_EXAMPLE = "For example levers=('mixer', 'ffn')."


def resolve_levers(levers: Any, known: Iterable[str] = tuple(_BY_NAME), default: Any = DEFAULT) -> tuple[Lever, ...]:
    """Names or configured levers -> levers.

    Args:
        levers: names, configured levers, or both; "all" stands for every one that needs no training, None for
            `default`.
        known: names of those that can be had.
        default: what None stands for.

    Raises:
        InvalidArgument.
    """
    known = list(known)
    every = [name for name in known if name in DEFAULT]
    wanted = default if levers is None else every if levers == "all" else levers
    if isinstance(wanted, (str, *_BY_NAME.values())):
        wanted = [wanted]
    if not isinstance(wanted, Iterable):
        raise InvalidArgument("levers", repr(levers), "names or levers", _EXAMPLE)
    resolved: list[Any] = []
    for lever in wanted:
        if isinstance(lever, str):
            if lever not in known:
                raise InvalidArgument("levers", repr(lever), f"names out of {sorted(known)} or 'all'", _EXAMPLE)
            lever = _BY_NAME[lever]()
        elif not hasattr(lever, "applies") or (lever.name not in known and lever.name in _BY_NAME):
            raise InvalidArgument("levers", repr(lever), f"names out of {sorted(known)}, or a lever", _EXAMPLE)
        resolved.append(lever)
    names = [lever.name for lever in resolved]
    if not resolved or len(set(names)) < len(names):
        raise InvalidArgument("levers", repr(names), "at least one lever, each once", _EXAMPLE)
    return tuple(resolved)


def stream_record(claims: Claims, costs: CostModel, levers: Iterable[Any]) -> StreamRecord | None:
    """What the levers allow to do with the tokens of the whole network."""
    lever = next((lever for lever in levers if isinstance(lever, MergeTokens)), None)
    return None if lever is None else lever.record(claims, costs)


def width_of(levers: Iterable[Any]) -> Width | None:
    """The lever that makes the model narrower, if it is among these."""
    return next((lever for lever in levers if isinstance(lever, Width)), None)


def floor(claims: Claims, costs: CostModel, levers: Iterable[Lever]) -> int:
    """Multiply-adds below which the levers cannot go."""
    levers = tuple(levers)
    options = {site.path: _cheapest(site, costs, levers) for site in claims.sites}
    record = stream_record(claims, costs, levers)
    settings = [AS_IT_IS, *(() if record is None else record.settings())]
    rest = costs.outside(options)
    return least_flops(settings, options, rest)


def _cheapest(site: Site, costs: CostModel, levers: tuple[Lever, ...]) -> list[Option]:
    able = [lever for lever in levers if lever.applies(site)]
    cheapest = [host_option(site, costs), *(lever.cheapest(site, costs) for lever in able)]
    return cheapest + [more for one in cheapest for lever in able for more in lever.around(one, site, costs)]


def read_record(
    site: Site | None, costs: CostModel, meta: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> Record | None:
    """What `Record.state()` described, at the site it was made for; None where site and lever do not go together."""
    lever = _BY_NAME.get(meta["lever"])
    if lever is None or site is None or not lever().applies(site):
        return None
    record: Record = lever.read(site, costs, meta, tensors)  # type: ignore[arg-type, union-attr]
    return record


__all__ = [
    "BY_GATES",
    "DEFAULT",
    "FFN",
    "Lever",
    "LinearFFN",
    "MergeInSite",
    "MergeTokens",
    "Mixer",
    "Record",
    "Statistics",
    "StreamRecord",
    "ThinAttention",
    "Width",
    "floor",
    "host_option",
    "read_record",
    "resolve_levers",
    "stream_record",
    "width_of",
]
