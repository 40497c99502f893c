"""Progress bars: tqdm, silent when standard error is not a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")


def track(items: Iterable[T], what: str, show: bool, total: int | None = None) -> Iterator[T]:
    """Iterate with a bar; `show=False` or no terminal means none."""
    bar = tqdm(items, desc=what, total=total, disable=None if show else True, leave=False, dynamic_ncols=True)
    yield from bar
