"""Hybrids as files that run without msa2conv: ONNX and PyTorch's exported programs, checked before they are kept."""

from __future__ import annotations

import copy
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .adapters.build import preprocessing
from .conversion import Conversion
from .data import views_or_noise
from .errors import ExportFailed, InvalidArgument, MissingDependency
from .files import atomic_write, check_writable
from .laws import merging, surest
from .observation import tensors_of
from .workbench import example_input, own_randomness, unwrap

TOLERANCE = 1e-4  # of the largest output, in float32
OLDEST_OPSET = 18
_CHECKED = 8  # images


@dataclass(frozen=True)
class Exported:
    """A file that was written, and how it was checked.

    Args:
        path: the file.
        difference: the largest one to the model's own outputs, relative to the largest output.
        images: on how many images; a quarter at most is left out where tokens merge and a decision within rounding fell
            otherwise.
        runtime: what ran it.
    """

    path: Path
    difference: float
    images: int
    runtime: str

    def __str__(self) -> str:
        size = self.path.stat().st_size / 1e6
        return f"{self.path}: {size:.1f} MB; {self.runtime} differs by {self.difference:.1e} on {self.images} images"


@own_randomness()
def export_onnx(
    model: nn.Module | Conversion,
    path: str | os.PathLike[str],
    *,
    example_inputs: Tensor | None = None,
    images: Tensor | None = None,
    dynamic_batch: bool = False,
    half: bool = False,
    opset: int | None = None,
) -> Exported:
    """Write a hybrid (or any model) as one ONNX file with no trace of msa2conv in it, and run it in onnxruntime.

    Args:
        model: a Conversion or a module; not touched.
        path: the file; written whole, after it was checked, or not at all.
        example_inputs: a float tensor [B, C, H, W]; by default of the size the model declares.
        images: what to check it on, normalised as the model expects; by default photos that come with msa2conv. Those
            are taken whose merges are decided clearly.
        dynamic_batch: let the batch have any size; otherwise it is one image.
        half: weights, input and output in float16; then the difference is reported and nothing is demanded of it.
        opset: of ONNX, 18 or later; PyTorch's choice by default.

    Raises:
        MissingDependency: onnx, onnxruntime or onnxscript are not installed.
        InvalidArgument: an opset that is not known.
        ExportFailed: PyTorch cannot export the model (says which operator), or onnxruntime answers otherwise.
        InvalidOutputPath: the file cannot be written.

    Example:
        msa2conv.export_onnx(result, "hybrid.onnx", dynamic_batch=True)
    """
    onnx, onnxruntime = _onnx()
    latest = int(onnx.defs.onnx_opset_version())
    if opset is not None and not OLDEST_OPSET <= opset <= latest:
        raise InvalidArgument(
            "opset", repr(opset), f"{OLDEST_OPSET} to {latest}", "Leave it out for the one that PyTorch prefers."
        )
    check_writable(path)
    plain, checked = _prepared(model, example_inputs, images)
    exported = copy.deepcopy(plain).half() if half else plain
    example = checked[:2].to(next(exported.parameters()).dtype)
    with _exporting(plain, "torch.onnx.export"):
        program = torch.onnx.export(
            exported, (example if dynamic_batch else example[:1],), dynamo=True, opset_version=opset, verbose=False,
            dynamic_shapes=({0: torch.export.Dim("batch")},) if dynamic_batch else None,
        )  # fmt: skip
        assert program is not None
        proto = program.model_proto
    _anonymous(proto)
    with atomic_write(path) as temporary:
        onnx.save(proto, temporary)
        with _exporting(plain, "onnxruntime"):
            session = onnxruntime.InferenceSession(temporary, providers=["CPUExecutionProvider"])
            name, parts = session.get_inputs()[0].name, torch.split(checked, len(checked) if dynamic_batch else 1)
            found = [session.run(None, {name: part.to(example.dtype).numpy()}) for part in parts]
        outputs = [torch.cat([torch.from_numpy(each[i]).float() for each in found]) for i in range(len(found[0]))]
        difference, compared = _difference(plain, checked, outputs, "onnxruntime", demanded=not half)
    return Exported(Path(path), difference, compared, f"onnxruntime {onnxruntime.__version__}")


@own_randomness()
def export_program(
    model: nn.Module | Conversion,
    path: str | os.PathLike[str],
    *,
    example_inputs: Tensor | None = None,
    images: Tensor | None = None,
    dynamic_batch: bool = False,
) -> Exported:
    """Write a hybrid (or any model) as a PyTorch program (.pt2), which `torch.export.load` reads without msa2conv.

    Args:
        model, path, example_inputs, images, dynamic_batch: as for `export_onnx`.

    Raises:
        ExportFailed, InvalidOutputPath.

    Example:
        msa2conv.export_program(result, "hybrid.pt2")
        torch.export.load("hybrid.pt2").module()(images)
    """
    check_writable(path)
    plain, checked = _prepared(model, example_inputs, images)
    with _exporting(plain, "torch.export.export"):
        program = torch.export.export(
            plain,
            (checked[:2] if dynamic_batch else checked[:1],),
            dynamic_shapes=({0: torch.export.Dim("batch")},) if dynamic_batch else None,
        )
    for node in program.graph.nodes:  # where each operator came from, by the names of our classes
        for name in ("nn_module_stack", "source_fn_stack", "stack_trace", "from_node", "torch_fn"):
            node.meta.pop(name, None)
    with atomic_write(path) as temporary:
        with temporary.open("wb") as file, _quiet():
            torch.export.save(program, file)
        with temporary.open("rb") as file, _quiet(), torch.no_grad():
            run = torch.export.load(file).module()
            answers = [tensors_of(run(part)) for part in torch.split(checked, len(checked) if dynamic_batch else 1)]
        found = [torch.cat([each[i] for each in answers]) for i in range(len(answers[0]))]
        difference, compared = _difference(plain, checked, found, "torch.export", demanded=True)
    return Exported(Path(path), difference, compared, f"torch {torch.__version__}")


def _onnx() -> tuple[Any, Any]:
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401 (torch.onnx needs it)
    except ImportError as error:
        raise MissingDependency(
            "ONNX export", f"no package {error.name!r}", "onnx, onnxruntime and onnxscript",
            "pip install 'msa2conv[onnx]'",
        ) from error  # fmt: skip
    return onnx, onnxruntime


def _prepared(
    model: nn.Module | Conversion, example_inputs: Tensor | None, images: Tensor | None
) -> tuple[nn.Module, Tensor]:
    """A copy in float32 on the CPU in eval mode, and the images to check it on."""
    plain = copy.deepcopy(unwrap(model.model if isinstance(model, Conversion) else model))
    plain = plain.float().cpu().eval().requires_grad_(False)
    if images is None:
        size = tuple(example_input(plain, example_inputs).shape[1:])
        images = views_or_noise(size, preprocessing(plain))
    return plain, surest(plain, images[:32].float().cpu(), _CHECKED)


@contextmanager
def _quiet() -> Iterator[None]:
    """Exporters talk about their own insides, which is no matter of the user's: the file is checked anyway."""
    logger = logging.getLogger("onnx_ir")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


@contextmanager
def _exporting(model: nn.Module, what: str) -> Iterator[None]:
    """Turn whatever an exporter raises into one error that names what it could not do."""
    try:
        with _quiet():
            yield
    except Exception as error:
        deepest: BaseException = error
        while deepest.__cause__ is not None:
            deepest = deepest.__cause__
        lines = [line.strip() for line in str(deepest).splitlines() if line.strip()]
        raise ExportFailed(
            type(model).__name__,
            f"that {what} fails: {lines[0] if lines else type(deepest).__name__}",
            "a model that can be exported",
            "Export the original in the same way: where that fails too, the operator has to be avoided there.",
        ) from error


def _difference(model: nn.Module, images: Tensor, found: list[Tensor], what: str, demanded: bool) -> tuple[float, int]:
    """(the largest difference of any image, of how many); raises ExportFailed where it is demanded to be small.

    A merge that is decided within rounding may be decided otherwise by another runtime, and either answer is right. A
    file that is wrong is so on most images, so a quarter of them may be left out where tokens merge.
    """
    with torch.no_grad():
        expected = tensors_of(model(images))
    pairs = zip(found, expected, strict=True)
    relative = [(one - other).abs().flatten(1).amax(1) / other.abs().max().clamp_min(1.0) for one, other in pairs]
    each_N = torch.stack(relative).amax(0)
    if not demanded:
        return float(each_N.max()), len(images)
    alike_N = each_N <= TOLERANCE
    if int(alike_N.sum()) < len(images) - (len(images) // 4 if merging(model) else 0):
        raise ExportFailed(
            type(model).__name__, f"that {what} answers otherwise by {float(each_N.max()):.1e}",
            f"at most {TOLERANCE:.0e}",
            "The file was not kept. Please report it, with the versions of torch and onnxruntime.",
        )  # fmt: skip
    return float(each_N[alike_N].max()), int(alike_N.sum())


def _anonymous(proto: Any) -> None:
    """Take out where each operator came from: names of Python classes and lines of source."""
    proto.ClearField("metadata_props")
    graphs = [proto.graph, *proto.functions]
    while graphs:
        graph = graphs.pop()
        graph.ClearField("doc_string")
        graph.ClearField("metadata_props")
        for part in ("node", "value_info", "input", "output", "initializer"):
            for item in getattr(graph, part, ()):
                if not isinstance(item, str):  # functions name their inputs and outputs only
                    item.ClearField("doc_string")
                    item.ClearField("metadata_props")
        graphs += [attribute.g for node in graph.node for attribute in node.attribute if attribute.HasField("g")]


__all__ = ["Exported", "export_onnx", "export_program"]
