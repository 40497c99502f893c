"""Progress bars: tqdm, silent when standard error is not a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from tqdm import tqdm

T = TypeVar("T")


def track(items: Iterable[T], what: str, show: bool, total: int | None = None) -> Iterator[T]:
    """Iterate with a bar; `show=False` or no terminal means none."""
    yield from bar(what, show, total, items=items)


def bar(what: str, show: bool, total: int | None, *, items: Any = None, initial: int = 0, unit: str = "it") -> Any:
    """A tqdm bar with rate and remaining time, gone when it is done; `show=False` or no terminal means none."""
    return tqdm(
        items, desc=what, total=total, initial=initial, unit=unit, disable=None if show else True, leave=False,
        dynamic_ncols=True,
    )  # fmt: skip
