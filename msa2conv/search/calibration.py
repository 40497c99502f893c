"""Calibration: what one scoring pass measured, savable, and enough for every further budget."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..cost import CostModel
from ..errors import ArchitectureMismatch, InvalidCheckpoint, UnsupportedSchema
from ..files import read_tensors, write_tensors
from ..levers import Record, StreamRecord, read_record
from ..options import Option
from ..plan import WHOLE, fingerprint, read_edits, weights_sha256
from ..settings import AS_IT_IS, Setting
from ..sites import Claims, Site
from .measure import Measure

FORMAT_KEY, FORMAT_VERSION = "msa2conv.calibration", "2"


def _same_objects(some: list[Any], others: list[Any]) -> bool:
    """Whether two lists hold the very same objects."""
    return len(some) == len(others) and all(one is other for one, other in zip(some, others, strict=True))


@dataclass(frozen=True)
class Narrowed:
    """The model with narrower residual streams, and what the other levers make of it.

    Args:
        option: what makes it; its score is how far it is from the original.
        channels: {site path: channels of its stream}.
        calibration: of the narrower model, on the same images; its `reference` is the original's.
    """

    option: Option
    channels: dict[str, int]
    calibration: Calibration

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """(JSON-able description, tensors)."""
        about, tensors = self.calibration.state()
        option = self.option
        meta: dict[str, Any] = {
            "name": option.name,
            "score": option.score,
            "channels": self.channels,
            "calibration": about,
        }
        meta["edits"] = [edit.model_dump(mode="json") for edit in option.edits]
        own = {f"own|{name}": value for name, value in option.tensors().items()}
        return meta, own | {f"calibration|{name}": value for name, value in tensors.items()}

    @classmethod
    def read(cls, meta: dict[str, Any], tensors: Mapping[str, Tensor], claims: Claims, where: str) -> Narrowed:
        """What `state` described, of a model with these sites."""
        own = _below("own", tensors)
        option = Option(WHOLE, meta["name"], 0, read_edits(meta["edits"]), lambda: own, meta["score"])
        if not {site.path for site in claims.sites} <= set(meta["channels"]):
            raise _another_model(where, f"the sites {', '.join(meta['channels'])}")
        narrower = claims.of_width(meta["channels"])
        calibration = Calibration.read(meta["calibration"], _below("calibration", tensors), narrower, where)
        return cls(option, meta["channels"], calibration)


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those whose names start so, without it."""
    return {name.removeprefix(f"{prefix}|"): value for name, value in tensors.items() if name.startswith(f"{prefix}|")}


def _another_model(where: str, found: str) -> ArchitectureMismatch:
    return ArchitectureMismatch(where, found, "the sites of this model", "Calibrate this model itself.")


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
        narrower: the same with fewer channels, where a lever allows it.
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
    narrower: list[Narrowed] = field(default_factory=list)
    _options: tuple[Any, dict[str, list[Option]]] | None = field(default=None, init=False, repr=False, compare=False)

    def widths(self) -> list[tuple[Option | None, Calibration]]:
        """The networks in which sites choose, the model as it is first: (what makes it, its calibration)."""
        found: list[tuple[Option | None, Calibration]] = [(None, self)]
        for narrow in self.narrower:
            paths = narrow.calibration.options()
            # a plan's cost is a sum over the sites of the model as it is: all else that gets cheaper counts here
            flops = narrow.calibration.costs.outside(paths) - self.costs.outside(paths)
            found.append((replace(narrow.option, flops=flops), narrow.calibration))
        return found

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
        whole = {"merge_tokens": self.stream is not None, "width": bool(self.narrower)}
        return list(dict.fromkeys([*names, *(name for name, allowed in whole.items() if allowed)]))

    @property
    def sites(self) -> tuple[Site, ...]:
        """Where its options are."""
        through = () if self.stream is None else self.stream.claims.sites
        return tuple({site.path: site for site in (*through, *(record.at for record in self.records))}.values())

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write to one .safetensors file, atomically."""
        about, tensors = self.state()
        write_tensors(path, tensors, {FORMAT_KEY: json.dumps({"version": FORMAT_VERSION, **about})})
        return Path(path)

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """(JSON-able description, tensors)."""
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
        about = {
            name: getattr(self, name)
            for name in ("fingerprint", "weights", "measure", "source", "fitted", "seconds", "warnings")
        }
        about |= {"costs": costs, "records": described}
        about |= {"stream": None if self.stream is None else self.stream.state(), "narrower": []}
        for index, narrow in enumerate(self.narrower):
            meta, values = narrow.state()
            about["narrower"].append(meta)
            tensors |= {f"narrower {index}|{name}": value for name, value in values.items()}
        return about, tensors

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
        return cls.read(about, tensors, claims, str(path))

    @classmethod
    def read(cls, about: dict[str, Any], tensors: Mapping[str, Tensor], claims: Claims, where: str) -> Calibration:
        """What `state` described, of a model with these sites; `where` it was found, for errors.

        Raises:
            ArchitectureMismatch.
        """
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
                    where, "tokens merged through the network", "a model whose tokens can be merged so",
                    "Calibrate this model itself.",
                )  # fmt: skip
        sites = {site.path: site for site in claims.sites}
        records: list[Record] = []
        for index, meta in enumerate(about.pop("records")):
            record = read_record(sites.get(meta["site"]), model, meta, _below(str(index), tensors))
            if record is None:
                raise _another_model(where, f"a site {meta['site']!r}")
            records.append(record)
        narrower = [
            Narrowed.read(meta, _below(f"narrower {index}", tensors), claims, where)
            for index, meta in enumerate(about.pop("narrower", []))
        ]
        about["narrower"] = narrower
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


__all__ = ["Calibration", "Narrowed"]
