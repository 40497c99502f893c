"""The rules of a fair comparison, asserted for every run of every method.

Same budget to 1 %, on a physically small network that two counters agree on; accuracy, FLOPs and time of the very same
module; an image's answer does not depend on what else is in the batch.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from msa2conv.errors import Msa2ConvError
from msa2conv.laws import decision_margins
from msa2conv.plan import weights_sha256
from msa2conv.search.measure import first_tensor

TOLERANCE = 0.01  # of the budget
_COUNTERS = 0.01  # most that two counters may differ by: BatchNorms, which one leaves out
SAMPLE = 128  # images that the check of batches looks at
_DECIDED = 1e-10  # a merge decided by less may be decided otherwise in another batch, by rounding in float64
_CLOSE = 1e-6  # relative to the largest answer
_MOVED = 0.02  # of the answers: rivals that merge tokens cannot be asked how their merges are decided


class RuleBroken(Msa2ConvError, RuntimeError):
    """A method does not play by the rules; its result is not written."""


def check_budget(flops: int, budget: int, all_of_it: bool = True) -> None:
    """Within 1 % of what it may cost; or at most that, where a budget of time is kept as well."""
    if flops > (1 + TOLERANCE) * budget or (all_of_it and flops < (1 - TOLERANCE) * budget):
        raise RuleBroken(
            "budget", f"{flops:,} multiply-adds ({flops / budget:.1%} of the budget)",
            f"{budget:,} to 1 %", "Let the method use all of its budget, and no more.",
        )  # fmt: skip


def check_counters(flops: int, torch_flops: int) -> None:
    """Two counters agree on what the network costs."""
    if abs(flops - torch_flops) > _COUNTERS * flops:
        raise RuleBroken(
            "FLOPs", f"{flops:,} multiply-adds by msa2conv, {torch_flops:,} by torch.utils.flop_counter",
            f"the same to {_COUNTERS:.0%}", "Make the network physically small: masks and hooks do not count.",
        )  # fmt: skip


def check_same_network(model: nn.Module, digest: str) -> None:
    """The module that was measured is still the one whose digest was taken when it was finished."""
    if weights_sha256(model) != digest:
        raise RuleBroken(
            "network", "other weights than when its accuracy was measured", "one artefact for all figures",
            "Nothing may change a network after its training; does its forward write into its own buffers?",
        )  # fmt: skip


def check_parent(parent: nn.Module, digest: str) -> None:
    """No method touches the parent."""
    if weights_sha256(parent) != digest:
        raise RuleBroken("parent", "other weights than before", "the parent untouched", "Work on a copy.")


@torch.no_grad()
def check_batch_invariance(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, float]:
    """Accuracy at batch 1 == accuracy at batch 128 shuffled, and the answers are the same up to rounding.

    Token merging is discontinuous at ties, which rounding breaks in one way or another. So this is asked in float64:
    there next to nothing is a tie. What still is, of ours, may move and is counted in "undecided" instead.

    Args:
        model: in eval mode; a copy is asked.
        images, labels: at least a few.

    Returns:
        {"images": how many were compared, "undecided", "moved": shares, "accuracy": at either batch size}.

    Raises:
        RuleBroken: says both accuracies, or how many answers moved.
    """
    model = copy.deepcopy(model).double()
    images = images.to(next(model.parameters()))
    alone = torch.cat([first_tensor(model(image[None])) for image in images]).cpu()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    together = torch.empty_like(alone)
    for rows in order.split(128):
        together[rows] = first_tensor(model(images[rows])).cpu()
    margins = torch.cat([decision_margins(model, image[None]) for image in images]).cpu()
    decided = margins > _DECIDED
    right = [
        float((found.argmax(1) == labels)[decided].double().sum()) / max(1, int(decided.sum()))
        for found in (alone, together)
    ]
    moved = (alone - together).abs().amax(1) > _CLOSE * max(1.0, float(alone.abs().max()))
    if right[0] != right[1]:
        raise RuleBroken(
            "batch invariance", f"an accuracy of {right[0]:.2%} one by one and {right[1]:.2%} in shuffled batches",
            "equal ones", "Statistics of a batch must not reach its images; is the network in eval mode?",
        )  # fmt: skip
    if float((moved & decided).double().mean()) > _MOVED:
        raise RuleBroken(
            "batch invariance", f"{int((moved & decided).sum())} of {len(images)} answers that depend on the batch",
            f"at most {_MOVED:.0%} of them, at ties", "Statistics of a batch must not reach its images.",
        )  # fmt: skip
    return {
        "images": float(decided.sum()), "undecided": 1 - float(decided.double().mean()),
        "moved": float(moved.double().mean()), "accuracy": 100 * right[0],
    }  # fmt: skip
