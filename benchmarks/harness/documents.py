"""docs/benchmarks/TIER.md with its plots, and the marked table in README: all that the league shows."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import Path

from msa2conv.files import write_text

from .config import EXPERIMENTS, Experiment, read_experiment
from .result import RESULTS, ROOT, Failure, Result, read_failures, read_tier
from .tables import experiment_tables, league, rows_of

DOCS = ROOT / "docs" / "benchmarks"
README = ROOT / "README.md"
_MARKED = re.compile(r"(<!-- league: (\w+)(?:/(\w+))? -->\n).*?(<!-- end -->)", re.DOTALL)

HEAD = """\
Top-1 in percent on test images, mean ± standard deviation over seeds where there are several: before any training, and
after the same fine-tuning for all. KL: to the parent's answers, nats. FLOPs and time (of a forward
pass, in turn with the parent's) as shares of the parent's; seconds of converting and training on whatever machine a run
had. `dense` is the parent, fine-tuned as the others. Rules, methods and how to repeat a row: [README](README.md).
"""

LEAGUES = (
    ("All methods", False, True),
    ("Methods that keep the grid of tokens", True, True),
    ("All methods, before any training", False, False),
    ("Methods that keep the grid of tokens, before any training", True, False),
)
LEGEND = (
    "Bold: the best of a column, and what is apart from it by no more than the standard deviations of both. –: the "
    "method does not reach that budget, does not apply, or was not run. n: so many seeds only. What keeps a budget of "
    "time, too, is not ranked."
)


def tiers(results: Path = RESULTS) -> list[str]:
    """Those that have results, in the order of their experiments."""
    return [path.name for path in sorted(EXPERIMENTS.iterdir()) if any((results / path.name).glob("*/*.json"))]


def tier_document(tier: str, results: Sequence[Result], failures: Sequence[Failure]) -> str:
    """The text of docs/benchmarks/TIER.md."""
    experiments = list(dict.fromkeys(result.name.experiment for result in results))
    lines = [f"# {tier}", "", "Written by `python -m benchmarks plot`; do not edit.", "", HEAD]
    for name in experiments:
        config = read_experiment(tier, name)
        parent = next(result.parent.top1 for result in results if result.name.experiment == name)
        lines.append(f"- **{name}**: {config.about} {_training(config)} {_noise(config, parent)}".rstrip())
    trained = any(result.after for result in results)
    for title, grid_only, after in LEAGUES:
        if trained or not after:
            lines += ["", f"## {title}", "", league(results, grid_only, after)]
    lines += ["", "Before training in brackets: KL. " + LEGEND, "", "## Plots", ""]
    for name in experiments:
        lines += [f"![{what} of {name}]({picture(tier, name, what).name})" for what in PICTURES]
    lines += ["", "## Every row", "", experiment_tables(results, failures), "", "## Plans", "", *_plans(results)]
    return "\n".join([*lines, "## How it was measured", "", *_circumstances(results)]) + "\n"


PICTURES = ("accuracy", "blocks")


def picture(tier: str, experiment: str, what: str, docs: Path = DOCS) -> Path:
    """Where a plot lies."""
    return docs / f"{tier}-{experiment}-{what}.png"


def _training(config: Experiment) -> str:
    if not config.epochs:
        return "No training."
    count = f" of {config.train_images:,} images" if config.train_images else ""
    return f"Fine-tuning: {config.epochs} epochs{count}, a search included; the parent's answers and the labels."


def _noise(config: Experiment, top1: float) -> str:
    """How much a top-1 says on so many test images."""
    if config.test_images is None:
        return ""
    error = (top1 * (100 - top1) / config.test_images) ** 0.5
    return f"{config.test_images:,} test images: the standard error of a top-1 is {error:.1f}, of differences less."


def _plans(results: Sequence[Result]) -> list[str]:
    """What `ours` decided, with the first seed."""
    lines = []
    for row in rows_of(results):
        shown = row.results[0].notes.get("picture")
        if row.method == "ours" and shown:
            lines += [f"`{row.method}`, {row.experiment}, {row.budget:.0%}:", "", "```", str(shown), "```", ""]
    return lines


def _circumstances(results: Sequence[Result]) -> list[str]:
    """Devices, versions and code, each once."""
    told = [result.circumstances for result in results]
    devices = sorted({each.device for each in told})
    versions = sorted({", ".join(f"{k} {v}" for k, v in each.versions.items()) for each in told})
    return [
        f"- {len(results)} runs on {'; '.join(devices)}.", *(f"- {each}" for each in versions),
        f"- code: {', '.join(sorted({each.git for each in told}))} (+: with changes that were not committed)",
        "- every result file holds the command that repeats it",
    ]  # fmt: skip


def filled(text: str, results: Path = RESULTS) -> str:
    """A document with the league of every marked tier, or experiment of it, rendered anew."""

    def fill(match: re.Match[str]) -> str:
        found = [result for result in read_tier(match[2], results) if match[3] in (None, result.name.experiment)]
        if not found:
            return f"{match[1]}Nothing has been run yet.\n{match[4]}"
        seeds = len({result.name.seed for result in found})
        trained = any(result.after for result in found)
        what = "Top-1 after fine-tuning" if trained else "Top-1 without any training and, in brackets, the KL"
        note = (
            f"{what}, {len(found)} runs, {seeds} seed{'s' if seeds > 1 else ''}. {LEGEND} More in "
            f"[docs/benchmarks](docs/benchmarks/{match[2]}.md)."
        )
        return f"{match[1]}{league(found, False, trained)}\n\n{note}\n{match[4]}"

    return _MARKED.sub(fill, text)


def wanted(results: Path = RESULTS, chosen: Collection[str] = ()) -> dict[Path, str]:
    """{document: what its text should be}."""
    found = {
        DOCS / f"{tier}.md": tier_document(tier, read_tier(tier, results), read_failures(tier, results))
        for tier in chosen or tiers(results)
    }
    return {**found, README: filled(README.read_text(encoding="utf-8"), results)}


def update(chosen: Collection[str] = (), results: Path = RESULTS, plots: bool = False) -> list[Path]:
    """Write the documents (and plots) that are not as they should be; returns what was written."""
    written = []
    for path, text in wanted(results, chosen).items():
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            write_text(path, text)
            written.append(path)
    if plots:
        from .plots import draw

        for tier in chosen or tiers(results):
            written += draw(tier, read_tier(tier, results), DOCS)
    return written
