"""The public functions. `convert` is composed of the others and has no private powers."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from .adapters.base import Adapter, find_sites
from .adapters.build import preprocessing
from .conversion import Conversion, Run, make_report, versions
from .cost import CostModel
from .data import EMBEDDED, embedded_photos, load_images
from .errors import InvalidArgument
from .laws import verify
from .levers import Lever, resolve_levers
from .plan import Preprocessing, parameter_count, weights_sha256
from .planning import choose, make_plan
from .report.inspection import Inspection
from .search.calibrate import Calibration, calibrate_sites
from .search.measure import outputs
from .search.solve import infeasible
from .sites import observe
from .targets import parse_target
from .train.distill import distill
from .transforms.apply import apply
from .workbench import example_input, unwrap, working_copy

Levers = str | Lever | Iterable[str | Lever]
CALIBRATION_IMAGES = 256


def inspect(
    model: nn.Module,
    *,
    example_inputs: Tensor | None = None,
    levers: Levers = ("mixer", "ffn"),
    adapters: Iterable[Adapter] | None = None,
) -> Inspection:
    """Show every attention found, its geometry, where the FLOPs are, and what budget can be reached. Changes nothing.

    Args:
        model: any module; timm's ViT family and Swin are known.
        example_inputs: a float tensor [B, C, H, W]; by default noise of the size the model declares.
        levers: what may change; decides the floor.
        adapters: who looks for sites; the built-in ones by default.

    Raises:
        NoSitesFound: lists what was seen and why each candidate was refused.
        InvalidInput: the model cannot run on the input.
        NonFiniteValue: NaN or Inf in the weights.
    """
    work = working_copy(unwrap(model))
    return _inspect(work, unwrap(model), example_input(work, example_inputs), resolve_levers(levers), adapters)


def _inspect(
    work: nn.Module, original: nn.Module, example: Tensor, levers: tuple[Lever, ...], adapters: Iterable[Adapter] | None
) -> Inspection:
    seen = observe(work, example)
    claims = find_sites(work, seen, adapters)
    costs = CostModel.measure(work, seen, claims.sites)
    floor = costs.base
    for site in claims.sites:
        cheapest = [lever.cheapest(site, costs) for lever in levers if lever.applies(site)]
        floor -= costs.hosts[site.path] - min([*cheapest, costs.hosts[site.path]])
    return Inspection(_name(original), claims, costs, floor, tuple(example.shape[1:]), parameter_count(original))


def calibrate(
    model: nn.Module,
    data: Any = None,
    *,
    images: int = CALIBRATION_IMAGES,
    example_inputs: Tensor | None = None,
    levers: Levers = ("mixer", "ffn"),
    adapters: Iterable[Adapter] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Calibration:
    """Fit every option of every site in closed form and measure what it costs in accuracy; needs no labels.

    Args:
        model: as for `convert`.
        data: image batches, (images, ...) tuples, a Dataset or DataLoader, a tensor, or None for the shipped photos.
        images: how many to read at most.
        example_inputs, levers, adapters, seed, progress: as for `convert`.

    Returns:
        A Calibration, savable with `.save(path)`; pass it to `convert(..., calibration=...)`.
    """
    original = unwrap(model)
    work = working_copy(original)
    chosen = resolve_levers(levers)
    example = example_input(work, example_inputs)
    seen = _inspect(work, original, example, chosen, adapters)
    calibration, _ = _calibrate(work, original, seen, data, images, chosen, seed, progress)
    return calibration


def _calibrate(
    work: nn.Module,
    original: nn.Module,
    seen: Inspection,
    data: Any,
    limit: int,
    levers: tuple[Lever, ...],
    seed: int,
    progress: bool,
) -> tuple[Calibration, Tensor]:
    pictures, source = _images(original, data, limit, seen.input_size, seed)
    calibration = calibrate_sites(
        work, seen.claims, seen.costs, pictures, levers, source=source, seed=seed, progress=progress
    )
    calibration.weights = weights_sha256(original)
    return calibration, pictures


def _images(original: nn.Module, data: Any, limit: int, size: tuple[int, ...], seed: int) -> tuple[Tensor, str]:
    if data is not None:
        pictures = load_images(data, limit, size, seed)
        return pictures, f"{len(pictures)} of the images given"
    known = preprocessing(original)
    pictures = embedded_photos(size, known or Preprocessing())[:limit]
    note = "as the model's pretrained_cfg says" if known else "with ImageNet statistics, since it has no pretrained_cfg"
    return load_images(pictures, limit, size), f"{EMBEDDED}, normalised {note}"


def convert(
    model: nn.Module,
    flops_target: float | str,
    *,
    data: Any = None,
    example_inputs: Tensor | None = None,
    levers: Levers = ("mixer", "ffn"),
    calibration: Calibration | None = None,
    adapters: Iterable[Adapter] | None = None,
    images: int = CALIBRATION_IMAGES,
    distill_steps: int = 0,
    seed: int = 0,
    progress: bool = True,
) -> Conversion:
    """Turn a trained ViT into a cheaper hybrid of attention, convolution and narrower FFNs, at an exact FLOPs budget.

    Observe -> claim sites -> cost table -> lift -> calibrated search (closed-form fits, measured scores; no gradients,
    no labels) -> exact knapsack -> apply -> verify laws 1 to 4. The model given is bit-identical afterwards, whatever
    happens.

    Args:
        model: a trained network; timm's ViT family and Swin are known. DataParallel, DDP and `torch.compile` are
            unwrapped, half precision is calibrated in float32 and returned in half, any device and mode.
        flops_target: 0.7 (fraction), "70%", "3.3G" or 3.3e9: multiply-adds of one forward pass at batch 1.
        data: calibration images, normalised as the model expects: an iterable of batches [b, C, H, W] or of tuples
            that start with one, a Dataset, a DataLoader or a tensor. None: photos shipped with msa2conv; your own
            images give a better hybrid.
        example_inputs: a float tensor [B, C, H, W]; by default of the size the model declares.
        levers: what may change: names or configured levers (`Mixer(...)`, `FFN(...)`).
        calibration: a `Calibration` of this model: a budget then takes seconds, and `data` only serves distillation.
        adapters: who looks for sites.
        images: how many calibration images to read at most.
        distill_steps: optimiser steps of a label-free polish on the same images; 0 for none.
        seed: decides held-out images and the polish.
        progress: show bars (never when standard error is not a terminal).

    Returns:
        A Conversion with `.model`, `.plan`, `.report`, `.calibration` and `.save(path)`.

    Raises:
        InvalidTarget, InfeasibleBudget: before any work.
        NoSitesFound, InvalidInput, InvalidCalibrationData, NonFiniteValue, UncountedOperator, ArchitectureMismatch.
        LawViolation: the result would have broken a guarantee.

    Example:
        model = timm.create_model("deit_small_patch16_224", pretrained=True)
        result = msa2conv.convert(model, flops_target=0.7)
        print(result)
        result.save("deit_s_70.safetensors")
    """
    original = unwrap(model)
    if not isinstance(distill_steps, int) or distill_steps < 0:
        raise InvalidArgument("distill_steps", repr(distill_steps), "an integer >= 0", "0 means no polish.")
    if not isinstance(images, int) or images < 8:
        raise InvalidArgument("images", repr(images), "at least 8", "256 is a good number.")
    parse_target(flops_target)  # malformed targets are refused before the model is even looked at
    chosen = resolve_levers(levers)
    work = working_copy(original)
    example = example_input(work, example_inputs)
    seen = _inspect(work, original, example, chosen, adapters)
    target = parse_target(flops_target, seen.costs.base)
    if calibration is None and target < seen.floor:  # of a given Calibration, `choose` knows the floor
        raise infeasible(target, seen.floor)

    seconds: dict[str, float] = {}
    pictures: Tensor | None = None
    if calibration is None:
        calibration, pictures = _calibrate(work, original, seen, data, images, chosen, seed, progress)
        seconds["calibrate"] = calibration.seconds
    else:
        calibration.check_model(original)
    started = time.perf_counter()
    choice = choose(work, calibration, target, progress=progress)
    seconds["solve"] = time.perf_counter() - started

    plan, tensors = make_plan(original, seen, choice.choices)
    hybrid = apply(plan, work, tensors)
    laws = verify(work, hybrid, plan, choice.choices, seen.claims, seen.costs, calibration.images[:2], target)
    before = after = outputs(hybrid, calibration.images)
    if distill_steps:
        if pictures is None:
            pictures, _ = _images(original, data, images, seen.input_size, seed)
        started = time.perf_counter()
        hybrid = distill(
            hybrid,
            work,
            calibration.without_held_out(pictures),
            distill_steps,
            held_out=calibration.images,
            measure=calibration.measure,
            seed=seed,
            progress=progress,
        )
        seconds["distill"] = time.perf_counter() - started
        after = outputs(hybrid, calibration.images)
    run = Run(target, distill_steps, seed, seconds, laws, example.device)
    report = make_report(plan, calibration, choice, before, after, run)
    final = apply(plan, original, _cast(hybrid, original))
    return Conversion(final, plan, report, calibration)


def _cast(hybrid: nn.Module, original: nn.Module) -> dict[str, Tensor]:
    """The hybrid's values in the original's dtypes; parameters that were not fitted are the original's, bit for bit."""
    own = original.state_dict()
    dtype = next(original.parameters()).dtype
    return {name: value.to(own[name].dtype if name in own else dtype) for name, value in hybrid.state_dict().items()}


def _name(model: nn.Module) -> str:
    config = getattr(model, "pretrained_cfg", None) or {}
    return str(config.get("architecture") or type(model).__name__)


__all__ = ["Conversion", "calibrate", "choose", "convert", "inspect", "make_plan", "versions"]
