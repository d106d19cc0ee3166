"""Causal attention: over all tokens before (Llama, Qwen), over a window of them (Mistral, Gemma; Beltagy et al. 2020,
arXiv 2004.05150), or over those of the same chunk (Llama 4)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from ftray.model.packed_attention import PackedLayout


@dataclass(frozen=True)
class Attention:
    num_heads: int
    head_dim: int

    @property
    def flops_per_pair(self) -> float:
        """Of a token and one that it sees: a product with its key, and one with its value."""
        return 4.0 * self.num_heads * self.head_dim


class FullAttention(Attention):
    def attend_packed(
        self, query_HTD: "Tensor", key_KTD: "Tensor", value_KTD: "Tensor", layout: "PackedLayout", **scores: Any
    ) -> "Tensor":
        from ftray.model.packed_attention import packed_causal_attention

        return packed_causal_attention(query_HTD, key_KTD, value_KTD, layout, **scores)

    def first_seen(self, position: int) -> int:
        return 0

    def flops(self, lengths: Mapping[float, float]) -> float:
        """Half of all pairs are seen."""
        return self.flops_per_pair / 2 * sum(length**2 * count for length, count in lengths.items())


@dataclass(frozen=True)
class SlidingAttention(Attention):
    window: int  # a token sees itself and `window` - 1 before it

    def attend_packed(
        self, query_HTD: "Tensor", key_KTD: "Tensor", value_KTD: "Tensor", layout: "PackedLayout", **scores: Any
    ) -> "Tensor":
        from ftray.model.packed_attention import packed_causal_attention

        return packed_causal_attention(query_HTD, key_KTD, value_KTD, layout, window=self.window, **scores)

    def first_seen(self, position: int) -> int:
        return max(0, position - self.window + 1)

    def flops(self, lengths: Mapping[float, float]) -> float:
        seen = (n * min(n, self.window) - min(n, self.window) ** 2 / 2 for n in lengths)
        return self.flops_per_pair * sum(pairs * count for pairs, count in zip(seen, lengths.values(), strict=True))


@dataclass(frozen=True)
class ChunkedAttention(Attention):
    chunk: int

    def attend_packed(
        self, query_HTD: "Tensor", key_KTD: "Tensor", value_KTD: "Tensor", layout: "PackedLayout", **scores: Any
    ) -> "Tensor":
        """Each chunk is a sequence of its own."""
        from ftray.model.packed_attention import packed_causal_attention

        return packed_causal_attention(query_HTD, key_KTD, value_KTD, layout.in_chunks(self.chunk), **scores)

    def first_seen(self, position: int) -> int:
        return position // self.chunk * self.chunk

    def flops(self, lengths: Mapping[float, float]) -> float:
        def pairs(length: float) -> float:
            whole, rest = divmod(length, self.chunk)
            return (whole * self.chunk**2 + rest**2) / 2

        return self.flops_per_pair * sum(pairs(length) * count for length, count in lengths.items())


def heads_of(config: Any) -> dict[str, int]:
    """None where there is no attention."""
    heads = getattr(config, "num_attention_heads", None) or 0
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // max(1, heads)
    return {"num_heads": heads, "head_dim": head_dim}


def make_full_attention(config: Any) -> FullAttention:
    return FullAttention(**heads_of(config))


def make_sliding_attention(config: Any) -> FullAttention | SlidingAttention:
    """A window as wide as the context is none."""
    window, context = config.sliding_window, getattr(config, "max_position_embeddings", None)
    if not window or (context is not None and window >= context):
        return make_full_attention(config)
    return SlidingAttention(**heads_of(config), window=window)


def make_chunked_attention(config: Any) -> FullAttention | ChunkedAttention:
    chunk, context = config.attention_chunk_size, getattr(config, "max_position_embeddings", None)
    if not chunk or (context is not None and chunk >= context):
        return make_full_attention(config)
    return ChunkedAttention(**heads_of(config), chunk=chunk)
