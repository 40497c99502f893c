"""Models of Hugging Face transformers: class and config are kept; what a config cannot describe is not read back."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

import msa2conv
from msa2conv.errors import ArchitectureMismatch, InvalidArgument, UnsupportedArgument

SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "patch_size": 8}
IMAGES = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
NOTE = "this is a hybrid made by msa2conv, whose widths a config cannot describe; build the original architecture and"


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.ViTConfig(**SIZE, image_size=32, num_labels=10)
    return transformers.ViTForImageClassification(config).eval()


@pytest.fixture(scope="module")
def result(model: nn.Module) -> msa2conv.Conversion:
    return msa2conv.convert(model, 0.8, data=IMAGES, levers="mixer", progress=False)


def test_class_and_config_are_kept_and_logits_are_compared(model: nn.Module, result: msa2conv.Conversion) -> None:
    assert type(result.model) is type(model) and result.report.measure == "kl"
    assert result.model.config.to_dict() == model.config.to_dict() and result.model.config is not model.config
    out = result.model(pixel_values=IMAGES[:2], labels=torch.tensor([1, 2]))
    assert out.loss.isfinite() and out.logits.shape == (2, 10)
    assert result.model(IMAGES[:1], output_hidden_states=True).hidden_states[-1].shape == (1, 17, 32)


def test_attention_weights_are_refused_by_name(result: msa2conv.Conversion) -> None:
    expected = "found the argument 'output_attentions'; expected only the tokens 'hidden_states'"
    with pytest.raises(UnsupportedArgument, match=expected):
        result.model(IMAGES[:1], output_attentions=True)


def folders(result: msa2conv.Conversion, tmp_path: Path) -> list[Path]:
    """Written by us, and by the hybrid's own `save_pretrained`, also of a copy."""
    result.save(tmp_path / "ours")
    copy.deepcopy(result.model).save_pretrained(tmp_path / "theirs")
    loaded = msa2conv.load(tmp_path / "ours", rebuilt(tmp_path / "ours"))
    loaded.save_pretrained(tmp_path / "again")
    return [tmp_path / name for name in ("ours", "theirs", "again")]


def rebuilt(folder: Path) -> nn.Module:
    config = transformers.AutoConfig.from_pretrained(folder)
    return transformers.AutoModelForImageClassification.from_config(config).eval()


@torch.no_grad()
def test_it_comes_back_by_load_and_by_nothing_else(result: msa2conv.Conversion, tmp_path: Path) -> None:
    for folder in folders(result, tmp_path):
        loaded = msa2conv.load(folder, rebuilt(folder))
        assert torch.equal(loaded(IMAGES).logits, result.model(IMAGES).logits)
        for kind in (transformers.ViTForImageClassification, transformers.AutoModel, transformers.ViTModel):
            with pytest.raises(ValueError, match=NOTE):
                kind.from_pretrained(folder)
        with pytest.raises(
            ArchitectureMismatch, match=r"Call load\('model.safetensors', model\) with an instance of tr"
        ):
            msa2conv.load(folder)


def test_the_original_is_saved_as_ever(model: nn.Module, result: msa2conv.Conversion, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(again(IMAGES).logits, model(IMAGES).logits)
    assert "transformers_weights" not in json.loads((tmp_path / "config.json").read_text())


def test_uploading_half_a_folder_is_refused(result: msa2conv.Conversion, tmp_path: Path) -> None:
    expected = "push_to_hub: found save_pretrained(..., push_to_hub=True); expected a hybrid saved first. Call hybrid.p"
    with pytest.raises(InvalidArgument) as caught:
        result.model.save_pretrained(tmp_path, push_to_hub=True)
    assert str(caught.value).startswith(expected) and not list(tmp_path.iterdir())


def test_plain_weights_load_into_a_hybrid(result: msa2conv.Conversion) -> None:
    """What trainers do with checkpoints."""
    twin = copy.deepcopy(result.model)
    nn.init.zeros_(twin.classifier.weight)
    twin.load_state_dict(result.model.state_dict())
    assert torch.equal(twin(IMAGES).logits, result.model(IMAGES).logits)


def test_it_learns_from_its_original_and_from_labels(result: msa2conv.Conversion, tmp_path: Path) -> None:
    """Attentions that return tuples, outputs that are dataclasses, batches that are dicts."""
    rows = [{"pixel_values": image, "labels": index % 10} for index, image in enumerate(IMAGES)]
    stages = ["local", {"kind": "distill", "hidden": 1.0}]
    tuned = msa2conv.finetune(result, torch.utils.data.DataLoader(rows, 8, shuffle=True), stages=stages, progress=False)
    assert tuned.report.training is not None and tuned.report.training.labels
    assert {"labels", "teacher", "hidden"} <= tuned.report.training.curve[-1].keys()
    tuned.save(tmp_path)
    again = msa2conv.Conversion.load(tmp_path, rebuilt(tmp_path))
    assert torch.equal(again.model(IMAGES[:2]).logits, tuned.model(IMAGES[:2]).logits)


@torch.no_grad()
@pytest.mark.parametrize("by", ["the config", "an argument"])
def test_hidden_states_have_all_tokens_behind_every_layer(by: str) -> None:
    """The network walks over its layers itself; asked for what they return, it merges no less."""
    torch.manual_seed(0)
    config = transformers.ViTConfig(**SIZE | {"num_hidden_layers": 4}, image_size=32, num_labels=10)
    model = transformers.ViTForImageClassification(config).eval()
    result = msa2conv.convert(model, 0.6, data=IMAGES, levers=("merge_tokens", "ffn"), progress=False)
    assert "vit.layers" in result.plan.choices
    hybrid, plain = result.model, result.model(IMAGES[:2])
    if by == "the config":
        hybrid.config.output_hidden_states = model.config.output_hidden_states = True
        assert msa2conv.inspect(model, example_inputs=IMAGES[:1]).claims.stream.path == "vit.layers"  # type: ignore[union-attr]
    out = hybrid(IMAGES[:2], **({"output_hidden_states": True} if by == "an argument" else {}))
    assert [tuple(state.shape) for state in out.hidden_states] == 5 * [(2, 17, 32)]
    torch.testing.assert_close(out.logits, plain.logits, rtol=1e-5, atol=1e-5)
    head = hybrid.classifier(hybrid.vit.layernorm(out.hidden_states[-1])[:, 0])
    torch.testing.assert_close(head, plain.logits, rtol=1e-5, atol=1e-5)
