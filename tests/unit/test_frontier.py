"""The predicted trade-off, against all plans there are."""

from __future__ import annotations

from itertools import product

from hypothesis import given, settings, strategies as st

from msa2conv.options import Option
from msa2conv.search.frontier import frontier
from msa2conv.settings import AS_IT_IS, Setting

group = st.lists(st.tuples(st.integers(0, 60), st.floats(0.001, 2)), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(groups=st.lists(group, min_size=1, max_size=4), rest=st.integers(1, 50), saved=st.integers(1, 20))
def test_points_are_plans_and_no_plan_lies_below_them(
    groups: list[list[tuple[int, float]]], rest: int, saved: int
) -> None:
    options = {
        f"s{index}": [
            Option(f"s{index}", "host", 61, score=0.0, flops_on=lambda tokens: 30),
            *(Option(f"s{index}", f"o{number}", flops, score=score) for number, (flops, score) in enumerate(found)),
        ]
        for index, found in enumerate(groups)
    }
    shorter = Setting((0.3,), -min(saved, rest), {"s0": 5})
    every = []
    for setting in (AS_IT_IS, shorter):
        allowed = [
            [option] if setting is AS_IT_IS or site != "s0" else [option.on(5)]
            for site, found in options.items()
            for option in found
        ]
        by_site: dict[str, list[Option]] = {}
        for one in allowed:
            for option in one:
                if option is not None:
                    by_site.setdefault(option.site, []).append(option)
        for chosen in product(*by_site.values()):
            flops = rest + setting.flops + sum(option.flops for option in chosen)
            every.append((flops, sum(setting.scores) + sum(option.score or 0.0 for option in chosen)))
    found = frontier([AS_IT_IS, shorter], options, rest)
    assert found[-1] == (rest + 61 * len(groups), 0.0) and found[0][0] >= min(flops for flops, _ in every)
    assert [flops for flops, _ in found] == sorted({flops for flops, _ in found})
    for flops, lost in found:
        assert any(flops == other and abs(lost - score) < 1e-9 for other, score in every)
        assert not any(other <= flops and score < lost - 1e-9 for other, score in every)
    assert [lost for _, lost in found] == sorted((lost for _, lost in found), reverse=True)
