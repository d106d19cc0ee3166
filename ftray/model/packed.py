"""A packed row in, log-probabilities of its trained tokens out. What every objective is computed from.

Shapes: T tokens in the row, N trained positions, V vocabulary, E hidden size.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ftray.config.run import MemoryConfig
from ftray.model.packed_attention import PACKED, PackedLayout, attention_forward, register_attention

# Rows of logits that exist at one time: 1,024 rows of a 150k vocabulary in float32 are 600 MB.
LOGIT_ROWS = 1024


@dataclass(frozen=True)
class PackedRow:
    """Examples end to end. `rows_N[i]` is the position whose output predicts `targets_N[i]`."""

    ids_T: Tensor
    positions_T: Tensor  # restart at 0 with every example
    rows_N: Tensor
    targets_N: Tensor
    weights_N: Tensor  # 1, or 0 in the dummy row that keeps the ranks' collectives equal
    sequences_N: Tensor  # which sequence of the row the target belongs to
    layout: PackedLayout

    @property
    def num_sequences(self) -> int:
        return len(self.layout.lengths)

    def to(self, device: torch.device) -> "PackedRow":
        tensors = (self.ids_T, self.positions_T, self.rows_N, self.targets_N, self.weights_N, self.sequences_N)
        return PackedRow(*(x.to(device) for x in tensors), layout=self.layout.to(device))


class PackedCausalLM(nn.Module):
    """Wraps a transformers causal LM (PEFT-injected or not) loaded with the packed attention."""

    def __init__(self, model: Any, *, logits_in_chunks: bool = True):
        """`logits_in_chunks=False`: one call of the output head a row. ZeRO-3 communicates in every call, and ranks
        whose rows have other numbers of chunks would wait for each other for ever."""
        super().__init__()
        self.model = model
        self.logits_in_chunks = logits_in_chunks

    def forward(self, row: PackedRow) -> Tensor:
        """Log-probabilities [N] of the targets, float32. Logits exist at trained positions only, a chunk at a time."""
        # use_cache stays off: with a cache transformers would treat the row as one sequence.
        hidden_TE = decoder_of(self.model)(
            input_ids=row.ids_T[None], position_ids=row.positions_T[None], use_cache=False, layout=row.layout
        ).last_hidden_state[0]
        hidden_NE = hidden_TE.index_select(0, row.rows_N)
        if len(hidden_NE) <= LOGIT_ROWS or not self.logits_in_chunks:
            return self._log_probs(hidden_NE, row.targets_N)
        chunks = zip(hidden_NE.split(LOGIT_ROWS), row.targets_N.split(LOGIT_ROWS), strict=True)
        return torch.cat([checkpoint(self._log_probs, h, t, use_reentrant=False) for h, t in chunks])  # pyright: ignore

    def _log_probs(self, hidden_NE: Tensor, targets_N: Tensor) -> Tensor:
        logits_NV = self.model.get_output_embeddings()(hidden_NE).float()
        return -torch.nn.functional.cross_entropy(logits_NV, targets_N, reduction="none")


def decoder_of(model: Any) -> Any:
    """The stack below the output head; PEFT's injection leaves the model's own class in place."""
    return model.get_decoder()


def prepare_layers(model: Any, config: MemoryConfig) -> Any:
    """Activation checkpointing and compiled decoder layers, where the config asks for them."""
    if config.activation_checkpointing:
        # Not reentrant: with a frozen base no input of a layer asks for a gradient, and the reentrant kind needs one.
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if config.compile:
        for layer in decoder_of(model).layers:
            layer.compile(dynamic=True)
    return model


def register_packed_attention() -> str:
    """Returns the `attn_implementation` that `PackedCausalLM` needs."""
    register_attention(PACKED, attention_forward)
    return PACKED
