"""The gate search in a plain PyTorch loop."""

from __future__ import annotations

from pathlib import Path

import task
import torch
import torch.nn.functional as F
import typer

import msa2conv


def main(
    steps: int = 60, target: float = 0.5, data: Path | None = None, out: Path = Path("out/loops/plain.safetensors")
) -> msa2conv.Search:
    """Train the supernet of a small ViT, then write the hybrid that keeps the budget."""
    model, loader = task.model(), task.loader(steps, data)
    search = msa2conv.prepare(model, target, steps=len(loader))  # added
    model = search.model  # added
    optimizer = torch.optim.AdamW(search.param_groups(lr=1e-3))  # changed

    model.train()
    for images, labels in loader:
        loss = F.cross_entropy(model(images), labels)
        loss = loss + search.penalty()  # added
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    result = search.finish()  # added
    print(result.plan)
    result.save(out)
    return search


if __name__ == "__main__":
    typer.run(main)
