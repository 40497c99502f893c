"""`python -m benchmarks check`: every figure that is shown has a result file behind it, and says what that says."""

from __future__ import annotations

import difflib
from pathlib import Path

from .documents import DOCS, PICTURES, README, picture, tiers, wanted
from .plots import digest, shown_digest
from .result import RESULTS, read_tier

REPAIR = "run python -m benchmarks plot"


def problems(results: Path = RESULTS) -> list[str]:
    """What is wrong, a line each; empty if nothing is."""
    found = []
    for path, text in wanted(results).items():
        shown = path.read_text(encoding="utf-8") if path.is_file() else ""
        if shown != text:
            found += [_stale(path, shown, text)]
    found += [f"{path}: shown, but no result of its tier is there" for path in _orphans(results)]
    for tier in tiers(results):
        own = read_tier(tier, results)
        for experiment in dict.fromkeys(result.name.experiment for result in own):
            expected = digest([result for result in own if result.name.experiment == experiment])
            for what in PICTURES:
                path = picture(tier, experiment, what)
                if not path.is_file():
                    found.append(f"{path}: missing; {REPAIR}")
                elif shown_digest(path) != expected:
                    found.append(f"{path}: drawn from other results than those in {results / tier}; {REPAIR}")
    return found


def _stale(path: Path, shown: str, text: str) -> str:
    changes = list(difflib.unified_diff(shown.splitlines(), text.splitlines(), lineterm="", n=0))
    unbacked = [line[1:] for line in changes if line.startswith("-|") and any(sign.isdigit() for sign in line)]
    what = f"shows {' and '.join(unbacked[:3])}, which no result file says" if unbacked else "is not up to date"
    return f"{path}: {what}; {REPAIR}"


def _orphans(results: Path) -> list[Path]:
    """Documents of tiers without results, other than those that are written by hand."""
    have = set(tiers(results))
    written = "Written by `python -m benchmarks plot`"
    return [p for p in sorted(DOCS.glob("*.md")) if p.stem not in have and written in p.read_text(encoding="utf-8")]


__all__ = ["README", "problems"]
