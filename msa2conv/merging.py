"""Merging inside a site: its host runs on fewer tokens, and every position gets the answer of the token it went into.

Who goes into whom is bipartite soft matching (Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023), here on
the site's own input, at most a third of the tokens a round, and undone behind the site: the grid stays, nothing has to
be fitted, no state passes from site to site.

Shape suffixes: B batch (times groups), P prefix tokens, M tokens of a group, C channels, R tokens that go in a round, A
tokens that may go, D tokens that may receive.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from .errors import LayoutMismatch, UnsupportedArgument
from .ops import IO, Arrangement, Sizes, Spec, Width, arranged, as_sequence
from .standin import Standin

Watch = Callable[[Tensor, Tensor, int], None]
_SHARE = 3  # at most one in so many tokens goes in a round: with half of them, partners that fit badly are taken too


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

    @property
    def flops(self) -> int:
        """Multiply-adds of all comparisons, for one channel and one sequence."""
        return self.groups * sum(-(-count // 2) * (count // 2) for count, _ in rounds(self.count, self.keep))

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
        self.watch: Watch | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        x, given = self._bind(args, kwargs)
        spec = self.spec
        prefix_BPC, patches_BNC = self._split(x)
        batch, channels = len(patches_BNC), patches_BNC.shape[-1]
        grouped_BMC = patches_BNC.reshape(batch * spec.groups, spec.count, channels)
        index_BM, sums_BKC, size_BK = match(grouped_BMC, spec.count, spec.keep, self.watch)
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
                "A hybrid runs at the image size it was converted for, with all patches: convert again with "
                "example_inputs of the new size, and train it without patch dropout.",
            )  # fmt: skip
        return tokens_BNC[:, : spec.prefix], tokens_BNC[:, spec.prefix :]

    def extra_repr(self) -> str:
        spec = self.spec
        return f"keep={spec.keep}, count={spec.count}" + (f", groups={spec.groups}" if spec.groups > 1 else "")


def rounds(count: int, keep: int) -> list[tuple[int, int]]:
    """(tokens, how many of them go) of every round."""
    found = []
    while count > keep:
        going = min(count - keep, max(1, count // _SHARE))
        found.append((count, going))
        count -= going
    return found


def match(tokens_BMC: Tensor, total: int, keep: int, watch: Watch | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Merge similar tokens of every row of a batch until `keep` are left.

    In a round every other token looks for the most similar one (cosine) among the others; the most similar pairs merge.

    Args:
        tokens_BMC: the tokens.
        total: how many they are, M; told, since a tracer would take it for a value that changes.
        keep: how many are left.
        watch: see `Merged`.

    Returns:
        index_BM: which of the tokens that are left stands for each; sums_BKC: the sum of those it stands for; size_BK:
        how many these are.
    """
    batch = len(tokens_BMC)
    index_BM = torch.arange(total, device=tokens_BMC.device).expand(batch, -1)
    sums_BMC, size_BM = tokens_BMC, tokens_BMC.new_ones(batch, total)
    for count, going in rounds(total, keep):
        unit_BMC = F.normalize(sums_BMC, dim=-1)
        scores_BAD = torch.bmm(unit_BMC[:, ::2], unit_BMC[:, 1::2].transpose(1, 2))
        best_BA, partner_BA = scores_BAD.max(-1)
        if watch is not None:
            watch(best_BA, scores_BAD, going)
        staying = -(-count // 2) - going
        order_BA = best_BA.argsort(-1)  # those that stay come first
        goes_BR = order_BA[:, staying:]
        to_BR = partner_BA.gather(1, goes_BR)
        gone_BRC, kept_BSC = torch.split(rows(sums_BMC, 2 * order_BA), [staying, going], 1)[::-1]
        received_BDC = sums_BMC[:, 1::2].scatter_add(1, to_BR[..., None].expand_as(gone_BRC), gone_BRC)
        sums_BMC = torch.cat((kept_BSC, received_BDC), 1)
        kept_BS, gone_BR = (size_BM.gather(1, 2 * part) for part in (order_BA[:, :staying], goes_BR))
        size_BM = torch.cat((kept_BS, size_BM[:, 1::2].scatter_add(1, to_BR, gone_BR)), 1)
        index_BM = _renumbered(order_BA, to_BR, staying, count).gather(1, index_BM)
    return index_BM, sums_BMC, size_BM


def _renumbered(order_BA: Tensor, to_BR: Tensor, staying: int, count: int) -> Tensor:
    """Of every token before a round its number behind it."""
    batch, senders = len(order_BA), -(-count // 2)
    places = torch.arange(staying, device=order_BA.device).expand(batch, -1)
    of_senders_BA = torch.zeros_like(order_BA).scatter(1, order_BA, torch.cat((places, staying + to_BR), 1))
    of_receivers_BD = torch.arange(staying, staying + count - senders, device=order_BA.device).expand(batch, -1)
    token = torch.arange(count, device=order_BA.device)
    both_BM = torch.cat((of_senders_BA, of_receivers_BD), 1)
    return both_BM.index_select(1, token // 2 + token % 2 * senders)


def rows(tokens_BNC: Tensor, index_BM: Tensor) -> Tensor:
    """tokens[b, index[b, m]] -> [B, M, C]; whole rows are copied, ten times faster on a CPU than `gather`."""
    batch, count, channels = tokens_BNC.shape
    first_B1 = torch.arange(batch, device=index_BM.device)[:, None] * count
    flat = tokens_BNC.reshape(-1, channels).index_select(0, (index_BM + first_B1).flatten())
    return flat.reshape(batch, -1, channels)
