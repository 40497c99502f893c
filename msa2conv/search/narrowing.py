"""The calibrated search in narrower networks: each width is fitted, and calibrated as the model itself is."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from ..cost import CostModel
from ..errors import InvalidCheckpoint
from ..files import read_tensors, write_tensors
from ..levers import Lever
from ..levers.narrow import narrowed
from ..options import Option
from ..plan import WHOLE, read_edits
from ..sites import Claims, WidthGroup
from ..transforms.lift import edited
from .calibrate import calibrate_sites
from .calibration import Calibration, Narrowed
from .measure import OutputFn, distance, outputs
from .resume import OPTION_FILE

_IMAGES = 64  # enough rows for any reader of tokens


def calibrate_widths(
    model: nn.Module,
    claims: Claims,
    group: WidthGroup,
    narrower: Mapping[tuple[int, ...], CostModel],
    levers: Sequence[Lever],
    calibration: Calibration,
    images: Tensor,
    *,
    seed: int = 0,
    progress: bool = True,
    resume: str | os.PathLike[str] | None = None,
    output_fn: OutputFn | None = None,
) -> list[Narrowed]:
    """Fit every narrower network, and calibrate the levers in it.

    Args:
        model, claims: float32, in eval mode, and its sites; not touched.
        group: its residual streams.
        narrower: {channels left of every stream: costs}.
        levers: what may change in it.
        calibration: of the model as it is, on the same images.
        images: [n, C, H, W].
        seed, progress, resume, output_fn: as for `calibrate_sites`.
    """
    fitting, found = calibration.without_held_out(images)[:_IMAGES], list[Narrowed]()
    for channels, costs in narrower.items():
        folder = None if resume is None else Path(resume) / f"width-{'-'.join(map(str, channels))}"
        option = None if folder is None else _read(folder / OPTION_FILE)
        if option is None:
            option = narrowed(model, claims, group, channels, fitting, progress=progress)
            if folder is not None:
                _write(folder / OPTION_FILE, option)
        narrow = edited(model, WHOLE, option.edits, option.tensors())
        left = group.left(channels)
        fitted = calibrate_sites(
            narrow,
            claims.of_width(left),
            costs,
            images,
            levers,
            source=calibration.source,
            seed=seed,
            progress=progress,
            resume=folder,
            output_fn=output_fn,
        )
        fitted.reference = calibration.reference
        far = distance(calibration.reference, outputs(narrow, fitted.images, output_fn=output_fn), fitted.measure)
        found.append(Narrowed(replace(option, score=far), left, fitted))
    return found


def _write(path: Path, option: Option) -> None:
    described = {"name": option.name, "edits": [edit.model_dump(mode="json") for edit in option.edits]}
    write_tensors(path, dict(option.tensors()), {"option": json.dumps(described)})


def _read(path: Path) -> Option | None:
    """What an interrupted run has fitted; None where it has to be fitted."""
    try:
        tensors, metadata = read_tensors(path)
        described = json.loads(metadata["option"])
        return Option(WHOLE, described["name"], 0, read_edits(described["edits"]), lambda: tensors)
    except (InvalidCheckpoint, OSError, KeyError, ValueError):
        return None


__all__ = ["calibrate_widths"]
