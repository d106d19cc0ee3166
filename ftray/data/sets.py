"""The training and the evaluation set of a config: its sources tokenised each by itself and joined, and the rows that
are held out taken from the one into the other.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ftray.config.data import DataConfig, HoldOutConfig, SourceConfig
from ftray.data.dataset import DatasetWriter, TokenizedDataset, made_for_now, made_once
from ftray.data.formats import reader_of
from ftray.data.sources import check_source, load_source
from ftray.data.tokens import key_of, tokenize_source
from ftray.errors import DataError
from ftray.model.chat import ChatRenderer
from ftray.objectives import Shape

TRAIN, EVAL = "data.train", "data.eval"
JOINED = 1  # of the kept files: another number makes them anew


@dataclass(frozen=True)
class Part:
    """Of a set: one source's examples, or those of them that are on one side of a hold-out."""

    dataset: TokenizedDataset
    chosen: np.ndarray | None = None  # numbers of examples; None: all


def check_data(data: DataConfig) -> None:
    """What costs nothing to know before any work: the files are there. Raises `DataError`."""
    for key, source in sources_of(data):
        check_source(key, source.path)


def check_evaluation(data: DataConfig) -> None:
    """The same of what is evaluated."""
    for key, source in evaluated_sources(data):
        check_source(key, source.path)


def evaluated_sources(data: DataConfig) -> list[tuple[str, SourceConfig]]:
    """Those that have the evaluation's rows."""
    wanted = TRAIN if data.held_out is not None else EVAL
    return [(key, source) for key, source in sources_of(data) if key.startswith(wanted)]


def sources_of(data: DataConfig) -> list[tuple[str, SourceConfig]]:
    """(key, source) of all."""
    found = []
    for key, sources in ((TRAIN, data.training_sources), (EVAL, data.evaluation_sources)):
        found += [(key if len(sources) == 1 else f"{key}.{number}", source) for number, source in enumerate(sources)]
    return found


def training_set(data: DataConfig, renderer: ChatRenderer, **how: Any) -> TokenizedDataset:
    """`how`: of `tokenize_source`. Raises `DataError`."""
    return joined(parts(data, renderer, TRAIN, held_out=False, **how), kept_in=how.get("kept_in"), key=TRAIN)


def evaluation_set(data: DataConfig, renderer: ChatRenderer, **how: Any) -> TokenizedDataset | None:
    """As `training_set`; None where there is none."""
    if data.eval is None:
        return None
    if data.held_out is not None:
        quiet = how | {"log": lambda text: None}  # it was told with the training set
        return joined(parts(data, renderer, TRAIN, held_out=True, **quiet), kept_in=how.get("kept_in"), key=EVAL)
    return joined(parts(data, renderer, EVAL, held_out=False, **how), kept_in=how.get("kept_in"), key=EVAL)


def parts(data: DataConfig, renderer: ChatRenderer, key: str, *, held_out: bool, **how: Any) -> list[Part]:
    found = []
    for place, source in sources_of(data):
        if place.startswith(key):
            dataset = tokenize_source(place, source, data, renderer, **how)
            if data.held_out is None:
                found.append(Part(dataset))
            else:
                found.append(Part(dataset, np.flatnonzero(is_held_out(dataset.keys, data.held_out) == held_out)))
    return found


def is_held_out(keys: np.ndarray, config: HoldOutConfig) -> np.ndarray:
    """[E] bool, of each key: the keys of `TokenizedDataset`, mixed with the seed (splitmix64, Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        mixed = keys.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15) * np.uint64(config.seed + 1)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed ^= mixed >> np.uint64(31)
    return mixed < np.uint64(int(config.fraction * 2**64))


def joined(found: list[Part], *, kept_in: Path | None, key: str) -> TokenizedDataset:
    """Raises `DataError` where a hold-out leaves nothing on this side."""
    if len(found) == 1 and found[0].chosen is None:
        return found[0].dataset
    if not any(len(examples_of(part)) for part in found):
        raise DataError(
            f"{key}: data.eval: holds out {'no' if key == EVAL else 'every'} row; change the fraction or seed"
        )

    def write(directory: Path) -> None:
        write_joined(found, directory)

    if kept_in is None:
        return made_for_now(write)
    kept = found[0].dataset.directory
    assert kept is not None
    return made_once(kept.parent / name_of(found), write)


def examples_of(part: Part) -> np.ndarray:
    return np.arange(len(part.dataset)) if part.chosen is None else part.chosen


def name_of(found: list[Part]) -> str:
    """By all that a joined set depends on."""
    digest = hashlib.sha256(str(JOINED).encode())
    for part in found:
        assert part.dataset.directory is not None
        digest.update(repr([part.dataset.directory.name, part.dataset.names]).encode())
        digest.update(examples_of(part).tobytes())
    return digest.hexdigest()[:24]


def write_joined(found: list[Part], directory: Path) -> None:
    writer, num_rows = DatasetWriter(directory), 0
    for number, part in enumerate(found):
        writer.add(part.dataset, examples_of(part), source=number, row_offset=num_rows)
        num_rows += sum(counts.num_rows for counts in part.dataset.row_counts)
    counts = [counts for part in found for counts in part.dataset.row_counts]
    writer.finish(counts, [name for part in found for name in part.dataset.names])


def num_shared(train: TokenizedDataset, evaluation: TokenizedDataset) -> int:
    """Of the evaluation's distinct rows, those that the training set has too."""
    return len(np.intersect1d(train.keys, evaluation.keys))


def read_evaluation(data: DataConfig, *, shape: Shape) -> Iterator[tuple[str, int, Any]]:
    """(source, number of the row, what a format reads of it) of what `evaluation_set` has. Raises `DataError`."""
    if data.eval is None:
        raise DataError("data.eval: not given; an evaluation needs held-out rows")
    for key, source in evaluated_sources(data):
        rows, label = load_source(key, source), f"{key}: {source.path}"
        read = reader_of(data.of(source), rows, shape=shape, key=label)
        for number, row in enumerate(rows, start=1):
            try:
                value = read(row)
            except DataError as error:
                if data.bad_rows == "skip":
                    continue
                raise DataError(f"{label}: row {number}: {error}") from None
            if value is None:
                continue
            if data.held_out is None or is_held_out(np.asarray([key_of(value)], np.uint64), data.held_out)[0]:
                yield key, number, value
