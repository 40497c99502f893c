"""Parameters of which `make test` takes a sample; `make test-all` takes all."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def sampled(values: Iterable[Any], quick: int | Collection[Any]) -> list[Any]:
    """The values, each a pytest.param; those that are not quick are marked slow.

    Args:
        values: of one parameter, or tuples for several.
        quick: those that `make test` runs, or how many of the first.
    """
    every = list(values)
    chosen = every[:quick] if isinstance(quick, int) else quick
    marks = [() if value in chosen else pytest.mark.slow for value in every]
    several = [value if isinstance(value, tuple) else (value,) for value in every]
    return [pytest.param(*each, marks=mark) for each, mark in zip(several, marks, strict=True)]
