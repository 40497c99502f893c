"""Budgets of time on a real ViT-Ti/16: whether they are met, after how many corrections, and what is left of accuracy.

    python -m benchmarks.milliseconds --weights vit_tiny_patch16_224.safetensors --photos imagenet_photos650.npz

One calibration on 256 photos with every lever; then conversions to fractions of the original's time at each batch size,
with the default levers and with all. The network that comes out is timed once more beside the original, in a run of
its own. `--calibration` keeps the calibration, as in benchmarks.levers.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch

import msa2conv
from msa2conv.errors import InfeasibleBudget
from msa2conv.evaluate import latency
from msa2conv.search.measure import distance, outputs

from .common import against, packed_photos, split, vit_tiny, write
from .levers import INSIDE, VARIANTS, calibrated, order, restricted

SHOWN = ("the default", INSIDE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--targets", type=float, nargs="*", default=[0.8, 0.6])
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 32])
    parser.add_argument("--levers", nargs="*", choices=VARIANTS, default=list(SHOWN))
    parser.add_argument("--images", type=int, default=256, help="photos that calibrate; the others evaluate")
    parser.add_argument("--calibration", type=Path, help="where it is kept, and read if it is there")
    parser.add_argument("--timetable", type=Path, help="where times are kept")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    model = vit_tiny(args.weights).to(args.device)
    images, labels = packed_photos(args.photos)
    fit, held_out = split(len(images), args.images, args.seed)
    x, y = images[held_out], labels[held_out]
    reference = outputs(model, x)
    calibration = calibrated(model, images[fit], args.calibration, args.seed)
    for batch in args.batches:
        for levers in args.levers:
            own = restricted(calibration, VARIANTS[levers])
            for target in args.targets:
                row: dict[str, Any] = {"row": f"{batch} {levers} {target}", "batch": batch, "levers": levers}
                row |= {"asked": f"{target:.0%}"}
                started = time.perf_counter()
                try:
                    result = msa2conv.convert(
                        model, latency_target=target, batch_size=batch, levers=VARIANTS[levers], calibration=own,
                        timetable=args.timetable,
                    )  # fmt: skip
                except InfeasibleBudget as error:
                    row |= {"measured": "", "again": "", "tried": f"refused: {error.expected}"}
                else:
                    row |= measured(result, model, x, batch)
                    found = outputs(result.model, x)
                    row |= {"FLOPs": f"{result.plan.flops / result.plan.base.flops:.3f}"}
                    row |= against(reference, found, y) | {"KL": round(distance(reference, found, "kl"), 4)}
                row |= {"seconds": round(time.perf_counter() - started)}
                print(row, flush=True)
                save(args, [row], len(fit), len(y))


def measured(result: msa2conv.Conversion, model: torch.nn.Module, x: torch.Tensor, batch: int) -> dict[str, Any]:
    report = result.report.latency
    assert report is not None
    times = latency({"dense": model, "hybrid": result.model}, x[:1], (batch,), 45)[batch]
    return {
        "measured": f"{report.ratio:.1%}",
        "again": f"{times.ratio('hybrid', 'dense'):.1%}",
        "tried": " ".join(f"{ratio:.1%}" for ratio in report.attempts),
        "spread": f"{report.spread:.0%}",
    }


def save(args: argparse.Namespace, rows: list[dict[str, Any]], fitted: int, held_out: int) -> None:
    names = ["row", "batch", "levers", "asked", "measured", "again", "tried", "spread", "FLOPs", "top-1", "lost"]
    names += ["95 %", "KL", "seconds"]
    write(
        f"milliseconds_{args.device}",
        "python -m benchmarks.milliseconds --weights vit_tiny_patch16_224.safetensors --photos imagenet_photos650.npz"
        f" --device {args.device}",
        args.seed,
        [{name: row.get(name, "") for name in names} for row in rows],
        f"""ViT-Ti/16 (timm augreg_in21k_ft_in1k), float32, calibrated on {fitted} ImageNet validation photos, evaluated
        on {held_out} others, not trained. Asked: of the original's time. Measured: by `convert`, which tried these
        networks one after the other; again: afterwards, in a run of its own. Spread: interquartile range over the
        median, how noisy the machine was. Seconds: timing, solving and evaluation, without the calibration.""",
        key="row",
        order=lambda row: (row["batch"], order(row["levers"]), -float(row["row"].split()[-1])),
        device=args.device,
    )


if __name__ == "__main__":
    main()
