"""Our training loop against a bare PyTorch loop: the same hybrid, teacher, images, losses and optimiser.

    python -m benchmarks.training_loop                                            # on a CPU
    python -m benchmarks.training_loop --device cuda --precision bf16 --batch 256 --steps 50

Global distillation of a ViT-Ti/16 at 0.7 of its FLOPs: KL to the original and cross entropy, AdamW with clipping, a
cosine; images lie in memory. The loops run in turn, some steps at a time; the ratio is that of the medians over rounds.
Memory is the peak (resident set on a CPU, allocated on a GPU) beyond what was held before training, each loop in a
process of its own. The loop also checks every loss, seeds every step, remembers buffers, and logs.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import subprocess
import sys
import time
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from timm.optim import param_groups_weight_decay
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import msa2conv
from msa2conv import Conversion, Stage

from .common import write
from .search_step import resident

STAGE = Stage(kind="distill", warmup=0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_tiny_patch16_224")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=("no", "bf16"), default="no")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=6, help="of a round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--memory-of", choices=LOOPS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of:
        print(memory(args))
        return
    conversion, data = material(args)
    seconds: dict[str, list[float]] = {name: [] for name in LOOPS}
    for turn in range(args.rounds + 1):
        for name, loop in LOOPS.items():
            spent = loop(conversion, data, args)
            if turn:  # the first round warms up
                seconds[name].append(spent / args.steps)
    bare = statistics.median(seconds["bare PyTorch"])
    peaks = {name: peak(name) for name in LOOPS}
    rows = []
    for name, spent in seconds.items():
        middle, quarters = statistics.median(spent), statistics.quantiles(spent, n=4)
        row = {"model": args.model, "loop": name, "images/s": round(args.batch / middle, 1)}
        row |= {"time / bare": f"{middle / bare:.3f}"}
        row |= {"quartiles / bare": f"{quarters[0] / bare:.3f} to {quarters[2] / bare:.3f}"}
        row |= {"memory / bare": f"{peaks[name] / peaks['bare PyTorch']:.3f}"}
        rows.append({**row, "batch": args.batch, "precision": args.precision})
        print(rows[-1], flush=True)
    write("training_loop", "python -m benchmarks.training_loop", args.seed, rows, __doc__.split("\n\n")[2])


def material(args: argparse.Namespace) -> tuple[Conversion, TensorDataset]:
    """A hybrid with random weights, and images to train on."""
    torch.manual_seed(args.seed)
    model = timm.create_model(args.model).eval().to(args.device)
    conversion = msa2conv.convert(
        model, 0.7, data=torch.randn(8, 3, 224, 224), images=8, levers=("mixer", "ffn"), progress=False
    )
    count = args.batch * args.steps
    return conversion, TensorDataset(torch.randn(count, 3, 224, 224), torch.randint(0, 1000, (count,)))


def bare(conversion: Conversion, data: TensorDataset, args: argparse.Namespace) -> float:
    """Seconds of a loop as one writes it by hand."""
    student = copy.deepcopy(conversion.model).train()
    teacher = copy.deepcopy(conversion.original).eval().requires_grad_(False)
    groups = param_groups_weight_decay(student, STAGE.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=STAGE.rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
    loader = DataLoader(data, args.batch, shuffle=True, pin_memory=args.device != "cpu")
    half = torch.autocast(args.device, torch.bfloat16, enabled=args.precision == "bf16")
    started = time.perf_counter()
    for images, labels in loader:
        images, labels = images.to(args.device), labels.to(args.device)
        with half:
            with torch.no_grad():
                reference = teacher(images)
            output = student(images)
        p, q = F.log_softmax(reference.float(), -1), F.log_softmax(output.float(), -1)
        taught = F.kl_div(q, p, reduction="batchmean", log_target=True)
        loss = 0.5 * taught + 0.5 * F.cross_entropy(output.float(), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), STAGE.clip)
        optimizer.step()
        schedule.step()
    loss.item()  # waits for the device
    return time.perf_counter() - started


def ours(conversion: Conversion, data: TensorDataset, args: argparse.Namespace) -> float:
    """Seconds that `finetune` says its steps took."""
    precision = None if args.device == "cpu" else args.precision
    result = msa2conv.finetune(
        conversion,
        data,
        stages=[STAGE],
        batch_size=args.batch,
        max_steps=args.steps,
        precision=precision,
        progress=False,
    )
    assert result.report.training is not None
    return result.report.training.seconds


LOOPS = {"bare PyTorch": bare, "msa2conv.finetune": ours}


def peak(name: str) -> float:
    call = [sys.executable, "-m", "benchmarks.training_loop", *sys.argv[1:], "--memory-of", name]
    return float(subprocess.run(call, check=True, capture_output=True, text=True).stdout.strip().splitlines()[-1])


def memory(args: argparse.Namespace) -> float:
    """Peak GiB of three steps, beyond what the process held before."""
    args.steps = 3
    conversion, data = material(args)
    if args.device == "cpu":
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    LOOPS[args.memory_of](conversion, data, args)
    if args.device == "cpu":
        return resident("VmHWM") - before
    return torch.cuda.max_memory_allocated() / 2**30


if __name__ == "__main__":
    main()
