"""How far an output is from the original's: KL of the logits, or relative error of features."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Measure = Literal["kl", "relative"]


def default_measure(model: nn.Module, output: Tensor) -> Measure:
    """KL where the output is the logits of a classifier, relative error of the features otherwise."""
    classes = getattr(model, "num_classes", None)
    logits = output.ndim == 2 and (classes is None or classes == output.shape[1] > 0)
    return "kl" if logits else "relative"


def distance(reference: Tensor, output: Tensor, measure: Measure) -> float:
    """Mean over images: KL(softmax(reference) || softmax(output)) (nats) or |output - reference|^2 / |reference|^2."""
    reference, output = reference.double(), output.double()
    if measure == "kl":
        p, q = F.log_softmax(reference, -1), F.log_softmax(output, -1)
        each = (p.exp() * (p - q)).sum(-1)
    else:
        each = (output - reference).flatten(1).square().sum(1) / reference.flatten(1).square().sum(1).clamp_min(1e-12)
    value = float(each.mean())
    return value if torch.isfinite(each).all() else float("inf")
