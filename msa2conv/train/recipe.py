"""A whole run as data: the model, the budget, the search, the fine-tuning, the augmentation. Files are in recipes/."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from ..errors import InvalidArgument, InvalidTarget, MissingDependency
from ..targets import parse_target
from .stages import Stage

_LARGE = 2**62  # multiply-adds: more than any model has


class _Data(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Network(_Data):
    """What is converted.

    Args:
        name: timm's name.
        pretrained: whether timm downloads its weights; False: a checkpoint has to be given.
        kwargs: of `timm.create_model`, such as drop_path_rate.
    """

    name: str
    pretrained: bool = True
    kwargs: dict[str, Any] = {}


class Calibrated(_Data):
    """The search that needs no training.

    Args:
        images: training images to calibrate on, prepared as for evaluation.
        distill_steps: of a label-free polish on them.
    """

    kind: Literal["calibrated"]
    images: int = Field(default=256, ge=8)
    distill_steps: int = Field(default=0, ge=0)


class Gated(_Data):
    """msa2conv's own gate search.

    Args:
        epochs, lr, gate_lr: as for `train_gates`.
        batch_size: images of a step over all processes.
        sampling: of the gates, see `Gates`.
    """

    kind: Literal["gates"]
    epochs: int = Field(ge=1)
    lr: float = Field(default=1e-4, gt=0)
    gate_lr: float | None = Field(default=None, gt=0)
    batch_size: int = Field(default=64, ge=1)
    sampling: Literal["concrete", "annealed"] = "annealed"


class Published(_Data):
    """The search of the SPViT paper; its gates and the mixing of its images are those of `msa2conv.spvit.config(name)`.

    Args:
        name: of the published architecture that it led to.
        epochs: how long it may take.
        picked_epoch: where the authors ended it, by eye. The rates are constant, so it may as well stop there.
        lr, weight_decay: of the weights.
        gate_lr: of the thresholds.
        penalty: lambda.
        clip: largest norm of the gradient.
        batch_size: images of a step over all processes.
    """

    kind: Literal["spvit"]
    name: str
    epochs: int = Field(ge=1)
    picked_epoch: int | None = Field(default=None, ge=1)
    lr: float = Field(gt=0)
    weight_decay: float = Field(ge=0)
    gate_lr: float = Field(gt=0)
    penalty: float = Field(gt=0)
    clip: float | None = Field(default=None, gt=0)
    batch_size: int = Field(ge=1)


class Finetune(_Data):
    """What follows the search.

    Args:
        stages: of `finetune`.
        batch_size: images of a step over all processes.
        teacher: "original", the model before the conversion; the name of a timm model with weights; or None.
        labels: as for `finetune`.
        precision: as for `finetune`; of a search by SPViT, too.
    """

    stages: tuple[Stage, ...] = Field(min_length=1)
    batch_size: int = Field(default=64, ge=1)
    teacher: str | None = "original"
    labels: bool | None = None
    precision: Literal["no", "bf16", "fp16"] | None = None

    @field_validator("precision", mode="before")
    @classmethod
    def _no(cls, given: Any) -> Any:
        return "no" if given is False else given  # to YAML a bare `no` is False


class Augment(_Data):
    """Arguments of timm's `create_transform`; those left out are as in `msa2conv.train.augment`."""

    scale: tuple[float, float] | None = None
    ratio: tuple[float, float] | None = None
    hflip: float | None = None
    vflip: float | None = None
    color_jitter: float | None = None
    auto_augment: str | None = None
    interpolation: str | None = None
    re_prob: float | None = None
    re_mode: str | None = None
    re_count: int | None = None

    @property
    def given(self) -> dict[str, Any]:
        """Those that were stated."""
        return self.model_dump(exclude_unset=True)


class Variant(_Data):
    """One way to go about it.

    Args:
        flops: the target, as for `convert`.
        search: how the hybrid is found.
        finetune: how it is trained.
        augment: of the training images.
    """

    flops: float | str
    search: Annotated[Calibrated | Gated | Published, Field(discriminator="kind")]
    finetune: Finetune
    augment: Augment = Augment()

    @field_validator("flops")
    @classmethod
    def _target(cls, given: float | str) -> float | str:
        parse_target(given, _LARGE)
        return given


class Recipe(Variant):
    """One variant of a file.

    Args:
        model: what is converted.
    """

    model: Network


class _File(_Data):
    model: Network
    variants: dict[str, Variant] = Field(min_length=1)


def read_recipe(path: str | os.PathLike[str], variant: str) -> Recipe:
    """Read one variant of a recipe file; the others are checked, too.

    Args:
        path: a YAML file, such as recipes/imagenet/deit_tiny.yaml.
        variant: its name in that file.

    Raises:
        InvalidArgument: no file, no YAML, a field that is unknown, missing or out of range, or no such variant.
        MissingDependency: PyYAML is not installed.

    Example:
        recipe = read_recipe("recipes/imagenet/deit_tiny.yaml", "recommended")
    """
    try:
        file = _File.model_validate(_parsed(path))
    except ValidationError as error:
        raise _explained(str(path), error) from error
    if variant not in file.variants:
        raise InvalidArgument(
            f"{path}, variant", repr(variant), f"one of {', '.join(file.variants)}", "The file lists them."
        )
    return Recipe(model=file.model, **dict(file.variants[variant]))


def _parsed(path: str | os.PathLike[str]) -> Any:
    try:
        import yaml  # type: ignore[import-untyped]
    except ImportError as error:
        raise MissingDependency(str(path), "no PyYAML", "PyYAML", "pip install 'msa2conv[train]'") from error
    try:
        return yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidArgument(
            str(path), f"no file that can be read ({error.strerror})", "a recipe", "The folder recipes/ holds some."
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        place = f", line {mark.line + 1}" if mark else ""
        raise InvalidArgument(
            f"{path}{place}", f"no YAML ({problem or type(error).__name__})", "a recipe in YAML",
            "Compare it with those in the folder recipes/.",
        ) from error  # fmt: skip


def _explained(path: str, error: ValidationError) -> InvalidArgument:
    """The first mistake, with the fields that were possible there."""
    first = error.errors()[0]
    place, given = ".".join(map(str, first["loc"])), first["input"]
    where = f"{path}, {place}" if place else path
    reason = first.get("ctx", {}).get("error")
    if isinstance(reason, InvalidTarget):
        return InvalidArgument(where, repr(given), reason.expected, reason.hint)
    found = first["msg"][0].lower() + first["msg"][1:]
    if first["type"] == "missing":
        found = "nothing"
    elif not isinstance(given, (dict, list)):
        found = f"{given!r} ({found})"
    return InvalidArgument(
        where, found, f"fields {', '.join(_fields_around(first['loc']))}",
        "Compare it with those in the folder recipes/.",
    )  # fmt: skip


def _fields_around(place: Sequence[int | str]) -> tuple[str, ...]:
    owners: dict[int | str, type[BaseModel]] = {
        "model": Network, "calibrated": Calibrated, "gates": Gated, "spvit": Published, "finetune": Finetune,
        "stages": Stage, "augment": Augment,
    }  # fmt: skip
    # Names of variants are the user's own: what follows "variants" and a name is looked at.
    known = place[2:-1] if place and place[0] == "variants" else place[:-1]
    default = Variant if place and place[0] == "variants" else _File
    return tuple(next((owners[part] for part in reversed(known) if part in owners), default).model_fields)


__all__ = ["Augment", "Calibrated", "Finetune", "Gated", "Network", "Published", "Recipe", "Variant", "read_recipe"]
