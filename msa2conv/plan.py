"""The Plan: everything that a search decided, as data. Applying, saving and loading only interpret it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from torch import Tensor, nn

from .errors import InvalidPlan, UnsupportedSchema
from .kernels import SharedStart
from .merging import Merge
from .ops import IO, MixerSpec, Path
from .stream import Stream

SCHEMA_VERSION: Literal[1] = 1
PLAN_KEY = "msa2conv.plan"  # in the header of a .safetensors file
Range = tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=1)]]
WIDTHS = ("embed_dim", "num_features", "head_hidden_size")  # attributes of a model that a new head is built from
WHOLE = ""  # stands among the choices for what concerns every module
SYMBOLS = {"skip": "-", "identity": "=", "constant": "c", "global": "g", "attention": "M"}


class _Data(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class Replace(_Data):
    """Put the module built from `spec` in the place of the module at `path`.

    Args:
        start: where its parameters start when `apply` is given no tensors; None: PyTorch's default initialisation.
    """

    kind: Literal["replace"] = "replace"
    path: Path
    spec: MixerSpec
    io: IO
    start: SharedStart | None = None


class Slice(_Data):
    """Keep the index ranges `kept` (half-open, ascending) of dimension `dim` of the parameter at `path`."""

    kind: Literal["slice"] = "slice"
    path: Path
    dim: Annotated[int, Field(ge=0, le=8)]
    kept: Annotated[tuple[Range, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _ascending(self) -> Slice:
        edges = [edge for pair in self.kept for edge in pair]
        if any(a >= b for a, b in self.kept) or edges != sorted(edges):
            raise ValueError("ranges must be non-empty, ascending and disjoint")
        return self

    @property
    def count(self) -> int:
        return sum(stop - start for start, stop in self.kept)


class SetAttr(_Data):
    """Set an existing plain attribute (int, float, tuple or list of ints) of the module at `path`, keeping its type;
    "" is the model itself."""

    kind: Literal["set"] = "set"
    path: Path | Literal[""]
    name: Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_]*$", max_length=64)]
    value: int | float | tuple[int, ...]

    @model_validator(mode="after")
    def _known(self) -> SetAttr:
        if not self.path and self.name not in WIDTHS:
            raise ValueError(f"of the model itself only {', '.join(WIDTHS)} can be set")
        return self


class Wrap(_Data):
    """Run the module at `path` on merged tokens; it stands at `path.host` afterwards."""

    kind: Literal["wrap"] = "wrap"
    path: Path
    spec: Merge
    io: IO


class Shorten(_Data):
    """Let the sequence of blocks at `path` run on fewer and fewer tokens; the blocks keep their paths."""

    kind: Literal["shorten"] = "shorten"
    path: Path
    spec: Stream


Edit = Annotated[Replace | Slice | SetAttr | Wrap | Shorten, Field(discriminator="kind")]


def read_edits(described: Any) -> tuple[Edit, ...]:
    """Edits out of what `model_dump(mode="json")` made of each; raises pydantic's ValidationError."""
    found: tuple[Edit, ...] = TypeAdapter(tuple[Edit, ...]).validate_json(json.dumps(described))
    return found


def ranges(indices: list[int]) -> tuple[Range, ...]:
    """Ascending indices -> half-open ranges: [0, 1, 2, 5] -> ((0, 3), (5, 6))."""
    kept: list[tuple[int, int]] = []
    for index in sorted(indices):
        if kept and kept[-1][1] == index:
            kept[-1] = (kept[-1][0], index + 1)
        else:
            kept.append((index, index + 1))
    return tuple(kept)


Side = Annotated[int, Field(ge=0, le=65536)]


class Builder(_Data):
    """How to build the base model again: `timm.create_model(name, **kwargs)`."""

    library: Literal["timm"] = "timm"
    name: Annotated[str, Field(max_length=256, pattern=r"^[A-Za-z0-9_.\-]+$")]
    kwargs: dict[Annotated[str, Field(pattern="^(num_classes|img_size)$")], Side | tuple[Side, Side]] = {}


class Preprocessing(_Data):
    """How the model's images are normalised and cropped (timm's `pretrained_cfg`)."""

    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    crop_pct: float = 0.875
    interpolation: str = "bicubic"


class Base(_Data):
    """The model that a Plan applies to.

    Args:
        name: what to call it in a table.
        model_class: qualified class name.
        builder: how to build it again, where that is known.
        input_size: (C, H, W) of the example input.
        preprocessing: how its images are prepared, where that is known.
        flops: multiply-adds of one forward pass at batch 1.
        parameters: number of parameters.
        fingerprint: sha256 of all parameter and buffer names and shapes.
        weights_sha256: sha256 of the source weights.
    """

    name: str
    model_class: str
    builder: Builder | None = None
    input_size: tuple[int, ...]
    preprocessing: Preprocessing | None = None
    flops: Annotated[int, Field(gt=0)]
    parameters: Annotated[int, Field(gt=0)]
    fingerprint: str
    weights_sha256: str


class Plan(_Data):
    """What becomes of every site, for people (`choices`) and for the machine (`edits`).

    `print(plan)` is a picture. JSON by `plan.model_dump_json()`, back by `Plan.from_json(text)`.

    Args:
        base: the model it applies to.
        choices: {site path: option name}, in execution order; what concerns the whole network comes first.
        edits: what `apply` does, in order.
        flops: multiply-adds of the hybrid, one forward pass at batch 1.
        parameters: number of parameters of the hybrid.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    base: Base
    choices: dict[str, str]
    edits: tuple[Edit, ...]
    flops: Annotated[int, Field(gt=0)]
    parameters: Annotated[int, Field(gt=0)]

    @classmethod
    def from_json(cls, text: str, where: str = "plan") -> Plan:
        """Parse a Plan; raises UnsupportedSchema or InvalidPlan, never runs anything."""
        try:
            version = _VersionOnly.model_validate_json(text).schema_version
        except ValidationError as error:
            raise InvalidPlan(where, _first(error), "the JSON of a Plan", "Write it with Conversion.save.") from error
        if version != SCHEMA_VERSION:
            raise UnsupportedSchema(
                where,
                f"Plan schema version {version}",
                f"version {SCHEMA_VERSION}",
                "Read it with the msa2conv release that wrote it, or convert the original again.",
            )
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            hint = "The file is damaged or was edited by hand: convert the original again."
            raise InvalidPlan(where, _first(error), "a well-formed Plan", hint) from error

    @property
    def sites(self) -> dict[str, str]:
        """The choices at sites, without those that concern the whole network."""
        through = {WHOLE, *(edit.path for edit in self.edits if isinstance(edit, Shorten))}
        return {path: option for path, option in self.choices.items() if path not in through}

    @property
    def everywhere(self) -> list[str]:
        """The choices that concern the whole network, for people."""
        through = {path: option for path, option in self.choices.items() if path not in self.sites}
        return [
            option if path == WHOLE else f"patches left through {path}: {option}" for path, option in through.items()
        ]

    @property
    def header(self) -> dict[str, str]:
        """What stands beside the tensors in a .safetensors file."""
        return {"format": "pt", PLAN_KEY: self.model_dump_json()}

    def __str__(self) -> str:
        base = self.base
        ratio, kept = self.flops / base.flops, self.parameters / 1e6
        lines = [
            f"{base.name}   {base.flops / 1e9:.2f} -> {self.flops / 1e9:.2f} GFLOPs ({ratio:.1%})"
            f"   {base.parameters / 1e6:.1f} -> {kept:.1f} M params"
        ]
        attentions = [option for option in self.sites.values() if "/" not in option]
        ffns = [option for option in self.sites.values() if "/" in option]
        rows = [("mixer", [symbol(option) for option in attentions], "")]
        rows += [("tokens", [_tokens(option) for option in attentions], "")]
        rows += [
            ("ffn", [units(option) for option in ffns], " %"),
            ("tokens", [_tokens(option) for option in ffns], ""),
        ]
        rows = [(name, cells, unit) for name, cells, unit in rows if any(cells)]
        columns = max(len(attentions), len(ffns))
        wide = max(4, *(len(cell) + 1 for _, cells, _ in rows for cell in cells))
        for start in range(0, columns, 12):
            stop = min(start + 12, columns)
            if start:
                lines.append("")
            lines.append("block " + "".join(f"{i:{wide}d}" for i in range(start, stop)))
            for name, cells, unit in rows:
                lines.append(f"{name:<6}" + "".join(f"{cell:>{wide}}" for cell in cells[start:stop]) + unit)
        used = dict.fromkeys(_inner(option) for option in attentions)
        legend = [f"{symbol(option)} {option}" for option in sorted(used, key=lambda o: _order(symbol(o)))]
        legend += ["% hidden units kept"] if ffns else []
        legend += ["L a linear layer, or two"] if any(units(option).startswith("L") for option in ffns) else []
        legend += ["tokens: patches that are left inside"] if any(name == "tokens" for name, _, _ in rows) else []
        return "\n".join([*lines, *self.everywhere, "", "  ".join(legend)])


class _VersionOnly(BaseModel):
    schema_version: int


def _order(sign: str) -> int:
    return "-=cg".find(sign) if sign in "-=cg" else {"A": 98, "M": 99}.get(sign, 10)


def symbol(option: str) -> str:
    """One or two characters for an option name: 'conv3x3' -> '3', 'depthwise3x3' -> 'd3'."""
    option = _inner(option)
    if option.startswith("attend"):
        return "A"
    conv = re.match(r"(conv|depthwise)(\d+)x", option)
    return ("d" if conv[1] == "depthwise" else "") + conv[2] if conv else SYMBOLS.get(option, option[:2])


def _inner(option: str) -> str:
    """'attention@98' -> 'attention'."""
    return option.partition("@")[0]


def _tokens(option: str) -> str:
    """'attention@98' -> '98'."""
    return option.partition("@")[2]


def units(option: str) -> str:
    """Of an FFN: '384/768@98' -> '50' (percent), 'linear/768' -> 'L', 'linear48/768' -> 'L48'."""
    kept, total = _inner(option).split("/")
    return f"{100 * int(kept) / int(total):.0f}" if kept.isdecimal() else kept.replace("linear", "L")


def _first(error: ValidationError) -> str:
    detail: Mapping[str, Any] = error.errors()[0]
    where = ".".join(str(part) for part in detail["loc"]) or "text"
    return f"{detail['msg'].lower()} at {where}"


def fingerprint(model: nn.Module) -> str:
    """sha256 of the names and shapes of all parameters and persistent buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)};".encode())
    return digest.hexdigest()


def weights_sha256(model: nn.Module) -> str:
    """sha256 of the values of all parameters and persistent buffers, in their own dtype."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    import torch

    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def parameter_count(model: nn.Module) -> int:
    """Number of parameters, shared ones counted once."""
    return sum(parameter.numel() for parameter in model.parameters())
