"""How rows are read, a module for each shape. Without `data.columns` the columns themselves say what a row is."""

import hashlib
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path

from ftray.config.data import DataConfig
from ftray.data.formats.conversation import row_reader
from ftray.data.formats.document import text_reader
from ftray.data.formats.pair import pair_reader
from ftray.data.formats.protocol import Format, Pair, Read
from ftray.errors import UserError
from ftray.objectives import Shape
from ftray.plugins import load_plugin

READERS: dict[Shape, Callable[..., Read]] = {"conversation": row_reader, "document": text_reader, "pair": pair_reader}


def reader_of(data: DataConfig, have: Sequence[str], *, shape: Shape, key: str) -> Read:
    """`have`: the columns that the data has. Raises `UserError` or `DataError` where they do not fit."""
    if data.format is None:
        return READERS[shape](data.columns, have, key=key)
    found = load_plugin(data.format, Format, key="data.format")
    if found.shape != shape:
        raise UserError(f"data.format: {data.format} reads a {found.shape}, and the objective trains on a {shape}")
    return found.read


def format_digest(data: DataConfig) -> str | None:
    """Of a user's own format: its tokens are made anew when its file changes."""
    if data.format is None:
        return None
    source = inspect.getsourcefile(load_plugin(data.format, Format, key="data.format").read)
    return hashlib.sha256(Path(source).read_bytes()).hexdigest() if source is not None else None


__all__ = ["Format", "Pair", "Read", "format_digest", "reader_of"]
