"""An experiment: a folder experiments/TIER/NAME with a config.yaml, which stands for a matrix of runs."""

from __future__ import annotations

from collections.abc import Collection
from itertools import chain
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from msa2conv.errors import InvalidArgument

from .result import Name
from .training import Schedule

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
DENSE = "dense"  # the one method whose budget is all of the parent
Budget = Annotated[float, Field(gt=0, lt=1)]


class Experiment(BaseModel):
    """What is compared, on what, how long.

    Args:
        parent: the dense network, of `harness.parents`.
        data: images, of `harness.data`.
        methods: of `benchmarks.methods`.
        budgets: shares of the parent's FLOPs.
        budgets_of: {method: shares that it alone is asked for, too}: of time, say.
        seeds: of everything random.
        epochs: of fine-tuning, what a method spends searching included; 0: none.
        lr, batch_size: of the fine-tuning.
        teacher: whose answers are learned beside the labels.
        train_images, test_images: how many at most; None: all.
        calibration_images: training images that a method without training may look at.
        latency_rounds: how often every network is timed in batches; ten times as often one image at a time.
        about: a sentence for the table.

    Example:
        >>> Experiment(parent="deit_fashion", data="fashion_mnist", methods=["ours"], budgets=[0.7]).seeds
        (0,)
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    parent: str
    data: str
    methods: tuple[str, ...] = Field(min_length=1)
    budgets: tuple[Budget, ...] = Field(min_length=1)
    budgets_of: dict[str, tuple[Budget, ...]] = {}
    seeds: tuple[int, ...] = (0,)
    epochs: int = Field(default=0, ge=0)
    lr: float = Field(default=5e-4, gt=0)
    batch_size: int = Field(default=64, ge=1)
    teacher: Literal["parent"] | None = "parent"
    train_images: int | None = Field(default=None, ge=64)
    test_images: int | None = Field(default=None, ge=64)
    calibration_images: int = Field(default=256, ge=64)
    latency_rounds: int = Field(default=15, ge=3)
    about: str = ""

    @field_validator("budgets_of")
    @classmethod
    def _of_methods(cls, given: dict[str, tuple[float, ...]], info: ValidationInfo) -> dict[str, tuple[float, ...]]:
        strange = sorted(given.keys() - set(info.data.get("methods", given)))
        if strange:
            raise ValueError(f"{strange[0]} is not among the methods")
        return given

    @property
    def schedule(self) -> Schedule:
        return Schedule(self.epochs, self.lr, self.batch_size)

    def runs(
        self,
        tier: str,
        name: str,
        methods: Collection[str] = (),
        budgets: Collection[float] = (),
        seeds: Collection[int] = (),
    ) -> list[Name]:
        """The matrix, seed by seed, or the part of it that is asked for; raises InvalidArgument if there is none."""
        every = sorted({*self.budgets, *chain(*self.budgets_of.values())}, reverse=True)
        for asked, known, what in (
            (methods, self.methods, "methods"),
            (budgets, (*every, 1.0), "budgets"),
            (seeds, self.seeds, "seeds"),
        ):  # fmt: skip
            strange = sorted(set(asked) - set(known))
            if strange:
                raise InvalidArgument(
                    f"--{what}", str(strange[0]), f"of {tier}/{name}: {', '.join(map(str, known))}",
                    f"Add it to {EXPERIMENTS / tier / name / 'config.yaml'}.",
                )  # fmt: skip
        found = [
            Name(tier=tier, experiment=name, method=method, budget=budget, seed=seed)
            for seed in seeds or self.seeds
            for budget in (1.0, *every)
            for method in self.methods
            if budget in self._budgets(method)
            if (not budgets or budget in budgets) and (not methods or method in methods)
        ]
        if not found:
            raise InvalidArgument(
                "--budgets", f"none of {', '.join(methods)}",
                f"of {tier}/{name}: {', '.join(f'{m} {b:g}' for m in methods for b in self._budgets(m))}",
                f"Add it to budgets_of in {EXPERIMENTS / tier / name / 'config.yaml'}.",
            )  # fmt: skip
        return found

    def _budgets(self, method: str) -> tuple[float, ...]:
        return (1.0,) if method == DENSE else (*self.budgets, *self.budgets_of.get(method, ()))


def find_experiments(wanted: str, root: Path = EXPERIMENTS) -> list[tuple[str, str]]:
    """[(tier, name)] of "small" or "small/deit_fashion"; raises InvalidArgument."""
    tier, _, name = wanted.strip("/").partition("/")
    found = [(tier, path.parent.name) for path in sorted((root / tier).glob(f"{name or '*'}/config.yaml"))]
    if not found:
        known = sorted(f"{path.parts[-3]}/{path.parts[-2]}" for path in root.glob("*/*/config.yaml"))
        raise InvalidArgument(
            "experiment", repr(wanted), ", ".join(known) or f"a folder in {root}", "Name a tier, or TIER/EXPERIMENT."
        )
    return found


def read_experiment(tier: str, name: str, root: Path = EXPERIMENTS) -> Experiment:
    """Read a config; raises InvalidArgument that names the field."""
    path = root / tier / name / "config.yaml"
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
        return Experiment.model_validate(given)
    except (yaml.YAMLError, ValidationError) as error:
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            where = f"{path}, {'.'.join(map(str, first['loc'])) or 'the file'}"
            found = f"{first['input']!r} ({first['msg'].lower()})"
        else:
            where, found = str(path), f"no YAML ({str(error).splitlines()[0]})"
        raise InvalidArgument(
            where, found, f"fields of Experiment: {', '.join(Experiment.model_fields)}",
            "Its docstring in benchmarks/harness/config.py explains them.",
        ) from error  # fmt: skip
