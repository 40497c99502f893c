"""Thinner attentions in closed form: exact where the host is thin already, and better than what ignores activations."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import Case, case_of
from pydantic import ValidationError
from timm.layers import Attention
from torch import Tensor, nn
from versions import NARROW_ATTENTION

from msa2conv import ThinAttention
from msa2conv.cost import CostModel
from msa2conv.layouts import Layout
from msa2conv.levers.thin_attention import AttentionRecord, Thin, whole_attention
from msa2conv.ops import IO, Attend, Sizes
from msa2conv.sites import AttentionSite, Merging, Projections, Rows

DIM, HEADS, WIDTH, COUNT = 24, 4, 6, 17
CALLED = IO(absent=("attn_mask", "is_causal"))


def host_of(seed: int = 0) -> Attention:
    torch.manual_seed(seed)
    host = Attention(DIM, num_heads=HEADS, qkv_bias=True).eval().requires_grad_(False)
    for parameter in host.parameters():
        parameter.copy_(torch.randn(parameter.shape) / (parameter[0].numel() ** 0.5 if parameter.ndim > 1 else 2))
    host.qkv.weight[: 2 * DIM] *= 2  # a softmax that is not flat
    return host


def site_of(host: Attention) -> AttentionSite:
    inner = HEADS * WIDTH
    q, k, v = (Rows("qkv", part * inner, (part + 1) * inner) for part in range(3))
    named = Projections(v, Rows("proj"), HEADS, WIDTH, q, k, float(host.scale))
    merging = Merging("b n c", 1, 1, COUNT - 1, IO(positional=("attn_mask", "is_causal")), Sizes(argument="attn_mask"))
    layout = Layout(grid=(4, 4), prefix=1)
    return AttentionSite("attn", "attn", DIM, HEADS, WIDTH, layout, CALLED, named, merging)


def pictures(count: int = 300, seed: int = 1) -> Tensor:
    """Tokens whose channels are far from equally strong."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(DIM, DIM, generator=torch.Generator().manual_seed(99)) * torch.logspace(0, -2, DIM)
    return torch.randn(count, COUNT, DIM, generator=generator) @ mixing + 0.3


def fitted(host: nn.Module, site: AttentionSite, lever: ThinAttention, prefix_weight: float = 1.0) -> AttentionRecord:
    costs = CostModel(10**9, {"attn": 10**8}, {}, {"attn": (1, COUNT, DIM)})
    statistics = lever.statistics(site, host, prefix_weight, 1.0)
    for batch in pictures().split(100):
        statistics.update(batch, host(batch))
    return statistics.fit(host, costs)


def error(candidate: Thin, host: nn.Module, rows: slice = slice(None)) -> float:
    """On other tokens, relative to the variance of the host's output."""
    mixer = candidate.spec.build(CALLED)
    mixer.load_state_dict(dict(candidate.tensors))
    x = pictures(50, seed=2)
    expected, found = host(x)[:, rows], mixer(x)[:, rows].detach()
    return float((found - expected).square().sum() / (expected - expected.mean((0, 1))).square().sum())


def shares(*each: tuple[float, float, float]) -> ThinAttention:
    return ThinAttention(shares=each, ridge=1e-8)


def test_all_of_it_is_the_host_itself() -> None:
    host = host_of()
    _, whole = whole_attention(site_of(host), host)
    x = pictures(3)
    torch.testing.assert_close(whole(x), host(x), rtol=1e-5, atol=1e-5)
    mask = torch.zeros(3, 1, 1, COUNT)
    mask[..., 5] = 2.0
    torch.testing.assert_close(whole(x, attn_mask=mask), host(x, attn_mask=mask), rtol=1e-5, atol=1e-5)


def test_queries_and_keys_of_low_rank_are_recovered() -> None:
    """Rank 3 of 6, a bias in k that cancels, and one in q that does not."""
    host = host_of()
    weight = host.qkv.weight[: HEADS * WIDTH].reshape(HEADS, WIDTH, DIM)
    weight[:, 3:] = torch.randn(HEADS, 3, 3) @ weight[:, :3]
    host.qkv.bias[:DIM] = (host.qkv.bias[:DIM].reshape(HEADS, WIDTH) * torch.tensor([1.0, 1, 1, 0, 0, 0])).flatten()
    bias = host.qkv.bias[:DIM].reshape(HEADS, WIDTH)
    bias[:, 3:] = 0
    mixing = torch.linalg.lstsq(weight[:, :3].transpose(1, 2), weight[:, 3:].transpose(1, 2)).solution
    bias[:, 3:] = torch.einsum("hij,hi->hj", mixing, bias[:, :3])
    record = fitted(host, site_of(host), shares((1, 0.5, 1), (1, 0.34, 1)))
    exact, narrower = record.candidates
    assert exact.name == "attend4x3x6" and narrower.name == "attend4x2x6"
    assert error(exact, host) < 1e-6 < 1e-4 < error(narrower, host)


def test_values_of_low_rank_are_recovered() -> None:
    host = host_of()
    out = host.proj.weight.reshape(DIM, HEADS, WIDTH)
    out[..., 3:] = 0
    record = fitted(host, site_of(host), shares((1, 1, 0.5), (1, 1, 0.34)))
    assert error(record.candidates[0], host) < 1e-6 < 1e-4 < error(record.candidates[1], host)


@pytest.mark.parametrize("silent", [0, 3])
def test_a_head_that_says_nothing_goes(silent: int) -> None:
    host = host_of()
    host.proj.weight[:, silent * WIDTH : (silent + 1) * WIDTH] = 0
    three, two = fitted(host, site_of(host), shares((0.75, 1, 1), (0.5, 1, 1))).candidates
    assert three.name == "attend3x6x6" and error(three, host) < 1e-6 < 1e-3 < error(two, host)


def test_a_head_that_repeats_another_goes_and_the_other_speaks_for_it() -> None:
    host = host_of()
    for part in range(3):
        rows = slice(part * DIM + WIDTH, part * DIM + 2 * WIDTH)
        host.qkv.weight[rows] = host.qkv.weight[part * DIM : part * DIM + WIDTH]
        host.qkv.bias[rows] = host.qkv.bias[part * DIM : part * DIM + WIDTH]
    (three,) = fitted(host, site_of(host), shares((0.75, 1, 1))).candidates
    assert error(three, host) < 1e-5


def plain_svd(host: Attention, rank: int) -> dict[str, Tensor]:
    """Truncate W_q^T W_k head by head, as if all directions of the tokens were alike."""
    _, whole = whole_attention(site_of(host), host)
    tensors = {name: value.clone() for name, value in whole.state_dict().items()}
    queries, keys = (tensors[f"{name}.weight"].reshape(HEADS, WIDTH, DIM) for name in "qk")
    biases = tensors["q.bias"].reshape(HEADS, WIDTH)
    new_q, new_k, new_bias = [], [], []
    for query_DC, key_DC, bias_D in zip(queries, keys, biases, strict=True):
        left, strength, right = torch.linalg.svd(torch.cat((query_DC, bias_D[:, None]), 1).T @ key_DC)
        root = strength[:rank].sqrt()
        new_q.append(root[:, None] * left[:DIM, :rank].T)
        new_bias.append(root * left[DIM, :rank])
        new_k.append(root[:, None] * right[:rank])
    return tensors | {"q.weight": torch.cat(new_q), "k.weight": torch.cat(new_k), "q.bias": torch.cat(new_bias)}


def test_activations_are_heeded() -> None:
    """A truncated SVD of the weights alone keeps directions in which tokens hardly differ."""
    host = host_of()
    (thin,) = fitted(host, site_of(host), shares((1, 0.5, 1))).candidates
    blind = replace(thin, tensors=plain_svd(host, 3))
    assert error(thin, host) < 0.7 * error(blind, host)


def test_prefix_rows_count_by_how_much_they_are_heard() -> None:
    host = host_of()
    (even,) = fitted(host, site_of(host), shares((1, 1, 0.34))).candidates
    (weighed,) = fitted(host, site_of(host), shares((1, 1, 0.34)), prefix_weight=1000.0).candidates
    assert error(weighed, host, slice(0, 1)) < error(even, host, slice(0, 1))


def test_rows_that_count_thousands_of_times_as_much_leave_a_moment_that_can_be_factored() -> None:
    """Class tokens are hardly ever far apart: a Gram of them summed in float32 is not positive definite any more."""
    host = host_of()
    statistics = ThinAttention().statistics(site_of(host), host, 3000.0, 1.0)
    x = pictures(300)
    x[:, 0] = 30 + 1e-4 * x[:, 0]
    statistics.update(x, host(x))
    for moment in (statistics.query_KDD, statistics.key_KDD, statistics.value_II):
        spectrum = torch.linalg.eigvalsh(moment)
        torch.testing.assert_close(moment, moment.transpose(-2, -1), rtol=1e-12, atol=0)
        assert float(spectrum.min()) > -1e-12 * float(spectrum.max())


def test_a_host_that_does_more_than_it_states_keeps_its_attention() -> None:
    """q/k-norm that an adapter forgot to mention."""
    honest = case_of("qk_norm").seen.claims.attentions[0]
    assert (honest.head_units is not None) is NARROW_ATTENTION, "it states no W_q and W_k: only whole heads may go"
    stated = replace(honest, head_units=None, projections=case_of("vit").seen.claims.attentions[0].projections)
    host = case_of("qk_norm").work.get_submodule(honest.path)
    statistics = ThinAttention().statistics(stated, host, 1.0, 1.0)
    x = torch.randn(4, 17, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        statistics.update(x, host(x))
    assert statistics.fit(host, case_of("qk_norm").seen.costs).candidates == ()


def test_plain_attentions_have_thinner_ones(case: Case) -> None:
    thin = [record for record in case.calibration.records if isinstance(record, AttentionRecord)]
    plain = {"vit", "distilled", "deit3", "registers", "avg_pool", "non_square", "features"}
    assert bool(thin) == (case.name in plain)
    for record in thin:
        assert record.candidates
        assert all(each.spec.heads * each.spec.v_dim < 48 or each.spec.qk_dim < 16 for each in record.candidates)


@pytest.mark.parametrize("fields", [{"shares": ()}, {"shares": ((1, 2, 1),)}, {"shares": ((0, 1, 1),)}, {"ridge": 0}])
def test_malformed_levers_are_refused(fields: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        ThinAttention.model_validate(fields)


def test_it_costs_what_it_says() -> None:
    """The formula, on any number of tokens, against the counter."""
    from msa2conv.flops import count_flops

    for heads, qk_dim, v_dim, tokens in ((3, 4, 8, 17), (1, 16, 2, 5)):
        spec = Attend(dim=24, heads=heads, qk_dim=qk_dim, v_dim=v_dim, scale=1.0)
        assert count_flops(spec.build(CALLED), torch.zeros(1, tokens, 24)) == spec.flops(tokens)
