"""The paper's search as a Search, from a dense model or from an authors' file, and the start of its fine-tuning."""

from __future__ import annotations

from torch import Tensor, nn
from torch.optim import AdamW

from ..errors import InvalidArgument, InvalidCheckpoint
from ..gate_search import Search, prepare as prepare_gates
from ..options import Option
from ..plan import Plan
from ..planning import make_plan
from ..search.gates import mixer_option, open_units
from ..transforms.gates import is_open
from ..transforms.single_path import NAMES
from .authors import Checkpoint, Source, family_of, theirs
from .checkpoint import host_tensors, thresholds
from .costs import paper_costs
from .published import FINETUNED
from .recipe import Recipe, config


def prepare(
    model: nn.Module, recipe: str | Recipe, *, steps: int | None = None, example_inputs: Tensor | None = None
) -> Search:
    """`msa2conv.prepare` as the paper has it: its gates, its penalty, its FLOPs.

    Args:
        model: a trained DeiT or Swin of timm's, of any size; it is not touched.
        recipe: name of a published architecture, or a Recipe (see `config`).
        steps: how many optimiser steps the search will take; the paper's penalty does not need to know.
        example_inputs: as for `convert`.

    Returns:
        A Search. Its `finish()` does not promise the target: the thresholds decide, as in the paper.

    Raises:
        As `msa2conv.prepare`; InvalidArgument for an unknown name.

    Example:
        recipe = msa2conv.spvit.config("deit_tiny")
        search = msa2conv.spvit.prepare(model, recipe)
        weights, gates = msa2conv.spvit.optimizers(search, recipe)
        ...  # loss = cross_entropy(search.model(images), labels) + search.penalty(), for recipe.search.epochs
        start = msa2conv.apply(msa2conv.spvit.finetune_plan(search), model)
    """
    recipe = config(recipe) if isinstance(recipe, str) else recipe
    costs = paper_costs if recipe.formula == "paper" else None
    target = f"{recipe.gflops:.9f}G"
    return prepare_gates(model, target, steps=steps, gates=recipe.gates, example_inputs=example_inputs, costs=costs)


def optimizers(search: Search, recipe: Recipe) -> tuple[AdamW, AdamW]:
    """The paper's two AdamW: one for weights (no decay on 1-d tensors), one for thresholds (no decay).

    Learning rates are those for batches of `recipe.batch_size`; both stay constant during the search.
    """
    gates = [gate.theta for gate in search.named_gates.values()]
    special = {id(theta) for theta in gates}
    weights = [p for p in search.model.parameters() if p.requires_grad and id(p) not in special]
    schedule = recipe.search
    groups = [
        {"params": [p for p in weights if p.ndim > 1], "weight_decay": schedule.weight_decay},
        {"params": [p for p in weights if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return AdamW(groups, lr=schedule.lr), AdamW(gates, lr=recipe.gate_lr, weight_decay=0.0)


def finetune_plan(search: Search) -> Plan:
    """What the paper fine-tunes after a search: `apply(plan, model)` starts from the *original* weights.

    The thresholds decide. A skipped attention returns LN1(x), Swin's convolutions see the whole map, and new
    convolutions start from every head mixed in equally, with a fresh BatchNorm.
    """
    seen, gates = search.inspection, search.named_gates
    choices = dict[str, Option]()
    for path, site in search.mixers.items():
        branch = NAMES[int(is_open(gates[path].theta.detach()).int().cumprod(0).sum())]
        choices[path] = mixer_option(site, branch, seen.costs, FINETUNED)
    for path, ffn in search.ffns.items():
        choices[path] = open_units(ffn, gates[path], seen.costs)
    plan, _ = make_plan(search.original, seen, choices)
    return plan


def load_search(
    source: Source,
    model: nn.Module,
    recipe: str | Recipe,
    *,
    steps: int | None = None,
    example_inputs: Tensor | None = None,
) -> Search:
    """Continue a search of the authors' code: weights, head mixtures, thresholds and BatchNorm of its search form.

    Args:
        source, model: as for `load_checkpoint`; the model stays what `finish` compares with.
        recipe, steps, example_inputs: as for `prepare`.

    Raises:
        InvalidCheckpoint, ArchitectureMismatch: as `load_checkpoint`; also where it is not of the search form.
        InvalidArgument: the recipe is of the other family.
    """
    recipe = config(recipe) if isinstance(recipe, str) else recipe
    search = prepare(model, recipe, steps=steps, example_inputs=example_inputs)
    claims = search.inspection.claims
    family = family_of(claims)
    if recipe.family != family:
        raise InvalidArgument(
            "recipe", f"{recipe.name!r}, which follows the authors' {recipe.family} code", f"one that follows {family}",
            "Take msa2conv.spvit.config of an architecture of the same family, with changes.",
        )  # fmt: skip
    checkpoint = Checkpoint(source, family)
    if checkpoint.form != "search":
        raise InvalidCheckpoint(
            checkpoint.where, f"SPViT's {checkpoint.form} form", "its search form (attn.kernel_thresholds)",
            "Read it with msa2conv.spvit.load_checkpoint.",
        )  # fmt: skip
    state = _state(search, checkpoint)
    checkpoint.check(claims)
    search.model.load_state_dict(state, strict=False)
    search.budget.step = 1  # it has run, elsewhere: `finish` may be called at once
    return search


def _state(search: Search, checkpoint: Checkpoint) -> dict[str, Tensor]:
    """{name in the supernet: value}."""
    own = search.model.state_dict()
    found = dict[str, Tensor]()
    for path, node in search.nodes.items():
        hosts = host_tensors(checkpoint, path, node.host.state_dict())
        found |= {f"{path}.host.{name}": value for name, value in hosts.items()}
        found[f"{path}.gate.theta"] = checkpoint.take(thresholds(checkpoint, path), 3)
    for path, unit in search.units.items():
        output = f"{path}.{search.ffns[path].output}"
        found[f"{output}.gate.theta"] = checkpoint.take(f"{path}.ffn_thresholds", *unit.gate.theta.shape)
        for name, value in unit.linear.state_dict().items():
            found[f"{output}.linear.{name}"] = checkpoint.take(f"{output}.{name}", *value.shape)
    for name, value in own.items():
        if name not in found and not name.endswith("gate.temperature"):
            found[name] = checkpoint.take(theirs(name, checkpoint.family), *value.shape)
    return found
