"""Causal attention over packed rows: sequences lie end to end in one row and never see each other.

No T x T mask is built. Sequences of like length are gathered into a right-padded batch and go through torch's
sdpa with `is_causal`: a real query never looks to its right, so the padding is invisible to it. The work is the sum
of squared lengths, not the square of the sum, on CPU and GPU alike. Windows, capped scores and sinks go a block of
queries at a time, with the keys that it sees.

Shapes: T tokens in the row, H query heads, K key/value heads, D head dimension, n sequences of padded length L.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

PACKED = "ftray_packed"
# A bucket's padded size may exceed its real tokens by this much: fewer, larger kernels against wasted work.
MAX_PADDING = 1.25
# Queries of one block where scores are more than a product: as many rows of scores exist at one time, of each head.
QUERY_BLOCK = 1024
SCORED_BLOCK = 256  # where torch has no kernel, and all scores of a block are held


@dataclass(frozen=True)
class Bucket:
    num_sequences: int
    length: int
    gather_nL: Tensor  # row index of every padded slot, flat; a pad repeats its sequence's last token


@dataclass(frozen=True)
class PackedLayout:
    """Where the sequences of a row lie. `scatter_T[t]` is the slot of token t in the concatenated buckets."""

    lengths: tuple[int, ...]
    buckets: tuple[Bucket, ...]
    scatter_T: Tensor

    def to(self, device: torch.device) -> "PackedLayout":
        buckets = tuple(Bucket(b.num_sequences, b.length, b.gather_nL.to(device)) for b in self.buckets)
        return PackedLayout(self.lengths, buckets, self.scatter_T.to(device))

    def in_chunks(self, size: int) -> "PackedLayout":
        """Every sequence cut after each `size` tokens."""
        if max(self.lengths) <= size:
            return self
        return chunked_layout(self.lengths, size, self.scatter_T.device)

    def batches(self, x_T: Tensor) -> Iterator[Tensor]:
        """[n, L, ...] of each bucket, of something of each token: [T, ...]."""
        for bucket in self.buckets:
            yield x_T.index_select(0, bucket.gather_nL).unflatten(0, (bucket.num_sequences, bucket.length))

    def row(self, batches: Sequence[Tensor]) -> Tensor:
        """[T, ...] out of those."""
        flat = [batch.flatten(0, 1) for batch in batches]
        return (torch.cat(flat) if len(flat) > 1 else flat[0]).index_select(0, self.scatter_T)


@functools.lru_cache(maxsize=8)
def chunked_layout(lengths: tuple[int, ...], size: int, device: torch.device) -> PackedLayout:
    """Of all layers of a row, made once."""
    cut = [min(size, length - start) for length in lengths for start in range(0, length, size)]
    return packed_layout(cut).to(device)


def packed_layout(lengths: Sequence[int], *, in_one_batch: bool = False) -> PackedLayout:
    """`in_one_batch`: one bucket for all, whatever the padding."""
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    groups: list[list[int]] = []
    real = 0
    for i in order:
        longest = lengths[groups[-1][0]] if groups else 0
        if groups and (in_one_batch or longest * (len(groups[-1]) + 1) <= MAX_PADDING * (real + lengths[i])):
            groups[-1].append(i)
            real += lengths[i]
        else:
            groups.append([i])
            real = lengths[i]
    buckets: list[Bucket] = []
    scatter_T = torch.empty(starts[-1], dtype=torch.long)
    offset = 0
    for group in groups:
        padded = lengths[group[0]]
        slots = torch.arange(padded)
        rows = [starts[i] + slots.clamp(max=lengths[i] - 1) for i in group]
        for place, i in enumerate(group):
            scatter_T[starts[i] : starts[i + 1]] = offset + place * padded + torch.arange(lengths[i])
        buckets.append(Bucket(len(group), padded, torch.cat(rows)))
        offset += len(group) * padded
    return PackedLayout(tuple(lengths), tuple(buckets), scatter_T)


def packed_causal_attention(
    query_HTD: Tensor,
    key_KTD: Tensor,
    value_KTD: Tensor,
    layout: PackedLayout,
    *,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """Returns [T, H, D]. `window`: a token sees itself and `window` - 1 before it. `softcap`: scores s become
    c tanh(s / c) (Gemma 2, arXiv 2408.00118). `sinks_H`: a score more in the softmax of each head, that gives nothing
    (gpt-oss, arXiv 2508.10925)."""
    outputs = []
    for bucket in layout.buckets:
        query, key, value = (
            x.index_select(1, bucket.gather_nL)
            .view(x.shape[0], bucket.num_sequences, bucket.length, x.shape[2])
            .transpose(0, 1)
            for x in (query_HTD, key_KTD, value_KTD)
        )
        if softcap is None and sinks_H is None and (window is None or bucket.length <= window):
            grouped = query.shape[1] != key.shape[1]
            out = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=grouped)
        else:
            out = in_blocks(query, key, value, window, scaling=scaling, softcap=softcap, sinks_H=sinks_H)
        outputs.append(out.transpose(1, 2).flatten(0, 1))  # [n * L, H, D]
    joined = torch.cat(outputs) if len(outputs) > 1 else outputs[0]
    return joined.index_select(0, layout.scatter_T)


def in_blocks(query: Tensor, key: Tensor, value: Tensor, window: int | None, **scores: Any) -> Tensor:
    """[n, H, L, D]: causal attention, a block of queries at a time; with several blocks, or where scores are held, they
    are computed again for the gradient."""
    length = query.shape[2]
    keeps_scores = any(scores.get(name) is not None for name in ("softcap", "sinks_H"))
    size = SCORED_BLOCK if keeps_scores else max(QUERY_BLOCK, window or 0)
    positions = torch.arange(length, device=query.device)
    parts = []
    for start in range(0, length, size):
        own, seen = slice(start, start + size), slice(max(0, start - (window or length) + 1), start + size)
        distance = positions[own, None] - positions[None, seen]
        bias = score_bias((distance < 0) | (distance >= (window or length)), query.dtype)
        block = functools.partial(biased_attention, **scores)
        inputs = query[:, :, own], key[:, :, seen], value[:, :, seen], bias
        again = keeps_scores or size < length
        parts.append(checkpoint(block, *inputs, use_reentrant=False) if again else block(*inputs))
    return torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]


def score_bias(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to scores: 0, and -inf where `hidden`."""
    return torch.zeros(hidden.shape, device=hidden.device, dtype=dtype).masked_fill_(hidden, float("-inf"))


def biased_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """[n, H, L, D] of query [n, H, L, D] and key, value [n, K, S, D]; `bias` for [n, H, L, S]."""
    copies = query.shape[1] // key.shape[1]
    if softcap is None and sinks_H is None:
        if copies > 1 and query.device.type != "cpu":  # with a bias a GPU has no kernel that shares keys
            key, value = (x.repeat_interleave(copies, dim=1) for x in (key, value))
        grouped = query.shape[1] != key.shape[1]
        return scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scaling, enable_gqa=grouped)
    key, value = (x.repeat_interleave(copies, dim=1) for x in (key, value))
    scores = (query @ key.transpose(-1, -2)).mul_(scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = (scores + bias).float()
    if sinks_H is not None:
        sinks = sinks_H.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sinks], dim=-1)
    weights = scores.softmax(-1)[..., : value.shape[2]]
    return weights.to(value.dtype) @ value


Attend = Callable[..., Tensor]  # what `packed_causal_attention` takes and returns


@torch.compiler.disable  # every layout would be compiled anew; what is fused lies before and after the attention
def attention_forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    layout: PackedLayout,
    attend: Sequence[Attend],  # of each layer
    **given: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query [1, H, T, D] -> ([1, T, H, D], no weights)."""
    mixed = attend[module.layer_idx](query[0], key[0], value[0], layout, scaling=scaling, **scores_of(given))
    return mixed.unsqueeze(0), None


def scores_of(given: dict[str, Any]) -> dict[str, Any]:
    """What transformers' attention layers say of their scores beside the scaling, as `biased_attention` takes it."""
    named = {"softcap": given.get("softcap"), "sinks_H": given.get("s_aux")}
    return {name: value for name, value in named.items() if value is not None}


def register_attention(name: str, forward: Any) -> None:
    """Makes `attn_implementation=name` known; transformers builds no mask for it, the layout has the boundaries."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(name, forward)
    AttentionMaskInterface.register(name, lambda *args, **kwargs: None)
