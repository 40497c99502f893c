"""Running only a suffix gives what a full run gives, or a full run is what is run."""

from __future__ import annotations

import pytest
import torch
from conftest import Case
from torch import Tensor, nn

from msa2conv.search.replay import Replay
from msa2conv.transforms.lift import lift, max_difference


def assert_same(found: Tensor, expected: Tensor) -> None:
    difference, tolerance = max_difference(found, expected)
    assert difference <= tolerance


@torch.no_grad()
def test_a_suffix_equals_a_full_run_for_every_block(case: Case) -> None:
    """Also with a block replaced, which is what it is for."""
    net = lift(case.work, case.seen.claims.sites)
    replay = Replay(net.model, [site.block for site in case.seen.claims.sites], [case.images[:5], case.images[5:8]])
    assert replay.exact
    assert_same(replay.reference, case.work(case.images[:8]))
    for site in case.seen.claims.sites:
        assert_same(replay.run(site.block), replay.reference)
        cheapest = min(case.options[site.path], key=lambda option: option.flops)
        with net.pinned({site.path: net.branch(cheapest)}):
            found, expected = replay.run(site.block), net.model(case.images[:8])
            assert float((expected - replay.reference).abs().max()) > 1e-3
            assert_same(found, expected)
    assert not any("forward" in vars(module) for module in net.model.modules()), "nothing stays shadowed"


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.calls = nn.Linear(4, 4), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x + torch.tanh(self.linear(x))


class Skipping(nn.Module):
    """Five blocks; the output of block `source` is added to the input of block `target` (5: to the output)."""

    def __init__(self, source: int, target: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(5))
        self.source, self.target = source, target

    def forward(self, x: Tensor) -> Tensor:
        kept = x
        for index, block in enumerate(self.blocks):
            x = block(x + kept if index == self.target else x)
            kept = x if index == self.source else kept
        return x + kept if self.target == 5 else x


def replay_of(net: nn.Module) -> Replay:
    return Replay(net, [f"blocks.{i}" for i in range(5)], [torch.randn(3, 4)])


def test_earlier_blocks_are_not_computed() -> None:
    net = Skipping(9, 9)
    replay = replay_of(net)
    before = [block.calls for block in net.blocks]
    replay.run("blocks.3")
    assert [block.calls - count for block, count in zip(net.blocks, before, strict=True)] == [0, 0, 0, 1, 1]


@pytest.mark.parametrize(("source", "target"), [(0, 5), (1, 4), (0, 4), (0, 2), (0, 3), (1, 3), (2, 5)])
def test_long_skip_connections_do_not_fool_it(source: int, target: int) -> None:
    net = Skipping(source, target)
    replay = replay_of(net)
    for block in replay.blocks:
        assert_same(replay.run(block), replay.reference)


class Pair(nn.Module):
    """A block that returns a tuple, or a dict."""

    def __init__(self, kind: type) -> None:
        super().__init__()
        self.block, self.kind = Block(), kind

    def forward(self, x: Tensor) -> tuple[Tensor, None] | dict[int, Tensor]:
        out = self.block(x)
        return (out, None) if self.kind is tuple else {0: out}


class Pairs(nn.Module):
    def __init__(self, kind: type = tuple) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Pair(kind) for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)[0]
        return x


def test_blocks_that_return_tuples_are_replayed_too() -> None:
    net = Pairs()
    replay = replay_of(net)
    assert replay.exact
    calls = net.blocks[0].block.calls
    assert_same(replay.run("blocks.4"), replay.reference)
    assert net.blocks[0].block.calls == calls


def test_blocks_that_return_anything_else_are_run_in_full() -> None:
    net = Pairs(kind=dict)
    replay = replay_of(net)
    assert not replay.exact
    assert_same(replay.run("blocks.4"), replay.reference)
    assert net.blocks[0].block.calls == 2
