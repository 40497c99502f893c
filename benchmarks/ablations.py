"""What each design choice of the calibrated search is worth, on a real ViT-Ti/16.

    python -m benchmarks.ablations --weights vit_tiny_patch16_224.safetensors --photos imagenet_photos650.npz

Photos, split and model are those of benchmarks.photos; every row changes one thing. Times are processor seconds of all
threads, which other load disturbs least. `--variants` runs some of them and keeps the rows of the others.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import msa2conv
from msa2conv import FFN, AttentionSite, Calibration, FFNSite, Mixer, Option
from msa2conv.cost import CostModel
from msa2conv.errors import InfeasibleBudget
from msa2conv.levers.ridge import solve_ridge
from msa2conv.search.measure import distance, outputs
from msa2conv.search.replay import Replay
from msa2conv.search.solve import Choices
from msa2conv.sites import Site
from msa2conv.transforms.lift import HOST, Supernet, lift

from .common import packed_photos, split, vit_tiny, write
from .photos import top1

BATCH = 32


@dataclass
class Listening:
    """A lever that remembers how much the output listens to prefix rows, so that sites can be fitted again."""

    lever: FFN | Mixer
    heard: dict[str, float] = field(default_factory=dict)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.lever, name)

    def statistics(self, site: Site, host: nn.Module, prefix_weight: float, ridge_factor: float) -> Any:
        self.heard[site.path] = prefix_weight
        return self.lever.statistics(site, host, prefix_weight, ridge_factor)


@dataclass
class Searched:
    """A calibrated model and what made the calibration."""

    model: nn.Module
    images: Tensor
    levers: tuple[Listening, ...]
    calibration: Calibration
    sites: dict[str, Site]
    seconds: float

    @property
    def costs(self) -> CostModel:
        return self.calibration.costs


# --- From a calibration to a plan ----------------------------------------------------------------------------------


def planned(searched: Searched, budget: int) -> Choices:
    """What `convert` does."""
    return msa2conv.choose(searched.model, searched.calibration, budget, progress=False).choices


def added_up(searched: Searched, budget: int) -> Choices:
    """One knapsack on the plain sum of the scores."""
    options, costs = searched.calibration.options(), searched.costs
    return msa2conv.solve(options, costs.base - sum(costs.hosts[path] for path in options), budget)


def scored_again(searched: Searched, budget: int) -> Choices:
    """Score every option with the plan at all other sites, solve again, keep the better plan on held-out images."""
    calibration = searched.calibration
    before = msa2conv.choose(searched.model, calibration, budget, progress=False)
    net, records = lift(searched.model, searched.calibration.sites), []
    with net.pinned(net.branches(before.choices)):
        blocks = [site.block for site in searched.sites.values()]
        replay = Replay(net.model, blocks, list(torch.split(calibration.images, BATCH)))
        for record in calibration.records:
            site, found = searched.sites[record.site], dict[str, float]()
            for option in [record.options()[0], *record.to_measure()]:
                with tried(net, site, option):
                    found[option.name] = distance(calibration.reference, replay.run(site.block), calibration.measure)
            host = found.pop(record.options()[0].name)
            records.append(record.with_scores({name: max(0.0, score - host) for name, score in found.items()}))
    after = msa2conv.choose(searched.model, replace(calibration, records=records), budget, progress=False)
    return min(before, after, key=lambda choice: choice.distances[choice.price]).choices


@contextmanager
def tried(net: Supernet, site: Site, option: Option) -> Iterator[None]:
    """Run with `option` at one site, whatever is pinned there."""
    node, gate = net.nodes[site.path], net.nodes[site.path].gate
    if option.edits:
        node.add("tried", net.branch(option))
    node.gate = "tried" if option.edits else HOST
    try:
        yield
    finally:
        if option.edits:
            node.remove("tried")
        node.gate = gate


def refitted(searched: Searched, budget: int, original: bool) -> Choices:
    """The options of the plan, fitted again in execution order on what arrives behind those already in place.

    The regression target is what the host makes of the new input, or what it made of the original one (`original`).
    """
    choices = planned(searched, budget)
    net, branches = lift(searched.model, searched.calibration.sites), dict[str, nn.Module]()
    batches = torch.split(searched.calibration.without_held_out(searched.images), BATCH)
    for path, option in choices.items():
        if option.edits:
            site, host = searched.sites[path], net.nodes[path].host
            with net.pinned(branches):
                now = [at(net, site, batch) for batch in batches]
            targets = [at(net, site, batch)[1] for batch in batches] if original else [out for _, out in now]
            choices[path] = fitted_again(searched, site, host, option, now, targets)
            branches[path] = net.branch(choices[path])
    return choices


Seen = tuple[Tensor, Tensor]  # input (of an FFN: its hidden units) and output of a site on a batch


class Reached(Exception):
    """Ends a forward pass at the site of interest."""


@torch.no_grad()
def at(net: Supernet, site: Site, batch: Tensor) -> Seen:
    """What the host at a site sees and makes of a batch; nothing behind it runs."""
    seen: list[Seen] = []

    def stop(_module: nn.Module, args: Any, out: Tensor) -> None:
        seen.append((args[0], out))
        raise Reached

    handle = net.nodes[site.path].host.register_forward_hook(stop)
    try:
        net.model(batch)
    except Reached:
        pass
    finally:
        handle.remove()
    return seen[0]


def fitted_again(
    searched: Searched, site: Site, host: nn.Module, option: Option, now: list[Seen], targets: list[Tensor]
) -> Option:
    lever = next(lever for lever in searched.levers if lever.applies(site))
    weight, prefix = lever.heard[site.path], site.layout.prefix
    if isinstance(site, FFNSite):
        host = aimed(host, site, now, targets, weight)
    statistics = lever.lever.statistics(site, host, weight, 1.0)
    for (x, out), target in zip(now, targets, strict=True):
        if isinstance(site, AttentionSite):  # the prefix keeps its own attention, which has nothing to fit
            target = torch.cat((out[:, :prefix], target[:, prefix:]), 1)
        statistics.update(x, target)
    return next(again for again in statistics.fit(host, searched.costs).options() if again.name == option.name)


def aimed(host: Any, site: FFNSite, now: list[Seen], targets: list[Tensor], weight: float) -> nn.Module:
    """A copy of an FFN's output layer that also adds a ridge regression of what its output misses of the target."""
    hidden_BNK = torch.cat([hidden for hidden, _ in now])
    missing_BNO = torch.cat(targets) - torch.cat([out for _, out in now])
    weights_BN = torch.ones(hidden_BNK.shape[:2])
    weights_BN[:, : site.layout.prefix] = weight
    weights_L1 = (weights_BN / weights_BN.sum()).reshape(-1, 1)
    hidden_LK, missing_LO = hidden_BNK.flatten(0, 1), missing_BNO.flatten(0, 1)
    mean_K, mean_O = (weights_L1 * hidden_LK).sum(0), (weights_L1 * missing_LO).sum(0)
    centred_LK = hidden_LK - mean_K
    weighted_KL = (weights_L1 * centred_LK).T
    change_KO = solve_ridge(
        (weighted_KL @ centred_LK).double(), (weighted_KL @ (missing_LO - mean_O)).double(), FFN().ridge
    ).float()
    host = copy.deepcopy(host)
    with torch.no_grad():
        host.weight += change_KO.T
        host.bias += mean_O - mean_K @ change_KO
    return host


# --- The variants --------------------------------------------------------------------------------------------------

DEFAULT = (Mixer(), FFN())
VARIANTS: dict[str, tuple[tuple[Mixer | FFN, ...], Callable[[Searched, int], Choices]]] = {
    "default": (DEFAULT, planned),
    "one knapsack on the sum of scores": (DEFAULT, added_up),
    "scored again around the plan": (DEFAULT, scored_again),
    "refitted in order to the host's output": (DEFAULT, partial(refitted, original=False)),
    "refitted in order to the original's output": (DEFAULT, partial(refitted, original=True)),
    "Mixer(prefix='ridge')": ((Mixer(prefix="ridge"), FFN()), planned),
    "Mixer(context=False)": ((Mixer(context=False), FFN()), planned),
    "Mixer(rank=0.5)": ((Mixer(rank=0.5), FFN()), planned),
    "Mixer(rank=2.0)": ((Mixer(rank=2.0), FFN()), planned),
    "Mixer(ops=('skip',))": ((Mixer(ops=("skip",)), FFN()), planned),
    "FFN(weigh_prefix=False)": ((Mixer(), FFN(weigh_prefix=False)), planned),
    "mixer lever only": ((Mixer(),), planned),
    "ffn lever only": ((FFN(),), planned),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--targets", type=float, nargs="+", default=[0.8, 0.7])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--images", type=int, default=256, help="photos that calibrate; the others evaluate")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    model = vit_tiny(args.weights)
    images, labels = packed_photos(args.photos)
    fit, held_out = split(len(images), args.images, args.seed)
    x, y = images[held_out], labels[held_out]
    reference = outputs(model, x)
    dense = top1(reference, y)
    sites = {site.path: site for site in msa2conv.inspect(model).claims.sites}

    @cache
    def search(levers: tuple[Mixer | FFN, ...]) -> Searched:
        listening = tuple(map(Listening, levers))
        started = time.process_time()
        calibration = msa2conv.calibrate(model, images[fit], levers=listening, seed=args.seed)
        return Searched(model, images[fit], listening, calibration, sites, time.process_time() - started)

    rows: list[dict[str, Any]] = []
    for variant in args.variants:
        levers, plan = VARIANTS[variant]
        searched = search(levers)
        for target in args.targets:
            started = time.process_time()
            try:
                choices = plan(searched, int(target * searched.costs.base))
            except InfeasibleBudget:
                rows.append({"variant": variant, "target": target, "FLOPs kept": "below the floor"})
                continue
            seconds = time.process_time() - started
            rows.append({"variant": variant, "target": target, **measured(searched, choices, x, y, reference, dense)})
            rows[-1] |= {"calibration CPU s": round(searched.seconds), "plan CPU s": round(seconds)}
            rows[-1]["choices"] = {path: option.name for path, option in choices.items()}
            print(rows[-1], flush=True)
            write(
                "ablations",
                "python -m benchmarks.ablations --weights vit_tiny_patch16_224.safetensors "
                "--photos imagenet_photos650.npz",
                args.seed,
                rows,
                f"ViT-Ti/16 (timm augreg_in21k_ft_in1k), calibrated on {len(fit)} ImageNet validation photos and "
                f"evaluated on {len(y)} others (original {dense}), without training. One choice changed at a time. "
                "Paired differences in top-1 of about a point are noise; KL separates more finely.",
                key="variant",
            )


def measured(
    searched: Searched, choices: Choices, x: Tensor, y: Tensor, reference: Tensor, dense: float
) -> dict[str, Any]:
    net, hosts = lift(searched.model, searched.calibration.sites), searched.costs.hosts
    with net.pinned(net.branches(choices)):
        found = outputs(net.model, x)
    flops = searched.costs.base + sum(option.flops - hosts[path] for path, option in choices.items())
    return {
        "FLOPs kept": round(flops / searched.costs.base, 4),
        "top-1": top1(found, y),
        "lost": round(dense - top1(found, y), 1),
        "KL": round(distance(reference, found, "kl"), 3),
    }


if __name__ == "__main__":
    main()
