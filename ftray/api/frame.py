"""Rows as a table."""

from typing import Any


def as_frame(rows: list[dict[str, Any]]) -> Any:
    """A pandas DataFrame; without pandas the rows themselves."""
    try:
        import pandas
    except ModuleNotFoundError:
        return rows
    return pandas.DataFrame(rows)
