"""Rows of files as the files have them: JSON strings that look like dates, and every cell of a CSV, stay text.

A file of JSON lines is not held: where its lines begin is, and a row is read when it is asked for.
"""

import codecs
import csv
import itertools
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ftray.errors import DataError

Row = dict[str, Any]
CHUNK = 1 << 26  # bytes
LOOKED_AT = 1000  # rows, whose keys are the columns
SHORT = 256  # bytes: a line that may be blank
UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
TURN_KEYS = ({"role", "content"}, {"from", "value"})


class BrokenRow(dict):
    """One that cannot be read; whoever reads it says so, with its number among the rows."""

    def __init__(self, problem: str):
        super().__init__()
        self.problem = problem


class Rows(Protocol):
    """In their order. It can be sent to another process of this machine."""

    @property
    def column_names(self) -> list[str]: ...

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Row]: ...

    def select(self, indices: range) -> "Rows": ...


class JsonLines:
    """An object a line; blank lines are none. A line that is no JSON is a `BrokenRow`."""

    def __init__(self, path: Path):
        """Raises `DataError` where the file is no text."""
        with path.open("rb") as file:
            if file.read(2) in UTF_16:
                raise DataError("is UTF-16; save it as UTF-8")
        self._path = path
        self._starts, self._numbers = line_starts(path)
        first = [read_line(*line) for line in itertools.islice(self._lines(), LOOKED_AT)]
        self.column_names = columns_of(first)
        broken = [row for row in first if isinstance(row, BrokenRow)]
        if broken and len(broken) == len(first):
            raise DataError(broken[0].problem)

    def __len__(self) -> int:
        return len(self._starts)

    def __iter__(self) -> Iterator[Row]:
        blank = dict.fromkeys(self.column_names)
        return (filled(blank, read_line(line, number)) for line, number in self._lines())

    def select(self, indices: range) -> "JsonLines":
        part = object.__new__(JsonLines)
        part._path, part.column_names = self._path, self.column_names
        part._starts, part._numbers = (of[indices.start : indices.stop] for of in (self._starts, self._numbers))
        return part

    def _lines(self) -> Iterator[tuple[bytes, int]]:
        with self._path.open("rb") as file:
            for start, number in zip(self._starts, self._numbers, strict=True):
                file.seek(start)
                yield file.readline(), int(number)


class ListedRows:
    """Rows in memory."""

    def __init__(self, rows: Sequence[Row], column_names: list[str] | None = None):
        self._rows = rows
        self.column_names = columns_of(rows) if column_names is None else column_names

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Row]:
        blank = dict.fromkeys(self.column_names)
        return (blank | row for row in self._rows)

    def select(self, indices: range) -> "ListedRows":
        return ListedRows(self._rows[indices.start : indices.stop], self.column_names)


class TableRows:
    """A table of texts in memory, column by column."""

    def __init__(self, table: Any):
        self._table = table
        self.column_names: list[str] = table.column_names

    def __len__(self) -> int:
        return self._table.num_rows

    def __iter__(self) -> Iterator[Row]:
        for batch in self._table.to_batches(max_chunksize=LOOKED_AT):
            yield from batch.to_pylist()

    def select(self, indices: range) -> "TableRows":
        return TableRows(self._table.slice(indices.start, len(indices)))


class JoinedRows:
    """Of several files, one after the other."""

    def __init__(self, parts: Sequence[Rows]):
        self._parts = parts
        self.column_names = list(dict.fromkeys(name for part in parts for name in part.column_names))

    def __len__(self) -> int:
        return sum(map(len, self._parts))

    def __iter__(self) -> Iterator[Row]:
        blank = dict.fromkeys(self.column_names)
        return (filled(blank, row) for part in self._parts for row in part)

    def select(self, indices: range) -> "JoinedRows":
        chosen, start = [], 0
        for part in self._parts:
            low, high = max(0, indices.start - start), min(len(part), indices.stop - start)
            if low < high:
                chosen.append(part.select(range(low, high)))
            start += len(part)
        joined = JoinedRows(chosen)
        joined.column_names = self.column_names
        return joined


def filled(blank: Row, row: Row) -> Row:
    return row if isinstance(row, BrokenRow) else blank | row


def line_starts(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Where each line that is not blank begins, and its number in the file, 1 for the first."""
    size = path.stat().st_size
    content = np.memmap(path, np.uint8, mode="r") if size else np.empty(0, np.uint8)
    breaks = [np.flatnonzero(content[at : at + CHUNK] == ord("\n")) + at for at in range(0, size, CHUNK)]
    ends = np.concatenate([*breaks, [size]]).astype(np.int64)
    starts = np.concatenate([[0], ends[:-1] + 1])
    is_blank = ends - starts <= 0
    for at in np.flatnonzero((ends - starts <= SHORT) & ~is_blank):
        is_blank[at] = not content[starts[at] : ends[at]].tobytes().removeprefix(codecs.BOM_UTF8).strip()
    return starts[~is_blank], np.flatnonzero(~is_blank) + 1


def read_line(line: bytes, number: int) -> Row:
    try:
        return as_row(json.loads(line.decode("utf-8-sig")))
    except json.JSONDecodeError as error:
        return BrokenRow(f"line {number}, column {error.colno}: is no JSON ({error.msg})")
    except UnicodeDecodeError as error:
        return BrokenRow(f"line {number}: is no UTF-8 ({error.reason}); save the file as UTF-8")
    except (DataError, ValueError) as error:  # also a number of thousands of digits
        return BrokenRow(f"line {number}: {error}")
    except RecursionError:
        return BrokenRow(f"line {number}: is nested without end")


def as_row(value: Any) -> Row:
    """An object, or a list of turns, which is a conversation by itself. Raises `DataError`."""
    if isinstance(value, dict):
        return value
    if is_conversation(value):
        return {"messages": value}
    raise DataError(f"a row must be an object, and this is {type(value).__name__}: {json.dumps(value)[:40]}")


def holds_rows(value: Any) -> bool:
    return isinstance(value, dict) and value.keys() == {"data"} and isinstance(value["data"], list)


def is_conversation(value: Any) -> bool:
    is_list = isinstance(value, list) and bool(value)
    return is_list and all(isinstance(turn, dict) and any(keys <= turn.keys() for keys in TURN_KEYS) for turn in value)


def columns_of(rows: Any) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


def read_json(path: Path) -> Rows:
    """JSON lines; or one list of rows, also as `{"data": [...]}`. Raises `DataError`."""
    with path.open("rb") as file:
        first = next((line for line in file if line.removeprefix(codecs.BOM_UTF8).strip()), b"")
        has_more = any(line.strip() for line in file)
    try:
        value = json.loads(first.decode("utf-8-sig"))
    except (ValueError, RecursionError):  # it goes on in the next line, or is broken
        value = None
    if (isinstance(value, dict) and (has_more or not holds_rows(value))) or (isinstance(value, list) and has_more):
        return JsonLines(path)
    try:
        whole = load_whole(path)
    except DataError:
        if first.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
            raise
        return JsonLines(path)  # whose broken lines are told
    if holds_rows(whole):
        whole = whole["data"]
    rows = whole if isinstance(whole, list) else [whole]
    return ListedRows([as_row(rows)] if is_conversation(rows) else [as_row(row) for row in rows])


def load_whole(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes().decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        raise DataError(f"line {error.lineno}, column {error.colno}: is no JSON ({error.msg})") from None
    except UnicodeDecodeError as error:
        raise DataError(f"is no UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from None
    except RecursionError:
        raise DataError("is nested without end") from None


def read_table(path: Path, *, delimiter: str) -> TableRows:
    """CSV or TSV with a header: each cell is the text that it is. Raises `DataError`."""
    import pyarrow
    from pyarrow import csv as arrow

    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter=delimiter)
        try:
            header = next((row for row in reader if row), [])
            num_before = reader.line_num - 1 if header else 0  # blank lines
        except (UnicodeDecodeError, csv.Error) as error:
            raise DataError(f"cannot be read as UTF-8 text: {error}") from None
    if twice := [name for name, count in Counter(header).items() if count > 1]:
        raise DataError(f"has several columns {twice[0]!r}; give each a name of its own")
    check_quotes(path, delimiter=delimiter)
    try:
        table = arrow.read_csv(
            path,
            read_options=arrow.ReadOptions(block_size=CHUNK, skip_rows=num_before),
            parse_options=arrow.ParseOptions(delimiter=delimiter, newlines_in_values=True),
            convert_options=arrow.ConvertOptions(
                column_types=dict.fromkeys(header, pyarrow.string()), strings_can_be_null=False, null_values=[]
            ),
        )
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"cannot be read: {str(error).strip()}") from None
    return TableRows(table)


def check_quotes(path: Path, *, delimiter: str) -> None:
    """Raises `DataError` for one that is opened and never closed: it would swallow the rest of the file."""
    with path.open("rb") as file:
        count = 0
        while chunk := file.read(CHUNK):
            count += chunk.count(b'"')
        if count % 2 == 0:
            return
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader, begun = csv.reader(file, delimiter=delimiter, strict=True), 0
        try:
            for _ in reader:
                begun = reader.line_num
        except csv.Error as error:
            if "unexpected end" in str(error):
                raise DataError(f"line {begun + 1}: a quote is opened there and never closed") from None


def read_texts(path: Path) -> ListedRows:
    """A document a line, blank ones left out. Raises `DataError`."""
    try:
        lines = path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"is no UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from None
    return ListedRows([{"text": line} for line in lines if line.strip()])
