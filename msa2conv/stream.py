"""Merging through the network: from some blocks on there are fewer tokens, and the grid is restored behind the last.

Between the attention and the FFN of a block similar tokens become their mean (Bolya et al., "Token Merging: Your ViT
But Faster", ICLR 2023), and attentions heed how many each stands for. A pre-norm block has no seam there, so its two
residual lines, x + after(module(before(x))), are stated again; its modules stay where they are.

Shape suffixes: B batch, N tokens, K tokens that are left, C channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Annotated, Any

from pydantic import Field, model_validator
from torch import Tensor, nn

from .errors import LayoutMismatch, UnsupportedArgument
from .merging import ANOTHER_SIZE, Watch, merge, rounds
from .ops import Path, Sizes, Spec, Width

_AT_ALL = "A hybrid that merges tokens through the network runs its blocks as one: convert without merge_tokens."


class Line(Spec):
    """A residual line of a block: x + after(module(before(x))).

    Args:
        before, module, after: paths of modules, relative to the block.
        again: arguments of the module that are the tokens once more.
        given: other arguments that it is called with.
    """

    before: tuple[Path, ...] = ()
    module: Path
    after: tuple[Path, ...] = ()
    again: tuple[Annotated[str, Field(max_length=64)], ...] = ()
    given: dict[Annotated[str, Field(max_length=64)], bool | int | float | str] = Field(default_factory=dict)

    @property
    def paths(self) -> tuple[str, ...]:
        return (*self.before, self.module, *self.after)

    def run(self, block: nn.Module, x: Tensor, **more: Any) -> Tensor:
        inner = x
        for path in self.before:
            inner = block.get_submodule(path)(inner)
        found = block.get_submodule(self.module)(inner, **dict.fromkeys(self.again, inner), **self.given, **more)
        found = found if isinstance(found, Tensor) else found[0]
        for path in self.after:
            found = block.get_submodule(path)(found)
        out: Tensor = x + found
        return out


class Drop(Spec):
    """Behind the attention of `block`, `keep` patches (of each group) are left."""

    block: Annotated[str, Field(pattern=r"^[A-Za-z0-9_]+$", max_length=64)]
    keep: Width


class Stream(Spec):
    """How a sequence of blocks runs on fewer and fewer tokens.

    Args:
        attention, ffn: the two residual lines of every block.
        prefix: number of prefix tokens, which are left alone.
        groups: patches are matched within so many equal parts of their sequence.
        count: patches in a group.
        sizes: how the attentions are told the sizes; None: they are not.
        drops: where there become fewer, in order.
    """

    attention: Line
    ffn: Line
    prefix: Annotated[int, Field(ge=0, le=1024)] = 0
    groups: Width = 1
    count: Width
    sizes: Sizes | None = None
    drops: tuple[Drop, ...] = ()

    @model_validator(mode="after")
    def _fewer(self) -> Stream:
        counts = [self.count, *(drop.keep for drop in self.drops)]
        if any(after >= before for before, after in pairwise(counts)):
            raise ValueError(f"every drop must leave fewer patches than there were: {counts}")
        return self

    @property
    def tokens(self) -> int:
        """How many there are at first, prefix tokens included."""
        return self.prefix + self.groups * self.count

    def build(self, blocks: nn.Module) -> MergedStream:
        return MergedStream(blocks, self)


class MergedStream(nn.Module):
    """Stands where a sequence of blocks stood; every block keeps its name, and its parameters keep theirs.

    Whoever walks over it meets one step, so that no loop over blocks passes merging by.

    Args:
        blocks: nn.Sequential or nn.ModuleList.
        spec: what is merged where.

    Attributes:
        watch: as of `merging.Merged`.
    """

    def __init__(self, blocks: nn.Module, spec: Stream) -> None:
        super().__init__()
        self._modules.update(blocks._modules)
        self.spec = spec
        counts = (spec.count, *(drop.keep for drop in spec.drops))
        self.schedules = {drop.block: rounds(count, drop.keep) for drop, count in zip(spec.drops, counts, strict=False)}
        self.watch: Watch | None = None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self._check(x, args, kwargs)
        spec, fewer = self.spec, None
        for name, block in self._modules.items():
            assert block is not None
            schedule = self.schedules.get(name)
            if fewer is None and schedule is None:
                x = block(x, *args, **kwargs)
                continue
            more: dict[str, Tensor] = {}
            if fewer is not None and spec.sizes is not None:
                more[spec.sizes.argument] = spec.sizes.mask(fewer.size_BK)
            x = spec.attention.run(block, x, **more)
            if schedule is not None:
                fewer = merge(x, spec.prefix, spec.groups, schedule, before=fewer, watch=self.watch)
                x = fewer.tokens_BKC
            x = spec.ffn.run(block, x)
        return x if fewer is None else fewer.spread(x)

    def _check(self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        extra = [str(i) for i, value in enumerate(args, 1) if value is not None and value is not False]
        extra += [name for name, value in kwargs.items() if value is not None and value is not False]
        if extra:
            raise UnsupportedArgument(
                f"{type(self).__name__}.forward", f"the argument {extra[0]!r}", "only the tokens",
                "Merged tokens have no places that it could speak of: call the model without it.",
            )  # fmt: skip
        if x.shape[1] != self.spec.tokens:
            raise LayoutMismatch(
                "tokens 'b n c'", f"{x.shape[1]} tokens", f"{self.spec.tokens} tokens",
                ANOTHER_SIZE,
            )  # fmt: skip

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[nn.Module]:
        return iter((self,))

    def __getitem__(self, index: Any) -> nn.Module:
        if isinstance(index, slice) and index.indices(1) == (0, 1, 1):
            return self
        if isinstance(index, int) and index in (0, -1):
            return self
        raise UnsupportedArgument(f"{type(self).__name__}[...]", repr(index), "all of its blocks", _AT_ALL)

    def extra_repr(self) -> str:
        return ", ".join(f"{drop.keep} patches behind the attention of {drop.block}" for drop in self.spec.drops)


__all__ = ["Drop", "Line", "MergedStream", "Stream"]
