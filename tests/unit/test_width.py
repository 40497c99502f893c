"""Lever "width": what hangs on a channel, narrower networks in closed form, and every law with them."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from clock import Clock, seconds, use
from models import images, same, vit
from torch import Tensor, nn
from versions import NARROW_ATTENTION

import msa2conv
from msa2conv import Calibration, Conversion, Stage, Width
from msa2conv.errors import InvalidArgument
from msa2conv.flops import count_flops
from msa2conv.laws import LOWERING, check_same
from msa2conv.levers import resolve_levers
from msa2conv.levers.narrow import _Regression, narrowed
from msa2conv.options import Option
from msa2conv.plan import WHOLE, Plan, SetAttr, Slice
from msa2conv.planning import choose_at, network_of, tradeoff
from msa2conv.report.inspection import Inspection
from msa2conv.search import resume
from msa2conv.search.measure import distance, outputs
from msa2conv.sites import ResidualStream, WidthGroup
from msa2conv.transforms.lift import edited, lift
from msa2conv.transforms.widths import _refused, find_width
from msa2conv.workbench import working_copy

of_vits = pytest.mark.skipif(
    not NARROW_ATTENTION, reason="its ViT reshapes to the width of its input, which is refused"
)
NAMES = [
    "swin_padded",
    "foreign",
    pytest.param("vit", marks=of_vits),
    *(pytest.param(name, marks=(of_vits, pytest.mark.slow)) for name in ("distilled", "qk_norm", "non_square")),
]
SMALL = Width(keep=(0.75, 0.5))
LEVERS = ("mixer", "ffn", "merge_in_site", "thin_attention", SMALL)


@cache
def calibrated(name: str) -> tuple[nn.Module, Inspection, Calibration]:
    """(working copy, its inspection, its calibration with two widths)."""
    model = tiny.build(name)
    given: dict[str, Any] = {"example_inputs": tiny.images(name, 1), "adapters": tiny.adapters(name)}
    seen = msa2conv.inspect(model, levers=LEVERS, **given)
    calibration = msa2conv.calibrate(model, tiny.images(name), levers=LEVERS, progress=False, **given)
    return working_copy(model), seen, calibration


@cache
def converted() -> Conversion:
    """A tiny ViT at less than its FFNs alone could reach."""
    return msa2conv.convert(vit(), 0.45, data=images(), levers=("ffn", SMALL))


def group_of(model: nn.Module) -> WidthGroup:
    group = msa2conv.inspect(model, levers="width").width
    assert isinstance(group, WidthGroup)
    return group


# What hangs on a channel


@of_vits
def test_a_vit_has_one_stream_and_a_swin_one_a_stage() -> None:
    (stream,) = group_of(tiny.build("vit")).streams
    assert stream.channels == 48 and len(stream.sites) == 6
    assert {("cls_token", 2), ("pos_embed", 2), ("patch_embed.proj.weight", 0), ("head.weight", 1)} < set(
        stream.hanging
    )
    assert not any("qkv.bias" in name for name, *_ in stream.hanging)
    first, second = group_of(tiny.build("swin_padded")).streams
    assert (first.channels, second.channels) == (24, 48)
    merged = [unit for unit in first.hanging if unit[0] == "layers.1.downsample.reduction.weight"]
    assert merged == [("layers.1.downsample.reduction.weight", 1, *offset) for offset in ((), (24,), (48,), (72,))]


@of_vits
def test_layer_scales_registers_and_rms_norms_hang_on_it() -> None:
    from timm.layers import RmsNorm

    model = vit(init_values=0.1, reg_tokens=2, norm_layer=RmsNorm)
    (stream,) = group_of(model).streams
    assert {("reg_token", 2), ("blocks.0.ls1.gamma", 0), ("blocks.1.norm2.weight", 0)} < set(stream.hanging)
    assert ("blocks.1.norm2", "normalized_shape", True) in stream.attributes
    hybrid = msa2conv.convert(model, 0.4, data=images(), levers=("ffn", SMALL)).model
    assert hybrid.blocks[1].norm2.normalized_shape == (24,) and hybrid.embed_dim == hybrid.num_features == 24
    hybrid.reset_classifier(5)
    assert hybrid(images(2)).shape == (2, 5)


def test_what_is_missing_or_misplaced_is_found_out() -> None:
    model = working_copy(tiny.build("swin_padded")).double()
    group, x = group_of(model), tiny.images("swin_padded", 1).double()
    assert _refused(model, group, x) is None
    first, second = group.streams

    def without(index: int) -> WidthGroup:
        return WidthGroup((replace(first, hanging=first.hanging[:index] + first.hanging[index + 1 :]), second))

    assert all(_fails(model, without(index), x) for index in range(len(first.hanging)))
    moved = [unit if unit[0] != "layers.1.downsample.norm.weight" else (*unit[:2], 5) for unit in first.hanging]
    assert _fails(model, WidthGroup((replace(first, hanging=tuple(dict.fromkeys(moved))), second)), x)


def _fails(model: nn.Module, group: WidthGroup, x: Tensor) -> bool:
    try:
        return _refused(model, group, x) is not None
    except Exception:
        return True


class Summed(nn.Module):
    """A block whose output mixes channels by their place."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = vit()
        self.inner.reset_classifier(0)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).cumsum(1)[:, :10]


def test_channels_that_are_read_by_place_are_refused() -> None:
    model = working_copy(Summed())
    seen = msa2conv.observe(model, images(1))
    found = find_width(model, msa2conv.find_sites(model, seen).sites, seen)
    assert found == "its channels are no matter of slices: in another order the output is another"


@pytest.mark.skipif(NARROW_ATTENTION, reason="timm before 1.0.23")
def test_a_vit_that_reshapes_to_the_width_of_its_input_is_refused() -> None:
    found = msa2conv.inspect(vit(), levers="width").width
    assert found == "its channels are no matter of slices: with half of them it fails (RuntimeError)"


def test_an_attention_that_reshapes_to_the_width_of_its_input_is_refused() -> None:
    from timm.models.beit import Beit

    model = Beit(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=10).eval()
    text = str(msa2conv.inspect(model, levers="width"))
    assert "the model cannot be made narrower: its channels are no matter of slices: " in text
    with pytest.raises(InvalidArgument) as caught:
        msa2conv.convert(model, 0.7, data=images(), levers=("ffn", "width"))
    assert str(caught.value).startswith("levers: found 'width' for a Beit that cannot be made narrower (its channels")
    assert str(caught.value).endswith("; expected levers that apply. Leave it out.")


@of_vits
def test_it_is_off_unless_it_is_named() -> None:
    assert "width" not in [lever.name for lever in (*resolve_levers(None), *resolve_levers("all"))]
    assert msa2conv.inspect(vit()).width is None
    assert "the model can be made narrower than 48 channels" in str(msa2conv.inspect(vit(), levers="width"))


# How many channels


def test_all_streams_keep_the_same_share() -> None:
    streams = tuple(ResidualStream(count, (), (), ()) for count in (96, 192))
    assert Width(keep=(0.5, 0.75)).channels(WidthGroup(streams)) == [(72, 144), (48, 96)]
    assert Width(keep=(0.51, 0.5, 0.99)).channels(WidthGroup(streams)) == [(48, 96)], "each width once, never all of it"
    assert Width(keep=(0.4,), round_to=1).channels(WidthGroup(streams)) == [(38, 77)]


@pytest.mark.parametrize("keep", [(0.5, 1.0), (0.0,), ()])
def test_keep_is_a_fraction(keep: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=r"fraction of the channels|at least 1 item"):
        Width(keep=keep)


# The closed form


@of_vits
@pytest.mark.parametrize("channels", [44, 32, 24])
def test_readers_make_up_for_what_is_gone(channels: int) -> None:
    model, pictures = working_copy(tiny.build("vit")), tiny.images("vit", 48)
    seen = msa2conv.inspect(model)
    option = narrowed(model, seen.claims, group_of(model), (channels,), pictures, progress=False)
    assert option.name == f"{channels} of 48 channels"
    assert {name.rpartition(".")[0] for name in option.tensors()} == {
        f"blocks.{block}.{layer}" for block in range(3) for layer in ("attn.qkv", "mlp.fc1")
    }, "a head reads one row of an image, which is too few"
    sliced = edited(model, WHOLE, option.edits)
    fitted = edited(model, WHOLE, option.edits, option.tensors())
    others = tiny.images("vit", 48, seed=2)
    reference = outputs(model, others)
    far = [distance(reference, outputs(net, others), "kl") for net in (sliced, fitted)]
    assert far[1] < 0.8 * far[0]


def test_prefix_tokens_count_as_much_as_all_patches_together() -> None:
    """What a layer cannot explain it meets half-way, however many patches there are."""
    layer = nn.Linear(3, 1).requires_grad_(False)
    x, wanted = torch.zeros(40, 21, 3), torch.zeros(40, 21, 1)
    wanted[:, :2] = 1.0
    for prefix, expected in ((2, 0.5), (0, 2 / 21)):
        regression = _Regression(layer, None, prefix)
        regression.update(x, wanted)
        assert float(regression.refit()["bias"]) == pytest.approx(expected)


@of_vits
def test_the_channel_that_nothing_reads_goes_first() -> None:
    model = working_copy(tiny.build("vit"))
    readers = [name for name, dim, *_ in group_of(model).streams[0].hanging if dim == 1]
    with torch.no_grad():
        for name in readers:
            model.get_parameter(name)[:, 7] = 0
    seen = msa2conv.inspect(model)
    option = narrowed(model, seen.claims, group_of(model), (47,), tiny.images("vit", 32), progress=False)
    kept = {edit.path: edit.kept for edit in option.edits if isinstance(edit, Slice)}
    assert kept["head.weight"] == ((0, 7), (8, 48))


# The laws


@pytest.mark.parametrize("name", NAMES)
def test_every_law_holds_in_narrower_networks(name: str) -> None:
    model, seen, calibration = calibrated(name)
    pictures, draw = tiny.images(name, 3), random.Random(name)
    assert len(calibration.widths()) == 3
    for width, own in calibration.widths()[1:]:
        assert width is not None
        chosen = {site: draw.choice(group) for site, group in own.options().items()}
        for at_sites in (chosen, {site: group[0] for site, group in own.options().items()}):
            choices: dict[str, Option] = {WHOLE: width} | at_sites
            plan, tensors = msa2conv.make_plan(model, seen, choices)
            hybrid = msa2conv.apply(plan, model, tensors)
            assert count_flops(hybrid, pictures) == plan.flops, "law 3"
            assert plan.parameters == sum(parameter.numel() for parameter in hybrid.parameters())
            assert Plan.from_json(plan.model_dump_json()) == plan and plan.choices[WHOLE] == width.name
            network = network_of(model, width)
            net, certain = lift(network, seen.claims.sites), msa2conv.laws.surest(hybrid, pictures, 2)
            with torch.no_grad(), net.pinned(net.branches(at_sites)) as pinned:
                check_same(LOWERING, hybrid(certain), pinned(certain))
                torch.testing.assert_close(hybrid(certain[:1]), hybrid(certain)[:1], rtol=1e-5, atol=1e-5)


@of_vits
def test_what_nothing_else_can_reach_is_reached(tmp_path: Path) -> None:
    result = converted()
    plan = result.plan
    assert plan.flops <= 0.45 * plan.base.flops and count_flops(result.model, images(1)) == plan.flops
    assert plan.choices[WHOLE] in ("32 of 48 channels", "24 of 48 channels")
    assert plan.choices[WHOLE] in str(plan).splitlines() and WHOLE not in plan.sites
    assert any(isinstance(edit, SetAttr) and edit.path == "" for edit in plan.edits)
    assert result.calibration is not None and result.calibration.levers == ["ffn", "width"]
    loaded = msa2conv.load(result.save(tmp_path / "hybrid.safetensors"), vit())
    assert same(loaded, result.model) and type(loaded) is type(vit())
    torch.testing.assert_close(loaded(images(4)), result.model(images(4)), rtol=0, atol=0)
    scores = {each.option.name: each.option.score or 0.0 for each in result.calibration.narrower}
    assert result.report.predicted >= scores[plan.choices[WHOLE]] > 0


@of_vits
def test_the_users_model_is_not_touched() -> None:
    model = tiny.live_in(tiny.build("vit"))
    before = tiny.snapshot(model)
    msa2conv.convert(model, 0.4, data=tiny.images("vit"), levers=("ffn", SMALL), progress=False)
    assert tiny.snapshot(model) == before


@of_vits
def test_the_floor_is_that_of_the_narrowest() -> None:
    model = vit()
    seen, alone = msa2conv.inspect(model, levers=("ffn", SMALL)), msa2conv.inspect(model, levers="ffn")
    assert seen.floor < 0.6 * alone.floor
    found = msa2conv.convert(model, seen.floor / seen.costs.base + 1e-9, data=images(), levers=("ffn", SMALL))
    assert found.plan.flops == seen.floor and found.plan.choices[WHOLE] == "24 of 48 channels"
    with pytest.raises(msa2conv.errors.InfeasibleBudget, match="the floor of the allowed levers"):
        msa2conv.convert(model, seen.floor / seen.costs.base - 0.01, data=images(), levers=("ffn", SMALL))
    with pytest.raises(msa2conv.errors.InfeasibleBudget, match=f"{seen.floor / 1e9:.4g} GFLOPs, the floor"):
        msa2conv.convert(model, 0.05, calibration=found.calibration)


@of_vits
def test_alone_it_takes_the_widest_that_fits() -> None:
    result = msa2conv.convert(vit(), 0.9, data=images(), levers=Width(keep=(0.84, 0.67, 0.5)))
    assert result.plan.choices == {WHOLE: "40 of 48 channels"}
    assert result.plan.flops == count_flops(result.model, images(1))


# Files, interruptions, budgets of time, training


@of_vits
def test_a_saved_calibration_decides_the_same(tmp_path: Path) -> None:
    result = converted()
    assert result.calibration is not None
    claims = msa2conv.inspect(vit()).claims
    path = result.calibration.save(tmp_path / "calibration.safetensors")
    loaded = Calibration.load(path, claims)
    again = msa2conv.convert(vit(), 0.45, calibration=loaded)
    assert again.plan == result.plan and same(again.model, result.model)
    assert msa2conv.sweep(vit(), [0.45], calibration=loaded).points[0].plan == result.plan
    with pytest.raises(msa2conv.errors.ArchitectureMismatch, match="found the sites"):
        Calibration.load(path, replace(claims, sites=(*claims.sites, replace(claims.sites[0], path="other"))))


@of_vits
def test_an_interrupted_calibration_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from msa2conv.search import narrowing

    fits: list[Any] = []

    def fit(*args: Any, **given: Any) -> Option:
        fits.append(args[3])
        if len(fits) == 2:
            raise KeyboardInterrupt
        return narrowed(*args, **given)

    monkeypatch.setattr(narrowing, "narrowed", fit)
    arguments: dict[str, Any] = {"data": images(), "levers": ("ffn", SMALL), "resume": tmp_path / "kept"}
    with pytest.raises(KeyboardInterrupt):
        msa2conv.convert(vit(), 0.45, **arguments)
    again = msa2conv.convert(vit(), 0.45, **arguments)
    assert fits == [(32,), (24,), (24,)], "the first is not fitted again"
    assert again.plan == converted().plan and same(again.model, converted().model)
    resume.discard(tmp_path / "kept")
    assert not (tmp_path / "kept").exists()


@of_vits
def test_a_budget_of_time_is_kept_in_a_narrower_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shares of the time are those of the original's, whatever network sites choose in."""
    use(monkeypatch, Clock())
    wide: dict[str, Any] = {"embed_dim": 96, "img_size": 64, "depth": 3}
    levers = ("ffn", Width(keep=(0.5,)))
    calibration = msa2conv.calibrate(vit(**wide), images(16, 64), levers=levers, progress=False)
    with pytest.raises(msa2conv.errors.InfeasibleBudget, match="the floor of the allowed levers on this device"):
        msa2conv.convert(vit(**wide), latency_target=0.4, calibration=replace(calibration, narrower=[]))
    monkeypatch.setattr(msa2conv.latency.Stopwatch, "check", None)  # what is outside the sites gets quicker, too
    inputs, model = torch.randn(1, 3, 64, 64), vit(**wide)
    whole = seconds(lambda: model(inputs))
    for target in (0.4, 0.35):
        result = msa2conv.convert(model, latency_target=target, calibration=calibration, progress=False)
        found = seconds(lambda result=result: result.model(inputs)) / whole
        assert result.plan.choices[WHOLE] == "48 of 96 channels"
        assert found == pytest.approx(target, rel=0.05) == pytest.approx(result.report.latency.predicted, rel=0.02)


@of_vits
def test_a_kind_that_is_slower_in_a_narrower_network_is_corrected(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, Clock(in_networks={"Mlp": 1.3}))
    wide: dict[str, Any] = {"embed_dim": 96, "img_size": 64, "depth": 3}
    calibration = msa2conv.calibrate(vit(**wide), images(16, 64), levers=("ffn", Width(keep=(0.5,))), progress=False)
    result = msa2conv.convert(vit(**wide), latency_target=0.35, calibration=calibration, progress=False)
    latency = result.report.latency
    assert latency.predicted is not None and abs(latency.off) <= 0.05 and len(latency.attempts) <= 2


@of_vits
def test_it_can_be_polished_and_fine_tuned() -> None:
    result = msa2conv.convert(vit(), 0.45, data=images(), levers=("ffn", SMALL), distill_steps=3)
    assert result.report.distance_polished is not None
    stages = [Stage(kind="local", epochs=1), Stage(kind="distill", epochs=1)]
    arguments: dict[str, Any] = {"batch_size": 8, "progress": False}
    after = msa2conv.finetune(result, images(32, seed=2), stages=stages, **arguments)
    assert after.plan == result.plan and not same(after.model, result.model)
    text = "no local stage: the original's activations have more channels than the hybrid's"
    with pytest.raises(InvalidArgument, match=text):
        msa2conv.finetune(result, images(32, seed=2), stages=stages[:1], **arguments)
    assert msa2conv.finetune(result, images(32, seed=2), epochs=1, **arguments).report.training is not None


@of_vits
def test_the_exact_passes_leave_it_as_it_is() -> None:
    found = msa2conv.streamline(converted())
    torch.testing.assert_close(found.model(images(4)), converted().model(images(4)), rtol=1e-4, atol=1e-4)


@of_vits
def test_the_trade_off_goes_on_below_what_the_whole_network_can_reach() -> None:
    _, _, calibration = calibrated("vit")
    alone, both = tradeoff(replace(calibration, narrower=[])), tradeoff(calibration)
    below = [point for point in both if point.flops < alone[0].flops]
    scores = [narrow.option.score or 0.0 for narrow in calibration.narrower]
    assert below and min(point.loss for point in below) >= min(scores) > 0, "it starts from what the width has lost"
    assert [point.loss for point in both] == sorted((point.loss for point in both), reverse=True)
    assert both[-1] == alone[-1] and both[-1].loss == 0


@of_vits
def test_what_uses_the_budget_goes_before_what_cannot() -> None:
    """Law 4: a width that leaves a part of the budget is taken only where none uses it."""
    model, _, calibration = calibrated("vit")
    widths = calibration.widths()
    lacking = replace(calibration, records=[], narrower=[
        replace(narrow, calibration=replace(narrow.calibration, records=records))
        for narrow, records in zip(calibration.narrower, (calibration.narrower[0].calibration.records, []), strict=True)
    ])  # fmt: skip
    assert widths[2][0] is not None
    narrowest = widths[2][1].costs.base
    choice = msa2conv.choose(model, lacking, int(1.1 * narrowest), progress=False)
    assert choice.choices[WHOLE].name == "32 of 48 channels"
    assert 0.99 * 1.1 * narrowest <= calibration.costs.total(choice.choices) <= 1.1 * narrowest
    few = replace(lacking, narrower=lacking.narrower[1:])
    assert msa2conv.choose(model, few, int(1.1 * narrowest), progress=False).choices[WHOLE].name == "24 of 48 channels"


@of_vits
def test_a_better_plan_in_the_whole_network_is_kept() -> None:
    """What is narrower has to come closer to the original on held-out images."""
    model, _, calibration = calibrated("vit")
    target = int(0.8 * calibration.costs.base)
    choice = msa2conv.choose(model, calibration, target, progress=False)
    assert WHOLE not in choice.choices
    within = [
        choose_at(network_of(model, width), own, target, progress=False).at(width)
        for width, own in calibration.widths()
    ]
    assert choice.distance == min(other.distance for other in within)
    narrow = msa2conv.choose(model, replace(calibration, records=calibration.records[:1]), target, progress=False)
    assert WHOLE in narrow.choices
