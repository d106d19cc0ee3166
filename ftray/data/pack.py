"""Examples laid end to end in one row, as the model takes them."""

import numpy as np
import torch

from ftray.data.plan import MicroBatch
from ftray.data.tokens import TokenizedDataset
from ftray.model.packed import PackedRow
from ftray.model.packed_attention import packed_layout


def pack(dataset: TokenizedDataset, examples: MicroBatch) -> PackedRow:
    """An empty micro-batch becomes one dummy token of weight 0: every rank runs the same forwards and backwards."""
    if not examples:
        return dummy_row()
    ids, positions, rows = [], [], []
    start = 0
    for index in examples:
        tokens, trained = dataset.example(index)
        ids.append(tokens)
        positions.append(np.arange(len(tokens)))
        rows.append(start + np.flatnonzero(trained[1:]))  # position j predicts token j + 1
        start += len(tokens)
    ids_T = torch.from_numpy(np.concatenate(ids).astype(np.int64))
    rows_N = torch.from_numpy(np.concatenate(rows))
    return PackedRow(
        ids_T=ids_T,
        positions_T=torch.from_numpy(np.concatenate(positions)),
        rows_N=rows_N,
        targets_N=ids_T[rows_N + 1],
        weights_N=torch.ones(len(rows_N)),
        layout=packed_layout([len(x) for x in ids]),
    )


def dummy_row() -> PackedRow:
    zero = torch.zeros(1, dtype=torch.long)
    return PackedRow(zero, zero, zero, zero, torch.zeros(1), packed_layout([1]))
