"""What a fine-tuning consists of, as data."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..errors import InvalidArgument

Kind = Literal["local", "distill", "labels"]
_LR: dict[Kind, float] = {"local": 3e-4, "distill": 5e-5, "labels": 2e-5}


class Stage(BaseModel):
    """One stage of a fine-tuning.

    Args:
        kind: "local": only what was replaced or narrowed learns, every site by itself, to answer the original's inputs
            with the original's outputs; no network is run but the teacher. "distill": the whole network learns to give
            the teacher's outputs. "labels": it learns the labels alone.
        epochs: passes over the training images.
        lr: of AdamW, after the warm-up; None: 3e-4 (local), 5e-5 (distill), 2e-5 (labels), which suit batches of 64.
        final_lr: where the cosine ends.
        warmup: share of the steps in which the rate rises linearly.
        weight_decay: of parameters with two dimensions or more.
        clip: largest norm of the gradient.
        temperature: of the KL to the teacher, which is multiplied by its square (Hinton et al., 2015).
        labels: share of the labels' cross entropy in "distill", where there are labels; the teacher has the rest.
        hard: the teacher's most probable class instead of its probabilities (Touvron et al., ICML 2021).
        hidden: weight of 1 - cosine between the hidden states of student and teacher behind every block, where their
            shapes agree; 0 for none.
        anneal: share of the steps in which the attentions that were replaced fade out, from the original to the mixer.
        smoothing: of the labels.
        mixup, cutmix: timm's alphas; 0 for none.
        ema: decay of an average of the weights, which is then what is validated and kept; None for none.

    Example:
        >>> Stage(kind="distill", epochs=3).rate
        5e-05
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Kind
    epochs: int = Field(default=1, ge=1)
    lr: float | None = Field(default=None, gt=0)
    final_lr: float = Field(default=0.0, ge=0)
    warmup: float = Field(default=0.1, ge=0, lt=1)
    weight_decay: float = Field(default=0.05, ge=0)
    clip: float | None = Field(default=1.0, gt=0)
    temperature: float = Field(default=1.0, gt=0)
    labels: float = Field(default=0.5, ge=0, le=1)
    hard: bool = False
    hidden: float = Field(default=0.0, ge=0)
    anneal: float = Field(default=0.0, ge=0, le=1)
    smoothing: float = Field(default=0.0, ge=0, lt=1)
    mixup: float = Field(default=0.0, ge=0)
    cutmix: float = Field(default=0.0, ge=0)
    ema: float | None = Field(default=None, gt=0, lt=1)

    @property
    def rate(self) -> float:
        """The learning rate after the warm-up."""
        return self.lr if self.lr is not None else _LR[self.kind]


def stages_of(given: Any) -> tuple[Stage, ...]:
    """Stages from Stages, dicts or the names of kinds.

    Raises:
        InvalidArgument: none, or a field that no stage has.
    """
    items = [{"kind": item} if isinstance(item, str) else item for item in given]
    try:
        found = tuple(Stage.model_validate(item) for item in items)
    except ValidationError as error:
        first = error.errors()[0]
        raise InvalidArgument(
            f"stages, {'.'.join(map(str, first['loc'])) or 'item'}", f"{first['input']!r} ({first['msg'].lower()})",
            f"fields of Stage: {', '.join(Stage.model_fields)}", "help(msa2conv.Stage) explains them.",
        ) from error  # fmt: skip
    if not found:
        raise InvalidArgument("stages", "none", "at least one", "For example stages=['local', 'distill'].")
    return found
