"""What the authors would report: their FLOPs formula, and their fine-tune form, whose kernels are mixed on every pass.

In the formulas: N patches, P prefix tokens, D channels, h head dim, w^2 positions of a window.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from ..errors import ArchitectureMismatch
from ..flops import flops_by_module
from ..ops import Conv
from ..plan import Plan, Replace, parameter_count
from ..search.gates import GateCosts
from ..sites import AttentionSite, Claims
from ..transforms.apply import apply
from ..transforms.single_path import OPEN
from ..workbench import unwrap, working_copy
from .published import look


def paper_costs(model: nn.Module, claims: Claims) -> GateCosts:
    """The authors' FLOPs formula for a DeiT or Swin of any size.

    It counts a norm as one multiply-add per element, leaves the class token out of FFNs, and takes the last of n stages
    of a Swin to have 1 / 2^n of the patches in its final norm (4 times too many where n is 4). msa2conv's own counter
    is `count_flops`.

    Args:
        model: whose patch embedding and classes it reads.
        claims: its sites.

    Raises:
        ArchitectureMismatch: no patch embedding by a convolution.
    """
    mixers = {site.path: _mixer_costs(site) for site in claims.attentions}
    units = {site.path: 2 * site.layout.positions * site.dim for site in claims.ffns}
    rest = sum(fixed_terms(model, claims).values())
    hosts = sum(host for _, _, host in mixers.values()) + sum(site.hidden * units[site.path] for site in claims.ffns)
    return GateCosts(rest + hosts, rest, mixers, units)


def _mixer_costs(site: AttentionSite) -> tuple[int, int, int]:
    assert site.projections is not None
    n, d, h = site.layout.positions, site.dim, site.projections.head_dim
    window = site.layout.window
    tokens = n + site.layout.prefix
    seen = tokens if window is None else window[0] * window[1]
    return 2 * d * h * n, 10 * d * h * n, 4 * tokens * d**2 + 2 * tokens * seen * d


def fixed_terms(model: nn.Module, claims: Claims) -> dict[str, int]:
    """What no gate decides: {"embed", path of an attention: the norms of its block, "merge", "norm", "head"}."""
    embed = getattr(model, "patch_embed", None)
    projection = getattr(embed, "proj", None)
    if not isinstance(projection, nn.Conv2d):
        raise ArchitectureMismatch(
            "model", f"{type(model).__name__} without a convolution patch_embed.proj", "a DeiT or Swin of timm's",
            "Leave the paper's formula: msa2conv counts any model.",
        )  # fmt: skip
    sites = claims.attentions
    first, last = sites[0], sites[-1]
    patches, classes = first.layout.positions, int(getattr(model, "num_classes", 0))
    terms = {"embed": patches * projection.weight.numel()}
    if isinstance(getattr(embed, "norm", None), nn.LayerNorm):
        terms["embed"] += patches * first.dim
    for site in sites:
        terms[site.path] = 2 * site.dim * (site.layout.positions + site.layout.prefix)
    merged = [a for a, b in pairwise(sites) if a.dim != b.dim]
    terms["merge"] = sum(s.layout.positions * s.dim + s.layout.positions // 4 * 8 * s.dim**2 for s in merged)
    terms["norm"] = last.dim * patches // 2 ** (len(merged) + 1) if first.layout.window else 0
    terms["head"] = last.dim * classes
    return terms


def decisions(choices: Mapping[str, str]) -> dict[str, Tensor]:
    """Names of chosen options -> values of the gates that stand for them."""
    found = {}
    for path, name in choices.items():
        kept = int(name.split("/")[0]) if "/" in name else 0
        branch = "skip" if name == "identity" else name
        found[path] = torch.ones(kept) if kept else torch.tensor(OPEN[branch])
    return found


@dataclass(frozen=True)
class Figures:
    """Args:
    parameters_finetune: of the authors' fine-tune form: convolutions keep V, proj, head mixture and BatchNorm.
    parameters: of the merged form, which is our hybrid.
    paper_flops: by the authors' formula, the same for both forms.
    flops_finetune: by our counter: every pass mixes the kernels, 18 D^2 + 9 D per convolution.
    flops: of the merged form by our counter.
    layer_norm, batch_norm: part of both: what our counter charges for norms (5 and 2 per element).
    """

    parameters_finetune: int
    parameters: int
    paper_flops: int
    flops_finetune: int
    flops: int
    layer_norm: int
    batch_norm: int


def figures(plan: Plan, model: nn.Module, *, example_inputs: Tensor | None = None) -> Figures:
    """Count a Plan of this family as the authors would, and as we do.

    Args:
        plan: of `spvit.plan`, or another of skips, convolutions with a norm, attentions and FFN widths.
        model: the original that it applies to.
        example_inputs: as for `convert`.

    Raises:
        ArchitectureMismatch: the plan belongs to another model.
    """
    original = unwrap(model)
    hybrid = working_copy(apply(plan, original))
    work, seen = look(original, example_inputs)
    sites = {site.path: site for site in seen.claims.attentions}
    image = torch.zeros(1, *seen.input_size, device=next(hybrid.parameters()).device)
    counts = flops_by_module(hybrid, image)
    norms = {kind: sum(counts[p] for p, m in hybrid.named_modules() if isinstance(m, kind)) for kind in _NORMS}
    extra_parameters = extra_flops = 0
    for edit in plan.edits:
        if isinstance(edit, Replace) and isinstance(edit.spec, Conv):
            extra_parameters += _kept_parameters(sites[edit.path]) - _parameters(hybrid, edit.path)
            extra_flops += _mixing(sites[edit.path])
    return Figures(
        parameters_finetune=plan.parameters + extra_parameters,
        parameters=plan.parameters,
        paper_flops=round(float(paper_costs(work, seen.claims).flops(decisions(plan.choices)))),
        flops_finetune=counts[""] + extra_flops,
        flops=counts[""],
        layer_norm=norms[nn.LayerNorm],
        batch_norm=norms[nn.BatchNorm2d],
    )


_NORMS: tuple[type[nn.Module], ...] = (nn.LayerNorm, nn.BatchNorm2d)


def _kept_parameters(site: AttentionSite) -> int:
    """V, proj, head mixture and one BatchNorm."""
    named = site.projections
    assert named is not None
    inner = named.heads * named.head_dim
    return 2 * inner * site.dim + inner + site.dim + 9 * named.heads + 2 * named.head_dim


def _mixing(site: AttentionSite) -> int:
    """Multiply-adds of nine head mixtures of W_v, b_v and W_o."""
    assert site.projections is not None
    inner = site.projections.heads * site.projections.head_dim
    return 9 * inner * (2 * site.dim + 1)


def _parameters(hybrid: nn.Module, path: str) -> int:
    return parameter_count(hybrid.get_submodule(path))
