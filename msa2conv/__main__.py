"""`python -m msa2conv` and the `msa2conv` command."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; typed errors become one red line and exit code 1."""
    from .errors import MissingDependency, Msa2ConvError

    try:
        from .cli import app
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        missing = MissingDependency(
            "msa2conv command line", f"no package {error.name!r}", "typer and rich", "Run: pip install 'msa2conv[cli]'"
        )
        sys.exit(f"error: {missing}")
    try:
        app()
    except Msa2ConvError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
