"""Training throughput of the dense network, its supernet and its hybrid, and where the time goes.

    python -m benchmarks.throughput                                                                    # on a CPU
    python -m benchmarks.throughput --device cuda --precision bf16 --batch 256 --compile --peak-tflops 989

A step is forward, cross entropy (and penalty), backward and AdamW on images that lie on the device. MFU: three times
the multiply-adds of a forward pass, two operations each, against `--peak-tflops` of the device (989 for an H100 or H200
in bfloat16); of the supernet, the multiply-adds of the original count, so that it says what the search costs. Variants
run in turn, step by step; figures are medians.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import msa2conv
from msa2conv import Gates

from .common import write

VARIANTS = ("dense", "supernet", "hybrid")
PARTS = ("forward", "backward", "optimizer")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["deit_tiny_patch16_224", "deit_small_patch16_224"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=("no", "bf16"), default="no")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--peak-tflops", type=float, help="of the device in this precision; without it no MFU")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name in args.models:
        torch.manual_seed(args.seed)
        steps = {variant: Step(name, variant, args) for variant in VARIANTS}
        spent: dict[str, list[dict[str, float]]] = {variant: [] for variant in VARIANTS}
        for turn in range(args.steps + 3):
            for variant, step in steps.items():
                found = step()
                if turn >= 3:  # the first rounds compile and warm up
                    spent[variant].append(found)
        for variant, step in steps.items():
            rows.append(row(name, variant, step, spent, args))
            print(rows[-1], flush=True)
    note = " ".join((__doc__ or "").split("\n\n")[2].split())
    where = torch.cuda.get_device_name() if args.device == "cuda" else args.device
    note = f"On {where}, batch {args.batch}, precision {args.precision}" + ", compiled" * args.compile + f". {note}"
    write("throughput", "python -m benchmarks.throughput", args.seed, rows, note, key="model")


def row(
    name: str, variant: str, step: Step, spent: dict[str, list[dict[str, float]]], args: argparse.Namespace
) -> dict[str, Any]:
    """One line of the table."""

    def seconds(of: str) -> float:
        return statistics.median(sum(one.values()) for one in spent[of])

    found: dict[str, Any] = {"model": name, "variant": variant, "GFLOPs": round(step.flops / 1e9, 3)}
    found |= {
        "images/s": round(args.batch / seconds(variant), 1),
        "time / dense": f"{seconds(variant) / seconds('dense'):.2f}",
    }
    for part in PARTS:
        found[f"{part} %"] = round(100 * statistics.median(one[part] for one in spent[variant]) / seconds(variant))
    if args.peak_tflops:
        found["MFU %"] = round(100 * 6 * step.flops * args.batch / seconds(variant) / (1e12 * args.peak_tflops), 1)
    return found


class Step:
    """A training step of one variant; a call gives the seconds of its parts."""

    def __init__(self, name: str, variant: str, args: argparse.Namespace) -> None:
        model = timm.create_model(name).to(args.device)
        size = model.pretrained_cfg["input_size"]
        self.penalty: Callable[[], Tensor] = lambda: torch.zeros((), device=args.device)
        example = torch.randn(1, *size, device=args.device)
        if variant == "supernet":
            search = msa2conv.prepare(model, 0.7, gates=Gates(skip_inactive=not args.compile))
            net, self.penalty, groups = search.model, search.penalty, search.param_groups(1e-9)
        else:
            if variant == "hybrid":
                data = torch.randn(8, *size)
                model = msa2conv.convert(model, 0.7, data=data, images=8, levers=("mixer", "ffn"), progress=False).model
            net, groups = model, [{"params": list(model.parameters()), "lr": 1e-9}]
        self.flops = msa2conv.count_flops(model, example)
        memory = torch.channels_last if args.channels_last else torch.contiguous_format
        net = net.to(memory_format=memory).train()
        self.net: nn.Module = torch.compile(net) if args.compile else net
        self.optimizer = torch.optim.AdamW(groups)  # so small a rate that nothing drifts while time is measured
        self.images = torch.randn(args.batch, *size, device=args.device).to(memory_format=memory)
        self.labels = torch.randint(0, 1000, (args.batch,), device=args.device)
        self.half = torch.autocast(args.device, torch.bfloat16, enabled=args.precision == "bf16")
        self.device = args.device

    def __call__(self) -> dict[str, float]:
        times = [self._now()]
        with self.half:
            loss = F.cross_entropy(self.net(self.images).float(), self.labels)
        loss = loss + self.penalty()
        times.append(self._now())
        loss.backward()
        times.append(self._now())
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        times.append(self._now())
        return {part: later - earlier for part, (earlier, later) in zip(PARTS, pairwise(times), strict=True)}

    def _now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


if __name__ == "__main__":
    main()
