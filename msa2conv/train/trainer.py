"""One call of `finetune`: its stages one after the other, validated, saved, and resumed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..conversion import Conversion, versions
from ..errors import ArchitectureMismatch, InvalidArgument
from ..files import read_state, write_state
from ..observation import check_finite_weights
from ..plan import Replace, weights_sha256
from ..report.training import Training
from ..workbench import unwrap, working_copy
from .data import Batches, classes_of
from .fade import Fading, fade_in, fade_out
from .lessons import PROBE, Lessons, changed
from .log import Log
from .loop import Task, remembered_buffers, run
from .objectives import Imitate, Local
from .optimize import Average, cosine, mixup, norms_of, optimizer_for, reestimate_norms
from .stages import Stage
from .validate import Validation

if TYPE_CHECKING:
    from accelerate import Accelerator

STATE_FILE = "training.pt"
_NORM_BATCHES = 100  # over which BatchNorm statistics are measured anew


class Trainer:
    """Args:
    lessons: what to learn.
    batches: makes Batches of (epochs, seed).
    accelerator, log: see `accelerated` and `Log`.
    seed, micro_batch: as for `finetune`.
    folder: for the state.
    """

    def __init__(
        self,
        lessons: Lessons,
        batches: Callable[..., Batches],
        accelerator: Accelerator,
        log: Log,
        *,
        seed: int,
        micro_batch: int | None,
        folder: Path | None,
    ) -> None:
        self.lessons, self.batches, self.accelerator, self.log = lessons, batches, accelerator, log
        self.seed, self.micro_batch, self.path = seed, micro_batch, None if folder is None else folder / STATE_FILE
        self.student, self.flags = trainable_copy(lessons.conversion.model)
        self.student.to(accelerator.device)
        first = batches(epochs=1, seed=seed)
        lessons.look(self.student, first)
        self.about: dict[str, Any] = {
            "stages": [stage.model_dump(mode="json") for stage in lessons.stages], "seed": seed, "batch": first.batch,
            "steps of an epoch": first.per_epoch, "labels": lessons.classes is not None,
            "model": weights_sha256(lessons.conversion.model)[:12], "teacher": lessons.by,
            "precision": str(accelerator.mixed_precision), "max_steps": first.max_steps,
        }  # fmt: skip
        _check_pairs(lessons.stages, first, micro_batch)
        self.images = len(first.data) if first.indexed else 0
        self.validation: Validation | None = None
        self.average: Average | None = None
        self.best: dict[str, Any] = {}
        self.skipped: list[str] = []

    def validate_on(self, val: Any, workers: int) -> None:
        """Judge the student on these images after every epoch."""
        lessons = self.lessons
        labelled = lessons.classes is not None and classes_of(val, lessons.classes) == lessons.classes
        if not labelled and lessons.teacher is None:
            raise InvalidArgument("val", "images without labels", "labels, or a teacher", "Leave val out.")
        self.validation = Validation(
            val, lessons.classes if labelled else None, lessons.teacher, lessons.measure, self.accelerator,
            output_fn=lessons.output_fn, workers=workers, show=self.log.show,
        )  # fmt: skip

    def train(self, save_every: int) -> Conversion:
        """All stages, from where an interrupted run left off."""
        saved = self._restored()
        if not saved:
            self._validate("start", 0, 0)
        elif not saved["optimizer"]:  # between two stages
            self.student.load_state_dict(saved["student"])
        for index in range(saved.get("stage", 0), len(self.lessons.stages)):
            self._stage(index, saved if saved.get("optimizer") else {}, save_every)
            saved = {}
        self._settle_norms()
        return self._result()

    def _stage(self, index: int, saved: dict[str, Any], save_every: int) -> None:
        stage = self.lessons.stages[index]
        seen = self.batches(epochs=stage.epochs, seed=self.seed + 1_000_003 * index)
        task = self._task(stage, seen)
        done = validated = 0
        if saved:
            self.student.load_state_dict(saved["student"])
            task.optimizer.load_state_dict(saved["optimizer"])
            if self.average is not None:
                self.average.model.load_state_dict(saved["average"])
            done, validated = saved["done"], saved["validated"]

        def save(steps: int) -> None:
            self._note(seen)
            self._save(index, steps, validated, task)

        for epoch, end in enumerate(seen.ends, 1):
            if done < end:
                run(task, self.accelerator, self.log, done=done, stop=end, save=save, save_every=save_every)
                done = end
                save(done)
            if validated < epoch < len(seen.ends):
                self._validate(stage.kind, epoch, done)
                validated = epoch
                save(done)
        self._leave(stage)
        self._validate(stage.kind, len(seen.ends), done)
        self._save(index + 1, 0, 0, None)

    def _task(self, stage: Stage, batches: Batches) -> Task:
        lessons = self.lessons
        self._set_flags()
        self.student.train()
        for norm in self._frozen_norms():
            norm.eval()
        objective: nn.Module
        faded: list[Fading] = []
        images = batches.probe(PROBE).to(self.accelerator.device)
        if stage.kind == "local":
            assert lessons.original is not None
            objective = Local(self.student, lessons.original, changed(lessons.conversion), images)
        else:
            if stage.anneal and lessons.original is not None:
                paths = [edit.path for edit in lessons.conversion.plan.edits if isinstance(edit, Replace)]
                faded = fade_in(self.student, lessons.original.model, paths)
            objective = Imitate(
                self.student, stage, None if stage.kind == "labels" else lessons.teacher, lessons.measure,
                classes=lessons.classes, taps=lessons.taps if stage.hidden else (), output_fn=lessons.output_fn,
                mix=mixup(stage, lessons.classes or 0),
            )  # fmt: skip
        _freeze_unused(objective, images[:2], lessons.classes)
        optimizer = optimizer_for(objective, stage)
        rate = cosine(optimizer, stage, batches.steps)
        average = self.average = None if stage.ema is None else Average(self.student, stage.ema)

        def schedule(step: int) -> None:
            rate(step)
            for node in faded:
                node.share = min(1.0, step / max(1.0, stage.anneal * batches.steps))

        return Task(
            stage.kind, objective, optimizer, batches, schedule,
            after_step=(lambda step: None) if average is None else average.update,
            clip=stage.clip, micro_batch=self.micro_batch, advice=f"Lower the lr of stage {stage.kind!r}.",
        )  # fmt: skip

    def _set_flags(self) -> None:
        for name, parameter in self.student.named_parameters():
            parameter.requires_grad_(self.flags[name])

    def _frozen_norms(self) -> list[nn.Module]:
        """BatchNorms that are not to learn, nor to measure."""
        return [norm for norm in norms_of(self.student) if not any(p.requires_grad for p in norm.parameters())]

    def _leave(self, stage: Stage) -> None:
        """After a stage: the average takes the place of the weights, attentions that faded are gone."""
        if self.average is not None:
            self.student.load_state_dict(self.average.model.state_dict())
            self.average = None
        fade_out(self.student)
        self._set_flags()

    def _settle_norms(self) -> None:
        """BatchNorm statistics lag behind the weights: measure them anew, and keep that where it is no worse."""
        if self.best:
            self.student.load_state_dict(self.best["state"])
        frozen = self._frozen_norms()
        norms = [norm for norm in norms_of(self.student) if norm not in frozen]
        if not norms:
            return
        undo = remembered_buffers(self.student)
        seen = self.batches(epochs=1, seed=self.seed)
        images = (
            batch.to(self.accelerator.device) for _, (batch, _) in zip(range(_NORM_BATCHES), seen(), strict=False)
        )
        reestimate_norms(self.student, norms, images)
        for buffer in self.student.buffers():
            if self.accelerator.num_processes > 1 and buffer.is_floating_point():
                buffer.copy_(self.accelerator.reduce(buffer, "mean"))
        before = self.best.get("stage"), self.best.get("epoch")
        self._validate("norms", 1, 0)
        if self.validation is not None and before == (self.best.get("stage"), self.best.get("epoch")):
            undo()

    def _validate(self, stage: str, epoch: int, step: int) -> None:
        if self.validation is None:
            return
        model = self.student if self.average is None else self.average.model
        found = self.validation(model)
        self.log.write({"stage": stage, "epoch": epoch, "step": step, "val": found})
        if self.validation.better(found, self.best.get("val")):
            if any(isinstance(module, Fading) for module in model.modules()):
                model = copy.deepcopy(model)
                fade_out(model)
            state = {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}
            self.best = {"val": found, "stage": stage, "epoch": epoch, "state": state}

    # Files

    def _save(self, index: int, done: int, validated: int, task: Task | None) -> None:
        if self.path is None or not self.accelerator.is_main_process:
            return
        state = {
            **self.about, "stage": index, "done": done, "validated": validated, "student": self.student.state_dict(),
            "optimizer": {} if task is None else task.optimizer.state_dict(), "best": self.best,
            "average": {} if self.average is None else self.average.model.state_dict(),
            "lines": self.log.lines, "seconds": self.log.seconds, "seen": self.log.images, "skipped": self.skipped,
        }  # fmt: skip
        path = self.path
        self.log.attempt(lambda: write_state(path, state))

    def _restored(self) -> dict[str, Any]:
        if self.path is None or not self.path.is_file():
            self.log.resume([])
            return {}
        state = read_state(self.path)
        other = [name for name in self.about if state.get(name) != self.about[name]]
        if other:
            raise ArchitectureMismatch(
                str(self.path), f"a training with other {', '.join(other)}", "the training of this call",
                "Pass the same model, data and arguments, or another folder.",
            )  # fmt: skip
        self.best, self.skipped = state["best"], state["skipped"]
        self.log.resume(state["lines"])
        self.log.seconds, self.log.images = state["seconds"], state["seen"]
        return state

    def _note(self, batches: Batches) -> None:
        for bad in batches.skipped:
            line = f"{bad.where} cannot be read ({bad.reason}): another image took its place"
            if line not in self.skipped:
                self.skipped.append(line)
                self.log.write({"unreadable": bad.where, "reason": bad.reason})
        batches.skipped.clear()

    def _result(self) -> Conversion:
        lessons = self.lessons
        check_finite_weights(self.student)
        model = copy.deepcopy(lessons.conversion.model)
        own = unwrap(model).state_dict()
        unwrap(model).load_state_dict({name: value.to(own[name]) for name, value in self.student.state_dict().items()})
        training = Training(
            stages=[{"kind": stage.kind, **stage.model_dump(exclude_defaults=True)} for stage in lessons.stages],
            max_steps=self.about["max_steps"],
            teacher=lessons.by,
            labels=lessons.classes is not None,
            images=self.images,
            batch_size=self.about["batch"],
            processes=self.accelerator.num_processes,
            precision=str(self.accelerator.mixed_precision),
            seed=self.seed,
            curve=self.log.lines,
            metric=None if self.validation is None else self.validation.metric,
            best={key: self.best[key] for key in ("stage", "epoch", "val")} if self.best else None,
            seconds=round(self.log.seconds, 2),
            images_per_second=round(self.log.images / max(self.log.seconds, 1e-9), 2),
            warnings=[*lessons.warnings, *self.skipped, *self.log.failed],
            versions=versions(),
        )
        report = lessons.conversion.report.model_copy(update={"training": training})
        return replace(lessons.conversion, model=model, report=report)


def _check_pairs(stages: tuple[Stage, ...], batches: Batches, micro_batch: int | None) -> None:
    """timm's Mixup mixes images by pairs."""
    share = batches.batch // batches.ranks
    sizes = [share] if micro_batch is None else [min(micro_batch, share), share % micro_batch]
    if any(stage.mixup or stage.cutmix for stage in stages) and any(size % 2 for size in sizes):
        raise InvalidArgument(
            "batch_size" if micro_batch is None else "micro_batch", f"{sizes[0]} images of a process at a time",
            "an even number, since mixup and cutmix are on", "Change it, or set mixup and cutmix to 0.",
        )  # fmt: skip


def trainable_copy(model: nn.Module) -> tuple[nn.Module, dict[str, bool]]:
    """A float32 copy in eval mode with the same gradient checkpointing, and which of its parameters are to learn.

    Raises:
        InvalidArgument: none is.
    """
    plain = unwrap(model)
    student = working_copy(plain)
    flags = {name: parameter.requires_grad for name, parameter in plain.named_parameters()}
    if not any(flags.values()):
        raise InvalidArgument(
            "conversion.model", "requires_grad=False for every parameter", "something that may learn",
            "Call conversion.model.requires_grad_(True).",
        )  # fmt: skip
    if any(getattr(module, "grad_checkpointing", False) for module in plain.modules()):
        student.set_grad_checkpointing(True)  # type: ignore[operator]
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(flags[name])
    return student, flags


def _freeze_unused(objective: nn.Module, images: Tensor, classes: int | None) -> None:
    """Freeze what gets no gradient (the norm before a skipped attention): DDP would wait for it."""
    undo = remembered_buffers(objective)
    labels = None if classes is None else torch.zeros(len(images), dtype=torch.long, device=images.device)
    objective(images, labels)["loss"].backward()
    for parameter in objective.parameters():
        parameter.requires_grad_(parameter.grad is not None)
        parameter.grad = None
    undo()
