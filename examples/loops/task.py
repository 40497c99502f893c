"""What the three loops train: a ViT of toy size, and stripes to classify. Put your own model and loader here."""

from __future__ import annotations

import math
from pathlib import Path

import timm
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from msa2conv.data import image_folder
from msa2conv.plan import Preprocessing

SIZE, CLASSES = 32, 10


def model() -> nn.Module:
    """Random weights stand in for trained ones, so that nothing has to be downloaded."""
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=SIZE, patch_size=8, embed_dim=48, depth=3, num_heads=3, num_classes=CLASSES
    )


def loader(steps: int, folder: Path | None = None, batch: int = 16) -> DataLoader[tuple[Tensor, Tensor]]:
    """`steps` batches of (images, labels): a folder with up to ten subfolders of photos, or stripes by direction."""
    half = (0.5, 0.5, 0.5)
    images = image_folder(folder, (3, SIZE, SIZE), Preprocessing(mean=half, std=half)) if folder else stripes(256)
    repeated = Subset(images, [i % len(images) for i in range(steps * batch)])
    return DataLoader(repeated, batch, shuffle=True, drop_last=True)


def stripes(count: int) -> Dataset[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(0)
    labels = torch.randint(CLASSES, (count,), generator=draw)
    angles = (labels * math.pi / CLASSES)[:, None, None]
    rows, columns = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    waves = torch.sin(0.8 * (rows * angles.cos() + columns * angles.sin()))[:, None]
    return TensorDataset(waves + 0.5 * torch.randn(count, 3, SIZE, SIZE, generator=draw), labels)
