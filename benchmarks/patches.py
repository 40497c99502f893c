"""What is left of the patches' own features, which a dense head reads, on a real ViT-Ti/16.

    python -m benchmarks.patches --weights vit_tiny_patch16_224.safetensors --photos imagenet_photos650.npz

The plans are those of `benchmarks.levers`: chosen for the label of the photo, without a look at its patches. The
features behind the last norm are compared with the original's, and so is the label that the classifier gives to each
patch.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import msa2conv
from msa2conv.stream import MergedStream

from .common import packed_photos, split, vit_tiny, write
from .levers import UNMERGED, VARIANTS, calibrated, hybrids

SHOWN = ("the default", "default but merge_in_site", "merge_tokens alone", UNMERGED)
SHARED = ", means only"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--targets", type=float, nargs="*", default=[0.9, 0.8, 0.7, 0.6, 0.5])
    parser.add_argument("--images", type=int, default=256, help="photos that calibrate; the others evaluate")
    parser.add_argument("--calibration", type=Path, help="where it is kept, and read if it is there")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    model = vit_tiny(args.weights)
    images, _ = packed_photos(args.photos)
    fit, held_out = split(len(images), args.images, args.seed)
    calibration = calibrated(model, images[fit], args.calibration, args.seed)
    x = images[held_out]
    expected = features(model, x)
    rows: list[dict[str, Any]] = []
    for target in args.targets:
        for variant, net, choice in hybrids(model, calibration, target, list(SHOWN), None):
            found = {"": features(net, x)}
            if isinstance(net.blocks, MergedStream):
                found[SHARED] = features(net, x, means_only=True)
            for suffix, tokens in found.items():
                row = {"row": f"{target} {variant}{suffix}", "budget": f"{target:.0%}", "levers": variant + suffix}
                row |= {"FLOPs": f"{msa2conv.count_flops(net, x[:1]) / calibration.costs.base:.3f}"}
                rows.append(row | compared(model.head, expected, tokens) | {"through the network": choice})
                print(rows[-1], flush=True)
    write(
        "patches",
        "python -m benchmarks.patches --weights vit_tiny_patch16_224.safetensors --photos imagenet_photos650.npz",
        args.seed,
        rows,
        f"""ViT-Ti/16 (timm augreg_in21k_ft_in1k) on {len(x)} ImageNet validation photos, plans calibrated on {len(fit)}
        others for the photo's label alone, not trained. Error: of the 196 patches' features behind the last norm, over
        their norm. KL, same label: of the classifier applied to every patch, to what it says of the original's. Photo's
        KL: of the class token. Means only: every patch gets the vector of the token that it went into, as where what
        each had of its own is lost.""",
        key="row",
        order=lambda row: (-float(row["row"].split()[0]), position(row["levers"])),
    )


def position(levers: str) -> tuple[int, bool]:
    return list(VARIANTS).index(levers.removesuffix(SHARED)), levers.endswith(SHARED)


@torch.no_grad()
def features(net: nn.Module, images: Tensor, means_only: bool = False) -> Tensor:
    """Tokens behind the last norm [n, 1 + 196, C]."""
    return torch.cat([net.norm(tokens) for tokens in states(net, images, means_only)])


def states(net: Any, images: Tensor, means_only: bool) -> Iterator[Tensor]:
    for batch in images.split(32):
        tokens = net.norm_pre(net.patch_drop(net._pos_embed(net.patch_embed(batch))))
        steps = list(net.blocks)
        for step in steps:
            tokens = step(tokens)
        if means_only:
            merges = list(steps[-1]._known.values())
            for merge in merges:
                tokens = merge.means(tokens)
            for merge in reversed(merges):
                tokens = merge.spread(tokens)
        yield tokens


def compared(head: nn.Module, expected: Tensor, found: Tensor) -> dict[str, Any]:
    error = float((found - expected)[:, 1:].norm() / expected[:, 1:].norm())
    with torch.no_grad():
        before, after = head(expected), head(found)
    kl = nn.functional.kl_div(after.log_softmax(-1), before.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    same = (after.argmax(-1) == before.argmax(-1))[:, 1:].double().mean()
    return {
        "error": f"{error:.3f}",
        "KL": round(float(kl[:, 1:].mean()), 4),
        "same label": round(100 * float(same), 1),
        "photo's KL": round(float(kl[:, 0].mean()), 4),
    }


if __name__ == "__main__":
    main()
