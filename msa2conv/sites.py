"""Sites: where something can be changed, and its geometry. No weights, no knowledge of any backbone.

Also `observe`: one forward pass that records what reaches every module.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .errors import InvalidInput, NonFiniteValue
from .kernels import Rows as Rows
from .layouts import Layout
from .ops import IO


@dataclass(frozen=True)
class Projections:
    """Where a host keeps its weights, by heads.

    v, out: W_v and W_o, which the kernels of a gate search are made from. q, k, scale: stated only for hosts that
    compute softmax(scale q k^T) v and nothing else in between: no q/k-norm, rotary or relative position, no gate; then
    prefix tokens can keep their attention. Calibration checks that numerically and does without where it is wrong.
    """

    v: Rows
    out: Rows
    heads: int
    head_dim: int
    q: Rows | None = None
    k: Rows | None = None
    scale: float | None = None

    @property
    def plain(self) -> bool:
        """Whether this states all of a plain softmax attention."""
        return self.q is not None and self.k is not None and self.scale is not None


@dataclass(frozen=True)
class AttentionSite:
    """One self-attention over an image grid.

    Args:
        path: module path of the attention.
        block: path of the block around it (the unit that a suffix re-run starts from).
        dim: channels of its input and output.
        heads, head_dim: geometry, for default bottleneck widths.
        layout: how its tokens lie on the image.
        io: its calling convention.
        projections: names of its weights; None where they are not kept by heads in Linear layers.
    """

    path: str
    block: str
    dim: int
    heads: int
    head_dim: int
    layout: Layout
    io: IO
    projections: Projections | None = None


@dataclass(frozen=True)
class FFNSite:
    """One two-layer feed-forward network whose hidden units can be dropped.

    Args:
        path: module path of the FFN.
        block: path of the block around it.
        dim: channels of its input and output.
        hidden: number of hidden units.
        layout: how its tokens lie on the image; tells prefix tokens from patches.
        output: path of the layer that reads the hidden units, relative to `path`; its weights are refitted.
        units: (parameter path relative to `path`, dimension) of everything that hangs on one hidden unit.
    """

    path: str
    block: str
    dim: int
    hidden: int
    layout: Layout
    output: str
    units: tuple[tuple[str, int], ...]


Site = AttentionSite | FFNSite


@dataclass(frozen=True)
class Refusal:
    """A module that looked convertible and is left alone, and why."""

    path: str
    kind: str
    reason: str


@dataclass(frozen=True)
class Call:
    """What one call of a module looked like; keywords are those given with a value other than None or False."""

    x: tuple[int, ...] | None
    out: tuple[int, ...] | None
    keywords: tuple[str, ...]


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


@dataclass(frozen=True)
class Claims:
    """Sites in execution order, and what was refused."""

    sites: tuple[Site, ...]
    refusals: tuple[Refusal, ...]

    @classmethod
    def of(cls, found: Iterable[Site | Refusal]) -> Claims:
        """Sort what an adapter found into sites and refusals."""
        found = tuple(found)
        refusals = tuple(item for item in found if isinstance(item, Refusal))
        return cls(tuple(item for item in found if not isinstance(item, Refusal)), refusals)

    @property
    def attentions(self) -> tuple[AttentionSite, ...]:
        return tuple(site for site in self.sites if isinstance(site, AttentionSite))

    @property
    def ffns(self) -> tuple[FFNSite, ...]:
        return tuple(site for site in self.sites if isinstance(site, FFNSite))


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
            x = next((value for value in [*args, *kwargs.values()] if isinstance(value, Tensor)), None)
            y = next(
                (value for value in (out if isinstance(out, Sequence) else [out]) if isinstance(value, Tensor)), None
            )
            call = Call(
                _shape(x),
                _shape(y),
                tuple(key for key, value in kwargs.items() if value is not None and value is not False),
            )
            observation.calls.setdefault(path, []).append(call)
            if y is not None and y.is_floating_point() and not torch.isfinite(y).all():
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
    if isinstance(observation.output, Tensor) and not torch.isfinite(observation.output).all():
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
        if not torch.isfinite(tensor).all():
            bad = int((~torch.isfinite(tensor)).sum())
            raise NonFiniteValue(
                name,
                f"{bad} NaN or Inf values in the weights",
                "finite numbers",
                "Load a checkpoint that trained well.",
            )


def _shape(value: Tensor | None) -> tuple[int, ...] | None:
    return None if value is None else tuple(value.shape)
