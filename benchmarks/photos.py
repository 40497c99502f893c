"""Top-1 of a real ViT-Ti/16 after conversion, without training and with the label-free polish.

    python -m benchmarks.photos --weights vit_tiny_patch16_224.safetensors --photos imagenet_photos650.npz

The photos are an npz of JPEGs (keys jpeg, offsets, labels). 256 calibrate, the others evaluate; the same with the
photos that msa2conv ships instead (`data=None`). `--calibration` keeps the first one, as in benchmarks.levers; a sweep
can be run in parts.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from torch import Tensor

import msa2conv
from msa2conv.levers import DEFAULT
from msa2conv.search.measure import distance, outputs

from .common import against, packed_photos, split, vit_tiny, write
from .levers import calibrated, restricted

COMMAND = "python -m benchmarks.photos --weights vit_tiny_patch16_224.safetensors --photos imagenet_photos650.npz"
SOURCES = ("these photos", "shipped photos")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--targets", type=float, nargs="+", default=[0.9, 0.8, 0.7, 0.6, 0.5])
    parser.add_argument("--sources", nargs="+", choices=SOURCES, default=list(SOURCES))
    parser.add_argument("--calibration", type=Path, help="on these photos: where it is kept, and read if it is there")
    parser.add_argument("--shipped", type=Path, help="the same on the shipped photos")
    parser.add_argument("--distill-steps", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    model = vit_tiny(args.weights)
    images, labels = packed_photos(args.photos)
    fit, held_out = split(len(images), 256, args.seed)
    x, y = images[held_out], labels[held_out]
    reference = outputs(model, x)
    dense = 100 * float((reference.argmax(1) == y).float().mean())

    def figures(result: msa2conv.Conversion) -> dict[str, Any]:
        found = outputs(result.model.eval(), x)
        return {**against(reference, found, y), "KL": float(f"{distance(reference, found, 'kl'):.3g}")}

    for source in args.sources:
        data: Tensor | None
        data, kept = (images[fit], args.calibration) if source == SOURCES[0] else (None, args.shipped)
        calibration = restricted(calibrated(model, data, kept, args.seed), DEFAULT)
        for target in args.targets:
            options: dict[str, Any] = {"data": data, "calibration": calibration, "seed": args.seed}
            result = msa2conv.convert(model, target, **options)
            row = {"row": f"{source} {target}", "calibrated on": source, "budget": f"{target:.0%}", **figures(result)}
            if data is not None and args.distill_steps:
                polished = figures(msa2conv.convert(model, target, distill_steps=args.distill_steps, **options))
                row |= {f"{name} polished": value for name, value in polished.items()}
            print(row, flush=True)
            write(
                "photos",
                COMMAND,
                args.seed,
                [row],
                f"""ViT-Ti/16 (timm augreg_in21k_ft_in1k), calibrated on {len(fit)} ImageNet validation photos or on
                those that msa2conv ships, evaluated on {len(y)} other ImageNet photos (original {dense:.1f}; an easier
                pick than the full set, read the differences). Lost: points of top-1, with the 95 % interval of the
                paired difference. Polish, if any: {args.distill_steps} steps of 32 images, no labels.""",
                key="row",
                order=lambda row: (SOURCES.index(row["calibrated on"]), -float(row["row"].split()[-1])),
            )


if __name__ == "__main__":
    main()
