"""Every error that a user can cause: its class, its full text, and that nothing was altered or left behind.

In the expected texts `…` stands for anything.
"""

from __future__ import annotations

import argparse
import ast
import copy
import dataclasses
import inspect
import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from models import files, images, replaced, snapshot, swin, vit
from safetensors import SafetensorError
from torch import Tensor, nn

import msa2conv
from msa2conv import (
    FFN,
    Calibration,
    Gates,
    Mixer,
    Search,
    apply,
    calibrate,
    convert,
    errors,
    finetune,
    load,
    prepare,
    train_gates,
    verify,
)
from msa2conv.errors import (
    ArchitectureMismatch,
    ConflictingClaims,
    ExportFailed,
    InfeasibleBudget,
    InvalidArgument,
    InvalidCalibrationData,
    InvalidCheckpoint,
    InvalidInput,
    InvalidOutputPath,
    InvalidPlan,
    InvalidTarget,
    InvalidTrainingData,
    LawViolation,
    LayoutMismatch,
    MissingDependency,
    Msa2ConvError,
    NonFiniteValue,
    NoSitesFound,
    SearchNotRun,
    UncountedOperator,
    UnsupportedArgument,
    UnsupportedSchema,
    WeightsUnavailable,
)
from msa2conv.files import read_state_dict, read_tensors, write_tensors
from msa2conv.plan import PLAN_KEY
from msa2conv.targets import parse_target

Refused = Callable[..., AbstractContextManager[None]]
ACCEPTED = "a fraction in (0, 1), text such as '70%' or '3.3G', or multiply-adds above 1e6"
EXAMPLE = "Write for example 0.7, '70%' or '3.3G'."
PLAN_HINT = "Apply a Plan only to the model it was made for; do not edit Plans by hand."
DAMAGED_PLAN = "a well-formed Plan. The file is damaged or was edited by hand: convert the original again."
SAVE_AGAIN = "save the plain state dict with safetensors.torch.save_file."


def matches(expected: str, text: str) -> bool:
    return re.fullmatch(".*".join(map(re.escape, expected.split("…"))), text) is not None


@pytest.fixture
def refused(tmp_path: Path) -> Refused:
    """`with refused(Error, "full text", model): call` checks class and text, the model and the files of the test."""

    @contextmanager
    def check(kind: type[Msa2ConvError], text: str, *models: nn.Module) -> Iterator[None]:
        before = [snapshot(model) for model in models], files(tmp_path)
        with pytest.raises(Msa2ConvError) as caught:
            yield
        assert type(caught.value) is kind
        assert matches(text, str(caught.value)), str(caught.value)
        assert ([snapshot(model) for model in models], files(tmp_path)) == before

    return check


def test_the_comparison_can_fail() -> None:
    assert matches("a … (c)", "a b (c)") and not matches("a … c", "a b d") and not matches("a", "a b")


def test_every_error_class_is_tested_here() -> None:
    package = Path(msa2conv.__file__).parent
    library = [
        path
        for path in package.rglob("*.py")
        if "cli" not in path.parts and path.name not in ("__main__.py", "errors.py")
    ]
    calls = {node.func.id for path in library for node in _calls(path.read_text()) if isinstance(node.func, ast.Name)}
    known = {name for name, kind in vars(errors).items() if inspect.isclass(kind) and issubclass(kind, Msa2ConvError)}
    expected = {
        node.args[0].id
        for node in _calls(Path(__file__).read_text())
        if isinstance(node.func, ast.Name) and node.func.id == "refused" and isinstance(node.args[0], ast.Name)
    }
    assert known & calls == expected
    assert len(expected) >= 17


def _calls(source: str) -> list[ast.Call]:
    return [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]


# ---------------------------------------------------------------------------------------------------- flops_target


@pytest.mark.parametrize(
    ("target", "found", "hint"),
    [
        (0, "0", EXAMPLE),
        (-0.5, "-0.5", EXAMPLE),
        (float("nan"), "nan", EXAMPLE),
        (float("inf"), "inf", EXAMPLE),
        pytest.param(10**400, "…", "…", id="10**400"),
        ("lots", "'lots'", EXAMPLE),
        ("", "''", EXAMPLE),
        ("1e400", "'1e400'", EXAMPLE),
        (True, "bool", EXAMPLE),
        ([], "list", EXAMPLE),
        (1e-12, "1e-12", "Ask for more, for example 0.7."),
        (1, "1", "1 would keep the whole model: ask for less, for example 0.7."),
        ("100%", "'100%'", "1 would keep the whole model: ask for less, for example 0.7."),
        (70, "70", "Did you mean '70%'?"),
        ("70", "'70'", "Did you mean '70%'?"),
        (3.3, "3.3", "Did you mean '3.3%'?"),
        ("150%", "'150%'", "Did you mean 0.7?"),
        (500_000, "500000", "Did you mean 0.7?"),
        (1e6, "1000000.0", "Did you mean 0.7?"),
    ],
)
def test_unusable_targets(refused: Refused, target: Any, found: str, hint: str) -> None:
    """The model has 0.0012 GFLOPs, so no hint may speak of 1.5 or 70 G."""
    model = vit()
    with refused(InvalidTarget, f"flops_target: found {found}; expected {ACCEPTED}. {hint}", model):
        convert(model, target, data=images())


def test_giga_is_suggested_where_it_makes_sense(refused: Refused) -> None:
    with refused(InvalidTarget, f"flops_target: found 3.3; expected {ACCEPTED}. Did you mean '3.3%' or '3.3G'?"):
        parse_target(3.3, base=4_600_000_000)


@pytest.mark.parametrize(("target", "found"), [("2G", "'2G', which is 2 GFLOPs"), (2e6, "2000000.0, which is 0.002 …")])
def test_target_above_the_original(refused: Refused, target: Any, found: str) -> None:
    model = vit()
    text = f"flops_target: found {found}; expected less than the original's 0.001164 GFLOPs. Ask for less, for example "
    with refused(InvalidTarget, text + "'0.00081G' or 0.7.", model):
        convert(model, target, data=images())


def test_target_equal_to_the_original(refused: Refused) -> None:
    model = vit(depth=4)
    with refused(InvalidTarget, "flops_target: found …; expected less than the original's 0.00…", model):
        convert(model, msa2conv.inspect(model).costs.base)


def forbid(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("work was started before the budget was checked")


@pytest.mark.parametrize(
    "levers", ["all", ("ffn",), ("mixer",), (Mixer(ops=("conv1x1",)),), (FFN(min_keep=0.5),)], ids=str
)
def test_budget_below_the_floor_is_refused_before_any_work(
    refused: Refused, monkeypatch: pytest.MonkeyPatch, levers: Any
) -> None:
    for name in ("calibrate_sites", "shipped_views", "load_images"):
        users = [module for path, module in sys.modules.items() if path.startswith("msa2conv") and name in vars(module)]
        assert len(users) >= 2
        for module in users:
            monkeypatch.setattr(module, name, forbid)
    model = vit()
    seen = msa2conv.inspect(model, levers=levers)
    text = (
        "flops_target: found 0.000… GFLOPs; expected at least 0.000… GFLOPs, the floor of the allowed levers. "
        "Ask for more FLOPs, or allow more levers or a smaller FFN(min_keep=...)."
    )
    with refused(InfeasibleBudget, text, model):
        convert(model, (seen.floor - 0.5) / seen.costs.base, levers=levers)


def test_a_sweep_refuses_what_any_of_its_budgets_deserves(monkeypatch: pytest.MonkeyPatch, refused: Refused) -> None:
    def forbid(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("work before all targets were checked")

    monkeypatch.setattr(msa2conv.api, "calibrate_sites", forbid)
    model = vit()
    text = "targets: found none; expected at least one budget. Write for example [0.9, 0.7, 0.5]."
    with refused(InvalidArgument, text, model):
        msa2conv.sweep(model, [])
    with refused(InvalidTarget, f"flops_target: found 'x'; expected {ACCEPTED}. {EXAMPLE}", model):
        msa2conv.sweep(model, [0.9, "x"])
    with refused(InfeasibleBudget, "flops_target: found …, the floor of the allowed levers. Ask for more …", model):
        msa2conv.sweep(model, [0.9, 0.001])


def test_budget_below_the_floor_of_a_calibration(refused: Refused) -> None:
    model = vit()
    calibration = calibrate(model, images(), levers="mixer")
    with refused(InfeasibleBudget, "flops_target: found …, the floor of the allowed levers. Ask for more …", model):
        convert(model, 0.3, calibration=calibration)


# ----------------------------------------------------------------------------------------------------- the model


def classifier() -> nn.Module:
    layers = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10)
    return nn.Sequential(*layers).eval()


ADAPTERS = "an attention that one of the adapters (timm, transformers, torchvision, torch) knows"
WRITE_ADAPTER = "Let msa2conv.discover(model) propose one, or write it (CONTRIBUTING.md), and pass adapters=[yours]."


def test_convolutional_network(refused: Refused) -> None:
    model = classifier()
    text = f"Sequential: found no attention module at all; expected {ADAPTERS}. {WRITE_ADAPTER}"
    with refused(NoSitesFound, text, model):
        convert(model, 0.5, example_inputs=torch.zeros(1, 3, 32, 32))


def test_unknown_attention_is_listed(refused: Refused) -> None:
    class OwnAttention(nn.Conv2d):
        pass

    model = nn.Sequential(OwnAttention(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10)).eval()
    listed = "0 (OwnAttention): an attention that no adapter knows"
    with refused(NoSitesFound, f"Sequential: found {listed}; expected {ADAPTERS}. {WRITE_ADAPTER}", model):
        convert(model, 0.5, example_inputs=torch.zeros(1, 3, 32, 32))


def test_an_attention_that_is_no_module_is_refused_with_the_reason(refused: Refused) -> None:
    from timm.models.vision_transformer import DiffParallelScalingBlock

    model = vit(block_fn=DiffParallelScalingBlock)
    reason = "attention and FFN share one projection: the attention is not a module of its own"
    found = f"blocks.0 and 1 more (DiffParallelScalingBlock): {reason}"
    text = f"VisionTransformer: found {found}; expected {ADAPTERS}. {WRITE_ADAPTER}"
    with refused(NoSitesFound, text, model):
        convert(model, 0.5)
    with refused(NoSitesFound, text, model):
        msa2conv.inspect(model)


def test_two_adapters_claim_one_module(refused: Refused) -> None:
    from msa2conv.adapters.timm import TIMM

    model, name = vit(), "'timm'"
    text = f"blocks.0.attn: found claims of both {name} and {name}; expected one adapter for one module. "
    with refused(ConflictingClaims, text + "Pass adapters=[...] with only one of them.", model):
        convert(model, 0.5, data=images(), adapters=[TIMM, TIMM])


def test_not_a_module(refused: Refused) -> None:
    text = "model: found function; expected a torch.nn.Module. Pass the model object itself."
    with refused(InvalidArgument, text):
        convert(forbid, 0.5)  # type: ignore[arg-type]


def test_meta_device(refused: Refused) -> None:
    model = vit().to("meta")
    text = "model: found parameters on the meta device; expected real weights. Load the weights first."
    with refused(InvalidArgument, text, model):
        convert(model, 0.5)


def test_no_parameters(refused: Refused) -> None:
    text = "model: found a module without parameters; expected a trained network. Pass the model itself."
    with refused(InvalidArgument, text):
        convert(nn.Identity(), 0.5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_weights_are_named(refused: Refused, value: float) -> None:
    model = vit()
    model.blocks[1].mlp.fc1.weight.data[0, :2] = value
    text = "blocks.1.mlp.fc1.weight: found 2 NaN or Inf values in the weights; expected finite numbers. "
    with refused(NonFiniteValue, text + "Load a checkpoint that trained well.", model):
        convert(model, 0.5, data=images())


def test_weights_that_overflow_name_the_module(refused: Refused) -> None:
    model = vit()
    model.blocks[1].mlp.fc2.weight.data.fill_(3e38)
    with refused(NonFiniteValue, "blocks.1.mlp…: found NaN or Inf …; expected finite …. Check …", model):
        convert(model, 0.5, data=images())


@pytest.mark.parametrize("which", ["all", "fitted", "held out"])
def test_activations_that_overflow_name_the_site(refused: Refused, which: str) -> None:
    model, data = vit(), images()
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))  # the first quarter is held out
    data[{"all": order, "fitted": order[-1:], "held out": order[:1]}[which]] *= 3e37
    text = (
        "blocks.0.attn: found NaN or Inf in its output on the calibration images; expected finite activations. "
        "Check the normalisation of the images, and the weights."
    )
    with refused(NonFiniteValue, text, model):
        convert(model, 0.5, data=data)


@pytest.mark.parametrize(
    ("example", "found"),
    [
        (torch.zeros(1, 3, 32, 32, dtype=torch.long), "a int64 tensor of shape (1, 3, 32, 32)"),
        (torch.zeros(3, 32, 32), "a float32 tensor of shape (3, 32, 32)"),
        ([0.0], "list"),
    ],
    ids=["integers", "no batch", "list"],
)
def test_example_input_of_another_kind(refused: Refused, example: Any, found: str) -> None:
    model = vit()
    text = f"example_inputs: found {found}; expected a float tensor [B, C, H, W]. "
    with refused(InvalidInput, text + "Pass for example torch.zeros(1, 3, 224, 224).", model):
        convert(model, 0.5, example_inputs=example)


@pytest.mark.parametrize(
    ("shape", "reason"),
    [((1, 3, 40, 40), "Input height (40) doesn't match model (32)."), ((1, 1, 32, 32), "…1 channels instead")],
    ids=["size", "channels"],
)
def test_example_input_that_the_model_cannot_run_on(refused: Refused, shape: tuple[int, ...], reason: str) -> None:
    model = vit()
    text = (
        f"example_inputs: found a tensor of shape {shape} on which VisionTransformer fails ({reason}); expected "
        "a float tensor [B, C, H, W] of the channels and image size the model was built for. "
        "Pass example_inputs=torch.zeros(1, C, H, W) of the right size."
    )
    with refused(InvalidInput, text, model):
        convert(model, 0.5, example_inputs=torch.zeros(shape))


def test_model_that_states_no_image_size(refused: Refused) -> None:
    model = classifier()
    text = "example_inputs: found None, and a model that does not state its image size; expected a float tensor "
    with refused(InvalidInput, text + "[B, C, H, W]. Pass for example torch.zeros(1, 3, 224, 224).", model):
        convert(model, 0.5)


def test_operator_without_a_rule(refused: Refused) -> None:
    class Fourier(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.fft.fft(x).real

    text = (
        "Fourier: found operators without a FLOPs rule: aten::fft_fft (1x), aten::real (1x); expected operators that "
        "the counter knows. Add them to msa2conv.flops (ZERO_FLOPS, or a handle) rather than report a wrong figure."
    )
    with refused(UncountedOperator, text):
        msa2conv.count_flops(Fourier(), torch.zeros(1, 8))


# --------------------------------------------------------------------------------------------- calibration images


FEW = "at least 8, better 64 to 256. Give more images (labels are not needed), or data=None for the shipped photos."
BATCHES = (
    "float images [b, 3, 32, 32], normalised as the model expects. "
    "Make every batch (or the first entry of its tuple) such a tensor."
)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (images(7), f"data: found 7 images; expected {FEW}"),
        ([], f"data: found 0 images; expected {FEW}"),
        (5, "data: found int; expected an iterable of image batches, a Dataset or a DataLoader. See load_images."),
        ("photos", f"data, batch 0: found str; expected {BATCHES}"),
        (images().byte(), f"data, batch 0: found a uint8 tensor of shape (16, 3, 32, 32); expected {BATCHES}"),
        (
            [images(4), images(4), images(4)[:, :, :16], images(4)],
            f"data, batch 2: found a float32 tensor of shape (4, 3, 16, 32); expected {BATCHES}",
        ),
    ],
    ids=["7 images", "none", "a number", "text", "uint8", "wrong shape in mid-stream"],
)
def test_unusable_images(refused: Refused, data: Any, text: str) -> None:
    model = vit()
    with refused(InvalidCalibrationData, text, model):
        convert(model, 0.5, data=data)
    with refused(InvalidCalibrationData, text, model):
        calibrate(model, data)


def test_nan_in_an_image(refused: Refused) -> None:
    model, broken = vit(), images()
    broken[3, 0, 5, 5] = float("nan")
    text = "data, batch 1: found NaN or Inf in the images; expected finite numbers. Check the loader."
    with refused(NonFiniteValue, text, model):
        convert(model, 0.5, data=[images(), broken])


def test_shipped_photos_are_rgb(refused: Refused) -> None:
    model = vit(in_chans=1)
    text = "data: found None, for a model of 1 channels; expected RGB for the shipped photos. Pass data=your images."
    with refused(InvalidCalibrationData, text, model):
        convert(model, 0.5)


def test_few_images_give_a_warning_and_a_stronger_ridge() -> None:
    few, enough = (calibrate(vit(), images(count), levers="ffn") for count in (63, 64))
    assert few.warnings == ["only 63 calibration images: ridges are 10x stronger, expect a worse fit"]
    assert enough.warnings == []
    assert [record.lever.ridge for record in few.records] == pytest.approx([1e-2, 1e-2])
    assert [record.lever.ridge for record in enough.records] == pytest.approx([1e-3, 1e-3])
    report = convert(vit(), 0.7, calibration=few).report
    assert few.warnings[0] in report.warnings and f"warning: {few.warnings[0]}" in str(report)


# --------------------------------------------------------------------------------------------- the other arguments


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"levers": ()}, "levers: found []; expected at least one lever, each once. For example …('mixer', 'ffn')."),
        ({"levers": ("ffn", FFN())}, "levers: found ['ffn', 'ffn']; expected at least one lever, each once. …"),
        (
            {"levers": "conv"},
            "levers: found 'conv'; expected names out of ['ffn', 'linear_ffn', 'merge_in_site', … or 'all'. …",
        ),
        ({"levers": ("ffn", "heads")}, "levers: found 'heads'; expected names out of ['ffn', … or 'all'. …"),
        ({"levers": (3,)}, "levers: found …; expected …. For example levers=('mixer', 'ffn')."),
        ({"levers": 3}, "levers: found 3; expected names or levers. For example levers=('mixer', 'ffn')."),
        ({"distill_steps": -1}, "distill_steps: found -1; expected an integer >= 0. 0 means no polish."),
        ({"distill_steps": 0.5}, "distill_steps: found 0.5; expected an integer >= 0. 0 means no polish."),
        ({"images": 3}, "images: found 3; expected at least 8. 256 is a good number."),
        ({"images": "all"}, "images: found 'all'; expected …. 256 is a good number."),
    ],
    ids=str,
)
def test_malformed_arguments(refused: Refused, arguments: dict[str, Any], text: str) -> None:
    model = vit()
    with refused(InvalidArgument, text, model):
        convert(model, 0.5, data=images(), **arguments)


def test_gate_without_its_branch(refused: Refused) -> None:
    model = vit()
    node = msa2conv.lift(model, msa2conv.inspect(model).claims.sites).nodes["blocks.0.attn"]
    text = "gate: found 'conv'; expected one of ['host']. Add the branch before choosing it."
    with refused(InvalidArgument, text, model):
        node.gate = "conv"


def test_loss_that_diverges(refused: Refused) -> None:
    model, hybrid = vit(), copy.deepcopy(replaced().model)
    text = "distillation step 1: found a loss of nan; expected a finite loss. Lower the learning rate."
    with refused(NonFiniteValue, text, model, hybrid):
        msa2conv.distill(hybrid, model, images(), 3, lr=float("inf"))


# ------------------------------------------------------------------------------------------------- a gate search


def searching(steps: int = 2, **changes: Any) -> Search:
    return prepare(vit(**changes), 0.7, steps=steps)


@pytest.mark.parametrize("steps", [0, -1, 2.5, "all"])
def test_number_of_search_steps(refused: Refused, steps: Any) -> None:
    model = vit()
    with refused(
        InvalidArgument, f"steps: found {steps!r}; expected None or an integer >= 1. Pass epochs * len(loader).", model
    ):
        prepare(model, 0.7, steps=steps)


def test_targets_of_a_gate_search(refused: Refused) -> None:
    model = vit()
    for call in (prepare, lambda *given: convert(*given, data=[images(4)], search="gates")):
        with refused(InvalidTarget, f"flops_target: found 0; expected {ACCEPTED}. {EXAMPLE}", model):
            call(model, 0)
        with refused(InvalidTarget, "flops_target: found '2G', which is 2 GFLOPs; expected less than …", model):
            call(model, "2G")
        with refused(InfeasibleBudget, "flops_target: found …, the floor of the allowed levers. Ask for more …", model):
            call(model, 0.05)


def test_nothing_that_a_gate_can_decide(refused: Refused) -> None:
    from msa2conv.adapters.timm import TIMM
    from msa2conv.sites import AttentionSite, Claims

    class Silent:
        name = "silent"

        def claims(self, *args: Any) -> Claims:
            sites = TIMM.claims(*args).sites
            return Claims.of(dataclasses.replace(s, projections=None) for s in sites if isinstance(s, AttentionSite))

    model = vit()
    text = (
        "levers: found nothing that a gate can decide: no attention states its projections; expected 'mixer' or 'ffn'. "
        "Give the adapter's AttentionSites their Projections, or use the calibrated search."
    )
    with refused(InvalidArgument, text, model):
        prepare(model, 0.7, adapters=[Silent()])


def test_search_that_is_finished_before_it_began(refused: Refused) -> None:
    search = searching()
    text = "Search.finish: found no step of the search: penalty() was never called; expected at least one. "
    hint = "Train search.model with loss + search.penalty() first."
    with refused(SearchNotRun, text + hint, search.original, search.model):
        search.finish()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_thresholds_that_are_not_finite(refused: Refused, value: float) -> None:
    search = searching()
    search.penalty()
    search.nodes["blocks.1.attn"].gate.theta.data[1] = value
    text = (
        "blocks.1.attn (gate): found NaN or Inf in its thresholds; expected finite numbers. "
        "Lower the learning rates, and resume from the last saved state."
    )
    with refused(NonFiniteValue, text, search.original, search.model):
        search.finish()


def test_weights_that_a_search_has_broken(refused: Refused) -> None:
    search = searching()
    search.penalty()
    search.model.blocks[1].mlp.fc1.weight.data[0, :2] = float("nan")
    text = "blocks.1.mlp.fc1.weight: found 2 NaN or Inf values in the weights; expected finite numbers. …"
    with refused(NonFiniteValue, text, search.original, search.model):
        search.finish()


def test_state_of_another_search(refused: Refused) -> None:
    search, other = searching(), searching(depth=1)
    text = (
        "search state: found … tensors and target 816,193; expected the … tensors of this supernet and target …. "
        "Prepare the search with the model and arguments it was saved with."
    )
    state = search.state_dict() | {"target": 816_193}
    with refused(ArchitectureMismatch, text, search.model):
        search.load_state_dict(state)
    with refused(ArchitectureMismatch, text, other.model):
        other.load_state_dict(state)


def test_batch_that_leaves_nothing_to_normalise(refused: Refused) -> None:
    search = searching(img_size=8)
    text = (
        "SharedSupernode, training: found a batch of one image with a single position; expected two values per channel "
        "for BatchNorm. Train with larger batches (drop_last=True)."
    )
    with refused(InvalidInput, text, search.original):
        search.model(images(1, 8))
    assert search.model(images(2, 8)).shape == (2, 10) and search.model.eval()(images(1, 8)).shape == (1, 10)


PAIRS = [(images(4), torch.arange(4))] * 2
BATCHES_OF_A_SEARCH = "images [b, C, H, W], alone or with labels. Let the loader give (images, labels)."


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ([], "data: found no batches; expected at least one. Check the dataset and drop_last."),
        *(
            (
                data,
                f"data: found a {type(data).__name__}; expected something with a length that can be iterated once per "
                "epoch. Pass a DataLoader, or a list of (images, labels) batches.",
            )
            for data in (iter(PAIRS), 5)
        ),
        (["a"], f"data: found a batch that starts with str; expected {BATCHES_OF_A_SEARCH}"),
        ([images(4)[0]], f"data: found … with a tensor of shape (3, 32, 32); expected {BATCHES_OF_A_SEARCH}"),
        ([(3, images(4))], f"data: found a batch that starts with int; expected {BATCHES_OF_A_SEARCH}"),
    ],
    ids=["none", "an iterator", "a number", "text", "one image", "labels first"],
)
def test_unusable_training_images(refused: Refused, data: Any, text: str) -> None:
    search = searching()
    with refused(InvalidCalibrationData, text, search.original, search.model):
        train_gates(search, data)
    with refused(InvalidCalibrationData, text, search.original):
        convert(search.original, 0.7, data=data, search="gates")


def test_training_images_that_run_out(refused: Refused) -> None:
    class Once(list[Any]):
        def __iter__(self) -> Iterator[Any]:
            given, self[:] = self[:], [None] * 2
            return iter([item for item in given if item])

    search = searching()
    text = (
        "data, epoch 2: found 0 batches; expected 2, the length of the data. "
        "Pass something that can be iterated more than once, such as a DataLoader."
    )
    with refused(InvalidCalibrationData, text, search.original):
        train_gates(search, Once(PAIRS), epochs=2)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            {"data": None},
            "data: found None; expected your training images: a DataLoader, or a list of batches. "
            "A gate search trains; without your images use search='calibrated'.",
        ),
        ({"epochs": 0}, "epochs: found 0; expected an integer >= 1. Leave epochs out for its default."),
        ({"epochs": 1.5}, "epochs: found 1.5; expected an integer >= 1. Leave epochs out for its default."),
        *(
            (
                {"search": search},
                f"search: found {search!r}; expected 'calibrated', 'gates' or Gates(...). The first needs no training.",
            )
            for search in ("gate", None, Gates)
        ),
        *(
            (
                more,
                "search: found a gate search together with `calibration` or `distill_steps`; expected one kind of "
                "search. Leave them out, or use search='calibrated'.",
            )
            for more in ({"distill_steps": 5}, {"calibration": "one"}, {"search": Gates(), "distill_steps": 1})
        ),
        (
            {"data": [images(4)] * 2, "loss": nn.functional.cross_entropy},
            "loss: found a loss for labels, and data without labels; expected (images, labels) batches. "
            "Give labels, or leave `loss` out to imitate the original.",
        ),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, dict) else value.split(":")[0],
)
def test_arguments_of_a_gate_search(refused: Refused, arguments: dict[str, Any], text: str) -> None:
    model = vit()
    with refused(InvalidArgument, text, model):
        convert(model, 0.7, **{"search": "gates", "data": PAIRS, **arguments})


def test_gates_by_a_word(refused: Refused) -> None:
    text = "gates: found 'annealed'; expected Gates(...). For example gates=Gates(sampling='annealed')."
    with refused(InvalidArgument, text):
        prepare(vit(), 0.7, gates="annealed")  # type: ignore[arg-type]


def test_number_of_steps_between_saves(refused: Refused) -> None:
    text = "save_every: found 0; expected an integer >= 1. Leave save_every out for its default."
    with refused(InvalidArgument, text):
        train_gates(searching(), PAIRS, save_every=0)


def test_search_whose_loss_diverges(refused: Refused) -> None:
    search = searching()
    text = "search step 1: found a loss of nan; expected a finite loss. Lower lr; the state before this step is kept."
    with refused(NonFiniteValue, text, search.original):
        train_gates(search, PAIRS, lr=float("inf"))


def test_progress_of_another_search(refused: Refused, tmp_path: Path) -> None:
    train_gates(searching(), PAIRS, resume=tmp_path)
    path, hint = tmp_path / "search.pt", "Pass the same model, data and arguments, or another folder."
    for found, arguments, expected in (
        ("seed 0", {"seed": 1}, "seed 1"),
        ("lr 0.0001, gate_lr None", {"lr": 0.5, "gate_lr": 0.1}, "lr 0.5, gate_lr 0.1"),
        ("steps 2, epochs 1", {"epochs": 2}, "steps 4, epochs 2"),
    ):
        with refused(ArchitectureMismatch, f"{path}: found a search with {found}; expected {expected}. {hint}"):
            train_gates(searching(), PAIRS, resume=tmp_path, **arguments)
    for other, found in (
        (prepare(vit(), 0.7, gates=Gates(alpha=1)), "gates {}; expected gates {'alpha': 1.0}"),
        (searching(num_classes=3), "model …; expected model …"),
    ):
        with refused(ArchitectureMismatch, f"{path}: found a search with {found}. {hint}", other.model):
            train_gates(other, PAIRS, resume=tmp_path)
    other = prepare(vit(), 0.8)
    with refused(ArchitectureMismatch, "search state: found …; expected …. Prepare the search with …", other.model):
        train_gates(other, PAIRS, resume=tmp_path)


@pytest.mark.parametrize("content", [b"", b"\0\1", "a list", "malicious"])
def test_progress_that_cannot_be_read(refused: Refused, tmp_path: Path, content: Any) -> None:
    path, search = tmp_path / "search.pt", searching()
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save([1, 2] if content == "a list" else {"done": Malicious(tmp_path / "ran")}, path)
    text = f"{path}: found a file that is not a saved training state (…); expected one that msa2conv wrote. "
    with refused(InvalidCheckpoint, text + "Delete it to start anew.", search.model):
        train_gates(search, PAIRS, resume=tmp_path)
    assert not (tmp_path / "ran").exists()


def test_progress_that_cannot_be_written(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    text = (
        f"{tmp_path}/file/search.pt: found …; expected a path where a file can be written. Choose another output path."
    )
    with refused(InvalidOutputPath, text):
        train_gates(searching(), PAIRS, resume=tmp_path / "file")


# ------------------------------------------------------------------------------------------------- fine-tuning


def test_training_images_of_other_classes(refused: Refused) -> None:
    text = (
        "train: found labels from 3 to 12; expected the 10 classes of the model. "
        "Pass labels=False to learn from the teacher alone."
    )
    result = replaced()
    with refused(InvalidTrainingData, text, result.model, result.original):
        finetune(result, [(images(2), torch.tensor([3, 12]))], stages=["labels"], progress=False)


def test_training_without_accelerate(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    text = "training: found no accelerate; expected Hugging Face accelerate. pip install 'msa2conv[train]'"
    with refused(MissingDependency, text):
        finetune(replaced(), PAIRS)
    with refused(MissingDependency, text):
        train_gates(searching(), PAIRS)


def test_accelerate_set_up_for_what_is_not_supported(refused: Refused) -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    text = (
        "accelerate: found NO, gradients accumulated over 2 steps; expected one process, or DDP on CPUs or GPUs, "
        "without accumulation. Run `accelerate config` again; micro_batch accumulates gradients within a step."
    )
    with refused(InvalidArgument, text):
        finetune(replaced(), PAIRS, accelerator=Accelerator(cpu=True, gradient_accumulation_steps=2))
    AcceleratorState._reset_state(reset_partial_state=True)


def test_weights_that_cannot_be_downloaded(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    from msa2conv.adapters import weights

    def offline(name: str, **kwargs: Any) -> nn.Module:
        raise OSError("no network\nand more")

    monkeypatch.setattr(weights, "create", offline)
    text = (
        "vit_tiny_patch16_224: found no pretrained weights (no network); expected weights that timm can download or "
        "has cached. Go online once, or pass weights of your own."
    )
    with refused(WeightsUnavailable, text):
        weights.downloaded("vit_tiny_patch16_224")


def test_datasets_that_are_not_there(refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from msa2conv.data.sources import images_at

    folders = "a folder of images, or with one subfolder of them per class"
    kinds = f"{folders}, torch/NAME:ROOT, or a Hugging Face dataset on disk"
    with refused(InvalidArgument, f"{tmp_path}/none: found no images (…); expected {kinds}. Check the path."):
        images_at(tmp_path / "none", None)
    hint = "For example torch/CIFAR10:data, after torchvision.datasets.CIFAR10('data', download=True)."
    with refused(InvalidArgument, f"torch/CIFAR10: found no folder; expected torch/NAME:ROOT. {hint}"):
        images_at("torch/CIFAR10", None)
    with refused(InvalidArgument, f"torch/C:x: found no such dataset of torchvision; expected torch/NAME:ROOT. {hint}"):
        images_at("torch/C:x", None)
    text = (
        f"torch/CIFAR10:{tmp_path}: found …; expected CIFAR10 downloaded to {tmp_path}. Run torchvision.datasets.CIF…"
    )
    with refused(InvalidArgument, text):
        images_at(f"torch/CIFAR10:{tmp_path}", None)
    (tmp_path / "state.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "datasets", None)
    text = f"{tmp_path}: found a Hugging Face dataset; expected the package datasets. pip install datasets"
    with refused(MissingDependency, text):
        images_at(tmp_path, None)


# -------------------------------------------------------------------------------------------------------- export


def test_what_cannot_be_exported(tmp_path: Path, refused: Refused) -> None:
    """More in test_exporting.py."""

    class Branching(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if x.sum().item() > 0 else x

    model = Branching(8, 8).eval()
    text = (
        "Branching: found that torch.export.export fails: …; expected a model that can be exported. Export the "
        "original in the same way: where that fails too, the operator has to be avoided there."
    )
    with refused(ExportFailed, text, model):
        msa2conv.export_program(model, tmp_path / "x.pt2", example_inputs=torch.zeros(1, 3, 8, 8))


# ------------------------------------------------------------------------------- plans and calibrations of another


SMALLER = "VisionTransformer with 38,986 parameters"
WANTED = (
    "the architecture of VisionTransformer (timm.models.vision_transformer.VisionTransformer, 67,258 parameters, input "
    "(3, 32, 32)). Give the same architecture (name, num_classes, image size) that was converted."
)


def test_plan_of_another_architecture(refused: Refused, tmp_path: Path) -> None:
    other, path = vit(depth=1), replaced().save(tmp_path / "hybrid.safetensors")
    with refused(ArchitectureMismatch, f"model: found {SMALLER}; expected {WANTED}", other):
        apply(replaced().plan, other)
    with refused(ArchitectureMismatch, f"model: found {SMALLER}; expected {WANTED}", other):
        load(path, other)


def test_plan_that_timm_cannot_rebuild(refused: Refused, tmp_path: Path) -> None:
    path, kind = replaced().save(tmp_path / "hybrid.safetensors"), "timm.models.vision_transformer.VisionTransformer"
    text = f"{path}: found a Plan for {kind} without a builder; expected the original architecture as second argument. "
    with refused(ArchitectureMismatch, text + f"Call load('hybrid.safetensors', model) with an instance of {kind}."):
        load(path)


@pytest.mark.parametrize("other", ["architecture", "weights"])
def test_calibration_of_another_model(refused: Refused, other: str) -> None:
    model = vit(depth=3) if other == "architecture" else vit()
    model.head.bias.data.add_(1)
    text = "calibration: found a Calibration of another model or other weights; expected one of this model. "
    with refused(ArchitectureMismatch, text + "Calibrate again.", model):
        convert(model, 0.5, calibration=replaced().calibration)


def test_unusable_calibration_files(refused: Refused, tmp_path: Path) -> None:
    claims, hybrid = msa2conv.inspect(vit()).claims, replaced().save(tmp_path / "hybrid.safetensors")
    path = replaced().calibration.save(tmp_path / "calibration.safetensors")
    tensors, metadata = read_tensors(path)
    about = json.loads(metadata["msa2conv.calibration"])
    old = tmp_path / "old.safetensors"
    write_tensors(old, tensors, {"msa2conv.calibration": json.dumps({**about, "version": "0"})})
    text = "no calibration inside; expected a file by Calibration.save. Calibrate again."
    with refused(InvalidCheckpoint, f"{hybrid}: found {text}"):
        Calibration.load(hybrid, claims)
    with refused(UnsupportedSchema, f"{old}: found another version; expected version 2. Calibrate again."):
        Calibration.load(old, claims)
    text = "a site 'blocks.1.attn'; expected the sites of this model. Calibrate this model itself."
    with refused(ArchitectureMismatch, f"{path}: found {text}"):
        Calibration.load(path, msa2conv.inspect(vit(depth=1)).claims)


# ------------------------------------------------------------------------------------------------ files that are read


def test_files_that_are_not_hybrids(refused: Refused, tmp_path: Path) -> None:
    model, path = vit(), tmp_path / "file.safetensors"
    whole = replaced().save(path).read_bytes()
    again = "expected a .safetensors file. Copy or write the file again."
    unlucky = b"\x80\x02" + bytes(6) + b"{" + bytes(99)  # a header of 640 bytes starts like a pickle
    for content in (whole[:-100], whole[: len(whole) // 2], whole[:4], bytes(range(1, 255)), b"", unlucky):
        path.write_bytes(content)
        with refused(InvalidCheckpoint, f"{path}: found a damaged or truncated file (…); {again}", model):
            load(path, model)
    write_tensors(path, model.state_dict(), {})
    text = "a safetensors file without a Plan; expected a file written by Conversion.save. Convert first."
    for call in (lambda: load(path, model), lambda: msa2conv.read_plan(path)):
        with refused(InvalidCheckpoint, f"{path}: found {text}", model):
            call()


def test_missing_files(refused: Refused, tmp_path: Path) -> None:
    model, text = vit(), "found no file; expected a .safetensors file. Check the path."
    with refused(InvalidCheckpoint, f"{tmp_path}/none.safetensors: {text}", model):
        load(tmp_path / "none.safetensors", model)
    with refused(InvalidCheckpoint, f"{tmp_path}/model.safetensors: {text}", model):
        load(tmp_path, model)
    with refused(InvalidCheckpoint, f"{tmp_path}/none.pth: {text.replace('s file', 's or .pth file')}"):
        read_state_dict(tmp_path / "none.pth")


@pytest.mark.parametrize("zipped", [True, False])
def test_pickle_instead_of_a_hybrid(refused: Refused, tmp_path: Path, zipped: bool) -> None:
    model, path = vit(), tmp_path / "weights.pth"
    torch.save(model.state_dict(), path, _use_new_zipfile_serialization=zipped)
    text = f"{path}: found a pickle; expected a .safetensors file. Pickles can run code when read and are refused: "
    with refused(InvalidCheckpoint, text + "save the state dict with safetensors.torch.save_file.", model):
        load(path, model)


class Malicious:
    """Unpickling it would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_the_malicious_pickle_works_where_it_is_trusted(tmp_path: Path) -> None:
    torch.save(Malicious(tmp_path / "ran"), tmp_path / "bad.pth")
    torch.load(tmp_path / "bad.pth", weights_only=False)
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", ["module", "namespace", "malicious", "garbage"])
def test_weights_that_would_have_to_be_unpickled(refused: Refused, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "weights.pth"
    contents = {
        "module": vit,
        "namespace": lambda: {"model": vit().state_dict(), "args": argparse.Namespace(lr=1e-3)},
        "malicious": lambda: {"model": vit().state_dict(), "more": Malicious(tmp_path / "ran")},
    }
    if kind == "garbage":
        path.write_bytes(b"\0\1")
    else:
        torch.save(contents[kind](), path)
    text = f"{path}: found a file that cannot be read without unpickling (…); expected tensors only. "
    with refused(InvalidCheckpoint, text + f"Unpickling can run code and is refused: {SAVE_AGAIN}") as caught:
        read_state_dict(path)
    assert caught is None and not (tmp_path / "ran").exists()


def test_the_reason_does_not_advise_to_unpickle(tmp_path: Path) -> None:
    """torch's own text has escape codes and tells people to pass weights_only=False."""
    torch.save({"args": argparse.Namespace(lr=1e-3)}, tmp_path / "args.pth")
    (tmp_path / "garbage.pth").write_bytes(b"\0\1")
    for name in ("args.pth", "garbage.pth"):
        with pytest.raises(InvalidCheckpoint) as caught:
            read_state_dict(tmp_path / name)
        assert "\x1b" not in str(caught.value)
        assert "weights_only" not in str(caught.value) and "can still be loaded" not in str(caught.value)


@pytest.mark.parametrize(("content", "found"), [([1, 2], "list"), ({"epoch": 1}, "dict")])
def test_weights_that_are_no_state_dict(refused: Refused, tmp_path: Path, content: Any, found: str) -> None:
    path = tmp_path / "weights.pth"
    torch.save(content, path)
    text = f"{path}: found {found} with entries that are not tensors; expected a state dict {{name: tensor}}, plain or "
    with refused(
        InvalidCheckpoint, text + "under 'state_dict', 'model' or 'model_ema'. Save model.state_dict() alone."
    ):
        read_state_dict(path)


# ---------------------------------------------------------------------------------------------------- hostile plans


def rewritten(path: Path, change: Callable[[dict[str, Any]], Any], **tensors: Tensor | None) -> Path:
    """A saved hybrid with another plan and other tensors."""
    kept, metadata = read_tensors(replaced().save(path))
    plan = json.loads(metadata[PLAN_KEY])
    change(plan)
    new = {name: value for name, value in (kept | tensors).items() if value is not None}
    write_tensors(path, new, {PLAN_KEY: json.dumps(plan)})
    return path


def edit(**fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda plan: plan["edits"].append(fields)


HUGE = {"kind": "constant", "layout": {"grid": [4, 4], "prefix": 1}, "dim": 65536}
WRAP = {"kind": "wrap", "path": "blocks.0.mlp", "spec": {"prefix": 1, "count": 16, "keep": 8}, "io": {}}
FORWARD = {"kind": "set", "path": "blocks.0", "name": "forward", "value": 1}
MIXER = {"kind": "conv", "layout": {"grid": [4, 4], "prefix": 1}, "dim": 48, "kernel": 3, "rank": 16, "norm": "batch"}
START = {"kind": "replace", "path": "blocks.0.attn", "spec": MIXER, "io": {}}
TWICE = {"kind": "slice", "path": "blocks.0.norm1.bias", "dim": 0}


@pytest.mark.parametrize(
    ("change", "where", "text"),
    [
        (
            edit(kind="slice", path="blocks.9.norm1.bias", dim=0, kept=[[0, 8]]),
            "blocks.9.norm1",
            f"no submodule '9' in Sequential; expected an existing module. {PLAN_HINT}",
        ),
        (
            edit(kind="slice", path="blocks.0.norm1.gain", dim=0, kept=[[0, 8]]),
            "blocks.0.norm1.gain",
            f"no parameter 'gain' in LayerNorm; expected an existing parameter. {PLAN_HINT}",
        ),
        (
            edit(kind="slice", path="__class__.mro", dim=0, kept=[[0, 8]]),
            "__class__",
            f"no submodule '__class__' in VisionTransformer; expected an existing module. {PLAN_HINT}",
        ),
        (
            edit(kind="slice", path="blocks.0.norm1.bias", dim=0, kept=[[0, 999]]),
            "blocks.0.norm1.bias",
            f"a slice of dimension 0 up to 999; expected something inside the shape (48,). {PLAN_HINT}",
        ),
        (
            edit(kind="slice", path="pos_embed", dim=1, kept=[[0, 8]]),
            "pos_embed",
            "a parameter of VisionTransformer; expected Linear, LayerNorm, BatchNorm, a convolution that is ungrouped "
            f"or depthwise, a module of vectors, or a vector or table that a composed module holds itself. {PLAN_HINT}",
        ),
        (
            lambda plan: plan["edits"].extend([{**TWICE, "kept": [[0, 8]]}, {**TWICE, "kept": [[8, 16]]}]),
            "blocks.0.norm1.bias",
            f"…; expected …. {PLAN_HINT}",
        ),
        (
            edit(kind="replace", path="blocks.0.norm1", spec=HUGE, io={}),
            "blocks.0.norm1",
            f"a mixer of 1,114,112 parameters; expected at most 262,144 here. {PLAN_HINT}",
        ),
        (
            edit(kind="set", path="blocks.0", name="training", value=1),
            "blocks.0.training",
            f"int for bool; expected an existing int, float, tuple or list attribute and a value …. {PLAN_HINT}",
        ),
        *(
            (
                edit(**START, start={"v": {"path": v}, "out": {"path": "proj"}, "heads": 3}),
                f"blocks.0.attn{where}",
                f"{found}. {PLAN_HINT}",
            )
            for v, where, found in (
                ("v", ".v", "no submodule 'v' in …; expected an existing module"),
                ("q_norm", ".q_norm", "a Identity; expected a Linear layer"),
                (
                    "qkv",
                    "",
                    "a start from weights of shape (144, 48) and (48, 48) in 3 heads; expected a convolution with a "
                    "norm, of side 1 or 3 and as wide as one head of them",
                ),
            )
        ),
        (
            lambda plan: plan["edits"].extend([WRAP, WRAP]),
            "blocks.0.mlp",
            f"a module whose tokens are merged already; expected one merge at a module. {PLAN_HINT}",
        ),
        (
            edit(**WRAP | {"path": "blocks.0.nose"}),
            "blocks.0.nose",
            f"no submodule 'nose' in Block; expected an existing module. {PLAN_HINT}",
        ),
        (
            edit(**WRAP | {"spec": {"count": 16, "keep": 16}}),
            None,
            f"value error, keep 16 must be less than count 16 at edits.…; expected {DAMAGED_PLAN}",
        ),
        (edit(**FORWARD), "blocks.0.forward", f"int for a missing attribute; expected an existing …. {PLAN_HINT}"),
        (edit(kind="call", path="head"), None, f"input tag 'call' …'shorten' at edits.…; expected {DAMAGED_PLAN}"),
        (
            lambda plan: plan.update(code="import os"),
            None,
            f"extra inputs are not permitted at code; expected {DAMAGED_PLAN}",
        ),
        (
            lambda plan: plan["base"].update(builder={"library": "os", "name": "system"}),
            None,
            f"input should be 'timm' at base.builder.library; expected {DAMAGED_PLAN}",
        ),
        (lambda plan: plan.pop("edits"), None, f"field required at edits; expected {DAMAGED_PLAN}"),
        (
            lambda plan: plan.pop("schema_version"),
            None,
            "field required at schema_version; expected the JSON of a Plan. Write it with Conversion.save.",
        ),
    ],
)
def test_hostile_plans(refused: Refused, tmp_path: Path, change: Any, where: str | None, text: str) -> None:
    model, path = vit(), rewritten(tmp_path / "hybrid.safetensors", change)
    with refused(InvalidPlan, f"{where or path}: found {text}", model):
        load(path, model)


def test_plan_of_another_schema(refused: Refused, tmp_path: Path) -> None:
    model, path = vit(), rewritten(tmp_path / "hybrid.safetensors", lambda plan: plan.update(schema_version=2))
    text = f"{path}: found Plan schema version 2; expected version 1. Read it with the msa2conv release that wrote it, "
    with refused(UnsupportedSchema, text + "or convert the original again.", model):
        load(path, model)


def test_builder_that_would_download_or_allocate_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a model, loading builds what the plan names: it may say how many classes and pixels, and no more."""
    import timm

    monkeypatch.setattr(timm, "create_model", forbid)
    for kwargs in ({"pretrained": 1}, {"depth": 10**6}):
        builder = {"library": "timm", "name": "vit_tiny_patch16_224", "kwargs": kwargs}
        path = rewritten(tmp_path / "hybrid.safetensors", lambda plan, b=builder: plan["base"].update(builder=b))
        with pytest.raises(InvalidPlan):
            load(path)


@pytest.mark.parametrize(
    ("tensors", "found"),
    [
        ({"head.bias": torch.zeros(3)}, "head.bias (3,) instead of (10,)"),
        ({"head.bias": None, "z": torch.zeros(2)}, "head.bias missing instead of (10,); z (2,) instead of nothing"),
        ({"head.bias": torch.zeros(10, dtype=torch.int32)}, "head.bias … instead of …"),
    ],
    ids=["shape", "names", "integers"],
)
def test_tensors_that_contradict_the_plan(refused: Refused, tmp_path: Path, tensors: Any, found: str) -> None:
    model, path = vit(), rewritten(tmp_path / "hybrid.safetensors", lambda plan: None, **tensors)
    text = f"{path}: found tensors that contradict its Plan: {found}; expected what the Plan describes. "
    with refused(InvalidCheckpoint, text + "The file is damaged: convert again.", model):
        load(path, model)


def test_tensors_that_do_not_fit_an_applied_plan(refused: Refused) -> None:
    model, plan = vit(), replaced().plan
    with refused(InvalidPlan, f"head.bias: found shape (10,) in the model; expected a tensor of …. {PLAN_HINT}", model):
        apply(plan, model, {"head.bias": torch.zeros(3)})
    with refused(InvalidPlan, f"nose: found no such parameter; expected a tensor of shape (3,). {PLAN_HINT}", model):
        apply(plan, model, {"nose": torch.zeros(3)})


# --------------------------------------------------------------------------------------------- files that are written


def test_output_paths_that_cannot_be_written(refused: Refused, tmp_path: Path) -> None:
    result, folder = replaced(), tmp_path / "folder.safetensors"
    folder.mkdir()
    (tmp_path / "file").write_text("mine")
    text = "expected a path where a file can be written. Choose another output path."
    with refused(InvalidOutputPath, f"{tmp_path}/file/hybrid.safetensors: found …; {text}", result.model):
        result.save(tmp_path / "file" / "hybrid.safetensors")
    with refused(InvalidOutputPath, f"{tmp_path}/file/model.safetensors: found …; {text}", result.model):
        result.save(tmp_path / "file")
    with refused(InvalidOutputPath, f"{folder}: found {folder} is a folder; {text}", result.model):
        result.save(folder)
    with refused(InvalidOutputPath, f"{folder}: found {folder} is a folder; {text}"):
        result.calibration.save(folder)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("No space left on device")])
def test_a_full_disk(refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def full(tensors: Any, path: Path, metadata: Any) -> None:
        path.write_bytes(b"half a file")
        raise error

    monkeypatch.setattr("msa2conv.files.save_file", full)
    path, text = tmp_path / "hybrid.safetensors", "found a file that could not be written whole (…space left on device)"
    hint = "expected a disk with room for it. Free some space, or choose another output path."
    with refused(InvalidOutputPath, f"{path}: {text}; {hint}"):
        replaced().save(path)


# ------------------------------------------------------------------------------------------------ hybrids that are run


def mixed() -> nn.Module:
    """A ViT for any image size, whose first attention became a convolution."""
    levers = (Mixer(ops=("conv1x1",), prefix="ridge"),)
    return convert(vit(dynamic_img_size=True), 0.86, data=images(), levers=levers).model


SIZE_HINT = (
    "A hybrid runs at the image size it was converted for, with all patches: convert again with example_inputs "
    "of the new size, and train it without patch dropout."
)


def test_hybrid_at_another_image_size(refused: Refused) -> None:
    hybrid = mixed()
    text = "tokens 'b (h w) c': found a tensor of shape (1, 26, 48); expected 4 x 4 positions + 1 prefix tokens. "
    with refused(LayoutMismatch, text + SIZE_HINT, hybrid):
        hybrid(torch.zeros(1, 3, 40, 40))


def test_hybrid_in_training_with_patch_dropout(refused: Refused) -> None:
    """In eval mode, and for the conversion, all patches are there."""
    levers = (Mixer(ops=("conv1x1",), prefix="ridge"),)
    hybrid = convert(vit(patch_drop_rate=0.5), 0.86, data=images(), levers=levers).model
    assert hybrid(images()[:2]).shape == (2, 10)
    hybrid.train()
    text = "tokens 'b (h w) c': found a tensor of shape (2, 9, 48); expected 4 x 4 positions + 1 prefix tokens. "
    with refused(LayoutMismatch, text + SIZE_HINT, hybrid):
        hybrid(images()[:2])


def test_swin_hybrid_with_another_window(refused: Refused) -> None:
    result = convert(swin(), 0.6, data=images(size=56), levers=(Mixer(ops=("conv1x1",)), "ffn"))
    blocks = [module for name, module in result.model.named_modules() if re.fullmatch(r"layers\.\d\.blocks\.\d", name)]
    mixer = next(block.attn for block in blocks if type(block.attn).__name__ == "ConvMixer")
    text = (
        "ConvMixer.set_window_size: found window (8, 8); expected window (7, 7). A hybrid keeps the image and window "
    )
    with refused(LayoutMismatch, text + "size it was converted for: resize the original, then convert it."):
        mixer.set_window_size(8)
    mixer.set_window_size((7, 7))


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        ({"attn_mask": torch.ones(17, 17)}, "the argument 'attn_mask'"),
        ({"attn_mask": torch.ones(1)}, "the argument 'attn_mask'"),
        ({"attn_mask": torch.zeros(())}, "the argument 'attn_mask'"),
        ({"is_causal": True}, "the argument 'is_causal'"),
        ({"rope": torch.zeros(1)}, "the argument 'rope'"),
    ],
    ids=["mask", "mask of one", "zero", "causal", "unknown"],
)
def test_mixer_called_with_what_it_cannot_honour(refused: Refused, arguments: dict[str, Any], found: str) -> None:
    mixer = next(block.attn for block in mixed().blocks if type(block.attn).__name__ == "ConvMixer")
    hint = "A convolution cannot honour it: keep this site's attention (exclude it) or call the model without it."
    with refused(UnsupportedArgument, f"ConvMixer.forward: found {found}; expected only the tokens 'x'. {hint}", mixer):
        mixer(torch.zeros(1, 17, 48), **arguments)
    assert mixer(torch.zeros(1, 17, 48), attn_mask=None, is_causal=False).shape == (1, 17, 48)


# ---------------------------------------------------------------------------------------------------------- the laws


def test_broken_guarantees(refused: Refused) -> None:
    """`verify` is what stands between a bug and a wrong hybrid: feed it wrong ones."""
    model, result = vit(), replaced()
    seen, data = msa2conv.inspect(model), images(2)
    chosen = {
        path: next(option for option in options if option.name == result.plan.choices[path])
        for path, options in result.calibration.options().items()
    }
    hint = "This is a bug or a model that an adapter misreads: please report it with print(msa2conv.inspect(model))."

    def check(hybrid: nn.Module, plan: msa2conv.Plan, target: int) -> dict[str, float]:
        return verify(model, hybrid, plan, chosen, seen.claims, seen.costs, data, target)

    flops = result.plan.flops
    assert check(result.model, result.plan, flops)["budget used"] == 1
    with refused(LawViolation, f"law 2, lowering is exact: found a difference of …; expected …. {hint}", model):
        check(apply(result.plan, model), result.plan, flops)
    text = f"law 3, a plan costs what it says: found {flops:,} counted, {flops + 1:,} in the plan, {flops:,} summed; "
    with refused(LawViolation, text + f"expected equal integers. {hint}", model):
        check(result.model, result.plan.model_copy(update={"flops": flops + 1}), flops)
    text = f"law 4, the budget is never exceeded: found {flops:,} FLOPs; expected at most {flops - 1:,}. {hint}"
    with refused(LawViolation, text, model):
        check(result.model, result.plan, flops - 1)


def test_model_that_notices_its_supernodes(refused: Refused) -> None:
    from timm.models.vision_transformer import Attention, VisionTransformer

    class Watchful(VisionTransformer):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + (0 if isinstance(self.blocks[0].attn, Attention) else 1)

    model = Watchful(**{"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}).eval()
    text = "law 1, lifting is the identity: found a difference of …; expected 1e-05. This is a bug or a model that an …"
    with refused(LawViolation, text, model):
        convert(model, 0.7, data=images())


def test_errors_can_be_caught_as_the_standard_ones() -> None:
    for kind, standard in {
        InvalidTarget: ValueError,
        UnsupportedArgument: TypeError,
        InvalidOutputPath: OSError,
        errors.MissingDependency: ImportError,
        LawViolation: RuntimeError,
    }.items():
        error = kind("where", "found", "expected", "Do this.")
        assert isinstance(error, standard) and isinstance(error, Msa2ConvError)
        assert str(error) == "where: found found; expected expected. Do this."
