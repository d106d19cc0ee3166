"""What recurrent layers keep of each sequence, beside its pages: a state of fixed size.

A step's single tokens go through them together, prompts one by one. A state cannot go back, so it is kept at the ends
of pages where a later request may go on: at the last one of a prompt, and at the last one of an answer so far.

Shapes: T tokens in the row, n sequences with L tokens each, E hidden size.
"""

import itertools
from collections import OrderedDict
from collections.abc import Callable, Sequence as Many
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, LinearAttentionLayer

from ftray.infer.torch_engine.kv_cache import PAGE_TOKENS
from ftray.infer.torch_engine.lora.bank import LoraBank
from ftray.infer.torch_engine.sequence import Piece, Sequence
from ftray.model.families.recurrent import recurrent_modules, run

KEPT_BYTES = 2**30  # of states for later requests


@dataclass(frozen=True)
class Rows:
    """Of a step, that go through a recurrent module together."""

    start: int
    num_sequences: int
    length: int
    sequences: tuple[Sequence, ...] = ()  # none: nothing is kept of them
    goes_on: bool = False  # from their states

    def one_by_one(self) -> "list[Rows]":
        """For modules that go on from a state by a single token alone."""
        if not self.goes_on or self.length == 1:
            return [self]
        return [Rows(self.start + place, 1, 1, self.sequences, goes_on=True) for place in range(self.length)]


class StateStore:
    def __init__(self, decoder: nn.Module, bank: LoraBank, *, max_kept: int):
        self._bank = bank
        self._rows: list[Rows] = []
        self._kept: OrderedDict[bytes, dict[str, tuple[Tensor, ...]]] = OrderedDict()
        self._max_kept = max_kept
        self._goes_on_by_several: dict[type, bool] = {}
        self.names = tuple(recurrent_modules(decoder))
        for name in self.names:
            module: Any = decoder.get_submodule(name)
            whole = module.forward
            if type(module) not in self._goes_on_by_several:
                self._goes_on_by_several[type(module)] = goes_on_by_several(module)
            module.forward = self._by_sequence(name, module, whole)

    def of_pieces(self, pieces: Many[Piece]) -> None:
        """Of the next step, in the order of its row."""
        starts = itertools.accumulate((piece.num_tokens for piece in pieces), initial=0)
        self._rows = []
        for start, piece in zip(starts, pieces, strict=False):
            goes_on = piece.sequence.num_cached > 0
            last = self._rows[-1] if self._rows else None
            if piece.num_tokens == 1 and goes_on and last is not None and last.length == 1 and last.goes_on:
                sequences = (*last.sequences, piece.sequence)
                self._rows[-1] = Rows(last.start, len(sequences), 1, sequences, goes_on=True)
            else:
                self._rows.append(Rows(start, 1, piece.num_tokens, (piece.sequence,), goes_on=goes_on))

    def of_lengths(self, lengths: Many[int]) -> None:
        """Of a row of whole sequences, of which nothing is kept."""
        starts = itertools.accumulate(lengths, initial=0)
        self._rows = [Rows(start, 1, length) for start, length in zip(starts, lengths, strict=False)]

    # -- of prefixes ----------------------------------------------------------------------------------------------

    def __contains__(self, page_name: bytes) -> bool:
        return not self.names or page_name in self._kept

    def piece_of(self, sequence: Sequence, count: int) -> int:
        """Of the next `count` tokens of a prompt those up to the end of its last page, where its state is kept."""
        end = last_end(sequence)
        return end - sequence.num_cached if self.names and 0 < end - sequence.num_cached < count else count

    def restore(self, sequence: Sequence) -> None:
        """As it was at the end of its last page."""
        if self.names and sequence.num_cached:
            self._kept.move_to_end(sequence.names[-1])
            sequence.states = dict(self._kept[sequence.names[-1]])

    def keep(self, sequence: Sequence) -> None:
        """Where it ends a page, all that is computed of it."""
        if not self.names or sequence.num_cached % PAGE_TOKENS or not sequence.names:
            return
        if sequence.num_cached < last_end(sequence):
            return
        if sequence.kept_state is not None and sequence.num_generated > 1:
            self._kept.pop(sequence.kept_state, None)
        if sequence.num_cached > sequence.num_prompt:
            sequence.kept_state = sequence.names[-1]
        self._kept[sequence.names[-1]] = dict(sequence.states)
        self._kept.move_to_end(sequence.names[-1])
        each = sum(state.nbytes for own in sequence.states.values() for state in own)
        while len(self._kept) > min(self._max_kept, max(1, KEPT_BYTES // max(1, each))):
            self._kept.popitem(last=False)

    # -- in the layers --------------------------------------------------------------------------------------------

    def _by_sequence(self, name: str, module: Any, whole: Callable[..., Any]) -> Callable[..., Any]:
        by_several = self._goes_on_by_several[type(module)]

        def forward(*args: Any, **given: Any) -> Tensor:
            hidden_TE = (args[0] if args else given["hidden_states"])[0]
            pieces = [piece for rows in self._rows for piece in ([rows] if by_several else rows.one_by_one())]
            parts = [self._part(name, module.layer_idx, whole, hidden_TE, rows) for rows in pieces]
            return (torch.cat(parts) if len(parts) > 1 else parts[0])[None]

        return forward

    def _part(self, name: str, index: int, whole: Callable[..., Any], hidden_TE: Tensor, rows: Rows) -> Tensor:
        """[n * L, E]."""
        count = rows.num_sequences * rows.length
        hidden_nLE = hidden_TE[rows.start : rows.start + count].unflatten(0, (rows.num_sequences, rows.length))
        layer = LinearAttentionLayer()
        if rows.goes_on:
            fill(layer, [sequence.states[name] for sequence in rows.sequences])
        cache = cache_of(layer, index) if rows.sequences else None
        with self._bank.rows(rows.start, count):
            out = run(whole, hidden_nLE, cache)
        for number, sequence in enumerate(rows.sequences):
            sequence.states[name] = tuple(state[number : number + 1].clone() for state in states_of(layer))
        return out.flatten(0, 1)


def last_end(sequence: Sequence) -> int:
    """Tokens up to the end of its last full page, its last token aside: that one is always computed."""
    return (len(sequence.tokens) - 1) // PAGE_TOKENS * PAGE_TOKENS


@torch.inference_mode()
def goes_on_by_several(module: Any) -> bool:
    """Whether it goes on from a state with several tokens as with one: transformers' first Mamba begins anew."""
    weight = next(module.parameters())
    width = next(child for child in module.children() if hasattr(child, "in_features")).in_features
    hidden_1LE = torch.randn(1, 8, width, generator=torch.Generator().manual_seed(0)).to(weight)
    expected = run(module.forward, hidden_1LE)[:, 4:]
    cache = cache_of(LinearAttentionLayer(), module.layer_idx)
    _, rest = (run(module.forward, part, cache) for part in hidden_1LE.split(4, dim=1))
    return bool((rest - expected).abs().max() < expected.abs().max() / 20)


def cache_of(layer: LinearAttentionLayer, index: int) -> Cache:
    """In which a module of that layer finds it."""
    layers: Any = [layer] * (index + 1)
    return Cache(layers=layers)


def states_of(layer: LinearAttentionLayer) -> list[Tensor]:
    """A convolution's last inputs, and the recurrent state where there is one; each [n, ...]."""
    return [state for state in (layer.conv_states[0], layer.recurrent_states[0]) if state is not None]


def fill(layer: LinearAttentionLayer, states: Many[Many[Tensor]]) -> None:
    """With those of n sequences."""
    convolution, *recurrent = (torch.cat(own) for own in zip(*states, strict=True))
    layer.dtype, layer.device = convolution.dtype, convolution.device
    layer.conv_states[0], layer.conv_kernel_size[0] = convolution, convolution.shape[-1]
    layer.is_conv_states_initialized[0] = layer.has_previous_state[0] = True
    for state in recurrent:
        layer.recurrent_states[0], layer.is_recurrent_states_initialized[0] = state, True
