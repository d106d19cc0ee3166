"""Rows to tokens, with every row accounted for: trained, truncated or dropped by rule."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ftray.config.run import DataConfig
from ftray.data.rows import row_reader
from ftray.data.sources import load_rows
from ftray.errors import DataError
from ftray.model.chat import ChatRenderer

MAX_LISTED = 5


@dataclass(frozen=True)
class TokenizedDataset:
    """All examples end to end: example i is `[offsets[i]:offsets[i + 1]]` of the flat arrays."""

    ids: np.ndarray  # int32
    trained: np.ndarray  # bool
    offsets: np.ndarray  # int64, one longer than the number of examples
    rows: np.ndarray  # int64: the source row of each example, 1 for the first
    num_rows: int  # in the source
    num_truncated: int
    num_dropped: int

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @cached_property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    def example(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        part = slice(self.offsets[index], self.offsets[index + 1])
        return self.ids[part], self.trained[part]

    def num_trained_tokens(self, indices: Iterable[int]) -> int:
        # The first token of an example has nothing before it to be predicted from.
        return int(sum(self.trained[self.offsets[i] + 1 : self.offsets[i + 1]].sum() for i in indices))

    def counts(self) -> dict[str, int]:
        return {
            "rows": self.num_rows,
            "examples": len(self),
            "truncated": self.num_truncated,
            "dropped": self.num_dropped,
            "tokens": len(self.ids),
            "trained_tokens": self.num_trained_tokens(range(len(self))),
            "longest": int(self.lengths.max()),
        }


def tokenize_source(key: str, source: str, data: DataConfig, renderer: ChatRenderer) -> TokenizedDataset:
    """Reads and tokenises a whole source. Raises one `DataError` that lists the rows that cannot be used."""
    rows = load_rows(key, source, revision=data.revision)
    read = row_reader(data.columns, rows.column_names, key=key)
    return tokenize_rows(rows, read, renderer, data, where=f"{key}: {source}")


def tokenize_rows(
    rows: Any, read: Callable[[dict], list], renderer: ChatRenderer, data: DataConfig, *, where: str
) -> TokenizedDataset:
    ids: list[np.ndarray] = []
    source_rows: list[int] = []
    masks: list[np.ndarray] = []
    bad: list[str] = []
    overlong: list[str] = []
    num_truncated = num_dropped = 0
    for number, row in enumerate(rows, start=1):
        try:
            rendered = renderer.training_ids(read(row))
        except DataError as error:
            bad.append(f"row {number}: {error}")
            continue
        example, mask = rendered.ids, rendered.trained
        if len(example) > data.max_example_tokens:
            if data.overlong == "error":
                overlong.append(f"row {number}: {len(example)} tokens")
                continue
            example, mask = example[: data.max_example_tokens], mask[: data.max_example_tokens]
            if data.overlong == "drop" or not mask[1:].any():
                num_dropped += 1
                continue
            num_truncated += 1
        ids.append(example)
        masks.append(mask)
        source_rows.append(number)
    raise_listed(bad, f"{where}: {len(bad)} of {len(rows)} rows cannot be trained", fix="mend or remove them")
    raise_listed(
        overlong,
        f"{where}: {len(overlong)} of {len(rows)} rows are longer than data.max_example_tokens"
        f" ({data.max_example_tokens})",
        fix="raise it (with batch.tokens_per_micro_batch), or set data.overlong to truncate or drop",
    )
    if not ids:
        raise DataError(f"{where}: no row is left: all {num_dropped} are over data.max_example_tokens")
    offsets = np.zeros(len(ids) + 1, np.int64)
    np.cumsum([len(x) for x in ids], out=offsets[1:])
    return TokenizedDataset(
        np.concatenate(ids),
        np.concatenate(masks),
        offsets,
        np.asarray(source_rows, np.int64),
        num_rows=len(rows),
        num_truncated=num_truncated,
        num_dropped=num_dropped,
    )


def raise_listed(problems: list[str], what: str, *, fix: str) -> None:
    if problems:
        shown = "\n".join(f"  - {problem}" for problem in problems[:MAX_LISTED])
        more = f"\n  - and {len(problems) - MAX_LISTED} more" if len(problems) > MAX_LISTED else ""
        raise DataError(f"{what}:\n{shown}{more}\n  {fix}")
