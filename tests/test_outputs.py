"""Models that return more than logits: features, maps, several tensors."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

import msa2conv
from msa2conv.errors import InvalidInput, LawViolation
from msa2conv.laws import check_same
from msa2conv.search.measure import default_measure, distance, tensor_of, tensors_of


class Dense(nn.Module):
    """Returns logits and a map, in a way to be chosen."""

    def __init__(self, how: str = "dict") -> None:
        super().__init__()
        self.vit, self.how = tiny.build("vit"), how

    def forward(self, images: Tensor) -> Any:
        tokens = self.vit.forward_features(images)
        maps = tokens[:, 1:].transpose(1, 2).unflatten(2, (4, 4))
        logits = self.vit.head(tokens[:, 0])
        return {"dict": {"map": maps, "logits": logits}, "tuple": (logits, [maps]), "map": maps}[self.how]


def convert(model: nn.Module, **keywords: Any) -> msa2conv.Conversion:
    images = tiny.images("vit")
    return msa2conv.convert(model, 0.7, data=images, example_inputs=images[:1], progress=False, **keywords)


@pytest.mark.parametrize("how", ["dict", "tuple", "map"])
@torch.no_grad()
def test_all_that_comes_out_is_scored_and_keeps_its_shape(how: str) -> None:
    model, images = Dense(how).eval(), tiny.images("vit", 2)
    result = convert(model)
    found, expected = tensors_of(result.model(images)), tensors_of(model(images))
    assert [value.shape for value in found] == [value.shape for value in expected]
    assert type(result.model(images)) is type(model(images))
    assert result.calibration.measure == "relative"


def test_output_fn_picks_what_is_scored() -> None:
    model = Dense().eval()
    by_logits = convert(model, output_fn=lambda output: output["logits"])
    by_map = convert(model, output_fn=lambda output: output["map"], distill_steps=1)
    assert (by_logits.calibration.measure, by_map.calibration.measure) == ("kl", "relative")
    assert by_logits.calibration.reference.shape[1:] == (10,)
    assert by_map.calibration.reference.shape[1:] == (48, 4, 4)


def test_feature_pyramids_of_timm() -> None:
    import timm

    model = timm.create_model("test_vit", features_only=True, img_size=64).eval()
    images = torch.randn(8, 3, 64, 64)
    result = msa2conv.convert(model, 0.8, data=images, example_inputs=images[:1], progress=False)
    assert [f.shape for f in result.model(images)] == [f.shape for f in model(images)]


def test_several_tensors_count_the_same_whatever_their_size_and_scale() -> None:
    small, large = torch.randn(3, 4), 1000 * torch.randn(3, 50, 7)
    reference = tensor_of((small, large))
    assert default_measure(nn.Identity(), reference) == "relative"
    lost_small = distance(reference, tensor_of((-small, large)), "relative")
    lost_large = distance(reference, tensor_of((small, -large)), "relative")
    assert lost_small == pytest.approx(2, abs=1e-5) and lost_large == pytest.approx(2, abs=1e-5)


def test_labels_are_compared_with_the_first_of_several_tensors() -> None:
    from msa2conv.evaluate import evaluate

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vit = tiny.build("vit")

        def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
            logits = self.vit(images)
            return logits, logits.flip(1)

    images, model = tiny.images("vit", 4), Both().eval()
    labels = model(images)[0].argmax(1)
    pairs = torch.utils.data.TensorDataset(images, labels)
    assert evaluate(model, pairs, progress=False).correct == 4
    seen: list[torch.Size] = []
    loss = lambda output, target: seen.append(output.shape) or nn.functional.cross_entropy(output, target)  # noqa: E731
    keywords = {"search": "gates", "data": [(images, labels)], "loss": loss, "example_inputs": images[:1]}
    msa2conv.convert(model, 0.9, progress=False, **keywords)
    assert set(seen) == {torch.Size((4, 10))}


def test_every_tensor_has_to_be_the_same() -> None:
    one = {"a": torch.zeros(2), "b": (torch.zeros(3), None)}
    assert check_same("law", one, {"a": torch.zeros(2), "b": (torch.full((3,), 1e-6), None)}) == pytest.approx(1e-6)
    with pytest.raises(LawViolation, match=r"law: found a difference of 1\.00e\+00"):
        check_same("law", one, {"a": torch.zeros(2), "b": (torch.ones(3), None)})


def test_nothing_to_score() -> None:
    hint = "Pass output_fn=lambda output: ... that picks the tensors to score."
    with pytest.raises(InvalidInput) as caught:
        tensor_of({"label": 3})
    assert str(caught.value) == (
        f"model output: found dict; expected a tensor, or a tuple, list or dict of tensors. {hint}"
    )
    with pytest.raises(InvalidInput, match="what output_fn returned: found NoneType; expected a tensor"):
        convert(Dense().eval(), output_fn=lambda output: None)


def test_dense_example(monkeypatch: pytest.MonkeyPatch) -> None:
    """The grid of tokens is kept, and most places keep their label."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "examples" / "dense"))
    example = importlib.import_module("label_map")
    model, images = example.trained(), example.photos(0)[::8]
    result = msa2conv.convert(
        model,
        0.95,
        data=images,
        example_inputs=images[:1],
        levers=(msa2conv.Mixer(ops=("skip", "conv1x1")),),
        output_fn=lambda output: output["map"],
        progress=False,
    )
    assert result.model(images[:2])["map"].shape == (2, 10, 14, 14)
    assert example.agreement(model, result.model, images)["map"] > 0.5
