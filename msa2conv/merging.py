"""Merging inside a site: its host runs on fewer tokens, and every position gets the answer of the token it went into.

Who goes into whom is bipartite soft matching (Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023), here on
the site's own input, at most a third of the tokens a round, and undone behind the site: the grid stays, nothing has to
be fitted, no state passes from site to site.

Shape suffixes: B batch, G groups of all images, N tokens, K tokens that are left, M patches of a group, C channels; of
a round: A patches that may go, R that go, D that may receive.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from .errors import LayoutMismatch, UnsupportedArgument
from .ops import IO, Arrangement, Sizes, Spec, Width, arranged, as_sequence
from .standin import Standin

Watch = Callable[[Tensor, Tensor, int], None]
Round = tuple[int, int]
# Of the tokens of a round about a third goes at most: with half of them, partners that fit badly are taken too. Whole
# numbers, so that every machine has the same rounds.
_MOST, _PARTS = 22, 64
ANOTHER_SIZE = (
    "A hybrid runs at the image size it was converted for, with all patches: convert again with example_inputs of the "
    "new size, and train it without patch dropout."
)


class Merge(Spec):
    """Run the host on `keep` of `count` patches (of each of `groups` groups); prefix tokens are left alone.

    Args:
        arrangement: how the tokens lie in the host's input.
        prefix: number of prefix tokens.
        groups: patches are matched within so many equal parts of their sequence: with thousands of tokens, comparing
            all of them would cost more than it saves.
        count: patches in a group.
        keep: patches left of a group.
        sizes: how the host is told the sizes; None: it is not.
    """

    arrangement: Arrangement = "b n c"
    prefix: Annotated[int, Field(ge=0, le=1024)] = 0
    groups: Width = 1
    count: Width
    keep: Width
    sizes: Sizes | None = None

    @model_validator(mode="after")
    def _fewer(self) -> Merge:
        if self.keep >= self.count:
            raise ValueError(f"keep {self.keep} must be less than count {self.count}")
        return self

    @property
    def flops(self) -> int:
        """Multiply-adds of all comparisons, for one channel and one sequence."""
        return self.groups * comparisons(self.count, self.keep)

    @property
    def tokens(self) -> int:
        """How many tokens the host sees, prefix tokens included."""
        return self.prefix + self.groups * self.keep

    def build(self, host: nn.Module, io: IO) -> Merged:
        return Merged(host, self, io)


class Merged(Standin):
    """A host on merged tokens; called like the host.

    Args:
        host: an attention that knows no positions, or an FFN that mixes none; wrapped, never copied.
        spec: what is merged.
        io: the host's calling convention; `positional` names all of its arguments behind x.

    Attributes:
        watch: called in every round with (best score of each token that may go [B, A], all scores [B, A, D], how many
            go), for measuring how close decisions are; None otherwise.
    """

    def __init__(self, host: nn.Module, spec: Merge, io: IO) -> None:
        super().__init__()
        self.host, self.spec, self.io = host, spec, io
        self.schedule = rounds(spec.count, spec.keep)
        self.watch: Watch | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        x, given = self._bind(args, kwargs)
        spec = self.spec
        fewer = merge(self._sequence(x), spec.prefix, spec.groups, self.schedule, watch=self.watch)
        if spec.sizes is not None:
            given[spec.sizes.argument] = spec.sizes.mask(fewer.size_BK)
        inner = arranged(fewer.tokens_BKC, spec.arrangement)
        found = self.host(inner, **{name: inner if value is x else value for name, value in given.items()})
        out_BKC = as_sequence(found if isinstance(found, Tensor) else found[0], spec.arrangement)
        whole = arranged(fewer.spread(out_BKC), spec.arrangement, x.shape)
        return whole if isinstance(found, Tensor) else (whole, None)

    def _bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        x = args[0] if args else kwargs.get(self.io.x)
        given = self.io.arguments(args, kwargs)
        told = self.spec.sizes.argument if self.spec.sizes else None
        heeded = [
            name
            for name, value in given.items()
            if (name == told and value is not None)
            # a tracer turns a number into a tensor without dimensions
            or (isinstance(value, Tensor) and value.ndim and value is not x)
        ]
        if heeded or not isinstance(x, Tensor):
            raise UnsupportedArgument(
                f"{type(self).__name__}.forward",
                f"the argument {heeded[0]!r}" if heeded else f"no tensor {self.io.x!r}",
                f"only the tokens {self.io.x!r}",
                "Merged tokens have no places that it could speak of: keep this site as it is (exclude it) or call the "
                "model without it.",
            )
        return x, given

    def _sequence(self, x: Tensor) -> Tensor:
        spec = self.spec
        tokens_BNC = as_sequence(x, spec.arrangement)
        expected = spec.prefix + spec.groups * spec.count
        if tokens_BNC.shape[1] != expected:
            raise LayoutMismatch(
                f"tokens '{spec.arrangement}'", f"{tokens_BNC.shape[1]} tokens", f"{expected} tokens",
                ANOTHER_SIZE,
            )  # fmt: skip
        return tokens_BNC

    def extra_repr(self) -> str:
        spec = self.spec
        return f"keep={spec.keep}, count={spec.count}" + (f", groups={spec.groups}" if spec.groups > 1 else "")


def rounds(count: int, keep: int) -> list[Round]:
    """As few rounds as `_MOST` allows, of equal shares: (tokens, how many of them go) of each."""
    times, left = 0, count
    while left > keep:
        times, left = times + 1, left - _going(left, _MOST)
    share = next((parts for parts in range(1, _MOST + 1) if _after(count, parts, times) <= keep), _MOST)
    found = []
    while count > keep:
        found.append((count, min(count - keep, _going(count, share))))
        count -= found[-1][1]
    return found


@cache  # asked for by every setting of a network, like the next
def round_count(count: int, keep: int) -> int:
    """In how many rounds `keep` of `count` are left."""
    return len(rounds(count, keep))


@cache
def comparisons(count: int, keep: int) -> int:
    """How many pairs of tokens are compared until `keep` of `count` are left."""
    return sum(-(-left // 2) * (left // 2) for left, _ in rounds(count, keep))


def _going(count: int, parts: int) -> int:
    return max(1, count * parts // _PARTS)


def _after(count: int, parts: int, times: int) -> int:
    for _ in range(times):
        count -= _going(count, parts)
    return count


class Fewer(NamedTuple):
    """Tokens after a merge.

    Args:
        tokens_BKC: prefix tokens, then the means of the patches that went together, group by group.
        size_BK: how many tokens each stands for.
        row_N: which row of all tokens_BKC, one behind the other, stands for each row of all tokens before.
        before_BN: how many tokens each of those before stood for; None: itself.
    """

    tokens_BKC: Tensor
    size_BK: Tensor
    row_N: Tensor
    before_BN: Tensor | None = None

    def spread(self, answers_BKC: Tensor) -> Tensor:
        """Every token that there was gets the answer of the one that stands for it: [B, N, C]."""
        batch, _, channels = answers_BKC.shape
        # whole rows are copied: on a CPU ten times faster than `gather`
        return answers_BKC.reshape(-1, channels).index_select(0, self.row_N).reshape(batch, -1, channels)

    def means(self, tokens_BNC: Tensor) -> Tensor:
        """Other tokens in the place of those before, merged in the same way: [B, K, C]."""
        sums_BNC = tokens_BNC if self.before_BN is None else tokens_BNC * self.before_BN[..., None]
        batch, left = self.size_BK.shape
        sums_NC = _added(sums_BNC.reshape(-1, tokens_BNC.shape[2]), self.row_N, batch * left)
        return sums_NC.reshape(batch, left, -1) / self.size_BK[..., None]


def merge(
    tokens_BNC: Tensor,
    prefix: int,
    groups: int,
    schedule: Sequence[Round],
    *,
    size_BN: Tensor | None = None,
    watch: Watch | None = None,
) -> Fewer:
    """Merge similar patches of every group of every image; prefix tokens are left alone.

    In a round every other token looks for the most similar one (cosine) among the others; the most similar pairs merge.

    Args:
        tokens_BNC: prefix tokens, then the patches.
        prefix, groups: how many there are.
        schedule: the rounds; told as numbers, since a tracer would take a shape for a value that changes.
        size_BN: how many tokens each of them stands for; None: itself.
        watch: see `Merged`.
    """
    batch, _, channels = tokens_BNC.shape  # len() would make a number of a batch of any size
    sums_BNC = tokens_BNC if size_BN is None else tokens_BNC * size_BN[..., None]
    row_N = None
    for count, going in schedule:
        left = prefix + groups * (count - going)
        then_N = _then(sums_BNC, prefix, groups, count, going, watch)
        sums_BNC = _added(sums_BNC.reshape(-1, channels), then_N, batch * left).reshape(batch, left, channels)
        row_N = then_N if row_N is None else then_N.index_select(0, row_N)
    assert row_N is not None
    each_N = sums_BNC.new_ones(1).expand(row_N.shape) if size_BN is None else size_BN.flatten()
    size_BK = _added(each_N, row_N, batch * left).reshape(batch, left)
    return Fewer(sums_BNC.div_(size_BK[..., None]), size_BK, row_N, size_BN)


def _added(rows: Tensor, to_N: Tensor, count: int) -> Tensor:
    """Rows added up where they go, by number: on a CPU in a tenth of the time of `scatter_add`.

    Halves are added up as floats: onnxruntime has no such sum of halves on a CPU, and it is the more exact one.
    """
    if rows.dtype == torch.float16:
        return _added(rows.float(), to_N, count).half()
    return rows.new_zeros(count, *rows.shape[1:]).index_add_(0, to_N, rows)


def _then(sums_BNC: Tensor, prefix: int, groups: int, count: int, going: int, watch: Watch | None) -> Tensor:
    """Which row of all tokens behind a round each row before it goes into.

    Written for few operations: at batch 1 each takes as long to start as to run.
    """
    (batch, _, channels), device = sums_BNC.shape, sums_BNC.device
    receivers = count // 2
    staying, left = count - receivers - going, count - going
    patches_GMC = sums_BNC[:, prefix:].reshape(batch * groups, count, channels)
    # Cosines of sums, which point where the means do; a sender's own length does not change its choice.
    length_GM = torch.linalg.vector_norm(patches_GMC, dim=-1).clamp_min_(1e-12)
    products_GAD = torch.bmm(patches_GMC[:, ::2], patches_GMC[:, 1::2].transpose(1, 2)).div_(length_GM[:, None, 1::2])
    best_GA, partner_GA = products_GAD.max(-1)
    best_GA = best_GA / length_GM[:, ::2]
    if watch is not None:
        watch(best_GA, products_GAD / length_GM[:, ::2, None], going)
    # Behind the round those that stay come first, then the receivers, behind the prefix tokens.
    rows_K = torch.arange(prefix + left, device=device)
    stay_GS = best_GA.topk(staying, largest=False).indices
    ranks_GS = rows_K[prefix : prefix + staying].expand(stay_GS.shape)
    senders_GA = partner_GA.add_(prefix + staying).scatter_(1, stay_GS, ranks_GS)
    pairs_GP2 = torch.stack((senders_GA[:, :receivers], rows_K[prefix + staying :].expand(batch * groups, -1)), 2)
    then_GM = pairs_GP2.flatten(1)
    if count % 2:
        then_GM = torch.cat((then_GM, senders_GA[:, receivers:]), 1)
    if groups > 1:
        offset_G1 = left * torch.arange(groups, device=device)[:, None]
        then_GM = then_GM.reshape(batch, groups, count) + offset_G1
    then_BN = then_GM.reshape(batch, -1)
    if prefix:
        then_BN = torch.cat((rows_K[:prefix].expand(batch, -1), then_BN), 1)
    then_N: Tensor = (then_BN + (prefix + groups * left) * torch.arange(batch, device=device)[:, None]).flatten()
    return then_N
