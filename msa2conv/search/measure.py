"""How far an output is from the original's: KL of the logits, or relative error of features."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InvalidInput

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


@torch.no_grad()
def outputs(model: nn.Module, images: Tensor, batch: int = 32) -> Tensor:
    """The model's outputs on many images, on the CPU."""
    device = next(model.parameters()).device
    return torch.cat([tensor_of(model(part.to(device))).cpu() for part in torch.split(images, batch)])


def tensor_of(output: Any) -> Tensor:
    """The tensor in a model's output: itself, or the first one in a tuple."""
    if isinstance(output, Tensor):
        return output
    values = output if isinstance(output, (tuple, list)) else ()
    found = next((value for value in values if isinstance(value, Tensor)), None)
    if found is None:
        raise InvalidInput(
            "model output", type(output).__name__, "a tensor, or a tuple that starts with one", "Wrap the model so."
        )
    return found
