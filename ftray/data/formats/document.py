"""Documents: a text column."""

from collections.abc import Callable, Sequence

from ftray.config.data import ColumnsConfig
from ftray.errors import DataError


def text_reader(columns: ColumnsConfig | None, have: Sequence[str], *, key: str) -> Callable[[dict], str]:
    """Documents, for `objective.type: text`."""
    column = columns.text if columns is not None else "text"
    if column is None or column not in have:
        raise DataError(
            f"{key}: objective text trains on a text column; the data has {', '.join(have)}. "
            f"Example: data.columns: {{text: {have[0]}}}"
        )

    def read(row: dict) -> str:
        if not isinstance(row[column], str) or not row[column].strip():
            raise DataError(f"column {column!r} is empty or no text")
        return row[column]

    return read
