"""What one forward pass of a model showed: how every module was called."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .errors import InvalidInput, NonFiniteValue


@dataclass(frozen=True)
class Call:
    """What one call of a module looked like.

    Args:
        x: shape of the first tensor given.
        out: shape of the first tensor returned.
        arguments: {name: value} of what was given beside x, other than None and False; a `Given` stands for anything
            that holds tensors or objects.
        returned: how many values came back; 1 where it was not a tuple.
    """

    x: tuple[int, ...] | None
    out: tuple[int, ...] | None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    returned: int = 1


@dataclass(frozen=True)
class Given:
    """Stands in a Call for a value that is not plain data."""

    kind: str


SAME = Given("the input itself")


@dataclass
class Observation:
    """What one forward pass at batch 1 showed.

    Args:
        inputs: the example input, batch 1.
        output: the model's output on it.
        calls: {module path: calls in execution order}.
    """

    inputs: Tensor
    output: Any
    calls: dict[str, list[Call]] = field(default_factory=dict)

    def once(self, path: str) -> Call | None:
        """The call of a module that ran exactly once, else None."""
        calls = self.calls.get(path, [])
        return calls[0] if len(calls) == 1 else None


def observe(model: nn.Module, inputs: Tensor) -> Observation:
    """Run one forward pass of a copy-safe model and record every module's call.

    Args:
        model: runs in its current mode; hooks are added for the pass and removed.
        inputs: example input [1, C, H, W].

    Raises:
        InvalidInput: the model cannot run on the input.
        NonFiniteValue: weights or output contain NaN or Inf.
    """
    check_finite_weights(model)
    observation = Observation(inputs, None)
    handles, broken = [], list[str]()

    def hook(path: str) -> Any:
        def record(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> None:
            call = _call(module, args, kwargs, out)
            observation.calls.setdefault(path, []).append(call)
            y = tensor_in(out)
            if y is not None and not _is_finite(y):
                broken.append(path)

        return record

    for path, module in model.named_modules():
        handles.append(module.register_forward_hook(hook(path), with_kwargs=True))
    try:
        with torch.no_grad():
            observation.output = model(inputs)
    except (RuntimeError, AssertionError, ValueError, TypeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InvalidInput(
            "example_inputs",
            f"a tensor of shape {tuple(inputs.shape)} on which {type(model).__name__} fails ({reason})",
            "a float tensor [B, C, H, W] of the channels and image size the model was built for",
            "Pass example_inputs=torch.zeros(1, C, H, W) of the right size.",
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    if isinstance(observation.output, Tensor) and not _is_finite(observation.output):
        raise NonFiniteValue(
            broken[0] if broken and broken[0] else "model output",
            "NaN or Inf in its output on the example input",
            "finite numbers",
            "Check the weights and the input range.",
        )
    return observation


def check_finite_weights(model: nn.Module) -> None:
    """Raise NonFiniteValue if any parameter or buffer holds NaN or Inf (Inf in a mask buffer is allowed)."""
    for name, tensor in model.named_parameters():
        if not _is_finite(tensor):
            bad = int((~torch.isfinite(tensor)).sum())
            raise NonFiniteValue(
                name,
                f"{bad} NaN or Inf values in the weights",
                "finite numbers",
                "Load a checkpoint that trained well.",
            )


def _call(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> Call:
    named = _named(module, args, kwargs)
    x = next((name for name, value in named.items() if isinstance(value, Tensor)), None)
    y = tensor_in(out)
    return Call(
        None if x is None else tuple(named[x].shape),
        None if y is None else tuple(y.shape),
        {
            name: SAME if x is not None and value is named[x] else _plain(value)
            for name, value in named.items()
            if name != x and value is not None and value is not False
        },
        len(out) if isinstance(out, (tuple, list)) else 1,
    )


def argument_names(module: nn.Module) -> list[str]:
    """Of the arguments that `forward` takes by position."""
    return [
        name
        for name, parameter in inspect.signature(module.forward).parameters.items()
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]


def takes_any_keyword(module: nn.Module) -> bool:
    """Whether `forward` ends in **kwargs."""
    return any(each.kind is each.VAR_KEYWORD for each in inspect.signature(module.forward).parameters.values())


def _named(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Every argument by its name in the signature of `forward`; by its position where that has no names."""
    names = argument_names(module)
    return {names[i] if i < len(names) else str(i): value for i, value in enumerate(args)} | dict(kwargs)


def _plain(value: Any) -> Any:
    """Numbers, texts and lists of them as they are."""
    if isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (tuple, list)) and all(isinstance(item, (bool, int, float, str)) for item in value):
        return type(value)(value) if type(value) in (tuple, list) else tuple(value)
    return Given(type(value).__name__)


def tensors_of(output: Any) -> list[Tensor]:
    """All floating-point tensors in tuples, lists and dicts, in order."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, (tuple, list)) else ()
    return [tensor for value in values for tensor in tensors_of(value)]


def tensor_in(out: Any) -> Tensor | None:
    """The tensor that a module returned, or the first of several."""
    values = out if isinstance(out, (tuple, list)) else (out,)
    return next((value for value in values if isinstance(value, Tensor)), None)


def _is_finite(value: Tensor) -> bool:
    return value.is_meta or not value.is_floating_point() or bool(torch.isfinite(value).all())
