"""The search form against the authors' code: outputs, FLOPs, losses, gradients, BatchNorm statistics."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from authors_code import assert_close, block_outputs, build, fixture, recipe_of, thresholds
from sampled import sampled
from torch import Tensor

from msa2conv import Search, spvit

EVAL = ("deit_search_eval", "swin_search_eval_window7")
TRAIN = ("deit_search_train", "swin_search_train_window7")
CASES = ("all_skip", "all_1x1", "all_3x3", "all_msa", "mixed_up", "mixed_down", "non_monotone")
every_case = pytest.mark.parametrize(("name", "case"), [(name, case) for name in EVAL for case in CASES])


# In front of a BatchNorm a bias is taken away again: its gradient is nothing but rounding.
ROUNDING = {".v.bias": 5e-7, ".norm1.bias": 5e-7}


def loaded(name: str, skip_inactive: bool = False) -> Search:
    """The authors' search as it was saved."""
    data, recipe = fixture(name), recipe_of(fixture(name))
    recipe = recipe.model_copy(update={"gates": recipe.gates.model_copy(update={"skip_inactive": skip_inactive})})
    return spvit.load_search(data["state_dict"], build(data["constructor"]), recipe)


@cache
def _kept(name: str, skip_inactive: bool) -> tuple[Search, dict[str, Any]]:
    search = loaded(name, skip_inactive)
    return search, copy.deepcopy(search.state_dict())


def fresh(name: str, signs: list[list[int]] | None = None, skip_inactive: bool = False) -> Search:
    """The same, loaded once and set back; with thresholds of +-8 written over those of the attentions."""
    search, state = _kept(name, skip_inactive)
    search.load_state_dict(copy.deepcopy(state))
    search.model.zero_grad(set_to_none=True)
    for node, row in zip(search.nodes.values(), signs or [], strict=signs is not None):
        node.gate.theta.data = torch.tensor(row) * 16.0 - 8.0
    return search


@pytest.mark.parametrize("name", EVAL)
def test_the_fixtures_hold_these_cases(name: str) -> None:
    assert set(fixture(name)["cases"]) == set(CASES)


@every_case
@pytest.mark.parametrize("skip_inactive", [False, True])
def test_outputs_of_the_supernet(name: str, case: str, skip_inactive: bool) -> None:
    data = fixture(name)
    wanted = data["cases"][case]
    search = fresh(name, wanted["gate_signs"], skip_inactive)
    with torch.no_grad(), block_outputs(search.model.eval()) as found:
        assert_close(search.model(data["input"]), wanted["output"])
    assert_close(found[-1], wanted["last_block_output"])
    for block, expected in zip(found, wanted.get("block_outputs", found), strict=True):
        assert_close(block, expected)


@every_case
def test_flops_and_penalty(name: str, case: str) -> None:
    wanted = fixture(name)["cases"][case]
    search = fresh(name, wanted["gate_signs"])
    decisions = {path: gate.decision().detach() for path, gate in search.named_gates.items()}
    costs = search.budget.costs
    none = {path: torch.zeros_like(values) for path, values in decisions.items()}
    attention = costs.flops({**none, **{path: decisions[path] for path in search.mixers}}) - costs.rest
    ffn = costs.flops({**none, **{path: decisions[path] for path in search.ffns}}) - costs.rest
    assert search.flops() == wanted["flops_total"]
    assert (int(attention), int(ffn)) == (wanted["flops_attention"], wanted["flops_ffn"])
    assert_close(search.penalty(), wanted["complexity_loss"])


@pytest.mark.parametrize("name", EVAL)
@pytest.mark.parametrize("case", sampled(CASES, ("mixed_up", "mixed_down", "non_monotone")))
def test_thresholds_decide_what_a_checkpoint_becomes(name: str, case: str) -> None:
    data = fixture(name)
    wanted = data["cases"][case]
    state = {**data["state_dict"], **thresholds(data, wanted["gate_signs"])}
    result = spvit.load_checkpoint(state, build(data["constructor"]))
    with torch.no_grad(), block_outputs(result.model) as found:
        assert_close(result.model(data["input"]), wanted["output"])
    assert_close(found[-1], wanted["last_block_output"])
    for block, expected in zip(found, wanted.get("block_outputs", found), strict=True):
        assert_close(block, expected)
    names = ["skip", "conv1x1", "conv3x3", "attention"]
    found_names = [option for option in result.plan.choices.values() if "/" not in option]
    assert found_names == [names[sum(torch.tensor(row).cumprod(0).tolist())] for row in wanted["gate_signs"]]


def inject(search: Search, uniforms: list[dict[str, Tensor]]) -> None:
    for node, drawn in zip(search.nodes.values(), uniforms, strict=True):
        node.gate.uniforms = drawn["kernel_uniforms"]
    for unit, drawn in zip(search.units.values(), uniforms, strict=True):
        unit.gate.uniforms = drawn["ffn_uniforms"]


def by_their_names(search: Search, ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors shaped as parameters, under the names of the authors' code; written down here a second time."""
    swin, found = any(name.startswith("layers.") for name in ours), {}
    for name, value in ours.items():
        if ".attn.host.qkv." in name:
            third = len(value) // 3
            found[name.replace("host.qkv", "qk")] = value[: 2 * third]
            found[name.replace("host.qkv", "v")] = value[2 * third :]
            continue
        name = name.replace(".attn.host.", ".attn.").replace(".mlp.fc2.linear.", ".mlp.fc2.")
        name = name.replace(".attn.gate.theta", ".attn.kernel_thresholds" + ("_full" if swin else ""))
        name = name.replace(".mlp.fc2.gate.theta", ".mlp.ffn_thresholds")
        if swin:
            name = name.replace("head.fc.", "head.").replace("layers.1.downsample.", "layers.0.downsample.")
        found[name] = value
    return found


def gradients(search: Search) -> dict[str, Tensor]:
    named = search.model.named_parameters()
    return by_their_names(search, {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in named})


def rounding(key: str) -> float:
    return max([size for end, size in ROUNDING.items() if key.endswith(end)], default=0.0)


@pytest.mark.parametrize("skip_inactive", [False, True])
@pytest.mark.parametrize("run", range(4))
@pytest.mark.parametrize("name", TRAIN)
def test_a_training_step(name: str, run: int, skip_inactive: bool) -> None:
    data = fixture(name)
    wanted = data["runs"][run]
    search = fresh(name, skip_inactive=skip_inactive)
    search.model.train()
    inject(search, wanted["uniforms"])

    penalty = search.penalty()
    penalty.backward()
    found = gradients(search)
    for key, expected in wanted["complexity_grads"].items():
        assert_close(found[key], expected, 1e-4)
    search.model.zero_grad()

    output = search.model(data["input"])
    ce = F.cross_entropy(output, data["target"])
    loss = ce + search.penalty()
    loss.backward()
    assert_close(output, wanted["output"])
    assert_close(ce, wanted["ce"])
    assert_close(penalty, wanted["complexity_loss"])
    assert_close(loss, wanted["loss"])

    found = gradients(search)
    assert found.keys() == wanted["grad_norms"].keys()
    for key, expected in wanted["grads"].items():
        assert_close(found[key], expected, 1e-4, rounding(key))
    for key, norm in wanted["grad_norms"].items():
        assert_close(found[key].norm(), norm, 1e-4, rounding(key))

    state = search.model.state_dict()
    assert len(wanted["bn_after"]) == 4 * 4
    for key, expected in wanted["bn_after"].items():
        assert_close(state[key], expected)


def test_a_loaded_search_goes_on_and_ends() -> None:
    data = fixture("deit_search_train")
    search = loaded("deit_search_train")
    weights, gates = spvit.optimizers(search, recipe_of(data))
    for _ in range(2):
        loss = F.cross_entropy(search.model(data["input"]), data["target"]) + search.penalty()
        for optimizer in (weights, gates):
            optimizer.zero_grad()
        loss.backward()
        for optimizer in (weights, gates):
            optimizer.step()
    result = search.finish()
    assert result.model(data["input"]).isfinite().all()
    assert loaded("deit_search_train").finish().plan.choices  # at once, too: it has run elsewhere


def test_every_parameter_is_in_one_of_the_two_optimisers() -> None:
    search = fresh("swin_search_train_window7")
    weights, gates = spvit.optimizers(search, recipe_of(fixture("swin_search_train_window7")))
    (decayed, plain), (thresholded,) = weights.param_groups, gates.param_groups
    ids = [id(p) for group in (decayed, plain, thresholded) for p in group["params"]]
    assert sorted(ids) == sorted(id(p) for p in search.model.parameters())
    assert [group["weight_decay"] for group in (decayed, plain, thresholded)] == [0.05, 0.0, 0.0]
    assert [group["lr"] for group in (decayed, plain, thresholded)] == [1e-4, 1e-4, 1e-3]
    assert all(p.ndim > 1 for p in decayed["params"]) and all(p.ndim == 1 for p in plain["params"])
    assert {id(p) for p in thresholded["params"]} == {id(gate.theta) for gate in search.named_gates.values()}


@pytest.mark.parametrize("name", TRAIN)
def test_fine_tuning_starts_again_from_the_original(name: str) -> None:
    """finetune_plan: the thresholds decide, LN1(x) for a skip, the whole map for Swin, the original's weights."""
    search = fresh(name, [[0, 0, 0], [1, 0, 0], [1, 1, 0], [1, 1, 1]])
    plan = spvit.finetune_plan(search)
    assert [o for o in plan.choices.values() if "/" not in o] == ["identity", "conv1x1", "conv3x3", "attention"]
    widths = [int((gate.theta > 0).sum()) for path, gate in search.named_gates.items() if path in search.ffns]
    assert [int(o.split("/")[0]) for o in plan.choices.values() if "/" in o] == widths
    wide = next(edit.spec for edit in plan.edits if edit.kind == "replace" and getattr(edit.spec, "kernel", 0) == 3)
    host = next(site for site in search.inspection.claims.attentions if plan.choices[site.path] == "conv3x3")
    assert wide.layout == host.layout
    assert (host.layout.window is not None) == name.startswith("swin")
