"""What the levers take in time, as a ratio to the original, all variants of a budget taking turns.

    python -m benchmarks.levers ... --plans plans        # first: which plans
    python -m benchmarks.latency --plans plans           # on this CPU
    python -m benchmarks.latency --plans plans --device cuda --dtype bfloat16 --batches 1 64 256 --compile

Random weights: time does not depend on them. Plans that only merge tokens are also carried over to larger networks with
the same 196 patches: the same sites see the same number of tokens. The rows "token merging" are the rival
at about the same FLOPs. Medians of the ratios of passes that took turns.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

import msa2conv
from msa2conv import Plan
from msa2conv.evaluate import latency
from msa2conv.flops import count_flops
from msa2conv.levers import DEFAULT
from msa2conv.plan import Shorten, Wrap, fingerprint
from msa2conv.stopwatch import Samples
from msa2conv.transforms.apply import apply_edits

from .common import write
from .levers import MERGED_A_BLOCK, UNMERGED, order
from .rivals.token_merging import constant, token_merging

MODELS = ("vit_tiny_patch16_224", "deit_small_patch16_224", "vit_base_patch16_224")
SHOWN = (
    "the default", *(f"{name} alone" for name in DEFAULT),
    "default but merge_in_site", UNMERGED, "mixer and ffn", "width alone", "width and ffn",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plans", type=Path, required=True)
    parser.add_argument("--targets", type=float, nargs="+", default=[0.8, 0.7, 0.6, 0.5])
    parser.add_argument("--variants", nargs="+", default=list(SHOWN))
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--rounds", type=int, default=45, help="at batch 1; a third at larger ones")
    parser.add_argument("--compile", action="store_true", help="torch.compile with its defaults")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    dtype, suffix = getattr(torch, args.dtype), "_compiled" if args.compile else ""
    for name in args.models:
        model = timm.create_model(name).eval()
        example = torch.randn(1, 3, 224, 224)
        base = count_flops(model, example)
        for target in args.targets:
            nets = dict(hybrids(model, target, args))
            flops = {variant: count_flops(net, example) / base for variant, net in nets.items()}
            timed = {variant: net.to(args.device, dtype) for variant, net in {"dense": model, **nets}.items()}
            if args.compile:
                torch.compiler.reset()
                timed = {variant: torch.compile(net, dynamic=False) for variant, net in timed.items()}  # type: ignore[misc]
            times = latency(timed, example.to(dtype), tuple(args.batches), args.rounds)
            rows = [row(name, target, variant, flops[variant], times) for variant in nets]
            for each in rows:
                print(each, flush=True)
            model.to("cpu", torch.float32)
            write(
                f"latency_{args.device}{suffix}",
                f"python -m benchmarks.latency --plans plans --device {args.device} --dtype {args.dtype} "
                f"--batches {' '.join(map(str, args.batches))}{' --compile' if args.compile else ''}",
                args.seed,
                rows,
                f"""Time over the original's, {args.dtype}{", compiled" if args.compile else ""}: medians of ratios of
                passes that took turns. Spread: the larger interquartile range over the median. Plans: those of
                `benchmarks.levers` on a real ViT-Ti; those that only merge tokens also on larger networks with as many
                patches. Token merging (Bolya et al.) is the rival.""",
                key="row",
                order=lambda row: (MODELS.index(row["model"]), -float(row["row"].split()[1]), order(row["levers"])),
                device=args.device,
            )


def row(name: str, target: float, variant: str, flops: float, times: dict[int, Samples]) -> dict[str, Any]:
    found = {"row": f"{name} {target} {variant}", "model": name, "budget": f"{target:.0%}", "levers": variant}
    ratios = {f"batch {batch}": f"{each.ratio(variant, 'dense'):.2f}" for batch, each in times.items()}
    spread = max(each.timing(variant).spread for each in times.values())
    return found | {"FLOPs": f"{flops:.3f}"} | ratios | {"spread": f"{spread:.0%}"}


def hybrids(model: nn.Module, target: float, args: argparse.Namespace) -> Iterator[tuple[str, nn.Module]]:
    for variant in args.variants:
        path = args.plans / f"{target} {variant}.json"
        if not path.is_file():
            continue
        plan = Plan.from_json(path.read_text(), str(path))
        if plan.base.fingerprint == fingerprint(model):
            yield variant, msa2conv.apply(plan, model).eval()
        elif all(isinstance(edit, (Wrap, Shorten)) for edit in plan.edits):
            larger = copy.deepcopy(model)
            apply_edits(larger, plan.edits)
            yield variant, larger.eval()
    going = MERGED_A_BLOCK[target]
    yield f"token merging, r = {going}", token_merging(copy.deepcopy(model), constant(model, going))


if __name__ == "__main__":
    main()
