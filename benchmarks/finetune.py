"""What fine-tuning gives back: ViT-Ti/16 on ten kinds of clothing, converted, then trained stage by stage.

    python -m benchmarks.finetune --photos clothing10.npz

The dense network is the fine-tuned one of examples/clothing. Its calibration images are training photos; validation
photos pick the epoch; test photos give the figures. Rows merge, so budgets and stages can be measured in parts.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import msa2conv
from examples.clothing.make import Photos, eval_transform, train_transform
from msa2conv.files import read_state_dict
from msa2conv.search.measure import distance

from .common import against, write

WEIGHTS = Path(__file__).parent.parent / "examples" / "clothing" / "vit_tiny_clothing10.safetensors"
LOCAL = {"kind": "local", "epochs": 1}


def courses(epochs: int) -> dict[str, tuple[list[dict[str, Any]], dict[str, Any]]]:
    """{row: (stages, arguments of finetune)}."""
    distill = {"kind": "distill", "epochs": epochs}
    return {
        "no training": ([], {}),
        "local": ([LOCAL], {"labels": False}),
        "local + global": ([LOCAL, distill], {"labels": False}),
        "local + global + labels": ([LOCAL, distill], {}),
        "global + labels": ([distill], {}),
        "labels alone": ([{"kind": "labels", "epochs": epochs, "lr": 5e-5}], {"teacher": None}),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.7, 0.5])
    parser.add_argument("--courses", nargs="+", default=list(courses(1)), choices=list(courses(1)), metavar="COURSE")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/finetune"), help="where interrupted trainings continue")
    args = parser.parse_args()

    archive = np.load(args.photos, allow_pickle=False)
    train, still = Photos(archive, "train", train_transform), Photos(archive, "train", eval_transform)
    val, test = Photos(archive, "validation", eval_transform), Photos(archive, "test", eval_transform)
    dense = timm.create_model("vit_tiny_patch16_224", num_classes=10)
    dense.load_state_dict(read_state_dict(WEIGHTS))
    reference, labels = answers(dense.eval(), test)
    calibration = msa2conv.calibrate(dense, still, images=256, levers=("mixer", "ffn"), seed=args.seed)
    for budget in args.budgets:
        converted = msa2conv.convert(dense, budget, calibration=calibration, seed=args.seed)
        for course in args.courses:
            stages, options = courses(args.epochs)[course]
            result = converted
            if stages:
                result = msa2conv.finetune(
                    converted, train, val, stages=stages, batch_size=args.batch_size, seed=args.seed,
                    resume=args.out / f"{budget}-{course}-{args.seed}", **options,
                )  # fmt: skip
            found, _ = answers(result.model.eval(), test)
            row = {"row": f"{budget} {course} {args.seed}", "FLOPs": f"{budget:.0%}", "course": course}
            row |= against(reference, found, labels) | {"KL": round(distance(reference, found, "kl"), 3)}
            training = result.report.training
            row |= {"minutes": "" if training is None else round(training.seconds / 60, 1)}
            row |= {"stages": stages, "best": None if training is None else training.best}
            print(row, flush=True)
            note = f"""ViT-Ti/16 with ten classes (examples/clothing), {len(train):,} training photos of which 256
            calibrated, {len(val)} validation photos that picked the epoch, {len(test)} test photos. Lost: points of
            top-1 that the dense network is ahead, with the 95 % interval of the paired difference. KL: to the dense
            network's answers. Levers: mixer and ffn. Local: one epoch, global and labels: {args.epochs}, batch
            {args.batch_size}."""
            write(
                "finetune",
                "python -m benchmarks.finetune --photos clothing10.npz",
                args.seed,
                [row],
                note,
                "row",
                place,
            )


def place(row: dict[str, Any]) -> tuple[float, int]:
    """The largest budget first, then as listed."""
    return -float(row["row"].split()[0]), list(courses(1)).index(row["course"])


@torch.no_grad()
def answers(model: nn.Module, photos: Photos) -> tuple[Tensor, Tensor]:
    """(logits, labels)."""
    pairs = [(model(images), labels) for images, labels in DataLoader(photos, 64)]
    return torch.cat([logits for logits, _ in pairs]), torch.cat([labels for _, labels in pairs])


if __name__ == "__main__":
    main()
