"""The gate search as a handle for a user's own training loop: `prepare(model, target) -> Search`."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .adapters.base import Adapter
from .conversion import Conversion, decided_report
from .errors import ArchitectureMismatch, InvalidArgument, NonFiniteValue, SearchNotRun
from .inspection import Inspection, Levers, inspect_copy
from .laws import LIFTING, LOWERING, check_costs, check_same
from .levers import BY_GATES, FFN, Lever, Mixer, resolve_levers
from .observation import check_finite_weights
from .options import Option
from .plan import Plan, Slice
from .planning import make_plan, site_costs
from .search.gates import Budget, GateCosts, Gates, ffn_options, mixer_options, open_units, thresholded, window_layout
from .search.measure import default_measure, distance, outputs
from .search.solve import infeasible, solve
from .sites import Claims
from .targets import parse_target
from .transforms.apply import apply, replace_submodule
from .transforms.gates import Gate
from .transforms.single_path import OPEN, GatedLinear, SharedSupernode
from .workbench import example_input, own_randomness, unwrap, without_autocast, working_copy


@own_randomness()
def prepare(
    model: nn.Module,
    flops_target: float | str,
    *,
    steps: int | None = None,
    gates: Gates | None = None,
    levers: Levers | None = None,
    example_inputs: Tensor | None = None,
    adapters: Iterable[Adapter] | None = None,
    costs: GateCosts | Callable[[nn.Module, Claims], GateCosts] | None = None,
) -> Search:
    """Lift a copy of a trained model into a single-path supernet whose gates are learned in your own training loop.

    Every attention becomes a supernode (skip < 1x1 < 3x3 < attention) with kernels made from its own W_v and W_o; every
    hidden unit of an FFN gets a gate. See He et al., SPViT (TPAMI 2024).

    Args:
        model: as for `convert`; it is not touched.
        flops_target: as for `convert`.
        steps: how many optimiser steps the search will take. The budget then falls gradually; without it, at once.
        gates: how the search works.
        levers: "mixer" gates attentions, "ffn" hidden units; by default both. `FFN(round_to=..., min_keep=...)` bounds
            the final widths.
        example_inputs, adapters: as for `convert`.
        costs: what gates cost, where it is not the project's own counter: figures, or a function of (model, claims)
            such as `msa2conv.spvit.paper_costs`.

    Returns:
        A Search. Train `search.model` with `loss + search.penalty()`, then call `search.finish()`.

    Raises:
        InvalidTarget, InfeasibleBudget, InvalidArgument, NoSitesFound, InvalidInput, NonFiniteValue.

    Example:
        search = msa2conv.prepare(model, flops_target=0.7, steps=epochs * len(loader))
        optimizer = torch.optim.AdamW(search.param_groups(lr=5e-5))
        for images, labels in loader:
            loss = criterion(search.model(images), labels) + search.penalty()
            ...
        result = search.finish()
    """
    if steps is not None and (not isinstance(steps, int) or steps < 1):
        raise InvalidArgument("steps", repr(steps), "None or an integer >= 1", "Pass epochs * len(loader).")
    gates = Gates() if gates is None else gates
    if not isinstance(gates, Gates):
        raise InvalidArgument("gates", repr(gates), "Gates(...)", "For example gates=Gates(sampling='annealed').")
    parse_target(flops_target)
    original = unwrap(model)
    chosen = resolve_levers(levers, BY_GATES, BY_GATES)
    work = working_copy(original)
    seen = inspect_copy(work, original, example_input(work, example_inputs), chosen, adapters)
    if callable(costs):
        costs = costs(work, seen.claims)
    return Search(original, work, seen, parse_target(flops_target, seen.costs.base), gates, chosen, steps, costs)


class Search:
    """What a user's own loop holds.

    Args of the constructor are internal: make it with `prepare`.

    Attributes:
        model: the supernet to train, in train mode, float32, on the model's device; of the original's own class. Wrap,
            compile or move it as you like.
        target: multiply-adds allowed.
    """

    def __init__(
        self,
        original: nn.Module,
        work: nn.Module,
        seen: Inspection,
        target: int,
        gates: Gates,
        levers: tuple[Lever, ...],
        steps: int | None,
        costs: GateCosts | None,
    ) -> None:
        self.original, self._seen, self.target, self.gates = original, seen, target, gates
        self._ffn = next((FFN.model_validate(lever) for lever in levers if isinstance(lever, FFN)), None)
        mixer = any(isinstance(lever, Mixer) for lever in levers)
        self.mixers = {s.path: s for s in seen.claims.attentions if mixer and s.projections is not None}
        self.ffns = {s.path: s for s in seen.claims.ffns if self._ffn is not None}
        if not self.mixers and not self.ffns:
            raise InvalidArgument(
                "levers", "nothing that a gate can decide: no attention states its projections", "'mixer' or 'ffn'",
                "Give the adapter's AttentionSites their Projections, or use the calibrated search.",
            )  # fmt: skip
        if gates.exact and target < self._floor():
            raise infeasible(target, self._floor())
        costs = costs or GateCosts.measured(seen.costs, self.mixers, self.ffns, gates.windowed)
        self.budget = Budget(costs, target, gates, steps)
        self._lift(work)
        self._started = time.perf_counter()
        self.curve: list[dict[str, Any]] = []  # what a training has logged

    def _floor(self) -> int:
        costs = self._seen.costs
        saved = sum(costs.hosts[path] for path in self.mixers)
        for path, site in self.ffns.items():
            saved += costs.hosts[path] - (self._ffn or FFN()).cheapest(site, costs).flops
        return costs.base - saved

    def _lift(self, work: nn.Module) -> None:
        gates, self.model = self.gates, work
        frozen = {name for name, parameter in self.original.named_parameters() if not parameter.requires_grad}
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name not in frozen)
        self.nodes: dict[str, SharedSupernode] = {}
        self.units: dict[str, GatedLinear] = {}
        for path, site in self.mixers.items():
            host = self.model.get_submodule(path)
            layout = window_layout(site.layout) if gates.windowed else None
            gate = self._gate(host, 3, ordered=True)
            node = SharedSupernode(host, site, gate, gates.alpha, gates.offsets, layout, gates.skip_inactive)
            self.nodes[path] = node
            replace_submodule(self.model, path, node)
        for path, ffn in self.ffns.items():
            host = self.model.get_submodule(path)
            linear: Any = host.get_submodule(ffn.output)
            self.units[path] = GatedLinear(linear, self._gate(host, ffn.hidden))
            replace_submodule(host, ffn.output, self.units[path])
        self.model.train()

    def _gate(self, host: nn.Module, count: int, ordered: bool = False) -> Gate:
        gate = Gate(count, self.gates.init, ordered, self.gates.sampling)
        return gate.to(next(host.parameters()).device)

    @property
    def inspection(self) -> Inspection:
        """What was found in the original: its sites, and what they cost."""
        return self._seen

    @property
    def named_gates(self) -> dict[str, Gate]:
        """{site path: its gate}: three ordered thresholds of an attention, one per hidden unit of an FFN."""
        gates = {path: node.gate for path, node in self.nodes.items()}
        return gates | {path: node.gate for path, node in self.units.items()}

    def penalty(self) -> Tensor:
        """Add this to the loss, once per optimiser step; it also advances the search by a step.

        Returns:
            A scalar: multiplier * |FLOPs of the thresholded network - current budget| / (the original's FLOPs).
        """
        for gate in self.named_gates.values():
            gate.temperature.fill_(self.budget.temperature)
        return self.budget({path: gate.decision() for path, gate in self.named_gates.items()})

    @torch.no_grad()
    def flops(self) -> int:
        """Multiply-adds of the network that the thresholds stand for now (batch 1)."""
        return round(float(self.budget.costs.flops({p: gate.decision() for p, gate in self.named_gates.items()})))

    def param_groups(
        self, lr: float = 1e-4, gate_lr: float | None = None, weight_decay: float = 0.05
    ) -> list[dict[str, Any]]:
        """Parameter groups for an AdamW: weights, weights without decay (1-d tensors, head mixtures), and gates.

        Args:
            lr, weight_decay: of the weights.
            gate_lr: of the thresholds, which have no weight decay. By default so large that a threshold can close and
                open again several times within `steps`: 15 / steps, between 1e-3 (the paper's) and 0.1.
        """
        if gate_lr is None:
            gate_lr = min(0.1, max(1e-3, 15.0 / self.budget.steps)) if self.budget.steps else 1e-2
        gates = [gate.theta for gate in self.named_gates.values()]
        mixtures = [node.head_probs for node in self.nodes.values()]
        special = {id(parameter) for parameter in (*gates, *mixtures)}
        weights = [p for p in self.model.parameters() if id(p) not in special and p.requires_grad]
        return [
            {"params": [p for p in weights if p.ndim > 1], "lr": lr, "weight_decay": weight_decay},
            {"params": [*(p for p in weights if p.ndim <= 1), *mixtures], "lr": lr, "weight_decay": 0.0},
            {"params": gates, "lr": gate_lr, "weight_decay": 0.0},
        ]

    def decide(self) -> dict[str, Option]:
        """{site: option}: the most probable network under the gates that keeps the budget, by the exact solver.

        With `Gates(exact=False)`: the network that the thresholds stand for, whatever it costs.

        Raises:
            NonFiniteValue: NaN or Inf in the thresholds.
        """
        for path, gate in self.named_gates.items():
            if not torch.isfinite(gate.theta).all():
                raise NonFiniteValue(
                    f"{path} (gate)", "NaN or Inf in its thresholds", "finite numbers",
                    "Lower the learning rates, and resume from the last saved state.",
                )  # fmt: skip
        costs, options = self._seen.costs, dict[str, list[Option]]()
        for path, site in self.mixers.items():
            options[path] = mixer_options(site, self.nodes[path].gate, costs, self.gates)
        if not self.gates.exact:
            chosen = {path: thresholded(self.nodes[path].gate, group) for path, group in options.items()}
            return chosen | {path: open_units(site, self.units[path].gate, costs) for path, site in self.ffns.items()}
        for path, ffn in self.ffns.items():
            options[path] = ffn_options(ffn, self.units[path].gate, costs, self._ffn or FFN())
        return solve(options, costs.outside(options), self.target)

    @own_randomness()
    def finish(self, images: Tensor | None = None) -> Conversion:
        """Solve the budget exactly, lower into the plain hybrid, verify the laws.

        The weights are those that the search has trained. Call it again later for another look; nothing is consumed.

        Args:
            images: some images [n, C, H, W]; the report then says how far the hybrid is from the original on them.

        Raises:
            SearchNotRun: `penalty` was never called.
            NonFiniteValue: NaN or Inf in gates or weights.
            LawViolation: the result would have broken a guarantee.
        """
        if not self.budget.step:
            raise SearchNotRun(
                "Search.finish", "no step of the search: penalty() was never called", "at least one",
                "Train search.model with loss + search.penalty() first.",
            )  # fmt: skip
        choices = self.decide()
        check_finite_weights(self.model)
        trained = self.dense()
        plan, _ = make_plan(self.original, self._seen, choices)
        hybrid = apply(plan, trained, self._shared(choices))
        laws = self._verify(hybrid, trained, plan, choices)
        sites = site_costs(self._seen, choices)
        known: dict[str, Any] = {
            "target": self.target,
            "warnings": self._warnings(),
            "sites": sites,
            "search": self.curve,
        }
        if images is not None:
            reference, output = outputs(working_copy(self.original), images), outputs(hybrid, images)
            measure = default_measure(hybrid, output)
            known |= {"measure": measure, "distance": distance(reference, output, measure)}
        seconds = {"search": round(time.perf_counter() - self._started, 2)}
        device = next(hybrid.parameters()).device
        decided_by = f"a gate search of {self.budget.step} steps"
        report = decided_report(plan, decided_by, laws, seconds=seconds, device=device, **known)
        state = hybrid.state_dict()
        final = apply(plan, self.original)
        own = final.state_dict()
        final.load_state_dict({name: value.to(own[name]) for name, value in state.items()})
        return Conversion(final, plan, report, None, self.original)

    def dense(self) -> nn.Module:
        """A copy of the supernet with every gate open, as the original's plain module with the trained weights."""
        dense = without_autocast(copy.deepcopy(self.model))
        for path in self.mixers:
            replace_submodule(dense, path, dense.get_submodule(path).get_submodule("host"))
        for path, ffn in self.ffns.items():
            at = f"{path}.{ffn.output}"
            replace_submodule(dense, at, dense.get_submodule(at).get_submodule("linear"))
        return dense.float().eval().requires_grad_(False)

    def _shared(self, choices: Mapping[str, Option]) -> dict[str, Tensor]:
        """Merged kernels of the chosen convolutions, named as in the hybrid."""
        kernels = {path: int(o.name[4]) for path, o in choices.items() if o.name.startswith("conv")}
        nodes = {path: copy.deepcopy(self.nodes[path]).float() for path in kernels}
        return {f"{p}.{name}": v for p, k in kernels.items() for name, v in nodes[p].merged(k).items()}

    @contextmanager
    def pinned(self, choices: Mapping[str, Option]) -> Iterator[nn.Module]:
        """The supernet in eval mode with gates at `choices`, and open where there is none."""
        mode = self.model.training
        with ExitStack() as stack:
            for path, gate in self.named_gates.items():
                stack.enter_context(gate.pinned(self._values(path, choices.get(path))))
            self.model.eval()
            try:
                yield self.model
            finally:
                self.model.train(mode)

    def _values(self, path: str, option: Option | None) -> Tensor:
        if path in self.mixers:
            name = "attention" if option is None else option.name.replace("identity", "skip")
            return torch.tensor(OPEN[name], dtype=torch.float)
        site = self.ffns[path]
        values = torch.ones(site.hidden)
        for edit in () if option is None else option.edits:
            if isinstance(edit, Slice) and edit.path == f"{path}.{site.output}.weight":
                values.zero_()
                for start, stop in edit.kept:
                    values[start:stop] = 1
        return values

    @torch.no_grad()
    def _verify(
        self, hybrid: nn.Module, trained: nn.Module, plan: Plan, choices: Mapping[str, Option]
    ) -> dict[str, float]:
        device = next(trained.parameters()).device
        images = torch.randn(2, *self._seen.input_size, generator=torch.Generator().manual_seed(0)).to(device)
        laws = {"lifting": check_same(LIFTING, self._output({}, images), trained(images))}
        if all(option.name != "identity" for option in choices.values()):  # the paper's skip changes when lowered
            laws["lowering"] = check_same(LOWERING, hybrid(images), self._output(choices, images))
        target = self.target if self.gates.exact else None
        return laws | check_costs(hybrid, plan, choices, self._seen.costs, images[:1], target)

    def _output(self, choices: Mapping[str, Option], images: Tensor) -> Any:
        """Of the supernet pinned to `choices`, in float32 whatever it was trained in."""
        with self.pinned(choices) as net:
            return without_autocast(copy.deepcopy(net)).float()(images)

    def _warnings(self) -> list[str]:
        found = self._seen.warnings
        gates = [gate.theta.detach() for gate in self.named_gates.values()]
        if not any(bool((theta.sigmoid() > 0.5).any()) for theta in gates):
            found.append(
                "every gate had closed: the solver reopened the most probable ones; lower gate_lr or search longer"
            )
        return found

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers of the whole search, for `load_state_dict`."""
        return {"target": self.target, "budget": self.budget.state(), "model": self.model.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue a search that was prepared with the same model and arguments.

        Raises:
            ArchitectureMismatch: it belongs to another model or target.
        """
        own = {name: value.shape for name, value in self.model.state_dict().items()}
        given = {name: value.shape for name, value in state["model"].items()}
        if own != given or state["target"] != self.target:
            raise ArchitectureMismatch(
                "search state", f"{len(given)} tensors and target {state['target']:,}",
                f"the {len(own)} tensors of this supernet and target {self.target:,}",
                "Prepare the search with the model and arguments it was saved with.",
            )  # fmt: skip
        self.model.load_state_dict(state["model"])
        self.budget.load(state["budget"])
