"""Many budgets out of one calibration: the same plans that `convert` makes, and what is shown and written of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from models import images, snapshot, vit
from PIL import Image

import msa2conv
from msa2conv import Plan, Sweep, convert, sweep
from msa2conv.levers import DEFAULT
from msa2conv.search import calibrate

TARGETS = [0.6, "80%", 0.8]


@pytest.fixture(scope="module")
def found() -> Sweep:
    return sweep(vit(), TARGETS, data=images())


def test_every_budget_is_kept_and_used_and_told_once(found: Sweep) -> None:
    base = found.points[0].plan.base.flops
    assert [point.target for point in found.points] == [int(0.8 * base), int(0.6 * base)]
    for point in found.points:
        assert 0.99 * point.target <= point.plan.flops <= point.target


def test_a_built_hybrid_is_what_convert_makes_and_does_what_the_sweep_said(found: Sweep) -> None:
    model = vit()
    before = snapshot(model)
    built, fresh = found.build(0.6), convert(model, 0.6, data=images())
    assert snapshot(model) == before
    assert built.plan == fresh.plan == found.points[-1].plan
    assert built.report.distance == pytest.approx(found.points[-1].distance, rel=1e-3)
    assert built.report.agreement == found.points[-1].agreement
    assert built.report.predicted == found.points[-1].predicted
    torch.testing.assert_close(built.model(images()), fresh.model(images()), rtol=0, atol=0)


def test_any_other_budget_can_be_built(found: Sweep) -> None:
    assert found.build(0.7).plan.flops <= 0.7 * found.points[0].plan.base.flops


def test_one_calibration_serves_all_and_may_be_given(monkeypatch: pytest.MonkeyPatch, found: Sweep) -> None:
    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("calibrated again")

    monkeypatch.setattr(calibrate, "calibrate_sites", never)
    monkeypatch.setattr(msa2conv.api, "calibrate_sites", never)
    again = sweep(vit(), 0.6, calibration=found.calibration)
    assert [point.plan for point in again.points] == [found.points[-1].plan]


def test_the_table_says_what_it_is_about(found: Sweep) -> None:
    lines = str(found).splitlines()
    assert "GFLOPs (multiply-adds, batch 1)" in lines[0]
    assert lines[1].split() == ["FLOPs", "GFLOPs", "M", "params", "same", "class", "KL", "(nats)"]
    assert [line.split()[0] for line in lines[2:4]] == [
        f"{point.plan.flops / point.plan.base.flops:.1%}" for point in found.points
    ]
    worst = max(found.points, key=lambda point: point.distance)
    assert lines[2 + found.points.index(worst)].count("█") == 24
    assert lines[4].startswith(f"against the original on {len(found.calibration.images)} held-out images (")


def test_figures_and_plans_are_written(found: Sweep, tmp_path: Path) -> None:
    written = json.loads(found.save(tmp_path / "out").read_text())
    assert written["measure"] == "kl" and written["versions"]["torch"] == torch.__version__.split("+")[0]
    for row, point in zip(written["points"], found.points, strict=True):
        assert Plan.model_validate_json((tmp_path / "out" / row["plan"]).read_text()) == point.plan
        assert (row["flops"], row["distance"]) == (point.plan.flops, point.distance)
    assert written["seed"] == 0 and sorted(written["levers"]) == sorted(DEFAULT)
    assert written["predicted"][-1] == {"flops": found.points[0].plan.base.flops, "loss": 0.0}
    with Image.open(tmp_path / "out" / "sweep.png") as picture:
        assert picture.width > 800
