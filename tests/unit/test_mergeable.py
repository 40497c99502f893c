"""Where tokens can be merged is tried out: what is found, what is refused, and that names alone convince nobody."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backbones import build, images
from conftest import Case, case_of
from torch import Tensor, nn

import msa2conv
from msa2conv.layouts import Layout
from msa2conv.observation import Observation, observe
from msa2conv.ops import IO, Sizes
from msa2conv.sites import AttentionSite, FFNSite, Site, Units
from msa2conv.transforms.mergeable import with_merging

PLACES = "it treats patches differently by their places"
FEWER = "it does not run on fewer tokens"
OTHERS = "a token's answer depends on other tokens or on its place"


class Net(nn.Module):
    """One module on random tokens [1, 17, 8]."""

    def __init__(self, mixer: nn.Module) -> None:
        super().__init__()
        self.stem, self.mixer = nn.Conv2d(3, 8, 8, 8), mixer

    def forward(self, x: Tensor) -> Tensor:
        patches = self.stem(x).flatten(2).transpose(1, 2)
        return self.mixer(torch.cat((patches[:, :1], patches), 1))


class Softmax(nn.Module):
    """Attention with what a mask may be called, and how it is laid out."""

    def __init__(self, biased: bool = False, boolean: bool = False) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(8, 8), nn.Linear(8, 8)
        self.bias = nn.Parameter(torch.randn(17, 17)) if biased else None
        self.boolean = boolean

    def forward(self, x: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        scores = self.q(x) @ self.k(x).transpose(1, 2)
        if self.bias is not None:
            scores = scores + self.bias[: x.shape[1], : x.shape[1]]
        if key_padding_mask is not None:
            mask = key_padding_mask[:, None]
            scores = scores.masked_fill(mask.bool(), -torch.inf) if self.boolean else scores + mask
        return scores.softmax(-1) @ x


def merging_of(mixer: nn.Module, site: Site, **kwargs: Any) -> tuple[Site, dict[str, str]]:
    model = Net(mixer).eval()
    seen: Observation = observe(model, torch.randn(1, 3, 32, 32))
    sites, refused = with_merging(model, [site], seen)
    return sites[0], refused


LAYOUT = Layout(grid=(4, 4), prefix=1)
ATTENTION = AttentionSite("mixer", "mixer", 8, 1, 8, LAYOUT, IO())
FFN = FFNSite("mixer", "mixer", 8, 16, LAYOUT, "2", Units((("0.weight", 0), ("0.bias", 0), ("2.weight", 1))))


def test_a_softmax_that_takes_an_additive_mask_is_told_sizes() -> None:
    site, refused = merging_of(Softmax(), ATTENTION)
    assert not refused and site.merging is not None
    assert site.merging.sizes == Sizes(argument="key_padding_mask", shape="b n")
    assert (site.merging.prefix, site.merging.groups, site.merging.count) == (1, 1, 16)


def test_a_boolean_mask_is_not_taken_for_an_additive_one() -> None:
    site, _ = merging_of(Softmax(boolean=True), ATTENTION)
    assert site.merging is not None and site.merging.sizes is None


def test_a_table_of_positions_is_noticed_by_what_it_does() -> None:
    site, refused = merging_of(Softmax(biased=True), ATTENTION)
    assert site.merging is None and refused == {"mixer": PLACES}


def test_an_ffn_that_looks_around_is_no_ffn() -> None:
    class Shift(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) + x.roll(1, 1)

    pointwise = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
    assert merging_of(pointwise, FFN)[0].merging is not None
    assert merging_of(Shift(), FFN)[1] == {"mixer": OTHERS}


EXPECTED = {  # (attentions, FFNs) that can run on merged tokens, and why others cannot
    "vit": (3, 3, set()),
    "qk_norm": (3, 3, set()),
    "registers": (3, 3, set()),
    "foreign": (3, 3, set()),
    "swin": (
        0,
        4,
        {"it does not run on fewer tokens (RuntimeError)", "it is called with 'mask', which speaks of places"},
    ),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_what_is_found(name: str) -> None:
    case, (attentions, ffns, reasons) = case_of(name), EXPECTED[name]
    able = [site for site in case.seen.claims.sites if site.merging is not None]
    assert sum(isinstance(site, AttentionSite) for site in able) == attentions
    assert len(able) - attentions == ffns
    assert set(case.seen.unmerged.values()) == reasons
    assert f"tokens can be merged in {attentions} attentions and {ffns} FFNs" in str(case.seen)
    assert all(f"): {reason}" in str(case.seen) for reason in reasons)


STRANGERS = {  # reasons of attentions, by family
    "eva": "it is called with 'rope', which speaks of places",
    "beit": FEWER,
    "convit": FEWER,
    "mvitv2": FEWER,
}


@pytest.mark.parametrize("name", STRANGERS)
def test_positions_between_query_and_key_are_refused_by_name(name: str) -> None:
    seen = msa2conv.inspect(build(name), example_inputs=images(name, 1))
    reasons = {seen.unmerged.get(site.path, "none") for site in seen.claims.attentions}
    assert any(reason.startswith(STRANGERS[name]) for reason in reasons), reasons


def test_sizes_are_told_where_the_host_listens(case: Case) -> None:
    for site in case.seen.claims.attentions:
        if site.merging is not None:
            expected = None if case.name == "foreign" else Sizes(argument="attn_mask")
            assert site.merging.sizes == expected


def test_thousands_of_tokens_are_compared_in_parts() -> None:
    for patches, groups in ((196, 1), (256, 1), (576, 3), (3136, 14), (1369, 37)):
        from msa2conv.transforms.mergeable import _group

        count = _group(patches)
        assert (count is None) == (patches == 1369)
        assert count is None or patches // count == groups
