"""What the pictures of a report show, as data."""

from __future__ import annotations

from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict


class _Data(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


def unit_of(measure: str) -> str:
    """What a distance to the original is measured in."""
    return "KL to the original (nats)" if measure == "kl" else "relative feature error"


class Row(NamedTuple):
    """A figure of the original and of the hybrid, as text."""

    name: str
    before: str
    after: str
    ratio: str = ""

    @classmethod
    def of(cls, name: str, before: float, after: float, form: str) -> Row:
        """Numbers, and their ratio."""
        return cls(name, f"{before:{form}}", f"{after:{form}}", f"{after / before:.1%}")


HEAD = Row("", "before", "after", "ratio")


class SiteCost(_Data):
    """What one site takes.

    Args:
        path: of the site.
        block: path of the block around it.
        kind: "attention" or "ffn".
        choice: name of the option that was chosen.
        before, after: multiply-adds at batch 1.
    """

    path: str
    block: str
    kind: Literal["attention", "ffn"]
    choice: str
    before: int
    after: int


class Promise(_Data):
    """A point of the trade-off.

    Args:
        flops: multiply-adds at batch 1.
        loss: sum of the measured scores of single sites.
    """

    flops: int
    loss: float


class Locality(_Data):
    """How local the heads of an attention are.

    Args:
        path: of its site.
        near: of each head, the share of the patches' attention that stays within 3 x 3 patches around the query.
        chance: what it would be if all tokens got the same.
    """

    path: str
    near: list[float]
    chance: float


__all__ = ["HEAD", "Locality", "Promise", "Row", "SiteCost", "unit_of"]
