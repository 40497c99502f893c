"""The gate search in a Lightning Fabric loop, on any number of devices."""

from __future__ import annotations

from pathlib import Path

import task
import torch
import torch.nn.functional as F
import typer
from lightning_fabric import Fabric  # lightning.fabric, where all of lightning is installed

import msa2conv


def main(
    steps: int = 60,
    target: float = 0.5,
    data: Path | None = None,
    out: Path = Path("out/loops/fabric.safetensors"),
    devices: int = 1,
    accelerator: str = "auto",
    precision: str = "32-true",
) -> msa2conv.Search:
    """Train the supernet of a small ViT, then write the hybrid that keeps the budget."""
    fabric = Fabric(accelerator=accelerator, devices=devices, precision=precision)
    fabric.launch()
    model, loader = task.model(), fabric.setup_dataloaders(task.loader(steps, data))
    search = msa2conv.prepare(model, target, steps=len(loader))  # added
    model = search.model  # added
    optimizer = torch.optim.AdamW(search.param_groups(lr=1e-3))  # changed
    model, optimizer = fabric.setup(model, optimizer)
    torch.manual_seed(fabric.global_rank)  # dropout and gates: every process draws its own

    model.train()
    for images, labels in loader:
        loss = F.cross_entropy(model(images), labels)
        loss = loss + search.penalty()  # added
        optimizer.zero_grad()
        fabric.backward(loss)
        optimizer.step()

    if fabric.is_global_zero:
        result = search.finish()  # added
        print(result.plan)
        result.save(out)
    return search


if __name__ == "__main__":
    typer.run(main)
