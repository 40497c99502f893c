"""What a hybrid learns, and from whom: decided before anything is trained."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..adapters.build import example_size, preprocessing
from ..conversion import Conversion
from ..errors import ArchitectureMismatch, InvalidArgument
from ..plan import WHOLE, Wrap
from ..search.measure import Measure, OutputFn, default_measure, first_tensor, tensor_of
from ..workbench import unwrap, working_copy
from .data import Batches, classes_of
from .stages import Stage
from .teacher import Teacher, shared_taps

PROBE = 32  # images on which shapes are compared and scales are measured


class Lessons:
    """What a hybrid learns, and from whom.

    Args:
        conversion: with the hybrid.
        stages: asked for.
        labels: as for `finetune`.
        original: what was converted, where some stage needs it.
        teacher: another model to imitate.
        imitate: whether to imitate anybody; the original where there is no other teacher.
        output_fn: as for `finetune`.
    """

    def __init__(
        self,
        conversion: Conversion,
        stages: tuple[Stage, ...],
        labels: bool | None,
        *,
        original: nn.Module | None,
        teacher: nn.Module | None,
        imitate: bool,
        output_fn: OutputFn | None,
    ) -> None:
        self.conversion, self.asked, self.labels, self.output_fn = conversion, stages, labels, output_fn
        self._original, self._other, self.imitate = original, teacher, imitate
        self.warnings: list[str] = []
        self.stages: tuple[Stage, ...] = ()
        self.classes: int | None = None
        self.taps: tuple[str, ...] = ()
        self.measure: Measure = "kl"
        self.original: Teacher | None = None
        self.teacher: Teacher | None = None

    @property
    def by(self) -> str:
        """Who teaches, for people."""
        if not self.imitate:
            return "none"
        return "the original" if self._other is None else type(unwrap(self._other)).__name__

    def look(self, student: nn.Module, batches: Batches) -> None:
        """Decide on a few images whether labels, the teacher's outputs and its hidden states can be used.

        Raises:
            ArchitectureMismatch: the teacher has other classes.
            InvalidArgument: nothing is left to do.
        """
        device = next(student.parameters()).device
        images = batches.probe(PROBE).to(device)
        with torch.no_grad():
            output = student(images[:2])
        imitated = tensor_of(output, self.output_fn)
        self.measure = default_measure(student, imitated)
        self.classes = self._classes(first_tensor(output), batches)
        if self._original is not None:
            self.original = Teacher(working_copy(self._original), device, self.output_fn)
            self.original.check(images)
        if self._other is not None:
            self.teacher = self._met(images, imitated, device)
        elif self.imitate and self.original is not None:
            self.teacher = self.original if self.original(images[:2]).shape == imitated.shape else None
            if self.teacher is None:
                self.warnings.append("the original has other classes: it taught the local stage only")
        if WHOLE in self.conversion.plan.choices and any(stage.kind == "local" for stage in self.asked):
            self.warnings.append("no local stage: the original's activations have more channels than the hybrid's")
        self.stages = tuple(stage for stage in self.asked if self._possible(stage))
        if not self.stages:
            why = "; ".join(self.warnings) or "nothing was replaced that could learn"
            raise InvalidArgument(
                "stages", f"only stages that cannot be done ({why})", "labels of the model's classes, or a teacher",
                "Give labelled images, or leave teacher='original'.",
            )  # fmt: skip
        if self.teacher is not None and any(stage.hidden for stage in self.stages):
            self.taps = shared_taps(student, self.teacher, self.conversion.plan.sites, images[:2])
            if not self.taps:
                self.warnings.append("no hidden states were taught: none agree in shape")

    def _possible(self, stage: Stage) -> bool:
        if stage.kind == "local":
            return bool(changed(self.conversion))
        return self.classes is not None or (stage.kind == "distill" and self.teacher is not None)

    def _classes(self, logits: Tensor, batches: Batches) -> int | None:
        if self.labels is False or self.measure != "kl":
            return None
        own = int(logits.shape[1])
        count = classes_of(batches.data, own)
        if count == own:
            return own
        why = "there are none" if count is None else f"there are {count} classes, and {own} of the model"
        if self.labels:
            raise InvalidArgument("labels", f"True, but {why}", "labels of the model's classes", "Pass labels=False.")
        self.warnings.append(f"trained without labels: {why}")
        return None

    def _met(self, images: Tensor, expected: Tensor, device: torch.device) -> Teacher:
        assert self._other is not None
        model = unwrap(self._other)
        size = example_size(model)
        teacher = Teacher(
            working_copy(model), device, self.output_fn, seen=self.conversion.plan.base.preprocessing,
            own=preprocessing(model), size=None if size is None else (size[-2], size[-1]),
        )  # fmt: skip
        teacher.check(images)
        found = teacher(images[:2])
        if found.shape != expected.shape:
            raise ArchitectureMismatch(
                "teacher", f"outputs of shape {tuple(found.shape[1:])}",
                f"{tuple(expected.shape[1:])}, as the student's", "Take a teacher with the same classes.",
            )  # fmt: skip
        return teacher


def changed(conversion: Conversion) -> list[str]:
    """Sites whose module was replaced or narrowed and can learn; of one inside another, the outer one.

    A module that only sees merged tokens has the original's weights: there is nothing that it could do better. Where
    the whole network is narrower, the original's activations have other channels: none.
    """
    plan = conversion.plan
    if WHOLE in plan.choices:
        return []
    edits = [f"{edit.path}." for edit in plan.edits if not isinstance(edit, Wrap)]
    paths = [site for site in plan.sites if any(path.startswith(f"{site}.") for path in edits)]
    model = unwrap(conversion.model)
    able = [path for path in paths if next(model.get_submodule(path).parameters(), None) is not None]
    return [path for path in able if not any(path.startswith(f"{other}.") for other in able)]
