"""Lever "merge_tokens": what it offers, what that costs, and that the plan, the files and the laws know it."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path

import pytest
import torch
from models import images, same, vit
from torch import nn

import msa2conv
from msa2conv import Calibration, Conversion, MergeInSite, MergeTokens, Stage
from msa2conv.flops import count_flops
from msa2conv.levers import DEFAULT, floor, resolve_levers
from msa2conv.levers.base import host_option
from msa2conv.levers.merge_tokens import StreamRecord
from msa2conv.merging import Merged
from msa2conv.plan import Shorten
from msa2conv.stream import Drop, MergedStream
from msa2conv.train.lessons import changed
from msa2conv.transforms.apply import apply_edits

SMALL = MergeTokens(keep=(0.7, 0.4), drops=2)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return vit(depth=3)


@pytest.fixture(scope="module")
def record(model: nn.Module) -> StreamRecord:
    seen = msa2conv.inspect(model)
    found = SMALL.record(seen.claims, seen.costs)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def result(model: nn.Module) -> Conversion:
    return msa2conv.convert(model, 0.6, data=images(), levers=(SMALL, "ffn"))


def test_every_sequence_of_drops_is_offered(record: StreamRecord) -> None:
    """16 patches to 11 or 6, behind three attentions: six single drops, three pairs of places."""
    found = [setting.option().name for setting in record.settings() if setting.option]
    single = [f"{keep} from {block}" for block in "012" for keep in (11, 6)]
    double = [f"11 from {a}, 6 from {b}" for a, b in itertools.combinations("012", 2)]
    assert sorted(found) == sorted(single + double)
    assert [option.name for option in record.to_measure()] == single


@pytest.mark.parametrize(
    ("depth", "places", "blocks"),
    [(5, 12, [0, 1, 2, 3, 4]), (5, 3, [0, 2, 4]), (5, 2, [0, 4]), (6, 4, [0, 2, 3, 5]), (1, 12, [0])],
)
def test_in_deep_networks_places_are_spread(depth: int, places: int, blocks: list[int]) -> None:
    seen = msa2conv.inspect(vit(depth=depth))
    found = MergeTokens(keep=(0.5,), drops=1, places=places).record(seen.claims, seen.costs)
    assert found is not None
    assert [option.name for option in found.to_measure()] == [f"8 from {block}" for block in blocks]


def test_a_setting_costs_what_is_counted(model: nn.Module, record: StreamRecord) -> None:
    base = record.costs.base
    for setting in record.settings():
        assert setting.option is not None
        option = setting.option()
        hybrid = msa2conv.lift(model, record.claims.sites)
        hosts = {host.site: host for host in record.hosts()}
        saved = sum(hosts[path].flops - hosts[path].on(count).flops for path, count in setting.tokens.items())  # type: ignore[union-attr]
        with hybrid.pinned({option.site: hybrid.branch(option)}) as pinned:
            assert count_flops(pinned, images(1)) == base + setting.flops - saved
        assert setting.flops == option.flops and sum(setting.rounds) == option.rounds > 0


def test_a_further_drop_is_charged_with_what_it_adds(record: StreamRecord) -> None:
    scores = {"11 from 0": 0.2, "6 from 0": 0.9, "11 from 1": 0.1, "6 from 1": 0.4, "11 from 2": 0.5, "6 from 2": 0.3}
    scored = record.with_scores(scores)
    found = {setting.option().name: setting.scores for setting in scored.settings() if setting.option}
    assert found["6 from 0"] == (0.9,)
    assert found["11 from 0, 6 from 1"] == pytest.approx((0.2, 0.3))
    assert found["11 from 0, 6 from 2"] == pytest.approx((0.2, 0.0)), "never less than nothing"


def test_rounds_are_those_that_run(model: nn.Module, record: StreamRecord) -> None:
    seen = msa2conv.inspect(model)
    through = [setting.option() for setting in record.settings() if setting.option]
    inside = [
        option
        for site in seen.claims.sites
        for option in MergeInSite().around(host_option(site, seen.costs), site, seen.costs)
    ]
    assert {option.rounds for option in through} >= {1, 3} and {option.rounds for option in inside} >= {1, 2}
    for option in (*through, *inside):
        hybrid = copy.deepcopy(model)
        apply_edits(hybrid, option.edits)
        found = [len(module.schedule) for module in hybrid.modules() if isinstance(module, Merged)]
        if isinstance(hybrid.blocks, MergedStream):
            found += map(len, hybrid.blocks.schedules.values())
        assert option.rounds == sum(found)


def test_a_conversion_merges_and_every_law_holds(model: nn.Module, result: Conversion) -> None:
    assert isinstance(result.model.blocks, MergedStream)
    assert count_flops(result.model, images(1)) == result.plan.flops <= 0.6 * result.plan.base.flops
    assert result.report.laws["lowering"] < 1e-5
    assert next(iter(result.plan.choices)) == "blocks"
    assert f"patches left through blocks: {result.plan.choices['blocks']}" in str(result.plan)
    together, alone = result.model(images(3))[1:2], result.model(images(3)[1:2])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    assert isinstance(model.blocks, nn.Sequential), "the original is as it was"


def test_the_file_holds_it(model: nn.Module, result: Conversion, tmp_path: Path) -> None:
    loaded = msa2conv.load(result.save(tmp_path / "hybrid.safetensors"), vit(depth=3))
    assert same(loaded, result.model) and isinstance(loaded.blocks, MergedStream)
    torch.testing.assert_close(loaded(images(4)), result.model(images(4)), rtol=0, atol=0)


def test_a_saved_calibration_decides_the_same(model: nn.Module, result: Conversion, tmp_path: Path) -> None:
    assert result.calibration is not None
    path = result.calibration.save(tmp_path / "calibration.safetensors")
    loaded = Calibration.load(path, msa2conv.inspect(model).claims)
    assert msa2conv.convert(model, 0.6, calibration=loaded).plan == result.plan


def test_an_interrupted_calibration_goes_on(model: nn.Module, result: Conversion, tmp_path: Path) -> None:
    arguments = {"data": images(), "levers": (SMALL, "ffn"), "resume": tmp_path}
    first = msa2conv.calibrate(model, **arguments)
    again = msa2conv.calibrate(model, **arguments)
    assert first.stream is not None and again.stream is not None and result.calibration is not None
    assert first.stream.scores == again.stream.scores == result.calibration.stream.scores  # type: ignore[union-attr]


def test_it_is_tried_by_default(model: nn.Module) -> None:
    assert resolve_levers(None) == resolve_levers("all") and "merge_tokens" in DEFAULT
    result = msa2conv.convert(model, 0.6, data=images())
    assert result.calibration is not None and result.calibration.stream is not None
    through = {name for name in result.report.candidates if "nothing through" not in name}
    assert through, "plans that merge through the network were compared"
    assert isinstance(result.model.blocks, nn.Sequential) == ("blocks" not in result.plan.choices)
    named = msa2conv.convert(model, 0.6, data=images(), levers=("ffn", "merge_in_site"))
    assert named.calibration is not None and named.calibration.stream is None


def test_what_blocks_return_on_the_way_is_there(model: nn.Module, result: Conversion) -> None:
    """timm's loops over blocks: every state has its grid, and the last is what the network goes on with."""
    x = images(3)
    with torch.no_grad():
        features = result.model.forward_features(x)
        final, states = result.model.forward_intermediates(x)
        original = model.forward_intermediates(x, intermediates_only=True)
        early = result.model.forward_intermediates(x, [1], stop_early=True, intermediates_only=True)
        layers = result.model.get_intermediate_layers(x, n=3, reshape=True)
    torch.testing.assert_close(final, features, rtol=1e-5, atol=1e-5)
    assert [state.shape for state in states] == [state.shape for state in original] and len(states) == 3
    torch.testing.assert_close(early[0], states[1])
    torch.testing.assert_close(layers, states)


def test_layers_behind_the_last_intermediate_can_go(result: Conversion) -> None:
    short, x = copy.deepcopy(result.model), images(3)
    short.prune_intermediate_layers([1])
    assert isinstance(short.blocks, MergedStream) and list(dict(short.blocks.named_children())) == ["0", "1"]
    with torch.no_grad():
        expected = result.model.forward_intermediates(x, [1], intermediates_only=True, output_fmt="NLC", norm=True)
        torch.testing.assert_close(short.forward_features(x)[:, 1:], expected[0], rtol=1e-5, atol=1e-5)


def test_the_floor_is_what_the_cheapest_setting_reaches(model: nn.Module) -> None:
    levers = resolve_levers((SMALL,))
    seen = msa2conv.inspect(model, levers=levers)
    drops = [Drop(block="0", keep=6)]
    stream = seen.claims.stream
    assert stream is not None and seen.floor == floor(seen.claims, seen.costs, levers)
    assert seen.floor == count_flops(_shortened(model, stream.edit(drops)), images(1))
    choice = msa2conv.choose(model, msa2conv.calibrate(model, images(), levers=levers), seen.floor)
    assert msa2conv.make_plan(model, seen, choice.choices)[0].flops == seen.floor


def _shortened(model: nn.Module, edit: Shorten) -> nn.Module:
    shortened = copy.deepcopy(model)
    apply_edits(shortened, [edit])
    return shortened


@pytest.mark.parametrize("keep", [(0.5, 1.0), (0.0,), ()])
def test_keep_is_a_fraction(keep: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=r"fraction of the patches|at least 1 item"):
        MergeTokens(keep=keep)


def test_it_can_be_fine_tuned(result: Conversion) -> None:
    """Narrowed FFNs learn from the teacher's own activations, on all tokens; the sequence itself is no site."""
    assert changed(result) and "blocks" not in changed(result)
    stages = [Stage(kind="local", epochs=1), Stage(kind="distill", epochs=1)]
    after = msa2conv.finetune(result, images(32, seed=2), stages=stages, batch_size=8, progress=False)
    assert isinstance(after.model.blocks, MergedStream) and after.plan == result.plan
    assert not same(after.model, result.model)


def test_it_can_be_polished(model: nn.Module, result: Conversion) -> None:
    """Hidden states of all tokens and of fewer cannot be compared: the outputs teach."""
    polished = msa2conv.distill(result.model, model, images(32), 2, sites=result.plan.sites, progress=False)
    assert isinstance(polished.blocks, MergedStream) and not same(polished, result.model)
