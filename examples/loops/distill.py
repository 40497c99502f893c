"""Fine-tuning a converted model in a plain PyTorch loop: what `msa2conv.finetune` does, by hand."""

from __future__ import annotations

from pathlib import Path

import task
import torch
import torch.nn.functional as F
import typer

import msa2conv


def main(
    steps: int = 60, target: float = 0.5, data: Path | None = None, out: Path = Path("out/loops/distill.safetensors")
) -> msa2conv.Conversion:
    """Convert a small ViT, then train the hybrid on the labels and on the answers of the original."""
    model, loader = task.model(), task.loader(steps, data)
    result = msa2conv.convert(model, target, data=loader)  # added
    teacher, model = model.eval(), result.model  # added
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    model.train()
    for images, labels in loader:
        logits = model(images)
        loss = F.cross_entropy(logits, labels)
        answers = teacher(images).detach()  # added
        loss = (loss + F.kl_div(logits.log_softmax(1), answers.softmax(1), reduction="batchmean")) / 2  # added
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    model.eval()
    result.save(out)  # added
    return result


if __name__ == "__main__":
    typer.run(main)
