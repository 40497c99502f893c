"""What lets an interrupted calibration continue: measurements in one JSON file, fitted options in one file a site."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, FiniteFloat, ValidationError
from torch import Tensor, nn

from .. import __version__
from ..cost import CostModel
from ..errors import InvalidArgument, InvalidCheckpoint
from ..files import read_tensors, write_tensors, write_text
from ..levers import Lever, Record, read_record
from ..plan import fingerprint, weights_sha256
from ..sites import Site

_FORMAT = "2"
_EVERY = 2.0  # seconds of measuring that a power cut may cost
_MEASURED = "progress.json"
OPTION_FILE = "width.safetensors"  # of a narrower network, in a folder of its own


class _Measured(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    inputs: dict[str, str]
    seconds: FiniteFloat = 0.0
    prefix_weights: dict[str, FiniteFloat] = {}
    scores: dict[str, dict[str, FiniteFloat]] = {}
    sha256: str = ""

    def checksum(self) -> str:
        return _sha256(self.model_copy(update={"sha256": ""}).model_dump_json(), {})


class Journal:
    """What a calibration has done so far, kept in a folder; without one it remembers nothing.

    Every file is written whole or not at all and carries a checksum; what is damaged is measured or fitted again. The
    checksum of a fitted site covers the inputs too, since it may outlive the file that names them. Used as a context
    manager, it writes down the last measurements however the calibration ends.

    Args:
        folder: made if needed; None: nothing is read, hashed or written.
        model, sites, images, levers, seed: what the calibration depends on.

    Raises:
        InvalidArgument: the folder belongs to a calibration of other inputs.
        InvalidOutputPath: the folder cannot be written.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str] | None,
        model: nn.Module,
        sites: Sequence[Site],
        images: Tensor,
        levers: Sequence[Lever],
        seed: int,
    ) -> None:
        self.folder = None if folder is None else Path(folder)
        self.started = self.saved = time.monotonic()
        self._done = _Measured(inputs={})
        if self.folder is None:
            return
        inputs = {
            "version of msa2conv": f"{__version__}, format {_FORMAT}",
            "model": fingerprint(model),
            "weights": weights_sha256(model),
            "sites": _sha256(repr(sites), {}),
            "images": _sha256("", {"images": images}),
            "levers": repr(levers),
            "seed": str(seed),
        }
        self._done = _read(self.folder / _MEASURED) or _Measured(inputs=inputs)
        found = self._done.inputs
        different = [name for name in inputs | found if inputs.get(name) != found.get(name)]
        if different:
            raise InvalidArgument(
                str(folder),
                f"the progress of a calibration with other {', '.join(different)}",
                "one with the same model, images, levers and seed",
                "Pass another folder, or delete this one to calibrate anew.",
            )
        self.save()

    @property
    def prefix_weights(self) -> dict[str, float]:
        """{site path: weight of its prefix rows}."""
        return self._done.prefix_weights

    @property
    def scores(self) -> dict[str, dict[str, float]]:
        """{site path: {option name: score}}."""
        return self._done.scores

    @property
    def seconds(self) -> float:
        """How long the calibration has taken, earlier runs included."""
        return self._done.seconds + time.monotonic() - self.started

    def read(self, site: Site, lever: str, costs: CostModel) -> Record | None:
        """The fitted options of a lever at a site; None where they have to be fitted."""
        if self.folder is None:
            return None
        try:
            tensors, metadata = read_tensors(self._file(site.path, lever))
        except (InvalidCheckpoint, OSError):
            return None
        described = metadata.get("record", "")
        if metadata.get("sha256") != self._checksum(site.path, described, tensors):
            return None
        return read_record(site, costs, json.loads(described), tensors)

    def keep(self, record: Record, lever: str) -> None:
        """Write down the fitted options of a lever at a site."""
        if self.folder is not None:
            meta, tensors = record.state()
            described = json.dumps(meta)
            metadata = {"record": described, "sha256": self._checksum(record.site, described, tensors)}
            write_tensors(self._file(record.site, lever), tensors, metadata)

    def save_now_and_then(self) -> None:
        """Write down prefix weights and scores, unless that was done a moment ago."""
        if time.monotonic() - self.saved > _EVERY:
            self.save()

    def save(self) -> None:
        """Write down prefix weights and scores."""
        if self.folder is not None:
            done = self._done.model_copy(update={"seconds": self.seconds})
            done.sha256 = done.checksum()
            write_text(self.folder / _MEASURED, done.model_dump_json(indent=2) + "\n")
            self.saved = time.monotonic()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.save()

    def _file(self, site: str, lever: str) -> Path:
        assert self.folder is not None
        # a path may be longer than a file's name
        return self.folder / f"site-{_sha256(f'{site} {lever}', {})[:16]}.safetensors"

    def _checksum(self, site: str, described: str, tensors: Mapping[str, Tensor]) -> str:
        return _sha256(json.dumps([self._done.inputs, site, described], sort_keys=True), tensors)


def discard(folder: Path) -> None:
    """Delete what a calibration wrote to a folder, and the folder if it holds nothing else. Never fails."""
    for narrower in folder.glob("width-*"):
        discard(narrower)
    with suppress(OSError):
        for path in [
            folder / _MEASURED,
            folder / OPTION_FILE,
            *folder.glob("site-*.safetensors"),
            *folder.glob(".*.part"),
        ]:
            path.unlink(missing_ok=True)
        folder.rmdir()


def _read(path: Path) -> _Measured | None:
    """Earlier measurements; None where there are none or the file is damaged: then they are made again."""
    try:
        measured = _Measured.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None
    return measured if measured.sha256 == measured.checksum() else None


def _sha256(text: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"|{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
