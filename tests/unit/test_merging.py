"""Merging inside a site, against a loop over tokens, and where it must change nothing."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn

from msa2conv.errors import LayoutMismatch, UnsupportedArgument
from msa2conv.laws import decision_margins
from msa2conv.merging import Merge, Merged, merge, rounds
from msa2conv.ops import IO, Arrangement, Sizes, arranged, as_sequence

IO_TIMM = IO(x="x", positional=("attn_mask", "is_causal"))
SIZES = Sizes(argument="attn_mask")


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def attention(dim: int = 12, heads: int = 3) -> nn.Module:
    from timm.layers import Attention

    torch.manual_seed(0)
    host = Attention(dim, num_heads=heads, qkv_bias=True).eval()
    with torch.no_grad():
        host.qkv.weight *= 4  # a softmax that is not flat
    return host


def by_hand(tokens_MC: Tensor, keep: int) -> list[set[int]]:
    """Which tokens end together: lists and loops, as the paper says it."""
    groups = [{position} for position in range(len(tokens_MC))]
    for _, going in rounds(len(tokens_MC), keep):
        means = [tokens_MC[sorted(group)].mean(0) for group in groups]
        senders, receivers = list(range(0, len(groups), 2)), list(range(1, len(groups), 2))
        best: list[tuple[float, int, int]] = []
        for sender in senders:
            likeness = [float(torch.cosine_similarity(means[sender], means[other], 0)) for other in receivers]
            most = max(range(len(receivers)), key=likeness.__getitem__)
            best.append((likeness[most], sender, receivers[most]))
        gone = sorted(best, reverse=True)[:going]
        stays = sorted(each for each in best if each not in gone)
        for _, sender, receiver in gone:
            groups[receiver] = groups[receiver] | groups[sender]
        # those that stay come first, the least similar one leading, then the receivers
        groups = [groups[sender] for _, sender, _ in stays] + [groups[receiver] for receiver in receivers]
    return groups


@settings(max_examples=60, deadline=None)
@given(count=st.integers(4, 24), share=st.floats(0.05, 0.95), channels=st.integers(2, 8), seed=st.integers(0, 10**6))
def test_who_merges_with_whom_is_what_a_loop_finds(count: int, share: float, channels: int, seed: int) -> None:
    tokens_BMC = noise(2, count, channels, seed=seed).double()
    keep = min(count - 1, max(1, round(share * count)))
    means_BKC, size_BK, row_N, _ = merge(tokens_BMC, 0, 1, rounds(count, keep))
    assert row_N.shape == (2 * count,) and size_BK.shape == (2, keep)
    for image, index_M in enumerate(row_N.reshape(2, count)):
        together = [set((index_M == image * keep + token).nonzero().flatten().tolist()) for token in range(keep)]
        assert sorted(map(sorted, together)) == sorted(map(sorted, by_hand(tokens_BMC[image], keep)))
        for token, group in enumerate(together):
            assert size_BK[image, token] == len(group)
            torch.testing.assert_close(means_BKC[image, token], tokens_BMC[image, sorted(group)].mean(0))


@given(count=st.integers(4, 300), keep=st.integers(1, 299))
def test_at_most_a_third_goes_in_a_round(count: int, keep: int) -> None:
    left, found = count, rounds(count, keep)
    for before, going in found:
        assert before == left and 1 <= going <= max(1, 0.344 * before)
        left -= going
    assert left == min(count, keep)


def test_rounds_are_few_and_alike() -> None:
    assert rounds(196, 131) == [(196, 65)]
    assert rounds(196, 98) == [(196, 58), (138, 40)]
    for count, keep, times in ((196, 69, 3), (196, 39, 4), (196, 20, 6), (256, 128, 2)):
        found = rounds(count, keep)
        assert len(found) == times
        shares = [going / before for before, going in found if before > 30]
        assert max(shares) - min(shares) < 0.06


def twins(prefix: int, pairs: int, dim: int = 12) -> Tensor:
    """Prefix tokens, and patches of which each even one has an equal neighbour: half of them can go unnoticed."""
    patches = noise(2, pairs, dim, seed=1).repeat_interleave(2, 1)
    return torch.cat((noise(2, prefix, dim, seed=2), patches), 1)


@torch.no_grad()
@pytest.mark.parametrize("keep", [23, 20, 16])
def test_equal_tokens_merge_without_a_trace(keep: int) -> None:
    """In the first round, where each can meet its twin: told their sizes, an attention answers as if nothing had been
    merged; untold it does not."""
    host, x = attention(), twins(prefix=2, pairs=12)
    spec = Merge(prefix=2, count=24, keep=keep, sizes=SIZES)
    expected = host(x)
    torch.testing.assert_close(spec.build(host, IO_TIMM)(x), expected, rtol=1e-5, atol=1e-5)
    untold = spec.model_copy(update={"sizes": None}).build(host, IO_TIMM)(x)
    assert float((untold - expected).abs().max()) > 1e-3


@torch.no_grad()
def test_prefix_tokens_are_left_alone() -> None:
    host = nn.Linear(12, 12)
    x = noise(2, 3 + 16, 12)
    out = Merge(prefix=3, count=16, keep=5).build(host, IO(x="input"))(x)
    torch.testing.assert_close(out[:, :3], host(x[:, :3]))
    assert len(out[0, 3:].unique(dim=0)) == 5, "sixteen patches share five answers"


@torch.no_grad()
@pytest.mark.parametrize("arrangement", ["n b c", "b h w c", "b c h w"])
def test_it_does_not_matter_how_tokens_are_arranged(arrangement: Arrangement) -> None:
    class Anywhere(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return arranged(as_sequence(x, arrangement).square(), arrangement, x.shape)

    x = noise(2, 24, 6)
    shape = {"n b c": (24, 2, 6), "b h w c": (2, 4, 6, 6), "b c h w": (2, 6, 4, 6)}[arrangement]
    spec = Merge(arrangement=arrangement, groups=2, count=12, keep=4)
    found = spec.build(Anywhere(), IO())(arranged(x, arrangement, torch.Size(shape)))
    assert found.shape == shape

    class Square(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.square()

    expected = spec.model_copy(update={"arrangement": "b n c"}).build(Square(), IO())(x)
    torch.testing.assert_close(as_sequence(found, arrangement), expected)


@torch.no_grad()
def test_groups_do_not_see_each_other() -> None:
    spec, x = Merge(groups=3, count=8, keep=3), noise(2, 24, 6)
    apart = [Merge(count=8, keep=3).build(nn.Identity(), IO())(part) for part in x.split(8, 1)]
    torch.testing.assert_close(spec.build(nn.Identity(), IO())(x), torch.cat(apart, 1))
    assert (spec.tokens, spec.flops) == (9, 3 * Merge(count=8, keep=3).flops)


def test_comparisons_are_what_is_counted() -> None:
    """8 tokens to 3: rounds of 8, 6 and 4 tokens, 4 x 4, 3 x 3 and 2 x 2 comparisons."""
    from msa2conv.flops import count_flops

    spec = Merge(count=8, keep=3)
    assert rounds(8, 3) == [(8, 2), (6, 2), (4, 1)] and spec.flops == 16 + 9 + 4
    assert count_flops(spec.build(nn.Identity(), IO()), noise(1, 8, 6)) == 6 * spec.flops


class Told(nn.Module):
    """Returns what it is told, as Hugging Face's attentions do."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: dict[str, Any] = {}

    def forward(self, x: Tensor, mask: Tensor | None = None, flag: bool = False) -> tuple[Tensor, None]:
        self.heard = {"mask": mask, "flag": flag}
        return x, None


def test_the_host_is_told_sizes_and_whatever_else_it_was_given() -> None:
    host = Told()
    spec = Merge(prefix=1, count=8, keep=5, sizes=Sizes(argument="mask", shape="b n"))
    out = spec.build(host, IO(returns="tuple", positional=("mask", "flag")))(noise(2, 9, 4), None, flag=True)
    assert isinstance(out, tuple) and out[1] is None and out[0].shape == (2, 9, 4)
    assert host.heard["flag"] is True
    sizes = host.heard["mask"].exp()
    assert sizes.shape == (2, 6) and (sizes[:, 0] == 1).all()
    torch.testing.assert_close(sizes.sum(1), torch.tensor([9.0, 9.0]))


def test_gradients_reach_host_and_tokens() -> None:
    merged, x = Merge(count=8, keep=3).build(nn.Linear(4, 4), IO(x="input")), noise(2, 8, 4).requires_grad_()
    merged(x).square().sum().backward()
    assert x.grad is not None and bool((x.grad != 0).all())
    assert all(parameter.grad is not None for parameter in merged.parameters())


def test_a_mask_from_outside_is_refused() -> None:
    merged = Merge(count=8, keep=3, sizes=SIZES).build(attention(), IO_TIMM)
    text = (
        "Merged.forward: found the argument 'attn_mask'; expected only the tokens 'x'. Merged tokens have no places "
        "that it could speak of: keep this site as it is (exclude it) or call the model without it."
    )
    with pytest.raises(UnsupportedArgument) as caught:
        merged(noise(1, 8, 12), attn_mask=torch.zeros(8, 8))
    assert str(caught.value) == text


def test_another_number_of_tokens_is_refused() -> None:
    merged = Merge(prefix=1, count=8, keep=3).build(nn.Identity(), IO())
    text = (
        "tokens 'b n c': found 8 tokens; expected 9 tokens. A hybrid runs at the image size it was converted for, with "
        "all patches: convert again with example_inputs of the new size, and train it without patch dropout."
    )
    with pytest.raises(LayoutMismatch) as caught:
        merged(noise(1, 8, 4))
    assert str(caught.value) == text


def test_the_rest_is_the_hosts() -> None:
    merged = Merge(count=8, keep=3).build(attention(), IO_TIMM)
    assert merged.num_heads == 3 and isinstance(copy.deepcopy(merged), Merged)
    assert "keep=3, count=8" in repr(merged)


# How clearly it is decided


def test_margins_say_when_rounding_could_decide() -> None:
    """Two receivers equally far from the sender that goes: no margin; moved apart, a margin."""
    clear = torch.tensor([[[1.0, 0.0], [1.0, 0.1], [-1.0, 0.2], [0.0, 1.0]]])
    tied = clear.clone()
    tied[0, 3] = torch.tensor([1.0, -0.1])
    model = Merge(count=4, keep=3).build(nn.Identity(), IO())
    margins = decision_margins(model, torch.cat((clear, tied)))
    assert margins[1] < 1e-6 < 1e-2 < margins[0]
    assert model.watch is None
    assert decision_margins(nn.Identity(), clear).isinf().all(), "nothing merges"


def test_margins_are_those_of_each_image() -> None:
    """Groups of one image are taken together."""
    images = noise(5, 16, 4)
    model = Merge(groups=2, count=8, keep=4).build(nn.Identity(), IO())
    together = decision_margins(model, images)
    torch.testing.assert_close(together, torch.cat([decision_margins(model, image[None]) for image in images]))
