"""What commands print."""

from __future__ import annotations

from typing import Any

from rich.console import Console

console = Console()


def say(text: Any) -> None:
    """A line with rich's markup, or a table."""
    console.print(text)


def show(text: Any) -> None:
    """Plain text, as it is."""
    console.print(str(text), highlight=False, soft_wrap=True, markup=False)
