"""What one step of the gate search costs, against one training step of the same dense model in the same run.

    python -m benchmarks.search_step

A step is forward, cross entropy, (penalty,) backward and AdamW, batch 8 at 224 x 224 in float32 on one thread. Variants
run in turn, step by step; the ratio is that of the medians. "all branches": the attention and both convolutions of
every site with autograd, as gates of 1 would need. "inactive without autograd": `Gates(skip_inactive=True)`, with gates
drawn at their start probability. Memory is the peak resident set of three steps beyond what the process held before the
model was made (Linux). The authors' code takes 1.38 of the dense DeiT-Ti's time (one thread, same batch).
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch
import torch.nn.functional as F

import msa2conv
from msa2conv import Gates

from .common import write

MODELS = ("deit_tiny_patch16_224", "deit_small_patch16_224")
VARIANTS = {"dense": None, "all branches": Gates(), "inactive without autograd": Gates(skip_inactive=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--memory-of", choices=VARIANTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.memory_of:
        print(memory(args.models[0], args.memory_of, args.batch))
        return
    rows = []
    for name in args.models:
        torch.manual_seed(args.seed)
        times = timed({variant: stepper(name, variant, args.batch) for variant in VARIANTS}, args.steps)
        peaks = {variant: peak(name, variant, args.batch) for variant in VARIANTS}
        for variant in VARIANTS:
            middle, dense = statistics.median(times[variant]), statistics.median(times["dense"])
            quarters = statistics.quantiles(times[variant], n=4)
            row = {
                "model": name,
                "step": variant,
                "time / dense": f"{middle / dense:.2f}",
                "quartiles / dense": f"{quarters[0] / dense:.2f} to {quarters[2] / dense:.2f}",
                "peak memory / dense": f"{peaks[variant] / peaks['dense']:.2f}",
            }
            rows.append(row)
            print(row, flush=True)
        write("search_step", "python -m benchmarks.search_step", args.seed, rows, __doc__.split("\n\n")[2], key="model")


def stepper(name: str, variant: str, batch: int) -> Callable[[], None]:
    """A function that makes one training step."""
    model = timm.create_model(name)
    images, labels = torch.randn(batch, 3, 224, 224), torch.randint(0, 1000, (batch,))
    gates = VARIANTS[variant]
    if gates is None:
        net, groups, penalty = model.train(), model.parameters(), lambda: torch.zeros(())
    else:
        search = msa2conv.prepare(model, 0.7, gates=gates)
        net, groups, penalty = search.model, search.param_groups(1e-4), search.penalty
    optimizer = torch.optim.AdamW(groups, lr=1e-9)  # nothing may drift while time is measured

    def step() -> None:
        loss = F.cross_entropy(net(images), labels) + penalty()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return step


def timed(steps: dict[str, Callable[[], None]], count: int) -> dict[str, list[float]]:
    """Seconds of every step, the variants in turn; the first two rounds warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(count + 2):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            if turn >= 2:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def peak(name: str, variant: str, batch: int) -> float:
    call = [sys.executable, "-m", "benchmarks.search_step", "--models", name, "--batch", str(batch)]
    text = subprocess.run([*call, "--memory-of", variant], check=True, capture_output=True, text=True).stdout
    return float(text.strip().splitlines()[-1])


def memory(name: str, variant: str, batch: int) -> float:
    """Peak GiB while three steps run, beyond what the process held when everything was imported."""
    msa2conv.prepare(timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1), 0.8)  # imports what it needs
    before = resident("VmRSS")
    step = stepper(name, variant, batch)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    for _ in range(3):
        step()
    return resident("VmHWM") - before


def resident(field: str) -> float:
    """GiB of a field of /proc/self/status."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 2**20


if __name__ == "__main__":
    main()
