"""The user's model is never touched: unwrap it, and make a float32 copy in eval mode to work on."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from .adapters.build import example_size
from .errors import InvalidArgument, InvalidInput


def unwrap(model: nn.Module) -> nn.Module:
    """The plain module inside DataParallel, DistributedDataParallel, `torch.compile` or Lightning Fabric."""
    if not isinstance(model, nn.Module):
        raise InvalidArgument("model", type(model).__name__, "a torch.nn.Module", "Pass the model object itself.")
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        elif type(model).__name__ == "_FabricModule":  # Lightning Fabric's; not imported, as few have it
            model = model.module  # type: ignore[assignment]
        else:
            return model


def usable_device(device: str | torch.device) -> torch.device:
    """The device, if this machine has it; InvalidArgument otherwise."""
    try:
        found = torch.device(device)
        torch.zeros(1, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InvalidArgument(
            "device", f"{str(device)!r} ({str(error).splitlines()[0]})", "a device of this machine",
            "Write for example 'cpu' or 'cuda'.",
        ) from error  # fmt: skip
    return found


@contextmanager
def own_randomness() -> Iterator[None]:
    """Leave the global random states (torch, numpy, Python) as they were found: mixers are initialised before their
    values are filled in, and training seeds every step."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()  # type: ignore[no-untyped-call]
    before = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(list(devices), device_type="cuda"):
            yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])


def hookless_copy(model: nn.Module) -> nn.Module:
    """A copy without the user's hooks."""
    copied = copy.deepcopy(model)
    for module in copied.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
        module._backward_hooks.clear()
        module._backward_pre_hooks.clear()
    return copied


def working_copy(model: nn.Module) -> nn.Module:
    """A float32 copy in eval mode, without the user's hooks, on the model's device."""
    if next(model.parameters(), None) is None:
        raise InvalidArgument("model", "a module without parameters", "a trained network", "Pass the model itself.")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise InvalidArgument("model", "parameters on the meta device", "real weights", "Load the weights first.")
    work = without_autocast(hookless_copy(model))
    for module in work.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0  # off the fast path, which calls none of its submodules
    for parameter in work.parameters():
        parameter.grad = None
    work = work.float().train().eval().requires_grad_(False)  # LeViT drops what it remembers in train mode only
    if hasattr(work, "set_grad_checkpointing"):
        work.set_grad_checkpointing(False)  # type: ignore[operator]
    return work


def without_autocast(model: nn.Module) -> nn.Module:
    """Undo, in place, the autocast that accelerate's mixed precision puts around a model's own `forward`."""
    forward = model.__dict__.pop("_original_forward", None)
    if forward is not None:
        model.forward = forward
    return model


def example_input(model: nn.Module, example_inputs: Tensor | None) -> Tensor:
    """One image [1, C, H, W] in float32 on the model's device: the user's, or noise of the declared size."""
    device = next(model.parameters()).device
    if example_inputs is not None:
        if not isinstance(example_inputs, Tensor) or example_inputs.ndim != 4 or not example_inputs.is_floating_point():
            found = type(example_inputs).__name__
            if isinstance(example_inputs, Tensor):
                dtype = str(example_inputs.dtype).removeprefix("torch.")
                found = f"a {dtype} tensor of shape {tuple(example_inputs.shape)}"
            raise InvalidInput(
                "example_inputs", found, "a float tensor [B, C, H, W]", "Pass for example torch.zeros(1, 3, 224, 224)."
            )
        return example_inputs[:1].detach().float().to(device)
    size = example_size(model)
    if size is None:
        raise InvalidInput(
            "example_inputs", "None, and a model that does not state its image size", "a float tensor [B, C, H, W]",
            "Pass for example torch.zeros(1, 3, 224, 224).",
        )  # fmt: skip
    return torch.randn(1, *size, generator=torch.Generator().manual_seed(0)).to(device)
