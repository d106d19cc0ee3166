"""How rows are read, a module for each shape. Without `data.columns` the columns themselves say what a row is."""

import contextlib
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ftray.config.data import DataConfig
from ftray.data.formats.conversation import columns_read, guess_conversation, is_alpaca, row_reader
from ftray.data.formats.document import text_reader
from ftray.data.formats.pair import pair_reader
from ftray.data.formats.protocol import Conversation, Format, Pair, Read, Transform
from ftray.data.formats.turns import parsed, read_conversation, read_messages
from ftray.data.rows import BrokenRow
from ftray.errors import DataError, UserError
from ftray.objectives import Shape
from ftray.plugins import import_module, load_function, load_plugin

RATING = "label"
READERS: dict[Shape, Callable[..., Read]] = {"conversation": row_reader, "document": text_reader, "pair": pair_reader}


def own_format(data: DataConfig, *, shape: Shape) -> Format | None:
    """`data.format`. Raises `UserError`."""
    if data.format is None:
        return None
    found = load_plugin(data.format, Format, key="data.format")
    if found.shape != shape:
        raise UserError(f"data.format: {data.format} reads a {found.shape}, and the objective trains on a {shape}")
    return found


def own_transform(data: DataConfig) -> Transform | None:
    """`data.transform`. Raises `UserError`."""
    return load_function(data.transform, key="data.transform") if data.transform is not None else None


def reader_of(data: DataConfig, rows: Any, *, shape: Shape, key: str) -> Read:
    """`rows`: a `datasets.Dataset`. What is read of a row that `data.transform` drops is None. Raises `UserError` or
    `DataError` where the columns do not fit."""
    read = reader_of_columns(data, rows, shape=shape, key=key)

    def read_whole(row: dict[str, Any]) -> Any:
        if isinstance(row, BrokenRow):
            raise DataError(row.problem)
        return read(row)

    return read_whole


def unread_columns(data: DataConfig, rows: Any, *, shape: Shape, key: str) -> list[str]:
    """Of conversations, where ftray chooses what is read: what it leaves."""
    if shape != "conversation" or data.format is not None or data.transform is not None:
        return []
    read = columns_read(data.columns, rows.column_names, key=key)
    return [name for name in rows.column_names if name not in read]


def are_rated(data: DataConfig, rows: Any, *, shape: Shape) -> bool:
    """KTO's rows, an answer that is good or bad, where nothing says how they are to be read."""
    is_left_to_us = data.columns is None and data.format is None and data.transform is None
    if shape != "conversation" or not is_left_to_us or RATING not in rows.column_names:
        return False
    return isinstance(next(iter(rows)).get(RATING), bool)


def with_ratings_read(data: DataConfig, rows: Any, *, shape: Shape, key: str) -> DataConfig:
    """For a look at rated answers: read as the conversations that they are. Nothing trains on them yet."""
    if not are_rated(data, rows, shape=shape):
        return data
    return data.model_copy(update={"columns": guess_conversation(rows.column_names, key=key)})


def describe_ratings(rows: Any) -> str:
    good = sum(row.get(RATING) is True for row in rows)
    return f"rated answers (KTO), {good:,} good and {len(rows) - good:,} bad; no objective of ftray trains on them yet"


def recognised(data: DataConfig, rows: Any, *, shape: Shape) -> str:
    """What the rows are read as, in words."""
    if data.format is not None:
        return f"{data.format}, a format of your own"
    by = "data.columns" if data.columns is not None else "their columns"
    if shape != "conversation":
        return f"{'texts' if shape == 'document' else 'preference pairs'}, by {by}"
    if data.columns is None and is_alpaca(rows.column_names):
        return "Alpaca's instruction, input and output"
    columns = data.columns or guess_conversation(rows.column_names, key="")
    if columns.messages is None:
        return f"prompts and completions, by {by}"
    first = next((parsed(row[columns.messages]) for row in rows if row.get(columns.messages)), None)
    is_sharegpt = isinstance(first, list) and bool(first) and isinstance(first[0], dict) and "from" in first[0]
    return f"conversations in {'ShareGPT' if is_sharegpt else 'OpenAI'}'s form, of the column {columns.messages}"


def reader_of_columns(data: DataConfig, rows: Any, *, shape: Shape, key: str) -> Read:
    if are_rated(data, rows, shape=shape):
        raise DataError(
            f"{key}: rows with a `label` of true or false are rated answers, which objective kto trains on; ftray has "
            "none yet. With data.columns all of them are trained as they stand, the bad ones too"
        )
    own = own_format(data, shape=shape)
    make = READERS[shape] if own is None else lambda columns, have, *, key: checked(own)
    transform = own_transform(data)
    if transform is None:
        return make(data.columns, rows.column_names, key=key)
    have = columns_after(transform, rows)
    if have is None:
        return lambda row: transform_row(transform, row)  # dropped, or refused
    read = make(data.columns, have, key=key)

    def read_transformed(row: dict[str, Any]) -> Any:
        changed = transform_row(transform, row)
        return None if changed is None else read(dict.fromkeys(have) | changed)

    return read_transformed


def checked(own: Format) -> Read:
    """What it reads as a conversation, as the other formats give it."""
    if own.shape != "conversation":
        return own.read

    def read(row: dict[str, Any]) -> Conversation:
        found = own.read(row)
        if isinstance(found, Conversation):
            return Conversation(read_messages(found.messages), found.tools, found.untrained, found.chosen)
        return read_conversation(found)

    return read


def columns_after(transform: Transform, rows: Any) -> list[str] | None:
    """Those of the first row that can be transformed and is kept; None: there is none."""
    for row in rows:
        if isinstance(row, BrokenRow):
            continue
        with contextlib.suppress(DataError):  # told with its number when all rows are read
            if (changed := transform_row(transform, row)) is not None:
                return list(changed)
    return None


def transform_row(transform: Transform, row: dict[str, Any]) -> dict[str, Any] | None:
    """Raises `DataError` for whatever the user's function raises."""
    try:
        changed = transform(dict(row))
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"data.transform: {type(error).__name__}: {error}") from error
    if changed is not None and not isinstance(changed, dict):
        raise DataError(f"data.transform: returned {type(changed).__name__}, and must return a dict or None")
    return changed


def code_digest(data: DataConfig) -> str | None:
    """Of a user's own format and transform: tokens are made anew when their files change."""
    keys = {"data.format": data.format, "data.transform": data.transform}
    modules = [import_module(name.partition(":")[0], name, key=key) for key, name in keys.items() if name is not None]
    if not modules:
        return None
    return hashlib.sha256(b"".join(Path(module.__file__).read_bytes() for module in modules)).hexdigest()


__all__ = [
    "Conversation",
    "Format",
    "Pair",
    "Read",
    "Transform",
    "code_digest",
    "describe_ratings",
    "own_format",
    "own_transform",
    "reader_of",
    "recognised",
    "unread_columns",
    "with_ratings_read",
]
