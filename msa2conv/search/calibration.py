"""Calibration: what one scoring pass measured, savable, and enough for every further budget."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..cost import CostModel
from ..errors import ArchitectureMismatch, InvalidCheckpoint, UnsupportedSchema
from ..files import read_tensors, write_tensors
from ..levers import Record, StreamRecord, read_record
from ..options import Option
from ..plan import fingerprint, weights_sha256
from ..settings import AS_IT_IS, Setting
from ..sites import Claims, Site
from .measure import Measure

FORMAT_KEY, FORMAT_VERSION = "msa2conv.calibration", "2"


def _same_objects(some: list[Any], others: list[Any]) -> bool:
    """Whether two lists hold the very same objects."""
    return len(some) == len(others) and all(one is other for one, other in zip(some, others, strict=True))


@dataclass
class Calibration:
    """Everything measured about one trained model; every further budget reuses it in seconds.

    Args:
        fingerprint, weights: identify the model it belongs to.
        costs: multiply-adds of every site.
        records: fitted options and their scores, one record for a lever at a site.
        images: held-out calibration images, for comparing whole plans.
        reference: the original's output on them.
        measure: "kl" or "relative".
        source: what the images were.
        fitted: how many images the options were fitted on.
        seconds: how long it took.
        warnings: what the user should know.
        stream: scores of merging tokens through the network, where a lever allows it.
    """

    fingerprint: str
    weights: str
    costs: CostModel
    records: list[Record]
    images: Tensor
    reference: Tensor
    measure: Measure
    source: str
    fitted: int = 0
    seconds: float = 0.0
    warnings: list[str] = field(default_factory=list)
    stream: StreamRecord | None = None
    _options: tuple[Any, dict[str, list[Option]]] | None = field(default=None, init=False, repr=False, compare=False)

    def settings(self) -> list[Setting]:
        """What can be chosen for the whole network at once; the network as it is comes first."""
        return [AS_IT_IS, *(() if self.stream is None else self.stream.settings())]

    def options(self) -> dict[str, list[Option]]:
        """{site path: its options, the host among them}; scores are measured or interpolated."""
        made_of = [*self.records, self.stream]
        if self._options is None or not _same_objects(self._options[0], made_of):
            self._options = made_of, self._made()
        return {path: list(options) for path, options in self._options[1].items()}

    def _made(self) -> dict[str, list[Option]]:
        found: dict[str, dict[str, Option]] = {}
        for host in [] if self.stream is None else self.stream.hosts():
            found[host.site] = {host.name: host}
        for record in self.records:
            found.setdefault(record.site, {}).update({option.name: option for option in record.options()})
        alone = {path: list(options.values()) for path, options in found.items()}
        for record in self.records:
            found[record.site].update({option.name: option for option in record.around(alone[record.site])})
        return {path: list(options.values()) for path, options in found.items()}

    @property
    def levers(self) -> list[str]:
        """Names of the levers that it has options of."""
        names = [str(record.state()[0]["lever"]) for record in self.records]
        return list(dict.fromkeys([*names, *(["merge_tokens"] if self.stream is not None else [])]))

    @property
    def sites(self) -> tuple[Site, ...]:
        """Where its options are."""
        through = () if self.stream is None else self.stream.claims.sites
        return tuple({site.path: site for site in (*through, *(record.at for record in self.records))}.values())

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write to one .safetensors file, atomically."""
        tensors = {"images": self.images, "reference": self.reference}
        described = []
        for index, record in enumerate(self.records):
            meta, values = record.state()
            described.append(meta)
            tensors |= {f"{index}|{name}": value for name, value in values.items()}
        costs = {
            "base": self.costs.base,
            "hosts": self.costs.hosts,
            "units": self.costs.units,
            "shapes": self.costs.shapes,
            "samples": self.costs.samples,
            "beside": self.costs.beside,
            "heads": self.costs.heads,
        }
        stream = None if self.stream is None else self.stream.state()
        about = {
            name: getattr(self, name)
            for name in ("fingerprint", "weights", "measure", "source", "fitted", "seconds", "warnings")
        }
        text = json.dumps({"version": FORMAT_VERSION, **about, "costs": costs, "records": described, "stream": stream})
        write_tensors(path, tensors, {FORMAT_KEY: text})
        return Path(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str], claims: Claims) -> Calibration:
        """Read a saved Calibration.

        Args:
            path: the file.
            claims: the sites of the model it belongs to: `msa2conv.inspect(model).claims`.

        Raises:
            InvalidCheckpoint, UnsupportedSchema, ArchitectureMismatch.
        """
        tensors, metadata = read_tensors(path)
        if FORMAT_KEY not in metadata:
            raise InvalidCheckpoint(
                str(path), "no calibration inside", "a file by Calibration.save", "Calibrate again."
            )
        about = json.loads(metadata[FORMAT_KEY])
        if about.pop("version", None) != FORMAT_VERSION:
            raise UnsupportedSchema(str(path), "another version", f"version {FORMAT_VERSION}", "Calibrate again.")
        costs = about.pop("costs")
        costs["shapes"] = {site: tuple(shape) for site, shape in costs["shapes"].items()}
        samples = {site: tuple(map(tuple, found)) for site, found in costs.get("samples", {}).items()}
        costs["samples"] = samples
        model = CostModel(**costs)
        stream = about.pop("stream", None)
        if stream is not None:
            about["stream"] = StreamRecord.read(claims, model, stream)
            if about["stream"] is None:
                raise ArchitectureMismatch(
                    str(path), "tokens merged through the network", "a model whose tokens can be merged so",
                    "Calibrate this model itself.",
                )  # fmt: skip
        sites = {site.path: site for site in claims.sites}
        records: list[Record] = []
        for index, meta in enumerate(about.pop("records")):
            own = {k.split("|", 1)[1]: v for k, v in tensors.items() if k.split("|", 1)[0] == str(index)}
            record = read_record(sites.get(meta["site"]), model, meta, own)
            if record is None:
                raise ArchitectureMismatch(
                    str(path), f"a site {meta['site']!r}", "the sites of this model", "Calibrate this model itself."
                )
            records.append(record)
        return cls(costs=model, records=records, images=tensors["images"], reference=tensors["reference"], **about)

    def without_held_out(self, images: Tensor) -> Tensor:
        """Those images that are not among the held-out ones, so that a polish is judged on images it has not seen."""
        held_out = {image.numpy().tobytes() for image in self.images}
        kept = [index for index, image in enumerate(images) if image.numpy().tobytes() not in held_out]
        return images[kept] if kept else images

    def check_model(self, model: nn.Module) -> None:
        """Raise ArchitectureMismatch unless it was made from this very model (same architecture and weights)."""
        if (fingerprint(model), weights_sha256(model)) != (self.fingerprint, self.weights):
            raise ArchitectureMismatch(
                "calibration",
                "a Calibration of another model or other weights",
                "one of this model",
                "Calibrate again.",
            )


__all__ = ["Calibration"]
