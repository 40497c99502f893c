"""Calibrated search: fit every option in closed form, measure what each costs in accuracy. No gradients, no labels."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..cost import CostModel
from ..errors import NonFiniteValue
from ..levers import Lever, Record, Statistics, stream_record
from ..plan import fingerprint, weights_sha256
from ..progress import track
from ..sites import AttentionSite, Claims, FFNSite, Site
from ..transforms.lift import Supernet, lift
from .calibration import Calibration
from .measure import Measure, OutputFn, default_measure, distance
from .replay import Replay
from .resume import Journal

BATCH = 32
_STATISTICS_BYTES = 2 * 2**30  # sites whose sums do not fit together are gathered in several passes over the images
_WORST = 1e3  # stands for "broke the network", so that scores stay finite
_PROBE = 0.1  # size of the perturbation that asks how much the output listens to prefix rows


def calibrate_sites(
    model: nn.Module,
    claims: Claims,
    costs: CostModel,
    images: Tensor,
    levers: Iterable[Lever],
    *,
    source: str = "data",
    seed: int = 0,
    progress: bool = True,
    resume: str | os.PathLike[str] | None = None,
    output_fn: OutputFn | None = None,
) -> Calibration:
    """Fit the options of every site on three quarters of the images and score them on the others.

    Args:
        model: float32, in eval mode; not touched.
        claims, costs: its sites and what they cost.
        images: [n, C, H, W].
        levers: what may change.
        source: where the images come from, for the report.
        seed: decides which images are held out.
        progress: show bars.
        resume: a folder that holds what is done, from which an interrupted calibration continues.
        output_fn: picks what is scored from the model's output.

    Raises:
        NonFiniteValue: an activation is NaN or Inf; names the site.
        InvalidArgument: `resume` belongs to a calibration of other inputs.
    """
    levers = tuple(levers)
    journal = Journal(resume, model, claims.sites, images, levers, seed)
    device = next(model.parameters()).device
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    held_out = max(2, min(64, len(images) // 4))
    scoring, fitting = images[order[:held_out]], images[order[held_out:]]
    warnings, ridge_factor = [], 1.0
    if len(images) < 64:
        ridge_factor = 10.0
        warnings.append(f"only {len(images)} calibration images: ridges are 10x stronger, expect a worse fit")

    net = lift(model, claims.sites)
    chosen = [(site, lever) for site in claims.sites for lever in levers if lever.applies(site)]
    batches = [batch.to(device) for batch in torch.split(scoring, BATCH)]
    replay = Replay(net.model, [site.block for site in claims.sites], batches, output_fn)
    if not torch.isfinite(replay.reference).all():
        with _listening(net, list(claims.sites), {}), torch.no_grad():
            for batch in replay.batches:
                net.model(batch)
    measure = default_measure(model, replay.reference)
    with journal:
        for site, _ in track(chosen, "listen", progress):
            if isinstance(site, FFNSite) and site.path not in journal.prefix_weights:
                journal.prefix_weights[site.path] = _prefix_weight(net, replay, site, measure, seed)
                journal.save_now_and_then()
        fitted = _fit(net, chosen, costs, torch.split(fitting, BATCH), ridge_factor, journal, progress)
        stream = stream_record(claims, costs, levers)
        jobs = [option for record in fitted for option in record.to_measure()]
        jobs += [] if stream is None else stream.to_measure()
        for option in track(jobs, "score", progress):
            scores = journal.scores.setdefault(option.site, {})
            if option.name not in scores:
                with net.pinned({option.site: net.branch(option)}):
                    output = replay.run(net.sites[option.starts_at or option.site].block)
                scores[option.name] = min(_WORST, max(0.0, distance(replay.reference, output, measure)))
                journal.save_now_and_then()
    return Calibration(
        fingerprint=fingerprint(model),
        weights=weights_sha256(model),
        costs=costs,
        records=[record.with_scores(journal.scores.get(record.site, {})) for record in fitted],
        images=scoring,
        reference=replay.reference.cpu(),
        measure=measure,
        source=source,
        fitted=len(fitting),
        seconds=journal.seconds,
        warnings=warnings,
        stream=None if stream is None else stream.with_scores(journal.scores.get(stream.at.path, {})),
    )


def _fit(
    net: Supernet,
    chosen: list[tuple[Site, Lever]],
    costs: CostModel,
    batches: Iterable[Tensor],
    ridge_factor: float,
    journal: Journal,
    progress: bool,
) -> list[Record]:
    """The fitted options of every lever at every site, read where an earlier run has fitted them."""
    device = next(net.model.parameters()).device
    keys = [(site.path, lever.name) for site, lever in chosen]
    weights = {site.block: journal.prefix_weights[site.path] for site, _ in chosen if isinstance(site, FFNSite)}
    fitted = {key: journal.read(site, key[1], costs) for key, (site, _) in zip(keys, chosen, strict=True)}
    for group in _groups([each for key, each in zip(keys, chosen, strict=True) if fitted[key] is None]):
        statistics: dict[str, dict[str, Statistics]] = {site.path: {} for site, _ in group}
        for site, lever in group:
            weight, host = weights.get(site.block, 1.0), net.nodes[site.path].host
            statistics[site.path][lever.name] = lever.statistics(site, host, weight, ridge_factor)
        with _listening(net, [site for site, _ in group], statistics), torch.no_grad():
            for batch in track(batches, "observe", progress):
                net.model(batch.to(device))
        for site, lever in track(group, "fit", progress):
            made = statistics[site.path].pop(lever.name).fit(net.nodes[site.path].host, costs)
            fitted[site.path, lever.name] = made
            journal.keep(made, lever.name)
    return [record for key in keys if (record := fitted[key]) is not None]


def _groups(chosen: list[tuple[Site, Lever]]) -> Iterator[list[tuple[Site, Lever]]]:
    """Consecutive sites whose statistics fit into memory together."""
    group: list[tuple[Site, Lever]] = []
    total = 0
    for site, lever in chosen:
        size = lever.memory(site)
        if group and total + size > _STATISTICS_BYTES:
            yield group
            group, total = [], 0
        group.append((site, lever))
        total += size
    if group:
        yield group


@contextmanager
def _listening(net: Supernet, sites: list[Site], statistics: Mapping[str, Mapping[str, Statistics]]) -> Iterator[None]:
    """Feed the statistics from hooks on the hosts of a lifted copy, and on whole FFNs of it."""
    handles: list[Any] = []

    def hear(site: Site, module: nn.Module, name: str, every: Iterable[Statistics]) -> None:
        def see(_m: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
            x, out = args[0] if args else kwargs[name], out[0] if isinstance(out, tuple) else out
            if not torch.isfinite(out).all():
                raise NonFiniteValue(
                    site.path, "NaN or Inf in its output on the calibration images", "finite activations",
                    "Check the normalisation of the images, and the weights.",
                )  # fmt: skip
            for sums in every:
                sums.update(x, out)

        handles.append(module.register_forward_hook(see, with_kwargs=True))

    for site in {site.path: site for site in sites}.values():
        every = statistics.get(site.path, {}).values()
        whole, others = ([sums for sums in every if sums.whole_ffn is kind] for kind in (True, False))
        hear(site, net.nodes[site.path].host, site.io.x if isinstance(site, AttentionSite) else "", others)
        if whole and site.merging is not None:
            hear(site, net.model.get_submodule(site.path), site.merging.io.x, whole)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Perturbed(nn.Module):
    """The host with fixed noise of relative size `_PROBE` on some rows of its output."""

    def __init__(self, host: nn.Module, rows: slice, seed: int) -> None:
        super().__init__()
        self.host, self.rows, self.seed = host, rows, seed

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        out: Tensor = self.host(*args, **kwargs).clone()
        noise = torch.randn(out.shape, generator=torch.Generator().manual_seed(self.seed)).to(out)
        out[:, self.rows] += _PROBE * out.std() * noise[:, self.rows]
        return out


def _prefix_weight(net: Supernet, replay: Replay, site: FFNSite, measure: Measure, seed: int) -> float:
    """How much more the output listens to one prefix row than to one patch row, in 1..3000.

    Late in a ViT only the class token is read: a fit that counts it as one row of 197 would narrow the FFN for patches
    that nobody looks at. The answer is the ratio of the distances that equal noise on either kind of row causes.
    """
    prefix = site.layout.prefix
    if not prefix:
        return 1.0
    heard = []
    for rows in (slice(None, prefix), slice(prefix, None)):
        with net.pinned({site.path: _Perturbed(net.nodes[site.path].host, rows, seed)}):
            heard.append(distance(replay.reference, replay.run(site.block), measure))
    patches = site.layout.positions
    per_prefix, per_patch = heard[0] / prefix, heard[1] / patches
    return float(min(3000.0, max(1.0, per_prefix / max(per_patch, per_prefix / 3000.0, 1e-30))))
