"""The league: `python -m benchmarks run | table | plot | check | train | list`. See docs/benchmarks/README.md."""

from __future__ import annotations

import sys

from msa2conv.errors import Msa2ConvError

from .harness.cli import main

if __name__ == "__main__":
    try:
        sys.exit(main())
    except Msa2ConvError as error:
        sys.exit(f"{type(error).__name__}: {error}")
