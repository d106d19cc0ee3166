"""What a kind of decoder layer is: what it keeps of the tokens before, how it attends, and what that costs.

Shapes: T tokens in the row, H query heads, K key/value heads, D head dimension.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:  # a plan counts FLOPs without torch
    from torch import Tensor

    from ftray.model.packed_attention import PackedLayout


@dataclass(frozen=True)
class FullSpec:
    """Keys and values of every token before. An engine has a manager for each specification that it can keep
    (infer/torch_engine/kv_cache.py)."""

    num_kv_heads: int
    head_dim: int


CacheSpec = FullSpec  # one for each way of keeping


class LayerKind(Protocol):
    @property
    def cache(self) -> CacheSpec: ...

    def attend_packed(
        self, query_HTD: "Tensor", key_KTD: "Tensor", value_KTD: "Tensor", layout: "PackedLayout", *, scaling: float
    ) -> "Tensor":
        """[T, H, D], of sequences that lie end to end and see each other never."""
        ...

    def flops(self, lengths: Mapping[float, float]) -> float:
        """Forward, of the attention itself, its projections aside. `lengths`: how many sequences there are of each."""
        ...
