"""Fine-tune and merged forms, and the start of fine-tuning, against the authors' code; and what is done with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from authors_code import assert_close, block_outputs, build, fixture
from torch import Tensor

import msa2conv
from msa2conv import Conversion, spvit
from msa2conv.ops import Conv
from msa2conv.plan import Plan, Replace

FORMS = {"deit_finetune": "fine-tune", "deit_paramopt": "merged", "swin_finetune_A": "fine-tune"}
every_form = pytest.mark.parametrize("name", FORMS)


def read(name: str) -> Conversion:
    data = fixture(name)
    return spvit.load_checkpoint(data["state_dict"], build(data["constructor"]))


@every_form
def test_outputs(name: str) -> None:
    data, result = fixture(name), read(name)
    with torch.no_grad(), block_outputs(result.model) as found:
        assert_close(result.model(data["input"]), data["output"])
    for block, expected in zip(found, data["block_outputs"], strict=True):
        assert_close(block, expected)


def as_merged(data: dict[str, Any], model: torch.nn.Module) -> dict[str, Tensor]:
    """The merged form of a fine-tune form, in the authors' names."""
    merged = {"reduce": "bconv.0", "norm": "bconv.1", "expand": "bconv.3"}
    state = dict(data["state_dict"])
    for path, module in model.named_modules():
        if isinstance(getattr(module, "spec", None), Conv):
            state = {name: value for name, value in state.items() if not name.startswith(f"{path}.")}
            for name, value in module.state_dict().items():
                part, leaf = name.split(".")
                state[f"{path}.{merged[part]}.{leaf}"] = value
    return state


def test_the_merged_form_of_a_swin() -> None:
    """The authors' own merge of a Swin is wrong, so there is no fixture: ours, read again, must give the same."""
    data, result = fixture("swin_finetune_A"), read("swin_finetune_A")
    again = spvit.load_checkpoint(as_merged(data, result.model), build(data["constructor"]))
    assert "merged" in again.report.calibration
    assert torch.equal(again.model(data["input"]), result.model(data["input"]))


@every_form
def test_plan_and_report(name: str) -> None:
    data, result = fixture(name), read(name)
    report, plan = result.report, result.plan
    assert result.calibration is None and report.images == {} and report.distance is None
    assert report.calibration == f"state_dict (SPViT's {FORMS[name]} form)"
    assert report.flops_after == plan.flops == msa2conv.count_flops(result.model, data["input"]) == report.laws["flops"]
    assert plan.parameters == sum(p.numel() for p in result.model.parameters())
    kept = [int(mask.sum()) for mask in data["ffn_masks"]]
    assert [int(o.split("/")[0]) for o in plan.choices.values() if "/" in o] == kept
    wanted = {
        "deit": ["identity", "conv1x1", "conv3x3", "attention"],
        "swin": ["conv1x1", "conv3x3", "identity", "attention"],
    }
    assert [o for o in plan.choices.values() if "/" not in o] == wanted[name[:4]]
    assert "identity" in str(result) and f"decided by {report.calibration}" in str(result)


@every_form
def test_the_plan_and_the_tensors_make_the_same_hybrid(name: str) -> None:
    data, result = fixture(name), read(name)
    plan = Plan.from_json(result.plan.model_dump_json())
    again = msa2conv.apply(plan, build(data["constructor"]), result.model.state_dict())
    assert torch.equal(again(data["input"]), result.model(data["input"]))


@every_form
@pytest.mark.parametrize("file", ["hybrid.safetensors", "hybrid"])
def test_save_and_load(name: str, file: str, tmp_path: Path) -> None:
    data, result = fixture(name), read(name)
    result.save(tmp_path / file)
    again = msa2conv.load(tmp_path / file, build(data["constructor"]))
    assert torch.equal(again.eval()(data["input"]), result.model(data["input"]))
    if file == "hybrid":
        report = json.loads((tmp_path / file / "report.json").read_text())
        assert report["calibration"].endswith("form)")


def test_the_model_given_is_not_touched_and_sets_dtype_and_mode() -> None:
    data = fixture("deit_finetune")
    model = build(data["constructor"]).double().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = spvit.load_checkpoint(data["state_dict"], model)
    assert result.model.training and next(result.model.parameters()).dtype == torch.float64
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert_close(result.model.eval()(data["input"].double()), data["output"])


def test_the_start_of_fine_tuning() -> None:
    """Dense weights -> the plan -> `apply`: every new tensor is the authors', and so is the output."""
    data = fixture("swin_dense_to_finetune")
    model = build(data["constructor"])
    dense = {name: value for name, value in data["dense_state_dict"].items() if "relative_position_index" not in name}
    renamed = {"layers.0.downsample.": "layers.1.downsample.", "head.": "head.fc."}
    for theirs, ours in renamed.items():
        dense = {name.replace(theirs, ours) if name.startswith(theirs) else name: v for name, v in dense.items()}
    missing, unexpected = model.load_state_dict(dense, strict=False)
    assert not missing and all("attn_mask" in name for name in unexpected)
    assert_close(model(data["input"]), data["dense_output"])

    masks = tuple(tuple(mask.nonzero().flatten().tolist()) for mask in data["ffn_masks"])
    letters = "".join("s13M"[int(sum(row))] for stage in data["msa_indicators"] for row in stage)
    wanted = spvit.Architecture(name="tiny", base="swin", mixers=letters, ffn=masks)
    assert letters == "13M"
    start = msa2conv.apply(spvit.plan(wanted, model), model)
    assert_close(start(data["input"]), data["finetune_start_output"])

    from_file = spvit.load_checkpoint(data["finetune_start_state_dict"], model)
    found, expected = start.state_dict(), from_file.model.state_dict()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert_close(found[name].float(), value.float(), absolute=1e-12)


def test_a_plan_of_finetuning_keeps_the_fine_tuned_skip() -> None:
    plan = read("swin_finetune_A").plan
    specs = [edit.spec for edit in plan.edits if isinstance(edit, Replace)]
    assert [spec.kind for spec in specs] == ["conv", "conv", "identity"]
    assert all(edit.kept == ((0, edit.count),) for edit in plan.edits if edit.kind == "slice")


@pytest.mark.parametrize("name", ["deit_search_eval", "deit_finetune"])
def test_an_ffn_that_is_closed_altogether(name: str) -> None:
    """It adds the bias of its second layer; the hybrid keeps one unit of zeros."""
    data = fixture(name)
    state = dict(data["state_dict"])
    if name == "deit_search_eval":
        state["blocks.1.mlp.ffn_thresholds"] = torch.full((96,), -3.0)
    else:
        for leaf, axis in (("fc1.weight", 0), ("fc1.bias", 0), ("fc2.weight", 1)):
            state[f"blocks.1.mlp.{leaf}"] = state[f"blocks.1.mlp.{leaf}"].narrow(axis, 0, 0)
    result = spvit.load_checkpoint(state, build(data["constructor"]))
    assert result.plan.choices["blocks.1.mlp"] == "1/96"
    tokens = torch.randn(2, 17, 48)
    out = result.model.get_submodule("blocks.1.mlp")(tokens)
    assert torch.equal(out, state["blocks.1.mlp.fc2.bias"].expand_as(out))
