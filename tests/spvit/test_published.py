"""The published architectures, the recipes that led to them, and docs/published.md."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from authors_code import assert_close, published_counts
from sampled import sampled
from torch import nn

import msa2conv
from msa2conv import spvit
from msa2conv.errors import ArchitectureMismatch, InvalidArgument
from msa2conv.plan import Plan, Replace
from msa2conv.spvit.recipe import Schedule

ROOT = Path(__file__).parents[2]
THEIRS = {
    "deit_tiny": "SPViT-DeiT-Ti",
    "deit_small": "SPViT-DeiT-S",
    "deit_base_t60": "SPViT-DeiT-B",
    "deit_base_t100": "SPViT-DeiT-B (l006_t100)",
    "swin_tiny": "SPViT-Swin-Ti",
    "swin_small": "SPViT-Swin-S",
    "swin_base": "SPViT-Swin-B (l01_t100)",
}
NAMES = ", ".join(THEIRS)


@pytest.fixture(scope="module", params=sampled(["deit_tiny", "swin_tiny"], 1))
def named(request: pytest.FixtureRequest) -> tuple[str, nn.Module, Plan]:
    model = timm.create_model(spvit.published()[request.param].base).eval()
    return request.param, model, spvit.plan(request.param, model)


@pytest.mark.parametrize("name", THEIRS)
def test_the_data_are_the_authors(name: str) -> None:
    ours, theirs = spvit.published()[name], published_counts()[THEIRS[name]]
    kinds = {"skip": "skip", "conv1x1": "conv1x1", "conv3x3": "conv3x3", "attention": "msa"}
    assert [kinds[branch] for branch in ours.branches] == theirs["msa_types"]
    assert list(ours.ffn) == theirs["ffn_kept"] and [len(units) for units in ours.units] == theirs["ffn_kept"]
    assert ours.search is not None
    assert (ours.search.gflops, ours.search.penalty) == (theirs["target_gflops"], theirs["loss_lambda"])
    assert f"_search_{ours.search.epoch}epoch" in theirs["ffn_file"]
    shown = (theirs["published_table_params_M"], theirs["published_table_flops_G"])
    assert shown == ((ours.figures.million_parameters, ours.figures.gflops) if ours.figures else (None, None))
    assert timm.is_model(ours.base) and ours.base.startswith(name.split("_t")[0].rsplit("_", 1)[0])


def test_the_seven_by_name() -> None:
    assert list(spvit.published()) == list(THEIRS)
    tiny = spvit.published()["deit_tiny"].figures
    assert tiny is not None and (tiny.top1, tiny.top5, tiny.top1_distilled, tiny.top5_distilled) == (
        70.7,
        90.3,
        73.2,
        91.4,
    )


@pytest.mark.parametrize("call", [spvit.plan, spvit.config, lambda name: spvit.prepare(nn.Linear(1, 1), name)])
def test_wrong_names_list_the_right_ones(call: Any) -> None:
    with pytest.raises(InvalidArgument) as caught:
        call("deit_huge")
    assert (
        str(caught.value) == f"name: found 'deit_huge'; expected one of {NAMES}. msa2conv.spvit.published() lists them."
    )


def test_params_and_flops(named: tuple[str, nn.Module, Plan]) -> None:
    """Also what benchmarks/published.py checks for all seven; here once more, without it."""
    name, model, plan = named
    theirs = published_counts()[THEIRS[name]]
    found = spvit.figures(plan, model)
    norms = found.layer_norm + found.batch_norm
    assert found.parameters_finetune == theirs["params_finetune_model"]
    assert found.parameters == theirs["params_paramopt_model"] == plan.parameters
    assert found.paper_flops == theirs["repo_flops_searched"]
    assert found.flops_finetune - norms == theirs["fvcore_matmul_conv_linear_finetune"]
    assert found.flops - norms == theirs["fvcore_matmul_conv_linear_paramopt"]
    assert (found.flops_finetune, found.flops) == (theirs["fvcore_total_finetune"], theirs["fvcore_total_paramopt"])
    assert found.flops == plan.flops == msa2conv.count_flops(msa2conv.apply(plan, model), torch.zeros(1, 3, 224, 224))


def test_the_search_form(named: tuple[str, nn.Module, Plan]) -> None:
    name, model, _ = named
    theirs = published_counts()[THEIRS[name]]
    search = spvit.prepare(model, name)
    assert sum(p.numel() for p in search.model.parameters()) == theirs["params_search_model"]
    assert sum(p.numel() for p in search.original.parameters()) == theirs["params_dense_model"]
    assert search.flops() == search.budget.costs.base == theirs["repo_flops_dense"]
    lam, target = theirs["loss_lambda"], theirs["target_gflops"]
    assert_close(search.penalty(), lam * (target - theirs["repo_flops_dense"] / 1e9) ** 2, 1e-5)


def test_the_hybrid(named: tuple[str, nn.Module, Plan]) -> None:
    """New modules start from the model's own W_v and W_o, all heads alike, with a fresh BatchNorm."""
    name, model, plan = named
    hybrid = msa2conv.apply(plan, model)
    assert type(hybrid) is type(model) and hybrid(torch.zeros(1, 3, 224, 224)).shape == (1, 1000)
    conv = next(edit for edit in plan.edits if isinstance(edit, Replace) and edit.spec.kind == "conv")
    attention, mixer = model.get_submodule(conv.path), hybrid.get_submodule(conv.path).state_dict()
    heads = attention.num_heads
    v = attention.qkv.weight[-attention.proj.in_features :].reshape(heads, -1, attention.qkv.in_features)
    out = attention.proj.weight.reshape(len(attention.proj.weight), heads, -1)
    assert_close(mixer["reduce.weight"][..., 0, 0], v.mean(0))
    assert_close(mixer["expand.weight"][..., 0, 0], out.mean(1))
    fresh = (mixer["norm.weight"], mixer["norm.running_mean"], mixer["norm.running_var"])
    assert [set(values.tolist()) for values in fresh] == [{1.0}, {0.0}, {1.0}]
    assert set(mixer["expand.bias"].tolist()) == set(attention.proj.bias.tolist())
    ffn = next(path for path in plan.choices if path.endswith("mlp"))
    kept = spvit.published()[name].ffn[0]
    assert torch.equal(hybrid.get_submodule(ffn).fc1.weight, model.get_submodule(ffn).fc1.weight[:kept])


def test_a_plan_without_a_model() -> None:
    """It applies to timm's network of that name, is the same every time, and leaves the random state alone."""
    state = torch.get_rng_state()
    plan = spvit.plan("deit_tiny")
    assert torch.equal(torch.get_rng_state(), state)
    assert plan == spvit.plan("deit_tiny") and plan.base.weights_sha256 == ""
    assert plan.base.builder is not None and plan.base.builder.name == "deit_tiny_patch16_224"
    msa2conv.apply(plan, timm.create_model("deit_tiny_patch16_224"))
    assert Plan.from_json(plan.model_dump_json()) == plan


def test_a_plan_for_a_model_with_other_classes_and_image_size() -> None:
    model = timm.create_model("deit_tiny_patch16_224", num_classes=7, img_size=96)
    hybrid = msa2conv.apply(spvit.plan("deit_tiny", model), model)
    assert hybrid(torch.zeros(1, 3, 96, 96)).shape == (1, 7)


def test_a_plan_for_another_model() -> None:
    model = timm.create_model("vit_tiny_patch16_224", depth=3)
    with pytest.raises(ArchitectureMismatch) as caught:
        spvit.plan("deit_tiny", model)
    assert str(caught.value) == (
        "model: found VisionTransformer with 3 attentions and FFNs of 3 x 768 hidden units; expected the 12 "
        "attentions of deit_tiny_patch16_224, and FFNs that hold the 744, 758, 764, 767, 766, 764, 756, 659, 633, "
        "473, 179, 145 units kept by deit_tiny. Build the model with timm.create_model('deit_tiny_patch16_224')."
    )


# ---------------------------------------------------------------------------------------------------------- recipes


def test_recipes() -> None:
    found = {name: spvit.config(name) for name in THEIRS}
    assert {name: r.gates.penalty for name, r in found.items()} == {
        **{"deit_tiny": 20, "deit_small": 3, "deit_base_t60": 0.08, "deit_base_t100": 0.06},
        **{"swin_tiny": 2.8, "swin_small": 0.4, "swin_base": 0.1},
    }
    assert [r.gflops for r in found.values()] == [1.0, 3.2, 6.0, 10.0, 3.2, 5.5, 10.0]
    assert [r.gate_lr for r in found.values()] == [1e-3, 5e-4, *5 * [1e-3]]
    assert [r.drop_path for r in found.values()] == [*4 * [0.1], 0.2, 0.3, 0.5]
    assert {(r.family, r.gates.alpha, r.gates.offsets, r.gates.windowed) for r in found.values()} == {
        ("deit", 0.01, "columns", False),
        ("swin", 100.0, "centre first", True),
    }
    for recipe in found.values():
        gates = recipe.gates
        assert (gates.init, gates.skip, gates.exact, gates.sampling) == (1.5, "identity", False, "concrete")
        assert (recipe.search.epochs, recipe.finetune.epochs, recipe.distillation.epochs) == (20, 130, 200)
        assert recipe.batch_size == 1024 and recipe.formula == "paper"


def test_changes_to_a_recipe() -> None:
    changed = spvit.config("swin_tiny", gflops=0.5, penalty=7.0, search=Schedule(epochs=3, lr=1e-3, final_lr=1e-3))
    assert (changed.gflops, changed.gates.penalty, changed.gates.alpha, changed.search.lr) == (0.5, 7.0, 100.0, 1e-3)
    own = msa2conv.Gates(alpha=0.5)
    assert spvit.config("swin_tiny", gates=own).gates == own
    assert spvit.config("swin_tiny", gates=own, penalty=2.0).gates == own.model_copy(update={"penalty": 2.0})
    assert spvit.config("swin_tiny").gates.penalty == 2.8


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"epochs": 3}, "epochs: found 3 (extra inputs are not permitted)"),
        ({"gflops": -1}, "gflops: found -1 (input should be greater than 0)"),
        ({"penalty": "much"}, "gates.penalty"),
    ],
)
def test_unusable_changes(change: dict[str, Any], found: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        spvit.config("deit_tiny", **change)
    assert str(caught.value).startswith(found)
    assert str(caught.value).endswith(
        "expected a field of Recipe: name, base, gflops, gates, formula, gate_lr, batch_size, search, finetune, "
        "picked_epoch, drop_path, augmentation, distillation. print(msa2conv.spvit.config(name)) shows them."
    )


def test_schedules() -> None:
    recipe = spvit.config("deit_tiny")
    assert [recipe.search.lr_at(epoch) for epoch in (0, 7, 20)] == pytest.approx([1e-4] * 3)
    assert [recipe.finetune.lr_at(epoch) for epoch in (0, 65, 130)] == pytest.approx([1e-4, 5.5e-5, 1e-5])


def test_the_formula_is_a_switch() -> None:
    model = timm.create_model("deit_tiny_patch16_224", depth=1, embed_dim=48, num_heads=3, img_size=64)
    recipe = spvit.config("deit_tiny", gflops=0.001)
    paper, counted = (
        spvit.prepare(model, recipe.model_copy(update={"formula": formula})).budget.costs.base
        for formula in ("paper", "counted")
    )
    n, d, image = 16, 48, torch.zeros(1, 3, 64, 64)
    assert counted == msa2conv.count_flops(model, image)
    block = 4 * (n + 1) * d**2 + 2 * d * (n + 1) ** 2 + 8 * n * d**2 + 2 * d * (n + 1)
    assert paper == n * d * 3 * 16**2 + d * 1000 + block


def test_hard_distillation() -> None:
    torch.manual_seed(0)
    logits, teacher = torch.randn(4, 5, requires_grad=True), torch.randn(4, 5, requires_grad=True)
    labels = torch.tensor([0, 1, 2, 3])
    wanted = 0.5 * F.cross_entropy(logits, labels) + 0.5 * F.cross_entropy(logits, teacher.argmax(1))
    assert_close(spvit.hard_distillation(logits, labels, teacher), wanted)
    smooth = F.one_hot(labels, 5) * 0.9 + 0.02
    found = spvit.hard_distillation(logits, smooth, teacher, weight=0.2)
    assert_close(found, 0.8 * F.cross_entropy(logits, smooth) + 0.2 * F.cross_entropy(logits, teacher.argmax(1)))
    found.backward()
    assert teacher.grad is None and logits.grad is not None


# ---------------------------------------------------------------------------------------------------------- the table


@pytest.mark.slow
def test_the_table_is_what_is_counted_now() -> None:
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.published", "--check", "deit_tiny"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    text = (ROOT / "docs" / "published.md").read_text()
    for name, key in THEIRS.items():
        theirs = published_counts()[key]
        for count in ("params_finetune_model", "params_paramopt_model", "repo_flops_searched", "fvcore_total_paramopt"):
            assert f" {int(theirs[count]):,} " in text, (name, count)
