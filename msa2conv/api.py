"""The public functions. `convert` is composed of the others and has no private powers."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .adapters.base import Adapter, find_sites
from .adapters.build import find_builder, preprocessing
from .cost import CostModel
from .data import EMBEDDED, embedded_photos, load_images
from .errors import InvalidArgument
from .levers import Lever, resolve_levers
from .options import Option
from .plan import Base, Plan, Preprocessing, fingerprint, parameter_count, weights_sha256
from .progress import track
from .report.conversion import Report, model_card
from .report.inspection import Inspection
from .search.calibrate import BATCH, Calibration, calibrate_sites
from .search.measure import distance
from .search.replay import tensor_of
from .search.solve import diverse, infeasible
from .sites import Claims, observe
from .storage import MODEL_FILE, check_writable, save, write_json, write_text
from .targets import parse_target
from .train.distill import distill
from .transforms.apply import apply, load_tensors
from .verify import verify
from .workbench import example_input, unwrap, working_copy

Levers = str | Lever | Iterable[str | Lever]
CALIBRATION_IMAGES = 256


@dataclass(frozen=True)
class Conversion:
    """What `convert` returns.

    Args:
        model: the hybrid: a plain module of the original's class, in its dtype, device and training mode.
        plan: what was decided, as data; `print` it.
        report: the figures; `print` it.
        calibration: reuse it for another budget: `convert(model, 0.5, calibration=result.calibration)`.
    """

    model: nn.Module
    plan: Plan
    report: Report
    calibration: Calibration

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the hybrid atomically.

        Args:
            path: a `.safetensors` file (tensors + Plan), or a folder, which gets `model.safetensors`, `plan.json`,
                `report.json` and a model card `README.md`.

        Returns:
            The path of the .safetensors file.

        Raises:
            InvalidOutputPath: the path cannot be written.
        """
        target = Path(path)
        if target.suffix == ".safetensors":
            return save(self.model, self.plan, target)
        model_path = check_writable(target / MODEL_FILE)
        write_text(target / "plan.json", self.plan.model_dump_json(indent=2) + "\n")
        write_json(target / "report.json", self.report.model_dump(mode="json"))
        write_text(target / "README.md", model_card(self.plan, self.report))
        return save(self.model, self.plan, model_path)

    def __str__(self) -> str:
        return f"{self.plan}\n\n{self.report}"


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
    if images < 8:
        raise InvalidArgument("images", repr(images), "at least 8", "256 is a good number.")
    parse_target(flops_target, base=2**62)  # malformed targets are refused before the model is even looked at
    chosen = resolve_levers(levers)
    work = working_copy(original)
    example = example_input(work, example_inputs)
    seen = _inspect(work, original, example, chosen, adapters)
    target = parse_target(flops_target, seen.costs.base)
    floor = seen.floor if calibration is None else _floor(calibration)
    if target < floor:
        raise infeasible(target, floor)

    seconds: dict[str, float] = {}
    pictures: Tensor | None = None
    if calibration is None:
        calibration, pictures = _calibrate(work, original, seen, data, images, chosen, seed, progress)
        seconds["calibrate"] = calibration.seconds
    elif (fingerprint(original), weights_sha256(original)) != (calibration.fingerprint, calibration.weights):
        calibration.check_model(original)
    started = time.perf_counter()
    picked = choose(work, calibration, target, progress=progress)
    seconds["solve"] = time.perf_counter() - started

    plan, tensors = make_plan(original, seen, picked.choices)
    hybrid = apply(plan, work, tensors)
    laws = verify(work, hybrid, plan, picked.choices, seen.claims, seen.costs, calibration.images[:2], target)
    reference, output = calibration.reference, _outputs(hybrid, calibration.images)
    distance_before = distance(reference, output, calibration.measure)
    polished = None
    if distill_steps:
        if pictures is None:
            pictures, _ = _images(original, data, images, seen.input_size, seed)
        started = time.perf_counter()
        hybrid = distill(
            hybrid, work, pictures, distill_steps, measure=calibration.measure, seed=seed, progress=progress
        )
        seconds["distill"] = time.perf_counter() - started
        output = _outputs(hybrid, calibration.images)
        polished = distance(reference, output, calibration.measure)
    report = Report(
        name=seen.name,
        flops_before=seen.costs.base,
        flops_after=plan.flops,
        target=target,
        parameters_before=plan.base.parameters,
        parameters_after=plan.parameters,
        measure=calibration.measure,
        distance=distance_before,
        distance_polished=polished,
        agreement=_agreement(reference, output) if calibration.measure == "kl" else None,
        predicted=picked.predicted,
        candidates=picked.distances,
        price=picked.price,
        calibration=calibration.source,
        images=_counts(calibration, pictures, images),
        distill_steps=distill_steps,
        seed=seed,
        seconds={name: round(value, 2) for name, value in seconds.items()},
        versions=versions(),
        device=_device(work),
        laws=laws,
        warnings=[*calibration.warnings, *_hints(calibration, plan, distance_before)],
    )
    final = apply(plan, original, _cast(hybrid, original))
    return Conversion(final, plan, report, calibration)


@dataclass(frozen=True)
class Choice:
    """What `choose` found: {site: option}, and how the compared plans did on held-out images."""

    choices: dict[str, Option]
    price: str
    predicted: float
    distances: dict[str, float]


@torch.no_grad()
def choose(model: nn.Module, calibration: Calibration, target: int, *, progress: bool = True) -> Choice:
    """Solve the budget exactly in several ways and keep the plan that does best on held-out images.

    Args:
        model: the original, float32, eval.
        calibration: of this model.
        target: multiply-adds allowed.
        progress: show a bar.

    Raises:
        InfeasibleBudget: the target lies below the floor of the calibration's options.
    """
    from .transforms.lift import lift, realise

    options = calibration.options()
    rest = calibration.costs.base - sum(calibration.costs.hosts[path] for path in options)
    found = diverse(options, rest, target)
    from types import SimpleNamespace

    net = lift(model, [SimpleNamespace(path=path) for path in options])  # type: ignore[misc]
    distances: dict[str, float] = {}
    for name, choices in track(found.items(), "compare", progress):
        branches = {p: realise(option, net.nodes[p].host, p) for p, option in choices.items() if option.edits}
        with net.pinned(branches) as pinned:
            output = _outputs(pinned, calibration.images)
        distances[name] = distance(calibration.reference, output, calibration.measure)
    best = min(distances, key=lambda name: distances[name])
    return Choice(found[best], best, sum(o.score or 0.0 for o in found[best].values()), distances)


def make_plan(model: nn.Module, seen: Inspection, choices: Mapping[str, Option]) -> tuple[Plan, dict[str, Tensor]]:
    """Choices -> (Plan, fitted tensors).

    Args:
        model: the original.
        seen: its inspection.
        choices: {site: option}.
    """
    edits = tuple(edit for option in choices.values() for edit in option.edits)
    tensors = {name: value for option in choices.values() for name, value in option.tensors().items()}
    costs = seen.costs
    flops = costs.base + sum(option.flops - costs.hosts[path] for path, option in choices.items())
    base = Base(
        name=seen.name,
        model_class=f"{type(model).__module__}.{type(model).__qualname__}",
        builder=find_builder(model, seen.input_size),
        input_size=seen.input_size,
        preprocessing=preprocessing(model),
        flops=costs.base,
        parameters=seen.parameters,
        fingerprint=fingerprint(model),
        weights_sha256=weights_sha256(model),
    )
    ordered = {site.path: choices[site.path].name for site in seen.claims.sites if site.path in choices}
    plan = Plan(base=base, choices=ordered, edits=edits, flops=flops, parameters=seen.parameters)
    return plan.model_copy(update={"parameters": parameter_count(apply(plan, model))}), tensors


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that figures depend on."""
    found = {"python": platform.python_version()}
    for name in ("msa2conv", "torch", "timm", "fvcore", "torch-pruning", "scipy", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found


def _outputs(model: nn.Module, images: Tensor) -> Tensor:
    device = next(model.parameters()).device
    with torch.no_grad():
        return torch.cat([tensor_of(model(batch.to(device))).cpu() for batch in torch.split(images, BATCH)])


def _agreement(reference: Tensor, output: Tensor) -> float:
    return float((reference.argmax(1) == output.argmax(1)).float().mean())


def _cast(hybrid: nn.Module, original: nn.Module) -> dict[str, Tensor]:
    """The hybrid's values in the original's dtypes; parameters that were not fitted are the original's, bit for bit."""
    own = original.state_dict()
    dtype = next(original.parameters()).dtype
    return {name: value.to(own[name].dtype if name in own else dtype) for name, value in hybrid.state_dict().items()}


def _name(model: nn.Module) -> str:
    config = getattr(model, "pretrained_cfg", None) or {}
    return str(config.get("architecture") or type(model).__name__)


def _floor(calibration: Calibration) -> int:
    options = calibration.options()
    saved = sum(calibration.costs.hosts[path] - min(o.flops for o in group) for path, group in options.items())
    return calibration.costs.base - saved


def _counts(calibration: Calibration, pictures: Tensor | None, limit: int) -> dict[str, int]:
    held_out = len(calibration.images)
    return {"fit": calibration.fitted, "held out": held_out}


def _device(model: nn.Module) -> str:
    device = next(model.parameters()).device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} ({os.cpu_count()} cores)"


def _hints(calibration: Calibration, plan: Plan, found: float) -> list[str]:
    hints = []
    if calibration.source.startswith(EMBEDDED):
        hints.append(
            "calibrated on the shipped photos: pass data=your images (64 to 256, no labels) for a better hybrid"
        )
    if calibration.measure == "kl" and found > 0.5:
        hints.append(
            f"the hybrid is far from the original (KL {found:.2f}): polish it (distill_steps=100) or fine-tune it"
        )
    return hints


__all__ = [
    "Choice",
    "Claims",
    "Conversion",
    "calibrate",
    "choose",
    "convert",
    "inspect",
    "load_tensors",
    "make_plan",
    "versions",
]
