"""Attention of one engine step: queries read the paged cache; without kernels whole prompts attend within themselves.

A row holds first one token of each decoding sequence, then pieces of prompts end to end: whole ones, of which nothing
was in the cache before, then those whose beginning was. What layers of one kind share is made once a step.
Shapes: T tokens in the row, n decoding sequences, P pages of the longest, H query heads, K key/value heads, D head
dimension.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from ftray.errors import UserError
from ftray.infer.torch_engine.cpu.kernels import HEAD_LANES, MOST_HEAD_DIM, CpuKernels
from ftray.infer.torch_engine.kv_cache import PAGE_TOKENS, KVCache, pages_for
from ftray.model.families import FullAttention, LayerKind
from ftray.model.packed_attention import (
    PackedLayout,
    biased_attention,
    packed_layout,
    register_attention,
    score_bias,
    scores_of,
)

PAGED = "ftray_paged"
Piece = tuple[Sequence[int], int, int]  # of a prompt: pages of its sequence, tokens before it, tokens of it


@dataclass(frozen=True)
class SeenPages:
    """What one kind of layer reads of the cache."""

    pages: Tensor  # [n, P] of sequences, or [P] of one; padded with page 0
    bias: Tensor  # [n, L] or [T, L] with L = P * PAGE_TOKENS: 0, and -inf where a token is not seen


@dataclass(frozen=True)
class Decoding:
    """One token of each of n sequences. `lengths`: tokens of each in the cache, the new one included."""

    pages: Sequence[Sequence[int]]
    lengths: Sequence[int]
    kernels: CpuKernels | None
    _seen: dict[LayerKind | None, Any] = field(default_factory=dict)

    def attend(self, query_nHD: Tensor, layer: Tensor, kind: LayerKind, *, scaling: float, **scores: Any) -> Tensor:
        """[n, H, D]. The query heads that share a key head become rows of one small attention: no key is repeated."""
        if not scores and can_attend(self.kernels, layer, kind):
            pages_nP, lengths_n = self._of_kernels()
            query_nHD = side_by_side(query_nHD)
            return self.kernels.attend_to_pages(query_nHD, layer, pages_nP, lengths_n, scaling=scaling)
        n, seen = len(self.lengths), self._of_kind(kind, layer)
        kept = layer.index_select(0, seen.pages.flatten()).view(n, -1, *layer.shape[2:])  # [n, L, 2, K, D]
        key, value = kept[:, :, 0].transpose(1, 2), kept[:, :, 1].transpose(1, 2)
        bias = seen.bias[:, None, None, :]
        if scores:
            return biased_attention(query_nHD[:, :, None], key, value, bias, scaling=scaling, **scores)[:, :, 0]
        grouped = query_nHD.unflatten(1, (key.shape[1], -1))  # [n, K, H / K, D]
        return scaled_dot_product_attention(grouped, key, value, attn_mask=bias, scale=scaling).flatten(1, 2)

    def _of_kernels(self) -> tuple[Tensor, Tensor]:
        if None not in self._seen:
            self._seen[None] = padded_pages(self.pages, self.lengths), torch.tensor(self.lengths)
        return self._seen[None]

    def _of_kind(self, kind: LayerKind, layer: Tensor) -> SeenPages:
        if kind not in self._seen:
            firsts = [kind.first_seen(length - 1) for length in self.lengths]
            skipped = [first // PAGE_TOKENS for first in firsts]  # pages
            pages = [own[skip:] for own, skip in zip(self.pages, skipped, strict=True)]
            begins = torch.tensor([first - skip * PAGE_TOKENS for first, skip in zip(firsts, skipped, strict=True)])
            ends = [length - skip * PAGE_TOKENS for length, skip in zip(self.lengths, skipped, strict=True)]
            pages_nP = padded_pages(pages, ends)
            places = torch.arange(pages_nP.shape[1] * PAGE_TOKENS)[None, :]
            hidden_nL = (places < begins[:, None]) | (places >= torch.tensor(ends)[:, None])
            self._seen[kind] = SeenPages(pages_nP.to(layer.device), score_bias(hidden_nL, layer.dtype).to(layer.device))
        return self._seen[kind]


@dataclass(frozen=True)
class Continuation:
    """A piece of a prompt whose beginning, `cached` tokens, is in the cache."""

    pages: Sequence[int]
    cached: int
    num_tokens: int
    _seen: dict[LayerKind, SeenPages] = field(default_factory=dict)

    def attend(self, query_THD: Tensor, layer: Tensor, kind: LayerKind, *, scaling: float, **scores: Any) -> Tensor:
        seen = self._of_kind(kind, layer)
        kept = layer.index_select(0, seen.pages).flatten(0, 1)  # [L, 2, K, D]
        key, value = kept[:, 0].transpose(0, 1)[None], kept[:, 1].transpose(0, 1)[None]
        query = query_THD.transpose(0, 1)[None]
        return biased_attention(query, key, value, seen.bias, scaling=scaling, **scores)[0].transpose(0, 1)

    def _of_kind(self, kind: LayerKind, layer: Tensor) -> SeenPages:
        if kind not in self._seen:
            end = self.cached + self.num_tokens
            firsts_T = torch.tensor([kind.first_seen(position) for position in range(self.cached, end)])
            skip = int(firsts_T[0]) // PAGE_TOKENS
            used = pages_for(end)
            places = torch.arange(skip * PAGE_TOKENS, used * PAGE_TOKENS)[None, :]
            hidden_TL = (places < firsts_T[:, None]) | (places > torch.arange(self.cached, end)[:, None])
            pages = torch.tensor(self.pages[skip:used])
            self._seen[kind] = SeenPages(pages.to(layer.device), score_bias(hidden_TL, layer.dtype).to(layer.device))
        return self._seen[kind]


@dataclass(frozen=True)
class Prompts:
    """Pieces of prompts: whole ones as their tokens come, the rest from the cache."""

    whole: PackedLayout | None
    continued: tuple[Continuation, ...] = ()

    def attend(
        self,
        query_THD: Tensor,
        key_value_T2KD: Tensor,
        layer: Tensor | None,
        kind: LayerKind,
        *,
        scaling: float,
        **scores: Any,
    ) -> Tensor:
        parts: list[Tensor] = []
        at = 0
        if self.whole is not None:
            at = sum(self.whole.lengths)
            key_KTD, value_KTD = (key_value_T2KD[:at, i].transpose(0, 1) for i in (0, 1))
            query_HTD = query_THD[:at].transpose(0, 1)
            parts.append(kind.attend_packed(query_HTD, key_KTD, value_KTD, self.whole, scaling=scaling, **scores))
        for piece in self.continued:
            assert layer is not None
            rows = slice(at, at + piece.num_tokens)
            at = rows.stop
            parts.append(piece.attend(query_THD[rows], layer, kind, scaling=scaling, **scores))
        return torch.cat(parts) if len(parts) > 1 else parts[0]


@dataclass(frozen=True)
class KernelPrompts:
    """The same, all of it from the cache by a kernel, in layers of which the kernel takes the heads."""

    pieces: Sequence[Piece]
    kernels: CpuKernels
    device: torch.device

    def attend(
        self,
        query_THD: Tensor,
        key_value_T2KD: Tensor,
        layer: Tensor | None,
        kind: LayerKind,
        *,
        scaling: float,
        **scores: Any,
    ) -> Tensor:
        if scores or layer is None or not can_attend(self.kernels, layer, kind):
            return self._elsewhere.attend(query_THD, key_value_T2KD, layer, kind, scaling=scaling, **scores)
        query_THD, (pages_nP, prompts_n3) = side_by_side(query_THD), self._of_kernels
        return self.kernels.attend_to_prompts(query_THD, layer, pages_nP, prompts_n3, scaling=scaling)

    @cached_property
    def _elsewhere(self) -> Prompts:
        return plain_prompts(self.pieces, self.device)

    @cached_property
    def _of_kernels(self) -> tuple[Tensor, Tensor]:
        """Pages of all pieces; first of the prompts' rows, number of rows, tokens before them."""
        pieces = self.pieces
        pages_nP = padded_pages([pages for pages, _, _ in pieces], [cached + count for _, cached, count in pieces])
        firsts = itertools.accumulate((count for _, _, count in pieces), initial=0)
        prompts = [(first, count, cached) for first, (_, cached, count) in zip(firsts, pieces, strict=False)]
        return pages_nP, torch.tensor(prompts)


@dataclass(frozen=True)
class AttentionStep:
    kinds: Sequence[LayerKind]  # of each layer
    cache: KVCache | None  # None: scoring, nothing is kept
    write_slots_T: Tensor | None  # page * PAGE_TOKENS + place in the page
    decoding: Decoding | None
    prompts: Prompts | KernelPrompts | None

    def layer(self, index: int) -> Tensor | None:
        """Of the cache: [P, PAGE_TOKENS, 2, K, D]."""
        return self.cache.layers[index] if self.cache is not None else None


@dataclass(frozen=True)
class SeenHeads:
    """In place of a step, for one pass whose results are not used: which layers attend, with which heads."""

    of_layer: dict[int, tuple[int, int]] = field(default_factory=dict)  # key/value heads, their widest dimension


def side_by_side(query_THD: Tensor) -> Tensor:
    """A token's heads, as the kernels want them; a view where they are (transformers has a head's tokens so)."""
    return query_THD.flatten(1).unflatten(1, query_THD.shape[1:])


def prompts_of(pieces: Sequence[Piece], kernels: CpuKernels | None, device: torch.device) -> Prompts | KernelPrompts:
    """`pieces`: whole prompts first."""
    return plain_prompts(pieces, device) if kernels is None else KernelPrompts(pieces, kernels, device)


def plain_prompts(pieces: Sequence[Piece], device: torch.device) -> Prompts:
    whole = [count for _, cached, count in pieces if cached == 0]
    continued = tuple(Continuation(pages, cached, count) for pages, cached, count in pieces[len(whole) :])
    return Prompts(packed_layout(whole).to(device) if whole else None, continued)


def can_attend(kernels: CpuKernels | None, layer: Tensor, kind: LayerKind) -> TypeGuard[CpuKernels]:
    width = layer.shape[-1]
    return (
        kernels is not None and isinstance(kind, FullAttention) and width % HEAD_LANES == 0 and width <= MOST_HEAD_DIM
    )


def padded_pages(pages: Sequence[Sequence[int]], lengths: Sequence[int]) -> Tensor:
    """[n, P], with page 0 behind those that hold a sequence's first `lengths` tokens."""
    most = pages_for(max(lengths))
    return torch.tensor([[*own[:most], *[0] * (most - len(own))] for own in pages])


def write_kv(key_value_T2KD: Tensor, layer_index: int, step: AttentionStep) -> None:
    """Writes the new keys and values to the cache."""
    layer = step.layer(layer_index)
    if layer is not None:
        assert step.write_slots_T is not None
        layer.flatten(0, 1).index_copy_(0, step.write_slots_T, key_value_T2KD)


def attend(
    query_THD: Tensor,
    key_value_T2KD: Tensor,
    layer_index: int,
    step: AttentionStep,
    *,
    scaling: float,
    scores: Mapping[str, Any] = {},
) -> Tensor:
    """[T, H, D]. The new keys and values are in the cache already (`write_kv`). `scores`: what else is done to them, as
    `biased_attention` takes it."""
    layer, kind = step.layer(layer_index), step.kinds[layer_index]
    parts: list[Tensor] = []
    num_single = 0
    if step.decoding is not None:
        assert layer is not None
        num_single = len(step.decoding.lengths)
        parts.append(step.decoding.attend(query_THD[:num_single], layer, kind, scaling=scaling, **scores))
    if step.prompts is not None:
        rest = slice(num_single, None)
        query_THD, key_value_T2KD = query_THD[rest], key_value_T2KD[rest]
        parts.append(step.prompts.attend(query_THD, key_value_T2KD, layer, kind, scaling=scaling, **scores))
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def attention_forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    step: AttentionStep | SeenHeads,
    **given: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query [1, H, T, D] -> ([1, T, H, D], no weights). Values that are narrower
    than keys, of latent attention (arXiv 2405.04434), are kept as wide as those."""
    index, width = module.layer_idx, value.shape[-1]
    if isinstance(step, SeenHeads):
        if index in step.of_layer:
            raise UserError(f"engine.type: torch: layer {index} attends more than once; use type: vllm")
        step.of_layer[index] = key.shape[1], key.shape[-1]
        return value.new_zeros(1, query.shape[2], query.shape[1], width), None
    key_value_T2KD = torch.stack((key[0], pad(value[0], (0, key.shape[-1] - width)))).permute(2, 0, 1, 3)
    write_kv(key_value_T2KD, index, step)
    query_THD = query[0].transpose(0, 1)
    mixed = attend(query_THD, key_value_T2KD, index, step, scaling=scaling, scores=scores_of(given))
    return mixed[None, ..., :width], None


def register_paged_attention() -> str:
    register_attention(PAGED, attention_forward)
    return PAGED
