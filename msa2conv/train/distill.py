"""A short label-free polish: the hybrid imitates the original on the calibration images."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import NonFiniteValue
from ..progress import track
from ..search.measure import Measure, OutputFn, distances, farther, outputs, tensor_of
from .teacher import Teacher, shared_taps, tapped

BATCH = 32
_FAR = 0.1  # the distance from which on the whole learning rate is used
_HIDDEN = 10.0  # weight of the hidden states


@torch.enable_grad()
def distill(
    hybrid: nn.Module,
    original: nn.Module,
    images: Tensor,
    steps: int,
    *,
    held_out: Tensor | None = None,
    sites: Iterable[str] = (),
    lr: float = 1e-5,
    measure: Measure = "kl",
    seed: int = 0,
    progress: bool = True,
    output_fn: OutputFn | None = None,
) -> nn.Module:
    """Train a copy of `hybrid` to give the original's outputs on augmented calibration images.

    AdamW without weight decay, warm-up over a tenth of the steps, then cosine; random resized crops and flips, the same
    for both. The loss is KL(original || hybrid) of the logits, or the relative squared error of features, plus 10
    times the squared error of the hidden states behind the converted blocks, relative to their variance: a few hundred
    images' outputs alone say little. See Hinton et al., "Distilling the knowledge in a neural network" (2015), and
    Romero et al., "FitNets: hints for thin deep nets" (ICLR 2015).

    Args:
        hybrid, original: float32 modules on one device; neither is touched. Both run in eval mode (no dropout).
        images: [n, C, H, W], as the model expects them.
        steps: optimiser steps of `min(32, n)` images.
        held_out: images to judge by: where the polished network is farther from the original on them than before, by
            more than chance explains, the unpolished copy is returned. (States on the way are not compared: of many,
            the one that is closest on few images is so by chance.)
        sites: paths of what was converted, as in `plan.sites`; the hidden states behind the blocks around them are
            imitated, too, where their shapes agree. None by default: outputs only.
        lr: peak learning rate of a hybrid whose distance is 0.1 or more; of one that is closer, less in proportion to
            the root of its distance, as its gradients are. (AdamW's own steps do not shrink with the gradient: they
            would shake what is nearly exact, and leave it farther away.)
        measure: which loss.
        seed: for sampling and augmentation.
        progress: show a bar.
        output_fn: picks what is imitated from the model's output.

    Returns:
        The polished copy. Ctrl-C ends the polish early and returns what has been learned so far.

    Raises:
        NonFiniteValue: the loss became NaN or Inf; says at which step.
    """
    student = copy.deepcopy(hybrid).eval()
    device = next(student.parameters()).device
    teacher = Teacher(original, device, output_fn)
    generator = torch.Generator().manual_seed(seed)
    judged = images[: 2 * BATCH] if held_out is None else held_out
    reference_judged = outputs(teacher.model, judged, output_fn=output_fn)
    taps = shared_taps(student, teacher, sites, images[:2].to(device))
    before_N = distances(reference_judged, outputs(student, judged, output_fn=output_fn), measure)
    flags = [parameter.requires_grad for parameter in student.parameters()]
    for parameter in student.parameters():
        parameter.requires_grad_(True)
    peak = lr * min(1.0, max(0.0, float(before_N.mean())) / _FAR) ** 0.5
    optimizer = torch.optim.AdamW(student.parameters(), lr=peak, weight_decay=0.0)
    warm_up = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, 1.0, warm_up),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps - warm_up)),
        ],
        [warm_up],
    )
    try:
        for step in track(range(steps), "distill", progress):
            chosen = torch.randint(len(images), (min(BATCH, len(images)),), generator=generator)
            batch = augment(images[chosen], generator).to(device)
            with tapped(teacher.model, taps) as theirs:
                reference = teacher(batch)
            with tapped(student, taps) as own:
                output = tensor_of(student(batch), output_fn)
            loss = _loss(reference, output, measure) + _HIDDEN * _hidden(own, theirs)
            if not torch.isfinite(loss):
                raise NonFiniteValue(
                    f"distillation step {step}",
                    f"a loss of {float(loss.detach())}",
                    "a finite loss",
                    "Lower the learning rate.",
                )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    except KeyboardInterrupt:
        pass  # what has been learned so far is judged below
    if held_out is not None:
        after_N = distances(reference_judged, outputs(student, judged, output_fn=output_fn), measure)
        if farther(before_N, after_N):
            student.load_state_dict(hybrid.state_dict())
    for parameter, flag in zip(student.parameters(), flags, strict=True):
        parameter.requires_grad_(flag)
        parameter.grad = None
    return student


def augment(images_BCHW: Tensor, generator: torch.Generator) -> Tensor:
    """Random resized crops (area 0.35 to 1, aspect 3/4 to 4/3) and horizontal flips, one per image."""
    count = len(images_BCHW)
    area, aspect, left, top, flip = torch.rand(5, count, generator=generator)
    side = (0.35 + 0.65 * area).sqrt()
    stretch = torch.exp((aspect - 0.5) * 2 * torch.tensor(4 / 3).log() / 2)
    width, height = (side * stretch).clamp(max=1.0), (side / stretch).clamp(max=1.0)
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0] = width * torch.where(flip < 0.5, -1.0, 1.0)
    theta[:, 1, 1] = height
    theta[:, 0, 2] = (2 * left - 1) * (1 - width)
    theta[:, 1, 2] = (2 * top - 1) * (1 - height)
    grid = F.affine_grid(theta.to(images_BCHW), list(images_BCHW.shape), align_corners=False)
    return F.grid_sample(images_BCHW, grid, padding_mode="reflection", align_corners=False)


def _loss(reference: Tensor, output: Tensor, measure: Measure) -> Tensor:
    if measure == "kl":
        return F.kl_div(F.log_softmax(output, -1), F.log_softmax(reference, -1), reduction="batchmean", log_target=True)
    return distances(reference, output, "relative").mean()


def _hidden(own: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> Tensor | float:
    """|own - theirs|^2 / variance of theirs, mean over modules."""
    errors = [(own[path] - wanted).square().mean() / wanted.var().clamp_min(1e-12) for path, wanted in theirs.items()]
    return torch.stack(errors).mean() if errors else 0.0
