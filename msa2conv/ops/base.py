"""What every mixer has: a spec as data, and the calling convention of the attention that it replaces."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from ..errors import LayoutMismatch, UnsupportedArgument
from ..layouts import Layout

Width = Annotated[int, Field(ge=1, le=65536)]
Path = Annotated[str, Field(min_length=1, max_length=512, pattern=r"^[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*$")]


class Spec(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class IO(Spec):
    """The calling convention of the module that a mixer replaces.

    Args:
        returns: "tensor"; "tuple" for hosts that return (output, attention weights): a mixer returns (output, None);
            "echo" for hosts that return (output, `echo`): a mixer returns that argument as it came.
        x: name of the token argument, where it may be passed by keyword.
        positional: names of the positional arguments behind x.
        ignored: arguments that a mixer may ignore because its Layout already honours them (Swin's shift mask, a grid
            size) or because they only place the host's own scores (rotary and relative positions).
        absent: arguments that are accepted only as None or False (an attention mask, causality).
        echo: name of the argument that comes back beside the output (the grid size in MViTv2).
    """

    returns: Literal["tensor", "tuple", "echo"] = "tensor"
    x: str = "x"
    positional: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    echo: str | None = None

    def arguments(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Every argument beside x by its name; by its position where `positional` does not name it."""
        names = (self.x, *self.positional)
        given = {names[i] if i < len(names) else f"positional argument {i}": args[i] for i in range(1, len(args))}
        for name, value in kwargs.items():  # torch 2.6 compiles no union of dicts
            if args or name != self.x:
                given[name] = value
        return given


class TokenMixer(nn.Module, ABC):
    """A token mixer with the calling convention of the attention that it replaces."""

    batch_first = False  # keeps nn.TransformerEncoderLayer off a fast path that would read attention weights

    def __init__(self, spec: BaseModel, io: IO) -> None:
        super().__init__()
        self.spec, self.io = spec, io

    @abstractmethod
    def mix(self, x: Tensor) -> Tensor:
        """Tokens -> tokens of the same shape."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs and self.io.returns == "tensor" and isinstance(args[0], Tensor):
            return self.mix(args[0])  # as nearly always; in a small network reading arguments takes its time
        x = self._bind(args, kwargs)
        return self._returned(self.mix(x), self.io.arguments(args, kwargs))

    def _returned(self, out: Tensor, given: Mapping[str, Any]) -> Any:
        return out if self.io.returns == "tensor" else (out, given.get(self.io.echo or ""))

    def _bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        io = self.io
        extra = [
            name
            for name, value in io.arguments(args, kwargs).items()
            if value is not None and name not in io.ignored and not (name in io.absent and value is False)
        ]
        x = args[0] if args else kwargs.get(io.x)
        if extra or not isinstance(x, Tensor):
            raise UnsupportedArgument(
                f"{type(self).__name__}.forward",
                f"the argument {extra[0]!r}" if extra else f"no tensor {io.x!r}",
                f"only the tokens {io.x!r}" + (f" (besides {', '.join(io.ignored)})" if io.ignored else ""),
                "A convolution cannot honour it: keep this site's attention (exclude it) or call the model without it.",
            )
        return x

    def set_window_size(self, window_size: int | tuple[int, int]) -> None:
        """Answer timm's Swin blocks, which announce a new window size: only the size of the Layout is accepted."""
        layout: Layout | None = getattr(self.spec, "layout", None)
        sides = (window_size, window_size) if isinstance(window_size, int) else tuple(window_size)
        if layout is not None and layout.window is not None and sides != tuple(layout.window):
            raise LayoutMismatch(
                f"{type(self).__name__}.set_window_size",
                f"window {sides}",
                f"window {tuple(layout.window)}",
                "A hybrid keeps the image and window size it was converted for: resize the original, then convert it.",
            )

    def extra_repr(self) -> str:
        fields = self.spec.model_dump(exclude={"layout", "kind"}, exclude_none=True)
        return ", ".join(f"{name}={value}" for name, value in fields.items())
