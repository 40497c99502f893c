"""From a Calibration and a budget to a Plan."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from .adapters.build import find_builder, preprocessing
from .errors import InfeasibleBudget
from .options import Option
from .plan import WHOLE, Base, Plan, fingerprint, parameter_count, weights_sha256
from .progress import track
from .report.figures import Promise, SiteCost
from .report.inspection import Inspection
from .search.calibration import Calibration
from .search.frontier import frontier
from .search.measure import OutputFn, agreement, distance, outputs
from .search.solve import a_round, diverse
from .settings import Limit
from .sites import AttentionSite
from .transforms.apply import apply, apply_edits, load_tensors
from .transforms.lift import edited, lift

T = TypeVar("T")


@dataclass(frozen=True)
class Choice:
    """What `choose` found.

    Args:
        choices: {site: option}.
        price: which of the compared plans it is.
        predicted: sum of its single-site scores.
        distances: {price: distance of its plan to the original on held-out images}.
        agreement: share of held-out images on which it predicts the original's class; None without logits.
    """

    choices: dict[str, Option]
    price: str
    predicted: float
    distances: dict[str, float]
    agreement: float | None

    @property
    def distance(self) -> float:
        """Of its plan to the original on held-out images."""
        return self.distances[self.price]

    def at(self, width: Option | None) -> Choice:
        """The same in the original, of which a narrower network was made first."""
        if width is None:
            return self
        return replace(self, choices={WHOLE: width} | self.choices, predicted=self.predicted + (width.score or 0.0))


def choose(
    model: nn.Module,
    calibration: Calibration,
    target: int,
    *,
    progress: bool = True,
    output_fn: OutputFn | None = None,
) -> Choice:
    """Solve the budget exactly, in the model as it is and in every narrower one that was calibrated, and keep the plan
    that does best on held-out images.

    Args:
        model: the original, float32, eval.
        calibration: of this model.
        target: multiply-adds allowed.
        progress: show a bar.
        output_fn: the one that calibrated.

    Raises:
        InfeasibleBudget: the target lies below the floor of the calibration's options.
    """

    def find(width: Option | None, own: Calibration) -> Choice:
        return choose_at(network_of(model, width), own, target, progress=progress, output_fn=output_fn).at(width)

    found = in_every_width(calibration, find)
    used_up = [choice for choice in found if calibration.costs.total(choice.choices) >= 0.99 * target]
    return min(used_up or found, key=lambda choice: choice.distance)


def in_every_width(calibration: Calibration, find: Callable[[Option | None, Calibration], T]) -> list[T]:
    """What is found in the model as it is and in every narrower one, where these can keep the budget.

    Args:
        calibration: of the model.
        find: called with a width, None for the model as it is, and its calibration.

    Raises:
        InfeasibleBudget: none can; of the narrowest, whose floor is the lowest.
    """
    found: list[T] = []
    infeasible: list[InfeasibleBudget] = []
    for width, own in calibration.widths():
        try:
            found.append(find(width, own))
        except InfeasibleBudget as error:
            infeasible.append(error)
    if not found:
        raise infeasible[-1]
    return found


def network_of(model: nn.Module, width: Option | None) -> nn.Module:
    """The model itself, or a narrower copy in which sites choose."""
    return model if width is None else edited(model, WHOLE, width.edits, width.tensors())


@torch.no_grad()
def choose_at(
    model: nn.Module,
    calibration: Calibration,
    target: int,
    *,
    limit: Limit | None = None,
    progress: bool = True,
    output_fn: OutputFn | None = None,
) -> Choice:
    """Solve the budget exactly in several ways and keep the plan that does best on held-out images.

    Merging takes time that FLOPs do not show: without a `limit`, every round of it counts as much as `a_round` says.

    Args:
        model: the original or a narrower network, float32, eval.
        calibration: of this one; narrower ones are left out.
        target: multiply-adds allowed.
        limit: a second budget, of measured times.
        progress: show a bar.
        output_fn: the one that calibrated.

    Raises:
        InfeasibleBudget: the target lies below the floor of the calibration's options.
    """
    options = calibration.options()
    rest = calibration.costs.outside(options)
    found = diverse(options, rest, target, calibration.settings(), limit)
    net = lift(model, calibration.sites)
    means: dict[str, float] = {}
    agreements: dict[str, float | None] = {}

    def compare(name: str) -> None:
        with net.pinned(net.branches(found[name].choices)) as pinned:
            output = outputs(pinned, calibration.images, output_fn=output_fn)
        means[name] = distance(calibration.reference, output, calibration.measure)
        agreements[name] = agreement(calibration.reference, output) if calibration.measure == "kl" else None

    for name in track(list(found), "compare", progress):
        compare(name)
    best = min(means, key=means.__getitem__)
    if limit is None:  # a limit knows what merging takes
        each = a_round(means[best], found[best].rounds)
        best = min(found, key=lambda name: means[name] + each * found[name].rounds)
    predicted = sum(option.score or 0.0 for option in found[best].choices.values())
    return Choice(found[best].choices, best, predicted, means, agreements[best])


def tradeoff(calibration: Calibration) -> list[Promise]:
    """What other budgets are predicted to lose, by the scores of a calibration alone."""
    points: list[tuple[int, float]] = []
    for width, own in calibration.widths():
        options, lost = own.options(), 0.0 if width is None else width.score or 0.0
        points += [
            (flops, lost + loss) for flops, loss in frontier(own.settings(), options, own.costs.outside(options))
        ]
    best = [point for point in points if not any(other[0] <= point[0] and other[1] < point[1] for other in points)]
    return [Promise(flops=flops, loss=loss) for flops, loss in sorted(set(best))]


def site_costs(seen: Inspection, choices: Mapping[str, Option]) -> list[SiteCost]:
    """What every site takes before and after.

    Args:
        seen: inspection of the original.
        choices: {site: option}.
    """
    return [
        SiteCost(
            path=site.path,
            block=site.block,
            kind="attention" if isinstance(site, AttentionSite) else "ffn",
            choice=choices[site.path].name,
            before=seen.costs.hosts[site.path],
            after=choices[site.path].flops,
        )
        for site in seen.claims.sites
        if site.path in choices
    ]


def make_plan(model: nn.Module, seen: Inspection, choices: Mapping[str, Option]) -> tuple[Plan, dict[str, Tensor]]:
    """Choices -> (Plan, fitted tensors).

    Args:
        model: the original.
        seen: its inspection.
        choices: {site: option}.
    """
    edits = tuple(edit for option in choices.values() for edit in option.edits)
    costs = seen.costs
    base = Base(
        name=seen.name,
        model_class=f"{type(model).__module__}.{type(model).__qualname__}",
        builder=find_builder(model, seen.input_size),
        input_size=seen.input_size,
        preprocessing=preprocessing(model),
        flops=costs.base,
        parameters=seen.parameters,
        fingerprint=fingerprint(model),
        weights_sha256=weights_sha256(model),
    )
    stream = [] if seen.claims.stream is None else [seen.claims.stream.path]
    order = [WHOLE, *stream, *(site.path for site in seen.claims.sites)]
    ordered = {path: choices[path].name for path in order if path in choices}
    plan = Plan(base=base, choices=ordered, edits=edits, flops=costs.total(choices), parameters=seen.parameters)
    hybrid = apply(plan, model)
    return plan.model_copy(update={"parameters": parameter_count(hybrid)}), _fitted(model, hybrid, choices)


def _fitted(model: nn.Module, hybrid: nn.Module, choices: Mapping[str, Option]) -> dict[str, Tensor]:
    """What the options have fitted, {name in the hybrid: values}."""
    if WHOLE not in choices:
        return {name: value for option in choices.values() for name, value in option.tensors().items()}
    staged = copy.deepcopy(model).float()  # each option cuts further what the one of the whole network has fitted
    for option in choices.values():
        apply_edits(staged, option.edits)
        load_tensors(staged, option.tensors())
    own, found = hybrid.state_dict(), staged.state_dict()
    return {name: value for name, value in found.items() if not torch.equal(value, own[name].to(value))}
