"""Two ways to search, at equal epochs: a small DeiT on Fashion-MNIST, converted to 0.7 of its FLOPs and fine-tuned.

    python examples/fashion/search.py                                  # downloads Fashion-MNIST (30 MB)
    python examples/fashion/search.py --data fashion_mnist.npz         # arrays train_x, train_y, test_x, test_y

Every hybrid gets the same number of epochs after the dense training: a gate search spends some of them searching, the
calibrated search all of them fine-tuning.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

import msa2conv
from msa2conv import Gates

Split = tuple[Tensor, Tensor]


def read(data: str | None, train_images: int) -> tuple[Split, Split]:
    """Fashion-MNIST -> ((images, labels) to train on, (images, labels) to test on), normalised."""
    if data is not None:
        arrays = np.load(data, allow_pickle=False)
        pairs = [
            (torch.from_numpy(arrays[f"{part}_x"]), torch.from_numpy(arrays[f"{part}_y"])) for part in ("train", "test")
        ]
    else:
        from torchvision.datasets import FashionMNIST

        sets = [FashionMNIST(Path.home() / ".cache/fashion_mnist", train=part, download=True) for part in (True, False)]
        pairs = [(each.data, each.targets) for each in sets]
    (x, y), test = ((((x.float() / 255 - 0.286) / 0.353)[:, None], y.long()) for x, y in pairs)
    return (x[:train_images], y[:train_images]), test


def small_deit() -> nn.Module:
    """A DeiT for 28 x 28 images: 16 patches, 6 blocks of width 64."""
    size = {"img_size": 28, "patch_size": 7, "in_chans": 1, "num_classes": 10}
    return VisionTransformer(**size, embed_dim=64, depth=6, num_heads=4)


def loss(output: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(output, labels, label_smoothing=0.1)


def loader(split: Split, batch: int) -> DataLoader:
    return DataLoader(TensorDataset(*split), batch, shuffle=True, drop_last=True, collate_fn=_flip)


def _flip(items: list[tuple[Tensor, Tensor]]) -> Split:
    images, labels = torch.stack([image for image, _ in items]), torch.stack([label for _, label in items])
    flip = torch.rand(len(images)) < 0.5
    return torch.where(flip[:, None, None, None], images.flip(3), images), labels


def train(model: nn.Module, split: Split, epochs: int, args: argparse.Namespace, what: str, lr: float) -> nn.Module:
    """A plain loop: AdamW, one cycle."""
    if not epochs:
        return model
    torch.manual_seed(args.seed)
    model, batches = model.train(), loader(split, args.batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * len(batches), pct_start=0.3)
    with tqdm(total=epochs * len(batches), desc=what, disable=None if args.progress else True, leave=False) as bar:
        for _ in range(epochs):
            for images, labels in batches:
                optimizer.zero_grad(set_to_none=True)
                loss(model(images), labels).backward()
                optimizer.step()
                schedule.step()
                bar.update()
    return model.eval()


@torch.no_grad()
def top1(model: nn.Module, split: Split) -> float:
    model.eval()
    right = [(model(x).argmax(1) == y).float() for x, y in zip(split[0].split(500), split[1].split(500), strict=True)]
    return round(100 * float(torch.cat(right).mean()), 2)


def run(args: argparse.Namespace) -> list[dict[str, object]]:
    """Train, convert in every way, fine-tune; rows of the table."""
    torch.manual_seed(args.seed)
    training, testing = read(args.data, args.train_images)
    dense = train(small_deit(), training, args.dense_epochs, args, "train the dense DeiT", 1e-3)
    rows: list[dict[str, object]] = []

    def row(name: str, model: nn.Module, flops: float, before: float, epochs: str, seconds: float) -> None:
        after = top1(model, testing)
        rows.append(
            {"model": name, "FLOPs kept": f"{flops:.1%}", "epochs (search + fine-tune)": epochs,
             "top-1 before fine-tuning": before, "top-1": after, "search s": round(seconds)}
        )  # fmt: skip
        print(rows[-1], flush=True)

    reference = top1(dense, testing)
    more = train(copy.deepcopy(dense), training, args.epochs, args, "train it on", args.lr)
    row("dense, trained on", more, 1.0, reference, f"0 + {args.epochs}", 0)
    searches: dict[str, Callable[[], msa2conv.Conversion]] = {
        "calibrated": lambda: msa2conv.convert(
            dense,
            args.target,
            data=training[0],
            images=args.calibration_images,
            seed=args.seed,
            progress=args.progress,
            levers=("mixer", "ffn"),  # what gates can decide, too
        ),
        "gates (sampled)": lambda: by_gates(dense, training, Gates(), args),
        "gates (annealed)": lambda: by_gates(dense, training, Gates(sampling="annealed"), args),
    }
    for name, search in searches.items():
        started = time.perf_counter()
        result = search()
        seconds, before = time.perf_counter() - started, top1(result.model, testing)
        spent = 0 if name == "calibrated" else args.search_epochs
        what = f"fine-tune: {name}"
        tuned = train(result.model, training, args.epochs - spent, args, what, args.lr)
        kept = result.plan.flops / result.plan.base.flops
        row(name, tuned, kept, before, f"{spent} + {args.epochs - spent}", seconds)
        print(result.plan, "\n", flush=True)
    return rows


def by_gates(dense: nn.Module, training: Split, gates: Gates, args: argparse.Namespace) -> msa2conv.Conversion:
    return msa2conv.convert(
        dense, args.target, search=gates, data=loader(training, args.batch), loss=loss, epochs=args.search_epochs,
        lr=args.lr, seed=args.seed, progress=args.progress,
    )  # fmt: skip


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--data", help="an .npz; without it torchvision downloads Fashion-MNIST")
    found.add_argument("--target", type=float, default=0.7)
    found.add_argument("--train-images", type=int, default=12800)
    found.add_argument("--calibration-images", type=int, default=512)
    found.add_argument("--dense-epochs", type=int, default=8)
    found.add_argument("--epochs", type=int, default=6, help="after the dense training, search included")
    found.add_argument("--search-epochs", type=int, default=3)
    found.add_argument("--batch", type=int, default=128)
    found.add_argument("--lr", type=float, default=5e-4)
    found.add_argument("--seed", type=int, default=0)
    found.add_argument("--no-progress", dest="progress", action="store_false")
    return found


if __name__ == "__main__":
    run(parser().parse_args())
