"""Exact passes: outputs stay (law 9), plans say what runs, and nothing of the original is touched."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import images, same, swin, vit
from torch import nn

import msa2conv
from msa2conv import folding
from msa2conv.errors import InvalidArgument, LawViolation
from msa2conv.layouts import Layout
from msa2conv.merging import Merge
from msa2conv.ops import IO, Attend, Constant, Conv, Depthwise, Global, Identity, PassPrefix, Skip, Spec
from msa2conv.plan import Edit, Plan, Replace, SetAttr, Wrap
from msa2conv.transforms.apply import apply_edits
from msa2conv.transforms.fold_norm import fold_norms
from msa2conv.transforms.fuse_qkv import fuse_qkv
from msa2conv.transforms.merge_linear import merge_linear
from msa2conv.transforms.tokenwise import tokenwise
from msa2conv.transforms.unwindow import unwindow


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.3 if parameter.ndim > 1 else 0.1
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator) + name.endswith("norm.weight"))
    return model.eval()


def bottleneck(**changes: Any) -> Replace:
    known = {"layout": Layout(grid=(4, 4), prefix=1), "dim": 6, "kernel": 1, "rank": 5, "prefix": PassPrefix()}
    return Replace(path="0", spec=Conv(**{**known, **changes}), io=IO())


# merge_linear


@torch.no_grad()
@pytest.mark.parametrize(("kernel", "rank", "merges"), [(1, 4, True), (1, 3, False), (3, 5, False), (1, 5, True)])
def test_a_wide_linear_bottleneck_becomes_one_convolution(kernel: int, rank: int, merges: bool) -> None:
    edit = bottleneck(kernel=kernel, rank=rank)
    model, x = randomised(nn.Sequential(edit.spec.build(edit.io))), torch.randn(2, 17, 6)
    (after,), merged = merge_linear((edit,), model)
    assert (after != edit) == merges
    torch.testing.assert_close(merged(x), model(x), rtol=1e-5, atol=1e-5)
    before, now = msa2conv.count_flops(model, x[:1]), msa2conv.count_flops(merged, x[:1])
    assert now < before if merges else now == before
    assert (
        isinstance(after, Replace) and after.spec.build(after.io).state_dict().keys() == merged[0].state_dict().keys()
    )


def test_what_stands_between_two_convolutions_keeps_them_apart() -> None:
    for between in ({"norm": "batch"}, {"act": "relu"}):
        edit = bottleneck(**between)
        assert merge_linear((edit,), nn.Sequential(edit.spec.build(edit.io)))[0] == (edit,)


@torch.no_grad()
def test_a_norm_between_convolutions_of_full_width_leaves_one() -> None:
    edit = bottleneck(rank=6, norm="batch")
    model, x = randomised(nn.Sequential(edit.spec.build(edit.io))), torch.randn(2, 17, 6)
    model[0].norm.running_mean.normal_(), model[0].norm.running_var.uniform_(0.5, 2)
    _, folded = fold_norms((edit,), model)
    torch.testing.assert_close(folded(x), model(x), rtol=1e-5, atol=1e-5)
    assert isinstance(folded[0].expand, nn.Identity)


# tokenwise


def of_tokens(layout: Layout) -> list[Spec]:
    known: dict[str, Any] = {"layout": layout, "dim": 6, "prefix": PassPrefix() if layout.prefix else None}
    return [
        Conv(kernel=1, rank=3, context=True, **known),
        Conv(kernel=1, rank=6, **known),
        Conv(kernel=1, rank=3, norm="batch", act="relu", **known),
        Depthwise(kernel=3, width=5, context=True, **known),
    ]


@torch.no_grad()
@pytest.mark.parametrize("layout", [Layout(grid=(4, 4), prefix=1), Layout(grid=(4, 4), pattern="b h w c")])
def test_pointwise_convolutions_become_linear_layers(layout: Layout) -> None:
    x = torch.randn(2, 17, 6) if layout.prefix else torch.randn(2, 4, 4, 6)
    for spec in of_tokens(layout):
        edit = Replace(path="0", spec=spec, io=IO())
        model = randomised(nn.Sequential(spec.build(edit.io)))
        (after,), linear = tokenwise((edit,), model)
        kinds = [module.kernel_size for module in linear.modules() if isinstance(module, nn.Conv2d)]
        assert (1, 1) not in kinds and any(isinstance(module, nn.Conv2d) for module in model.modules())
        torch.testing.assert_close(linear(x), model(x), rtol=1e-6, atol=1e-6)
        assert msa2conv.count_flops(linear, x[:1]) == msa2conv.count_flops(model, x[:1])
        again = nn.Sequential(after.spec.build(after.io)).eval()  # what a file holds makes the same network
        again.load_state_dict(linear.state_dict())
        assert torch.equal(again(x), linear(x)) and tokenwise((after,), linear)[0] == (after,)


@torch.no_grad()
def test_nothing_is_copied_for_a_linear_layer() -> None:
    edit = bottleneck(rank=3)
    model = randomised(nn.Sequential(edit.spec.build(edit.io)))
    counts = []
    for network in (model, tokenwise((edit,), model)[1]):
        with torch.profiler.profile() as profile:
            network(torch.randn(1, 17, 6))
        counts.append(sum(event.count for event in profile.key_averages() if event.key == "aten::clone"))
    assert counts[1] == 0 < counts[0]


@pytest.mark.parametrize(
    "layout",
    [Layout(grid=(4, 4), pattern="b c h w"), Layout(pattern="(b nh nw) (h w) c", grid=(14, 14), window=(7, 7))],
)
def test_maps_that_do_not_lie_like_tokens_keep_their_convolutions(layout: Layout) -> None:
    edit = bottleneck(layout=layout, prefix=None)
    assert tokenwise((edit,), nn.Sequential(edit.spec.build(edit.io)))[0] == (edit,)
    after_a_3x3 = bottleneck(kernel=3)
    assert tokenwise((after_a_3x3,), nn.Sequential(after_a_3x3.spec.build(IO())))[0] == (after_a_3x3,)


@torch.no_grad()
@pytest.mark.parametrize("spec", of_tokens(Layout(grid=(4, 4), prefix=1)))
def test_passes_in_any_order(spec: Spec) -> None:
    edit = Replace(path="0", spec=spec, io=IO())
    model, x = randomised(nn.Sequential(spec.build(edit.io))), torch.randn(2, 17, 6)
    edits, found = tokenwise((edit,), model)
    for one in (fold_norms, merge_linear):
        edits, found = one(edits, found)
        torch.testing.assert_close(found(x), model(x), rtol=1e-5, atol=1e-5)


# fuse_qkv


@torch.no_grad()
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("widths", [(2, 3), (3, 3)])
def test_queries_keys_and_values_from_one_layer(bias: bool, widths: tuple[int, int]) -> None:
    spec = Attend(dim=6, heads=2, qk_dim=widths[0], v_dim=widths[1], scale=0.5, bias=bias)
    merge = Wrap(path="0", spec=Merge(count=16, keep=7, prefix=1), io=IO())
    x = torch.randn(2, 17, 6)
    for others in ((), (merge,)):
        edits = (Replace(path="0", spec=spec, io=IO()), *others)
        model = nn.Sequential(nn.Identity())
        apply_edits(model, edits)
        randomised(model)
        after, fused = fuse_qkv(edits, model)
        torch.testing.assert_close(fused(x), model(x), rtol=1e-6, atol=1e-6)
        linears = [name for name, module in fused.named_modules() if isinstance(module, nn.Linear)]
        assert [name.rpartition(".")[2] for name in linears] == ["qkv", "proj"]
        assert msa2conv.count_flops(fused, x[:1]) == msa2conv.count_flops(model, x[:1])
        again = nn.Sequential(nn.Identity())
        apply_edits(again, after)
        again.eval().load_state_dict(fused.state_dict())
        assert torch.equal(again(x), fused(x)) and fuse_qkv(after, fused)[0] == after


# unwindow: blocks 0 and 1 of a Swin on a 14 x 14 map (7 x 7 windows, the second rolled), 16 x 20 when padded


def replaced(size: int | tuple[int, int], block: int, spec: Any) -> tuple[nn.Module, Replace]:
    model = swin(img_size=size)
    edit = Replace(path=f"layers.0.blocks.{block}.attn", spec=spec, io=IO(ignored=("mask",)))
    apply_edits(model, [edit])
    return randomised(model), edit


def windowed(grid: tuple[int, int], block: int) -> Layout:
    return Layout(pattern="(b nh nw) (h w) c", grid=grid, window=(7, 7), shift=(3, 3) if block else (0, 0))


def specs(grid: tuple[int, int], block: int) -> list[Spec]:
    layout = windowed(grid, block)
    return [
        Skip(),
        Identity(),
        Constant(layout=layout, dim=24),
        Global(layout=layout, dim=24),
        Conv(layout=layout, dim=24, kernel=1, rank=8, context=True),
        Conv(layout=layout, dim=24, kernel=3, rank=8, norm="batch", act="relu"),
        Depthwise(layout=layout, dim=24, kernel=5, width=24, context=True),
    ]


@torch.no_grad()
@pytest.mark.parametrize("size", [56, (56, 72)])
@pytest.mark.parametrize("block", [0, 1])
def test_windows_go_with_the_attention(
    size: int | tuple[int, int], block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    height, width = (size, size) if isinstance(size, int) else size
    grid = (height // 4, width // 4)
    x = torch.randn(2, 3, height, width)
    for spec in specs(grid, block):
        model, edit = replaced(size, block, spec)
        expected = model(x)
        edits, whole = unwindow((edit,), model, (3, height, width))
        torch.testing.assert_close(whole(x), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
        assert [edit.path for edit in edits[1:]] == [f"layers.0.blocks.{block}"] * 3
        assert whole.get_submodule(f"layers.0.blocks.{block}").window_size == grid
        again = swin(img_size=size)  # what a file holds makes the same network
        apply_edits(again, edits)
        again.load_state_dict(whole.state_dict())
        torch.testing.assert_close(again.eval()(x), whole(x), rtol=0, atol=0)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "roll", None)  # nothing is rolled there any more
            block_of = whole.get_submodule(f"layers.0.blocks.{block}")
            block_of(torch.randn(1, *grid, 24))
        assert unwindow(edits, whole, (3, height, width))[0] == edits


@torch.no_grad()
def test_a_convolution_inside_every_window_is_left_alone() -> None:
    inside = Conv(layout=Layout(grid=(7, 7)), dim=24, kernel=3, rank=8)
    model, edit = replaced(56, 0, inside)
    edits, whole = unwindow((edit,), model, (3, 56, 56))
    assert edits == (edit,) and whole.layers[0].blocks[0].window_size == (7, 7)
    x = torch.randn(1, 3, 56, 56)
    torch.testing.assert_close(whole(x), model(x), rtol=0, atol=0)


def test_tables_of_another_size_are_left_alone() -> None:
    model, edit = replaced(56, 0, Constant(layout=Layout(grid=(7, 7)), dim=24))
    assert unwindow((edit,), model, (3, 56, 56))[0] == (edit,)


def test_modes_and_what_may_be_trained_stay() -> None:
    model, edit = replaced(56, 1, specs((14, 14), 1)[5])
    model.train()
    model.layers[0].blocks[1].attn.norm.eval()
    model.layers[0].blocks[1].attn.reduce.weight.requires_grad_(False)
    _, whole = unwindow((edit,), model, (3, 56, 56))
    mixer = whole.layers[0].blocks[1].attn
    assert whole.training and mixer.training and not mixer.norm.training
    assert not mixer.reduce.weight.requires_grad and mixer.expand.weight.requires_grad


def test_attentions_and_other_backbones_keep_what_they_have() -> None:
    assert unwindow((), swin(), (3, 56, 56))[0] == ()
    model = vit()
    edit = Replace(path="blocks.0.attn", spec=Skip(), io=IO())
    apply_edits(model, [edit])
    assert unwindow((edit,), model, (3, 32, 32))[0] == (edit,)


# streamline


@pytest.fixture(scope="module")
def hybrid() -> msa2conv.Conversion:
    levers = (msa2conv.Mixer(ops=("skip", "conv1x1"), rank=3.0), "ffn")
    return msa2conv.convert(swin(), 0.62, data=images(16, 56), levers=levers, progress=False)


@torch.no_grad()
def test_all_passes_of_a_conversion(hybrid: msa2conv.Conversion, tmp_path: Path) -> None:
    state = copy.deepcopy(hybrid.model.state_dict())
    after = msa2conv.streamline(hybrid, images=images(8, 56, seed=3))
    assert set(after.report.streamlined) >= {"unwindow"} and "streamlined: " in str(after.report)
    x = images(4, 56, seed=1)
    expected, found = hybrid.model(x), after.model(x)
    assert (found - expected).abs().max() <= 1e-4 * max(1, expected.abs().max())
    assert all(torch.equal(value, state[name]) for name, value in hybrid.model.state_dict().items())
    assert msa2conv.count_flops(after.model, x[:1]) == after.plan.flops == after.report.flops_after
    assert after.plan.choices == hybrid.plan.choices and Plan.from_json(after.plan.model_dump_json()) == after.plan
    assert any(isinstance(edit, SetAttr) for edit in after.plan.edits)
    after.save(tmp_path)
    again = msa2conv.Conversion.load(tmp_path, swin())
    assert same(again.model, after.model) and torch.equal(again.model(x), found)
    assert again.report.streamlined == after.report.streamlined
    assert msa2conv.streamline(after) is after
    alone = [after.model(image[None]) for image in x]
    torch.testing.assert_close(torch.cat(alone), found, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_network_that_merges_all_the_way_is_streamlined_too() -> None:
    """Its thin attentions stand in blocks that run on fewer and fewer tokens."""
    levers = (msa2conv.ThinAttention(shares=((1, 0.5, 0.5),)), msa2conv.MergeTokens(keep=(0.5,), drops=1))
    result = msa2conv.convert(vit(depth=4), 0.62, data=images(16), levers=levers, progress=False)
    assert {edit.kind for edit in result.plan.edits} >= {"replace", "shorten"}
    after, x = msa2conv.streamline(result, images=images(8, seed=3)), images(4, seed=1)
    assert set(after.report.streamlined) == {"fuse_qkv"}
    torch.testing.assert_close(after.model(x), result.model(x), rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_what_it_is(hybrid: msa2conv.Conversion, dtype: torch.dtype) -> None:
    narrow = replace(hybrid, model=copy.deepcopy(hybrid.model).to(dtype))
    after = msa2conv.streamline(narrow, images=images(4, 56))
    assert set(after.report.streamlined) >= {"unwindow"}
    assert {tensor.dtype for tensor in after.model.parameters()} == {dtype}
    x = images(2, 56, seed=1).to(dtype)
    found, expected = after.model(x), narrow.model(x)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(found, expected, rtol=10 * eps, atol=10 * eps * float(expected.abs().max()))


def test_a_pass_that_is_not_known() -> None:
    result = msa2conv.convert(vit(), 0.7, data=images(16), progress=False)
    with pytest.raises(
        InvalidArgument, match="found 'fold'; expected some of fold_norms, merge_linear, unwindow, tokenwise, fuse_qkv"
    ):
        msa2conv.streamline(result, passes=["fold"])
    assert msa2conv.streamline(result, passes=()) is result


def test_outputs_that_would_change_are_noticed(hybrid: msa2conv.Conversion, monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(plan: Plan, model: nn.Module) -> tuple[tuple[Edit, ...], nn.Module]:
        wrong = copy.deepcopy(model)
        with torch.no_grad():
            next(wrong.parameters()).mul_(1.01)
        return plan.edits[1:], wrong

    monkeypatch.setitem(folding.PASSES, "unwindow", careless)
    with pytest.raises(LawViolation, match="law 9, optional passes do not change the output"):
        msa2conv.streamline(hybrid, images=images(8, 56))
