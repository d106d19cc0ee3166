"""Rotary scaling that depends on a sequence's length ("longrope", Ding et al. 2024, arXiv 2402.13753): each sequence
of a row is rotated as its own length says, where transformers looks at the longest.

Shapes: T tokens in the row.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ftray.model.packed_attention import PackedLayout


def short_context(config: Any) -> int | None:
    """The longest sequence that is rotated by longrope's short factors; None: all are rotated alike."""
    rope = getattr(config, "rope_parameters", None) or {}
    return rope["original_max_position_embeddings"] if rope.get("rope_type") == "longrope" else None


class PackedRotary:
    """Takes the place of a decoder's rotary embedding, where its factors depend on a length."""

    def __init__(self, decoder: nn.Module):
        self.short_context = short_context(decoder.config)
        self._is_long_T: Tensor | None = None  # of each token: whether its sequence is
        if self.short_context is not None:
            rotary: Any = decoder.rotary_emb
            rotary.forward = self._by_sequence(type(rotary).forward.__get__(rotary))  # whoever wrapped it before

    def of_row(self, layout: PackedLayout, part: slice = slice(None)) -> None:
        """`part`: the tokens of it that are this rank's."""
        if self.short_context is not None:
            self.of_sequences(layout.lengths, layout.lengths)
            assert self._is_long_T is not None
            self._is_long_T = self._is_long_T[part]

    def of_sequences(self, lengths: Sequence[int], counts: Sequence[int]) -> None:
        """`counts`: how many tokens of each are in the row."""
        if self.short_context is not None:
            self._is_long_T = (torch.tensor(lengths) > self.short_context).repeat_interleave(torch.tensor(counts))

    def is_long(self, length: int) -> bool:
        return self.short_context is not None and length > self.short_context

    def changes_at(self, length: int) -> bool:
        """Whether a sequence that has grown to `length` is rotated anew."""
        return self.is_long(length) and not self.is_long(length - 1)

    def _by_sequence(self, whole: Callable[..., Any]) -> Callable[..., Any]:
        def forward(x: Tensor, position_ids: Tensor, *args: Any, **given: Any) -> tuple[Tensor, ...]:
            assert self.short_context is not None
            assert self._is_long_T is not None
            is_long = self._is_long_T.to(x.device)[None, :, None]
            short = whole(x, position_ids.clamp(max=self.short_context - 1), *args, **given)
            if not self._is_long_T.any():
                return short
            beyond = position_ids.new_full((1, 1), self.short_context)  # which makes it take the long factors
            longer = whole(x, torch.cat([position_ids, beyond], dim=1), *args, **given)
            return tuple(torch.where(is_long, a[:, :-1], b) for a, b in zip(longer, short, strict=True))

        return forward
