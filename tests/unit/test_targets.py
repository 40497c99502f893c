"""What users may write as a target."""

from __future__ import annotations

import pytest
from hypothesis import assume, given, strategies as st

from msa2conv.errors import InvalidTarget
from msa2conv.targets import parse_target

BASES = st.integers(10**4, 10**12)


@given(fraction=st.floats(1e-3, 1, exclude_max=True), base=BASES)
def test_a_fraction_is_rounded_down(fraction: float, base: int) -> None:
    assume(int(fraction * base) < base)
    assert parse_target(fraction, base) == int(fraction * base)


@given(percent=st.integers(1, 99), base=BASES)
def test_percent_is_a_fraction(percent: int, base: int) -> None:
    expected = int(percent / 100 * base)
    assert parse_target(f"{percent}%", base) == parse_target(f" {percent} % ", base) == expected
    assert parse_target(percent / 100, base) == expected


@given(flops=st.integers(10**6 + 1, 10**12))
def test_absolute_numbers_are_taken_as_they_are(flops: int) -> None:
    assert parse_target(flops, flops + 1) == parse_target(float(flops), flops + 1) == flops


@pytest.mark.parametrize(
    ("text", "flops"),
    [("3.3G", 3.3e9), ("3.3g", 3.3e9), ("900k", 9e5), ("1.2 GFLOPs", 1.2e9), ("2.5e9", 2.5e9), ("4 GMACs", 4e9)],
)
def test_text(text: str, flops: float) -> None:
    assert parse_target(text, 10**12) == flops


WRONG = [0, -0.5, 1, 1.0, 3.3, 70, 1e6, 5e9, float("nan"), float("inf"), True, None, [0.5]]
WRONG_TEXT = ["", "1", "100%", "150%", "0%", "lots", "-3G", "5G", "3.3GB", "0.7.1", "NaN"]


@pytest.mark.parametrize("target", [*WRONG, *WRONG_TEXT], ids=repr)
def test_anything_else_is_refused(target: object) -> None:
    with pytest.raises(InvalidTarget, match="flops_target"):
        parse_target(target, 4_000_000_000)


@given(base=BASES, share=st.floats(1, 3))
def test_a_target_at_or_above_the_original_is_refused(base: int, share: float) -> None:
    assume(int(base * share) > 10**6)
    with pytest.raises(InvalidTarget):
        parse_target(int(base * share), base)
