"""Files that run without msa2conv: what they answer, in a process that cannot import it, and what is refused."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from models import converted, files, images, replaced, snapshot, vit
from sampled import sampled
from torch import Tensor, nn

import msa2conv
from msa2conv import exporting
from msa2conv.errors import ExportFailed, InvalidArgument, InvalidOutputPath, MissingDependency
from msa2conv.merging import Merged
from msa2conv.stream import MergedStream

BLOCKED = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "msa2conv":
            raise ImportError("msa2conv is not there")
sys.meta_path.insert(0, Blocked())
import torch
images = torch.load(sys.argv[2], weights_only=True)
"""
ONNX = """
import onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
found = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: images.numpy()})[0])
"""
PROGRAM = """
found = torch.export.load(sys.argv[1]).module()(images)
"""


def elsewhere(code: str, path: Path, inputs: Tensor) -> Tensor:
    """What a process without msa2conv makes of a file."""
    given, out = path.with_suffix(".in"), path.with_suffix(".out")
    torch.save(inputs, given)
    script = f"{BLOCKED}{code}\ntorch.save(found.detach(), sys.argv[3])"
    subprocess.run([sys.executable, "-c", script, path, given, out], check=True)
    return torch.load(out, weights_only=True)


def answers(model: nn.Module, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(inputs)


@pytest.mark.parametrize(
    ("how", "dynamic"),
    sampled([("onnx", True), ("pt2", False), ("onnx", False), ("pt2", True)], 2),
)
def test_a_file_answers_like_the_hybrid_where_there_is_no_msa2conv(
    how: str, dynamic: bool, tmp_path: Path, recwarn: pytest.WarningsRecorder, caplog: pytest.LogCaptureFixture
) -> None:
    result = converted() if dynamic else replaced("swin")
    before, size = snapshot(result.model), result.plan.base.input_size[-1]
    write, code = (msa2conv.export_onnx, ONNX) if how == "onnx" else (msa2conv.export_program, PROGRAM)
    exported = write(result, tmp_path / f"hybrid.{how}", images=images(8, size), dynamic_batch=dynamic)
    assert snapshot(result.model) == before
    said = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert not recwarn.list and not said, "exporters speak of their own insides"
    assert exported.images == 8 and exported.difference <= 1e-4 and how in str(exported.path)
    assert b"msa2conv" not in exported.path.read_bytes()
    inputs = msa2conv.laws.surest(result.model, images(24, size, seed=1), 3 if dynamic else 1)
    expected = answers(result.model, inputs)
    assert (elsewhere(code, exported.path, inputs) - expected).abs().max() <= 1e-4 * expected.abs().max().clamp_min(1)


@pytest.mark.slow
def test_half_precision_is_half_the_size_and_its_difference_is_told(tmp_path: Path) -> None:
    model = replaced().model
    whole, half = (msa2conv.export_onnx(model, tmp_path / f"{half}.onnx", half=half) for half in (False, True))
    assert half.path.stat().st_size < 0.7 * whole.path.stat().st_size
    assert 1e-4 < half.difference < 0.1
    size = half.path.stat().st_size / 1e6
    assert str(half) == f"{half.path}: {size:.1f} MB; {half.runtime} differs by {half.difference:.1e} on 8 images"


def test_a_hybrid_that_merges_runs_in_half_precision(tmp_path: Path) -> None:
    result = converted()
    assert any(isinstance(module, Merged | MergedStream) for module in result.model.modules())
    exported = msa2conv.export_onnx(result, tmp_path / "half.onnx", half=True, images=images(8))
    assert exported.difference < 0.5, "rounding may decide which tokens merge, no more"


@pytest.mark.parametrize("opset", [17, 99])
def test_an_opset_that_is_not_known(opset: int, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument) as caught:
        msa2conv.export_onnx(vit(), tmp_path / "x.onnx", opset=opset)
    text = str(caught.value)
    assert text.startswith(f"opset: found {opset}; expected 18 to ")
    assert text.endswith(". Leave it out for the one that PyTorch prefers.") and files(tmp_path) == {}


@pytest.mark.parametrize(("wrong", "merges"), [(0, True), (2, True), (3, True), (1, False), (8, True)])
def test_what_a_merge_decided_otherwise_may_be_left_out_and_no_more(wrong: int, merges: bool) -> None:
    """Two of eight images may differ where tokens merge, and none where none do."""
    model, inputs = (converted().model if merges else vit()).eval(), images(8)
    found = answers(model, inputs)
    found[:wrong] += 1
    if wrong <= 2 * merges:
        difference, compared = exporting._difference(model, inputs, [found], "it", demanded=True)
        assert difference <= 1e-6 and compared == 8 - wrong
    else:
        with pytest.raises(ExportFailed, match="found that it answers otherwise by"):
            exporting._difference(model, inputs, [found], "it", demanded=True)
    assert exporting._difference(model, inputs, [found], "it", demanded=False)[1] == 8


class Strange(nn.Module):
    """Its forward does what no exporter follows."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return y * float(y.sum()) if y.sum().item() > 0 else y[..., : int(y.abs().sum().item())]


@pytest.mark.parametrize(("write", "what"), [("export_onnx", "torch.onnx.export"), ("export_program", "torch.export")])
def test_what_pytorch_cannot_export_is_named_and_leaves_no_file(write: str, what: str, tmp_path: Path) -> None:
    with pytest.raises(ExportFailed) as caught:
        getattr(msa2conv, write)(Strange(), tmp_path / "x", example_inputs=torch.zeros(1, 3, 8, 8))
    text = str(caught.value)
    assert text.startswith(f"Strange: found that {what}") and "fails: " in text
    assert text.endswith(
        "; expected a model that can be exported. Export the original in the same way: where that fails too, the "
        "operator has to be avoided there."
    )
    assert files(tmp_path) == {}


@pytest.mark.parametrize(("write", "what"), [("export_onnx", "onnxruntime"), ("export_program", "torch.export")])
def test_a_file_that_answers_otherwise_is_not_kept(
    write: str, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = exporting.tensors_of
    calls: list[int] = []

    def lying(output: Any) -> list[Tensor]:
        calls.append(1)
        last = what == "onnxruntime" or len(calls) == 9  # of eight images one by one, then of the model itself
        return [tensor + 1 if last else tensor for tensor in honest(output)]

    monkeypatch.setattr(exporting, "tensors_of", lying)
    with pytest.raises(ExportFailed) as caught:
        getattr(msa2conv, write)(vit(), tmp_path / "x")
    text = str(caught.value)
    assert text.startswith(f"VisionTransformer: found that {what} answers otherwise by ")
    assert text.endswith(
        "; expected at most 1e-04. The file was not kept. Please report it, with the versions of torch and onnxruntime."
    )
    assert files(tmp_path) == {}


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingDependency) as caught:
        msa2conv.export_onnx(vit(), tmp_path / "x.onnx")
    assert str(caught.value) == (
        "ONNX export: found no package 'onnxruntime'; expected onnx, onnxruntime and onnxscript. "
        "pip install 'msa2conv[onnx]'"
    )


def test_a_path_that_cannot_be_written_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for write in (msa2conv.export_onnx, msa2conv.export_program):
        with pytest.raises(InvalidOutputPath):
            write(vit(), tmp_path / "file" / "x.onnx")
