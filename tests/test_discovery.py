"""A stranger's backbone: what is proposed, that it is right, and what is left to be declared."""

from __future__ import annotations

from dataclasses import replace

import backbones
import pytest
import torch
import tutorials
from sampled import sampled
from torch import Tensor, nn

import msa2conv
from msa2conv import testing
from msa2conv.adapters import FFN, Attention, Declarations, channels_last, qkv, separate, tokens
from msa2conv.errors import InvalidArgument, LawViolation, NoSitesFound
from msa2conv.layouts import Layout
from msa2conv.options import Option

STRANGERS = {"einops": tutorials.EinopsViT, "separate": tutorials.SeparateViT, "map": tutorials.MapNet}
ALL = pytest.mark.parametrize("name", STRANGERS)
SIZE = {"map": (64, 96)}


def stranger(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return STRANGERS[name]().eval(), torch.randn(12, 3, *SIZE.get(name, (32, 32)))


CODE = {
    "einops": """proposed (look at it, then pass adapters=[proposal.adapter], or paste and edit):

from msa2conv.adapters import Attention, Declarations, FFN, tokens

Declarations(
    "mine",
    {
        EinopsAttention: Attention(tokens(), heads="heads"),  # transformer.layers.0.0 and 1 more
    },
    {
        EinopsFeedForward: FFN("net.3"),  # transformer.layers.0.1 and 1 more
    },
)

no W_v and W_o found in EinopsAttention: the calibrated search needs none, a gate search does""",
    "separate": """proposed (look at it, then pass adapters=[proposal.adapter], or paste and edit):

from msa2conv.adapters import Attention, Declarations, FFN, separate, tokens

Declarations(
    "mine",
    {
        SelfAttention: Attention(tokens(), heads="num_heads", projections=separate("value", "proj", "num_heads"), """
    """returns="tuple"),  # blocks.0.attn and 1 more
    },
    {
        InlineBlock: FFN("down"),  # blocks.0 and 1 more
    },
)""",
    "map": """proposed (look at it, then pass adapters=[proposal.adapter], or paste and edit):

from msa2conv.adapters import Attention, Declarations, FFN, channels_last, qkv

Declarations(
    "mine",
    {
        MapAttention: Attention(channels_last, heads="n_heads", projections=qkv("qkv", "out", "n_heads")),  # """
    """stages.0.attn and 1 more
    },
    {
        MapBlock: FFN("mlp.2"),  # stages.0 and 1 more
    },
)""",
}


@ALL
def test_what_is_proposed(name: str) -> None:
    model, images = stranger(name)
    proposal = msa2conv.discover(model, example_inputs=images[:1])
    assert str(proposal) == CODE[name]
    code = str(proposal).split("\n\n", 1)[1].split("\n\nno W_v")[0].replace("\n\nDecl", "\n\nmine = Decl")
    pasted: dict[str, Declarations] = {}
    exec(code, vars(tutorials) | {"Declarations": Declarations}, pasted)  # what a user would paste
    checks = testing.check_adapter(pasted["mine"], model, images)
    assert len(checks.seen.claims.attentions) == len(checks.seen.claims.ffns) == 2
    assert checks.figures["tokens off by, of a side"] < 0.1
    assert checks.figures["projections tried"] == (name != "einops")


@ALL
def test_it_converts_by_either_search(name: str) -> None:
    model, images = stranger(name)
    kwargs = {"adapters": [msa2conv.discover(model, example_inputs=images[:1]).adapter], "example_inputs": images[:1]}
    result = msa2conv.convert(model, 0.7, data=images, progress=False, **kwargs)
    assert 0.99 * 0.7 < result.plan.flops / result.plan.base.flops <= 0.7 and type(result.model) is type(model)
    data = [(images[:6], torch.arange(6)), (images[6:], torch.arange(6))]
    searched = msa2conv.convert(model, 0.8, data=data, search="gates", epochs=1, progress=False, **kwargs)
    assert searched.plan.flops / searched.plan.base.flops <= 0.8


def test_every_way_to_merge_is_tried_once() -> None:
    whole, half = Option("ffn", "whole", 8), Option("ffn", "half", 4)
    merged = [replace(each, name=f"{each.name}@{keep}", inner=each) for each in (whole, half) for keep in (9, 5)]
    tried = [option.name for option in testing._each_way([whole, half, *merged])]
    assert tried == ["whole", "half", "whole@9", "whole@5", "half@9"]


KNOWN = ["beit", "pvt_v2", "tv_vit", "crossvit", "efficientformer_v2", "levit", "pit", "relpos", "visformer"]


@pytest.mark.parametrize("family", sampled(KNOWN, 3))
def test_known_backbones_are_found_as_they_are_declared(family: str) -> None:
    model, image = backbones.build(family), backbones.images(family, 1)
    declared = msa2conv.inspect(model, example_inputs=image).claims.attentions
    adapter = msa2conv.discover(model, example_inputs=image).adapter
    found = msa2conv.inspect(model, example_inputs=image, adapters=[adapter]).claims.attentions
    assert [(site.path, site.layout) for site in found] == [(site.path, site.layout) for site in declared]


REFUSED = {
    "swin_v2": "windows have to be declared",
    "eva": "it is called with 'rope': declare it, as ignored if all it does is to place tokens",
    "hiera": "its tokens do not lie row by row (",
    "nest": "its tokens do not lie row by row (",
    "mvitv2": "the model fails without what else it returns (TypeError): declare echo or returns",
    "davit": "its softmax runs over 12 values, which are not its 140 positions",
    "volo": "it holds a shortcut around the attention: give the attention a module of its own",
}


@pytest.mark.parametrize(("family", "reason"), REFUSED.items())
def test_what_cannot_be_told_from_outside_is_named(family: str, reason: str) -> None:
    model, image = backbones.build(family), backbones.images(family, 1)
    try:
        text = str(msa2conv.discover(model, example_inputs=image))
    except NoSitesFound as error:
        text = str(error)
    assert reason in text


def test_without_a_softmax_there_is_nothing_to_propose() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)).eval()
    expected = (
        "Sequential: found no softmax in its forward pass; expected a module that maps a grid of tokens to itself "
    )
    with pytest.raises(NoSitesFound) as caught:
        msa2conv.discover(model, example_inputs=torch.zeros(1, 3, 32, 32))
    assert str(caught.value).startswith(expected)


def test_the_model_is_only_looked_at() -> None:
    model, images = stranger("map")
    before = {name: value.clone() for name, value in model.train().state_dict().items()}
    msa2conv.discover(model, example_inputs=images[:1])
    assert model.training and all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


# Adapters that say what is not so


def wrong(attention: Attention) -> Declarations:
    return Declarations("wrong", {tutorials.MapAttention: attention}, {tutorials.MapBlock: FFN("mlp.2")})


def test_keys_for_values_are_noticed() -> None:
    model, images = stranger("separate")
    named = separate("key", "proj", "num_heads")
    adapter = Declarations("wrong", {tutorials.SelfAttention: Attention(tokens(), "num_heads", named, returns="tuple")})
    expected = (
        "the projections of blocks.0.attn: found weights that are not its W_v and W_o by heads; expected those that"
    )
    with pytest.raises(LawViolation) as caught:
        testing.check_adapter(adapter, model, images)
    assert str(caught.value).startswith(expected)


def test_a_transposed_map_is_noticed() -> None:
    def transposed(place: object) -> object:
        return Layout(pattern="b w h c", grid=channels_last(place).grid[::-1])

    model, images = stranger("map")
    adapter = wrong(Attention(transposed, "n_heads", qkv("qkv", "out", "n_heads")))
    with pytest.raises(
        LawViolation, match=r"law 7, tokens lie where the Layout says: found tokens \d+% of a side away"
    ):
        testing.check_adapter(adapter, model, images)
    testing.check_adapter(adapter, model, images, local=False)


def test_too_few_images_are_refused() -> None:
    model, images = stranger("map")
    expected = (
        "inputs: found (3, 3, 64, 96); expected at least 8 images [B, C, H, W]. Pass for example torch.randn(8, 3"
    )
    with pytest.raises(InvalidArgument) as caught:
        testing.check_adapter(wrong(Attention(channels_last)), model, images[:3])
    assert str(caught.value).startswith(expected)


def test_the_report_of_checks_reads_well() -> None:
    model, images = stranger("map")
    text = str(testing.check_adapter(msa2conv.discover(model, example_inputs=images[:1]).adapter, model, images))
    lines = ("MapNet", "stages.0.attn", "lowering, every option", "saved and loaded", "alone or in a batch")
    assert all(line in text for line in lines)
