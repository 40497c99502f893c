"""Laws 1 to 9 of the architecture, for every tiny model. A law that breaks here is a bug, never a tolerance."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest
import tiny
import torch
from conftest import TARGET, Case, Hybrid, case_of
from hypothesis import given, settings, strategies as st
from sampled import sampled
from torch import Tensor, nn

import msa2conv
from msa2conv import errors
from msa2conv.flops import count_flops
from msa2conv.folding import PASSES
from msa2conv.laws import decision_margins, surest
from msa2conv.layouts import Layout
from msa2conv.options import Option
from msa2conv.plan import Plan, Replace
from msa2conv.search.solve import solve
from msa2conv.sites import AttentionSite
from msa2conv.transforms.apply import apply
from msa2conv.transforms.lift import Supernet, lift

TESTS = Path(__file__).parents[1]
few = pytest.mark.parametrize(
    "case", sampled(tiny.NAMES, ("vit", "distilled", "swin_padded", "foreign")), indirect=True
)


def assert_close(found: Tensor, expected: Tensor) -> None:
    """The tolerance of the laws."""
    if not expected.numel():
        return
    difference, scale = float((found - expected).abs().max()), max(1.0, float(expected.abs().max()))
    assert difference <= 1e-5 * scale, f"differs by {difference:.2e} at a scale of {scale:.2e}"


CLEAR = 1e-4  # a margin that rounding cannot reach; closer decisions of a merge may fall either way


def clear(model: nn.Module, images: Tensor) -> Tensor:
    """Those images whose merges are decided clearly, or the one where they are most: a Swin has thousands of them."""
    decided = images[decision_margins(model, images) > CLEAR]
    return decided if len(decided) else surest(model, images, 1)


@torch.no_grad()
def run(model: nn.Module, images: Tensor) -> Tensor:
    return model.eval()(images)


def test_tiny_models_are_worth_testing_on(case: Case) -> None:
    """Outputs differ between images, and every attention is heard."""
    output = run(case.work, case.images)
    assert float(output.std(0).mean()) > 0.1
    for site in case.seen.claims.attentions:
        skip = next(option for option in case.options[site.path] if option.name == "skip")
        without = run(case.with_option(skip), case.images)
        assert float((without - output).abs().max()) > 0.1


def test_every_attention_and_ffn_is_a_site(case: Case) -> None:
    blocks = 4 if case.name.startswith("swin") else 3
    assert (len(case.seen.claims.attentions), len(case.seen.claims.ffns)) == (blocks, blocks)
    assert not case.seen.claims.refusals


# Law 1


def test_lifting_is_the_identity(case: Case) -> None:
    net = lift(case.work, case.seen.claims.sites)
    assert len(net.nodes) == len(case.seen.claims.sites)
    assert_close(run(net.model, case.images), run(case.work, case.images))


# Law 2


def pinned_output(case: Case, net: Supernet, choices: Mapping[str, Option], images: Tensor) -> Tensor:
    branches = {path: net.branch(option) for path, option in choices.items() if option.edits}
    with net.pinned(branches) as pinned:
        return run(pinned, images)


def test_lowering_is_exact_for_every_option_of_every_site(case: Case) -> None:
    images, net = case.images[:3], lift(case.work, case.seen.claims.sites)
    for path, options in case.options.items():
        for option in every_kind(options):
            hybrid = case.with_option(option)
            decided = clear(hybrid, images)
            assert_close(run(hybrid, decided), pinned_output(case, net, {path: option}, decided))


def every_kind(options: list[Option]) -> list[Option]:
    """All that stand alone, and some of those that merge tokens too: the sparsest and a few between."""
    merged = [option for option in options if option.inner is not None]
    return [option for option in options if option.inner is None] + merged[:: max(1, len(merged) // 2)] + merged[-1:]


def test_lowering_is_exact_for_the_chosen_plan_and_for_random_ones(case: Case) -> None:
    net = lift(case.work, case.seen.claims.sites)
    chosen = {path: option_named(case, path, name) for path, name in case.result.plan.choices.items()}
    for model, choices in [(case.result.model, chosen), *((h.model, h.choices) for h in case.random_hybrids)]:
        decided = clear(model, case.images)
        assert_close(run(model, decided), pinned_output(case, net, choices, decided))


def option_named(case: Case, path: str, name: str) -> Option:
    return next(option for option in case.options[path] if option.name == name)


# Law 3


def summed_flops(case: Case, choices: Mapping[str, Option]) -> int:
    return case.seen.costs.rest + sum(option.flops for option in choices.values())


def assert_costs_what_it_says(case: Case, hybrid: Hybrid) -> None:
    counted = count_flops(hybrid.model, case.images[:1])
    assert counted == hybrid.plan.flops == summed_flops(case, hybrid.choices)
    assert hybrid.plan.parameters == sum(parameter.numel() for parameter in hybrid.model.parameters())


def test_the_original_costs_what_it_says(case: Case) -> None:
    costs = case.seen.costs
    assert count_flops(case.work, case.images[:1]) == costs.base == costs.rest + sum(costs.hosts.values())


@few
def test_random_plans_cost_what_they_say(case: Case) -> None:
    for hybrid in case.random_hybrids:
        assert_costs_what_it_says(case, hybrid)


def test_the_chosen_plan_costs_what_it_says(case: Case) -> None:
    plan, report = case.result.plan, case.result.report
    chosen = {path: option_named(case, path, name) for path, name in plan.choices.items()}
    assert_costs_what_it_says(case, Hybrid(chosen, plan, {}, case.result.model))
    assert (report.flops_before, report.flops_after) == (plan.base.flops, plan.flops)
    target = int(TARGET * plan.base.flops)
    assert plan.flops <= target
    assert plan.flops >= 0.99 * target or not reachable(case, math.ceil(0.99 * target), target)


def test_every_kind_of_option_costs_what_it_says(case: Case) -> None:
    """All sites at once, neighbours with different kinds: half as many networks as an attention has kinds."""
    kinds = {path: every_kind(group) for path, group in case.options.items()}
    turns = math.ceil(max(len(kinds[site.path]) for site in case.seen.claims.attentions) / 2)
    for turn in range(turns):
        choices = {}
        for sites in (case.seen.claims.attentions, case.seen.claims.ffns):
            for index, site in enumerate(sites):
                group = kinds[site.path]
                step = max(2, math.ceil(len(group) / turns))
                choices[site.path] = group[(turn * step + index) % len(group)]
        assert_costs_what_it_says(case, case.hybrid({path: choices[path] for path in kinds}))


# Law 4


def reachable(case: Case, low: int, high: int) -> bool:
    """Whether any choice of options costs between `low` and `high`; by listing all reachable sums."""
    groups = [[option.flops for option in group] for group in case.options.values()]
    cheapest = [min(group) for group in groups]
    unit = math.gcd(*(flops - least for group, least in zip(groups, cheapest, strict=True) for flops in group))
    sums = 1  # bit i: cost floor + i * unit can be reached
    for group, least in zip(groups, cheapest, strict=True):
        sums = merged(sums << ((flops - least) // unit) for flops in group)
    floor = case.seen.costs.rest + sum(cheapest)
    first, last = -(-(max(low, floor) - floor) // unit), (high - floor) // unit
    return high >= floor and (sums >> first) & ((1 << (last - first + 1)) - 1) != 0


def merged(bits: Iterable[int]) -> int:
    total = 0
    for each in bits:
        total |= each
    return total


def targets(case: Case) -> list[int]:
    floor, base = case.seen.floor, case.seen.costs.base
    return [floor, *(int(floor + share * (base - floor)) for share in (0.03, 0.2, 0.4, 0.6, 0.8, 0.97)), base - 1]


def test_the_budget_is_never_exceeded_and_is_used(case: Case) -> None:
    used = 0
    for target in targets(case):
        flops = summed_flops(case, solve(case.options, case.seen.costs.rest, target))
        assert flops <= target
        if reachable(case, math.ceil(0.99 * target), target):
            used += 1
            assert flops >= 0.99 * target
    assert used >= 6, "the tiny models ought to allow most budgets"


@pytest.mark.parametrize("name", sampled(tiny.NAMES, ("vit", "swin_padded", "foreign")))
@pytest.mark.parametrize("share", [0.02, 0.97])
def test_convert_keeps_a_budget_at_either_end(name: str, share: float) -> None:
    case = case_of(name)
    floor, base = case.seen.floor, case.seen.costs.base
    target = int(floor + share * (base - floor))
    # targets below 1e6 FLOPs cannot be written as a number, but every target can be written as a text
    result = msa2conv.convert(case.model, f"{target / 1e3:.3f}k", calibration=case.calibration, **case.keywords)
    flops = count_flops(result.model, case.images[:1])
    assert flops == result.plan.flops <= target
    assert flops >= 0.99 * target or not reachable(case, math.ceil(0.99 * target), target)


def test_a_budget_below_the_floor_is_refused(case: Case) -> None:
    with pytest.raises(errors.InfeasibleBudget):
        solve(case.options, case.seen.costs.rest, case.seen.floor - 1)


# Law 5


def test_a_plan_round_trips_through_json(case: Case) -> None:
    for plan in [case.result.plan, *(hybrid.plan for hybrid in case.random_hybrids)]:
        again = Plan.from_json(plan.model_dump_json())
        assert again == plan
        assert again.model_dump_json() == plan.model_dump_json()


def test_load_returns_what_was_saved(case: Case, tmp_path: Path) -> None:
    path = case.result.save(tmp_path / "hybrid.safetensors")
    loaded = msa2conv.load(path, tiny.build(case.name, seed=7))
    assert type(loaded) is type(case.model)
    assert torch.equal(run(loaded, case.images), run(case.result.model, case.images))
    assert msa2conv.read_plan(path) == case.result.plan


FRESH = """
import sys
sys.path.insert(0, {tests!r})
import torch, tiny, msa2conv
torch.set_num_threads(1)
hybrid = msa2conv.load({file!r}, tiny.build({name!r}, seed=7))
with torch.no_grad():
    torch.save(hybrid(tiny.images({name!r})), {output!r})
print(*sorted({{name.partition(".")[0] for name in sys.modules}}))
"""


@pytest.mark.parametrize("name", sampled(["foreign", "swin_padded"], 1))
def test_a_fresh_process_needs_no_search_and_gives_the_same_bits(name: str, tmp_path: Path) -> None:
    case, output = case_of(name), tmp_path / "output.pt"
    file = case.result.save(tmp_path / "hybrid.safetensors")
    code = FRESH.format(tests=str(TESTS), file=str(file), name=name, output=str(output))
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    loaded_packages = set(done.stdout.split())
    assert "torch" in loaded_packages
    assert not loaded_packages & {"fvcore", "torch_pruning", "scipy", "accelerate"}
    assert torch.equal(torch.load(output, weights_only=True), run(case.result.model, case.images))


# Law 6


def test_the_users_model_is_not_touched(case: Case) -> None:
    """Snapshots taken around a whole `convert` (observe, calibrate, search, apply, verify)."""
    assert case.before == case.after


def test_a_snapshot_notices_every_kind_of_change() -> None:
    changes = {
        "weight": lambda m: m.head.weight.data.add_(1e-7),
        "requires_grad": lambda m: m.head.requires_grad_(False),
        "gradient": lambda m: m.zero_grad(),
        "mode": lambda m: m.blocks[1].attn.eval(),
        "hook": lambda m: m.blocks[0].register_forward_hook(tiny.hear_nothing),
        "module": lambda m: setattr(m.blocks[0], "attn", nn.Identity()),
        "shadowed forward": lambda m: setattr(m.blocks[0], "forward", print),
        "attribute": lambda m: setattr(m.blocks[0].attn, "num_heads", 1),
    }
    for name, change in changes.items():
        model = tiny.live_in(tiny.build("vit"))
        before = tiny.snapshot(model)
        change(model)
        assert tiny.snapshot(model) != before, name


class Sabotage(RuntimeError):
    pass


def fail(*_: object, **__: object) -> None:
    raise Sabotage


STAGES = [
    "cost.CostModel.measure",
    "search.calibrate.default_measure",
    "levers.ffn.FFNStatistics.fit",
    "search.replay.Replay.run",
    "search.solve.solve",
    "api.make_plan",
    "api.apply",
    "api.verify",
    "api.distill",
    "api._cast",
]


@pytest.mark.parametrize(("name", "stage"), [*(("foreign", each) for each in STAGES), ("vit", "api._cast")])
def test_the_users_model_is_not_touched_when_something_fails(
    name: str, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = case_of(name)
    monkeypatch.setattr(f"msa2conv.{stage}", fail)
    with pytest.raises(Sabotage):
        msa2conv.convert(case.model, 0.6, data=case.images[:8], distill_steps=1, **case.keywords)
    assert tiny.snapshot(case.model) == case.before


@pytest.mark.parametrize("name", sampled(["vit", "foreign", "swin"], 2))
def test_the_users_model_is_not_touched_when_the_data_turn_to_nan_inside(name: str) -> None:
    """Images so large that activations overflow in the middle of the calibration."""
    case = case_of(name)
    with pytest.raises(errors.NonFiniteValue):
        msa2conv.convert(case.model, 0.6, data=case.images * 1e38, **case.keywords)
    assert tiny.snapshot(case.model) == case.before


def test_the_model_given_to_apply_and_load_is_not_touched(case: Case, tmp_path: Path) -> None:
    path = case.result.save(tmp_path / "hybrid.safetensors")
    msa2conv.load(path, case.model)
    msa2conv.apply(case.result.plan, case.model, dict(case.result.model.state_dict()))
    assert tiny.snapshot(case.model) == case.before


def test_the_hybrid_shares_no_memory_with_the_model(case: Case) -> None:
    own = {tensor.data_ptr() for tensor in case.model.state_dict().values() if tensor.numel()}
    assert not own & {tensor.data_ptr() for tensor in case.result.model.state_dict().values() if tensor.numel()}


# Law 7


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    side, pattern = st.integers(1, 9), draw(st.sampled_from(["b (h w) c", "b h w c", "b c h w", "windows"]))
    grid = draw(st.tuples(side, side))
    if pattern != "windows":
        prefix = draw(st.integers(0, 4)) if pattern == "b (h w) c" else 0
        return Layout(pattern=pattern, grid=grid, prefix=prefix)
    shift = draw(st.tuples(*(st.integers(0, edge - 1) for edge in grid)))
    order = draw(st.sampled_from(["(b nh nw) (h w) c", "b (nh nw) (h w) c", "(b nw nh) h w c"]))
    return Layout(pattern=order, grid=grid, window=draw(st.tuples(side, side)), shift=shift)


@settings(max_examples=200, deadline=None)
@given(layout=layouts(), batch=st.integers(1, 3), channels=st.integers(1, 4))
def test_a_layout_is_a_bijection_on_real_positions(layout: Layout, batch: int, channels: int) -> None:
    map_BCHW = 1 + torch.rand(batch, channels, *layout.grid)
    prefix_BPC = torch.rand(batch, layout.prefix, channels) if layout.prefix else torch.zeros(0)
    tokens = layout.from_map(prefix_BPC, map_BCHW)
    prefix_back, map_back = layout.to_map(tokens)
    assert torch.equal(prefix_back, prefix_BPC) and torch.equal(map_back, map_BCHW)
    patches = tokens[:, layout.prefix :] if layout.prefix else tokens
    assert int((patches != 0).sum()) == map_BCHW.numel(), "every real value appears once, the rest is zero"


@settings(max_examples=100, deadline=None)
@given(layout=layouts(), channels=st.integers(1, 4))
def test_padding_is_ignored_on_the_way_back(layout: Layout, channels: int) -> None:
    """to_map reads real positions only: garbage in padded ones changes nothing."""
    prefix_BPC = torch.rand(2, layout.prefix, channels) if layout.prefix else torch.zeros(0)
    map_BCHW = 1 + torch.rand(2, channels, *layout.grid)
    tokens = layout.from_map(prefix_BPC, map_BCHW)
    spoiled = torch.where(tokens == 0, 7.0, tokens)
    assert torch.equal(layout.to_map(spoiled)[1], map_BCHW)


def test_tokens_lie_where_the_backbone_puts_them(case: Case) -> None:
    """The claimed Layout maps a token to the grid position whose patch of the image it was made from."""
    for site in case.seen.claims.attentions:
        assert site.layout.positions == site.layout.grid[0] * site.layout.grid[1]
    first = case.seen.claims.attentions[0]
    heard = []
    handle = case.work.get_submodule(first.path).register_forward_pre_hook(
        lambda _m, args, kwargs: heard.append(args[0] if args else kwargs[first.io.x]), with_kwargs=True
    )
    image = torch.zeros(1, 3, *case.images.shape[2:])
    for row, column in [(0, 0), (first.layout.grid[0] - 1, 1), (1, first.layout.grid[1] - 1)]:
        patch = image.shape[2] // first.layout.grid[0], image.shape[3] // first.layout.grid[1]
        lit = image.clone()
        lit[:, :, row * patch[0] : (row + 1) * patch[0], column * patch[1] : (column + 1) * patch[1]] = torch.randn(
            3, *patch, generator=torch.Generator().manual_seed(0)
        )
        run(case.work, image), run(case.work, lit)
        dark_map, lit_map = (first.layout.to_map(tokens)[1] for tokens in heard[-2:])
        change_HW = (dark_map - lit_map).abs().amax((0, 1))
        assert divmod(int(change_HW.argmax()), first.layout.grid[1]) == (row, column)
    handle.remove()


@pytest.mark.parametrize("name", ["swin", "swin_padded"])
def test_swins_layout_is_timms_own_partition(name: str) -> None:
    from timm.models.swin_transformer import window_partition

    case = case_of(name)
    shifted = padded = 0
    for site in case.seen.claims.attentions:
        assert isinstance(site, AttentionSite)
        block = case.work.get_submodule(site.block)
        window, (rows, columns) = block.window_size, block.shift_size
        height, width = site.layout.grid
        map_BHWC = torch.randn(2, height, width, 5)
        rolled = torch.roll(map_BHWC, (-rows, -columns), (1, 2))
        pad = (-width % window[1], -height % window[0])
        windows = window_partition(nn.functional.pad(rolled, (0, 0, 0, pad[0], 0, pad[1])), window)
        tokens = site.layout.from_map(torch.zeros(0), map_BHWC.permute(0, 3, 1, 2))
        assert torch.equal(tokens, windows.flatten(1, 2))
        shifted, padded = shifted + any(block.shift_size), padded + any(pad)
    assert shifted, "at least one block has to be shifted"
    assert bool(padded) == (name == "swin_padded")


# Law 8


def assert_batch_invariant(model: nn.Module, images: Tensor) -> float:
    """-> share of the images whose merges are decided clearly: those are compared, within any batch."""
    decided, together = decision_margins(model, images) > CLEAR, run(model, images)
    alone = torch.cat([run(model, image[None]) for image in images])
    assert_close(alone[decided], together[decided])
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    assert_close(run(model, images[order])[decided[order]], together[order][decided[order]])
    return float(decided.float().mean())


def test_an_image_does_not_depend_on_its_batch(case: Case) -> None:
    models = [case.result.model, *(hybrid.model for hybrid in case.random_hybrids)]
    shares = [assert_batch_invariant(model, case.images[:6]) for model in models]
    assert max(shares) > 0, "no clear decisions to say anything about"


@few
def test_no_option_mixes_images(case: Case) -> None:
    """Every mixer, one at a time."""
    for site in case.seen.claims.attentions:
        for option in every_kind(case.options[site.path]):
            assert_batch_invariant(case.with_option(option), case.images[:3])


# Law 9


@few
def test_optional_passes_do_not_change_the_output(case: Case) -> None:
    """One after the other, on the chosen plan and on random ones; and their edits alone make the same network again."""
    hybrids = [(case.result.plan, case.result.model), *((h.plan, h.model) for h in case.random_hybrids)]
    for plan, model in hybrids:
        images = clear(model, case.images[:6])
        expected, edits, found = run(model, images), plan.edits, model
        for one in PASSES.values():
            edits, found = one(plan.model_copy(update={"edits": edits}), found)
        again = apply(plan.model_copy(update={"edits": edits}), case.work, found.state_dict())
        output, scale = run(found, images), max(1.0, float(expected.abs().max()) if expected.numel() else 1.0)
        assert float((output - expected).abs().max()) <= 1e-4 * scale
        assert torch.equal(run(again, images), output)
        assert count_flops(found, images[:1]) <= plan.flops
        windows = [edit for edit in edits if isinstance(edit, Replace) and _windowed(edit)]
        assert not (case.name.startswith("swin") and windows), "every mixer of a Swin gives up its windows"


def _windowed(edit: Replace) -> bool:
    layout = getattr(edit.spec, "layout", None)
    return isinstance(layout, Layout) and layout.window not in (None, layout.grid)
