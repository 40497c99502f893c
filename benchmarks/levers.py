"""What each lever is worth, alone and in the mix, in accuracy and in time, on a real ViT-Ti/16.

    python -m benchmarks.levers --weights vit_tiny_patch16_224.safetensors --photos imagenet_photos650.npz

One calibration on 256 photos with every lever; a variant solves the same budgets with some levers' options only, and
runs on the photos that did not calibrate. Nothing is trained. The rows "token merging" are the rival that merges tokens
through the network and gives up their grid (benchmarks/rivals/token_merging.py), r tokens a block. Time: medians of
forward passes, every variant of one budget taking turns with the original, as ratios to it.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

import msa2conv
from msa2conv.errors import InfeasibleBudget
from msa2conv.evaluate import latency
from msa2conv.levers import DEFAULT
from msa2conv.search.measure import distance, outputs

from .common import against, packed_photos, split, vit_tiny, write
from .rivals.token_merging import TokenMerging

EARLIER = ("mixer", "ffn")
VARIANTS = {
    "all": DEFAULT,
    **{f"{name} alone": (name,) for name in DEFAULT},
    **{f"all but {name}": tuple(other for other in DEFAULT if other != name) for name in DEFAULT},
    "mixer and ffn": EARLIER,
}
MERGED_A_BLOCK = {0.9: 3, 0.8: 6, 0.7: 9, 0.6: 12, 0.5: 16}  # r of token merging that takes as much or a little more


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--targets", type=float, nargs="+", default=list(MERGED_A_BLOCK))
    parser.add_argument("--variants", nargs="*", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--images", type=int, default=256, help="photos that calibrate; the others evaluate")
    parser.add_argument("--resume", type=Path, help="folder from which an interrupted calibration continues")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    model = vit_tiny(args.weights)
    images, labels = packed_photos(args.photos)
    fit, held_out = split(len(images), args.images, args.seed)
    x, y = images[held_out], labels[held_out]
    reference = outputs(model, x)
    calibration = msa2conv.calibrate(model, images[fit], levers=DEFAULT, seed=args.seed, resume=args.resume)
    rows: list[dict[str, Any]] = []
    for target in args.targets:
        nets = dict(hybrids(model, calibration, target, args.variants))
        if target in MERGED_A_BLOCK:
            going = MERGED_A_BLOCK[target]
            schedule = (going,) * (len(model.blocks) - 1) + (0,)  # behind the last block's attention nobody asks
            nets[f"token merging, r = {going}"] = TokenMerging(model, schedule).eval()
        times = latency({"dense": model, **nets}, x[:1])
        for variant, net in nets.items():
            found = outputs(net, x)
            flops = msa2conv.count_flops(net, x[:1])
            row = {"row": f"{target} {variant}", "budget": f"{target:.0%}", "levers": variant}
            row |= {"FLOPs": f"{flops / calibration.costs.base:.3f}", **against(reference, found, y)}
            row |= {"KL": round(distance(reference, found, "kl"), 4)}
            row |= {
                f"time, batch {batch}": f"{times[variant][batch] / times['dense'][batch]:.2f}"
                for batch in times["dense"]
            }
            rows.append(row)
            print(row, flush=True)
        write(
            "levers",
            "python -m benchmarks.levers --weights vit_tiny_patch16_224.safetensors --photos imagenet_photos650.npz",
            args.seed,
            rows,
            note(len(fit), len(y), 100 * float((reference.argmax(1) == y).float().mean())),
            key="row",
            order=lambda row: (-float(row["row"].split()[0]), order(row["levers"])),
        )


def note(fit: int, held_out: int, top1: float) -> str:
    return f"""ViT-Ti/16 (timm augreg_in21k_ft_in1k), calibrated on {fit} ImageNet validation photos, evaluated on
    {held_out} others (original {top1:.1f}), not trained. Lost: points of top-1 that the original is ahead, with the
    95 % interval of the paired difference; KL to its answers separates more finely. Time: median of a forward pass
    over the original's, all variants of a budget in turn. Token merging (Bolya et al.) is the rival that gives up the
    grid; its r is the same in every block."""


def order(variant: str) -> int:
    return list(VARIANTS).index(variant) if variant in VARIANTS else len(VARIANTS)


def hybrids(
    model: nn.Module, calibration: msa2conv.Calibration, target: float, variants: list[str]
) -> Iterator[tuple[str, nn.Module]]:
    """(variant, its hybrid) of every variant that can reach the budget."""
    seen = msa2conv.inspect(model)
    for variant in variants:
        records = [record for record in calibration.records if record.state()[0]["lever"] in VARIANTS[variant]]
        own = replace(calibration, records=records)
        try:
            choice = msa2conv.choose(model, own, int(target * calibration.costs.base), progress=False)
        except InfeasibleBudget:
            continue
        plan, tensors = msa2conv.make_plan(model, seen, choice.choices)
        yield variant, msa2conv.apply(plan, model, tensors).eval()


if __name__ == "__main__":
    main()
