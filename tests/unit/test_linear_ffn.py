"""Lever "linear_ffn": exact where the FFN is linear or constant already, the best fit elsewhere, and cheap to run."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import Case
from models import images, vit
from pydantic import ValidationError
from torch import Tensor, nn

import msa2conv
from msa2conv import LinearFFN, MergeTokens
from msa2conv.cost import CostModel
from msa2conv.flops import count_flops, flops_by_module
from msa2conv.layouts import Layout
from msa2conv.levers import floor, resolve_levers
from msa2conv.levers.linear_ffn import Fitted, LinearRecord
from msa2conv.ops import IO, Arrangement, LinearMixer, arranged, as_sequence
from msa2conv.plan import Replace
from msa2conv.sites import FFNSite, Merging, Units
from msa2conv.stream import Drop
from msa2conv.transforms.lift import lift

DIM, HIDDEN, COUNT = 12, 40, 9


def site_of(arrangement: Arrangement = "b n c", prefix: int = 0, positional: tuple[str, ...] = ()) -> FFNSite:
    patches = COUNT - prefix
    merging = Merging(arrangement, prefix, 1, patches, IO(positional=positional))
    return FFNSite("mlp", "mlp", DIM, HIDDEN, Layout(grid=(1, patches), prefix=prefix), "down", Units(()), merging)


def fitted(
    site: FFNSite, lever: LinearFFN, x_BNC: Tensor, out_BNC: Tensor, weight: float = 1.0, beside: int = 0
) -> LinearRecord:
    """Of an FFN that takes `beside` multiply-adds a token which are not its hidden units'."""
    hosts = 2 * DIM * HIDDEN * COUNT
    samples = tuple((count, (2 * DIM * HIDDEN + beside) * count) for count in (COUNT, COUNT - 1))
    assert site.merging is not None
    arrangement = site.merging.arrangement
    shape = tuple(arranged(x_BNC[:1], arrangement).shape)
    costs = CostModel(10**6, {"mlp": hosts}, {"mlp": hosts // HIDDEN}, {"mlp": shape}, {"mlp": samples})
    statistics = lever.statistics(site, nn.Identity(), weight, 1.0)
    for x, out in zip(x_BNC.split(50), out_BNC.split(50), strict=True):
        statistics.update(arranged(x, arrangement), arranged(out, arrangement))
    return statistics.fit(nn.Identity(), costs)


def error(candidate: Fitted, x_BNC: Tensor, out_BNC: Tensor) -> float:
    """Relative to the variance of the output."""
    mixer = candidate.spec.build(IO())
    mixer.load_state_dict(dict(candidate.tensors))
    arrangement = candidate.spec.arrangement
    found = as_sequence(mixer(arranged(x_BNC, arrangement)), arrangement).detach()
    return float((found - out_BNC).square().sum() / (out_BNC - out_BNC.mean((0, 1))).square().sum())


def tokens(seed: int = 0, count: int = 200) -> Tensor:
    """Far from zero mean, and of channels that are not equally strong."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, COUNT, DIM, generator=generator) * torch.logspace(0, -1, DIM) + 2.0


def matrix(rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(DIM, rank, generator=generator) @ torch.randn(rank, DIM, generator=generator)


@pytest.mark.parametrize("arrangement", ["b n c", "n b c", "b h w c", "b c h w"])
def test_what_is_linear_already_is_recovered(arrangement: Arrangement) -> None:
    x = tokens()
    out = x @ matrix(DIM) - 3.0
    lever = LinearFFN(ranks=(0, 0.5, 1), ridge=1e-9)
    nothing, pair, whole = fitted(site_of(arrangement), lever, x, out).candidates
    assert (nothing.name, pair.name, whole.name) == ("0/40", "linear6/40", "linear/40")
    assert error(whole, x, out) < 1e-8 < 1e-3 < error(pair, x, out) < error(nothing, x, out)
    assert error(nothing, x, out) == pytest.approx(1.0, abs=1e-4)


def test_a_pair_of_layers_is_the_best_of_its_rank() -> None:
    x = tokens()
    out = x @ matrix(3) + 1.0
    lever = LinearFFN(ranks=(0.25, 0.17), ridge=1e-9)
    two, three = fitted(site_of(), lever, x, out).candidates
    assert (two.name, three.name) == ("linear2/40", "linear3/40")
    assert error(three, x, out) < 1e-8
    strength = torch.linalg.svdvals((out - out.mean((0, 1))).reshape(-1, DIM))
    best = float(strength[2:].square().sum() / strength.square().sum())  # Eckart and Young, of the outputs themselves
    assert error(two, x, out) == pytest.approx(best, rel=1e-3)


def test_it_is_the_regression_that_lstsq_finds() -> None:
    x = tokens()
    out = torch.tanh(x @ matrix(DIM))
    (whole,) = fitted(site_of(), LinearFFN(ranks=(1,), ridge=1e-9), x, out).candidates
    rows = torch.cat((x.reshape(-1, DIM), torch.ones(x[..., 0].numel(), 1)), 1).double()
    best = torch.linalg.lstsq(rows, out.reshape(-1, DIM).double()).solution.float()
    torch.testing.assert_close(whole.tensors["expand.weight"], best[:-1].T, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(whole.tensors["expand.bias"], best[-1], rtol=1e-3, atol=1e-4)


def test_prefix_rows_count_by_how_much_they_are_heard() -> None:
    x = tokens()
    out = torch.cat((x[:, :1] @ matrix(DIM), x[:, 1:] @ matrix(4)), 1)
    site, lever = site_of(prefix=1), LinearFFN(ranks=(0, 1))
    even, heard = fitted(site, lever, x, out), fitted(site, lever, x, out, weight=300.0)
    for one, other in zip(even.candidates, heard.candidates, strict=True):
        mixers = [each.spec.build(IO()) for each in (one, other)]
        for mixer, each in zip(mixers, (one, other), strict=True):
            mixer.load_state_dict(dict(each.tensors))
        first, second = ((mixer(x)[:, 0] - out[:, 0]).square().sum() for mixer in mixers)
        assert second < 0.9 * first
    capped = fitted(site, lever, x, out, weight=(COUNT - 1.0)).candidates
    for one, other in zip(heard.candidates, capped, strict=True):  # together for as much as all patches
        assert all(torch.equal(one.tensors[name], value) for name, value in other.tensors.items())


def test_ridges_of_few_images_are_stronger() -> None:
    x = tokens()
    site, lever = site_of(), LinearFFN(ranks=(1,))
    assert lever.statistics(site, nn.Identity(), 1.0, 10.0).lever.ridge == pytest.approx(10 * lever.ridge)
    strong = LinearFFN(ranks=(1,), ridge=1e6)
    (shrunk,) = fitted(site, strong, x, x @ matrix(DIM)).candidates
    assert float(shrunk.tensors["expand.weight"].abs().max()) < 1e-4


@pytest.mark.parametrize("beside", [0, 7])
def test_what_an_ffn_takes_beside_its_units_is_saved_too(beside: int) -> None:
    """A norm over the hidden units, for example, which no width gets rid of."""
    x = tokens()
    record = fitted(site_of(), LinearFFN(), x, torch.tanh(x), beside=beside)
    flops = {option.name: option.flops + beside * COUNT for option in record.to_measure()}
    assert flops == {"0/40": 0, "linear3/40": COUNT * 2 * DIM * 3, "linear/40": COUNT * DIM * DIM}
    fewer = {name: option.on(4).flops + beside * COUNT for name, option in zip(flops, record.to_measure(), strict=True)}
    assert fewer == {"0/40": 0, "linear3/40": 4 * 2 * DIM * 3, "linear/40": 4 * DIM * DIM}
    assert LinearFFN().cheapest(site_of(), record.costs).flops == -beside * COUNT


def test_what_is_no_cheaper_is_not_offered() -> None:
    x = tokens()
    site = FFNSite("mlp", "mlp", DIM, 5, Layout(grid=(1, COUNT)), "down", Units(()), site_of().merging)
    costs = CostModel(10**6, {"mlp": 1200}, {"mlp": 240}, {"mlp": (1, COUNT, DIM)}, {"mlp": ((9, 1200), (8, 1000))})
    statistics = LinearFFN().statistics(site, nn.Identity(), 1.0, 1.0)
    statistics.update(x, torch.tanh(x))
    assert [each.name for each in statistics.fit(nn.Identity(), costs).candidates] == ["0/5", "linear3/5"]


def test_arguments_that_the_ffn_did_not_listen_to_are_ignored() -> None:
    x = tokens()
    option = fitted(site_of(positional=("height", "width")), LinearFFN(ranks=(1,)), x, torch.tanh(x)).to_measure()[0]
    (edit,) = option.edits
    assert isinstance(edit, Replace)
    mixer = edit.spec.build(edit.io)
    torch.testing.assert_close(mixer(x, 3, width=3), mixer(x))


@pytest.mark.parametrize("arrangement", ["b n c", "n b c", "b h w c", "b c h w"])
@pytest.mark.parametrize("rank", [0, 3, DIM])
def test_it_costs_what_its_layers_cost(rank: int, arrangement: Arrangement) -> None:
    spec = msa2conv.ops.Linear(arrangement=arrangement, dim=DIM, rank=rank)
    mixer = spec.build(IO())
    assert isinstance(mixer, LinearMixer)
    x = arranged(tokens(count=1), arrangement)
    assert flops_by_module(mixer, x)[""] == spec.flops(COUNT) == COUNT * DIM * {0: 0, 3: 6, DIM: DIM}[rank]
    kept = {name: value.clone() for name, value in mixer.state_dict().items()}
    with torch.no_grad():
        mixer(x).add_(x)
        mixer(arranged(tokens(count=1)[:, :1], arrangement)).add_(1.0)  # where expanding would give the bias itself
    assert all(torch.equal(value, kept[name]) for name, value in mixer.state_dict().items())
    assert mixer(x).shape == x.shape and mixer.double()(x.double()).dtype == torch.float64


def test_every_ffn_whose_tokens_are_alone_is_offered_all_of_them(case: Case) -> None:
    for site in case.seen.claims.ffns:
        assert site.merging is not None
        names = {option.name for option in case.options[site.path]}
        kinds = ("0", f"linear{round(site.dim / 4)}", "linear")
        assert names >= {f"{kind}/{site.hidden}" for kind in kinds}
        assert not [name for name in names if name.startswith(("linear", "0/")) and "@" in name], "merging takes longer"


def test_where_a_token_needs_others_it_is_not_offered() -> None:
    lever, site = LinearFFN(), site_of()
    assert lever.applies(site)
    assert not lever.applies(FFNSite("mlp", "mlp", DIM, HIDDEN, site.layout, "down", Units(())))


def test_through_the_network_it_runs_on_the_tokens_that_are_left() -> None:
    """Law 2 and law 3 together with merging: the same as a pinned supernet, at the cost that the plan says."""
    model, levers = vit(depth=3), (LinearFFN(), MergeTokens(keep=(0.5,)))
    calibration = msa2conv.calibrate(model, images(), levers=levers, progress=False)
    seen = msa2conv.inspect(model)
    assert calibration.stream is not None and seen.claims.stream is not None
    tokens_of = seen.claims.stream.fewer([Drop(block="0", keep=8)])
    setting = next(s for s in calibration.settings() if s.option is not None and dict(s.tokens) == tokens_of)
    for index in (1, 2, 3):
        choices: dict[str, Any] = {"blocks": setting.option()}
        for path, options in calibration.options().items():
            option = options[index] if path.endswith("mlp") else options[0]
            choices[path] = option.on(tokens_of[path]) if path in tokens_of else option
        plan, tensors = msa2conv.make_plan(model, seen, choices)
        hybrid = msa2conv.apply(plan, model, tensors)
        assert count_flops(hybrid, images()[:1]) == plan.flops == calibration.costs.total(choices)
        net = lift(model, calibration.sites)
        with net.pinned(net.branches(choices)) as pinned, torch.no_grad():
            torch.testing.assert_close(pinned(images()[:4]), hybrid(images()[:4]))
        before = copy.deepcopy(model)
        with torch.no_grad():
            torch.testing.assert_close(net.model(images()[:2]), before(images()[:2]))


def test_the_floor_knows_it() -> None:
    model = vit(depth=3)
    seen = msa2conv.inspect(model)
    found = {names: floor(seen.claims, seen.costs, resolve_levers(names)) for names in ("ffn", "linear_ffn")}
    assert found["linear_ffn"] == seen.costs.outside([site.path for site in seen.claims.ffns]) < found["ffn"]
    result = msa2conv.convert(
        model, found["linear_ffn"] / seen.costs.base + 1e-6, data=images(), levers="linear_ffn", progress=False
    )
    assert set(result.plan.choices.values()) == {"0/192"} and result.plan.flops == found["linear_ffn"]
    assert "ffn      0   0   0 %" in str(result.plan)


def test_it_is_drawn_as_what_it_is() -> None:
    model = vit(depth=3)
    calibration = msa2conv.calibrate(model, images(), levers="linear_ffn", progress=False)
    for ranks, cell, legend in ((2, "L12", True), (3, "L", True), (1, "0", False), (0, "100", False)):
        choices = {path: options[ranks] for path, options in calibration.options().items()}
        plan, _ = msa2conv.make_plan(model, msa2conv.inspect(model), choices)
        assert str(plan).splitlines()[2].split() == ["ffn", cell, cell, cell, "%"]
        assert ("L a linear layer, or two" in str(plan)) is legend


REFUSED = [((), "at least 1 item"), ((1.5,), "less than or equal to 1"), ((-0.1,), "greater than or equal to 0")]


@pytest.mark.parametrize(("ranks", "text"), REFUSED)
def test_ranks_that_are_none_are_refused(ranks: tuple[float, ...], text: str) -> None:
    with pytest.raises(ValidationError, match=text):
        LinearFFN(ranks=ranks)
