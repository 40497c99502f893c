"""Is the budget kept? Many targets between floor and base on six backbones, counted on the finished hybrids.

    python -m benchmarks.budgets

Every lever, random weights and 8 calibration images: the budget does not depend on how good a score is, so this tests
the solver, the cost table and the surgery. Never above the target, within 1 % below it, and equal to an independent
count.
"""

from __future__ import annotations

import argparse

import timm
import torch

import msa2conv
from msa2conv.api import calibrate, inspect, make_plan
from msa2conv.flops import count_flops
from msa2conv.search.solve import solve_settings

from .common import write

MODELS = (
    "vit_tiny_patch16_224",
    "deit_tiny_patch16_224",
    "swin_tiny_patch4_window7_224",
    "deit_small_patch16_224",
    "swin_small_patch4_window7_224",
    "deit_base_patch16_224",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--targets", type=int, default=30)
    parser.add_argument("--built", type=int, default=5, help="how many of them are also built and counted")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rows = []
    for name in args.models:
        torch.manual_seed(args.seed)
        model = timm.create_model(name).eval()
        seen = inspect(model, levers="all")
        images = torch.randn(8, 3, 224, 224, generator=torch.Generator().manual_seed(args.seed))
        calibration = calibrate(model, images, levers="all", seed=args.seed)
        options, settings = calibration.options(), calibration.settings()
        used, wrong, merged = [], 0, 0
        for index in range(args.targets):
            share = (index + 0.5) / args.targets
            target = int(seen.floor + share * (seen.costs.base - seen.floor))
            setting, choices = solve_settings(settings, options, seen.costs.rest, target)
            if setting.option is not None:
                choices = {(option := setting.option()).site: option} | choices
            flops = seen.costs.rest + sum(option.flops for option in choices.values())
            merged += setting.option is not None
            if index % max(1, args.targets // args.built) == 0:
                plan, tensors = make_plan(model, seen, choices)
                hybrid = msa2conv.apply(plan, model, tensors)
                wrong += not (count_flops(hybrid, images) == plan.flops == flops)
            used.append(flops / target)
        row = {
            "model": name,
            "floor": f"{seen.floor / seen.costs.base:.1%}",
            "targets": args.targets,
            "above": sum(value > 1 for value in used),
            "below 99 %": sum(value < 0.99 for value in used),
            "least used": f"{min(used):.2%}",
            "most used": f"{max(used):.3%}",
            "merged through the network": merged,
            "counts that differ": wrong,
        }
        print(row, flush=True)
        rows.append(row)
        # After every model, so that a run that is cut short leaves what it has measured.
        write("budgets", "python -m benchmarks.budgets", args.seed, rows, __doc__.split("\n\n")[2], key="model")


if __name__ == "__main__":
    main()
