"""The public functions. `convert` is composed of the others and has no private powers."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .adapters.base import Adapter
from .adapters.build import preprocessing
from .conversion import Conversion, Run, make_report, versions
from .data import SHIPPED, load_images, shipped_views
from .errors import InvalidArgument, InvalidTarget
from .gate_training import Loss, convert_by_gates
from .inspection import Inspection, Levers, inspect, inspect_copy
from .latency import Stopwatch, choose_in_time, parse_latency
from .laws import verify
from .levers import Lever, Width, resolve_levers
from .locality import head_locality
from .plan import Preprocessing, weights_sha256
from .planning import Choice, choose, make_plan, site_costs
from .search.calibrate import calibrate_sites
from .search.calibration import Calibration
from .search.gates import Gates
from .search.measure import OutputFn, outputs
from .search.narrowing import calibrate_widths
from .search.solve import infeasible
from .targets import parse_target
from .train.distill import distill
from .transforms.apply import apply
from .workbench import example_input, own_randomness, unwrap, working_copy

CALIBRATION_IMAGES = 256


@own_randomness()
def calibrate(
    model: nn.Module,
    data: Any = None,
    *,
    images: int = CALIBRATION_IMAGES,
    example_inputs: Tensor | None = None,
    levers: Levers | None = None,
    adapters: Iterable[Adapter] | None = None,
    seed: int = 0,
    progress: bool = True,
    resume: str | os.PathLike[str] | None = None,
    output_fn: OutputFn | None = None,
) -> Calibration:
    """Fit every option of every site in closed form and measure what it costs in accuracy; needs no labels.

    Args:
        model: as for `convert`.
        data: image batches, (images, ...) tuples, a Dataset or DataLoader, a tensor, or None for the shipped photos.
        images: how many to read at most.
        example_inputs, levers, adapters, seed, progress: as for `convert`.
        resume: a folder for what is done so far (about the size of a saved Calibration). After Ctrl-C, a kill or a
            power cut the same call (`data` in the same order) continues from it and gives the same result; delete it
            when you are done.
        output_fn: as for `convert`.

    Returns:
        A Calibration, savable with `.save(path)`; pass it to `convert(..., calibration=...)`.

    Raises:
        InvalidArgument: `resume` holds the progress of another calibration; says what differs.
        InvalidOutputPath: `resume` cannot be written.
    """
    original = unwrap(model)
    work = working_copy(original)
    chosen = resolve_levers(levers)
    example = example_input(work, example_inputs)
    seen = inspect_copy(work, original, example, chosen, adapters)
    calibration, _ = calibrate_inspected(work, original, seen, data, images, chosen, seed, progress, resume, output_fn)
    return calibration


def calibrate_inspected(
    work: nn.Module,
    original: nn.Module,
    seen: Inspection,
    data: Any,
    limit: int,
    levers: tuple[Lever, ...],
    seed: int,
    progress: bool,
    resume: str | os.PathLike[str] | None,
    output_fn: OutputFn | None,
) -> tuple[Calibration, Tensor]:
    """`calibrate` on a working copy that the caller has made and inspected -> (it, the images)."""
    if isinstance(seen.width, str):
        raise InvalidArgument(
            "levers", f"'width' for a {type(original).__name__} that cannot be made narrower ({seen.width})",
            "levers that apply", "Leave it out.",
        )  # fmt: skip
    pictures, source = _images(original, data, limit, seen.input_size, seed)
    same: dict[str, Any] = {"seed": seed, "progress": progress, "resume": resume, "output_fn": output_fn}
    sites = [lever for lever in levers if not isinstance(lever, Width)]
    calibration = calibrate_sites(work, seen.claims, seen.costs, pictures, sites, source=source, **same)
    calibration.weights = weights_sha256(original)
    if seen.width is not None:
        calibration.narrower = calibrate_widths(
            work, seen.claims, seen.width, seen.narrower, sites, calibration, pictures, **same
        )
        calibration.seconds += sum(narrow.calibration.seconds for narrow in calibration.narrower)
    return calibration, pictures


def _images(original: nn.Module, data: Any, limit: int, size: tuple[int, ...], seed: int) -> tuple[Tensor, str]:
    if data is not None:
        pictures = load_images(data, limit, size, seed)
        return pictures, f"{len(pictures)} of the images given"
    known = preprocessing(original)
    pictures = shipped_views(size, known or Preprocessing(), limit)
    note = "as the model's pretrained_cfg says" if known else "with ImageNet statistics, since it has no pretrained_cfg"
    return load_images(pictures, limit, size), f"{len(pictures)} {SHIPPED}, normalised {note}"


@own_randomness()
def convert(
    model: nn.Module,
    flops_target: float | str | None = None,
    *,
    latency_target: float | str | None = None,
    device: str | torch.device | None = None,
    batch_size: int = 1,
    timetable: str | os.PathLike[str] | None = None,
    data: Any = None,
    example_inputs: Tensor | None = None,
    levers: Levers | None = None,
    calibration: Calibration | None = None,
    adapters: Iterable[Adapter] | None = None,
    images: int = CALIBRATION_IMAGES,
    distill_steps: int = 0,
    search: Literal["calibrated", "gates"] | Gates = "calibrated",
    epochs: int = 1,
    loss: Loss | None = None,
    lr: float = 1e-4,
    gate_lr: float | None = None,
    seed: int = 0,
    progress: bool = True,
    resume: str | os.PathLike[str] | None = None,
    output_fn: OutputFn | None = None,
) -> Conversion:
    """Turn a trained ViT into a cheaper hybrid of attention, convolution and narrower FFNs, at an exact FLOPs budget or
    at a budget of time on your device, or at both.

    Observe -> claim sites -> cost table -> lift -> calibrated search (closed-form fits, measured scores; no gradients,
    no labels) -> exact knapsack -> apply -> verify laws 1 to 4. The model given is bit-identical afterwards, whatever
    happens.

    Args:
        model: a trained network; every timm backbone with softmax attention over a map is known, others take an
            adapter. DataParallel, DDP and `torch.compile` are unwrapped, half precision is calibrated in float32 and
            returned in half, any device and mode.
        flops_target: 0.7 (fraction), "70%", "3.3G" or 3.3e9: multiply-adds of one forward pass at batch 1.
        latency_target: 0.7 (fraction of the original's time), "70%", "4ms" or "800us": of a forward pass with
            `batch_size` images, in the model's dtype, not compiled. Every option is timed on the device, the same
            exact solver decides, and the hybrid is measured with the original in turn and corrected at most three
            times.
        device, batch_size: where and how the hybrid will run, for a budget of time and for the times in the report; by
            default where the model is, one image at a time.
        timetable: a file that keeps measured times, by device and geometry, so that further calls need none.
        data: calibration images, normalised as the model expects: an iterable of batches [b, C, H, W] or of tuples
            that start with one, a Dataset, a DataLoader or a tensor. None: photos shipped with msa2conv; your own
            images give a better hybrid.
        example_inputs: a float tensor [B, C, H, W]; by default of the size the model declares.
        levers: what may change: names ("mixer", "ffn", "linear_ffn", "merge_in_site", "thin_attention", "merge_tokens")
            or configured levers (`Mixer(...)`, `FFN(...)`, `LinearFFN(...)`, `MergeInSite(...)`, `ThinAttention(...)`,
            `MergeTokens(...)`); None or "all": all of these. "width", or `Width(...)`, has to be named: fewer channels
            take training.
        calibration: a `Calibration` of this model: a budget then takes seconds, and `data` only serves distillation.
        adapters: who looks for sites.
        images: how many calibration images to read at most.
        distill_steps: optimiser steps of a label-free polish on the same images (`distill`); 0 for none.
        search: "calibrated": closed form, minutes, no training. "gates": the paper's learned, weight-shared gates,
            trained for `epochs` on `data`, a DataLoader or list of batches; a `Gates(...)` configures it.
        epochs, loss, lr, gate_lr: of a gate search (see `train_gates`): loss(output, labels), by default the KL to the
            original, without labels.
        seed: decides held-out images and the polish.
        progress: show bars (never when standard error is not a terminal).
        resume: a folder from which an interrupted calibration or gate search continues, as for `calibrate`.
        output_fn: picks what is scored from the model's output, for models that return more than logits: a tensor, or
            several. By default all of it: logits by their KL, features by their relative error, and of several
            tensors (feature maps, auxiliary heads) each the same.

    Returns:
        A Conversion with `.model`, `.plan`, `.report`, `.calibration` and `.save(path)`.

    Raises:
        InvalidTarget, InfeasibleBudget: before any work; of a latency, after a look at the times of all sites.
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
    # malformed targets are refused before the model is even looked at
    if flops_target is None and latency_target is None:
        raise InvalidTarget(
            "flops_target", "None", "a budget: flops_target, latency_target or both", "Write for example 0.7."
        )
    if flops_target is not None:
        parse_target(flops_target)
    if latency_target is not None:
        parse_latency(latency_target)
    if search != "calibrated":
        gates = _gates(search, calibration is not None or distill_steps > 0)
        if flops_target is None or latency_target is not None:
            raise InvalidArgument(
                "latency_target", "a gate search", "a calibrated search", "Gates learn under a budget of FLOPs."
            )
        prepared = {"levers": levers, "example_inputs": example_inputs, "adapters": adapters}
        training = {"loss": loss, "lr": lr, "gate_lr": gate_lr, "seed": seed, "resume": resume, "progress": progress}
        return convert_by_gates(model, flops_target, data, gates, epochs=epochs, prepared=prepared, **training)
    chosen = resolve_levers(levers)
    work = working_copy(original)
    example = example_input(work, example_inputs)
    seen = inspect_copy(work, original, example, chosen, adapters)
    target = None if flops_target is None else parse_target(flops_target, seen.costs.base)
    if calibration is None and target is not None and target < seen.floor:  # of a Calibration, `choose` knows the floor
        raise infeasible(target, seen.floor)
    watch = Stopwatch(original, example, device, batch_size, progress)
    narrower = seen.width is not None or (calibration is not None and calibration.narrower)
    if latency_target is not None and not narrower:  # then what is outside the sites gets quicker, too
        watch.check(latency_target, seen)

    seconds: dict[str, float] = {}
    pictures: Tensor | None = None
    if calibration is None:
        allowed = [lever.name if lever == type(lever)() else repr(lever) for lever in chosen]
        calibration, pictures = calibrate_inspected(
            work, original, seen, data, images, chosen, seed, progress, resume, output_fn
        )
        seconds["calibrate"] = calibration.seconds
    else:
        calibration.check_model(original)
        allowed = calibration.levers

    def build(choice: Choice) -> nn.Module:
        plan, tensors = make_plan(original, seen, choice.choices)
        return apply(plan, original, _cast(apply(plan, work, tensors), original))

    started, latency, budget = time.perf_counter(), None, seen.costs.base if target is None else target
    if latency_target is None:
        choice = choose(work, calibration, budget, progress=progress, output_fn=output_fn)
    else:
        choice, latency = choose_in_time(
            work, seen, calibration, budget, latency_target, watch, build, timetable=timetable, output_fn=output_fn
        )
    seconds["solve"] = time.perf_counter() - started

    plan, tensors = make_plan(original, seen, choice.choices)
    hybrid = apply(plan, work, tensors)
    laws = verify(work, hybrid, plan, choice.choices, seen.claims, seen.costs, calibration.images, target)
    before = after = outputs(hybrid, calibration.images, output_fn=output_fn)
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
            sites=plan.sites,
            measure=calibration.measure,
            seed=seed,
            progress=progress,
            output_fn=output_fn,
        )
        seconds["distill"] = time.perf_counter() - started
        after = outputs(hybrid, calibration.images, output_fn=output_fn)
    final = apply(plan, original, _cast(hybrid, original))
    run = Run(
        target,
        distill_steps,
        seed,
        seconds,
        laws,
        example.device,
        seen.warnings,
        allowed,
        site_costs(seen, choice.choices),
        head_locality(work, seen.claims.attentions, calibration.images),
        latency or watch.compare(final),
    )
    report = make_report(plan, calibration, choice, before, after, run)
    return Conversion(final, plan, report, calibration, original)


def _gates(search: Any, calibrated_only: bool) -> Gates:
    if isinstance(search, str) and search == "gates":
        search = Gates()
    if not isinstance(search, Gates):
        raise InvalidArgument(
            "search", repr(search), "'calibrated', 'gates' or Gates(...)", "The first needs no training."
        )
    if calibrated_only:
        raise InvalidArgument(
            "search", "a gate search together with `calibration` or `distill_steps`", "one kind of search",
            "Leave them out, or use search='calibrated'.",
        )  # fmt: skip
    return search


def _cast(hybrid: nn.Module, original: nn.Module) -> dict[str, Tensor]:
    """The hybrid's values in the original's dtypes; parameters that were not fitted are the original's, bit for bit."""
    own = original.state_dict()
    dtype = next(original.parameters()).dtype
    return {name: value.to(own[name].dtype if name in own else dtype) for name, value in hybrid.state_dict().items()}


__all__ = ["Conversion", "calibrate", "choose", "convert", "inspect", "make_plan", "versions"]
