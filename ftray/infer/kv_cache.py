"""Keys and values of all sequences in pages of a pool sized by the config (vLLM's scheme, Kwon et al. 2023,
arXiv 2309.06180). A sequence's pages for prompt and answer are reserved when it is admitted, so it never runs out.

Shapes: S slots (one token each) in the pool, K key/value heads, D head dimension.
"""

import torch
from torch import Tensor

PAGE_TOKENS = 16


class KVCache:
    def __init__(self, *, num_layers: int, num_kv_heads: int, head_dim: int, num_tokens: int, like: Tensor):
        self.num_pages = -(-num_tokens // PAGE_TOKENS)
        shape = (self.num_pages * PAGE_TOKENS, num_kv_heads, head_dim)
        self.keys = [like.new_zeros(shape) for _ in range(num_layers)]
        self.values = [like.new_zeros(shape) for _ in range(num_layers)]
        self._free = list(range(self.num_pages - 1, -1, -1))

    @property
    def num_tokens(self) -> int:
        return self.num_pages * PAGE_TOKENS

    @property
    def num_free_tokens(self) -> int:
        return len(self._free) * PAGE_TOKENS

    def reserve(self, num_tokens: int) -> Tensor | None:
        """Slot of every token of a sequence, [num_tokens rounded up to pages], or None when the pool has no room."""
        need = -(-num_tokens // PAGE_TOKENS)
        if need > len(self._free):
            return None
        pages = torch.tensor([self._free.pop() for _ in range(need)])
        return (pages[:, None] * PAGE_TOKENS + torch.arange(PAGE_TOKENS)).flatten()

    def release(self, slots: Tensor) -> None:
        self._free += (slots[::PAGE_TOKENS] // PAGE_TOKENS).tolist()
