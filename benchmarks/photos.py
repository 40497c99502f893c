"""Top-1 of a real ViT-Ti/16 after conversion, without training and with the label-free polish.

    python -m benchmarks.photos --weights vit_tiny_patch16_224.safetensors --photos imagenet_photos650.npz

The photos are an npz of JPEGs (keys jpeg, offsets, labels). 256 calibrate, the others evaluate; the same with the
photos that msa2conv ships instead (`data=None`).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

import msa2conv
from msa2conv.search.measure import distance, outputs

from .common import packed_photos, peak_gib, split, vit_tiny, write


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--targets", type=float, nargs="+", default=[0.9, 0.8, 0.7, 0.6, 0.5])
    parser.add_argument("--distill-steps", type=int, default=40)
    parser.add_argument("--polish-shipped", action="store_true", help="polish on the shipped photos, too")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    model = vit_tiny(args.weights)
    images, labels = packed_photos(args.photos)
    fit, held_out = split(len(images), 256, args.seed)
    x, y = images[held_out], labels[held_out]
    reference = outputs(model, x)
    dense = top1(reference, y)
    rows: list[dict[str, Any]] = [{"calibrated on": "-", "target": 1.0, "top-1": dense, "lost": 0.0, "KL": 0.0}]
    for source, data in ((f"{len(fit)} of these photos", images[fit]), ("shipped clothing photos", None)):
        calibration = msa2conv.calibrate(model, data, seed=args.seed)
        for target in args.targets:
            result = msa2conv.convert(model, target, data=data, calibration=calibration, seed=args.seed)
            row = measured(source, target, result, x, y, reference, dense)
            row |= {"calibration s": round(calibration.seconds), "plan s": result.report.seconds["solve"]}
            if args.distill_steps and (data is not None or args.polish_shipped):
                options = {"calibration": calibration, "distill_steps": args.distill_steps, "seed": args.seed}
                polished = msa2conv.convert(model, target, data=data, **options)
                after = measured(source, target, polished, x, y, reference, dense)
                row |= {"top-1 polished": after["top-1"], "lost polished": after["lost"], "KL polished": after["KL"]}
            row["choices"] = dict(result.plan.choices)
            rows.append(row)
            print(row, flush=True)
    keys = dict.fromkeys(key for row in rows for key in row)
    rows = [{key: row.get(key, "") for key in keys} for row in rows]
    write(
        "photos",
        "python -m benchmarks.photos --weights vit_tiny_patch16_224.safetensors --photos imagenet_photos650.npz",
        args.seed,
        rows,
        f"ViT-Ti/16 (timm augreg_in21k_ft_in1k), {len(y)} ImageNet validation photos that did not calibrate; an easier "
        f"pick than the full set: read the differences, standard error about 1.9 points, paired differences less. "
        f"Polish: {args.distill_steps} steps of 32 images, no labels. Peak memory of the whole run: {peak_gib()} GiB.",
    )


def measured(
    source: str,
    target: float,
    result: msa2conv.Conversion,
    x: torch.Tensor,
    y: torch.Tensor,
    reference: torch.Tensor,
    dense: float,
) -> dict[str, Any]:
    found = outputs(result.model.eval(), x)
    accuracy = top1(found, y)
    return {
        "calibrated on": source,
        "target": target,
        "FLOPs kept": round(result.plan.flops / result.plan.base.flops, 4),
        "M params": round(result.plan.parameters / 1e6, 2),
        "top-1": accuracy,
        "lost": round(dense - accuracy, 1),
        "KL": round(distance(reference, found, "kl"), 3),
    }


def top1(output: torch.Tensor, labels: torch.Tensor) -> float:
    return round(100 * float((output.argmax(1) == labels).float().mean()), 1)


if __name__ == "__main__":
    main()
