"""Examples end to end in one row, as the model takes them."""

import numpy as np
import torch

from ftray.data.dataset import TokenizedDataset
from ftray.data.plan import MicroBatch
from ftray.model.packed import PackedRow
from ftray.model.packed_attention import packed_layout


def pack(dataset: TokenizedDataset, examples: MicroBatch) -> PackedRow:
    """An empty micro-batch becomes a dummy of weight 0: every rank runs the same forwards and backwards."""
    if not examples:
        return dummy_row(dataset.sequences_per_example)
    ids, rows, sequences = [], [], []
    start = 0
    for tokens, trained in (sequence for index in examples for sequence in dataset.sequences(index)):
        targets = np.flatnonzero(trained[1:])  # position j predicts token j + 1
        rows.append(start + targets)
        sequences.append(np.full(len(targets), len(ids)))
        ids.append(tokens)
        start += len(tokens)
    ids_T = torch.from_numpy(np.concatenate(ids).astype(np.int64))
    rows_N = torch.from_numpy(np.concatenate(rows))
    return PackedRow(
        ids_T=ids_T,
        positions_T=torch.from_numpy(np.concatenate([np.arange(len(tokens)) for tokens in ids])),
        rows_N=rows_N,
        targets_N=ids_T[rows_N + 1],
        weights_N=torch.ones(len(rows_N)),
        sequences_N=torch.from_numpy(np.concatenate(sequences)),
        layout=packed_layout([len(tokens) for tokens in ids]),
    )


def continuation_row(sequences: list[list[int]]) -> PackedRow:
    """Each sequence's last token is the one row that is looked at."""
    lengths = [len(ids) for ids in sequences]
    count = len(sequences)
    return PackedRow(
        ids_T=torch.tensor([token for ids in sequences for token in ids]),
        positions_T=torch.cat([torch.arange(length) for length in lengths]),
        rows_N=torch.tensor(lengths).cumsum(0) - 1,
        targets_N=torch.zeros(count, dtype=torch.long),
        weights_N=torch.ones(count),
        sequences_N=torch.arange(count),
        layout=packed_layout(lengths),
    )


def dummy_row(num_sequences: int = 1) -> PackedRow:
    """One token a sequence."""
    zeros = torch.zeros(num_sequences, dtype=torch.long)
    places = torch.arange(num_sequences)
    return PackedRow(
        ids_T=zeros,
        positions_T=zeros,
        rows_N=places,
        targets_N=zeros,
        weights_N=torch.zeros(num_sequences),
        sequences_N=places,
        layout=packed_layout([1] * num_sequences),
    )
