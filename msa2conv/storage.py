"""Files: one safetensors file holds the tensors and, in its header, the Plan. Atomic writes, nothing is unpickled."""

from __future__ import annotations

import json
import os
import re
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .errors import ArchitectureMismatch, InvalidCheckpoint, InvalidOutputPath
from .plan import Plan
from .transforms.apply import apply_edits, check_base

PLAN_KEY = "msa2conv.plan"
MODEL_FILE = "model.safetensors"


def check_writable(path: str | os.PathLike[str]) -> Path:
    """Return the path if a file can be created there (parents are made); raise InvalidOutputPath otherwise."""
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=target.parent):
            pass
        if target.is_dir():
            raise IsADirectoryError(f"{target} is a folder")
    except OSError as error:
        raise InvalidOutputPath(
            str(path), error.strerror or str(error), "a path where a file can be written", "Choose another output path."
        ) from error
    return target


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary path beside `path`; rename it over `path` on success, delete it on failure.

    Raises:
        InvalidOutputPath: nothing can be created there, or the disk is full.
    """
    target = check_writable(path)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".part")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        os.chmod(temporary, 0o644)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())  # else a power cut may find the new name on disk before the content
        os.replace(temporary, target)
    except (OSError, SafetensorError) as error:
        raise InvalidOutputPath(
            str(path), f"a file that could not be written whole ({error})", "a disk with room for it",
            "Free some space, or choose another output path.",
        ) from error  # fmt: skip
    finally:
        temporary.unlink(missing_ok=True)


def write_tensors(path: str | os.PathLike[str], tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file atomically."""
    owned = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    with atomic_write(path) as temporary:
        save_file(owned, temporary, metadata)


def read_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file -> (tensors, metadata); raises InvalidCheckpoint."""
    source = Path(path)
    if not source.is_file():
        raise InvalidCheckpoint(str(path), "no file", "a .safetensors file", "Check the path.")
    try:
        with safe_open(source, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        with source.open("rb") as file:
            head = file.read(8)  # of a safetensors file: the length of its header, below 2**32
        if zipfile.is_zipfile(source) or (head[:1] == b"\x80" and any(head[4:])):
            raise InvalidCheckpoint(
                str(path),
                "a pickle",
                "a .safetensors file",
                "Pickles can run code when read and are refused: save the state dict with safetensors.torch.save_file.",
            ) from error
        raise InvalidCheckpoint(
            str(path), f"a damaged or truncated file ({error})", "a .safetensors file", "Copy or write the file again."
        ) from error


STATE_KEYS = ("state_dict", "model_ema", "model")  # under which training code keeps its state dict, best first


def read_state_dict(path: str | os.PathLike[str], keys: tuple[str, ...] = STATE_KEYS) -> dict[str, Tensor]:
    """Read weights from .safetensors, or from .pth/.pt/.bin with `weights_only=True`; raises InvalidCheckpoint."""
    source = Path(path)
    if source.suffix == ".safetensors":
        return read_tensors(source)[0]
    if not source.is_file():
        raise InvalidCheckpoint(str(path), "no file", "a .safetensors or .pth file", "Check the path.")
    try:
        loaded: Any = torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:
        named = re.search(r"GLOBAL (\S+)", str(error))  # torch's own text advises to unpickle
        reason = f"it holds {named[1]}" if named else type(error).__name__
        raise InvalidCheckpoint(
            str(path),
            f"a file that cannot be read without unpickling ({reason})",
            "tensors only",
            "Unpickling can run code and is refused: save the plain state dict with safetensors.torch.save_file.",
        ) from error
    return state_dict_in(loaded, str(path), keys)


def state_dict_in(loaded: Any, where: str, keys: tuple[str, ...] = STATE_KEYS) -> dict[str, Tensor]:
    """The state dict in what training code saved: itself, or the first of `keys`; raises InvalidCheckpoint."""
    for key in keys:
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
            break
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise InvalidCheckpoint(
            where,
            f"{type(loaded).__name__} with entries that are not tensors",
            "a state dict {name: tensor}, plain or under 'state_dict', 'model' or 'model_ema'",
            "Save model.state_dict() alone.",
        )
    return {name.removeprefix("module."): value for name, value in loaded.items()}


def write_state(path: str | os.PathLike[str], state: dict[str, Any]) -> None:
    """Write nested dicts and lists of tensors and plain numbers (a training state) atomically."""
    with atomic_write(path) as temporary, temporary.open("wb") as file:  # a full disk is an OSError on a file object
        torch.save(state, file)


def read_state(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read what `write_state` wrote, without unpickling anything but tensors and plain values."""
    try:
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:
        raise InvalidCheckpoint(
            str(path), f"a file that is not a saved training state ({type(error).__name__})", "one that msa2conv wrote",
            "Delete it to start anew.",
        ) from error  # fmt: skip


def model_file(path: str | os.PathLike[str]) -> Path:
    """The .safetensors file that `path` (a file, or a folder written by `save`) stands for."""
    return Path(path) / MODEL_FILE if Path(path).is_dir() else Path(path)


def save(model: nn.Module, plan: Plan, path: str | os.PathLike[str]) -> Path:
    """Write a hybrid and its Plan to one .safetensors file, atomically; returns the path written."""
    target = Path(path)
    write_tensors(target, dict(model.state_dict()), {"format": "pt", PLAN_KEY: plan.model_dump_json()})
    return target


def read_plan(path: str | os.PathLike[str]) -> Plan:
    """Read the Plan in a saved hybrid without its tensors."""
    source = model_file(path)
    return _plan(source, read_tensors(source)[1])


def load(path: str | os.PathLike[str], model: nn.Module | None = None) -> nn.Module:
    """Load a hybrid saved by `Conversion.save`.

    Args:
        path: the .safetensors file, or the folder that holds `model.safetensors`.
        model: an instance of the original architecture (its weights do not matter; it is not altered). Without it the
            model is built by timm, where the Plan knows how.

    Returns:
        The hybrid, a plain module of the original's class, in the dtype of the file, on the device and in the
        training mode of `model` (CPU and eval without it).

    Raises:
        InvalidCheckpoint: no file, truncated, a pickle, or not written by msa2conv.
        UnsupportedSchema, InvalidPlan: the Plan inside cannot be used.
        ArchitectureMismatch: `model` is of another architecture, or is needed and was not given.

    Example:
        hybrid = msa2conv.load("deit_s_70.safetensors", timm.create_model("deit_small_patch16_224"))
    """
    source = model_file(path)
    tensors, metadata = read_tensors(source)
    plan = _plan(source, metadata)
    if model is None:
        model = _build(plan, source)
    check_base(plan, model)
    # The skeleton is made without memory, so that a hostile plan cannot allocate more than the file itself holds.
    skeleton = _on_meta(model)
    apply_edits(skeleton, plan.edits)
    _check_state(skeleton, tensors, source)
    # Cloned: in the file tensors lie at any address, and a small matrix product can differ in its last bits by that.
    skeleton.load_state_dict({name: value.clone() for name, value in tensors.items()}, strict=True, assign=True)
    _restore_unsaved_buffers(skeleton, model)
    for parameter in skeleton.parameters():
        parameter.requires_grad_(True)
    like = next(model.parameters())
    return skeleton.to(like.device).train(model.training)


def _plan(source: Path, metadata: dict[str, str]) -> Plan:
    if PLAN_KEY not in metadata:
        raise InvalidCheckpoint(
            str(source), "a safetensors file without a Plan", "a file written by Conversion.save", "Convert first."
        )
    return Plan.from_json(metadata[PLAN_KEY], str(source))


def _build(plan: Plan, source: Path) -> nn.Module:
    if plan.base.builder is None:
        raise ArchitectureMismatch(
            str(source),
            f"a Plan for {plan.base.model_class} without a builder",
            "the original architecture as second argument",
            f"Call load({source.name!r}, model) with an instance of {plan.base.model_class}.",
        )
    from .adapters.build import build

    return build(plan.base.builder).eval()


def _on_meta(model: nn.Module) -> nn.Module:
    import copy

    memo: dict[int, Any] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        meta = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = nn.Parameter(meta, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else meta
    return copy.deepcopy(model, memo)


def _restore_unsaved_buffers(hybrid: nn.Module, model: nn.Module) -> None:
    """Buffers that are not part of a state dict (Swin's masks) come from the model given."""
    owners = dict(model.named_modules())
    old, new = next(model.parameters()).dtype, next(hybrid.parameters()).dtype
    for path, module in hybrid.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                original = owners[path]._buffers[name]
                module._buffers[name] = (
                    None
                    if original is None
                    else original.detach().to(new if original.dtype == old else original.dtype, copy=True)
                )


def _check_state(hybrid: nn.Module, tensors: dict[str, Tensor], source: Path) -> None:
    own = hybrid.state_dict()
    wrong = [
        f"{name} {_kind(tensors.get(name), 'missing', own.get(name))} instead of "
        f"{_kind(own.get(name), 'nothing', tensors.get(name))}"
        for name in sorted(own.keys() | tensors.keys())
        if name not in own
        or name not in tensors
        or own[name].shape != tensors[name].shape
        or own[name].is_floating_point() != tensors[name].is_floating_point()
    ]
    if wrong:
        raise InvalidCheckpoint(
            str(source), f"tensors that contradict its Plan: {'; '.join(wrong[:3])}", "what the Plan describes",
            "The file is damaged: convert again.",
        )  # fmt: skip


def _kind(tensor: Tensor | None, missing: str, other: Tensor | None) -> str:
    """Shape, and the dtype where it is what differs."""
    if tensor is None:
        return missing
    shape = str(tuple(tensor.shape))
    return (
        shape if other is None or other.is_floating_point() == tensor.is_floating_point() else f"{shape} {tensor.dtype}"
    )


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write JSON atomically."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
