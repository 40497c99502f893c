"""What a student descends: modules whose forward gives losses, so that DDP and autocast see one forward pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InvalidTrainingData
from ..search.measure import Measure, OutputFn, distances, first_tensor, tensor_of
from .stages import Stage
from .teacher import Teacher, overheard, tapped

Mix = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Local(nn.Module):
    """Every replaced module answers the teacher's inputs with the teacher's outputs; all of them at once.

    Args:
        student: the hybrid.
        teacher: the original itself.
        paths: modules of both that differ; none inside another.
        images: the teacher's outputs on these give the scale of every site's error.

    forward(images, labels) -> {"loss": mean over the sites of |student - teacher|^2 / variance of the teacher}.
    """

    def __init__(self, student: nn.Module, teacher: Teacher, paths: Sequence[str], images: Tensor) -> None:
        super().__init__()
        self.sites = nn.ModuleList(student.get_submodule(path) for path in paths)
        self.paths, self._teacher = tuple(paths), [teacher]  # in a list: its weights are not this module's
        self.scales = {path: float(wanted.float().var()) for path, (_, _, wanted) in self._lesson(images).items()}

    def forward(self, images: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        lesson = self._lesson(images)
        errors = []
        for path, site in zip(self.paths, self.sites, strict=True):
            args, kwargs, wanted = lesson[path]
            given = first_tensor(site(*args, **kwargs)).float()
            errors.append((given - wanted).square().mean() / max(self.scales[path], 1e-12))
        return {"loss": torch.stack(errors).mean()}

    def _lesson(self, images: Tensor) -> dict[str, tuple[tuple[Any, ...], Mapping[str, Any], Tensor]]:
        (teacher,) = self._teacher
        with overheard(teacher.model, self.paths) as heard:
            teacher.run(images, exact=True)
        return heard


class Imitate(nn.Module):
    """The student's outputs against the teacher's and the labels.

    Args:
        student: what learns.
        stage: the weights of the terms.
        teacher: or None.
        measure: "kl" of logits, or "relative" error of features.
        classes: how many the labels may have; None: there are no labels to use.
        taps: modules of both whose outputs are compared where `stage.hidden` is set.
        mix: timm's Mixup.
        output_fn: picks what is imitated.

    forward(images, labels) -> {"loss", and "teacher", "labels", "hidden" as far as they count}.
    """

    def __init__(
        self,
        student: nn.Module,
        stage: Stage,
        teacher: Teacher | None,
        measure: Measure,
        *,
        classes: int | None = None,
        taps: Sequence[str] = (),
        mix: Mix | None = None,
        output_fn: OutputFn | None = None,
    ) -> None:
        super().__init__()
        self.student, self.stage, self.measure = student, stage, measure
        self._teacher, self.classes, self.taps = [teacher], classes, tuple(taps)
        self.mix, self.output_fn = mix, output_fn

    def forward(self, images: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        (teacher,), stage = self._teacher, self.stage
        use_labels = self.classes is not None and (stage.labels > 0 or teacher is None)
        targets, smoothing = None, stage.smoothing
        if use_labels:
            targets = checked(labels, self.classes or 0)
            if self.mix is not None:  # which smooths the labels itself
                (images, targets), smoothing = self.mix(images, targets), 0.0
        with tapped(self.student, self.taps) as own:
            output = self.student(images)
        parts: dict[str, Tensor] = {}
        if targets is not None:
            parts["labels"] = F.cross_entropy(first_tensor(output).float(), targets, label_smoothing=smoothing)
        if teacher is not None:
            with tapped(teacher.model, self.taps) as theirs:
                reference = teacher(images)
            parts["teacher"] = self._taught(tensor_of(output, self.output_fn).float(), reference)
            if self.taps:
                parts["hidden"] = torch.stack([_turned(own[path], theirs[path]) for path in self.taps]).mean()
        share = 0.0 if "labels" not in parts else 1.0 if teacher is None else stage.labels
        weights = {"labels": share, "teacher": 1 - share, "hidden": stage.hidden}
        total = torch.stack([weights[name] * part for name, part in parts.items()]).sum()
        return {"loss": total} | (parts if len(parts) > 1 else {})

    def _taught(self, output: Tensor, reference: Tensor) -> Tensor:
        if self.measure == "relative":
            return distances(reference, output, "relative").mean()
        if self.stage.hard:
            return F.cross_entropy(output, reference.argmax(1))
        warm = self.stage.temperature
        p, q = F.log_softmax(reference / warm, -1), F.log_softmax(output / warm, -1)
        return warm**2 * F.kl_div(q, p, reduction="batchmean", log_target=True)


def checked(labels: Tensor | None, classes: int) -> Tensor:
    """Labels that a model of so many classes can learn; raises InvalidTrainingData."""
    if labels is None:
        raise InvalidTrainingData(
            "train", "a batch without labels", "(images, labels) batches", "Give labels, or pass labels=False."
        )
    if labels.ndim == 1 and len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise InvalidTrainingData(
            "train", f"labels from {int(labels.min())} to {int(labels.max())}", f"the {classes} classes of the model",
            "Pass labels=False to learn from the teacher alone.",
        )  # fmt: skip
    return labels


def _turned(own: Tensor, theirs: Tensor) -> Tensor:
    """1 - cosine: of every token [B, N, C], of whole maps otherwise."""
    if own.ndim != 3:
        own, theirs = own.flatten(1), theirs.flatten(1)
    return (1 - F.cosine_similarity(own.float(), theirs.float(), dim=-1)).mean()
