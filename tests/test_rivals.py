"""Rivals of the benchmarks compute what they claim to: nobody is handicapped by our mistake."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from conftest import case_of

import msa2conv

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.rivals.token_merging import TokenMerging


@torch.no_grad()
def test_token_merging_without_merging_is_the_model_at_its_cost() -> None:
    case = case_of("vit")
    same = TokenMerging(case.work, (0, 0, 0)).eval()
    torch.testing.assert_close(same(case.images), case.work(case.images), rtol=1e-5, atol=1e-5)
    assert msa2conv.count_flops(same, case.images[:1]) == case.seen.costs.base


@torch.no_grad()
def test_token_merging_loses_tokens_and_hears_sizes() -> None:
    """Patches in equal pairs merge without a trace, since attention heeds their sizes; others do not."""
    case = case_of("vit")
    case.work.pos_embed.data, before = torch.zeros_like(case.work.pos_embed), case.work.pos_embed.data
    try:
        column = torch.randn(2, 3, 32, 8, generator=torch.Generator().manual_seed(0))
        pairs = torch.cat((column, column, column.flip(2), column.flip(2)), 3)
        merged = TokenMerging(case.work, (4, 0, 0)).eval()
        torch.testing.assert_close(merged(pairs), case.work(pairs), rtol=1e-4, atol=1e-4)
        apart = case.images[:2]
        assert float((merged(apart) - case.work(apart)).abs().max()) > 1e-3
    finally:
        case.work.pos_embed.data = before
    assert msa2conv.count_flops(merged, case.images[:1]) < case.seen.costs.base
