"""`inspect`: every attention found, its geometry, where the FLOPs are, floor and ceiling."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..cost import CostModel
from ..layouts import APART
from ..sites import AttentionSite, Claims, FFNSite, Refusal, WidthGroup, listed


@dataclass(frozen=True)
class Inspection:
    """What msa2conv sees in a model; `print` it.

    Args:
        name: of the model.
        claims: sites and refusals.
        costs: multiply-adds, one forward pass at batch 1.
        floor: multiply-adds below which the allowed levers cannot go; the ceiling is `costs.base`.
        input_size: (C, H, W).
        parameters: number of parameters.
        unmerged: {site path: why its tokens cannot be merged}.
        not_through: why tokens cannot be merged through the network; None where they can.
        width: the residual streams that can get narrower, or why they cannot; None where the levers do not ask.
        narrower: {channels left of every stream: multiply-adds of the network that has so many}, the widest first.
    """

    name: str
    claims: Claims
    costs: CostModel
    floor: int
    input_size: tuple[int, ...]
    parameters: int
    unmerged: Mapping[str, str] = field(default_factory=dict)
    not_through: str | None = None
    width: WidthGroup | str | None = None
    narrower: Mapping[tuple[int, ...], CostModel] = field(default_factory=dict)

    def share(self, kind: type[AttentionSite] | type[FFNSite]) -> float:
        """Fraction of all multiply-adds spent in the sites of one kind."""
        return sum(self.costs.hosts[s.path] for s in self.claims.sites if isinstance(s, kind)) / self.costs.base

    @property
    def warnings(self) -> list[str]:
        """What the user should know before anything is converted."""
        if self.claims.attentions:
            return []
        reasons = "; ".join(listed(self.claims.refusals))
        return [f"no attention can become a convolution, only FFNs can be narrowed: {reasons}"]

    def __str__(self) -> str:
        base = self.costs.base
        width = max(28, *(len(site.path) for site in self.claims.sites))
        size = " x ".join(map(str, self.input_size))
        lines = [
            f"{self.name}   {base / 1e9:.3f} GFLOPs (multiply-adds, batch 1)"
            f"   {self.parameters / 1e6:.2f} M params   {size}",
            f"attention {self.share(AttentionSite):.1%}   ffn {self.share(FFNSite):.1%}"
            f"   rest {self.costs.rest / base:.1%}",
            f"reachable: {self.floor / 1e9:.3f} (floor, {self.floor / base:.1%}) to {base / 1e9:.3f} GFLOPs",
            "",
            f"{'site':<{width}} {'kind':<10} {'MFLOPs':>8}  geometry",
        ]
        for site in self.claims.sites:
            flops = self.costs.hosts[site.path] / 1e6
            if isinstance(site, AttentionSite):
                lines.append(f"{site.path:<{width}} {'attention':<10} {flops:8.1f}  {_geometry(site)}")
            else:
                lines.append(
                    f"{site.path:<{width}} {'ffn':<10} {flops:8.1f}  {site.dim} -> {site.hidden} -> {site.dim}"
                )
        lines += ["", *self._mergeable()]
        if self.width is not None:
            lines += [self._narrower(self.width)]
        if self.claims.refusals:
            lines += ["", "left as they are:"]
            lines += [f"  {text}" for text in listed(self.claims.refusals)]
        return "\n".join(lines)

    def _narrower(self, width: WidthGroup | str) -> str:
        if isinstance(width, str):
            return f"the model cannot be made narrower: {width}"
        return f"the model can be made narrower than {', '.join(str(each.channels) for each in width.streams)} channels"

    def _mergeable(self) -> list[str]:
        able = [site for site in self.claims.sites if site.merging is not None]
        attentions = sum(isinstance(site, AttentionSite) for site in able)
        lines = [f"tokens can be merged in {attentions} attentions and {len(able) - attentions} FFNs"]
        kinds = {site.path: "attention" if isinstance(site, AttentionSite) else "ffn" for site in self.claims.sites}
        refused = [Refusal(path, kinds[path], reason) for path, reason in self.unmerged.items()]
        lines += [f"  not in {text}" for text in listed(refused)]
        stream = self.claims.stream
        if stream is None:
            return [*lines, f"tokens cannot be merged through the network: {self.not_through}"]
        return [
            *lines,
            f"tokens can be merged through the network, behind any attention of {stream.path}",
        ]


def _geometry(site: AttentionSite) -> str:
    layout = site.layout
    text = f"{site.heads} heads x {site.head_dim}, grid {layout.grid[0]} x {layout.grid[1]}"
    if layout.prefix:
        text += f" + {layout.prefix} prefix"
    if layout.window:
        kind = "dilated windows" if layout.map == APART else "windows"
        text += f", {kind} {layout.window[0]} x {layout.window[1]}"
    if any(layout.shift):
        text += f", shifted by {layout.shift[0]}, {layout.shift[1]}"
    return text
