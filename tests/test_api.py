"""The public functions as users call them: every state of a model, every form of data, timm's contract on hybrids."""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric
from models import converted, images, same, snapshot, swin, vit
from sampled import sampled
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import msa2conv
from msa2conv import FFN, Calibration, Conversion, Mixer, calibrate, convert
from msa2conv.ops import ConvMixer, TokenMixer
from msa2conv.plan import Replace, Slice
from msa2conv.train import distill as distillation

LABELS = torch.zeros(16, dtype=torch.long)


def run(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return copy.deepcopy(model).eval()(x)


def equal(first: Conversion, second: Conversion) -> bool:
    return first.plan == second.plan and same(first.model, second.model)


# ------------------------------------------------------------------------------------------- the model given


def test_training_mode_is_kept_module_by_module() -> None:
    model = vit().train()
    model.blocks[0].eval()
    before = snapshot(model)
    hybrid = convert(model, 0.5, data=images()).model
    assert snapshot(model) == before
    assert hybrid.training and hybrid.blocks[1].attn.training and not hybrid.blocks[0].attn.training
    assert not converted().model.training


HALVES = [(vit, torch.bfloat16), (swin, torch.float16), (vit, torch.float16), (swin, torch.bfloat16)]


@pytest.mark.parametrize(
    ("build", "dtype"), sampled(HALVES, 2), ids=lambda value: getattr(value, "__name__", str(value))
)
def test_half_precision_comes_back_in_half(build: Callable[[], nn.Module], dtype: torch.dtype) -> None:
    model, data = build().to(dtype), images(size=32 if build is vit else 56)
    before = snapshot(model)
    result = convert(model, 0.5, data=data)
    assert snapshot(model) == before
    assert {parameter.dtype for parameter in result.model.parameters()} == {dtype}
    assert run(result.model, data.to(dtype)).dtype == dtype
    assert result.model.head.state_dict().keys() == model.head.state_dict().keys()
    assert same(result.model.patch_embed, model.patch_embed) and same(result.model.head, model.head)


@pytest.mark.parametrize(
    "wrap",
    sampled(
        [
            lambda model: nn.DataParallel(torch.compile(model)),
            lambda model: Fabric(accelerator="cpu").setup(model),
            nn.DataParallel,
            lambda model: torch.compile(model, backend="eager"),
        ],
        2,
    ),
    ids=["both", "Fabric", "DataParallel", "compile"],
)
def test_wrappers_are_taken_off(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = vit()
    result = convert(wrap(model), 0.5, data=images())
    assert type(result.model) is type(model) and equal(result, converted())


def test_frozen_parts_stay_frozen() -> None:
    model = vit()
    model.patch_embed.requires_grad_(False)
    model.blocks[0].mlp.fc1.weight.requires_grad_(False)
    before = snapshot(model)
    result = convert(model, 0.5, data=images())
    assert snapshot(model) == before and equal(result, converted())
    frozen = {name for name, parameter in result.model.named_parameters() if not parameter.requires_grad}
    assert frozen == {"patch_embed.proj.weight", "patch_embed.proj.bias", "blocks.0.mlp.fc1.weight"}


def test_users_hooks_stay_and_are_not_called() -> None:
    model, calls = vit(), []
    for module in model.modules():
        module.register_forward_hook(lambda *_: calls.append(1))
        module.register_forward_pre_hook(lambda *_, **__: calls.append(1), with_kwargs=True)
    before = snapshot(model)
    result = convert(model, 0.5, data=images(), distill_steps=1)
    assert calls == [] and snapshot(model) == before
    model(images(1))
    assert calls and result.plan == converted().plan


def test_gradients_and_autograd_mode_are_left_alone() -> None:
    model = vit()
    model(images(2)).sum().backward()
    before = [parameter.grad.clone() for parameter in model.parameters()]
    with torch.no_grad():
        convert(model, 0.5, data=images())
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()
    assert all(parameter.grad.equal(grad) for parameter, grad in zip(model.parameters(), before, strict=True))


def test_hybrid_shares_no_memory_with_the_model() -> None:
    model = vit()
    hybrid = convert(model, 0.5, data=images()).model
    pointers = [{tensor.data_ptr() for tensor in module.state_dict().values()} for module in (model, hybrid)]
    assert not pointers[0] & pointers[1]


def test_features_are_scored_by_relative_error() -> None:
    report = convert(vit(num_classes=0), 0.7, data=images()).report
    assert report.measure == "relative" and report.agreement is None and 0 < report.distance < 2
    assert "relative feature error" in str(report)
    assert converted().report.measure == "kl" and 0 <= converted().report.agreement <= 1


# ------------------------------------------------------------------------------------------------------ data


FORMS: dict[str, Callable[[], Any]] = {
    "tensor": images,
    "batches": lambda: list(images().split(5)),
    "pairs": lambda: list(zip(images().split(4), LABELS.split(4), strict=True)),
    "generator": lambda: (batch for batch in images().split(3)),
    "loader": lambda: DataLoader(images(), batch_size=6),
    "loader of pairs": lambda: DataLoader(TensorDataset(images(), LABELS), batch_size=7),
    "dicts": lambda: [{"label": 0, "pixel_values": batch} for batch in images().split(8)],
    "float64": lambda: images().double(),
}


@pytest.mark.parametrize("form", sampled(FORMS, ("pairs", "loader")))
def test_every_form_of_data_gives_the_same_hybrid(form: str) -> None:
    result = convert(vit(), 0.5, data=FORMS[form]())
    assert equal(result, converted())
    assert result.report.calibration == "16 of the images given"
    assert result.report.images == {"fit": 12, "held out": 4}


class Album(Dataset):  # type: ignore[type-arg]
    """A data set whose n-th image is filled with n, so that images tell which they are."""

    def __init__(self, count: int, wrap: Callable[[Tensor], Any] = lambda image: image) -> None:
        self.count, self.wrap, self.read = count, wrap, list[int]()

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        self.read.append(index)
        return self.wrap(torch.full((3, 32, 32), index / self.count))


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: (x, 3), lambda x: {"image": x}], ids=["image", "pair", "dict"])
def test_a_random_subset_of_a_dataset_is_read(wrap: Callable[[Tensor], Any]) -> None:
    drawn = []
    for seed in (0, 0, 1):
        album = Album(1000, wrap)
        calibrate(vit(depth=1), album, images=16, seed=seed, levers="ffn")
        assert len(set(album.read)) == len(album.read) == 16
        drawn.append(album.read)
    assert drawn[0] == drawn[1] != drawn[2]
    assert max(drawn[0]) > 500  # not the first ones: data sets are sorted by class


def test_an_endless_stream_is_read_only_as_far_as_needed() -> None:
    read = []
    stream = (read.append(seed) or images(4, seed=seed) for seed in itertools.count())  # type: ignore[func-returns-value]
    assert convert(vit(), 0.5, data=stream, images=10).report.images == {"fit": 8, "held out": 2}
    assert read == [0, 1, 2]


def test_without_data_the_shipped_photos_are_used() -> None:
    report = convert(vit(), 0.7).report
    plain = "256 views of photos shipped with msa2conv, normalised "
    assert report.calibration == plain + "with ImageNet statistics, since it has no pretrained_cfg"
    assert report.images == {"fit": 192, "held out": 64}
    assert any("pass data=your images" in warning for warning in report.warnings) and plain in str(report)


@pytest.mark.parametrize(("share", "told"), [(0.69, True), (0.9, False)])
def test_a_hybrid_that_no_image_reaches_is_said_to_be_one(share: float, told: bool) -> None:
    """Without any attention a class token hears nothing of the patches: the cheapest network, and a useless one."""
    result = msa2conv.convert(vit(), share, data=images(), levers=Mixer(ops=("skip",)))
    answers = result.model(images(4))
    assert bool((answers - answers[:1]).abs().max() < 1e-5) is told
    text = "the hybrid answers every image alike: nothing of them reaches its output any more; allow more FLOPs or time"
    assert (text in result.report.warnings) is told


def test_the_shipped_photos_are_normalised_as_the_model_says() -> None:
    import timm

    model = timm.create_model("test_vit", img_size=32)
    calibration = calibrate(model, levers="mixer", images=16)
    note = "16 views of photos shipped with msa2conv, normalised as the model's pretrained_cfg says"
    assert calibration.source == note
    assert model.pretrained_cfg["mean"] == (0.5, 0.5, 0.5) and calibration.images.abs().max() <= 1
    assert calibration.images.shape == (4, 3, 32, 32)


# ------------------------------------------------------------------------------------- targets and repetition


def test_a_target_can_be_written_in_three_ways() -> None:
    model = vit(depth=4)
    base = msa2conv.inspect(model).costs.base
    calibration = calibrate(model, images(), levers="ffn")
    forms = [0.7, "70%", "70 %", int(0.7 * base), f"{int(0.7 * base) / 1e6:.6f}M"]
    results = [convert(model, target, calibration=calibration) for target in forms]
    assert all(equal(results[0], result) for result in results[1:])
    assert results[0].report.target == int(0.7 * base) >= results[0].plan.flops > 0.99 * int(0.7 * base)


@pytest.mark.parametrize(
    "levers", ["all", "ffn", (Mixer(ops=("conv1x1",)),), (FFN(min_keep=0.5, round_to=7),)], ids=str
)
def test_the_floor_that_inspect_shows_can_be_reached(levers: Any) -> None:
    model = vit()
    seen = msa2conv.inspect(model, levers=levers)
    result = convert(model, (seen.floor + 0.5) / seen.costs.base, data=images(), levers=levers)
    assert 0 < result.plan.flops <= seen.floor


def test_the_same_seed_gives_the_same_hybrid() -> None:
    one, two, other = (convert(vit(), 0.6, data=images(), seed=seed, distill_steps=3) for seed in (5, 5, 6))
    assert equal(one, two) and one.report.distance_polished == two.report.distance_polished
    assert not equal(one, other)


def test_the_global_random_state_does_not_matter() -> None:
    torch.manual_seed(99)
    assert equal(convert(vit(), 0.5, data=images()), converted())


def test_the_global_random_state_is_left_alone() -> None:
    def state() -> list[Any]:
        return [torch.random.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()]

    model, data = vit(), images()
    before = state()
    msa2conv.inspect(model)
    assert state() == before
    calibrate(model, data, levers="mixer")
    assert state() == before
    convert(model, 0.5, data=data, distill_steps=1)
    assert state() == before
    with pytest.raises(msa2conv.errors.InfeasibleBudget):
        convert(model, 1e-3, data=data)
    assert state() == before


def test_a_second_budget_equals_a_fresh_conversion() -> None:
    first = convert(vit(), 0.8, data=images())
    assert equal(convert(vit(), 0.5, calibration=first.calibration), converted())


def test_a_saved_calibration_gives_the_same_hybrid(tmp_path: Path) -> None:
    claims = msa2conv.inspect(vit()).claims
    path = converted().calibration.save(tmp_path / "calibration.safetensors")
    loaded = Calibration.load(path, claims)
    result = convert(vit(), 0.5, calibration=loaded)
    assert equal(result, converted()) and result.plan.model_dump_json() == converted().plan.model_dump_json()
    assert result.report.candidates == converted().report.candidates
    assert loaded.warnings == converted().calibration.warnings and loaded.costs == converted().calibration.costs


def test_distillation_brings_the_hybrid_closer() -> None:
    report = convert(vit(), 0.3, data=images(64), distill_steps=20).report
    assert report.distance_polished < report.distance and report.distill_steps == 20
    assert "after 20 distillation steps" in str(report)


def test_interrupting_the_polish_keeps_what_was_learned(monkeypatch: pytest.MonkeyPatch) -> None:
    steps, augment = [], distillation.augment

    def interrupt(*args: Any) -> Tensor:
        steps.append(1)
        if len(steps) == 4:
            raise KeyboardInterrupt
        return augment(*args)

    monkeypatch.setattr(distillation, "augment", interrupt)
    try:
        result = convert(vit(), 0.5, data=images(), distill_steps=1000)
    except KeyboardInterrupt:
        pytest.fail("the interruption came through")
    assert len(steps) == 4 and result.plan == converted().plan
    assert not same(result.model, converted().model) and result.report.distance_polished is not None
    assert all(parameter.grad is None for parameter in result.model.parameters())


# ---------------------------------------------------------------------------------------------------- levers


def test_each_lever_leaves_the_others_sites_alone() -> None:
    original = vit()
    narrowed = convert(vit(), 0.7, data=images(), levers=("ffn",)).model
    mixed = convert(vit(), 0.8, data=images(), levers=("mixer",)).model
    pairs = list(zip(original.blocks, narrowed.blocks, mixed.blocks, strict=True))
    assert all(type(b.attn) is type(a.attn) and same(a.attn, b.attn) for a, b, _ in pairs)
    assert all(same(a.mlp, c.mlp) for a, _, c in pairs)
    assert any(b.mlp.fc1.out_features < 192 for _, b, _ in pairs)
    assert any(isinstance(c.attn, TokenMixer) for *_, c in pairs)


def test_configured_levers_are_honoured() -> None:
    levers = (Mixer(ops=("conv3x3", "conv5x5"), rank=0.5, prefix="ridge"), FFN(round_to=32, min_keep=0.4))
    result = convert(vit(), 0.6, data=images(), levers=levers)
    offered = result.calibration.options()
    assert {option.name for option in offered["blocks.0.attn"]} == {"attention", "conv3x3", "conv5x5"}
    assert [option.name for option in offered["blocks.1.mlp"]] == ["192/192", "96/192", "128/192", "160/192"]
    replaced = [edit for edit in result.plan.edits if isinstance(edit, Replace)]
    widths = {edit.count for edit in result.plan.edits if isinstance(edit, Slice)}
    assert replaced and {edit.spec.kind for edit in replaced} == {"conv"}
    assert {edit.spec.rank for edit in replaced} == {8} and {edit.spec.kernel for edit in replaced} <= {3, 5}
    assert widths and widths <= {96, 128, 160}
    assert all(isinstance(result.model.get_submodule(edit.path), ConvMixer) for edit in replaced)


@pytest.mark.parametrize("wrong", [{"ops": ("pool",)}, {"rank": 0}, {"kernel": 3}, {"prefix": "copy"}], ids=str)
def test_malformed_levers_are_refused_when_written(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Mixer(**wrong)


# ------------------------------------------------------------------------------------ timm's contract on hybrids


@pytest.fixture(params=["vit", "swin"])
def hybrid(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor]:
    """(a copy of a hybrid, images for it)."""
    return copy.deepcopy(converted(request.param).model), images(2, 32 if request.param == "vit" else 56)


Hybrid = tuple[nn.Module, Tensor]


def test_features_and_head(hybrid: Hybrid) -> None:
    model, x = hybrid
    features = model.forward_features(x)
    assert model.forward_head(features).equal(model(x))
    final, intermediates = model.forward_intermediates(x)
    assert torch.allclose(final, features) and len(intermediates) >= 2
    assert all(level.ndim == 4 and level.isfinite().all() for level in intermediates)


def test_intermediate_layers_of_a_vit() -> None:
    layers = converted().model.get_intermediate_layers(images(2), n=2, reshape=True, norm=True)
    assert [tuple(layer.shape) for layer in layers] == [(2, 48, 4, 4)] * 2


def test_a_new_head_can_be_put_on(hybrid: Hybrid) -> None:
    model, x = hybrid
    model.reset_classifier(5)
    assert model(x).shape == (2, 5) and model.num_classes == 5
    model.reset_classifier(0)
    assert model(x).shape == (2, model.num_features)


def test_training_with_gradient_checkpointing(hybrid: Hybrid) -> None:
    model, x = hybrid
    model.train()
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        torch.manual_seed(0)  # for stochastic depth
        model(x).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(*gradients, strict=True))
    assert all(gradient.isfinite().all() for gradient in gradients[0])


def test_what_optimisers_and_loaders_ask_for(hybrid: Hybrid) -> None:
    from timm.optim import param_groups_weight_decay

    model, _ = hybrid
    original, names = swin() if hasattr(model, "layers") else vit(), dict(model.named_parameters()).keys()
    assert model.no_weight_decay() & names == original.no_weight_decay() & names
    groups = param_groups_weight_decay(model, no_weight_decay_list=model.no_weight_decay())
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def test_pretrained_configuration_is_kept() -> None:
    import timm

    model = timm.create_model("test_vit", img_size=32, num_classes=10)
    result = convert(model, 0.7, data=images(), levers="ffn")
    assert result.model.pretrained_cfg == model.pretrained_cfg
    assert timm.data.resolve_model_data_config(result.model) == timm.data.resolve_model_data_config(model)
    assert result.plan.base.preprocessing.mean == (0.5, 0.5, 0.5) and result.plan.base.name == "test_vit"


def test_state_dict_copy_and_torch_save(hybrid: Hybrid, tmp_path: Path) -> None:
    model, x = hybrid
    expected = model(x)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert not twin(x).equal(expected) and model(x).equal(expected)
    twin.load_state_dict(torch.load(tmp_path / "weights.pth", weights_only=True), strict=True)
    assert twin(x).equal(expected)


def test_compiled_without_graph_breaks(hybrid: Hybrid) -> None:
    model, x = hybrid
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.allclose(run(model, x), compiled(x), atol=1e-5)


def test_exported_program(hybrid: Hybrid) -> None:
    model, x = hybrid
    assert torch.allclose(torch.export.export(model, (x,)).module()(x), model(x), atol=1e-5)


@pytest.mark.slow
def test_onnx(tmp_path: Path) -> None:
    import onnxruntime

    model, x = copy.deepcopy(converted().model), images(2)
    path = tmp_path / "hybrid.onnx"
    torch.onnx.export(model, (x,), path, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    expected = run(model, x)
    assert (torch.from_numpy(found) - expected).abs().max() <= 1e-4 * max(1, expected.abs().max())


# -------------------------------------------------------------------------------------------------- what is printed


def test_what_is_printed() -> None:
    result, seen = converted("swin"), msa2conv.inspect(swin())
    before, after = result.plan.base.flops, result.plan.flops
    ratio = f"{after / before:.1%}"
    figures = f"SwinTransformer   {before / 1e9:.2f} -> {after / 1e9:.2f} GFLOPs ({ratio})"
    assert str(result.plan).startswith(figures) and "hidden units kept" in str(result.plan)
    assert str(result.plan) in str(result) and str(result.report) in str(result)
    for text in (ratio, f"{result.report.distance:.4f}", f"{result.report.agreement:.1%}", "12 to fit, 4 held out"):
        assert text in str(result.report)
    for text in (
        f"{seen.costs.base / 1e9:.3f} GFLOPs",
        f"floor, {seen.floor / seen.costs.base:.1%}",
        "3 x 56 x 56",
        "3 heads x 8, grid 14 x 14, windows 7 x 7, shifted by 3, 3",
        "24 -> 96 -> 24",
    ):
        assert text in str(seen)
    assert str(seen).count(" attention ") == 4 and str(seen).count(" ffn ") == 5


def test_refusals_are_printed() -> None:
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(img_size=32, patch_size=8, embed_dim=48, depth=1, num_heads=3, global_pool="map")
    seen = msa2conv.inspect(model)
    assert "left as they are:\n  attn_pool (AttentionPoolLatent): a pooling head" in str(seen)
    assert [refusal.path for refusal in seen.claims.refusals] == ["attn_pool"]
