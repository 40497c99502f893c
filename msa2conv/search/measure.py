"""How far an output is from the original's: KL of the logits, or relative error of features."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InvalidInput
from ..observation import tensors_of

Measure = Literal["kl", "relative"]
OutputFn = Callable[[Any], Any]
_BEYOND_CHANCE = 1.645  # standard errors: one-sided, 5 %
NEGLIGIBLE = 1e-3  # a distance in nats, or of features: what no user sees is not worth time


def default_measure(model: nn.Module, output: Tensor) -> Measure:
    """KL where the output is the logits of a classifier, relative error of the features otherwise."""
    classes = getattr(model, "num_classes", None)
    logits = output.ndim == 2 and (classes is None or classes == output.shape[1] > 0)
    return "kl" if logits else "relative"


def distance(reference: Tensor, output: Tensor, measure: Measure) -> float:
    """Mean over images: KL(softmax(reference) || softmax(output)) (nats) or |output - reference|^2 / |reference|^2.

    Infinite where that of one image is not finite.
    """
    found_N = distances(reference.double(), output.double(), measure)
    return float(found_N.mean()) if torch.isfinite(found_N).all() else float("inf")


def distances(reference: Tensor, output: Tensor, measure: Measure) -> Tensor:
    """The same of every image, in the dtype given."""
    if measure == "kl":
        p, q = F.log_softmax(reference, -1), F.log_softmax(output, -1)
        return (p.exp() * (p - q)).sum(-1)
    return (output - reference).flatten(1).square().sum(1) / reference.flatten(1).square().sum(1).clamp_min(1e-12)


def farther(before_N: Tensor, after_N: Tensor) -> bool:
    """Whether distances of the same images grew, beyond chance; what is not finite did."""
    growth_N = after_N.double() - before_N.double()
    return not growth_N.mean() <= _BEYOND_CHANCE * growth_N.std(correction=0) / len(growth_N) ** 0.5


def agreement(reference: Tensor, output: Tensor) -> float:
    """Share of images on which two logits predict the same class."""
    return float((reference.argmax(1) == output.argmax(1)).float().mean())


@torch.no_grad()
def outputs(model: nn.Module, images: Tensor, batch: int = 32, output_fn: OutputFn | None = None) -> Tensor:
    """What is scored of the model's outputs on many images, on the CPU."""
    device = next(model.parameters()).device
    return torch.cat([tensor_of(model(part.to(device)), output_fn).cpu() for part in torch.split(images, batch)])


def tensor_of(output: Any, output_fn: OutputFn | None = None) -> Tensor:
    """What is scored of a model's output: the tensor, or all the tensors in it, [B, 1, n].

    Of several tensors (feature maps, auxiliary heads) every one counts the same, whatever its size and scale: each is
    divided by its norm, image by image.

    Args:
        output: of a model.
        output_fn: picks what matters from it; a tensor, or several.

    Raises:
        InvalidInput: there is no tensor in it.
    """
    picked = output if output_fn is None else output_fn(output)
    found = tensors_of(picked)
    if not found:
        raise InvalidInput(
            "model output" if output_fn is None else "what output_fn returned",
            type(picked).__name__,
            "a tensor, or a tuple, list or dict of tensors",
            "Pass output_fn=lambda output: ... that picks the tensors to score.",
        )
    if len(found) == 1:
        return found[0]
    parts = [value.flatten(1) for value in found if value.ndim]
    return torch.cat([F.normalize(part, dim=1) for part in parts], 1)[:, None]


def first_tensor(output: Any) -> Tensor:
    """The tensor in a model's output, or the first of several: the logits, where there are labels to compare with."""
    return tensor_of(output, lambda several: tensors_of(several)[:1])
