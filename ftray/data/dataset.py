"""Tokenised examples as flat arrays in files, mapped into memory: a set of any size is read without being held."""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from ftray.errors import FtrayError
from ftray.storage import read_json, verify_directory, write_json, write_manifest

COUNTS = "counts.json"
DIGEST_ELEMENTS = COPIED_TOKENS = 1 << 22  # at a time
MOST_KEPT = 10  # bad rows whose texts are kept
ARRAYS = {
    "ids": np.int32,
    "trained": np.bool_,
    "lengths": np.int64,
    "rows": np.int64,
    "trained_lengths": np.int64,
    "keys": np.uint64,
    "sources": np.int32,
}
OF_TOKENS, OF_SEQUENCES = ("ids", "trained"), ("lengths",)  # the others have a value for each example
NONE = np.empty(0, np.int64)


@dataclass(frozen=True)
class RowCounts:
    """What became of the rows of a source."""

    num_rows: int
    num_truncated: int = 0  # examples
    num_dropped: int = 0
    num_untrained: int = 0  # answers that are read and not trained
    num_bad: int = 0  # rows that cannot be trained, where data.bad_rows is skip
    bad: tuple[str, ...] = ()  # the first of them


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
    row_counts: tuple[RowCounts, ...]  # of each source
    directory: Path | None = None  # where its files are
    keys: np.ndarray = field(default_factory=lambda: NONE)  # uint64: the hash of what each example's row says
    sources: np.ndarray = field(default_factory=lambda: NONE)  # int32: which source each example is of
    names: tuple[str, ...] = ("data",)  # of the sources

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
        arrays = [self.ids, self.trained, self.sequence_lengths]
        if len(self.names) > 1:  # which of them an epoch draws depends on it
            arrays.append(self.sources)
        for array in arrays:
            for start in range(0, len(array), DIGEST_ELEMENTS):
                digest.update(array[start : start + DIGEST_ELEMENTS].tobytes())
        return digest.hexdigest()

    def row_name(self, row: int) -> str:
        """Of a number in `rows`, which go on from one source to the next."""
        for name, counts in zip(self.names, self.row_counts, strict=True):
            if row <= counts.num_rows:
                return str(row) if len(self.names) == 1 else f"{row} of {name}"
            row -= counts.num_rows
        raise ValueError(f"row {row} is beyond the last source")

    def row_at(self, place: int) -> str:
        """Of a place in the flat arrays."""
        sequence = int(np.searchsorted(self.offsets, place, side="right")) - 1
        return self.row_name(int(self.rows[sequence // self.sequences_per_example]))

    def examples_of_source(self, number: int) -> np.ndarray:
        """Their numbers."""
        return np.arange(len(self)) if len(self.names) == 1 else np.flatnonzero(self.sources == number)

    def counts(self) -> dict[str, Any]:
        total = {
            name: sum(getattr(counts, f"num_{name}") for counts in self.row_counts)
            for name in ("rows", "truncated", "dropped", "untrained", "bad")
        }
        bad = [
            text if len(self.names) == 1 else f"{name}: {text}"
            for name, counts in zip(self.names, self.row_counts, strict=True)
            for text in counts.bad
        ]
        return {
            "rows": total["rows"],
            "examples": len(self),
            "truncated": total["truncated"],
            "dropped": total["dropped"],
            "untrained_answers": total["untrained"],
            "bad_rows": total["bad"],
            **({"first_bad_rows": bad[:MOST_KEPT]} if bad else {}),
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

    def append(self, sequences: Sequence[tuple[np.ndarray, np.ndarray]], *, row: int, key: int) -> None:
        """`sequences`: (ids, trained) of each. `key`: the hash of what its row says."""
        self._sequences_per_example = len(sequences)
        for ids, trained in sequences:
            self._write("ids", ids)
            self._write("trained", trained)
            self._write("lengths", [len(ids)])
        self._write("rows", [row])
        self._write("keys", [key])
        self._write("sources", [0])
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

    def add(self, dataset: TokenizedDataset, chosen: np.ndarray, *, source: int, row_offset: int) -> None:
        """Those examples of a dataset, whose first row is row `row_offset` + 1 of the whole."""
        self._sequences_per_example = dataset.sequences_per_example
        of_sequences = (
            chosen[:, None] * dataset.sequences_per_example + np.arange(dataset.sequences_per_example)
        ).ravel()
        lengths = dataset.sequence_lengths[of_sequences]
        self._write("lengths", lengths)
        self._write("rows", dataset.rows[chosen] + row_offset)
        self._write("trained_lengths", dataset.trained_lengths[chosen])
        self._write("keys", dataset.keys[chosen])
        self._write("sources", np.full(len(chosen), source))
        starts = dataset.offsets[of_sequences]
        for first, stop in zip(*contiguous_spans(starts, lengths), strict=True):
            for at in range(first, stop, COPIED_TOKENS):
                part = slice(at, min(stop, at + COPIED_TOKENS))
                self._write("ids", dataset.ids[part])
                self._write("trained", dataset.trained[part])

    def finish(self, row_counts: Sequence[RowCounts], names: Sequence[str]) -> None:
        """The manifest is last: without it the directory does not count."""
        self.close()
        counts = {"row_counts": [asdict(counts) for counts in row_counts], "names": list(names)}
        write_json(self._directory / COUNTS, counts | {"sequences_per_example": self._sequences_per_example})
        write_manifest(self._directory, metadata={})

    def _write(self, name: str, values: np.ndarray | list[int]) -> None:
        self._files[name].write(np.asarray(values, ARRAYS[name]).tobytes())


Write = Callable[[Path], Any]  # a dataset's directory; raises, and leaves nothing, where it cannot


def made_for_now(write: Write) -> TokenizedDataset:
    """Kept nowhere: a mapped file outlives its name."""
    with tempfile.TemporaryDirectory(prefix="ftray-tokens-") as scratch:
        write(Path(scratch) / "tokens")
        return replace(open_dataset(Path(scratch) / "tokens"), directory=None)


def made_once(directory: Path, write: Write) -> TokenizedDataset:
    """The one that is kept there, where it is whole; else it is written, by one process at a time."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{directory}.lock"):
        try:
            verify_directory(directory)
        except FtrayError:
            staging = directory.with_name(f"{directory.name}.new")
            shutil.rmtree(staging, ignore_errors=True)
            write(staging)
            shutil.rmtree(directory, ignore_errors=True)
            os.replace(staging, directory)
    return open_dataset(directory)


def open_dataset(directory: Path) -> TokenizedDataset:
    arrays = {name: map_array(directory / f"{name}.bin", dtype) for name, dtype in ARRAYS.items()}
    kept = read_json(directory / COUNTS)
    return TokenizedDataset(
        sequence_lengths=arrays.pop("lengths"),
        **arrays,
        sequences_per_example=kept["sequences_per_example"],
        row_counts=tuple(RowCounts(**counts | {"bad": tuple(counts["bad"])}) for counts in kept["row_counts"]),
        names=tuple(kept["names"]),
        directory=directory,
    )


def contiguous_spans(starts: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(first, end) of what lies together: sequences that follow each other are one."""
    if len(starts) == 0:
        return starts, starts
    breaks = np.flatnonzero(starts[1:] != starts[:-1] + lengths[:-1]) + 1
    ends = starts + lengths
    return starts[np.concatenate([[0], breaks])], ends[np.concatenate([breaks - 1, [len(starts) - 1]])]


def map_array(path: Path, dtype: type) -> np.ndarray:
    return np.memmap(path, dtype, mode="r") if path.stat().st_size else np.empty(0, dtype)
