"""Attention of one engine step: queries read the paged cache; without kernels whole prompts attend within themselves.

A row holds first one token of each decoding sequence, then pieces of prompts end to end: whole ones, of which nothing
was in the cache before, then those whose beginning was.
Shapes: T tokens in the row, n decoding sequences, P pages of the longest, H query heads, K key/value heads.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ftray.infer.torch_engine.cpu.kernels import HEAD_LANES, MOST_HEAD_DIM, CpuKernels
from ftray.infer.torch_engine.kv_cache import PAGE_TOKENS, KVCache, pages_for
from ftray.model.packed_attention import PackedLayout, packed_causal_attention, packed_layout, register_attention

PAGED = "ftray_paged"


@dataclass(frozen=True)
class DecodeContext:
    pages_nP: Tensor  # pages of each sequence, the new token's included; padded with page 0
    bias_nL: Tensor  # L = P * PAGE_TOKENS; 0, and -inf behind the new token

    def attend(self, query_nHD: Tensor, layer: Tensor, *, scaling: float) -> Tensor:
        """[n, H, D]. The query heads that share a key head become rows of one small attention: no key is repeated."""
        n = len(self.pages_nP)
        kept = layer.index_select(0, self.pages_nP.flatten()).view(n, -1, *layer.shape[2:])  # [n, L, 2, K, D]
        key, value = kept[:, :, 0].transpose(1, 2), kept[:, :, 1].transpose(1, 2)
        grouped = query_nHD.unflatten(1, (key.shape[1], -1))  # [n, K, H / K, D]
        bias = self.bias_nL[:, None, None, :]
        return scaled_dot_product_attention(grouped, key, value, attn_mask=bias, scale=scaling).flatten(1, 2)


@dataclass(frozen=True)
class KernelContext:
    """The same, by a kernel that reads keys and values where they are."""

    pages_nP: Tensor
    lengths_n: Tensor
    kernels: CpuKernels

    def attend(self, query_nHD: Tensor, layer: Tensor, *, scaling: float) -> Tensor:
        query_nHD = side_by_side(query_nHD)
        return self.kernels.attend_to_pages(query_nHD, layer, self.pages_nP, self.lengths_n, scaling=scaling)


@dataclass(frozen=True)
class Continuation:
    """A piece of a prompt whose beginning is in the cache."""

    num_tokens: int
    pages: Tensor
    bias_TL: Tensor  # query t sees the cached tokens and the piece's own up to t: 0, and -inf elsewhere


@dataclass(frozen=True)
class Prompts:
    """Pieces of prompts: whole ones as their tokens come, the rest from the cache."""

    whole: PackedLayout | None
    continued: tuple[Continuation, ...] = ()

    def attend(self, query_THD: Tensor, key_value_T2KD: Tensor, layer: Tensor | None, *, scaling: float) -> Tensor:
        parts: list[Tensor] = []
        at = 0
        if self.whole is not None:
            at = sum(self.whole.lengths)
            key_KTD, value_KTD = (key_value_T2KD[:at, i].transpose(0, 1) for i in (0, 1))
            query_HTD = query_THD[:at].transpose(0, 1)
            parts.append(packed_causal_attention(query_HTD, key_KTD, value_KTD, self.whole, scaling=scaling))
        for piece in self.continued:
            assert layer is not None
            rows = slice(at, at + piece.num_tokens)
            at = rows.stop
            parts.append(continued_attention(query_THD[rows].transpose(0, 1), layer, piece, scaling=scaling))
        return torch.cat(parts) if len(parts) > 1 else parts[0]


@dataclass(frozen=True)
class KernelPrompts:
    """The same, all of it from the cache, by a kernel."""

    pages_nP: Tensor
    prompts_n3: Tensor  # first of the prompts' rows, number of rows, tokens before them
    kernels: CpuKernels

    def attend(self, query_THD: Tensor, key_value_T2KD: Tensor, layer: Tensor | None, *, scaling: float) -> Tensor:
        assert layer is not None
        query_THD = side_by_side(query_THD)
        return self.kernels.attend_to_prompts(query_THD, layer, self.pages_nP, self.prompts_n3, scaling=scaling)


@dataclass(frozen=True)
class AttentionStep:
    cache: KVCache | None  # None: scoring, nothing is kept
    write_slots_T: Tensor | None  # page * PAGE_TOKENS + place in the page
    decode: DecodeContext | KernelContext | None
    prompts: Prompts | KernelPrompts | None

    def layer(self, index: int) -> Tensor | None:
        """Of the cache: [P, PAGE_TOKENS, 2, K, D]."""
        return self.cache.layers[index] if self.cache is not None else None


def side_by_side(query_THD: Tensor) -> Tensor:
    """A token's heads, as the kernels want them; a view where they are (transformers has a head's tokens so)."""
    return query_THD.flatten(1).unflatten(1, query_THD.shape[1:])


def decode_context(
    pages: Sequence[Sequence[int]], lengths: Sequence[int], cache: KVCache, kernels: CpuKernels | None
) -> DecodeContext | KernelContext:
    """`lengths`: tokens of each sequence in the cache, the new one included."""
    like = cache.layers[0]
    pages_nP = padded_pages(pages, lengths)
    if can_attend(kernels, like):
        return KernelContext(pages_nP, torch.tensor(lengths), kernels)
    hidden_nL = torch.arange(pages_nP.shape[1] * PAGE_TOKENS)[None, :] >= torch.tensor(lengths)[:, None]
    return DecodeContext(pages_nP.to(like.device), bias(hidden_nL, like))


def prompt_context(
    pieces: Sequence[tuple[Sequence[int], int, int]], cache: KVCache, kernels: CpuKernels | None
) -> Prompts | KernelPrompts:
    """`pieces`: pages of the sequence, tokens before the piece, tokens of it; whole prompts first."""
    like = cache.layers[0]
    if can_attend(kernels, like):
        pages_nP = padded_pages([pages for pages, _, _ in pieces], [cached + count for _, cached, count in pieces])
        firsts = itertools.accumulate((count for _, _, count in pieces), initial=0)
        prompts = [(first, count, cached) for first, (_, cached, count) in zip(firsts, pieces, strict=False)]
        return KernelPrompts(pages_nP, torch.tensor(prompts), kernels)
    whole = [count for _, cached, count in pieces if cached == 0]
    return Prompts(
        packed_layout(whole).to(like.device) if whole else None,
        tuple(
            continuation(pages, cached=cached, num_tokens=count, like=like)
            for pages, cached, count in pieces[len(whole) :]
        ),
    )


def can_attend(kernels: CpuKernels | None, like: Tensor) -> TypeGuard[CpuKernels]:
    return kernels is not None and like.shape[-1] % HEAD_LANES == 0 and like.shape[-1] <= MOST_HEAD_DIM


def padded_pages(pages: Sequence[Sequence[int]], lengths: Sequence[int]) -> Tensor:
    """[n, P], with page 0 behind those that hold a sequence's first `lengths` tokens."""
    most = pages_for(max(lengths))
    return torch.tensor([[*own[:most], *[0] * (most - len(own))] for own in pages])


def continuation(pages: Sequence[int], *, cached: int, num_tokens: int, like: Tensor) -> Continuation:
    used = pages_for(cached + num_tokens)
    last_T = torch.arange(cached, cached + num_tokens)
    hidden_TL = torch.arange(used * PAGE_TOKENS)[None, :] > last_T[:, None]
    return Continuation(num_tokens, torch.tensor(pages[:used]).to(like.device), bias(hidden_TL, like))


def bias(hidden: Tensor, like: Tensor) -> Tensor:
    """What sdpa adds to the scores; made once a step, where a boolean mask would be turned into it in every layer."""
    return torch.zeros(hidden.shape).masked_fill_(hidden, float("-inf")).to(like)


def write_kv(key_value_T2KD: Tensor, layer_index: int, step: AttentionStep) -> None:
    """Writes the new keys and values to the cache."""
    layer = step.layer(layer_index)
    if layer is not None:
        assert step.write_slots_T is not None
        layer.flatten(0, 1).index_copy_(0, step.write_slots_T, key_value_T2KD)


def attend(
    query_THD: Tensor, key_value_T2KD: Tensor, layer_index: int, step: AttentionStep, *, scaling: float
) -> Tensor:
    """[T, H, D]. The new keys and values are in the cache already (`keep`)."""
    layer = step.layer(layer_index)
    parts: list[Tensor] = []
    num_single = 0
    if step.decode is not None:
        assert layer is not None
        num_single = len(step.decode.pages_nP)
        parts.append(step.decode.attend(query_THD[:num_single], layer, scaling=scaling))
    if step.prompts is not None:
        rest = slice(num_single, None)
        parts.append(step.prompts.attend(query_THD[rest], key_value_T2KD[rest], layer, scaling=scaling))
    return torch.cat(parts) if len(parts) > 1 else parts[0]


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
    key_value_T2KD = torch.stack((key[0], value[0])).permute(2, 0, 1, 3)
    write_kv(key_value_T2KD, module.layer_idx, step)
    mixed = attend(query[0].transpose(0, 1), key_value_T2KD, module.layer_idx, step, scaling=scaling)
    return mixed.unsqueeze(0), None


def continued_attention(query_HTD: Tensor, layer: Tensor, piece: Continuation, *, scaling: float) -> Tensor:
    """[T, H, D]."""
    kept = layer.index_select(0, piece.pages).flatten(0, 1)  # [L, 2, K, D]
    key, value = kept[:, 0].transpose(0, 1)[None], kept[:, 1].transpose(0, 1)[None]
    out = scaled_dot_product_attention(
        query_HTD[None], key, value, attn_mask=piece.bias_TL, scale=scaling, enable_gqa=len(query_HTD) != key.shape[1]
    )
    return out[0].transpose(0, 1)


def register_paged_attention() -> str:
    register_attention(PAGED, attention_forward)
    return PAGED
