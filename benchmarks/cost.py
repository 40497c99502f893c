"""What a conversion costs: wall time and peak memory of one calibration, of a second budget from it, and of ten.

    python -m benchmarks.cost --models vit_tiny_patch16_224 deit_small_patch16_224
    python -m benchmarks.cost --compare --models vit_tiny_patch16_224      # what each lever adds to that
    python -m benchmarks.cost --sweep --models vit_tiny_patch16_224        # and ten budgets at once

Random weights (time does not depend on them), random images. One process per row, so that peaks do not mix. Ten
budgets: a sweep from 90 % to 45 % and its calibration, over one conversion; each built: a hybrid out of it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from typing import TypeVar

import timm
import torch

import msa2conv
from msa2conv.levers import DEFAULT

from .common import peak_gib, write

MODELS = ("vit_tiny_patch16_224", "deit_small_patch16_224", "deit_base_patch16_224")
COMPARED = (("mixer", "ffn"), DEFAULT[:-1], DEFAULT)
T = TypeVar("T")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--levers", nargs="+", default=DEFAULT)
    parser.add_argument("--compare", action="store_true", help="several sets of levers, with ratios to the first")
    parser.add_argument("--sweep", action="store_true", help="also ten budgets out of one calibration")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.models[0], tuple(args.levers), args.images, args.sweep, args.seed)))
        return
    note = __doc__.split("\n\n")[2]
    rows = []
    for name in args.models:
        found = []
        for levers in COMPARED if args.compare else (args.levers,):
            call = [sys.executable, "-m", "benchmarks.cost", "--one", "--models", name, "--images", str(args.images)]
            call += ["--sweep"] if args.sweep else []
            text = subprocess.run([*call, "--levers", *levers], check=True, capture_output=True, text=True).stdout
            found.append(json.loads(text.strip().splitlines()[-1]))
            row = {"model": name, "levers": ", ".join(levers), **found[-1]}
            if args.compare:
                row["first / first row"] = f"{float(found[-1]['first_s']) / float(found[0]['first_s']):.2f}"
            rows.append(row)
            print(row, flush=True)
        if args.sweep:
            command = f"python -m benchmarks.cost --sweep --models {name} --images {args.images}"
            write("cost_sweep", command, args.seed, rows, note, key="model")
        elif args.compare:
            write("cost_levers", "python -m benchmarks.cost --compare", args.seed, rows, note, key="model")
        else:
            write(
                "cost",
                f"python -m benchmarks.cost --levers {' '.join(args.levers)}",
                args.seed,
                rows,
                note,
                key="model",
            )


def measure(name: str, levers: tuple[str, ...], images: int, sweep: bool, seed: int) -> dict[str, float]:
    torch.manual_seed(seed)
    model = timm.create_model(name).eval()
    data = torch.randn(images, 3, 224, 224)
    first, result = timed(lambda: msa2conv.convert(model, 0.8, data=data, images=images, levers=levers))
    calibration = result.calibration
    second, _ = timed(lambda: msa2conv.convert(model, 0.7, data=data, calibration=calibration))
    row = {"first_s": round(first), "second_s": round(second)}
    if sweep:
        targets = [0.9 - 0.05 * step for step in range(10)]
        planned, found = timed(lambda: msa2conv.sweep(model, targets, calibration=calibration))
        built, _ = timed(lambda: found.build(0.7))
        row["ten budgets / first"] = round((calibration.seconds + planned) / first, 2)
        row["each built / first"] = round(built / first, 2)
    return row | {"images": images, "peak_GiB": peak_gib()}


def timed(call: Callable[[], T]) -> tuple[float, T]:
    started = time.perf_counter()
    found = call()
    return time.perf_counter() - started, found


if __name__ == "__main__":
    main()
