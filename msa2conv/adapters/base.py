"""The adapter protocol, and the walk that turns adapters' claims into Sites: collect, check, then hand over."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from torch import nn

from ..errors import ConflictingClaims, NoSitesFound
from ..observation import Observation
from ..sites import AttentionSite, Claims, Refusal, listed

NO_ATTENTION = "no attention module at all"


class Adapter(Protocol):
    """Finds the Sites of one family of backbones.

    `claims` looks at the model and at one observed forward pass and returns what it recognises; a module that it must
    leave alone goes into `refusals` with the reason. It returns empty Claims for a model that is not its own.
    """

    @property
    def name(self) -> str:
        """Of the family, for messages."""
        ...

    def claims(self, model: nn.Module, seen: Observation) -> Claims: ...


def default_adapters() -> tuple[Adapter, ...]:
    """The built-in adapters."""
    from .huggingface import TRANSFORMERS
    from .pytorch import TORCH, TORCHVISION
    from .timm import TIMM

    return (TIMM, TRANSFORMERS, TORCHVISION, TORCH)


def find_sites(model: nn.Module, seen: Observation, adapters: Iterable[Adapter] | None = None) -> Claims:
    """Ask every adapter; return all Sites in execution order.

    Raises:
        NoSitesFound: no attention was claimed; the message lists what was seen and why it was refused. A model whose
            attentions are all left for known reasons may still lose hidden units.
        ConflictingClaims: two adapters claim the same module.
    """
    adapters = tuple(default_adapters() if adapters is None else adapters)
    owners: dict[str, str] = {}
    found: list[Claims] = []
    for adapter in adapters:
        claims = adapter.claims(model, seen)
        for site in claims.sites:
            if site.path in owners:
                raise ConflictingClaims(
                    site.path,
                    f"claims of both {owners[site.path]!r} and {adapter.name!r}",
                    "one adapter for one module",
                    "Pass adapters=[...] with only one of them.",
                )
            owners[site.path] = adapter.name
        found.append(claims)
    unknown = tuple(_unknown(model, seen, found))
    found.append(Claims((), unknown))
    order = {path: index for index, path in enumerate(seen.calls)}
    sites = sorted((site for claims in found for site in claims.sites), key=lambda site: order[site.path])
    refusals = tuple(refusal for claims in found for refusal in claims.refusals)
    attentions = any(isinstance(site, AttentionSite) for site in sites)
    if not attentions and (unknown or not sites or not refusals):
        raise NoSitesFound(
            type(model).__name__,
            _describe(refusals),
            f"an attention that one of the adapters ({', '.join(adapter.name for adapter in adapters)}) knows",
            "Let msa2conv.discover(model) propose one, or write it (CONTRIBUTING.md), and pass adapters=[yours].",
        )
    return Claims(tuple(sites), refusals)


def _unknown(model: nn.Module, seen: Observation, found: list[Claims]) -> list[Refusal]:
    """Attentions by their class name that ran, and that no adapter has claimed or refused, nor anything around them."""
    known = [item.path for claims in found for item in (*claims.sites, *claims.refusals)]
    return [
        Refusal(path, type(module).__name__, "an attention that no adapter knows")
        for path, module in model.named_modules()
        if path in seen.calls
        and any(name in type(module).__name__.lower() for name in ("attention", "attn"))
        and not any(f"{path}.".startswith(f"{other}.") or other.startswith(f"{path}.") for other in known)
    ]


def _describe(refusals: tuple[Refusal, ...]) -> str:
    return "; ".join(listed(refusals)) or NO_ATTENTION
