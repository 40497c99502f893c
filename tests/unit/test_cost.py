"""count_flops against PyTorch's own counter, the literature, and itself on every way to write attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache

import pytest
import torch
from conftest import Case
from sampled import sampled
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from msa2conv.errors import UncountedOperator
from msa2conv.flops import count_flops, flops_by_module, traced_flops
from msa2conv.ops import IO, Skip
from msa2conv.plan import Replace
from msa2conv.transforms.apply import apply_edits

PIXELS = torch.zeros(1, 3, 224, 224)


def full_size(name: str) -> nn.Module:
    """A timm model at its published size; the values of its weights do not matter."""
    import timm

    return timm.create_model(name).eval()


@cache
def published_flops(name: str) -> int:
    return count_flops(full_size(name), PIXELS)


@torch.no_grad()
def torchs_count(model: nn.Module, inputs: Tensor) -> int:
    """FlopCounterMode counts 2 a multiply-add and no norms; fvcore counts 5 an element of a LayerNorm."""
    norms: list[int] = []
    layers = [module for module in model.modules() if isinstance(module, nn.LayerNorm)]
    with ExitStack() as hooks, FlopCounterMode(display=False) as counter:
        for layer in layers:
            hooks.enter_context(layer.register_forward_hook(lambda _m, _a, out: norms.append(5 * out.numel())))
        with sdpa_kernel(SDPBackend.MATH):  # it sees no fused one on some CPUs
            model(inputs)
    assert norms
    return counter.get_total_flops() // 2 + sum(norms)


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_torchs_own_counter_agrees(name: str) -> None:
    assert published_flops(name) == torchs_count(full_size(name), PIXELS)


def test_torchs_own_counter_agrees_on_tiny_models(case: Case) -> None:
    """The foreign model has a BatchNorm, which PyTorch does not count and fvcore counts 1 or 2 an element."""
    if case.name != "foreign":
        assert count_flops(case.work, case.images[:1]) == torchs_count(case.work, case.images[:1])


@pytest.mark.parametrize(
    ("name", "giga", "left"),
    sampled(
        [
            ("deit_tiny_patch16_224", 1.258, 58),
            ("deit_small_patch16_224", 4.608, 62),
            ("deit_base_patch16_224", 17.58, 64),
        ],
        1,
    ),
)
def test_published_figures(name: str, giga: float, left: int) -> None:
    """DeiT's multiply-adds, and what is left of them (in percent) without any attention."""
    model = full_size(name)
    before = count_flops(model, PIXELS)
    assert round(before / 1e9, len(str(giga).partition(".")[2])) == giga
    io = IO(absent=("attn_mask", "is_causal"))
    apply_edits(model, [Replace(path=f"blocks.{i}.attn", spec=Skip(), io=io) for i in range(12)])
    assert round(100 * count_flops(model, PIXELS) / before) == left


@contextmanager
def fused_attention(enabled: bool) -> Iterator[None]:
    from timm.layers import set_fused_attn

    set_fused_attn(enabled)
    try:
        yield
    finally:
        set_fused_attn(True)


def test_fused_attention_costs_what_unfused_attention_costs() -> None:
    from timm.layers import Attention

    counts = []
    for fused in (True, False):
        with fused_attention(fused):
            attention = Attention(48, num_heads=3, qkv_bias=True).eval()
        assert attention.fused_attn is fused
        counts.append(count_flops(attention, torch.zeros(1, 17, 48)))
    assert counts == [4 * 17 * 48 * 48 + 2 * 17 * 17 * 48] * 2


@contextmanager
def fast_path(enabled: bool) -> Iterator[None]:
    torch.backends.mha.set_fastpath_enabled(enabled)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


def encoder_layer() -> nn.Module:
    return nn.TransformerEncoderLayer(32, 4, dim_feedforward=80, batch_first=True)


class Calls(nn.Module):
    """A function as a module."""

    def __init__(self, function: object) -> None:
        super().__init__()
        self.function = function
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def hidden_encoder_layer() -> nn.Module:
    """fvcore hangs hooks on submodules, which switches PyTorch's fused layer off; a closure is not a submodule."""
    layer = encoder_layer().eval().requires_grad_(False)
    return Calls(lambda x: layer(x))


@pytest.mark.parametrize("build", [SelfAttention, encoder_layer, hidden_encoder_layer])
def test_pytorchs_fast_path_costs_what_its_slow_path_costs(build: Callable[[], nn.Module]) -> None:
    model, counts = build().eval(), []
    for enabled in (True, False):
        with fast_path(enabled):
            counts.append(count_flops(model, torch.zeros(1, 10, 32)))
    attention = 4 * 10 * 32 * 32 + 2 * 10 * 10 * 32
    feed_forward = 2 * 10 * 32 * 80 + 2 * 5 * 10 * 32
    assert counts == [attention + (0 if build is SelfAttention else feed_forward)] * 2


@pytest.mark.parametrize(
    ("function", "flops"),
    [
        (lambda x: x @ x.transpose(1, 2), 4 * 6 * 4),
        (lambda x: torch.bmm(x, x.transpose(1, 2)), 4 * 6 * 4),
        (lambda x: torch.einsum("bnc,bmc->bnm", x, x), 4 * 6 * 4),
        (lambda x: x @ x[0, 0], 4 * 6),
        (lambda x: x.softmax(-1) + x.relu() * x.roll(1, 1), 0),
        (lambda x: torch.baddbmm(torch.zeros(1, 4, 4), x, x.transpose(1, 2)), 4 * 6 * 4),
    ],
)
def test_operators_are_counted_exactly(function: object, flops: int) -> None:
    assert count_flops(Calls(function), torch.zeros(1, 4, 6)) == flops


@pytest.mark.parametrize("function", [lambda x: torch.fft.fft(x).real, lambda x: torch.linalg.pinv(x)])
def test_an_unknown_operator_raises(function: object) -> None:
    with pytest.raises(UncountedOperator, match="aten::"):
        count_flops(Calls(function), torch.ones(1, 4, 6))


def test_only_one_image_is_counted_and_the_model_is_left_alone() -> None:
    model = nn.Sequential(nn.Linear(8, 4), nn.Dropout()).train()
    assert count_flops(model, torch.zeros(5, 8)) == 32
    assert model.training and model[1].training
    assert flops_by_module(model, torch.zeros(5, 8))["0"] == 160


def test_the_cost_of_any_width_is_linear_in_its_units(case: Case) -> None:
    for site in case.seen.claims.ffns:
        slices = [option for option in case.options[site.path] if not any(isinstance(e, Replace) for e in option.edits)]
        whole = [option for option in slices if option.inner is None]
        for option in whole[:: max(1, len(whole) // 4)]:
            assert option.flops == case.seen.costs.ffn(site, int(option.name.split("/")[0]))


def test_measuring_leaves_no_hook_behind(case: Case) -> None:
    hybrid = case.hybrid({site.path: case.options[site.path][-1] for site in case.seen.claims.attentions}).model
    for model in (case.work, hybrid):
        traced_flops(model, case.images[:1])
        assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
