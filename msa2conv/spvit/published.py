"""The seven architectures that the authors published, and the Plan of each."""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from ..adapters.build import create
from ..errors import ArchitectureMismatch, InvalidArgument
from ..inspection import Inspection, inspect_copy
from ..levers import resolve_levers
from ..options import Option
from ..plan import Plan
from ..planning import make_plan
from ..search.gates import Gates, mixer_option, width_option
from ..transforms.single_path import NAMES, Branch
from ..workbench import example_input, own_randomness, unwrap, working_copy

FINETUNED = Gates(skip="identity")  # how the paper lowers: skip is LN1(x), convolutions see the whole map
Unit = Annotated[int, Field(ge=0)]


class _Data(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Published(_Data):
    """Figures of the paper (ImageNet-1k, per cent; millions; GFLOPs); `_distilled` with hard distillation."""

    top1: float
    top5: float
    top1_distilled: float
    top5_distilled: float
    million_parameters: float
    gflops: float


class Searched(_Data):
    """How the authors found it: target, lambda, the epoch they picked by eye, and the drop path of its training."""

    gflops: float
    penalty: float
    gate_lr: float
    epoch: int
    drop_path: float


class Architecture(_Data):
    """What becomes of every attention and FFN of a network, in execution order.

    Args:
        name: what to call it.
        base: timm's name of the network it is made from.
        mixers: one letter per attention: `s` skip, `1` and `3` convolutions, `M` attention.
        ffn: hidden units kept per FFN: a number (the first so many), or their indices. The published files state only
            numbers; which units the authors kept is known for their released weights alone.
        search, figures: of the published ones.
    """

    name: str
    base: str
    mixers: Annotated[str, Field(pattern="^[s13M]+$")]
    ffn: tuple[Annotated[int, Field(ge=1)] | tuple[Unit, ...], ...]
    search: Searched | None = None
    figures: Published | None = None

    @property
    def family(self) -> Literal["deit", "swin"]:
        return "swin" if self.base.startswith("swin") else "deit"

    @property
    def branches(self) -> tuple[Branch, ...]:
        """The mixers by name."""
        return tuple(NAMES["s13M".index(letter)] for letter in self.mixers)

    @property
    def units(self) -> tuple[tuple[int, ...], ...]:
        """Indices of the hidden units kept per FFN."""
        return tuple(tuple(range(kept)) if isinstance(kept, int) else kept for kept in self.ffn)


@cache
def _architectures() -> tuple[Architecture, ...]:
    text = (files(__package__) / "published.json").read_text(encoding="utf-8")
    return tuple(Architecture.model_validate(entry) for entry in json.loads(text))


def published() -> dict[str, Architecture]:
    """The seven architectures that the authors published, by name.

    Example:
        >>> published()["deit_tiny"].mixers
        '11MMMMMMMMMM'
    """
    return {architecture.name: architecture for architecture in _architectures()}


def architecture(name: str) -> Architecture:
    """A published architecture; raises InvalidArgument naming all of them."""
    known = published()
    if name not in known:
        raise InvalidArgument(
            "name", repr(name), f"one of {', '.join(known)}", "msa2conv.spvit.published() lists them."
        )
    return known[name]


def plan(name: str | Architecture, model: nn.Module | None = None, *, example_inputs: Tensor | None = None) -> Plan:
    """The Plan of a published architecture, or of your own: skipped attentions return LN1(x), as the authors' do.

    Args:
        name: of a published architecture (`published()` lists them), or an Architecture.
        model: what the plan will be applied to; by default the architecture's own network without weights, so that the
            plan applies to timm's model of that name with 1000 classes.
        example_inputs: as for `convert`.

    Returns:
        A Plan. `apply(plan, model)` is the start of the paper's fine-tuning: new convolutions are made from the model's
        own W_v and W_o, every head mixed in equally, with a fresh BatchNorm; FFNs keep the rows of the chosen units.

    Raises:
        InvalidArgument: no such name.
        ArchitectureMismatch: the model has other attentions or FFNs than the architecture.

    Example:
        model = timm.create_model("deit_tiny_patch16_224", pretrained=True)
        start = msa2conv.apply(msa2conv.spvit.plan("deit_tiny", model), model)
    """
    wanted = architecture(name) if isinstance(name, str) else name
    with own_randomness():
        original = unwrap(create(wanted.base) if model is None else model)
        _, seen = look(original, example_inputs)
        found, _ = make_plan(original, seen, _choices(wanted, original, seen))
    if model is None:  # the weights were made at random: there is nothing to name them by
        found = found.model_copy(update={"base": found.base.model_copy(update={"weights_sha256": ""})})
    return found


def look(original: nn.Module, example_inputs: Tensor | None) -> tuple[nn.Module, Inspection]:
    """(a float32 copy in eval mode, its inspection)."""
    work = working_copy(original)
    levers = resolve_levers(("mixer", "ffn"))
    return work, inspect_copy(work, original, example_input(work, example_inputs), levers, None)


def _choices(wanted: Architecture, model: nn.Module, seen: Inspection) -> dict[str, Option]:
    attentions, ffns = seen.claims.attentions, seen.claims.ffns
    widest = [max(units, default=-1) + 1 for units in wanted.units]
    hidden = [site.hidden for site in ffns]
    fits = len(widest) == len(hidden) and all(a <= b for a, b in zip(widest, hidden, strict=True))
    if len(attentions) != len(wanted.mixers) or not fits or 0 in widest:
        raise ArchitectureMismatch(
            "model",
            f"{type(model).__name__} with {len(attentions)} attentions and FFNs of {_runs(hidden)} hidden units",
            f"the {len(wanted.mixers)} attentions of {wanted.base}, and FFNs that hold the {_runs(widest)} units "
            f"kept by {wanted.name}",
            f"Build the model with timm.create_model({wanted.base!r}).",
        )
    chosen = {
        site.path: mixer_option(site, branch, seen.costs, FINETUNED)
        for site, branch in zip(attentions, wanted.branches, strict=True)
    }
    for site, units in zip(ffns, wanted.units, strict=True):
        chosen[site.path] = width_option(site, list(units), seen.costs)
    return chosen


def _runs(numbers: list[int]) -> str:
    """[384, 384, 768] -> '2 x 384, 768'."""
    starts = [i for i, number in enumerate(numbers) if i == 0 or numbers[i - 1] != number]
    lengths = [stop - start for start, stop in zip(starts, [*starts[1:], len(numbers)], strict=True)]
    pairs = zip(starts, lengths, strict=True)
    return ", ".join(str(numbers[start]) if length == 1 else f"{length} x {numbers[start]}" for start, length in pairs)
