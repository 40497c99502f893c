"""What a lever is: it gathers statistics at a site while images stream by and turns them into a Record of Options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Protocol

import torch
from pydantic import AfterValidator, Field
from torch import Tensor, nn

from ..cost import CostModel
from ..ops import Attend, AttendMixer
from ..options import Option
from ..sites import AttentionSite, FFNSite, Site


def between(keep: tuple[float, ...], of: str) -> tuple[float, ...]:
    """The same, if all are fractions; of what, for the error."""
    for fraction in keep:
        if not 0 < fraction < 1:
            raise ValueError(f"{fraction} is no fraction of the {of}: use numbers between 0 and 1")
    return keep


def _of_patches(keep: tuple[float, ...]) -> tuple[float, ...]:
    return between(keep, "patches")


Fractions = Annotated[tuple[float, ...], Field(min_length=1), AfterValidator(_of_patches)]


def host_option(site: Site, costs: CostModel) -> Option:
    """The option that leaves the site as it is."""
    name = f"{site.hidden}/{site.hidden}" if isinstance(site, FFNSite) else "attention"
    flops_on = None if site.merging is None else lambda tokens: costs.on(site, tokens)
    return Option(site.path, name, costs.hosts[site.path], score=0.0, flops_on=flops_on)


def is_plain(site: AttentionSite) -> bool:
    """Whether the site states all of a plain softmax attention."""
    return site.projections is not None and site.projections.plain


def attention_weights(site: AttentionSite, host: nn.Module) -> dict[str, Tensor]:
    """The host's own q, k, v and proj of a plain attention, by the names of `Attend` and `AttendPrefix`.

    Biases of q and v are there if it has both; the one of k is not, since it cancels in the softmax.
    """
    named = site.projections
    assert named is not None and named.q is not None and named.k is not None
    (q, q_bias), (k, _), (v, v_bias), (out, out_bias) = (
        rows.read(host) for rows in (named.q, named.k, named.v, named.out)
    )
    values = {"q.weight": q, "k.weight": k, "v.weight": v, "proj.weight": out}
    values["proj.bias"] = torch.zeros(site.dim) if out_bias is None else out_bias
    if q_bias is not None and v_bias is not None:
        values |= {"q.bias": q_bias, "v.bias": v_bias}
    return {name: value.detach().float().cpu() for name, value in values.items()}


def whole_attention(site: AttentionSite, host: nn.Module) -> tuple[Attend, AttendMixer]:
    """The host's own weights in an `Attend` mixer of its size, and its spec."""
    named, merging = site.projections, site.merging
    assert named is not None and named.scale is not None and merging is not None
    weights = attention_weights(site, host)
    spec = Attend(
        arrangement=merging.arrangement,
        dim=site.dim,
        heads=named.heads,
        qk_dim=named.head_dim,
        v_dim=named.head_dim,
        scale=named.scale,
        bias="q.bias" in weights,
        sizes=merging.sizes,
    )
    mixer = AttendMixer(spec, site.io)
    mixer.load_state_dict(weights)
    return spec, mixer.requires_grad_(False).eval()


class Alone:
    """A lever or a record that makes nothing of other options."""

    def around(self, *_: object) -> list[Option]:
        return []


class Record(Protocol):
    """All Options of one site, fitted; savable as JSON + tensors."""

    @property
    def at(self) -> Site:
        """The site."""
        ...

    @property
    def site(self) -> str:
        """Path of the site."""
        ...

    def options(self) -> list[Option]:
        """Every option, the host among them, with interpolated scores where not every one was measured."""
        ...

    def around(self, options: Sequence[Option]) -> list[Option]:
        """What this lever makes of other options at the site, its own and other levers'; of most levers nothing."""
        ...

    def to_measure(self) -> list[Option]:
        """The options whose score has to be measured on the network."""
        ...

    def with_scores(self, scores: Mapping[str, float]) -> Record:
        """A copy that holds the measured {option name: score}."""
        ...

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """(JSON-able description, tensors)."""
        ...


class Statistics(Protocol):
    """Streaming sums over activations of one site.

    Args:
        whole_ffn: listens to a whole FFN, not to its output layer.
    """

    whole_ffn: bool

    def update(self, x: Tensor, out: Tensor) -> None:
        """Add a batch: input (of the output layer of an FFN, its hidden units) and output."""
        ...

    def fit(self, host: nn.Module, costs: CostModel) -> Record:
        """Solve for the options."""
        ...


class Lever(Protocol):
    """A kind of change. `name` is what users write in `levers=(...)`."""

    name: str

    def applies(self, site: Site) -> bool: ...

    def cheapest(self, site: Site, costs: CostModel) -> Option:
        """The cheapest option as far as it is known without fitting anything: no edits, no score."""
        ...

    def around(
        self, option: Option, site: Site, costs: CostModel, scores: Mapping[str, float] | None = None
    ) -> list[Option]:
        """What this lever makes of an option at a site; of most levers nothing."""
        ...

    def memory(self, site: Site) -> int:
        """Bytes that the statistics of one site take."""
        ...

    def statistics(self, site: Site, host: nn.Module, prefix_weight: float, ridge_factor: float) -> Statistics:
        """Empty sums.

        Args:
            site: the site.
            host: the attention, or the output layer of an FFN.
            prefix_weight: weight of a prefix row against a patch row.
            ridge_factor: multiplies ridges.
        """
        ...
