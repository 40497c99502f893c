"""The Plan as a picture, as JSON, and as ranges."""

from __future__ import annotations

import json

import pytest
from conftest import Case
from hypothesis import given, strategies as st

from msa2conv.errors import InvalidPlan, UnsupportedSchema
from msa2conv.plan import Base, Plan, Replace, Slice, Wrap, fingerprint, ranges, symbol, weights_sha256

BASE = Base(
    name="vit_tiny",
    model_class="timm.VisionTransformer",
    input_size=(3, 32, 32),
    flops=1_258_000_000,
    parameters=5_700_000,
    fingerprint="f",
    weights_sha256="w",
)
CHOICES = {
    "blocks.0.attn": "conv3x3",
    "blocks.0.mlp": "192/192",
    "blocks.1.attn": "skip",
    "blocks.1.mlp": "96/192",
    "blocks.2.attn": "attention",
    "blocks.2.mlp": "24/192",
    "blocks.3.attn": "constant",
    "blocks.3.mlp": "64/192",
}
PICTURE = """\
vit_tiny   1.26 -> 0.88 GFLOPs (70.0%)   5.7 -> 4.1 M params
block    0   1   2   3
mixer    3   -   M   c
ffn    100  50  12  33 %

- skip  c constant  3 conv3x3  M attention  % hidden units kept"""


def plan_of(choices: dict[str, str]) -> Plan:
    return Plan(base=BASE, choices=choices, edits=(), flops=880_600_000, parameters=4_100_000)


def test_the_picture() -> None:
    assert str(plan_of(CHOICES)) == PICTURE


MERGED = """\
vit_tiny   1.26 -> 0.88 GFLOPs (70.0%)   5.7 -> 4.1 M params
block     0    1    2
mixer     M    A    g
tokens        98     
ffn     100   50  100 %
tokens  165      1568

g global  A attend3x32x64  M attention  % hidden units kept  tokens: patches that are left inside"""


def test_the_picture_of_merged_tokens() -> None:
    attentions = {"blocks.0.attn": "attention", "blocks.1.attn": "attend3x32x64@98", "blocks.2.attn": "global"}
    ffns = {"blocks.0.mlp": "192/192@165", "blocks.1.mlp": "96/192", "blocks.2.mlp": "192/192@1568"}
    assert str(plan_of(attentions | ffns)) == MERGED


def test_a_deep_network_is_drawn_in_rows_of_twelve() -> None:
    lines = str(plan_of({f"blocks.{i}.attn": "global" for i in range(14)})).splitlines()
    assert lines[1] == "block " + "".join(f"{i:4d}" for i in range(12))
    assert lines[4:6] == ["block   12  13", "mixer    g   g"]
    assert max(map(len, lines)) <= 80


def test_symbols() -> None:
    names = ("skip", "identity", "constant", "global", "attention", "conv1x1", "conv3x3", "conv15x15", "attend2x8x8@9")
    assert [symbol(name) for name in names] == ["-", "=", "c", "g", "M", "1", "3", "15", "A"]


def test_the_picture_of_a_real_plan_has_one_column_a_block(case: Case) -> None:
    lines = str(case.result.plan).splitlines()
    blocks = len(case.seen.claims.attentions)
    assert lines[1].split() == ["block", *map(str, range(blocks))]
    assert len(lines[2].split()) == blocks + 1 and len(lines[3].split()) == blocks + 2


@given(st.sets(st.integers(0, 60), min_size=1))
def test_ranges_are_the_shortest_description_of_indices(indices: set[int]) -> None:
    kept = ranges(list(indices))
    assert [index for start, stop in kept for index in range(start, stop)] == sorted(indices)
    assert all(before[1] < after[0] for before, after in zip(kept, kept[1:]))  # noqa: B905, RUF007
    assert Slice(path="a", dim=0, kept=kept).count == len(indices)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", InvalidPlan),
        ("[]", InvalidPlan),
        ("{}", InvalidPlan),
        ('{"schema_version": 1}', InvalidPlan),
        ('{"schema_version": 2}', UnsupportedSchema),
        ('{"schema_version": "two"}', InvalidPlan),
        ("[" * 100_000, InvalidPlan),
    ],
    ids=["empty", "a list", "an object", "a version alone", "a later version", "a version in words", "deep nesting"],
)
def test_text_that_is_no_plan_is_refused(text: str, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"some\.json"):
        Plan.from_json(text, "some.json")


@pytest.mark.parametrize(
    "change", [{"flops": 0}, {"flops": 1.5}, {"extra": 1}, {"choices": []}, {"edits": [{}]}], ids=str
)
def test_a_damaged_plan_is_refused(change: dict[str, object]) -> None:
    fields = plan_of(CHOICES).model_dump(mode="json")
    assert Plan.from_json(json.dumps(fields)) == plan_of(CHOICES)
    with pytest.raises(InvalidPlan):
        Plan.from_json(json.dumps({**fields, **change}))


def test_edits_follow_the_choices(case: Case) -> None:
    """Every changed site has edits, and nothing else has."""
    edited = {edit.path for edit in case.result.plan.edits if isinstance(edit, Replace)}
    wrapped = {edit.path for edit in case.result.plan.edits if isinstance(edit, Wrap)}
    sliced = {edit.path.rsplit(".", 2)[0] for edit in case.result.plan.edits if isinstance(edit, Slice)}
    for path, name in case.result.plan.choices.items():
        inner, merged, _ = name.partition("@")
        kept, _, total = inner.partition("/")
        replaced = kept == "0" or kept.startswith("linear") if total else inner != "attention"
        assert (path in edited) == replaced
        assert (path in sliced) == (bool(total) and kept != total and not replaced)
        assert (path in wrapped) == bool(merged)
    assert edited | sliced | wrapped <= set(case.result.plan.choices)


def test_fingerprint_sees_shapes_and_the_hash_sees_values() -> None:
    import tiny

    one, other = tiny.build("vit", seed=0), tiny.build("vit", seed=1)
    assert fingerprint(one) == fingerprint(other) != fingerprint(tiny.build("features"))
    assert weights_sha256(one) == weights_sha256(tiny.build("vit", seed=0)) != weights_sha256(other)
