"""Merging through the network: against blocks that see every merged token as often as it counts; what it refuses."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from models import images, seeded, swin, vit
from test_merging import by_hand
from timm.models import checkpoint_seq
from timm.models.vision_transformer import Block
from torch import Tensor, nn

import msa2conv
from msa2conv.errors import InvalidPlan, LayoutMismatch, UnsupportedArgument
from msa2conv.laws import decision_margins
from msa2conv.ops import Sizes
from msa2conv.plan import Shorten
from msa2conv.sites import StreamSite
from msa2conv.stream import Drop, Line, Stream
from msa2conv.transforms.apply import apply_edits

LINES = {
    "attention": Line(before=("norm1",), module="attn", after=("ls1", "drop_path1")),
    "ffn": Line(before=("norm2",), module="mlp", after=("ls2", "drop_path2")),
}


def blocks(depth: int = 3, dim: int = 12) -> nn.Sequential:
    return seeded(nn.Sequential(*(Block(dim, 3, qkv_bias=True, init_values=0.5) for _ in range(depth))))  # type: ignore[return-value]


def stream(count: int, *drops: tuple[str, int], prefix: int = 2, groups: int = 1) -> Stream:
    return Stream(
        **LINES, prefix=prefix, groups=groups, count=count, sizes=Sizes(argument="attn_mask"),
        drops=tuple(Drop(block=block, keep=keep) for block, keep in drops),
    )  # fmt: skip


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


def states(host: nn.Module, x: Tensor, drops: dict[str, int]) -> list[Tensor]:
    """Behind every block. Independently: no token goes, each becomes the mean of its group, plain blocks see all of
    them, and what a token had of its own comes on top."""
    groups, own, found = [{place} for place in range(14)], torch.zeros_like(x), []
    for name, block in host.named_children():
        x = x + block.ls1(block.attn(block.norm1(x)))  # type: ignore[operator]
        if name in drops:
            tokens = torch.stack([x[0, 2 + min(group)] for group in groups])
            groups = [set().union(*(groups[i] for i in joined)) for joined in by_hand(tokens, drops[name])]
            for group in groups:
                places = torch.tensor(sorted(group)) + 2
                mean = x[:, places].mean(1, keepdim=True)
                own[:, places] += x[:, places] - mean
                x[:, places] = mean
        x = x + block.ls2(block.mlp(block.norm2(x)))  # type: ignore[operator]
        found.append(x + own)
    return found


DROPS = pytest.mark.parametrize("drops", [{"1": 6}, {"0": 10, "2": 8}, {"0": 11, "1": 8, "3": 6}], ids=str)


@torch.no_grad()
@DROPS
def test_merged_tokens_count_as_often_as_they_stand_and_keep_what_is_their_own(drops: dict[str, int]) -> None:
    host, x = blocks(4), noise(1, 2 + 14, 12)
    found = stream(14, *drops.items()).build(host)(x)
    torch.testing.assert_close(found, states(host, x, drops)[-1], rtol=1e-5, atol=1e-5)


@torch.no_grad()
@DROPS
def test_a_walk_has_all_tokens_behind_every_block(drops: dict[str, int]) -> None:
    host, x = blocks(4), noise(1, 2 + 14, 12)
    merged = stream(14, *drops.items()).build(host)
    expected = states(host, x, drops)
    assert len(merged) == len(list(merged)) == 4
    for step, state in zip(copy.deepcopy(merged), expected, strict=True):
        x = step(x)
        torch.testing.assert_close(x, state, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("keep", [23, 20, 16])
def test_equal_tokens_merge_without_a_trace(keep: int) -> None:
    pairs = noise(2, 12, 12).repeat_interleave(2, 1)
    x, host = torch.cat((noise(2, 2, 12), pairs), 1), blocks()
    torch.testing.assert_close(stream(24, ("0", keep)).build(host)(x), host(x), rtol=1e-5, atol=1e-5)
    untold = stream(24, ("0", keep)).model_copy(update={"sizes": None}).build(host)(x)
    assert float((untold - host(x)).abs().max()) > 1e-3


@torch.no_grad()
def test_groups_do_not_see_each_other() -> None:
    """With attentions that mix nothing, every group is merged as if it were alone."""
    host = blocks(1)
    host[0].attn = nn.Identity()  # type: ignore[assignment]
    x = noise(2, 24, 12)
    apart = [stream(8, ("0", 3), prefix=0).build(host)(part) for part in x.split(8, 1)]
    together = stream(8, ("0", 3), prefix=0, groups=3)
    assert together.tokens == 24
    torch.testing.assert_close(together.build(host)(x), torch.cat(apart, 1))


@torch.no_grad()
def test_the_grid_comes_back_and_blocks_before_the_first_drop_run_themselves() -> None:
    host, seen = blocks(), []
    merged, x = stream(14, ("1", 6), ("2", 3)).build(host), noise(2, 16, 12)
    host[0].forward = lambda x: seen.append("itself") or Block.forward(host[0], x)  # type: ignore[assignment, func-returns-value]
    for block in host:
        block.mlp.register_forward_hook(lambda _m, _a, out: seen.append(out.shape[1]))  # type: ignore[union-attr]
    out = merged(x)
    assert out.shape == (2, 16, 12) and len(out[0].unique(dim=0)) == 16
    assert seen == ["itself", 16, 8, 5]


@torch.no_grad()
def test_a_hook_of_a_block_sees_all_tokens() -> None:
    """As many as blocks return that merge nothing; what runs inside is as it was."""
    host, x = blocks(4), noise(1, 16, 12)
    drops, seen = {"1": 9, "3": 5}, []
    merged, inside = stream(14, *drops.items()).build(host), list[int]()
    expected = merged(x)
    for block in host:
        block.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
        block.register_forward_hook(lambda _m, args, out: seen.append(out))
        block.mlp.register_forward_hook(lambda _m, _a, out: inside.append(out.shape[1]))  # type: ignore[union-attr]
    torch.testing.assert_close(merged(x), expected, rtol=1e-5, atol=1e-5)
    behind = [x, *states(host, x, drops)]
    for number, state in enumerate(seen):
        torch.testing.assert_close(state, behind[(number + 1) // 2], rtol=1e-5, atol=1e-5)
    assert len(seen) == 8 and inside[:4] == [16, 11, 11, 7]
    assert all("forward" not in block.__dict__ for block in host)
    host[2].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        merged(x)
    assert all("forward" not in block.__dict__ for block in host)


def test_gradients_reach_every_block_with_and_without_checkpointing() -> None:
    merged, x = stream(14, ("0", 9), ("1", 5)).build(blocks()), noise(2, 16, 12).requires_grad_()
    merged(x).square().sum().backward()
    gradients = [parameter.grad.clone() for parameter in merged.parameters()]  # type: ignore[union-attr]
    assert all(bool(gradient.any()) for gradient in gradients) and x.grad is not None
    merged.zero_grad()
    checkpoint_seq(merged, x).square().sum().backward()
    for parameter, gradient in zip(merged.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


@torch.no_grad()
def test_what_is_added_between_two_steps_is_heeded() -> None:
    """A prompt, say; nothing is kept of a walk but which tokens go together."""
    host, x, more = blocks(2), noise(1, 16, 12), noise(1, 16, 12).roll(1, 1)
    first, second = stream(14, ("0", 6)).build(host)
    y = first(x)
    known = first._known["0"]  # type: ignore[attr-defined]
    tokens = known.means(y + more)
    mask = Sizes(argument="attn_mask").mask(known.size_BK)
    merged = tokens + host[1].ls1(host[1].attn(host[1].norm1(tokens), attn_mask=mask))  # type: ignore[operator]
    merged = merged + host[1].ls2(host[1].mlp(host[1].norm2(merged)))  # type: ignore[operator]
    torch.testing.assert_close(second(y + more), y + more + known.spread(merged - tokens))


@torch.no_grad()
def test_a_list_that_the_network_walks_over_is_one_step() -> None:
    host, x = blocks(), noise(2, 16, 12)
    merged = stream(14, ("0", 9), ("1", 5)).build(nn.ModuleList(host))
    assert list(merged) == [merged] and len(merged) == 1 and merged[0] is merged[-1] is merged[:] is merged
    torch.testing.assert_close(merged(x), stream(14, ("0", 9), ("1", 5)).build(host)(x))
    assert merged[1].attn is host[1].attn and merged[-2].attn is host[1].attn
    with pytest.raises(UnsupportedArgument, match="block 1 without 0"):
        merged[1](x)


@torch.no_grad()
def test_one_block_is_looked_at_as_before() -> None:
    """Attributes, hooks and copies are the block's; run by itself, it is refused where tokens merged before it."""
    host, x, seen = blocks(), noise(1, 16, 12), list[torch.Size]()
    merged = stream(14, ("0", 9)).build(host)
    for number, step in enumerate(merged):
        assert step.attn is merged[number].attn is merged[number - 3].attn is host[number].attn
        assert repr(step) == repr(host[number])
    assert list(merged[1].parameters())[0] is list(host[1].parameters())[0]  # noqa: RUF015
    merged[-1].norm1.register_forward_hook(lambda _m, _a, out: seen.append(out.shape))
    merged[1].register_forward_hook(lambda _m, _a, out: seen.append(out.shape))
    merged(x)
    assert seen == [x.shape, (1, 11, 12)]  # what is behind a block is all tokens, what is inside one is what it runs on
    torch.testing.assert_close(merged[0](x), states(host, x, {"0": 9})[0])
    own = copy.deepcopy(merged[1])
    assert type(own) is type(host[1]) and own is not host[1]
    merged[2].attn = nn.Identity()
    assert isinstance(host[2].attn, nn.Identity)
    with pytest.raises(AttributeError, match="nothing_of_that_name"):
        merged[1].nothing_of_that_name()
    with pytest.raises(IndexError):
        merged[3]
    with pytest.raises(UnsupportedArgument, match="block 1 without 0"):
        merged[1](x)


@torch.no_grad()
def test_the_first_blocks_run_by_themselves() -> None:
    host, x = blocks(), noise(2, 16, 12)
    merged = stream(14, ("0", 9), ("2", 5)).build(host).eval()
    first = merged[:2]
    torch.testing.assert_close(first(x), stream(14, ("0", 9)).build(host[:2])(x))
    assert list(first.state_dict()) == list(host[:2].state_dict()) and first[0:2] is first
    assert [drop.block for drop in first.spec.drops] == ["0"]
    assert merged[:3] is merged[:] is merged and not first.training and len(merged[:0]) == 0
    assert list(merged.state_dict()) == list(host.state_dict())
    assert "9 patches behind the attention of 0" in repr(merged)
    for index in (slice(1, None), slice(None, None, 2)):
        with pytest.raises(UnsupportedArgument) as caught:
            merged[index]
        assert str(caught.value) == (
            f"MergedStream[...]: found {index}; expected the first of its blocks. Tokens that merged in one block stay "
            "together in the next: go through all blocks from the first on, or convert without merge_tokens."
        )


def test_a_step_out_of_order_is_refused() -> None:
    _, second, _ = stream(14, ("0", 9), ("2", 5)).build(blocks())
    with pytest.raises(UnsupportedArgument) as caught:
        second(noise(1, 16, 12))
    assert str(caught.value) == (
        "a step of MergedStream: found block 1 without 0; expected blocks in their order. Tokens that merged in one "
        "block stay together in the next: go through all blocks from the first on, or convert without merge_tokens."
    )
    with pytest.raises(LayoutMismatch, match="found 15 tokens"):
        second(noise(1, 15, 12))


def test_a_mask_and_another_number_of_tokens_are_refused() -> None:
    merged = stream(14, ("0", 9)).build(blocks())
    with pytest.raises(UnsupportedArgument) as caught:
        merged(noise(1, 16, 12), attn_mask=torch.zeros(16, 16))
    assert str(caught.value) == (
        "MergedStream.forward: found the argument 'attn_mask'; expected only the tokens. Merged tokens have no places "
        "that it could speak of: call the model without it."
    )
    with pytest.raises(LayoutMismatch) as mismatch:
        merged(noise(1, 15, 12))
    assert str(mismatch.value) == (
        "tokens 'b n c': found 15 tokens; expected 16 tokens. A hybrid runs at the image size it was converted for, "
        "with all patches: convert again with example_inputs of the new size, and train it without patch dropout."
    )


def test_every_drop_must_leave_fewer() -> None:
    with pytest.raises(ValueError, match=r"fewer patches than there were: \[14, 9, 9\]"):
        Stream(**LINES, count=14, drops=(Drop(block="0", keep=9), Drop(block="1", keep=9)))


def test_margins_see_its_decisions() -> None:
    merged = stream(8, ("0", 5), prefix=0).build(blocks(1))
    margins = decision_margins(merged, noise(4, 8, 12))
    assert margins.shape == (4,) and bool(margins.isfinite().all()) and merged.watch is None


@pytest.mark.parametrize(
    ("edit", "text"),
    [
        (Shorten(path="norm", spec=stream(16, ("0", 5))), "a Sequential or a ModuleList of blocks"),
        (Shorten(path="blocks", spec=stream(16, ("7", 5))), "no submodule '7' in Sequential"),
        (
            Shorten(path="blocks", spec=stream(16, ("0", 5)).model_copy(update={"ffn": Line(module="ffn")})),
            "no submodule 'ffn' in Block",
        ),
    ],
)
def test_an_edit_that_does_not_fit_is_refused_before_anything_changes(edit: Shorten, text: str) -> None:
    model = vit()
    with pytest.raises(InvalidPlan, match=text):
        apply_edits(model, [edit])
    assert isinstance(model.blocks, nn.Sequential)


# Where it is possible


def found(model: nn.Module, size: int = 32) -> StreamSite | str:
    seen = msa2conv.inspect(model, example_inputs=images(1, size))
    return seen.claims.stream or str(seen.not_through)


def test_the_two_lines_of_a_block_are_found_by_trial() -> None:
    site = found(vit(init_values=1e-6))  # so small that a norm at the wrong place would hardly show
    assert isinstance(site, StreamSite) and site.path == "blocks"
    assert site.stream.attention.paths == ("norm1", "attn", "ls1", "drop_path1")
    assert site.stream.ffn.paths == ("norm2", "mlp", "ls2", "drop_path2")
    assert site.blocks == (("0", "blocks.0.attn", "blocks.0.mlp"), ("1", "blocks.1.attn", "blocks.1.mlp"))
    assert site.tokens([Drop(block="0", keep=4)]) == dict(
        zip(("blocks.0.attn", "blocks.0.mlp", "blocks.1.attn", "blocks.1.mlp"), (17, 5, 5, 5), strict=True)
    )


def test_a_norm_behind_the_attention_is_found_too() -> None:
    from timm.models.vision_transformer import ResPostBlock

    site = found(vit(block_fn=ResPostBlock, init_values=0.5))
    assert isinstance(site, StreamSite)
    assert site.stream.attention.before == () and site.stream.attention.after[0] == "norm1"


class Halved(Block):
    def forward(self, x: Tensor, **_: Any) -> Tensor:
        x = x + 0.5 * self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def test_a_network_without_such_blocks_says_why() -> None:
    assert found(swin(), 56) == "layers.0.blocks.0.attn cannot run on merged tokens"
    reason = "blocks.0 is not x + attention(norm(x)), then x + ffn(norm(x)), in the same way as the blocks before"
    assert found(vit(block_fn=Halved)) == reason


class Looks(nn.Module):
    """A ViT of which someone else wants what its first block returns."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        first = self.model.blocks[0]
        tokens = self.model.blocks[1](first(self.model._pos_embed(self.model.patch_embed(x))))
        out: Tensor = self.model.forward_head(self.model.norm(tokens))
        return out


def test_a_network_that_does_not_run_its_blocks_as_one_is_refused() -> None:
    reason = found(Looks(vit()).eval())
    assert reason == "the network does not run with model.blocks merging tokens (UnsupportedArgument)"


class Walks(Looks):
    """A ViT that runs its Sequential block by block."""

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.model._pos_embed(self.model.patch_embed(x))
        for block in self.model.blocks:
            tokens = block(tokens)
        out: Tensor = self.model.forward_head(self.model.norm(tokens))
        return out


def test_a_network_may_walk_over_its_blocks() -> None:
    site = found(Walks(vit()).eval())
    assert isinstance(site, StreamSite) and site.path == "model.blocks"


class PassesBy(Looks):
    """A ViT whose blocks are run by someone who does not ask what they stand in."""

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.model._pos_embed(self.model.patch_embed(x))
        for block in self.model.blocks.children():
            tokens = block(tokens)
        out: Tensor = self.model.forward_head(self.model.norm(tokens))
        return out


def test_a_network_that_passes_merging_by_is_refused() -> None:
    assert found(PassesBy(vit()).eval()) == "the network does not run through model.blocks once and as a whole"


class LooksInside(Looks):
    """A ViT that also returns what the FFN of its last block says."""

    def forward(self, x: Tensor) -> Any:
        said: list[Tensor] = []
        handle = self.model.blocks.get_submodule("1.mlp").register_forward_hook(lambda _m, _a, out: said.append(out))
        out = self.model(x)
        handle.remove()
        return out, said[0]


def test_a_network_that_returns_what_a_module_says_inside_is_refused() -> None:
    reason = "the network does not run through model.blocks once and as a whole"
    assert found(LooksInside(vit()).eval()) == reason


def test_inspect_says_so() -> None:
    assert "tokens can be merged through the network, behind any attention of blocks" in str(msa2conv.inspect(vit()))
    assert "tokens cannot be merged through the network: layers.0.blocks.0.attn cannot run on merged tokens" in str(
        msa2conv.inspect(swin())
    )
