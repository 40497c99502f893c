"""What the measurements share: reading data, writing a result with everything needed to repeat it."""

from __future__ import annotations

import io
import json
import math
import os
import platform
import resource
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from filelock import FileLock
from PIL import Image
from safetensors.torch import load_file

from msa2conv.api import versions
from msa2conv.data import transform
from msa2conv.files import write_json
from msa2conv.plan import Preprocessing

RESULTS = Path(__file__).parent / "results"
HALF = Preprocessing(mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=0.9)  # how the augreg ViTs of timm were trained


def vit_tiny(weights: Path) -> torch.nn.Module:
    """timm's ViT-Ti/16 with the weights in a safetensors file."""
    model = timm.create_model("vit_tiny_patch16_224")
    model.load_state_dict(load_file(weights))
    return model.eval()


def unpacked(packed: np.lib.npyio.NpzFile, prefix: str = "") -> Iterator[Image.Image]:
    """The JPEGs in an npz: the arrays `jpeg` and `offsets`, with a prefix."""
    data, offsets = packed[f"{prefix}jpeg"].tobytes(), packed[f"{prefix}offsets"].tolist()
    for start, stop in pairwise(offsets):
        yield Image.open(io.BytesIO(data[start:stop])).convert("RGB")


def packed_photos(path: Path, prepared: Preprocessing = HALF) -> tuple[torch.Tensor, torch.Tensor]:
    """An npz of JPEGs (keys jpeg, offsets, labels) -> (images [n, 3, 224, 224], labels [n])."""
    packed = np.load(path, allow_pickle=False)
    prepare = transform((3, 224, 224), prepared)
    images = [prepare(photo) for photo in unpacked(packed)]
    return torch.stack(images), torch.from_numpy(packed["labels"].astype("int64"))


def split(count: int, first: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A random split of range(count) into `first` indices and the others."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return order[:first], order[first:]


def against(reference: torch.Tensor, found: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
    """Top-1, and what is lost against the reference, with a 95 % interval of the paired difference."""
    before, after = (output.argmax(1) == labels for output in (reference, found))
    difference = before.double() - after.double()
    half = 1.96 * float(difference.std()) / math.sqrt(len(labels))
    lost = 100 * float(difference.mean())
    interval = f"{lost - 100 * half:.1f} to {lost + 100 * half:.1f}"
    return {"top-1": round(100 * float(after.double().mean()), 1), "lost": round(lost, 1), "95 %": interval}


def device_name(device: str = "cpu") -> str:
    """What a result says about where it was measured."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def peak_gib() -> float:
    """Largest resident memory of this process so far, in GiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak * (1 if sys.platform == "darwin" else 1024) / 2**30, 2)


def write(
    name: str,
    command: str,
    seed: int,
    rows: Sequence[dict[str, Any]],
    note: str,
    key: str = "",
    order: Callable[[dict[str, Any]], Any] | None = None,
    device: str = "cpu",
) -> None:
    """Write results/<name>.json; `python -m benchmarks.table` makes the tables.

    With `key`, rows of an earlier run on the same device with the same seed and versions are kept unless their value of
    that key is measured anew: long sweeps can then be run in parts, also at the same time. `order` sorts the rows.
    `device`: where it was measured.
    """
    about = {
        "command": command,
        "seed": seed,
        "device": device_name(device),
        "versions": versions(),
        "note": " ".join(note.split()),
    }
    path, kept = RESULTS / f"{name}.json", list[dict[str, Any]]()
    with FileLock(path.with_suffix(".lock")):
        if key and path.is_file():
            before = json.loads(path.read_text())
            if all(before[part] == about[part] for part in ("seed", "device", "versions")):
                kept = [row for row in before["rows"] if row[key] not in {row[key] for row in rows}]
        merged = [*kept, *rows]
        write_json(path, {**about, "rows": sorted(merged, key=order) if order else merged})
    print(json.dumps(about, indent=2), "\nnow: python -m benchmarks.table")
