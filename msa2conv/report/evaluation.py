"""What `msa2conv eval` measured with labels, kept beside the hybrid for its report."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, ValidationError

from ..errors import InvalidCheckpoint


class Measured(BaseModel):
    """Args:
    correct, images: predictions that were right, of how many.
    flops: multiply-adds at batch 1.
    parameters: how many.
    seconds: {batch size: median of a forward pass}, models in turn.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    correct: int
    images: int
    flops: int
    parameters: int
    seconds: dict[int, float]


class Evaluation(BaseModel):
    """Args:
    images: where they came from.
    models: {"original" (where it was given), "hybrid": figures}.
    device: where it ran.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    images: str
    models: dict[str, Measured]
    device: str

    @classmethod
    def from_json(cls, text: str, where: str) -> Evaluation:
        """Parse an evaluation.json; raises InvalidCheckpoint."""
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise InvalidCheckpoint(
                where, "an evaluation that this version cannot read", "the evaluation.json that `msa2conv eval` wrote",
                "Delete it, or run `msa2conv eval` again.",
            ) from error  # fmt: skip


__all__ = ["Evaluation", "Measured"]
