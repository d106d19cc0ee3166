"""The row of one step, out of the pieces that take part in it."""

from collections.abc import Sequence as Many
from dataclasses import dataclass

import torch
from torch import Tensor

from ftray.infer.torch_engine.attention import AttentionStep, Decoding, prompts_of
from ftray.infer.torch_engine.cpu.kernels import CpuKernels
from ftray.infer.torch_engine.kv_cache import PAGE_TOKENS, KVCache
from ftray.infer.torch_engine.sequence import Piece
from ftray.model.families import LayerKind


@dataclass(frozen=True)
class StepRow:
    ids_T: Tensor
    positions_T: Tensor
    step: AttentionStep


def row_of(
    pieces: Many[Piece],
    cache: KVCache,
    kinds: Many[LayerKind],
    kernels: CpuKernels | None,
    device: torch.device,
) -> StepRow:
    """`pieces`: single tokens, whole prompts, the rest of prompts."""
    ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    for piece in pieces:
        sequence, start = piece.sequence, piece.sequence.num_cached
        places = range(start, start + piece.num_tokens)
        ids += sequence.tokens[start : places.stop]
        positions += places
        slots += [sequence.pages[p // PAGE_TOKENS] * PAGE_TOKENS + p % PAGE_TOKENS for p in places]
    single = [piece for piece in pieces if piece.num_tokens == 1]
    longer = [(p.sequence.pages, p.sequence.num_cached, p.num_tokens) for p in pieces[len(single) :]]
    pages, lengths = [p.sequence.pages for p in single], [p.sequence.num_cached + 1 for p in single]
    step = AttentionStep(
        kinds,
        cache,
        write_slots_T=torch.tensor(slots).to(device),
        decoding=Decoding(pages, lengths, kernels) if single else None,
        prompts=prompts_of(longer, kernels, device) if longer else None,
    )
    return StepRow(torch.tensor(ids), torch.tensor(positions), step)
