"""Examples end to end in one row, as the model takes them."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch

from ftray.data.examples import Example, ExampleSource
from ftray.model.packed import PackedRow
from ftray.model.packed_attention import packed_layout


def pack(examples: Sequence[Example], *, num_sequences: int = 1, extras: Sequence[str] = ()) -> PackedRow:
    """An empty micro-batch becomes a dummy of weight 0: every rank runs the same forwards and backwards. Such a one has
    `num_sequences` and the `extras` of an example."""
    if not examples:
        return dummy_row(num_sequences, extras)
    ids, rows, sequences = [], [], []
    start = 0
    for tokens, trained in (sequence for example in examples for sequence in example.sequences):
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
        extras={name: torch.from_numpy(np.concatenate([e.extras[name] for e in examples])) for name in extras},
    )


def pack_all(source: ExampleSource, micro_batches: Iterable[Sequence[Example]]) -> Iterator[PackedRow]:
    """One after the other, as they are asked for."""
    how = {"num_sequences": source.sequences_per_example, "extras": source.extras}
    return (pack(examples, **how) for examples in micro_batches)


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


def dummy_row(num_sequences: int = 1, extras: Sequence[str] = ()) -> PackedRow:
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
        extras={name: torch.zeros(num_sequences) for name in extras},
    )
