"""Rows to tokens, with every row accounted for: trained, truncated or dropped by rule.

The result is kept under a name made from everything it depends on (content of the source, tokenizer, template, columns,
limits), so the second run on the same data reads it, and a changed file or template is noticed. Large sources are
tokenised by several processes, each a part of the rows.
"""

import hashlib
import itertools
import json
import multiprocessing
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, ProcessPoolExecutor, wait
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from ftray.config.data import DataConfig, SourceConfig
from ftray.data.dataset import DatasetWriter, TokenizedDataset, made_for_now, made_once
from ftray.data.encode import ENCODERS, Example, answers_of, trained_answers
from ftray.data.formats import Conversation, code_digest, reader_of, unread_columns
from ftray.data.sources import load_source, source_digest
from ftray.data.tally import Tally, add, refuse_problems
from ftray.errors import DataError
from ftray.model.chat import ChatRenderer, Rendered
from ftray.model.chat.settings import is_dated
from ftray.objectives import Shape, TrainedTurns
from ftray.storage.machine import usable_cores, user_name

# Fewer rows than this a process are not worth its start.
ROWS_PER_PROCESS = 20_000
CANCEL_POLL_S = 0.5
ROWS_BETWEEN_NEWS = 200
ALL_TURNS = TrainedTurns()
READ_BY = ("columns", "format", "transform", "bad_rows", "max_example_tokens", "overlong")  # keys that tokens depend on
FORMAT = 4  # of the kept files, and how texts become tokens: another number makes them anew


@dataclass(frozen=True)
class Encoded:
    """What became of a row."""

    key: int  # the hash of what it says
    examples: list[Example]
    num_untrained: int  # answers


RowEncoder = Callable[[dict[str, Any]], Encoded | None]  # of a raw row; None: data.transform drops it


@dataclass(frozen=True)
class Source:
    """Raw rows and how they become tokens. It can be sent to another process."""

    key: str  # of the config, for messages
    config: SourceConfig
    data: DataConfig  # as this source is read
    tokenizer: Any
    shape: Shape
    turns: TrainedTurns

    def __str__(self) -> str:
        return f"{self.key}: {self.config.path}"

    def rows(self) -> Any:
        return load_source(self.key, self.config)

    def encoder(self, rows: Any) -> RowEncoder:
        read = reader_of(self.data, rows, shape=self.shape, key=str(self))
        encode = ENCODERS[self.shape](self.data, ChatRenderer(self.tokenizer), self.turns)

        def encoded(row: dict[str, Any]) -> Encoded | None:
            value = read(row)
            if value is None:
                return None
            untrained = num_untrained(value, self.turns) if self.shape == "conversation" else 0
            return Encoded(key_of(value), encode(value), untrained)

        return encoded

    def digest(self, rows: Any) -> str:
        """Of all that the tokens depend on."""
        tokenizer = self.tokenizer
        vocabulary = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else json.dumps(tokenizer.get_vocab())
        depends = {
            "format": FORMAT,
            "source": [source_digest(self.config.path, rows), self.config.limit],
            "trained": astuple(self.turns),
            "data": self.data.model_dump(mode="json", include=set(READ_BY)),
            "own_code": code_digest(self.data),
            "shape": self.shape,
            "tokenizer": hashlib.sha256(vocabulary.encode()).hexdigest(),
            "template": tokenizer.chat_template,
            "date": time.strftime("%Y-%m-%d") if is_dated(tokenizer) else None,
            "special": [tokenizer.eos_token, tokenizer.bos_token],
        }
        return hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:24]


def key_of(value: Any) -> int:
    """The hash, 64 bits, of what a row says: a conversation's turns and tools, what a pair asks, a text."""
    if isinstance(value, str):
        said = value
    else:
        asked = [value.messages, value.tools] if isinstance(value, Conversation) else value.prompt
        said = json.dumps(asked, sort_keys=True, ensure_ascii=False, default=str)
    return int.from_bytes(hashlib.blake2b(said.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def num_untrained(talk: Conversation, turns: TrainedTurns) -> int:
    """Of its answers."""
    return len(answers_of(talk)) - len(trained_answers(talk, turns))


def tokenize_source(
    key: str,
    location: str | SourceConfig,
    data: DataConfig,
    renderer: ChatRenderer,
    *,
    shape: Shape = "conversation",
    turns: TrainedTurns = ALL_TURNS,
    kept_in: Path | None = None,
    processes: int | None = None,
    cancelled: threading.Event | None = None,
    log: Callable[[str], None] = lambda text: None,
) -> TokenizedDataset:
    """Reads and tokenises a whole source, or finds it in `kept_in` (None: nothing is kept).

    Raises one `DataError` that lists the rows that cannot be used; `CancelledError` soon after `cancelled` is set.
    """
    cancelled = cancelled or threading.Event()
    config = SourceConfig(path=location) if isinstance(location, str) else location
    source = Source(key, config, data.of(config), renderer.tokenizer, shape, turns)
    rows = source.rows()
    if unread := unread_columns(source.data, rows, shape=shape, key=str(source)):
        log(f"{key}: columns that are not read: {', '.join(unread)}")
    if shape != "document" and is_dated(renderer.tokenizer):
        log(
            f"{key}: the chat template writes today's date, {time.strftime('%Y-%m-%d')}; another day gives other tokens"
        )

    def write(directory: Path) -> None:
        tokenize(source, rows, directory, processes=processes, cancelled=cancelled)

    if kept_in is None:
        return made_for_now(write)
    name = source.digest(rows)
    try:
        return made_once(kept_in / name, write)
    except PermissionError:  # another user's, in a directory of runs that several share
        return made_once(kept_in.with_name(f"{kept_in.name}-{user_name()}") / name, write)


def tokenize(
    source: Source,
    rows: Any,
    directory: Path,
    *,
    processes: int | None,
    cancelled: threading.Event,
    refuse: Callable[[Tally, str, DataConfig], None] | None = None,
    on_rows: Callable[[int], None] = lambda count: None,
) -> Tally:
    """Writes the dataset's directory, or, when a row cannot be used, nothing. `refuse`: raises `DataError` for what was
    found; None: for rows that cannot be used. `on_rows`: told of so many more rows that are done."""
    encode = source.encoder(rows)  # says what is wrong with the columns
    count = min(processes or usable_cores(), len(rows) // ROWS_PER_PROCESS)
    writer = DatasetWriter(directory)
    try:
        if count <= 1:
            tally = encode_rows(rows, encode, source.data, writer, on_rows=on_rows)
        else:
            tally = encode_in_processes(source, rows, count, directory, writer, cancelled, on_rows=on_rows)
        (refuse or refuse_problems)(tally, str(source), source.data)
        writer.finish([tally.row_counts], [source.config.label])
        return tally
    except BaseException:
        writer.close()
        shutil.rmtree(directory, ignore_errors=True)
        raise


def encode_in_processes(
    source: Source,
    rows: Any,
    count: int,
    directory: Path,
    writer: DatasetWriter,
    cancelled: threading.Event,
    *,
    on_rows: Callable[[int], None],
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
            on_rows(tally.num_rows)
    return total


def encode_part(source: Source, rows: Any, directory: Path) -> Tally:
    writer = DatasetWriter(directory)
    tally = encode_rows(rows, source.encoder(rows), source.data, writer)
    writer.close()
    return tally


def encode_rows(
    rows: Any,
    encode: RowEncoder,
    data: DataConfig,
    writer: DatasetWriter,
    *,
    on_rows: Callable[[int], None] = lambda count: None,
) -> Tally:
    tally = Tally(num_rows=len(rows))
    for number, row in enumerate(rows, start=1):
        if number % ROWS_BETWEEN_NEWS == 0:
            on_rows(ROWS_BETWEEN_NEWS)
        try:
            encoded = encode(row)
        except DataError as error:
            tally.bad.append((number, str(error)))
            continue
        if encoded is None:
            tally.num_left_out += 1
            continue
        if not all(sequence.trained[1:].any() for example in encoded.examples for sequence in example):
            tally.bad.append((number, "no trained token has one before it to be predicted from"))
            continue
        tally.num_untrained += encoded.num_untrained
        for example in encoded.examples:
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
            sequences = [(sequence.ids, sequence.trained) for sequence in example]
            writer.append(sequences, row=number, key=encoded.key)
            tally.num_examples += 1
    return tally


def truncate(sequence: Rendered, size: int) -> Rendered:
    return Rendered(sequence.ids[:size], sequence.trained[:size])
