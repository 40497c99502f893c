"""Figures of a network: accuracy, distance to the parent, multiply-adds by two counters, time, memory."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from msa2conv.flops import flops_by_module
from msa2conv.search.measure import distance, first_tensor
from msa2conv.stopwatch import interleaved

from .data import Split
from .result import Quality, Speed

BATCHES = (1, 32)
_OFTENER = 10
_BLOCK = re.compile(r"^(?:\w+\.)*?((?:blocks|layers)\.\d+(?:\.blocks\.\d+)?)$")


@torch.no_grad()
def answers(model: nn.Module, split: Split, batch: int = 250) -> tuple[Tensor, Tensor]:
    """(logits [n, classes], labels [n]) on the CPU, in the order of the split."""
    device = next(model.parameters()).device
    pairs = [(first_tensor(model(images.to(device))).cpu(), labels) for images, labels in split.batches(batch)]
    return torch.cat([logits for logits, _ in pairs]), torch.cat([labels for _, labels in pairs])


def quality(found: Tensor, reference: Tensor, labels: Tensor) -> Quality:
    """Top-1, and the distance to the parent's answers."""
    top1 = 100 * float((found.argmax(1) == labels).double().mean())
    agreed = 100 * float((found.argmax(1) == reference.argmax(1)).double().mean())
    return Quality(top1=top1, kl=distance(reference, found, "kl"), agreement=agreed)


@torch.no_grad()
def torch_flops(model: nn.Module, example: Tensor) -> int:
    """Multiply-adds by torch.utils.flop_counter, which counts products, and 5 an element of every LayerNorm.

    Attention is not fused here: on some CPUs that counter does not see it when it is.
    """
    model, norms = copy.deepcopy(model).eval(), list[int]()
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.register_forward_hook(lambda _module, _args, out: norms.append(5 * out.numel()))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(example[:1])
    return int(counter.get_total_flops()) // 2 + sum(norms)


def block_flops(model: nn.Module, example: Tensor) -> dict[str, int]:
    """{block: multiply-adds}, and "elsewhere": patches, norms, head, and what a wrapper does between its blocks."""
    counts = flops_by_module(model, example[:1])
    blocks = {match[1]: flops for path, flops in counts.items() if (match := _BLOCK.match(path))}
    layers = {block for block in blocks if any(other.startswith(f"{block}.") for other in blocks)}
    found = {block: blocks[block] for block in sorted(blocks, key=_numbers) if block not in layers}
    return {**found, "elsewhere": counts[""] - sum(found.values())}


def _numbers(path: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", path)]


def speed(model: nn.Module, parent: nn.Module, example: Tensor, rounds: int) -> dict[int, Speed]:
    """{batch size: time of a forward pass}, in turn with the parent's."""
    found = {}
    for batch in BATCHES:
        inputs = example.expand(batch, *example.shape[1:]).contiguous()
        calls = {"model": partial(model, inputs), "parent": partial(parent, inputs)}
        # single images are quick, and the more easily disturbed
        samples = interleaved(calls, example.device, rounds if batch > 1 else _OFTENER * rounds)
        mine, theirs = samples.timing("model"), samples.timing("parent")
        found[batch] = Speed(
            ratio=samples.ratio("model", "parent"), seconds=mine.seconds, spread=mine.spread,
            parent_seconds=theirs.seconds, parent_spread=theirs.spread,
        )  # fmt: skip
    return found


class Peak:
    """Most memory held inside a `peak_memory` block, in GiB; None where the system does not tell."""

    gib: float | None = None


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """Watch it: allocated by PyTorch on a GPU, the resident set of this process on Linux."""
    peak, status = Peak(), Path("/proc/self/status")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        _reset_resident_peak()
    yield peak
    if device.type == "cuda":
        peak.gib = torch.cuda.max_memory_allocated(device) / 2**30
    elif status.is_file():
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        peak.gib = None if found is None else int(found[1]) / 2**20


def _reset_resident_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # not Linux, or not allowed: the peak is then that of the whole process
        return
