"""Causal attention over all tokens before: Llama, Mistral, Qwen and their like."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ftray.model.families.protocol import FullSpec

if TYPE_CHECKING:
    from torch import Tensor

    from ftray.model.packed_attention import PackedLayout


@dataclass(frozen=True)
class FullAttention:
    num_heads: int
    num_kv_heads: int
    head_dim: int

    @property
    def cache(self) -> FullSpec:
        return FullSpec(self.num_kv_heads, self.head_dim)

    def attend_packed(
        self, query_HTD: "Tensor", key_KTD: "Tensor", value_KTD: "Tensor", layout: "PackedLayout", *, scaling: float
    ) -> "Tensor":
        from ftray.model.packed_attention import packed_causal_attention

        return packed_causal_attention(query_HTD, key_KTD, value_KTD, layout, scaling=scaling)

    def flops(self, lengths: Mapping[float, float]) -> float:
        """Half of the squared length, in two matmuls."""
        return 2.0 * self.num_heads * self.head_dim * sum(length**2 * count for length, count in lengths.items())


def make_full_attention(config: Any) -> FullAttention:
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return FullAttention(heads, getattr(config, "num_key_value_heads", None) or heads, head_dim)
