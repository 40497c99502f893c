"""What each lever is worth, alone and in the mix, on a real ViT-Ti/16. What it takes in time: benchmarks/latency.py.

    python -m benchmarks.levers --weights vit_tiny_patch16_224.safetensors --photos imagenet_photos650.npz

One calibration on 256 photos with every lever; a variant solves the same budgets with some levers' options only, and
runs on the photos that did not calibrate. Nothing is trained. The rows "token merging" are the rival that merges tokens
through the network (benchmarks/rivals/token_merging.py), r tokens a block. A sweep can be run in parts, one or several
`--targets` each, also at the same time once `--calibration` is there.
"""

from __future__ import annotations

import argparse
from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import msa2conv
from msa2conv.errors import InfeasibleBudget
from msa2conv.files import write_text
from msa2conv.levers import DEFAULT
from msa2conv.search.measure import distance, outputs

from .common import against, packed_photos, split, vit_tiny, write
from .rivals.token_merging import constant, token_merging

INSIDE, UNMERGED = "default but merge_tokens", "default but merging"
VARIANTS = {
    "the default": DEFAULT,
    **{f"{name} alone": (name,) for name in DEFAULT},
    **{f"default but {name}": tuple(other for other in DEFAULT if other != name) for name in DEFAULT},
    UNMERGED: ("mixer", "ffn", "linear_ffn", "thin_attention"),
    "mixer and ffn": ("mixer", "ffn"),
    "width alone": ("width",),
    "width and ffn": ("width", "ffn"),
    "width and the default": ("width", *DEFAULT),
}
MERGED_A_BLOCK = {0.9: 3, 0.8: 6, 0.7: 9, 0.6: 12, 0.5: 16}  # r of token merging that takes as much or a little more


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--targets", type=float, nargs="*", default=list(MERGED_A_BLOCK))
    parser.add_argument("--variants", nargs="*", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--images", type=int, default=256, help="photos that calibrate; the others evaluate")
    parser.add_argument("--calibration", type=Path, help="where it is kept, and read if it is there")
    parser.add_argument("--plans", type=Path, help="folder for the plans, for benchmarks.latency")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    model = vit_tiny(args.weights).to(args.device)
    images, labels = packed_photos(args.photos)
    fit, held_out = split(len(images), args.images, args.seed)
    x, y = images[held_out], labels[held_out]
    reference = outputs(model, x)
    calibration = calibrated(model, images[fit], args.calibration, args.seed)
    for target in args.targets:
        rows: list[dict[str, Any]] = []
        nets = hybrids(model, calibration, target, args.variants, args.plans)
        for variant, net, choice in [*nets, *rival(model, target)]:
            found = outputs(net, x)
            flops = msa2conv.count_flops(net, x[:1].to(args.device))
            row = {"row": f"{target} {variant}", "budget": f"{target:.0%}", "levers": variant}
            row |= {"FLOPs": f"{flops / calibration.costs.base:.3f}", **against(reference, found, y)}
            rows.append(row | {"KL": round(distance(reference, found, "kl"), 4), "through the network": choice})
            print(rows[-1], flush=True)
        write(
            "levers",
            "python -m benchmarks.levers --weights vit_tiny_patch16_224.safetensors --photos imagenet_photos650.npz",
            args.seed,
            rows,
            note(len(fit), len(y), 100 * float((reference.argmax(1) == y).float().mean())),
            key="row",
            order=lambda row: (-float(row["row"].split()[0]), order(row["levers"])),
            device=args.device,
        )


def note(fit: int, held_out: int, top1: float) -> str:
    return f"""ViT-Ti/16 (timm augreg_in21k_ft_in1k), calibrated on {fit} ImageNet validation photos, evaluated on
    {held_out} others (original {top1:.1f}), not trained. Lost: points of top-1 that the original is ahead, with the
    95 % interval of the paired difference; KL to its answers separates more finely. Through the network: channels that
    are left, or patches of 196 and behind the attention of which block. Token merging (Bolya et al.) is the rival; its
    r is the same in every block but the last."""


def order(variant: str) -> int:
    return list(VARIANTS).index(variant) if variant in VARIANTS else len(VARIANTS)


def calibrated(model: nn.Module, images: Tensor | None, path: Path | None, seed: int) -> msa2conv.Calibration:
    if path is not None and path.is_file():
        calibration = msa2conv.Calibration.load(path, msa2conv.inspect(model).claims)
        calibration.check_model(model)
        return calibration
    calibration = msa2conv.calibrate(model, images, levers=(*DEFAULT, "width"), seed=seed)
    if path is not None:
        calibration.save(path)
    return calibration


def restricted(calibration: msa2conv.Calibration, levers: Collection[str]) -> msa2conv.Calibration:
    """With the options of these levers only."""
    records = [record for record in calibration.records if record.state()[0]["lever"] in levers]
    narrower = [replace(each, calibration=restricted(each.calibration, levers)) for each in calibration.narrower]
    return replace(
        calibration,
        records=records,
        stream=calibration.stream if "merge_tokens" in levers else None,
        narrower=narrower if "width" in levers else [],
    )


def hybrids(
    model: nn.Module, calibration: msa2conv.Calibration, target: float, variants: list[str], plans: Path | None
) -> Iterator[tuple[str, nn.Module, str]]:
    """(variant, its hybrid, what it does to the whole network) of every variant that can reach the budget."""
    seen = msa2conv.inspect(model)
    for variant in variants:
        own = restricted(calibration, VARIANTS[variant])
        try:
            choice = msa2conv.choose(model, own, int(target * calibration.costs.base), progress=False)
        except InfeasibleBudget:
            continue
        plan, tensors = msa2conv.make_plan(model, seen, choice.choices)
        if plans is not None:
            write_text(plans / f"{target} {variant}.json", plan.model_dump_json(indent=1) + "\n")
        whole = ", ".join(name for path, name in plan.choices.items() if path not in plan.sites)
        yield variant, msa2conv.apply(plan, model, tensors).eval(), whole


def rival(model: nn.Module, target: float) -> Iterator[tuple[str, nn.Module, str]]:
    if target in MERGED_A_BLOCK:
        going = MERGED_A_BLOCK[target]
        yield f"token merging, r = {going}", token_merging(model, constant(model, going)), ""


if __name__ == "__main__":
    main()
