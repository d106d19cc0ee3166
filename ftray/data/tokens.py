"""Rows to tokens, with every row accounted for: trained, truncated or dropped by rule."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ftray.config.run import DataConfig
from ftray.data.encode import ENCODERS, Example, RowEncoder
from ftray.data.sources import load_rows
from ftray.errors import DataError
from ftray.model.chat import ChatRenderer, Rendered

MAX_LISTED = 5


@dataclass(frozen=True)
class TokenizedDataset:
    """All sequences end to end: sequence j is `[offsets[j]:offsets[j + 1]]` of the flat arrays; example i has the
    sequences from `i * sequences_per_example` on."""

    ids: np.ndarray  # int32
    trained: np.ndarray  # bool
    offsets: np.ndarray  # int64, one longer than the number of sequences
    rows: np.ndarray  # int64: the source row of each example, 1 for the first
    sequences_per_example: int
    num_rows: int  # in the source
    num_truncated: int  # examples
    num_dropped: int

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of every example."""
        return np.diff(self.offsets[:: self.sequences_per_example])

    @cached_property
    def trained_lengths(self) -> np.ndarray:
        """Trained tokens of every example. A sequence's first token has nothing before it to be predicted from."""
        trained = self.trained.copy()
        trained[self.offsets[:-1]] = False
        sums = np.concatenate([[0], np.cumsum(trained)])
        return np.diff(sums[self.offsets[:: self.sequences_per_example]])

    def sequences(self, index: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """(ids, trained) of each sequence of an example."""
        first = index * self.sequences_per_example
        parts = [slice(self.offsets[j], self.offsets[j + 1]) for j in range(first, first + self.sequences_per_example)]
        return [(self.ids[part], self.trained[part]) for part in parts]

    def example(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Where an example is one sequence."""
        (only,) = self.sequences(index)
        return only

    def num_trained_tokens(self, indices: Sequence[int]) -> int:
        return int(self.trained_lengths[indices].sum())

    def counts(self) -> dict[str, int]:
        return {
            "rows": self.num_rows,
            "examples": len(self),
            "truncated": self.num_truncated,
            "dropped": self.num_dropped,
            "tokens": len(self.ids),
            "trained_tokens": int(self.trained_lengths.sum()),
            "longest": int(self.lengths.max()),
        }


def tokenize_source(
    key: str, source: str, data: DataConfig, renderer: ChatRenderer, *, objective: str = "sft"
) -> TokenizedDataset:
    """Reads and tokenises a whole source. Raises one `DataError` that lists the rows that cannot be used."""
    rows = load_rows(key, source, revision=data.revision)
    where = f"{key}: {source}"
    return tokenize_rows(rows, ENCODERS[objective](data, rows.column_names, renderer, key=where), data, where=where)


def tokenize_rows(rows: Any, encode: RowEncoder, data: DataConfig, *, where: str) -> TokenizedDataset:
    examples: list[Example] = []
    source_rows: list[int] = []
    bad: list[str] = []
    overlong: list[str] = []
    num_truncated = num_dropped = 0
    for number, row in enumerate(rows, start=1):
        try:
            encoded = encode(row)
        except DataError as error:
            bad.append(f"row {number}: {error}")
            continue
        for example in encoded:
            longest = max(len(sequence.ids) for sequence in example)
            if longest > data.max_example_tokens:
                if data.overlong != "truncate":
                    num_dropped += 1
                    if data.overlong != "drop":
                        overlong.append(f"row {number}: {longest} tokens")
                    continue
                example = [truncate(sequence, data.max_example_tokens) for sequence in example]
                if not all(sequence.trained[1:].any() for sequence in example):
                    num_dropped += 1
                    continue
                num_truncated += 1
            examples.append(example)
            source_rows.append(number)
    raise_listed(bad, f"{where}: {len(bad)} of {len(rows)} rows cannot be trained", fix="mend or remove them")
    raise_listed(
        overlong,
        f"{where}: {len(overlong)} of {len(rows)} rows are longer than data.max_example_tokens"
        f" ({data.max_example_tokens})",
        fix="raise it (with batch.tokens_per_micro_batch), or set data.overlong to truncate, drop or, for documents, "
        "split",
    )
    if not examples:
        raise DataError(f"{where}: no row is left: all {num_dropped} are over data.max_example_tokens")
    sequences = [sequence for example in examples for sequence in example]
    offsets = np.zeros(len(sequences) + 1, np.int64)
    np.cumsum([len(sequence.ids) for sequence in sequences], out=offsets[1:])
    return TokenizedDataset(
        ids=np.concatenate([sequence.ids for sequence in sequences]),
        trained=np.concatenate([sequence.trained for sequence in sequences]),
        offsets=offsets,
        rows=np.asarray(source_rows, np.int64),
        sequences_per_example=len(examples[0]),
        num_rows=len(rows),
        num_truncated=num_truncated,
        num_dropped=num_dropped,
    )


def truncate(sequence: Rendered, size: int) -> Rendered:
    return Rendered(sequence.ids[:size], sequence.trained[:size])


def raise_listed(problems: list[str], what: str, *, fix: str) -> None:
    if problems:
        shown = "\n".join(f"  - {problem}" for problem in problems[:MAX_LISTED])
        more = f"\n  - and {len(problems) - MAX_LISTED} more" if len(problems) > MAX_LISTED else ""
        raise DataError(f"{what}:\n{shown}{more}\n  {fix}")
