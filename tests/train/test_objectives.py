"""Losses, against formulas written down here."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import images, vit
from torch import Tensor, nn

from msa2conv.errors import InvalidTrainingData
from msa2conv.plan import Preprocessing
from msa2conv.spvit import hard_distillation
from msa2conv.train.fade import Fading, fade_in, fade_out
from msa2conv.train.objectives import Imitate, Local
from msa2conv.train.stages import Stage
from msa2conv.train.teacher import Teacher

CPU = torch.device("cpu")
IMAGES, LABELS = images(6), torch.arange(6)


def teacher() -> Teacher:
    return Teacher(vit(), CPU)


def student() -> nn.Module:
    other = vit()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.9)
    return other


def losses(stage: dict[str, Any], model: nn.Module | None = None, **other: Any) -> dict[str, float]:
    made = {"classes": 10, "teacher": teacher(), **other}
    objective = Imitate(model or student(), Stage(**{"kind": "distill", **stage}), measure="kl", **made)
    return {name: float(value.detach()) for name, value in objective(IMAGES, LABELS).items()}


def outputs() -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        return student()(IMAGES), vit()(IMAGES)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_soft_distillation(temperature: float) -> None:
    own, theirs = outputs()
    p, q = ((each.double() / temperature).softmax(1) for each in (theirs, own))  # p / q cancels in float32
    kl = temperature**2 * float((p * (p / q).log()).sum(1).mean())
    entropy = float(F.cross_entropy(own, LABELS))
    found = losses({"temperature": temperature, "labels": 0.25})
    assert found == pytest.approx({"loss": 0.25 * entropy + 0.75 * kl, "teacher": kl, "labels": entropy}, rel=1e-5)
    assert losses({"temperature": temperature}, classes=None) == pytest.approx({"loss": kl}, rel=1e-5)


def test_hard_distillation_is_the_papers() -> None:
    own, theirs = outputs()
    expected = float(hard_distillation(own, LABELS, theirs, 0.5))
    assert losses({"hard": True})["loss"] == pytest.approx(expected, rel=1e-6)


def test_labels_alone_and_smoothed() -> None:
    own, _ = outputs()
    expected = float(F.cross_entropy(own, LABELS, label_smoothing=0.1))
    assert losses({"kind": "labels", "smoothing": 0.1}, teacher=None) == pytest.approx({"loss": expected}, rel=1e-6)


def test_hidden_states_count_beside_the_rest() -> None:
    taps = ("blocks.0", "blocks.1")
    with torch.no_grad():
        own, theirs = (model.forward_intermediates(IMAGES, norm=False, intermediates_only=True, output_fmt="NLC",
                       return_prefix_tokens=True) for model in (student(), vit()))  # fmt: skip
    tokens = [[torch.cat((prefix, grid), 1) for grid, prefix in side] for side in (own, theirs)]
    expected = sum(float((1 - F.cosine_similarity(a, b, dim=-1)).mean()) for a, b in zip(*tokens, strict=True)) / 2
    found = losses({"hidden": 2.0}, taps=taps)
    assert found["hidden"] == pytest.approx(expected, rel=1e-4)
    assert found["loss"] == pytest.approx(0.5 * found["labels"] + 0.5 * found["teacher"] + 2 * expected, rel=1e-5)
    same = losses({"hidden": 2.0, "labels": 0.0}, vit(), taps=taps)
    assert same == pytest.approx({"loss": 0, "teacher": 0, "hidden": 0}, abs=1e-6)


def test_features_are_compared_by_their_relative_error() -> None:
    own, theirs = outputs()
    expected = float(((own - theirs).square().sum(1) / theirs.square().sum(1)).mean())
    objective = Imitate(student(), Stage(kind="distill"), teacher(), "relative")
    assert float(objective(IMAGES)["loss"].detach()) == pytest.approx(expected, rel=1e-5)


def test_images_are_mixed_before_anybody_sees_them() -> None:
    def mix(given: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        soft = F.one_hot(labels, 10).float()
        return 0.5 * given + 0.5 * given.flip(0), 0.5 * soft + 0.5 * soft.flip(0)

    mixed, soft = mix(IMAGES, LABELS)
    with torch.no_grad():
        own, theirs = student()(mixed), vit()(mixed)
    found = losses({"labels": 0.5, "smoothing": 0.1}, mix=mix)  # timm's Mixup has smoothed them already
    assert found["labels"] == pytest.approx(float(F.cross_entropy(own, soft)), rel=1e-5)
    expected = float(F.kl_div(own.log_softmax(1), theirs.softmax(1), reduction="batchmean"))
    assert found["teacher"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("labels", "text"),
    [
        (
            None,
            r"^train: found a batch without labels; expected \(images, labels\) batches\. Give labels, or pass labe",
        ),
        (LABELS + 6, r"^train: found labels from 6 to 11; expected the 10 classes of the model\. Pass labels=False to"),
        (LABELS - 1, r"^train: found labels from -1 to 4; expected the 10 classes of the model\. Pass labels=False to"),
    ],
)
def test_labels_that_cannot_be_learned(labels: Tensor | None, text: str) -> None:
    objective = Imitate(student(), Stage(kind="distill"), teacher(), "kl", classes=10)
    with pytest.raises(InvalidTrainingData, match=text):
        objective(IMAGES, labels)


def test_the_teachers_weights_are_not_the_objectives() -> None:
    model = student()
    names = {name for name, _ in Imitate(model, Stage(kind="distill"), teacher(), "kl").named_parameters()}
    assert names == {f"student.{name}" for name, _ in model.named_parameters()}


# Every site by itself


def test_a_site_answers_the_originals_inputs() -> None:
    """The error of a module that gives nothing is its target's mean square over its variance."""
    model = vit()
    with torch.no_grad():
        model.blocks[1].mlp.fc2.weight.zero_(), model.blocks[1].mlp.fc2.bias.zero_()
    heard: list[Tensor] = []
    plain = vit()
    plain.blocks[1].mlp.register_forward_hook(lambda module, args, out: heard.append(out))
    with torch.no_grad():
        plain(IMAGES)
    local = Local(model, teacher(), ["blocks.0.attn", "blocks.1.mlp"], IMAGES)
    expected = float(heard[0].square().mean() / heard[0].var())
    assert float(local(IMAGES)["loss"].detach()) == pytest.approx(expected / 2, rel=1e-4)
    assert {name.partition(".")[0] for name, _ in local.named_parameters()} == {"sites"}
    own = sum(p.numel() for path in local.paths for p in model.get_submodule(path).parameters())
    assert sum(p.numel() for p in local.parameters()) == own


def test_nothing_is_left_to_learn_where_nothing_changed() -> None:
    local = Local(vit(), teacher(), ["blocks.0.attn", "blocks.1.mlp"], IMAGES)
    assert float(local(images(4, seed=5))["loss"].detach()) < 1e-10


# The teacher


def test_a_teacher_gets_the_images_it_was_trained_for() -> None:
    seen, own = Preprocessing(mean=(0.5,) * 3, std=(0.5,) * 3), Preprocessing()
    raw = torch.rand(2, 3, 32, 32)
    mean, std = (torch.tensor(value)[:, None, None] for value in (own.mean, own.std))
    teacher_ = Teacher(vit(), CPU, seen=seen, own=own, size=(32, 32))
    with torch.no_grad():
        expected = vit()((raw - mean) / std)
    assert torch.allclose(teacher_((raw - 0.5) / 0.5), expected, atol=1e-5)
    assert Teacher(vit(), CPU, size=(32, 32))(torch.rand(2, 3, 48, 48)).shape == (2, 10)


def test_a_teacher_in_half_precision() -> None:
    """As on a GPU: its outputs and hidden states are compared in float32; what a site is taught is exact."""
    half, exact = teacher(), teacher()
    half.half = True
    assert half.run(IMAGES).dtype == torch.bfloat16 and half(IMAGES).dtype == torch.float32
    local = [
        float(Local(student(), each, ["blocks.0.attn"], IMAGES)(IMAGES)["loss"].detach()) for each in (half, exact)
    ]
    assert local[0] == local[1] > 0
    found = [losses({"hidden": 1.0}, teacher=each, taps=["blocks.0"]) for each in (half, exact)]
    assert found[0] == pytest.approx(found[1], rel=0.05) and found[0] != found[1]
    with torch.autocast("cpu", torch.bfloat16):  # as a student that trains in mixed precision
        assert torch.isfinite(Local(student(), half, ["blocks.0.attn"], IMAGES)(IMAGES)["loss"])


def test_a_teacher_is_a_copy_and_has_no_gradients() -> None:
    model = vit()
    model.train()
    taught = Teacher(model, CPU)
    assert model.training and not taught.model.training and next(model.parameters()).requires_grad
    assert not taught(IMAGES).requires_grad and not taught.check(IMAGES)


# Attention that fades


class Tuple(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return self.layer(x), None


@pytest.mark.parametrize("wrap", [lambda layer: layer, Tuple])
def test_attention_fades_while_it_trains_and_is_gone_in_eval(wrap: Any) -> None:
    new, old, x = nn.Linear(3, 3), nn.Linear(3, 3), torch.randn(2, 3)
    node = Fading(wrap(new), wrap(old))

    def out() -> Tensor:
        given = node(x)
        return given if isinstance(given, Tensor) else given[0]

    node.share = 0.25
    assert torch.allclose(out(), 0.25 * new(x) + 0.75 * old(x), atol=1e-6)
    assert all(parameter.requires_grad == (name == "host") for name in ("host", "attention")
               for parameter in node.get_submodule(name).parameters())  # fmt: skip
    node.eval()
    assert torch.equal(out(), new(x))
    node.train()
    node.share = 1.0
    assert torch.equal(out(), new(x))


def test_fading_leaves_no_trace() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    before = copy.deepcopy(model.state_dict())
    (node,) = fade_in(model, nn.Sequential(nn.Linear(3, 3)), ["0"])
    assert model[0] is node
    fade_out(model)
    assert type(model[0]) is nn.Linear and model.state_dict().keys() == before.keys()
