"""The laws, checked on the user's own model and images before anything is returned."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .cost import CostModel, count_flops
from .errors import LawViolation
from .options import Option
from .plan import Plan
from .search.measure import tensor_of
from .sites import Claims
from .transforms.lift import lift, max_difference

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
    target: int,
) -> dict[str, float]:
    """Check laws 1 to 4 on a model and its hybrid.

    Args:
        model: the original, float32, eval.
        hybrid: `apply(plan, model, tensors)`.
        plan, choices: what was decided.
        claims, costs: the sites, and what they cost.
        images: a few images [n, C, H, W].
        target: multiply-adds allowed.

    Returns:
        {law: measured figure}.

    Raises:
        LawViolation: names the law and both values.
    """
    device = next(model.parameters()).device
    images = images.to(device)
    net = lift(model, claims.sites)
    original = tensor_of(model(images))
    lifted, tolerance = max_difference(tensor_of(net.model(images)), original)
    _demand(lifted <= tolerance, "law 1, lifting is the identity", f"a difference of {lifted:.2e}", f"{tolerance:.0e}")

    with net.pinned(net.branches(choices)) as pinned:
        expected = tensor_of(pinned(images))
    lowered, tolerance = max_difference(tensor_of(hybrid(images)), expected)
    _demand(lowered <= tolerance, "law 2, lowering is exact", f"a difference of {lowered:.2e}", f"{tolerance:.0e}")

    counted = count_flops(hybrid, images[:1])
    summed = costs.rest + sum(option.flops for option in choices.values())
    untouched = sum(flops for path, flops in costs.hosts.items() if path not in choices)
    _demand(
        counted == plan.flops == summed + untouched,
        "law 3, a plan costs what it says",
        f"{counted:,} counted, {plan.flops:,} in the plan, {summed + untouched:,} summed",
        "equal integers",
    )
    _demand(counted <= target, "law 4, the budget is never exceeded", f"{counted:,} FLOPs", f"at most {target:,}")
    return {"lifting": lifted, "lowering": lowered, "flops": float(counted), "budget used": counted / target}


def _demand(holds: bool, law: str, found: str, expected: str) -> None:
    if not holds:
        raise LawViolation(law, found, expected, _HINT)
