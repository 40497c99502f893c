"""Try an adapter: does what it says about a model hold?"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .adapters.base import Adapter
from .adapters.trial import FAR, displaced, projections_hold
from .api import convert
from .errors import InvalidArgument, LawViolation
from .flops import count_flops
from .inspection import inspect
from .laws import check_same
from .options import Option
from .plan import weights_sha256
from .planning import make_plan
from .report.inspection import Inspection
from .search.measure import tensor_of
from .sites import Claims
from .storage import load
from .transforms.apply import apply
from .transforms.lift import lift
from .workbench import working_copy


@dataclass(frozen=True)
class Checks:
    """What was tried, and what came out; `print` it.

    Args:
        seen: the inspection, with the sites that the adapter claims.
        figures: {law: largest difference, share or count}.
    """

    seen: Inspection
    figures: dict[str, float]

    def __str__(self) -> str:
        width = max(map(len, self.figures))
        return "\n".join([str(self.seen), "", *(f"{law:<{width}}  {value:.3g}" for law, value in self.figures.items())])


def check_adapter(
    adapter: Adapter | Iterable[Adapter], model: nn.Module, inputs: Tensor, *, local: bool = True
) -> Checks:
    """Run the laws on every site that an adapter claims in a model.

    Of every shape of site every option is built (of those that merge, whatever runs on fewer tokens and every number of
    tokens, once each): it must compute what the supernet does with that choice and cost what it says. A hybrid is
    saved, loaded and run on single images. Tokens must lie where the Layout says, stated projections must be the
    projections, and the model must come out untouched. Takes a small model seconds.

    Args:
        adapter: one, or several that share the model.
        model: a small configuration of the backbone, with random or trained weights.
        inputs: at least 8 images [B, C, H, W].
        local: whether everything but the claimed attentions is local, so that places can be checked; False for
            backbones that mix the whole map in other ways too.

    Returns:
        Checks.

    Raises:
        LawViolation: names the law and the site.
        NoSitesFound, InvalidArgument and the errors of `convert`.

    Example:
        checks = msa2conv.testing.check_adapter(mine, SmallNet(), torch.randn(8, 3, 64, 64))
    """
    if not isinstance(inputs, Tensor) or inputs.ndim != 4 or len(inputs) < 8:
        raise InvalidArgument(
            "inputs", f"{tuple(inputs.shape) if isinstance(inputs, Tensor) else type(inputs).__name__}",
            "at least 8 images [B, C, H, W]", "Pass for example torch.randn(8, 3, 64, 64).",
        )  # fmt: skip
    adapters = tuple(adapter) if isinstance(adapter, Iterable) else (adapter,)
    before, mode = weights_sha256(model), model.training
    seen = inspect(model, example_inputs=inputs[:1], adapters=adapters)
    work = working_copy(model)
    target = max(0.8, 1.02 * seen.floor / seen.costs.base)
    result = convert(work, min(target, 0.99), data=inputs, example_inputs=inputs[:1], adapters=adapters, progress=False)
    assert result.calibration is not None
    figures: dict[str, float] = {"sites": len(seen.claims.sites)}
    figures |= {law: value for law, value in result.report.laws.items() if law in ("lifting", "budget used")}
    figures["lowering, every option"] = _options(work, seen, result.calibration.options(), inputs[:2])
    figures["saved and loaded"] = _round_trip(result, work, inputs[:2])
    figures["alone or in a batch"] = _alone(result.model, inputs[:2])
    if local:
        figures["tokens off by, of a side"] = _in_place(work, seen.claims, inputs[:1])
    figures["projections tried"] = _projections(work, seen, inputs[:1])
    _demand(weights_sha256(model) == before and model.training == mode, "law 6, the model is never touched", "a change")
    return Checks(seen, figures)


def _demand(holds: bool, law: str, found: str, expected: str = "none") -> None:
    if not holds:
        raise LawViolation(law, found, expected, "Look at the adapter's declaration of this site.")


@torch.no_grad()
def _options(work: nn.Module, seen: Inspection, options: dict[str, list[Option]], inputs: Tensor) -> float:
    """Laws 2 and 3 for every option of one site of every shape; of those that merge, for everything that runs on fewer
    tokens once, and for every number of tokens once.
    """
    net, tried, worst = lift(work, seen.claims.sites), set[Any](), 0.0
    for site in seen.claims.sites:
        shape = (type(site), seen.costs.shapes[site.path], seen.costs.hosts[site.path])
        if shape in tried or site.path not in options:
            continue
        tried.add(shape)
        for option in _each_way(options[site.path]):
            plan, tensors = make_plan(work, seen, {site.path: option})
            hybrid = apply(plan, work, tensors)
            with net.pinned(net.branches({site.path: option})) as pinned:
                worst = max(worst, check_same(f"law 2 at {site.path}: {option.name}", hybrid(inputs), pinned(inputs)))
            counted = count_flops(hybrid, inputs)
            law = f"law 3, a plan costs what it says, at {site.path}: {option.name}"
            _demand(counted == plan.flops, law, f"{counted:,}", f"{plan.flops:,}")
    return worst


def _each_way(options: Iterable[Option]) -> Iterator[Option]:
    """Without those that merge as one option does what another one runs on fewer tokens, too."""
    seen = set[tuple[str, Any]]()
    for option in options:
        ways = {("itself", option.name)}
        if option.inner is not None:
            ways = {("inside", option.inner.name), ("tokens", option.name.removeprefix(option.inner.name))}
        if not ways <= seen:
            yield option
        seen |= ways


@torch.no_grad()
def _round_trip(result: Any, work: nn.Module, inputs: Tensor) -> float:
    with tempfile.TemporaryDirectory() as folder:
        again = load(result.save(Path(folder) / "hybrid.safetensors"), work)
    found, expected = tensor_of(again(inputs)), tensor_of(result.model(inputs))
    _demand(torch.equal(found, expected), "law 5, a plan round-trips", "other bits after loading", "the same bits")
    return 0.0


@torch.no_grad()
def _alone(hybrid: nn.Module, inputs: Tensor) -> float:
    together, alone = tensor_of(hybrid(inputs))[:1], tensor_of(hybrid(inputs[:1]))
    return check_same("law 8, batch invariance", together, alone)


@torch.no_grad()
def _in_place(work: nn.Module, claims: Claims, inputs: Tensor) -> float:
    found = max(displaced(work, claims.attentions, inputs).values())
    hint = f"tokens {found:.0%} of a side away from their place"
    expected = f"at most {FAR:.0%}; pass local=False if other layers mix the whole map"
    _demand(found <= FAR, "law 7, tokens lie where the Layout says", hint, expected)
    return found


@torch.no_grad()
def _projections(work: nn.Module, seen: Inspection, inputs: Tensor) -> int:
    tried: dict[Any, str] = {}
    for site in seen.claims.attentions:
        if site.projections is not None:
            tried.setdefault((site.dim, type(work.get_submodule(site.path))), site.path)
    sites = {site.path: site for site in seen.claims.attentions}
    for path in tried.values():
        given: list[Any] = []
        host = work.get_submodule(path)
        handle = host.register_forward_pre_hook(lambda _m, *call, g=given: g.append(call), with_kwargs=True)
        work(inputs)
        handle.remove()
        named = sites[path].projections
        assert named is not None
        found = "weights that are not its W_v and W_o by heads"
        _demand(projections_hold(host, named, given[0]), f"the projections of {path}", found, "those that it uses")
    return len(tried)


__all__ = ["Checks", "check_adapter"]
