"""What exported hybrids answer: onnxruntime and torch.export beside PyTorch, on real photos.

    python -m benchmarks.exports --weights vit_tiny_patch16_224.safetensors

Six backbones at their own sizes, converted on the photos that come with msa2conv and exported after `streamline`. The
ViT-Ti is trained and converted with the default levers; the others have random weights and no merging, since the tokens
of an untrained network are so much alike that rounding decides which merge. In parts: `--models`.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import timm
import torch

import msa2conv

from .common import vit_tiny, write
from .deploy import LEVERS, VIT

MODELS = (
    VIT,
    "deit_tiny_distilled_patch16_224",
    "swin_tiny_patch4_window7_224",
    "eva02_tiny_patch14_224",
    "pvt_v2_b0",
    "mobilevit_xxs",
)
BUDGET = 0.8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, help="of the ViT-Ti; without them it is left out")
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--images", type=int, default=16, help="photos that calibrate")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for name in args.models:
        if name == VIT and args.weights is None:
            continue
        found = row(name, args.weights if name == VIT else None, args.images, args.seed)
        print(found, flush=True)
        write(
            "exports",
            "python -m benchmarks.exports --weights vit_tiny_patch16_224.safetensors",
            args.seed,
            [found],
            f"""Largest difference to PyTorch's outputs on eight real photos, relative to the largest output, float32;
            hybrids at {BUDGET:.0%} of the FLOPs, streamlined; random weights but for the ViT-Ti. A file that differs by
            more than 1e-04 is not written. Half: onnxruntime in float16, where rounding may decide which tokens merge;
            MB: in float32 and in float16.""",
            key="model",
            order=lambda row: MODELS.index(row["model"]) if row["model"] in MODELS else len(MODELS),
        )


def row(name: str, weights: Path | None, images: int, seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    model = timm.create_model(name).eval() if weights is None else vit_tiny(weights)
    levers = "nothing merged" if weights is None else "the default"
    hybrid = msa2conv.convert(model, BUDGET, images=images, levers=LEVERS[levers], seed=seed, progress=False)
    result = msa2conv.streamline(hybrid)
    with tempfile.TemporaryDirectory() as folder:
        onnx = msa2conv.export_onnx(result, Path(folder, "hybrid.onnx"), dynamic_batch=True)
        half = msa2conv.export_onnx(result, Path(folder, "half.onnx"), half=True)
        program = msa2conv.export_program(result, Path(folder, "hybrid.pt2"))
        sizes = [f"{found.path.stat().st_size / 1e6:.1f}" for found in (onnx, half)]
    changed = sum(site.after != site.before for site in result.report.sites)
    return {
        "model": name,
        "levers": levers,
        "FLOPs": f"{result.plan.flops / result.plan.base.flops:.3f}",
        "sites changed": f"{changed} of {len(result.report.sites)}",
        "onnxruntime": f"{onnx.difference:.1e}",
        "torch.export": f"{program.difference:.1e}",
        "half": f"{half.difference:.1e}",
        "MB": " / ".join(sizes),
    }


if __name__ == "__main__":
    main()
