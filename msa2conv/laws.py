"""The laws, checked on the user's own model and images before anything is returned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .cost import CostModel
from .errors import LawViolation
from .flops import count_flops
from .merging import Merged
from .observation import tensors_of
from .options import Option
from .plan import WHOLE, Plan
from .planning import network_of
from .sites import Claims
from .stream import MergedStream
from .transforms.lift import lift, max_difference

LIFTING, LOWERING = "law 1, lifting is the identity", "law 2, lowering is exact"
_HINT = "This is a bug or a model that an adapter misreads: please report it with print(msa2conv.inspect(model))."


@torch.no_grad()
def verify(
    model: nn.Module,
    hybrid: nn.Module,
    plan: Plan,
    choices: Mapping[str, Option],
    claims: Claims,
    costs: CostModel,
    images: Tensor,
    target: int | None,
) -> dict[str, float]:
    """Check laws 1 to 4 on a model and its hybrid.

    Args:
        model: the original, float32, eval.
        hybrid: `apply(plan, model, tensors)`.
        plan, choices: what was decided.
        claims, costs: the sites, and what they cost.
        images: images [n, C, H, W], of which the two are taken whose merges are decided most clearly.
        target: multiply-adds allowed; None: any.

    Returns:
        {law: measured figure}.

    Raises:
        LawViolation: names the law and both values.
    """
    images = surest(hybrid, images.to(next(model.parameters()).device), 2)
    at_sites = {path: option for path, option in choices.items() if path != WHOLE}
    network = network_of(model, choices.get(WHOLE))
    net = lift(network, claims.sites)
    lifted = check_same(LIFTING, net.model(images), network(images))
    with net.pinned(net.branches(at_sites)) as pinned:
        lowered = check_same(LOWERING, hybrid(images), pinned(images))
    return {"lifting": lifted, "lowering": lowered, **check_costs(hybrid, plan, choices, costs, images[:1], target)}


def merging(model: nn.Module) -> list[Merged | MergedStream]:
    """What of a hybrid merges tokens."""
    return [module for module in model.modules() if isinstance(module, (Merged, MergedStream))]


def decision_margins(model: nn.Module, images: Tensor) -> Tensor:
    """How clearly each image's merges are decided: the smallest gap between a score and the next best.

    Merging is discontinuous at ties: where the gap is not far above rounding, two exact ways to compute the same may
    merge other tokens. Infinite where nothing merges.

    Args:
        model: a hybrid.
        images: [n, C, H, W].

    Returns:
        Gaps of cosines [n].
    """
    merged = merging(model)
    smallest_N = torch.full((len(images),), torch.inf, device=images.device)

    def watch(best_BA: Tensor, scores_BAD: Tensor, going: int) -> None:
        ranked_BA = best_BA.sort(-1, descending=True).values
        goes_BA = best_BA >= ranked_BA[:, going - 1 : going]
        gaps = [torch.full_like(best_BA[:, :1], torch.inf)]
        if going < best_BA.shape[1]:
            gaps.append(ranked_BA[:, going - 1 : going] - ranked_BA[:, going : going + 1])
        if scores_BAD.shape[2] > 1:
            first_BA, second_BA = scores_BAD.topk(2, -1).values.unbind(-1)
            gaps.append(torch.where(goes_BA, first_BA - second_BA, torch.inf))
        found_N = torch.cat(gaps, 1).reshape(len(images), -1).amin(1)
        smallest_N.copy_(torch.minimum(smallest_N, found_N))

    for module in merged:
        module.watch = watch
    try:
        if merged:
            with torch.no_grad():
                model(images)
    finally:
        for module in merged:
            module.watch = None
    return smallest_N


def surest(model: nn.Module, images: Tensor, count: int) -> Tensor:
    """Those images whose merges are decided most clearly; the first ones where nothing merges."""
    return images[decision_margins(model, images).argsort(descending=True, stable=True)[:count]]


def check_same(law: str, found: Any, expected: Any) -> float:
    """The largest difference in any tensor of two outputs, or LawViolation if one exceeds the tolerance of the laws."""
    largest = 0.0
    for one, other in zip(tensors_of(found), tensors_of(expected), strict=True):
        difference, tolerance = max_difference(one, other)
        _demand(difference <= tolerance, law, f"a difference of {difference:.2e}", f"{tolerance:.0e}")
        largest = max(largest, difference)
    return largest


def check_costs(
    hybrid: nn.Module, plan: Plan, choices: Mapping[str, Option], costs: CostModel, image: Tensor, target: int | None
) -> dict[str, float]:
    """Laws 3 and 4 -> {figure: value}; `target=None`: there was no budget to keep."""
    counted = count_flops(hybrid, image)
    summed = costs.total(choices)
    _demand(
        counted == plan.flops == summed,
        "law 3, a plan costs what it says",
        f"{counted:,} counted, {plan.flops:,} in the plan, {summed:,} summed",
        "equal integers",
    )
    if target is None:
        return {"flops": float(counted)}
    _demand(counted <= target, "law 4, the budget is never exceeded", f"{counted:,} FLOPs", f"at most {target:,}")
    return {"flops": float(counted), "budget used": counted / target}


def _demand(holds: bool, law: str, found: str, expected: str) -> None:
    if not holds:
        raise LawViolation(law, found, expected, _HINT)
