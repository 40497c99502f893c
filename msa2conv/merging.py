"""Merging inside a site: its host runs on fewer tokens, and every position gets the answer of the token it went into.

Who goes into whom is bipartite soft matching (Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023), here on
the site's own input, at most a third of the tokens a round, and undone behind the site: the grid stays, nothing has to
be fitted, no state passes from site to site.

Shape suffixes: B batch (times groups), P prefix tokens, M tokens of a group, C channels, R tokens that go in a round, A
tokens that may go, D tokens that may receive.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import torch
import torch.nn.functional as F
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
        prefix_BPC, patches_BNC = self._split(x)
        batch, _, channels = patches_BNC.shape  # len() would make a number of a batch of any size
        grouped_BMC = patches_BNC.reshape(batch * spec.groups, spec.count, channels)
        index_BM, sums_BKC, size_BK = match(grouped_BMC, self.schedule, self.watch)
        merged_BNC = (sums_BKC / size_BK[..., None]).reshape(batch, -1, channels)
        if spec.sizes is not None:
            size_BN = F.pad(size_BK.reshape(batch, -1), (spec.prefix, 0), value=1.0)
            given[spec.sizes.argument] = spec.sizes.mask(size_BN)
        if spec.prefix:
            merged_BNC = torch.cat((prefix_BPC, merged_BNC), 1)
        fewer = arranged(merged_BNC, spec.arrangement)
        found = self.host(fewer, **{name: fewer if value is x else value for name, value in given.items()})
        out_BNC = as_sequence(found if isinstance(found, Tensor) else found[0], spec.arrangement)
        heard_BPC, answers_BNC = out_BNC[:, : spec.prefix], out_BNC[:, spec.prefix :]
        spread_BNC = rows(answers_BNC.reshape(-1, spec.keep, channels), index_BM).reshape(batch, -1, channels)
        whole_BNC = torch.cat((heard_BPC, spread_BNC), 1) if spec.prefix else spread_BNC
        whole = arranged(whole_BNC, spec.arrangement, x.shape)
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

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """-> (prefix_BPC, patches_BNC)."""
        spec = self.spec
        tokens_BNC = as_sequence(x, spec.arrangement)
        expected = spec.prefix + spec.groups * spec.count
        if tokens_BNC.shape[1] != expected:
            raise LayoutMismatch(
                f"tokens '{spec.arrangement}'", f"{tokens_BNC.shape[1]} tokens", f"{expected} tokens",
                ANOTHER_SIZE,
            )  # fmt: skip
        return tokens_BNC[:, : spec.prefix], tokens_BNC[:, spec.prefix :]

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


def comparisons(count: int, keep: int) -> int:
    """How many pairs of tokens are compared until `keep` of `count` are left."""
    return sum(-(-left // 2) * (left // 2) for left, _ in rounds(count, keep))


def _going(count: int, parts: int) -> int:
    return max(1, count * parts // _PARTS)


def _after(count: int, parts: int, times: int) -> int:
    for _ in range(times):
        count -= _going(count, parts)
    return count


def match(tokens_BMC: Tensor, schedule: Sequence[Round], watch: Watch | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Merge similar tokens of every row of a batch.

    In a round every other token looks for the most similar one (cosine) among the others; the most similar pairs merge.

    Args:
        tokens_BMC: the tokens.
        schedule: the rounds; told as numbers, since a tracer would take a shape for a value that changes.
        watch: see `Merged`.

    Returns:
        index_BM: which of the tokens that are left stands for each; sums_BKC: the sum of those it stands for; size_BK:
        how many these are.
    """
    batch, sums_BMC, index_BM = tokens_BMC.shape[0], tokens_BMC, None
    half = torch.arange(schedule[0][0], device=tokens_BMC.device) // 2  # 0 0 1 1 2 2 ...
    for count, going in schedule:
        # Cosines of sums, which point where the means do; a sender's own length does not change its choice.
        length_BM = torch.linalg.vector_norm(sums_BMC, dim=-1).clamp_min(1e-12)
        products_BAD = torch.bmm(sums_BMC[:, ::2], sums_BMC[:, 1::2].transpose(1, 2)) / length_BM[:, None, 1::2]
        best_BA, partner_BA = products_BAD.max(-1)
        best_BA = best_BA / length_BM[:, ::2]
        if watch is not None:
            watch(best_BA, products_BAD / length_BM[:, ::2, None], going)
        staying = -(-count // 2) - going
        order_BA = best_BA.argsort(-1)  # those that stay come first
        to_BR = partner_BA.gather(1, order_BA[:, staying:])
        place_BA = 2 * order_BA
        kept_BSC, gone_BRC = torch.split(rows(sums_BMC, place_BA), [staying, going], 1)
        received_BDC = sums_BMC[:, 1::2].scatter_add(1, to_BR[..., None].expand_as(gone_BRC), gone_BRC)
        sums_BMC = torch.cat((kept_BSC, received_BDC), 1)
        # Behind this round those that stay come first, then the receivers.
        of_senders_BA = torch.cat((half[: 2 * staying : 2].expand(batch, -1), to_BR + staying), 1)
        new_BM = (half[:count] + staying).expand(batch, -1).scatter(1, place_BA, of_senders_BA)
        index_BM = new_BM if index_BM is None else new_BM.gather(1, index_BM)
    assert index_BM is not None
    size_BK = sums_BMC.new_zeros(sums_BMC.shape[:2]).scatter_add(1, index_BM, torch.ones_like(tokens_BMC[..., 0]))
    return index_BM, sums_BMC, size_BK


def rows(tokens_BNC: Tensor, index_BM: Tensor) -> Tensor:
    """tokens[b, index[b, m]] -> [B, M, C]; whole rows are copied, ten times faster on a CPU than `gather`."""
    batch, count, channels = tokens_BNC.shape
    first_B1 = torch.arange(batch, device=index_BM.device)[:, None] * count
    flat = tokens_BNC.reshape(-1, channels).index_select(0, (index_BM + first_B1).flatten())
    return flat.reshape(batch, -1, channels)
