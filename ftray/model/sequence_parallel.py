"""Ulysses sequence parallelism (Jacobs et al. 2023, arXiv 2309.14509): n ranks share every packed row.

Each rank holds T / n tokens in all layers; around the attention an all-to-all trades tokens for heads, so that each
rank sees all tokens with H / n of the heads, and the packed layout keeps its meaning. Weights are not touched: to ZeRO
the ranks are data-parallel ones whose gradients add up.

Shapes: T tokens in the row, t = T / n on this rank, H query heads, K key/value heads, D head dimension, N targets.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.nn.functional import all_reduce, all_to_all_single

from ftray.errors import UserError
from ftray.model.packed_attention import Attend, PackedLayout, packed_layout


@dataclass(frozen=True)
class SequenceRanks:
    """The ranks that share each row, and which of them this one is."""

    size: int
    rank: int
    group: Any

    def heads_for_tokens(self, x_HtD: Tensor) -> Tensor:
        """[H, t, D] of this rank's tokens -> [H / n, T, D] of its heads."""
        heads, tokens, width = x_HtD.shape
        sent = x_HtD.reshape(self.size, heads // self.size, tokens, width).contiguous()
        received: Tensor = all_to_all_single(torch.empty_like(sent), sent, group=self.group)
        return received.transpose(0, 1).reshape(heads // self.size, self.size * tokens, width)

    def tokens_for_heads(self, x_ThD: Tensor) -> Tensor:
        """[T, H / n, D] of this rank's heads -> [t, H, D] of its tokens."""
        tokens, heads, width = x_ThD.shape
        sent = x_ThD.reshape(self.size, tokens // self.size, heads, width).contiguous()
        received: Tensor = all_to_all_single(torch.empty_like(sent), sent, group=self.group)
        return received.transpose(0, 1).reshape(tokens // self.size, self.size * heads, width)

    def attention(self, attend: Attend) -> Attend:
        """Of a layer, over the whole row: what comes in and goes out are this rank's tokens."""
        return functools.partial(self._attend, attend)

    def _attend(
        self,
        attend: Attend,
        query_HtD: Tensor,
        key_KtD: Tensor,
        value_KtD: Tensor,
        layout: PackedLayout,
        *,
        sinks_H: Tensor | None = None,
        **scores: Any,
    ) -> Tensor:
        """[t, H, D]."""
        if sinks_H is not None:
            scores["sinks_H"] = sinks_H.chunk(self.size)[self.rank]
        copies = math.lcm(key_KtD.shape[0], self.size) // key_KtD.shape[0]  # so that every rank gets key/value heads
        key_KtD, value_KtD = (x.repeat_interleave(copies, dim=0) for x in (key_KtD, value_KtD))
        query, key, value = (self.heads_for_tokens(x) for x in (query_HtD, key_KtD, value_KtD))
        return self.tokens_for_heads(attend(query, key, value, layout, **scores))

    def sum(self, x: Tensor) -> Tensor:
        """Over the ranks; gradients too."""
        return all_reduce(x, group=self.group)


@dataclass(frozen=True)
class RowShare:
    """This rank's part of a row, padded at its end to a multiple of n with one more sequence, which nothing sees."""

    ids_t: Tensor
    positions_t: Tensor
    layout: PackedLayout  # of the whole padded row
    mine_N: Tensor  # which of the row's targets are predicted from this rank's tokens
    first: int  # position of its first token in the row


def share_row(
    ids_T: Tensor, positions_T: Tensor, rows_N: Tensor, layout: PackedLayout, ranks: SequenceRanks
) -> RowShare:
    padding = -len(ids_T) % ranks.size
    if padding:
        layout = packed_layout([*layout.lengths, padding]).to(ids_T.device)
        ids_T, positions_T = (torch.nn.functional.pad(x, (0, padding)) for x in (ids_T, positions_T))
    size = len(ids_T) // ranks.size
    first = ranks.rank * size
    mine_N = ((rows_N >= first) & (rows_N < first + size)).nonzero()[:, 0]
    part = slice(first, first + size)
    return RowShare(ids_T[part], positions_T[part], layout, mine_N, first)


def make_sequence_ranks(size: int, *, num_heads: int) -> SequenceRanks | None:
    """Neighbouring ranks share rows: they are mostly on one node. All ranks call it; None where no row is shared."""
    if size == 1:
        return None
    if num_heads % size:
        raise UserError(f"memory.sequence_parallel: {size} does not divide the {num_heads} attention heads of the base")
    world, rank = dist.get_world_size(), dist.get_rank()
    groups = [dist.new_group(list(range(first, first + size))) for first in range(0, world, size)]
    return SequenceRanks(size, rank % size, groups[rank // size])
