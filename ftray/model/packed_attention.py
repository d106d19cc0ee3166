"""Causal attention over packed rows: sequences lie end to end in one row and never see each other.

No T x T mask is built. Sequences of like length are gathered into a right-padded batch and go through torch's
sdpa with `is_causal`: a real query never looks to its right, so the padding is invisible to it. The work is the sum
of squared lengths, not the square of the sum, on CPU and GPU alike.

Shapes: T tokens in the row, H query heads, K key/value heads, D head dimension, n sequences of padded length L.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

PACKED = "ftray_packed"
# A bucket's padded size may exceed its real tokens by this much: fewer, larger kernels against wasted work.
MAX_PADDING = 1.25


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


def packed_layout(lengths: Sequence[int]) -> PackedLayout:
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    groups: list[list[int]] = []
    real = 0
    for i in order:
        longest = lengths[groups[-1][0]] if groups else 0
        if groups and longest * (len(groups[-1]) + 1) <= MAX_PADDING * (real + lengths[i]):
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
    query_HTD: Tensor, key_KTD: Tensor, value_KTD: Tensor, layout: PackedLayout, *, scaling: float
) -> Tensor:
    """Returns [T, H, D]."""
    outputs = []
    for bucket in layout.buckets:
        query, key, value = (
            x.index_select(1, bucket.gather_nL)
            .view(x.shape[0], bucket.num_sequences, bucket.length, x.shape[2])
            .transpose(0, 1)
            for x in (query_HTD, key_KTD, value_KTD)
        )
        grouped = query.shape[1] != key.shape[1]
        out = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=grouped)
        outputs.append(out.transpose(1, 2).flatten(0, 1))  # [n * L, H, D]
    joined = torch.cat(outputs) if len(outputs) > 1 else outputs[0]
    return joined.index_select(0, layout.scatter_T)


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
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query [1, H, T, D] -> ([1, T, H, D], no weights)."""
    mixed = attend[module.layer_idx](query[0], key[0], value[0], layout, scaling=scaling)
    return mixed.unsqueeze(0), None


def register_attention(name: str, forward: Any) -> None:
    """Makes `attn_implementation=name` known; transformers builds no mask for it, the layout has the boundaries."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(name, forward)
    AttentionMaskInterface.register(name, lambda *args, **kwargs: None)
