"""Files: one safetensors file holds the tensors and, in its header, the Plan. Atomic writes, nothing is unpickled."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .errors import ArchitectureMismatch, InvalidCheckpoint
from .files import MODEL_FILE, read_tensors, write_tensors
from .hub import guard
from .plan import PLAN_KEY, Plan
from .transforms.apply import apply_edits, check_base


def model_file(path: str | os.PathLike[str]) -> Path:
    """The .safetensors file that `path` (a file, or a folder written by `save`) stands for."""
    return Path(path) / MODEL_FILE if Path(path).is_dir() else Path(path)


def save(model: nn.Module, plan: Plan, path: str | os.PathLike[str]) -> Path:
    """Write a hybrid and its Plan to one .safetensors file, atomically; returns the path written."""
    target = Path(path)
    write_tensors(target, dict(model.state_dict()), plan.header)
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
    hybrid = skeleton.to(like.device).train(model.training)
    guard(hybrid, plan)
    return hybrid


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
