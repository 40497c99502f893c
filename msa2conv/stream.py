"""Merging through the network: from some blocks on there are fewer tokens, and the grid is restored behind the last.

Between the attention and the FFN of a block similar tokens become their mean (Bolya et al., "Token Merging: Your ViT
But Faster", ICLR 2023), and attentions heed how many each stands for. A pre-norm block has no seam there, so its two
residual lines, x + after(module(before(x))), are stated again; its modules stay where they are.

Tokens share what the blocks behind a merge add to them. What each has of its own, apart from the mean that it goes
into, waits beside the residual line and is added when the grid comes back.

Shape suffixes: B batch, N tokens, K tokens that are left, C channels.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice, pairwise, takewhile
from typing import Annotated, Any

from pydantic import Field, model_validator
from torch import Tensor, nn

from .errors import LayoutMismatch, UnsupportedArgument
from .merging import ANOTHER_SIZE, Fewer, Watch, merge, rounds
from .ops import Path, Sizes, Spec, Width

_IN_ORDER = (
    "Tokens that merged in one block stay together in the next: go through all blocks from the first on, or convert "
    "without merge_tokens."
)
_HARMLESS = ("output_hidden_states",)  # of transformers, which reads them by hooks


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


def transitions(count: int, drops: Iterable[Drop]) -> list[tuple[int, int]]:
    """(patches before, patches after) of every drop.

    Args:
        count: patches at first.
    """
    return list(pairwise([count, *(drop.keep for drop in drops)]))


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
        if any(after >= before for before, after in transitions(self.count, self.drops)):
            counts = [self.count, *(drop.keep for drop in self.drops)]
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

    Whoever walks over what was a Sequential gets a step for every block, with all tokens in front of it and behind it,
    as `forward_intermediates` wants them. A ModuleList is walked over whenever the network runs: it is one step, since
    giving all tokens back behind every block takes time. That is taken where somebody looks: hooks of a block see all
    tokens, too.

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
        self.one_step = not isinstance(blocks, nn.Sequential)
        pairs = zip(spec.drops, transitions(spec.count, spec.drops), strict=True)
        self.schedules = {drop.block: rounds(*pair) for drop, pair in pairs}
        self.watch: Watch | None = None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if any(map(_looked_at, self._modules.values())):
            for step in self.steps():
                x = step(x, *args, **kwargs)
            return x
        self.check(x, args, kwargs)
        merges: list[tuple[Fewer, Tensor]] = []  # and what every token had of its own
        for name, block in self._modules.items():
            assert block is not None
            if not merges and name not in self.schedules:
                x = block(x, *args, **kwargs)
                continue
            before = merges[-1][0] if merges else None
            x = self.attended(block, x, before)
            if name in self.schedules:
                fewer = self.merged(name, x, before)
                merges.append((fewer, x - fewer.spread(fewer.tokens_BKC)))
                x = fewer.tokens_BKC
            x = self.spec.ffn.run(block, x)
        for fewer, own_BNC in reversed(merges):
            x = fewer.spread(x) + own_BNC
        return x

    def attended(self, block: nn.Module, x: Tensor, fewer: Fewer | None) -> Tensor:
        """Behind the attention of a block, which is told what each token stands for."""
        sizes = self.spec.sizes
        more = {} if fewer is None or sizes is None else {sizes.argument: sizes.mask(fewer.size_BK)}
        return self.spec.attention.run(block, x, **more)

    def merged(self, name: str, x: Tensor, before: Fewer | None) -> Fewer:
        """What is left behind the attention of a block, of tokens that come from the merge before."""
        size_BN = None if before is None else before.size_BK
        return merge(x, self.spec.prefix, self.spec.groups, self.schedules[name], size_BN=size_BN, watch=self.watch)

    def check(self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Refuse what merged tokens cannot be told, and another number of them."""
        given = {str(i): value for i, value in enumerate(args, 1)} | kwargs
        said = {name: value for name, value in given.items() if value is not None and value is not False}
        extra = [name for name in said if name not in _HARMLESS]
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

    def steps(self) -> list[Step]:
        """A walk over all blocks."""
        known: dict[str, Fewer] = {}
        return [Step(self, name, known) for name in self._modules]

    def __len__(self) -> int:
        return 1 if self.one_step else len(self._modules)

    def __iter__(self) -> Iterator[Callable[..., Tensor]]:
        if self.one_step:
            return iter((self,))
        return iter(self.steps())

    def __getitem__(self, index: Any) -> MergedStream | Step:
        whole = range(len(self))
        if isinstance(index, int):
            return self if self.one_step and index in (0, -1) else Step(self, list(self._modules)[index], {})
        if isinstance(index, slice) and whole[index] == whole[: len(whole[index])]:
            return self._first(len(whole[index]))
        raise UnsupportedArgument(f"{type(self).__name__}[...]", repr(index), "the first of its blocks", _IN_ORDER)

    def _first(self, count: int) -> MergedStream:
        if count == len(self):
            return self
        blocks = OrderedDict(islice(self.named_children(), count))
        drops = tuple(drop for drop in self.spec.drops if drop.block in blocks)
        first = MergedStream(nn.Sequential(blocks), self.spec.model_copy(update={"drops": drops}))
        first.training, first.watch = self.training, self.watch
        return first

    def extra_repr(self) -> str:
        return ", ".join(f"{drop.keep} patches behind the attention of {drop.block}" for drop in self.spec.drops)


class Step:
    """One block of a walk over a MergedStream: from all tokens to all tokens.

    Tokens that go together have what they go into for their mean, so all that has to be known is which these are.
    Everything but a call is the block's: `blocks[5].attn`, `blocks[5].register_forward_hook(...)`.

    Args:
        stream: whose block it is.
        name: of the block.
        known: the merges of this walk so far, {block: merge}.
    """

    __slots__ = ("_block", "_known", "_name", "_stream")
    _block: nn.Module
    _known: dict[str, Fewer]
    _name: str
    _stream: MergedStream

    def __init__(self, stream: MergedStream, name: str, known: dict[str, Fewer]) -> None:
        own = stream.get_submodule(name), known, name, stream
        for slot, value in zip(Step.__slots__, own, strict=True):
            object.__setattr__(self, slot, value)

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "_block"), name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._block, name, value)

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        return copy.deepcopy(self._block, memo)

    def __repr__(self) -> str:
        return repr(self._block)

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self._stream.check(x, args, kwargs)
        block, merges = self._block, self._before()
        out: Tensor
        if not merges and self._name not in self._stream.schedules:
            out = block(x, *args, **kwargs)
        elif _looked_at(block):
            with _in_place_of_forward(block, partial(self._run, merges)):
                out = block(x, *args, **kwargs)
        else:
            out = self._run(merges, x)
        return out

    def _run(self, merges: Sequence[Fewer], x: Tensor, *_: Any, **__: Any) -> Tensor:
        stream, block, name, y = self._stream, self._block, self._name, x
        for fewer in merges:
            y = fewer.means(y)
        entered, y = y, stream.attended(block, y, merges[-1] if merges else None)
        if name in stream.schedules:
            x = x + _spread(merges, y - entered)
            self._known[name] = stream.merged(name, y, merges[-1] if merges else None)
            merges = [*merges, self._known[name]]
            entered = y = merges[-1].tokens_BKC
        return x + _spread(merges, stream.spec.ffn.run(block, y) - entered)

    def _before(self) -> list[Fewer]:
        earlier = takewhile(lambda other: other != self._name, self._stream._modules)
        merging = [other for other in earlier if other in self._stream.schedules]
        if not self._known.keys() >= set(merging):
            raise UnsupportedArgument(
                f"a step of {type(self._stream).__name__}", f"block {self._name} without {merging[0]}",
                "blocks in their order", _IN_ORDER,
            )  # fmt: skip
        return [self._known[other] for other in merging]


def _looked_at(block: nn.Module | None) -> bool:
    return block is not None and bool(block._forward_hooks or block._forward_pre_hooks)


@contextmanager
def _in_place_of_forward(block: nn.Module, forward: Callable[..., Tensor]) -> Iterator[None]:
    """Calls of a block run this; its hooks see what goes in and what comes out."""
    own = block.__dict__.get("forward")
    block.forward = forward
    try:
        yield
    finally:
        if own is None:
            del block.forward
        else:
            block.forward = own


def _spread(merges: Sequence[Fewer], answers_BKC: Tensor) -> Tensor:
    for fewer in reversed(merges):
        answers_BKC = fewer.spread(answers_BKC)
    return answers_BKC


__all__ = ["Drop", "Line", "MergedStream", "Step", "Stream", "transitions"]
