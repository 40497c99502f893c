"""Files: what is written, that it is written whole or not at all, and that it comes back bit for bit."""

from __future__ import annotations

import copy
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import converted, files, images, same, seeded, snapshot, swin, vit
from safetensors import safe_open
from sampled import sampled
from torch import nn

import msa2conv
from msa2conv import convert, load, read_plan
from msa2conv.files import read_state_dict, write_tensors, write_text

BUILD: dict[str, Callable[[], nn.Module]] = {"vit": vit, "swin": swin}


def other_weights(kind: str) -> nn.Module:
    return seeded(BUILD[kind](), seed=7)


@pytest.mark.parametrize("kind", BUILD)
def test_a_file_comes_back_bit_for_bit(tmp_path: Path, kind: str) -> None:
    result, x = converted(kind), images(2, 32 if kind == "vit" else 56)
    path = result.save(tmp_path / "deep" / "er" / "hybrid.safetensors")
    assert list(files(tmp_path)) == ["deep", "deep/er", "deep/er/hybrid.safetensors"]
    hybrid = load(path, other_weights(kind))
    assert type(hybrid) is type(result.model) and same(hybrid, result.model)
    assert hybrid(x).equal(result.model(x))
    assert read_plan(path) == result.plan


def test_the_model_given_is_not_altered_and_not_shared(tmp_path: Path) -> None:
    path, model = converted().save(tmp_path / "hybrid.safetensors"), other_weights("vit").train()
    model.head.requires_grad_(False)
    before = snapshot(model)
    hybrid = load(str(path), model)
    assert hybrid.training and all(parameter.requires_grad for parameter in hybrid.parameters())
    with torch.no_grad():
        for tensor in [*hybrid.parameters(), *hybrid.buffers()]:
            tensor.zero_()
    assert snapshot(model) == before


def test_buffers_that_are_not_saved_are_not_shared_either(tmp_path: Path) -> None:
    path, model = converted("swin").save(tmp_path / "hybrid.safetensors"), swin()
    before = snapshot(model)
    for buffer in load(path, model).buffers():
        assert not buffer.is_meta
        buffer.zero_()
    assert snapshot(model) == before


@pytest.mark.parametrize("kind", BUILD)
@pytest.mark.parametrize("dtype", sampled([torch.bfloat16, torch.float16], 1), ids=str)
def test_half_precision_stays_half(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    """Whatever the precision of the model given; shifted windows keep their attention, so that masks are in use."""
    x = images(8, 32 if kind == "vit" else 56)
    result = convert(BUILD[kind]().to(dtype), 0.8, data=x, levers="ffn")
    path = result.save(tmp_path / "hybrid.safetensors")
    with safe_open(path, "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {dtype}  # noqa: SIM118 (not a dict)
    for model in (other_weights(kind), other_weights(kind).to(dtype)):
        hybrid = load(path, model)
        assert {parameter.dtype for parameter in hybrid.parameters()} == {dtype}
        assert hybrid(x.to(dtype)).equal(result.model(x.to(dtype)))


def test_a_folder_holds_model_plan_report_and_card(tmp_path: Path) -> None:
    result, folder = converted(), tmp_path / "out"
    assert result.save(folder) == folder / "model.safetensors"
    figures = {"figures", *(f"figures/{name}.png" for name in ("plan", "flops", "tradeoff", "heads"))}
    assert set(files(folder)) == {"model.safetensors", "plan.json", "report.json", "report.html", "README.md"} | figures
    assert same(load(folder, vit()), result.model) and read_plan(folder) == result.plan
    assert msa2conv.Plan.from_json((folder / "plan.json").read_text()) == result.plan
    assert type(result.report).model_validate(json.loads((folder / "report.json").read_text())) == result.report
    card = (folder / "README.md").read_text()
    for text in (str(result.plan), str(result.report), result.plan.base.weights_sha256, "msa2conv.load"):
        assert text in card
    assert result.save(folder) == folder / "model.safetensors"  # over itself


def test_files_are_readable_by_others(tmp_path: Path) -> None:
    converted().save(tmp_path / "out")
    converted().calibration.save(tmp_path / "calibration.safetensors")
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) == 10 and {stat.S_IMODE(path.stat().st_mode) for path in written} == {0o644}


class Crash(BaseException):
    """A power cut: not an Exception, so that nothing handles it."""


def half(tensors: Any, path: Path, metadata: Any) -> None:
    path.write_bytes(b"half a file")
    raise Crash


@pytest.mark.parametrize("name", ["hybrid.safetensors", "folder"])
@pytest.mark.parametrize("existing", [True, False])
def test_a_crash_leaves_the_old_file_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, existing: bool
) -> None:
    if existing:
        converted().save(tmp_path / name)
    before = {path: content for path, content in files(tmp_path).items() if content is not None}
    monkeypatch.setattr("msa2conv.files.save_file", half)
    other = convert(vit(), 0.7, calibration=converted().calibration)
    with pytest.raises(Crash):
        other.save(tmp_path / name)
    assert {path: content for path, content in files(tmp_path).items() if content is not None} == before


def test_content_is_on_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a power cut may leave an empty file in the place of a whole one."""
    done: list[tuple[str, bytes]] = []
    monkeypatch.setattr(os, "fsync", lambda file: done.append(("fsync", os.pread(file, 99, 0))))
    monkeypatch.setattr(os, "replace", lambda old, new: done.append(("replace", Path(old).read_bytes())))
    write_text(tmp_path / "text", "all of it")
    assert done == [("fsync", b"all of it"), ("replace", b"all of it")]


def test_a_full_disk_leaves_no_part_of_a_text(tmp_path: Path) -> None:
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "report.json", "\ud800")
    assert files(tmp_path) == {}


def test_timm_rebuilds_a_registered_model(tmp_path: Path) -> None:
    import timm

    model = timm.create_model("test_vit", num_classes=10, img_size=32).eval()
    result = convert(model, 0.6, data=images(8))
    builder = result.plan.base.builder
    assert (builder.name, dict(builder.kwargs)) == ("test_vit", {"num_classes": 10, "img_size": (32, 32)})
    folder = tmp_path / "out"
    result.save(folder)
    for hybrid in (load(folder), load(folder / "model.safetensors"), load(folder, copy.deepcopy(model))):
        assert type(hybrid) is type(model) and not hybrid.training
        assert same(hybrid, result.model) and hybrid(images(2)).equal(result.model(images(2)))
    assert 'timm.create_model("test_vit"' in (folder / "README.md").read_text()


@pytest.mark.parametrize("key", [None, "model", "state_dict", "model_ema"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_plain_weights_are_read_from_what_trainers_write(tmp_path: Path, key: str | None, prefix: str) -> None:
    expected = vit().state_dict()
    state = {prefix + name: value for name, value in expected.items()}
    torch.save(state if key is None else {key: state, "epoch": 3}, tmp_path / "weights.pth")
    found = read_state_dict(tmp_path / "weights.pth")
    assert found.keys() == expected.keys() and all(found[name].equal(expected[name]) for name in expected)


def test_plain_weights_are_read_from_safetensors(tmp_path: Path) -> None:
    write_tensors(tmp_path / "weights.safetensors", vit().state_dict(), {})
    vit().load_state_dict(read_state_dict(tmp_path / "weights.safetensors"), strict=True)
