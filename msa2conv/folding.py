"""Passes over a finished Conversion that leave its outputs as they are."""

from __future__ import annotations

from dataclasses import replace

import torch

from .conversion import Conversion
from .cost import count_flops
from .plan import parameter_count
from .transforms.fold_norm import fold_norms as folded
from .workbench import own_randomness, unwrap


@own_randomness()
def fold_norms(conversion: Conversion) -> Conversion:
    """Fold the BatchNorms of convolutions that a gate search has put in: outputs stay (law 9, 1e-4), FLOPs fall.

    Do it when nothing is to be trained any more; `finetune` measures the statistics anew before.

    Args:
        conversion: not touched; returned as it is where there is nothing to fold.

    Returns:
        A Conversion whose plan describes the folded network.

    Example:
        result = msa2conv.fold_norms(msa2conv.finetune(search.finish(), train, val))
    """
    model, plan = unwrap(conversion.model), conversion.plan
    edits, hybrid = folded(plan.edits, model)
    if edits == plan.edits:
        return conversion
    example = torch.zeros(1, *plan.base.input_size).to(next(hybrid.parameters()))
    known = {"edits": edits, "flops": count_flops(hybrid, example), "parameters": parameter_count(hybrid)}
    figures = {"flops_after": known["flops"], "parameters_after": known["parameters"]}
    report = conversion.report.model_copy(update=figures)
    return replace(conversion, model=hybrid, plan=plan.model_copy(update=known), report=report)
