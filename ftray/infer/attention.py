"""Attention of one engine step: decoding tokens read the paged cache, prompts attend within themselves.

The row holds first one token of each decoding sequence, then whole prompts end to end.
Shapes: T tokens in the row, n decoding sequences, L their longest context, H query heads, K key/value heads.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ftray.infer.kv_cache import KVCache
from ftray.model.packed_attention import PackedLayout, packed_causal_attention, register_attention

PAGED = "ftray_paged"


@dataclass(frozen=True)
class DecodeContext:
    slots_nL: Tensor  # where each sequence's keys and values lie, the new token's included; padded with slot 0
    mask_nL: Tensor  # False at padding


@dataclass(frozen=True)
class AttentionStep:
    cache: KVCache | None  # None: scoring, nothing is kept
    write_slots_T: Tensor | None
    decode: DecodeContext | None
    prompts: PackedLayout | None


def decode_context(slots: list[Tensor], lengths: list[int], device: torch.device) -> DecodeContext:
    longest = max(lengths)
    slots_nL = torch.zeros(len(slots), longest, dtype=torch.long)
    for row, (own, length) in enumerate(zip(slots, lengths, strict=True)):
        slots_nL[row, :length] = own[:length]
    mask_nL = torch.arange(longest)[None, :] < torch.tensor(lengths)[:, None]
    return DecodeContext(slots_nL.to(device), mask_nL.to(device))


def attention_forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    step: AttentionStep,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query [1, H, T, D] -> ([1, T, H, D], no weights)."""
    if step.cache is not None:
        assert step.write_slots_T is not None
        step.cache.keys[module.layer_idx].index_copy_(0, step.write_slots_T, key[0].transpose(0, 1))
        step.cache.values[module.layer_idx].index_copy_(0, step.write_slots_T, value[0].transpose(0, 1))
    parts = []
    num_decode = 0
    if step.decode is not None:
        assert step.cache is not None
        num_decode = len(step.decode.slots_nL)
        query_nHD = query[0, :, :num_decode].transpose(0, 1)
        parts.append(decode_attention(query_nHD, step.cache, module.layer_idx, step.decode, scaling=scaling))
    if step.prompts is not None:
        prompt_q, prompt_k, prompt_v = (x[0, :, num_decode:] for x in (query, key, value))
        parts.append(packed_causal_attention(prompt_q, prompt_k, prompt_v, step.prompts, scaling=scaling))
    return (torch.cat(parts) if len(parts) > 1 else parts[0]).unsqueeze(0), None


def decode_attention(
    query_nHD: Tensor, cache: KVCache, layer: int, context: DecodeContext, *, scaling: float
) -> Tensor:
    """[n, H, D]. The query heads that share a key head become rows of one small attention: no key is repeated."""
    n, longest = context.slots_nL.shape
    flat = context.slots_nL.flatten()
    key, value = (
        pool[layer].index_select(0, flat).unflatten(0, (n, longest)).transpose(1, 2)
        for pool in (cache.keys, cache.values)
    )
    grouped = query_nHD.unflatten(1, (key.shape[1], -1))  # [n, K, H / K, D]
    out = scaled_dot_product_attention(grouped, key, value, attn_mask=context.mask_nL[:, None, None, :], scale=scaling)
    return out.flatten(1, 2)


def register_paged_attention() -> str:
    register_attention(PAGED, attention_forward)
    return PAGED
