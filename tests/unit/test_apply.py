"""The interpreter of Plans: hostile plans change nothing and fail with a typed error."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from conftest import Case
from pydantic import ValidationError

import msa2conv
from msa2conv.errors import ArchitectureMismatch, InvalidPlan
from msa2conv.kernels import Rows, SharedStart
from msa2conv.layouts import Layout
from msa2conv.ops import IO, AttendPrefix, Constant, Conv, Global, Identity, PassPrefix, RidgePrefix, Skip
from msa2conv.plan import Edit, Replace, SetAttr, Slice
from msa2conv.transforms.apply import apply_edits, load_tensors, relative

LAYOUT = Layout(grid=(4, 4), prefix=1)
GOOD = Replace(path="blocks.0.attn", spec=Skip(), io=IO(absent=("attn_mask", "is_causal")))


def replace(path: str, spec: Any) -> Replace:
    return Replace(path=path, spec=spec, io=IO())


def huge_attention() -> Global:
    attend = AttendPrefix(heads=65536, head_dim=65536, scale=1.0)
    return Global(layout=LAYOUT, dim=65536, prefix=attend)


def shared(spec: dict[str, Any] | Skip | None = None, **start: Any) -> Replace:
    """A convolution that starts from the host's own W_v and W_o; fits unless something is changed."""
    known: dict[str, Any] = {"v": Rows("qkv", 96, 144), "out": Rows("proj"), "heads": 3}
    if not isinstance(spec, Skip):
        between: dict[str, Any] = {"norm": "batch", "act": "relu", "prefix": PassPrefix()}
        spec = Conv(**{"layout": LAYOUT, "dim": 48, "kernel": 3, "rank": 16, **between, **(spec or {})})
    return Replace(path="blocks.0.attn", spec=spec, io=GOOD.io, start=SharedStart(**(known | start)))


HOSTILE: dict[str, Edit] = {
    "no such block": replace("blocks.9.attn", Skip()),
    "an attribute that is no module": replace("blocks.0.attn.scale", Skip()),
    "a method": replace("forward", Skip()),
    "inside a tensor": replace("pos_embed.data", Skip()),
    "a huge map": replace("blocks.0.attn", Constant(layout=Layout(grid=(16384, 16384)), dim=65536)),
    "a huge convolution": replace("blocks.0.attn", Conv(layout=LAYOUT, dim=65536, kernel=15, rank=65536)),
    "a huge attention": replace("blocks.0.attn", huge_attention()),
    "a huge ridge": replace(
        "blocks.0.attn", Global(layout=Layout(grid=(1, 1), prefix=1024), dim=65536, prefix=RidgePrefix())
    ),
    "no such parameter": Slice(path="blocks.0.mlp.fc1.wait", dim=0, kept=((0, 8),)),
    "no such owner": Slice(path="blocks.0.mlp.fc9.weight", dim=0, kept=((0, 8),)),
    "a missing bias": Slice(path="blocks.0.norm1.eps", dim=0, kept=((0, 8),)),
    "a slice out of range": Slice(path="blocks.0.mlp.fc1.weight", dim=0, kept=((0, 193),)),
    "a dimension too many": Slice(path="blocks.0.mlp.fc1.bias", dim=1, kept=((0, 1),)),
    "a parameter without rules": Slice(path="pos_embed", dim=1, kept=((0, 8),)),
    "a missing attribute": SetAttr(path="blocks.0.attn", name="heads", value=1),
    "a bool": SetAttr(path="blocks.0.attn", name="fused_attn", value=0),
    "the training mode": SetAttr(path="blocks.0.attn", name="training", value=1),
    "a method as attribute": SetAttr(path="blocks.0.attn", name="forward", value=1),
    "a submodule as attribute": SetAttr(path="blocks.0.attn", name="qkv", value=1),
    "a parameter as attribute": SetAttr(path="blocks.0.attn.qkv", name="weight", value=1),
    "another type": SetAttr(path="blocks.0.attn", name="num_heads", value=1.5),
    "a start from nowhere": shared(v=Rows("value")),
    "a start from no layer": shared(out=Rows("q_norm")),
    "a start from a method": shared(v=Rows("forward")),
    "a start from other rows": shared(v=Rows("qkv", 96, 143)),
    "a start from rows that are not there": shared(v=Rows("qkv", 144)),
    "a start from all rows": shared(v=Rows("qkv")),
    "a start from W_v for W_o": shared(out=Rows("qkv", 0, 96)),
    "a start of other heads": shared(heads=4),
    "a start of another rank": shared({"rank": 24}),
    "a start of two linear layers": shared({"norm": None, "act": None}),
    "a start of a 5x5": shared({"kernel": 5}),
    "a start of nothing": shared(Skip()),
}


@pytest.mark.parametrize("edit", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_edit_is_refused_before_the_first_edit_is_run(edit: Edit) -> None:
    model = tiny.build("vit")
    before = tiny.snapshot(model)
    with pytest.raises(InvalidPlan):
        apply_edits(model, [GOOD, edit])
    assert tiny.snapshot(model) == before


CONTRADICTING: dict[str, list[Edit]] = {
    "the same slice twice": [Slice(path="blocks.0.mlp.fc1.weight", dim=0, kept=((8, 192),))] * 2,
    "a slice of what was replaced": [
        replace("blocks.0.mlp", Identity()),
        Slice(path="blocks.0.mlp.fc1.weight", dim=0, kept=((0, 8),)),
    ],
    "an attribute of what was replaced": [GOOD, SetAttr(path="blocks.0.attn", name="num_heads", value=1)],
}


@pytest.mark.parametrize("edits", CONTRADICTING.values(), ids=CONTRADICTING.keys())
def test_edits_that_contradict_each_other_are_refused(edits: list[Edit], vit: Case) -> None:
    """Each edit fits the original, but not what the edit before it leaves behind."""
    plan = vit.result.plan.model_copy(update={"edits": tuple(edits)})
    with pytest.raises(InvalidPlan):
        msa2conv.apply(plan, vit.model)
    assert tiny.snapshot(vit.model) == vit.before


@pytest.mark.parametrize(
    "edit",
    [
        {"kind": "set", "path": "blocks.0.attn", "name": "_parameters", "value": 1},
        {"kind": "set", "path": "blocks.0.attn", "name": "__class__", "value": 1},
        {"kind": "set", "path": "blocks.0.attn", "name": "num_heads", "value": "os.system"},
        {"kind": "set", "path": "", "name": "num_classes", "value": 1},
        {"kind": "replace", "path": "blocks..attn", "spec": {"kind": "skip"}, "io": {}},
        {"kind": "replace", "path": "blocks[0]", "spec": {"kind": "skip"}, "io": {}},
        {"kind": "replace", "path": "a" * 600, "spec": {"kind": "skip"}, "io": {}},
        {"kind": "replace", "path": "blocks.0.attn", "spec": {"kind": "eval"}, "io": {}},
        {"kind": "slice", "path": "head.weight", "dim": 0, "kept": []},
        {"kind": "slice", "path": "head.weight", "dim": 0, "kept": [[4, 2]]},
        {"kind": "slice", "path": "head.weight", "dim": 0, "kept": [[0, 4], [2, 6]]},
        {"kind": "slice", "path": "head.weight", "dim": -1, "kept": [[0, 4]]},
        {"kind": "call", "path": "head", "name": "cuda"},
    ],
    ids=str,
)
def test_a_malformed_edit_is_not_even_parsed(edit: dict[str, Any], vit: Case) -> None:
    text = vit.result.plan.model_dump(mode="json")
    from json import dumps

    with pytest.raises(InvalidPlan):
        msa2conv.Plan.from_json(dumps({**text, "edits": [edit]}))


def test_the_plan_object_validates_too() -> None:
    with pytest.raises(ValidationError):
        SetAttr(path="head", name="_private", value=1)


def test_set_attr_sets_an_existing_number() -> None:
    model = tiny.build("vit")
    apply_edits(model, [SetAttr(path="blocks.0.attn", name="scale", value=0.5)])
    assert model.blocks[0].attn.scale == 0.5 and model.blocks[1].attn.scale != 0.5


def test_a_slice_keeps_the_ranges_and_the_owners_sizes_follow() -> None:
    model = tiny.build("vit").requires_grad_(False)
    weight, bias = model.head.weight.clone(), model.head.bias.clone()
    kept = ((0, 2), (5, 6))
    apply_edits(model, [Slice(path=f"head.{name}", dim=0, kept=kept) for name in ("weight", "bias")])
    assert torch.equal(model.head.weight, weight[[0, 1, 5]]) and torch.equal(model.head.bias, bias[[0, 1, 5]])
    assert model.head.out_features == 3 and not model.head.weight.requires_grad
    apply_edits(model, [Slice(path="head.weight", dim=1, kept=((0, 40),))])
    assert (model.head.in_features, tuple(model.head.weight.shape)) == (40, (3, 40))


def test_a_replacement_takes_dtype_and_mode_from_its_host(vit: Case) -> None:
    model = tiny.build("vit").double().train()
    model.blocks[1].attn.eval()
    hybrid = msa2conv.apply(vit.result.plan, model)
    assert {parameter.dtype for parameter in hybrid.parameters()} == {torch.float64}
    assert not hybrid.blocks[1].attn.training and hybrid.blocks[0].mlp.training


@pytest.mark.parametrize("kernel", [1, 3])
def test_a_shared_start_is_made_of_the_hosts_own_weights(vit: Case, kernel: int) -> None:
    """Whatever the random state; tensors given take precedence; the norm starts afresh."""
    edit = shared({"kernel": kernel})
    plan = vit.result.plan.model_copy(update={"edits": (edit,)})
    plan = msa2conv.Plan.from_json(plan.model_dump_json())
    assert plan.edits == (edit,) and edit.start is not None
    model = tiny.build("vit", seed=3).double()
    expected = edit.start.tensors(model.blocks[0].attn, kernel)
    state = msa2conv.apply(plan, model).blocks[0].attn.state_dict()
    for name, value in expected.items():
        assert state[name].dtype == torch.float64 and torch.equal(state[name], value)
    assert bool((state["norm.weight"] == 1).all()) and not state["norm.running_mean"].any()
    assert len(state) == len(expected) + 5
    given = {"blocks.0.attn.expand.bias": torch.ones(48)}
    state = msa2conv.apply(plan, model, given).blocks[0].attn.state_dict()
    assert bool((state["expand.bias"] == 1).all()) and torch.equal(state["reduce.weight"], expected["reduce.weight"])


def test_a_plan_for_another_architecture_is_refused(vit: Case) -> None:
    with pytest.raises(ArchitectureMismatch, match="VisionTransformer with"):
        msa2conv.apply(vit.result.plan, tiny.build("features"))


def test_tensors_must_fit_by_name_and_shape() -> None:
    model = tiny.build("vit")
    before = tiny.snapshot(model)
    good = {"head.bias": torch.zeros(10)}
    for bad in ({"head.wait": torch.zeros(10)}, {"head.weight": torch.zeros(10)}):
        with pytest.raises(InvalidPlan):
            load_tensors(model, {**good, **bad})
    assert tiny.snapshot(model) == before


def test_relative_paths() -> None:
    assert relative("blocks.0.attn.qkv", "blocks.0.attn") == "qkv"
    assert relative("blocks.0", "blocks.0") == ""
    with pytest.raises(InvalidPlan):
        relative("blocks.01", "blocks.0")
