"""A packed row in, log-probabilities of its trained tokens out. What every objective is computed from.

Shapes: T tokens in the row, N trained positions, V vocabulary, E hidden size.
"""

import functools
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ftray.config.run import MemoryConfig
from ftray.errors import UserError
from ftray.model.families import layer_kinds
from ftray.model.families.recurrent import PackedStates, RowsOf
from ftray.model.families.rotary import PackedRotary
from ftray.model.families.temperature import QueryTemperature
from ftray.model.heads import CAUSAL_LM, LOGIT_ROWS, Head
from ftray.model.packed_attention import (
    PACKED,
    PackedLayout,
    attention_forward,
    register_attention,
)
from ftray.model.sequence_parallel import SequenceRanks, share_row
from ftray.model.weights import is_sharded
from ftray.storage.cache import cache_directory

AtTargets = Callable[[Tensor, Tensor], Tensor]


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
    extras: dict[str, Tensor] = field(default_factory=dict)  # what else the objective reads (data/examples.py)

    @property
    def num_sequences(self) -> int:
        return len(self.layout.lengths)

    def to(self, device: torch.device) -> "PackedRow":
        tensors = (self.ids_T, self.positions_T, self.rows_N, self.targets_N, self.weights_N, self.sequences_N)
        extras = {name: value.to(device) for name, value in self.extras.items()}
        return PackedRow(*(x.to(device) for x in tensors), layout=self.layout.to(device), extras=extras)


class PackedCausalLM(nn.Module):
    """Wraps a transformers causal LM (PEFT-injected or not) loaded with the packed attention."""

    def __init__(
        self,
        model: Any,
        *,
        head: Head = CAUSAL_LM,
        num_logit_chunks: int | None = None,
        ranks: SequenceRanks | None = None,
    ):
        """`num_logit_chunks`: the output head is called that often for every row; None: once for each `LOGIT_ROWS`.
        ZeRO-3 communicates in every call, and ranks that call it another number of times would wait for ever.
        `ranks`: which share every row."""
        super().__init__()
        self.model = model
        self.head = head
        self.num_logit_chunks = num_logit_chunks
        self.ranks = ranks
        kinds = layer_kinds(model.config.get_text_config())
        # Of each layer, over whole rows or over those that ranks share.
        self._attend = [kind.attend_packed if ranks is None else ranks.attention(kind.attend_packed) for kind in kinds]
        decoder = decoder_of(model)
        self._states = PackedStates(decoder, in_one_batch=is_sharded(model))
        self._rotary, self._temperature = PackedRotary(decoder), QueryTemperature(decoder)
        if ranks is not None and self._states.names:
            raise UserError("memory.sequence_parallel: ranks cannot share rows of a base with recurrent layers; use 1")

    def forward(self, row: PackedRow, *, predict: bool = False) -> Tensor:
        """What the head makes of the targets [N], float32: their log-probabilities; or with `predict` the likeliest
        tokens [N] instead.

        Logits exist at trained positions only, a chunk at a time.
        """
        at_targets = self._likeliest if predict else functools.partial(self.head, self.model)
        if self.ranks is None:
            self._rotary.of_row(row.layout)
            hidden_TE = self._decode(row.ids_T, row.positions_T, row.layout)
            return self._at_rows(at_targets, hidden_TE, row.rows_N, row.targets_N)
        share = share_row(row.ids_T, row.positions_T, row.rows_N, row.layout, self.ranks)
        self._rotary.of_row(share.layout, slice(share.first, share.first + len(share.ids_t)))
        hidden_tE = self._decode(share.ids_t, share.positions_t, share.layout)
        mine = share.mine_N
        own = self._at_rows(at_targets, hidden_tE, row.rows_N[mine] - share.first, row.targets_N[mine])
        return self.ranks.sum(own.new_zeros(len(row.rows_N)).index_add(0, mine, own))

    def run_states_within(self, rows: RowsOf) -> None:
        """The recurrent layers of each sequence, for whoever must know whose tokens a layer gets."""
        self._states.one_by_one(rows)

    def _decode(self, ids: Tensor, positions: Tensor, layout: PackedLayout) -> Tensor:
        """Hidden states [tokens, E].

        use_cache stays off: with a cache transformers would see one sequence. The mask says nothing; one of four
        dimensions keeps transformers from looking for packed sequences, which would wait for the GPU.
        """
        self._states.of_row(layout)
        self._temperature.of_row(positions)
        output = decoder_of(self.model)(
            input_ids=ids[None],
            position_ids=positions[None],
            attention_mask=ids.new_ones(1, 1, 1, 1),
            use_cache=False,
            layout=layout,
            attend=self._attend,
        )
        hidden_TE = output.last_hidden_state[0]
        if self._states.names and hidden_TE.requires_grad:  # checkpointed layers of this row are computed again then
            hidden_TE.register_hook(lambda _: self._states.of_row(layout))
        return hidden_TE

    def _at_rows(self, compute: AtTargets, hidden_TE: Tensor, rows_N: Tensor, targets_N: Tensor) -> Tensor:
        """[N]: `compute` of (hidden states, targets), in chunks of equal size.

        The rows are filled up to whole chunks, at least one row each, with copies that no gradient reaches.
        """
        count = len(rows_N)
        chunks = self.num_logit_chunks or -(-count // LOGIT_ROWS) or 1
        size = max(1, -(-count // chunks))
        missing = chunks * size - count
        if missing:
            rows_N, targets_N = (torch.nn.functional.pad(x, (0, missing)) for x in (rows_N, targets_N))
        hidden_NE = hidden_TE.index_select(0, rows_N)
        if chunks == 1:
            return compute(hidden_NE, targets_N)[:count]
        pairs = zip(hidden_NE.split(size), targets_N.split(size), strict=True)
        parts = [checkpoint(compute, hidden, targets, use_reentrant=False) for hidden, targets in pairs]
        return torch.cat(parts)[:count]  # pyright: ignore[reportArgumentType, reportCallIssue]

    def _likeliest(self, hidden_NE: Tensor, _: Tensor) -> Tensor:
        return self.model.get_output_embeddings()(hidden_NE).argmax(-1)


def logit_chunks(tokens_per_micro_batch: int, ranks: SequenceRanks | None) -> int:
    """Enough for any row."""
    return -(-tokens_per_micro_batch // (LOGIT_ROWS * (ranks.size if ranks is not None else 1)))


def decoder_of(model: Any) -> Any:
    """The text model's stack below the output head; PEFT's injection leaves the model's own class in place."""
    decoder = model.get_decoder()
    return decoder if decoder is not model else model.model  # transformers' Llama 4 names itself


def prepare_layers(model: Any, config: MemoryConfig, *, compiled: bool = False) -> Any:
    """Fused kernels, activation checkpointing and compiled decoder layers, where the config asks for them."""
    if config.liger_kernels:
        apply_liger_kernels(model)
    if config.activation_checkpointing:
        # Not reentrant: with a frozen base no input of a layer asks for a gradient, and the reentrant kind needs one.
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if compiled:
        compile_layers(model)
    return model


def can_compile(model: Any) -> bool:
    return isinstance(getattr(decoder_of(model), "layers", None), nn.ModuleList)


def compile_layers(model: Any) -> None:
    """The attention stays as it is. What was compiled is kept in the user's cache for the next start."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_directory() / "compiled"))
    if not can_compile(model):
        raise UserError("compile: the layers of this base are not where they are expected; leave it off")
    for layer in decoder_of(model).layers:
        layer.compile(dynamic=True)


def apply_liger_kernels(model: Any) -> None:
    """Norms, rotary embedding and gated MLP (Hsu et al. 2024, arXiv 2410.10989). The loss stays ours: it has chunks."""
    if importlib.util.find_spec("liger_kernel") is None:
        raise UserError("memory.liger_kernels needs liger-kernel: pip install 'ftray[liger]'")
    from transformers.integrations.liger import apply_liger_kernel

    apply_liger_kernel(model, {"cross_entropy": False, "fused_linear_cross_entropy": False})


def register_packed_attention() -> str:
    """Returns the `attn_implementation` that `PackedCausalLM` needs."""
    register_attention(PACKED, attention_forward)
    return PACKED
