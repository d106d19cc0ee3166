"""Are the columns there that a config names?"""

from collections.abc import Sequence

from ftray.config.data import ColumnsConfig
from ftray.errors import DataError


def check_columns(columns: ColumnsConfig, have: Sequence[str], *, key: str) -> None:
    named = [columns.messages, *columns.prompts, columns.completion, columns.system, columns.tools]
    named += [columns.chosen, columns.rejected]
    missing = [name for name in named if name is not None and name not in have]
    if missing:
        raise DataError(f"{key}: no column {missing[0]!r}; the data has {', '.join(have)}; see data.columns")
