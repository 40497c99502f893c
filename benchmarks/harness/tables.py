"""Results -> rows -> Markdown."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from .config import DENSE
from .result import Failure, Result

Key = tuple[str, float, str]  # experiment, budget, method


@dataclass(frozen=True)
class Figure:
    """A mean over seeds, how many they are, and the standard deviation between them where they are several."""

    mean: float
    deviation: float | None
    seeds: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Figure:
        found = list(values)
        return cls(mean(found), stdev(found) if len(found) > 1 else None, len(found))

    def text(self, digits: int) -> str:
        spread = "" if self.deviation is None else f" ± {self.deviation:.{digits}f}"
        return f"{self.mean:.{digits}f}{spread}"


@dataclass(frozen=True)
class Row:
    """One method on one experiment with one budget, over its seeds."""

    experiment: str
    budget: float
    method: str
    results: tuple[Result, ...]

    @property
    def keeps_grid(self) -> bool:
        return self.results[0].keeps_grid

    @property
    def trained(self) -> bool:
        return any(result.after for result in self.results)

    @property
    def before(self) -> Figure:
        return Figure.of(result.before.top1 for result in self.results)

    @property
    def final(self) -> Figure:
        return Figure.of(result.final.top1 for result in self.results)

    @property
    def kl(self) -> Figure:
        return Figure.of(result.before.kl for result in self.results)

    @property
    def final_kl(self) -> Figure:
        return Figure.of(result.final.kl for result in self.results)

    @property
    def kept(self) -> Figure:
        return Figure.of(result.kept for result in self.results)

    @property
    def in_time(self) -> bool:
        """Whether the budget is one of time, too."""
        return self.results[0].in_time

    def speed(self, batch: int) -> Figure:
        return Figure.of(result.speed[batch].ratio for result in self.results)


def rows_of(results: Iterable[Result]) -> list[Row]:
    """Grouped by method; best first inside an experiment and a budget."""
    groups: dict[Key, list[Result]] = defaultdict(list)
    for result in results:
        groups[result.name.experiment, result.name.budget, result.name.method].append(result)
    rows = [Row(*key, tuple(sorted(group, key=lambda r: r.name.seed))) for key, group in groups.items()]
    return sorted(rows, key=lambda row: (row.experiment, -row.budget, -row.final.mean, -row.before.mean, row.method))


COLUMNS = (
    "method", "grid kept", "top-1 before", "top-1", "KL before", "KL", "FLOPs", "M params",
    "time, batch 1", "time, batch 32", "convert s", "train s", "seeds",
)  # fmt: skip


def cells(row: Row) -> list[str]:
    """What a row shows."""
    first, trained = row.results[0], row.trained
    seconds = {stage: mean(result.seconds.get(stage, 0.0) for result in row.results) for stage in ("convert", "train")}
    return [
        row.method, "yes" if row.keeps_grid else "no", row.before.text(1), row.final.text(1) if trained else "",
        row.kl.text(3), row.final_kl.text(3) if trained else "", f"{row.kept.mean:.3f}",
        f"{first.parameters / 1e6:.2f}", f"{row.speed(1).mean:.2f}", f"{row.speed(32).mean:.2f}",
        f"{seconds['convert']:.0f}", f"{seconds['train']:.0f}" if trained else "",
        str(len(row.results)),
    ]  # fmt: skip


def markdown(columns: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (columns, ["---"] * len(columns), *lines))


def experiment_tables(results: Sequence[Result], failures: Sequence[Failure]) -> str:
    """All tables of a tier: one for every experiment and budget."""
    parts, rows = [], rows_of(results)
    dense = {row.experiment: row for row in rows if row.method == DENSE}
    for experiment, budget in dict.fromkeys((row.experiment, row.budget) for row in rows if row.method != DENSE):
        here = [row for row in rows if (row.experiment, row.budget) == (experiment, budget)]
        lines = [cells(row) for row in [*([dense[experiment]] if experiment in dense else []), *here]]
        of = "time" if all(row.in_time for row in here) else "FLOPs"
        parts += [f"### {experiment}, {budget:.0%} of the {of}", "", markdown(COLUMNS, lines), ""]
        seeds: dict[tuple[str, str], list[str]] = defaultdict(list)
        for failure in failures:
            if (failure.name.experiment, failure.name.budget) == (experiment, budget):
                seeds[failure.name.method, failure.error].append(str(failure.name.seed))
        parts += [f"- {method}, seed {', '.join(which)}: {error}" for (method, error), which in seeds.items()]
        parts += [""] if seeds else []
    return "\n".join(parts).strip()


def league(results: Sequence[Result], grid_only: bool, trained: bool = True) -> str:
    """Methods by their mean top-1 over all experiments and budgets; behind them those that lack a result somewhere.

    Methods under a budget of time are not among them: they answer another question, with fewer FLOPs.

    Bold is the best of a column, and whatever is not outside of its error bars: apart by no more than the standard
    deviations of both over their seeds. Before any training the KL is shown, too, which tells networks apart that a
    sample's top-1 cannot. Where others of a column have more seeds, it says how many there are.

    Args:
        results: of a tier or an experiment.
        grid_only: of the methods that keep the grid of tokens.
        trained: after fine-tuning; before any otherwise.
    """
    rows = [row for row in rows_of(results) if row.method != DENSE and (row.keeps_grid or not grid_only)]
    rows = [row for row in rows if not row.in_time and (row.trained or not trained)]
    cases = list(dict.fromkeys((row.experiment, row.budget) for row in rows))
    found: dict[str, dict[tuple[str, float], tuple[Figure, str]]] = defaultdict(dict)
    for row in rows:
        shown = (row.final, "") if trained else (row.before, f" ({row.kl.mean:.3f})")
        found[row.method][row.experiment, row.budget] = shown
    best = {case: max((of[case][0] for of in found.values() if case in of), key=lambda f: f.mean) for case in cases}
    seeds = {case: max(of[case][0].seeds for of in found.values() if case in of) for case in cases}
    # What lacks a column would be ranked by easier ones than the others.
    means = {method: mean(figure.mean for figure, _ in of.values()) for method, of in found.items()}
    ranked = sorted(found, key=lambda method: (len(found[method]) < len(cases), -means[method]))
    lines = []
    for place, method in enumerate(ranked, 1):
        of, whole = found[method], len(found[method]) == len(cases)
        figures = [_cell(*of[case], best[case], seeds[case]) if case in of else "–" for case in cases]
        lines.append([str(place) if whole else "", method, *figures, f"{means[method]:.1f}" if whole else ""])
    columns = ["", "method", *(f"{experiment} {budget:.0%}" for experiment, budget in cases), "mean"]
    return markdown(columns, lines)


def _cell(figure: Figure, behind: str, best: Figure, seeds: int) -> str:
    bars = (figure.deviation or 0) + (best.deviation or 0)
    marked = f"**{figure.text(1)}**" if figure.mean + bars >= best.mean else figure.text(1)
    return marked + behind + ("" if figure.seeds == seeds else f" n={figure.seeds}")
