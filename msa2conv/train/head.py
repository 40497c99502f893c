"""A hybrid for other classes: the same plan, with a new classifier."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..adapters.build import build, find_builder
from ..conversion import Conversion
from ..errors import ArchitectureMismatch, InvalidArgument
from ..flops import count_flops
from ..plan import fingerprint, parameter_count
from ..workbench import own_randomness, unwrap


@own_randomness()
def reset_head(conversion: Conversion, classes: int, seed: int = 0) -> Conversion:
    """The same hybrid with a new, untrained classifier.

    Args:
        conversion: of a model with timm's `reset_classifier`; not touched.
        classes: how many.
        seed: of the new weights.

    Returns:
        A Conversion whose plan applies to the original with as many classes. It remembers the original as it was, which
        can still teach what happens before the classifier.

    Raises:
        InvalidArgument: the model cannot be given another classifier.
        ArchitectureMismatch: neither the original nor timm's name of it is known.
    """
    if not isinstance(classes, int) or classes < 1:
        raise InvalidArgument("classes", repr(classes), "an integer >= 1", "Pass the number of classes of your labels.")
    plan, device = conversion.plan, next(conversion.model.parameters()).device
    torch.manual_seed(seed)
    hybrid = _with_classes(unwrap(conversion.model), classes).to(device)
    if conversion.original is not None:
        base = _with_classes(unwrap(conversion.original), classes)
    elif plan.base.builder is not None:
        base = _with_classes(build(plan.base.builder), classes)
    else:
        raise ArchitectureMismatch(
            "reset_head", f"a Plan for {plan.base.model_class} without a builder", "the original",
            "Conversion.load(path, original=model).",
        )  # fmt: skip
    example = torch.randn(1, *plan.base.input_size, generator=torch.Generator().manual_seed(0))
    known: dict[str, Any] = {
        "builder": find_builder(base, plan.base.input_size),
        "flops": count_flops(base, example.to(next(base.parameters()))),
        "parameters": parameter_count(base),
        "fingerprint": fingerprint(base),
    }
    plan = plan.model_copy(
        update={
            "base": plan.base.model_copy(update=known),
            "flops": count_flops(hybrid, example.to(next(hybrid.parameters()))),
            "parameters": parameter_count(hybrid),
        }
    )
    figures = {
        "flops_before": plan.base.flops, "flops_after": plan.flops, "parameters_before": plan.base.parameters,
        "parameters_after": plan.parameters,
        "warnings": [*conversion.report.warnings, f"the classifier was replaced by one of {classes} classes"],
    }  # fmt: skip
    return replace(conversion, model=hybrid, plan=plan, report=conversion.report.model_copy(update=figures))


def _with_classes(model: nn.Module, classes: int) -> nn.Module:
    reset = getattr(model, "reset_classifier", None)
    if reset is None:
        raise InvalidArgument(
            "reset_head", f"{type(model).__name__}, which has no reset_classifier", "a model of timm",
            "Replace the classifier of your model, convert it, and fine-tune that.",
        )  # fmt: skip
    like = next(model.parameters())
    copied = copy.deepcopy(model)
    copied.reset_classifier(classes)  # type: ignore[operator]
    return copied.to(like.device, like.dtype)
