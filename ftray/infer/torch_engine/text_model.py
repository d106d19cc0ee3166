"""The model of an engine as its steps use it: a row in, hidden states and logits out.

Shapes: T tokens in the row, n rows, E hidden size, V vocabulary.
"""

from collections.abc import Sequence as Many
from typing import Any

import torch
from torch import Tensor

from ftray.infer.torch_engine.attention import AttentionStep, Prompts, SeenHeads
from ftray.infer.torch_engine.cpu.frozen_linear import FrozenLinear
from ftray.infer.torch_engine.decoder import make_stack
from ftray.infer.torch_engine.kv_cache import KVCache
from ftray.infer.torch_engine.lora.bank import LoraBank
from ftray.infer.torch_engine.rows import row_of
from ftray.infer.torch_engine.sequence import Piece
from ftray.infer.torch_engine.states import StateStore
from ftray.model.families import layer_kinds
from ftray.model.families.logits import logits_of
from ftray.model.families.rotary import PackedRotary
from ftray.model.families.temperature import QueryTemperature
from ftray.model.packed import decoder_of
from ftray.model.packed_attention import PackedLayout


class TextModel:
    def __init__(self, model: Any, bank: LoraBank, *, max_kept_states: int):
        """`bank`: of that model, whose linear layers it has taken already."""
        config, decoder = model.config.get_text_config(), decoder_of(model)
        self.head = FrozenLinear([model.get_output_embeddings()], bank.kernels)
        self.stack = make_stack(decoder, self.head)
        self.kinds, self.rotary = layer_kinds(config), PackedRotary(decoder)
        self.states = StateStore(decoder, bank, max_kept=max_kept_states)
        self._temperature = QueryTemperature(decoder)
        self._finish = logits_of(config)
        self._bank = bank
        self._device = next(model.parameters()).device

    def of_pieces(self, pieces: Many[Piece], cache: KVCache) -> Tensor:
        """[T, E], of the pieces in their order."""
        row = row_of(pieces, cache, self.kinds, self._bank.kernels, self._device)
        self.states.of_pieces(pieces)
        self.rotary.of_sequences([len(p.sequence.tokens) for p in pieces], [p.num_tokens for p in pieces])
        tokens = [(p.sequence.request.adapter, p.num_tokens) for p in pieces]
        return self.hidden(row.ids_T, row.positions_T, tokens, row.step)

    def of_sequences(self, ids_T: Tensor, positions_T: Tensor, layout: PackedLayout, adapter: str | None) -> Tensor:
        """[T, E], of whole sequences, of which nothing is kept."""
        self.states.of_lengths(layout.lengths)
        self.rotary.of_row(layout)
        step = AttentionStep(self.kinds, cache=None, write_slots_T=None, decoding=None, prompts=Prompts(layout))
        return self.hidden(ids_T, positions_T, [(adapter, len(ids_T))], step)

    def hidden(
        self, ids_T: Tensor, positions_T: Tensor, counts: Many[tuple[str | None, int]], step: AttentionStep
    ) -> Tensor:
        self._temperature.of_row(positions_T)
        with self._bank.apply(counts):
            return self.stack(ids_T.to(self._device), positions_T.to(self._device), step)

    def logits(self, hidden_nE: Tensor) -> Tensor:
        """[n, V]."""
        return self._finish(self.head(hidden_nE))


@torch.inference_mode()
def seen_heads(model: Any) -> dict[int, tuple[int, int]]:
    """Key/value heads and their dimension, of each layer that attends, as one token shows them."""
    seen, one = SeenHeads(), torch.zeros(1, 1, dtype=torch.long, device=next(model.parameters()).device)
    decoder_of(model)(input_ids=one, position_ids=one, use_cache=False, step=seen)
    return seen.of_layer
