"""One run: shrink, check, measure, fine-tune, check, measure. And many of them, skipping what is done."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor, nn

from msa2conv.api import versions
from msa2conv.errors import Msa2ConvError
from msa2conv.flops import count_flops
from msa2conv.plan import parameter_count, weights_sha256

from ..common import device_name
from ..methods import Context, Method, method_of
from . import rules
from .config import Experiment, read_experiment
from .data import Data
from .measuring import answers, block_flops, peak_memory, quality, speed, torch_flops
from .parents import load_parent, parent_of
from .reading import read
from .result import RESULTS, Circumstances, Failure, Name, Result, Speed, git_sha, write
from .training import train


@dataclass
class Stage:
    """An experiment with its parent and images at hand, shared by its runs.

    Args:
        experiment: the config.
        parent: in eval mode, on the device.
        data: images.
        example: one made-up image on the device.
        time_on: another device to time on; a GPU that several runs share, say, is no place for that.
        kept: what methods made once for all budgets.
    """

    experiment: Experiment
    parent: nn.Module
    data: Data
    example: Tensor
    time_on: str | None = None
    kept: dict[Hashable, tuple[Any, float]] = field(default_factory=dict, repr=False)

    @classmethod
    def prepare(
        cls,
        experiment: Experiment,
        data: Path,
        weights: Path | None = None,
        device: str = "cpu",
        time_on: str | None = None,
    ) -> Stage:
        """Read the parent and the images; raises typed errors that say how to get what is missing."""
        parent = parent_of(experiment.parent)
        images = read(experiment.data, data, parent.input[1], experiment.train_images, experiment.test_images)
        model = load_parent(experiment.parent, weights).to(device).requires_grad_(False)
        return cls(experiment, model, images.to(device), parent.example.to(device), time_on)

    @cached_property
    def reference(self) -> tuple[Tensor, Tensor]:
        """(the parent's answers on the test images, their labels)."""
        return answers(self.parent, self.data.test)

    @cached_property
    def flops(self) -> int:
        return count_flops(self.parent, self.example)

    @cached_property
    def digest(self) -> str:
        return weights_sha256(self.parent)

    @property
    def device(self) -> str:
        """Where it runs, in words."""
        name = device_name(str(self.example.device))
        return name if self.time_on is None else f"{name}, timed on {device_name(self.time_on)}"

    @property
    def timed_on(self) -> torch.device:
        return self.example.device if self.time_on is None else torch.device(self.time_on)

    def speed(self, model: nn.Module) -> dict[int, Speed]:
        """{batch size: time of a network beside the parent's}."""
        where = self.timed_on
        networks = [each if where == self.example.device else copy.deepcopy(each) for each in (model, self.parent)]
        model, parent = (each.to(where) for each in networks)
        return speed(model, parent, self.example.to(where), self.experiment.latency_rounds)

    def context(self, seed: int, progress: bool = False) -> Context:
        experiment, images = self.experiment, self.experiment.calibration_images
        return Context(
            self.data.train, self.example, images, experiment.schedule, seed, progress, self.timed_on, self.kept
        )


@dataclass
class Clock:
    """Wall time of the stages of a run."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[stage] = round(time.perf_counter() - started, 2)


def run_one(stage: Stage, name: Name, method: Method, told: Circumstances, progress: bool = False) -> Result:
    """Shrink the parent by a method, fine-tune it as everybody, and measure it under the rules.

    Raises:
        RuleBroken: the method does not play by the rules.
        Msa2ConvError: the method cannot do it.
    """
    experiment, parent, example, clock = stage.experiment, stage.parent, stage.example, Clock()
    reference, labels = stage.reference
    budget, digest = round(name.budget * stage.flops), stage.digest
    context = stage.context(name.seed, progress)
    torch.manual_seed(name.seed)
    with peak_memory(example.device) as peak:
        with clock("convert"):
            model = method.shrink(parent, budget, context).eval()
        clock.seconds["convert"] = round(clock.seconds["convert"] + context.spared, 2)
        rules.check_parent(parent, digest)
        flops, torchs = count_flops(model, example), torch_flops(model, example)
        rules.check_budget(flops, budget, not context.in_time)
        rules.check_counters(flops, torchs)
        with clock("evaluate"):
            before = quality(answers(model, stage.data.test)[0], reference, labels)
        after, epochs = None, experiment.epochs - context.searched
        with clock("train"):
            if epochs:
                teacher = parent if experiment.teacher == "parent" else None
                schedule = replace(experiment.schedule, epochs=epochs)
                model = train(model, stage.data.train, schedule, teacher, name.seed, name.stem, progress)
        finished = weights_sha256(model)
        if experiment.epochs:
            after = quality(answers(model, stage.data.test)[0], reference, labels)
    rules.check_parent(parent, digest)  # again: a network that shares its weights is trained in their place
    rules.check_budget(count_flops(model, example), budget, not context.in_time)
    invariance = rules.check_batch_invariance(model, *stage.data.test.sample(rules.SAMPLE))
    with clock("time"):
        timed = stage.speed(model)
    blocks, parent_blocks = block_flops(model, example), block_flops(parent, example)
    rules.check_same_network(model, finished)
    return Result(
        name=name,
        keeps_grid=method.keeps_grid,
        in_time=context.in_time,
        flops=flops,
        parent_flops=stage.flops,
        torch_flops=torchs,
        parameters=parameter_count(model),
        parent_parameters=parameter_count(parent),
        blocks=blocks,
        parent_blocks=parent_blocks,
        parent=quality(reference, reference, labels),
        before=before,
        after=after,
        epochs_searched=context.searched,
        speed=timed,
        batch_invariance=invariance,
        peak_memory_gib=None if peak.gib is None else round(peak.gib, 3),
        seconds=clock.seconds,
        plan=context.notes.pop("plan", None),
        notes=context.notes,
        circumstances=told,
    )


def run_all(
    names: list[Name],
    prepare: Callable[[Experiment], Stage],
    *,
    out: Path = RESULTS,
    again: bool = False,
    progress: bool = False,
    say: Callable[[str], None] = print,
) -> list[Name]:
    """Run what is not done yet; a run that is refused leaves a file that says why, and the others go on.

    Several processes may do so at once: what one is at, the others leave to it.

    Args:
        names: the runs.
        prepare: an experiment with its parent and images; called once an experiment, and only if it is needed.
        out: where results lie.
        again: run also what is done.
        progress, say: bars and lines.

    Returns:
        Those that failed.
    """
    stages: dict[tuple[str, str], Stage] = {}
    failed, started = [], time.time()
    for name in names:
        path, what = name.path(out), f"{name.tier}/{name.experiment} {name.stem}"
        failure = name.path(out, failed=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(path.with_suffix(".lock"), blocking=False):
                since = [each for each in (path, failure) if each.is_file() and each.stat().st_mtime >= started]
                if since or (path.is_file() and not again):
                    say(f"{what}: done ({since[0] if since else path})")
                    continue
                key = (name.tier, name.experiment)
                if key not in stages:
                    stages = {key: prepare(read_experiment(*key))}
                outcome = _outcome(stages[key], name, progress)
                write(outcome, out)
        except Timeout:
            say(f"{what}: another process is at it")
            continue
        say(f"{what}: {_line(outcome)}")
        failed += [name] if isinstance(outcome, Failure) else []
    return failed


def _outcome(stage: Stage, name: Name, progress: bool) -> Result | Failure:
    told = circumstances(stage, name)
    try:
        return run_one(stage, name, method_of(name.method), told, progress)
    except Msa2ConvError as error:
        return Failure(name=name, error=f"{type(error).__name__}: {error}", circumstances=told)


def circumstances(stage: Stage, name: Name) -> Circumstances:
    """What is needed to repeat a run."""
    return Circumstances(
        config=stage.experiment.model_dump(mode="json", exclude={"methods", "budgets", "budgets_of", "seeds", "about"}),
        command=f"python -m benchmarks run {name.tier}/{name.experiment} --methods {name.method} "
        f"--budgets {name.budget:g} --seeds {name.seed} --data FOLDER",
        versions=versions(),
        device=stage.device,
        git=git_sha(),
    )


def _line(outcome: Result | Failure) -> str:
    if isinstance(outcome, Failure):
        return outcome.error
    trained = f" -> {outcome.after.top1:.2f}" if outcome.after else ""
    return (
        f"{outcome.kept:.3f} of the FLOPs, top-1 {outcome.parent.top1:.2f} -> {outcome.before.top1:.2f}{trained}, "
        f"time {outcome.speed[1].ratio:.2f} {outcome.speed[32].ratio:.2f}, {outcome.seconds}"
    )
