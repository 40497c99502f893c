"""Passes over a finished Conversion that leave its outputs as they are, and make it quicker to run (law 9)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn

from .conversion import Conversion
from .data import views_or_noise
from .errors import InvalidArgument, LawViolation
from .flops import flops_by_module
from .laws import surest
from .observation import tensors_of
from .plan import Edit, Plan, Replace, parameter_count
from .transforms import fold_norm, fuse_qkv, merge_linear, tokenwise, unwindow
from .workbench import own_randomness, unwrap

Pass = Callable[[Plan, nn.Module], tuple[tuple[Edit, ...], nn.Module]]
PASSES: dict[str, Pass] = {
    "fold_norms": lambda plan, model: fold_norm.fold_norms(plan.edits, model),
    "merge_linear": lambda plan, model: merge_linear.merge_linear(plan.edits, model),
    "unwindow": lambda plan, model: unwindow.unwindow(plan.edits, model, plan.base.input_size),
    "tokenwise": lambda plan, model: tokenwise.tokenwise(plan.edits, model),
    "fuse_qkv": lambda plan, model: fuse_qkv.fuse_qkv(plan.edits, model),
}
LAW = "law 9, optional passes do not change the output"
_TOLERANCE = 1e-4  # of the largest output, in float32
_CHECKED = 4  # images


@own_randomness()
def streamline(
    conversion: Conversion, *, passes: Iterable[str] | None = None, images: Tensor | None = None
) -> Conversion:
    """Apply every exact pass that makes a hybrid quicker, and check that its outputs stay (law 9, 1e-4).

    "fold_norms": BatchNorms that a gate search has put in go into the convolutions beside them. "merge_linear": two
    convolutions with nothing in between become one where that takes fewer multiply-adds. "unwindow": a block whose
    windowed attention was replaced no longer cuts its map into windows. "tokenwise": 1x1 convolutions become linear
    layers where tokens lie in memory as those read them. "fuse_qkv": one layer makes q, k and v of a thin attention.
    For a network that is to run: `fold_norms` and `merge_linear` leave fewer parameters to train, and `finetune` wants
    its BatchNorms.

    Args:
        conversion: not touched; returned as it is where there is nothing to do.
        passes: which, in order; None: all.
        images: what to check it on [n, C, H, W], normalised as the model expects; by default photos that come with
            msa2conv. Those are taken whose merges are decided clearly.

    Returns:
        A Conversion whose plan describes the streamlined network; `report.streamlined` says at how many sites each pass
        did something.

    Raises:
        InvalidArgument: there is no such pass.
        LawViolation: the outputs would have changed.

    Example:
        result = msa2conv.streamline(msa2conv.convert(model, 0.7))
        print(result.report)
        msa2conv.export_onnx(result, "hybrid.onnx")
    """
    names = tuple(PASSES) if passes is None else tuple(passes)
    unknown = [name for name in names if name not in PASSES]
    if unknown:
        raise InvalidArgument("passes", repr(unknown[0]), f"some of {', '.join(PASSES)}", "None means all of them.")
    found, done = conversion, dict(conversion.report.streamlined)
    for name in names:
        before = found
        found = _applied(found, PASSES[name])
        sites = len(_changed(before.plan.edits, found.plan.edits))
        done |= {name: done.get(name, 0) + sites} if sites else {}
    if found is conversion:
        return conversion
    _check(unwrap(conversion.model), found.model, conversion.plan, images)
    return replace(found, report=found.report.model_copy(update={"streamlined": done}))


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
    return streamline(conversion, passes=("fold_norms",))


def _applied(conversion: Conversion, one: Pass) -> Conversion:
    model, plan = unwrap(conversion.model), conversion.plan
    edits, hybrid = one(plan, model)
    if edits == plan.edits:
        return conversion
    example = torch.zeros(1, *plan.base.input_size).to(next(hybrid.parameters()))
    counts = flops_by_module(hybrid, example)
    known = {"edits": edits, "flops": counts[""], "parameters": parameter_count(hybrid)}
    other = {edit.path for edit in _changed(plan.edits, edits)}
    sites = [
        site.model_copy(update={"after": counts[site.path]}) if site.path in other else site
        for site in conversion.report.sites
    ]
    figures = {"flops_after": known["flops"], "parameters_after": known["parameters"], "sites": sites}
    report = conversion.report.model_copy(update=figures)
    return replace(conversion, model=hybrid, plan=plan.model_copy(update=known), report=report)


def _changed(before: tuple[Edit, ...], after: tuple[Edit, ...]) -> list[Replace]:
    """One for every site where something was done."""
    return [edit for edit in after if isinstance(edit, Replace) and edit not in before]


@torch.no_grad()
def _check(before: nn.Module, after: nn.Module, plan: Plan, images: Tensor | None) -> None:
    one, other = (copy.deepcopy(model).eval() for model in (before, after))
    if images is None:
        images = views_or_noise(plan.base.input_size, plan.base.preprocessing)
    images = surest(one, images[:32].to(next(one.parameters())), _CHECKED)
    eps = torch.finfo(images.dtype).eps
    for found, expected in zip(tensors_of(other(images)), tensors_of(one(images)), strict=True):
        scale = max(1.0, float(expected.abs().max()))
        difference, tolerance = float((found - expected).abs().max()) / scale, max(_TOLERANCE, 10 * eps)
        if not difference <= tolerance:
            raise LawViolation(
                LAW, f"a difference of {difference:.2e}", f"at most {tolerance:.0e}",
                "The hybrid is as it was. Please report it, with the versions of torch and of the model's library.",
            )  # fmt: skip


__all__ = ["PASSES", "fold_norms", "streamline"]
