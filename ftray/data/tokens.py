"""Rows to tokens, with every row accounted for: trained, truncated or dropped by rule.

The result is kept under a name made from everything it depends on (content of the source, tokenizer, template, columns,
limits), so the second run on the same data reads it, and a changed file or template is noticed. Large sources are
tokenised by several processes, each a part of the rows.
"""

import hashlib
import itertools
import json
import multiprocessing
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, ProcessPoolExecutor, wait
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from filelock import FileLock

from ftray.config.data import DataConfig
from ftray.data.dataset import DatasetWriter, TokenizedDataset, open_dataset
from ftray.data.encode import ENCODERS, Example
from ftray.data.formats import code_digest, reader_of, unread_columns
from ftray.data.sources import load_rows, source_digest
from ftray.errors import DataError, FtrayError
from ftray.model.chat import ChatRenderer, Rendered
from ftray.objectives import Shape
from ftray.storage import verify_directory
from ftray.storage.machine import usable_cores, user_name

RowEncoder = Callable[[dict[str, Any]], list[Example]]  # of a raw row; one that data.transform drops has no example
MAX_LISTED = 5
# Fewer rows than this a process are not worth its start.
ROWS_PER_PROCESS = 20_000
CANCEL_POLL_S = 0.5
READ_BY = ("columns", "format", "transform", "max_example_tokens", "overlong")  # keys of `data` that tokens depend on
FORMAT = 3  # of the kept files, and how texts become tokens: another number makes them anew


@dataclass
class Tally:
    """What became of the rows of one part; problems as (row, text)."""

    num_rows: int = 0
    num_truncated: int = 0
    num_dropped: int = 0  # by data.overlong
    num_left_out: int = 0  # by data.transform
    num_examples: int = 0
    bad: list[tuple[int, str]] = field(default_factory=list)
    overlong: list[tuple[int, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Source:
    """Raw rows and how they become tokens. It can be sent to another process."""

    key: str  # of the config, for messages
    location: str
    data: DataConfig
    tokenizer: Any
    shape: Shape

    def __str__(self) -> str:
        return f"{self.key}: {self.location}"

    def rows(self) -> Any:
        return load_rows(self.key, self.location, revision=self.data.revision)

    def encoder(self, rows: Any) -> RowEncoder:
        read = reader_of(self.data, rows, shape=self.shape, key=str(self))
        encode = ENCODERS[self.shape](self.data, ChatRenderer(self.tokenizer))
        return lambda row: [] if (value := read(row)) is None else encode(value)

    def digest(self, rows: Any) -> str:
        """Of all that the tokens depend on."""
        tokenizer = self.tokenizer
        vocabulary = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else json.dumps(tokenizer.get_vocab())
        depends = {
            "format": FORMAT,
            "source": source_digest(self.location, rows),
            "data": self.data.model_dump(mode="json", include=set(READ_BY)),
            "own_code": code_digest(self.data),
            "shape": self.shape,
            "tokenizer": hashlib.sha256(vocabulary.encode()).hexdigest(),
            "template": tokenizer.chat_template,
            "date": time.strftime("%Y-%m-%d") if asks_for_date(tokenizer) else None,
            "special": [tokenizer.eos_token, tokenizer.bos_token],
        }
        return hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:24]


def asks_for_date(tokenizer: Any) -> bool:
    """Its chat template writes today's date, in training and in serving."""
    return "strftime_now" in json.dumps(tokenizer.chat_template)


def tokenize_source(
    key: str,
    location: str,
    data: DataConfig,
    renderer: ChatRenderer,
    *,
    shape: Shape = "conversation",
    kept_in: Path | None = None,
    processes: int | None = None,
    cancelled: threading.Event | None = None,
    log: Callable[[str], None] = lambda text: None,
) -> TokenizedDataset:
    """Reads and tokenises a whole source, or finds it in `kept_in` (None: nothing is kept).

    Raises one `DataError` that lists the rows that cannot be used; `CancelledError` soon after `cancelled` is set.
    """
    cancelled = cancelled or threading.Event()
    source = Source(key, location, data, renderer.tokenizer, shape)
    rows = source.rows()
    if unread := unread_columns(data, rows, shape=shape, key=str(source)):
        log(f"{key}: columns that are not read: {', '.join(unread)}")
    if shape != "document" and asks_for_date(renderer.tokenizer):
        log(
            f"{key}: the chat template writes today's date, {time.strftime('%Y-%m-%d')}; another day gives other tokens"
        )
    if kept_in is None:
        with tempfile.TemporaryDirectory(prefix="ftray-tokens-") as scratch:
            tokenize(source, rows, Path(scratch) / "tokens", processes=processes, cancelled=cancelled)
            return replace(open_dataset(Path(scratch) / "tokens"), directory=None)  # a mapped file outlives its name
    name = source.digest(rows)

    def kept(place: Path) -> TokenizedDataset:
        directory = place / name
        place.mkdir(parents=True, exist_ok=True)
        with FileLock(place / f"{name}.lock"):
            try:
                verify_directory(directory)
            except FtrayError:
                staging = place / f"{name}.new"
                shutil.rmtree(staging, ignore_errors=True)
                tokenize(source, rows, staging, processes=processes, cancelled=cancelled)
                shutil.rmtree(directory, ignore_errors=True)
                os.replace(staging, directory)
        return open_dataset(directory)

    try:
        return kept(kept_in)
    except PermissionError:  # another user's, in a directory of runs that several share
        return kept(kept_in.with_name(f"{kept_in.name}-{user_name()}"))


def tokenize(
    source: Source,
    rows: Any,
    directory: Path,
    *,
    processes: int | None,
    cancelled: threading.Event,
    refuse: Callable[[Tally, Source], None] | None = None,
) -> Tally:
    """Writes the dataset's directory, or, when a row cannot be used, nothing. `refuse`: raises `DataError` for what was
    found; None: for rows that cannot be used."""
    encode = source.encoder(rows)  # says what is wrong with the columns
    count = min(processes or usable_cores(), len(rows) // ROWS_PER_PROCESS)
    writer = DatasetWriter(directory)
    try:
        if count <= 1:
            tally = encode_rows(rows, encode, source.data, writer)
        else:
            tally = encode_in_processes(source, rows, count, directory, writer, cancelled)
        (refuse or refuse_problems)(tally, source)
        dropped = tally.num_dropped + tally.num_left_out
        writer.finish(num_rows=tally.num_rows, num_truncated=tally.num_truncated, num_dropped=dropped)
        return tally
    except BaseException:
        writer.close()
        shutil.rmtree(directory, ignore_errors=True)
        raise


def encode_in_processes(
    source: Source, rows: Any, count: int, directory: Path, writer: DatasetWriter, cancelled: threading.Event
) -> Tally:
    """Parts of the rows, joined in their order. Processes are started anew, not forked: the driver has threads."""
    bounds = [*range(0, len(rows), ROWS_PER_PROCESS), len(rows)]
    places = {start: directory / f"part-{start}" for start in bounds[:-1]}
    total = Tally()
    with ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = [
            (start, places[start], pool.submit(encode_part, source, rows.select(range(start, stop)), places[start]))
            for start, stop in itertools.pairwise(bounds)
        ]
        for start, place, future in futures:
            while not wait([future], timeout=CANCEL_POLL_S).done:
                if cancelled.is_set():
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise CancelledError
            tally = future.result()
            writer.extend(place, row_offset=start)
            shutil.rmtree(place)
            add(total, tally, row_offset=start)
    return total


def encode_part(source: Source, rows: Any, directory: Path) -> Tally:
    writer = DatasetWriter(directory)
    tally = encode_rows(rows, source.encoder(rows), source.data, writer)
    writer.close()
    return tally


def encode_rows(rows: Any, encode: RowEncoder, data: DataConfig, writer: DatasetWriter) -> Tally:
    tally = Tally(num_rows=len(rows))
    for number, row in enumerate(rows, start=1):
        try:
            examples = encode(row)
        except DataError as error:
            tally.bad.append((number, str(error)))
            continue
        if not examples:
            tally.num_left_out += 1
            continue
        if not all(sequence.trained[1:].any() for example in examples for sequence in example):
            tally.bad.append((number, "no trained token has one before it to be predicted from"))
            continue
        for example in examples:
            longest = max(len(sequence.ids) for sequence in example)
            if longest > data.max_example_tokens:
                if data.overlong != "truncate":
                    tally.num_dropped += 1
                    if data.overlong != "drop":
                        tally.overlong.append((number, f"{longest} tokens"))
                    continue
                example = [truncate(sequence, data.max_example_tokens) for sequence in example]
                if not all(sequence.trained[1:].any() for sequence in example):
                    tally.num_dropped += 1
                    continue
                tally.num_truncated += 1
            writer.append([(sequence.ids, sequence.trained) for sequence in example], row=number)
            tally.num_examples += 1
    return tally


def add(total: Tally, part: Tally, *, row_offset: int) -> None:
    total.num_rows += part.num_rows
    total.num_truncated += part.num_truncated
    total.num_dropped += part.num_dropped
    total.num_left_out += part.num_left_out
    total.num_examples += part.num_examples
    total.bad += [(number + row_offset, text) for number, text in part.bad]
    total.overlong += [(number + row_offset, text) for number, text in part.overlong]


def truncate(sequence: Rendered, size: int) -> Rendered:
    return Rendered(sequence.ids[:size], sequence.trained[:size])


def refuse_problems(tally: Tally, source: Source) -> None:
    limit = source.data.max_example_tokens
    share = f"of {tally.num_rows} rows"
    raise_listed(tally.bad, f"{source}: {len(tally.bad)} {share} cannot be trained", fix="fix or remove them")
    raise_listed(
        tally.overlong,
        f"{source}: {len(tally.overlong)} {share} are longer than data.max_example_tokens ({limit})",
        fix="raise it (with batch.tokens_per_micro_batch), or set data.overlong to truncate, drop or, for documents, "
        "split",
    )
    if tally.num_examples == 0:
        by_transform = f", {tally.num_left_out} were dropped by data.transform" if tally.num_left_out else ""
        too_long = f"{tally.num_dropped} are over data.max_example_tokens"
        raise DataError(f"{source}: no row is left: {too_long}{by_transform}")


def raise_listed(problems: list[tuple[int, str]], what: str, *, fix: str) -> None:
    if problems:
        shown = "\n".join(f"  - row {number}: {text}" for number, text in problems[:MAX_LISTED])
        more = f"\n  - and {len(problems) - MAX_LISTED} more" if len(problems) > MAX_LISTED else ""
        raise DataError(f"{what}:\n{shown}{more}\n  {fix}")
