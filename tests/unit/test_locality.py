"""How local heads are, against weights that were computed by hand."""

from __future__ import annotations

import math

import pytest
import tiny
import torch
from conftest import Case, case_of
from torch import Tensor, nn
from torchvision.models import VisionTransformer

import msa2conv
from msa2conv.locality import head_locality


def _by_hand(weights_HNN: Tensor, places: list[tuple[int, int] | None]) -> list[float]:
    """Share of the patches' attention within 3 x 3, in plain loops."""
    found = []
    for weights in weights_HNN.tolist():
        shares = [
            sum(
                row[key]
                for key, there in enumerate(places)
                if there is not None and max(abs(here[0] - there[0]), abs(here[1] - there[1])) <= 1
            )
            for row, here in zip(weights, places, strict=True)
            if here is not None
        ]
        found.append(sum(shares) / len(shares))
    return found


def _inputs(model: nn.Module, path: str, image: Tensor) -> Tensor:
    seen: list[Tensor] = []
    handle = model.get_submodule(path).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(image)
    handle.remove()
    return seen[0]


def test_of_a_vit(vit: Case) -> None:
    image = vit.images[:1]
    found = {each.path: each for each in head_locality(vit.work, vit.seen.claims.attentions, image)}
    assert list(found) == [site.path for site in vit.seen.claims.attentions]
    for path, each in found.items():
        attention = vit.work.get_submodule(path)
        x = _inputs(vit.work, path, image)
        q, k, _ = attention.qkv(x)[0].reshape(x.shape[1], 3, 3, 16).unbind(1)
        weights = torch.einsum("qhd,khd->hqk", q, k).div(math.sqrt(16)).softmax(-1)
        places = [None, *((row, column) for row in range(4) for column in range(4))]
        assert each.near == pytest.approx(_by_hand(weights, places), abs=1e-5)
    # a corner has 4 neighbours of 16, an edge 6, the middle 9, and the class token is not one of them
    assert each.chance == pytest.approx((4 * 4 + 8 * 6 + 4 * 9) / 16 / 16)


def test_of_an_attention_that_says_its_weights_itself() -> None:
    case = case_of("foreign")
    found = head_locality(case.work, case.seen.claims.attentions, case.images[:1])
    assert len(found) == len(case.seen.claims.attentions)
    for each in found:
        attention = case.work.get_submodule(each.path)
        weights: list[Tensor] = []
        handle = attention.register_forward_hook(lambda module, args, out, weights=weights: weights.append(out[1][0]))
        with torch.no_grad():
            case.work(case.images[:1])
        handle.remove()
        height, width = next(site for site in case.seen.claims.attentions if site.path == each.path).layout.grid
        places = [(row, column) for row in range(height) for column in range(width)]
        assert each.near == pytest.approx(_by_hand(weights[0], places), abs=1e-5)


def test_of_shifted_and_padded_windows() -> None:
    case = case_of("swin_padded")
    image = case.images[:1]
    found = {each.path: each for each in head_locality(case.work, case.seen.claims.attentions, image)}
    assert list(found) == [site.path for site in case.seen.claims.attentions]
    for site in case.seen.claims.attentions:
        attention = case.work.get_submodule(site.path)
        attention.fused_attn = False  # so that its softmax can be caught
        caught: list[Tensor] = []
        handle = attention.softmax.register_forward_hook(lambda module, args, out: caught.append(out))  # noqa: B023
        with torch.no_grad():
            case.work(image)
        handle.remove()
        (height, width), (h, w), shift = site.layout.grid, site.layout.window, site.layout.shift
        padded_h, padded_w = -(-height // h) * h, -(-width // w) * w
        rolled = [[((r + shift[0]) % height, (c + shift[1]) % width) for c in range(width)] for r in range(height)]
        expected = torch.zeros(site.heads)
        real = 0
        index = 0
        for top in range(0, padded_h, h):
            for left in range(0, padded_w, w):
                places = [
                    rolled[row][column] if row < height and column < width else None
                    for row in range(top, top + h)
                    for column in range(left, left + w)
                ]
                count = sum(place is not None for place in places)
                if count:
                    expected += count * torch.tensor(_by_hand(caught[0][index], places))
                real, index = real + count, index + 1
        assert real == height * width
        assert found[site.path].near == pytest.approx((expected / real).tolist(), abs=1e-5)


def test_nothing_is_left_behind(vit: Case) -> None:
    before = tiny.snapshot(vit.work)
    head_locality(vit.work, vit.seen.claims.attentions, vit.images[:1])
    assert tiny.snapshot(vit.work) == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in vit.work.modules())


def test_pytorchs_own_attention_and_one_with_pooled_keys() -> None:
    model = VisionTransformer(32, 8, 2, 3, 24, 48).eval()
    image = torch.randn(1, 3, 32, 32)
    seen = msa2conv.inspect(model, example_inputs=image)
    found = head_locality(model, seen.claims.attentions, image)
    assert [len(each.near) for each in found] == [3, 3]
    attention = model.get_submodule(found[0].path)
    x = _inputs(model, found[0].path, image)
    _, weights = attention(x, x, x, need_weights=True, average_attn_weights=False)
    places = [None, *((row, column) for row in range(4) for column in range(4))]
    assert found[0].near == pytest.approx(_by_hand(weights[0], places), abs=1e-5)
