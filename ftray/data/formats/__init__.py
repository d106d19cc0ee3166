"""How rows are read, a module for each shape. Without `data.columns` the columns themselves say what a row is."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

from ftray.config.data import DataConfig
from ftray.data.formats.conversation import row_reader
from ftray.data.formats.document import text_reader
from ftray.data.formats.pair import pair_reader
from ftray.data.formats.protocol import Format, Pair, Read
from ftray.errors import UserError
from ftray.objectives import Shape
from ftray.plugins import import_module, load_plugin

READERS: dict[Shape, Callable[..., Read]] = {"conversation": row_reader, "document": text_reader, "pair": pair_reader}


def own_format(data: DataConfig, *, shape: Shape) -> Format | None:
    """`data.format`. Raises `UserError`."""
    if data.format is None:
        return None
    found = load_plugin(data.format, Format, key="data.format")
    if found.shape != shape:
        raise UserError(f"data.format: {data.format} reads a {found.shape}, and the objective trains on a {shape}")
    return found


def reader_of(data: DataConfig, have: Sequence[str], *, shape: Shape, key: str) -> Read:
    """`have`: the columns that the data has. Raises `UserError` or `DataError` where they do not fit."""
    own = own_format(data, shape=shape)
    return own.read if own is not None else READERS[shape](data.columns, have, key=key)


def format_digest(data: DataConfig) -> str | None:
    """Of a user's own format: its tokens are made anew when its file changes."""
    if data.format is None:
        return None
    module = import_module(data.format.partition(":")[0], data.format, key="data.format")
    return hashlib.sha256(Path(module.__file__).read_bytes()).hexdigest()


__all__ = ["Format", "Pair", "Read", "format_digest", "own_format", "reader_of"]
