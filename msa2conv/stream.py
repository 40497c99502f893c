"""Merging through the network: from some blocks on there are fewer tokens, and the grid is restored behind the last.

Between the attention and the FFN of a block similar tokens become their mean (Bolya et al., "Token Merging: Your ViT
But Faster", ICLR 2023), and attentions heed how many each stands for. A pre-norm block has no seam there, so its two
residual lines, x + after(module(before(x))), are stated again; its modules stay where they are.

Shape suffixes: B batch, P prefix tokens, N tokens, M patches of the original grid, C channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from .errors import LayoutMismatch, UnsupportedArgument
from .merging import ANOTHER_SIZE, Round, Watch, match, rounds, rows
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
        spec, merged = self.spec, None
        for name, block in self._modules.items():
            assert block is not None
            schedule = self.schedules.get(name)
            if merged is None and schedule is None:
                x = block(x, *args, **kwargs)
                continue
            more: dict[str, Tensor] = {}
            if merged is not None and spec.sizes is not None:
                more[spec.sizes.argument] = spec.sizes.mask(merged.size_BN)
            x = spec.attention.run(block, x, **more)
            if schedule is not None:
                merged = (merged or _Merged.none(x, spec)).further(x, schedule, self.watch)
                x = merged.x_BNC
            x = spec.ffn.run(block, x)
        return x if merged is None else merged.restored(x)

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


class _Merged:
    """Tokens of a stream, how many each stands for, and which of them stands for each patch of the grid."""

    def __init__(self, spec: Stream, count: int, x_BNC: Tensor, size_BN: Tensor, index_BM: Tensor | None) -> None:
        self.spec, self.count = spec, count
        self.x_BNC, self.size_BN, self.index_BM = x_BNC, size_BN, index_BM

    @classmethod
    def none(cls, x_BNC: Tensor, spec: Stream) -> _Merged:
        return cls(spec, spec.count, x_BNC, torch.ones_like(x_BNC[..., 0]), None)

    def further(self, x_BNC: Tensor, schedule: Sequence[Round], watch: Watch | None) -> _Merged:
        spec, (batch, _, channels) = self.spec, x_BNC.shape
        size_BM = self.size_BN[:, spec.prefix :].reshape(batch * spec.groups, self.count)
        patches_BMC = x_BNC[:, spec.prefix :].reshape(batch * spec.groups, self.count, channels)
        index_BM, sums_BKC, _ = match(patches_BMC * size_BM[..., None], schedule, watch)
        keep = self.count - sum(going for _, going in schedule)
        fewer_BK = size_BM.new_zeros(sums_BKC.shape[:2]).scatter_add(1, index_BM, size_BM)
        merged_BNC = (sums_BKC / fewer_BK[..., None]).reshape(batch, -1, channels)
        size_BN = F.pad(fewer_BK.reshape(batch, -1), (spec.prefix, 0), value=1.0)
        if self.index_BM is not None:
            index_BM = index_BM.gather(1, self.index_BM)
        return _Merged(spec, keep, torch.cat((x_BNC[:, : spec.prefix], merged_BNC), 1), size_BN, index_BM)

    def restored(self, x_BNC: Tensor) -> Tensor:
        spec, (batch, _, channels) = self.spec, x_BNC.shape
        assert self.index_BM is not None
        patches_BMC = rows(x_BNC[:, spec.prefix :].reshape(-1, self.count, channels), self.index_BM)
        return torch.cat((x_BNC[:, : spec.prefix], patches_BMC.reshape(batch, -1, channels)), 1)


__all__ = ["Drop", "Line", "MergedStream", "Stream"]
