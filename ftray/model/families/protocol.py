"""What a kind of decoder layer is: what a token sees of those before it, how it attends, and what that costs.

Shapes: T tokens in the row, H query heads, K key/value heads, D head dimension.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:  # a plan counts FLOPs without torch
    from torch import Tensor

    from ftray.model.packed_attention import PackedLayout


class LayerKind(Protocol):
    """Hashable: an engine makes what layers of one kind share once a step."""

    def attend_packed(
        self, query_HTD: "Tensor", key_KTD: "Tensor", value_KTD: "Tensor", layout: "PackedLayout", **scores: Any
    ) -> "Tensor":
        """[T, H, D], of sequences that lie end to end and see each other never. `scores`: as
        `packed_causal_attention` takes them."""
        ...

    def first_seen(self, position: int) -> int:
        """The first position of its sequence that a token at `position` sees; it sees all from there to itself."""
        ...

    def flops(self, lengths: Mapping[float, float]) -> float:
        """Forward, of the attention itself, its projections aside. `lengths`: how many sequences there are of each."""
        ...
