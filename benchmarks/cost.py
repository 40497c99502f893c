"""What a conversion costs: wall time and peak memory of one calibration, and of a second budget from it.

    python -m benchmarks.cost --models vit_tiny_patch16_224 deit_small_patch16_224

Random weights (time does not depend on them), 256 random images. One process per model, so that peaks do not mix.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time

import timm
import torch

import msa2conv

from .common import peak_gib, write

MODELS = ("vit_tiny_patch16_224", "deit_small_patch16_224", "deit_base_patch16_224")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(measure(args.models[0], args.images, args.seed))
        return
    rows = []
    for name in args.models:
        call = [sys.executable, "-m", "benchmarks.cost", "--one", "--models", name, "--images", str(args.images)]
        text = subprocess.run(call, check=True, capture_output=True, text=True).stdout.strip().splitlines()[-1]
        rows.append({"model": name, **dict(pair.split("=") for pair in text.split())})
        print(rows[-1], flush=True)
        write("cost", "python -m benchmarks.cost", args.seed, rows, __doc__.split("\n\n")[2], key="model")


def measure(name: str, images: int, seed: int) -> str:
    torch.manual_seed(seed)
    model = timm.create_model(name).eval()
    data = torch.randn(images, 3, 224, 224)
    started = time.perf_counter()
    result = msa2conv.convert(model, 0.8, data=data, images=images)
    first = time.perf_counter() - started
    started = time.perf_counter()
    msa2conv.convert(model, 0.7, data=data, calibration=result.calibration)
    second = time.perf_counter() - started
    return f"first_s={first:.0f} second_s={second:.0f} images={images} peak_GiB={peak_gib()}"


if __name__ == "__main__":
    main()
