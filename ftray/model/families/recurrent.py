"""Layers that keep a state instead of all tokens: Mamba (Gu and Dao 2023, arXiv 2312.00752), gated delta networks (Yang
et al. 2024, arXiv 2412.06464), short convolutions. transformers' modules compute them; here each sequence of a row has
a state of its own.

All of them mix neighbouring tokens by a convolution first: a module that holds one over the tokens keeps a state.

Shapes: T tokens in the row, n sequences of padded length L, E hidden size.
"""

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from ftray.model.packed_attention import PackedLayout, packed_layout

RowsOf = Callable[[int, int], AbstractContextManager[None]]
CACHE_NAMES = ("cache_params", "past_key_values")


def recurrent_modules(decoder: nn.Module) -> dict[str, nn.Module]:
    """By name, none within another."""
    found: dict[str, nn.Module] = {}
    for name, module in decoder.named_modules():
        holds_convolution = any(isinstance(child, nn.Conv1d) for child in module.children())
        if holds_convolution and not any(name.startswith(f"{outer}.") for outer in found):
            found[name] = module
    return found


def run(forward: Callable[..., Any], hidden_nLE: Tensor, cache: Any = None) -> Tensor:
    """[n, L, E], of sequences that lie beside each other, each from its first token or what `cache` has of it on."""
    wanted = inspect.signature(forward).parameters
    given: dict[str, Any] = {name: cache for name in CACHE_NAMES if name in wanted}
    given |= {name: None for name in ("attention_mask", "cache_position") if name in wanted}
    if "position_ids" in wanted:
        given["position_ids"] = torch.arange(hidden_nLE.shape[1], device=hidden_nLE.device)[None]
    return forward(hidden_nLE, **given)


class PackedStates:
    """A row's sequences go through the recurrent modules of a decoder as a right-padded batch: a state never looks to
    its right, so the padding is invisible to it."""

    def __init__(self, decoder: nn.Module, *, in_one_batch: bool = False):
        """`in_one_batch`: the modules are called once for every row, as ZeRO-3 needs it of all ranks."""
        self._in_one_batch = in_one_batch
        self._layout: PackedLayout | None = None
        self._rows: RowsOf | None = None
        self.names = tuple(recurrent_modules(decoder))
        for name in self.names:
            module = decoder.get_submodule(name)
            module.forward = self._by_sequence(type(module).forward.__get__(module))  # whoever wrapped it before

    def one_by_one(self, rows: "RowsOf") -> None:
        """Sequences go through one at a time, each within `rows(its first token, its length)`: for layers that must
        know whose tokens they get."""
        self._rows = rows

    def of_row(self, layout: PackedLayout) -> None:
        """Whose layers are computed next, forward or, for checkpointed activations, again in its backward."""
        if self.names:
            self._layout = packed_layout(layout.lengths, in_one_batch=True) if self._in_one_batch else layout
            self._layout = self._layout.to(layout.scatter_T.device)

    def _by_sequence(self, whole: Callable[..., Any]) -> Callable[..., Any]:
        @torch.compiler.disable  # every layout would be compiled anew
        def forward(*args: Any, **given: Any) -> Tensor:
            hidden_TE = (args[0] if args else given["hidden_states"])[0]
            assert self._layout is not None
            if self._rows is not None:
                return self._one_by_one(whole, hidden_TE)
            parts = [run(whole, batch) for batch in self._layout.batches(hidden_TE)]
            return self._layout.row(parts)[None]

        return forward

    def _one_by_one(self, whole: Callable[..., Any], hidden_TE: Tensor) -> Tensor:
        assert self._layout is not None
        assert self._rows is not None
        parts, start = [], 0
        for length in self._layout.lengths:
            with self._rows(start, length):
                parts.append(run(whole, hidden_TE[None, start : start + length]))
            start += length
        return torch.cat(parts, dim=1)
