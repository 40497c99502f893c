"""The calibrated search: deterministic, savable, scored on images it was not fitted on."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from conftest import Case, case_of

import msa2conv
from msa2conv.errors import ArchitectureMismatch, NonFiniteValue
from msa2conv.levers.mixer import MixerRecord
from msa2conv.search import calibrate as module
from msa2conv.search.calibration import Calibration
from msa2conv.search.measure import default_measure, distance, tensor_of


def described(calibration: Calibration) -> dict[str, list[tuple[str, int, float]]]:
    return {
        site: [(option.name, option.flops, option.score) for option in group]
        for site, group in calibration.options().items()
    }


@torch.no_grad()
def test_scores_are_measured_on_held_out_images(case: Case) -> None:
    """Every measured score is the distance that pinning this one option causes."""
    calibration = case.calibration
    assert len(calibration.images) + calibration.fitted == len(case.images) and len(calibration.images) >= 2
    given = {image.numpy().tobytes() for image in case.images}
    assert {image.numpy().tobytes() for image in calibration.images} < given
    reference = case.work(calibration.images)
    torch.testing.assert_close(reference, calibration.reference)
    for site in case.seen.claims.sites[:2]:
        for record in calibration.records:
            if record.site == site.path:
                option = record.to_measure()[0]
                score = next(each.score for each in case.options[site.path] if each.name == option.name)
                output = case.with_option(option)(calibration.images)
                assert score == pytest.approx(distance(reference, output, calibration.measure), rel=1e-3, abs=1e-6)


def mixer_tensors(calibration: Calibration) -> list[torch.Tensor]:
    """Held-out images also say how much prefix tokens are heard, which other levers heed."""
    records = [record for record in calibration.records if isinstance(record, MixerRecord)]
    return [value for record in records for option in record.options() for value in option.tensors().values()]


def test_what_is_held_out_is_not_fitted_on(vit: Case) -> None:
    """Other held-out images change the scores and not one fitted value; other fitted images change the values."""
    held_out = {image.numpy().tobytes() for image in vit.calibration.images}
    is_held_out = torch.tensor([image.numpy().tobytes() in held_out for image in vit.images])
    values, scores = mixer_tensors(vit.calibration), described(vit.calibration)
    for changed, fit_is_the_same in ((is_held_out, True), (~is_held_out, False)):
        images = torch.where(changed[:, None, None, None], 1.5 * vit.images, vit.images)
        other = msa2conv.calibrate(vit.model, images, progress=False)
        same = [torch.equal(value, again) for value, again in zip(values, mixer_tensors(other), strict=True)]
        assert all(same) == fit_is_the_same
        assert described(other) != scores


def test_a_saved_calibration_is_the_same(case: Case, tmp_path: Path) -> None:
    again = Calibration.load(case.calibration.save(tmp_path / "c.safetensors"), case.seen.claims)
    assert described(again) == described(case.calibration)
    assert again.costs == case.calibration.costs
    for site, group in again.options().items():
        for option, original in zip(group, case.options[site], strict=True):
            assert option.edits == original.edits
            tensors, expected = option.tensors(), original.tensors()
            assert tensors.keys() == expected.keys()
            assert all(torch.equal(value, expected[name]) for name, value in tensors.items())
    result = msa2conv.convert(case.model, 0.7, calibration=again, **case.keywords)
    assert result.plan == case.result.plan


def test_the_same_seed_gives_the_same_conversion(vit: Case) -> None:
    torch.manual_seed(123)
    again = msa2conv.convert(vit.model, 0.7, data=vit.images, **vit.keywords)
    assert again.plan == vit.result.plan
    assert all(
        torch.equal(value, again.model.state_dict()[name]) for name, value in vit.result.model.state_dict().items()
    )
    other = msa2conv.calibrate(vit.model, vit.images, seed=1, progress=False)
    assert described(other) != described(vit.calibration)


def test_statistics_gathered_in_several_passes_are_the_same(vit: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_STATISTICS_BYTES", 1)
    assert described(msa2conv.calibrate(vit.model, vit.images, progress=False)) == described(vit.calibration)


def test_the_tokens_are_found_by_name_wherever_they_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host called with keywords, a mask before the tokens."""
    case = case_of("foreign")

    def forward(block: tiny.GridBlock, x: torch.Tensor) -> torch.Tensor:
        x = x + block.mixer(mask=None, hidden=block.norm1(x))[0]
        return x + block.mlp(block.norm2(x))

    monkeypatch.setattr(tiny.GridBlock, "forward", forward)
    assert described(msa2conv.calibrate(case.model, case.images, **case.keywords)) == described(case.calibration)


def test_a_calibration_of_other_weights_is_refused(vit: Case, tmp_path: Path) -> None:
    with pytest.raises(ArchitectureMismatch):
        msa2conv.convert(tiny.build("vit", seed=1), 0.7, calibration=vit.calibration, progress=False)
    path = vit.calibration.save(tmp_path / "c.safetensors")
    with pytest.raises(ArchitectureMismatch):
        Calibration.load(path, case_of("foreign").seen.claims)


def test_nan_inside_names_the_site(vit: Case) -> None:
    model = tiny.build("vit")
    with torch.no_grad():
        model.blocks[1].attn.proj.weight.fill_(1e38)
    with pytest.raises(NonFiniteValue, match=r"blocks\.1\.attn|model output"):
        msa2conv.calibrate(model, vit.images, progress=False)


def test_a_head_that_reads_only_the_class_token_makes_it_heavier_in_the_last_block(vit: Case) -> None:
    """The weight of prefix rows follows from what the output listens to."""
    from msa2conv.search.calibrate import _prefix_weight
    from msa2conv.search.replay import Replay
    from msa2conv.transforms.lift import lift

    net = lift(vit.work, vit.seen.claims.sites)
    replay = Replay(net.model, [site.block for site in vit.seen.claims.sites], [vit.images])
    weights = [_prefix_weight(net, replay, site, "kl", 0) for site in vit.seen.claims.ffns]
    assert weights[-1] == 3000 and all(1 <= weight < 3000 for weight in weights[:-1])


@pytest.mark.parametrize(("name", "expected"), [("vit", "kl"), ("features", "relative"), ("foreign", "kl")])
def test_the_measure_follows_the_output(name: str, expected: str) -> None:
    assert case_of(name).calibration.measure == expected
    assert default_measure(torch.nn.Identity(), torch.zeros(2, 5, 3)) == "relative"


def test_distances() -> None:
    reference, output = torch.randn(6, 5), torch.randn(6, 5)
    p, q = reference.softmax(1).double(), output.softmax(1).double()
    assert distance(reference, output, "kl") == pytest.approx(float((p * (p / q).log()).sum(1).mean()), rel=1e-5)
    assert distance(reference, 1.1 * reference, "relative") == pytest.approx(0.01, rel=1e-4)
    assert distance(reference, reference, "kl") == distance(reference, reference, "relative") == 0
    assert distance(reference, output * float("nan"), "kl") == float("inf")
    assert tensor_of((output, None)) is output
