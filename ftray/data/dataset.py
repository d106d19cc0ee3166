"""Tokenised examples as flat arrays in files, mapped into memory: a set of any size is read without being held."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ftray.storage import read_json, write_json, write_manifest

COUNTS = "counts.json"
DIGEST_ELEMENTS = 1 << 22  # read at a time
ARRAYS = {"ids": np.int32, "trained": np.bool_, "lengths": np.int64, "rows": np.int64, "trained_lengths": np.int64}


@dataclass(frozen=True)
class TokenizedDataset:
    """All sequences end to end: sequence j is `[offsets[j]:offsets[j + 1]]` of the flat arrays; example i has the
    sequences from `i * sequences_per_example` on."""

    ids: np.ndarray  # int32
    trained: np.ndarray  # bool
    sequence_lengths: np.ndarray  # int64
    rows: np.ndarray  # int64: the source row of each example, 1 for the first
    trained_lengths: np.ndarray  # int64: trained tokens of each example that have one before them to be predicted from
    sequences_per_example: int
    num_rows: int  # in the source
    num_truncated: int  # examples
    num_dropped: int
    directory: Path | None = None  # where its files are

    def __reduce__(self) -> Any:
        """Sent to another process of this machine, it is opened there."""
        return super().__reduce__() if self.directory is None else (open_dataset, (self.directory,))

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def offsets(self) -> np.ndarray:
        return np.concatenate([[0], np.cumsum(self.sequence_lengths)])

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of every example."""
        return np.diff(self.offsets[:: self.sequences_per_example])

    def sequences(self, index: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """(ids, trained) of each sequence of an example."""
        first = index * self.sequences_per_example
        parts = [slice(self.offsets[j], self.offsets[j + 1]) for j in range(first, first + self.sequences_per_example)]
        return [(self.ids[part], self.trained[part]) for part in parts]

    def digest(self) -> str:
        """SHA-256 of what is trained on: two sets of the same digest give the same losses."""
        digest = hashlib.sha256()
        for array in (self.ids, self.trained, self.sequence_lengths):
            for start in range(0, len(array), DIGEST_ELEMENTS):
                digest.update(array[start : start + DIGEST_ELEMENTS].tobytes())
        return digest.hexdigest()

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


class DatasetWriter:
    """Appends examples to the files of one directory; only a few numbers an example stay in memory."""

    def __init__(self, directory: Path):
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._files = {name: (directory / f"{name}.bin").open("wb") for name in ARRAYS}
        self._sequences_per_example = 0

    def append(self, sequences: Sequence[tuple[np.ndarray, np.ndarray]], *, row: int) -> None:
        """`sequences`: (ids, trained) of each."""
        self._sequences_per_example = len(sequences)
        for ids, trained in sequences:
            self._write("ids", ids)
            self._write("trained", trained)
            self._write("lengths", [len(ids)])
        self._write("rows", [row])
        self._write("trained_lengths", [sum(int(trained[1:].sum()) for _, trained in sequences)])

    def extend(self, part: Path, *, row_offset: int) -> None:
        """Appends what another writer wrote, whose first row is row `row_offset` + 1 of the whole."""
        examples, sequences = ((part / f"{name}.bin").stat().st_size for name in ("rows", "lengths"))
        if examples:
            self._sequences_per_example = sequences // examples
        for name, dtype in ARRAYS.items():
            with (part / f"{name}.bin").open("rb") as file:
                while chunk := file.read(1 << 24):
                    values = np.frombuffer(chunk, dtype)
                    self._write(name, values + row_offset if name == "rows" else values)

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def finish(self, *, num_rows: int, num_truncated: int, num_dropped: int) -> None:
        """The manifest is last: without it the directory does not count."""
        self.close()
        counts = {"num_rows": num_rows, "num_truncated": num_truncated, "num_dropped": num_dropped}
        write_json(self._directory / COUNTS, counts | {"sequences_per_example": self._sequences_per_example})
        write_manifest(self._directory, metadata={})

    def _write(self, name: str, values: np.ndarray | list[int]) -> None:
        self._files[name].write(np.asarray(values, ARRAYS[name]).tobytes())


def open_dataset(directory: Path) -> TokenizedDataset:
    arrays = {name: map_array(directory / f"{name}.bin", dtype) for name, dtype in ARRAYS.items()}
    return TokenizedDataset(
        sequence_lengths=arrays.pop("lengths"), **arrays, **read_json(directory / COUNTS), directory=directory
    )


def map_array(path: Path, dtype: type) -> np.ndarray:
    return np.memmap(path, dtype, mode="r") if path.stat().st_size else np.empty(0, dtype)
