"""Conversations: chat messages, ShareGPT's, or a prompt and a completion."""

from collections.abc import Callable, Sequence
from typing import Any

from ftray.config.data import ColumnsConfig
from ftray.data.formats.columns import check_columns
from ftray.data.formats.turns import read_messages, read_prompt, read_turns
from ftray.errors import DataError
from ftray.model.chat import Message


def row_reader(columns: ColumnsConfig | None, have: Sequence[str], *, key: str) -> Callable[[dict], list[Message]]:
    """Conversations. Chooses the mapping once for the whole set; raises `DataError` when a column is not there."""
    if columns is None:
        columns = guess_conversation(have, key=key)
    check_columns(columns, have, key=key)
    if columns.messages is not None:
        column = columns.messages
        return lambda row: read_messages(row[column])
    if columns.prompt is None or columns.completion is None:
        raise DataError(f"{key}: data.columns names no conversation; give `messages`, or `prompt` and `completion`")
    return lambda row: prompt_and_completion(row, columns)


def guess_conversation(have: Sequence[str], *, key: str) -> ColumnsConfig:
    for name in ("messages", "conversations"):
        if name in have:
            return ColumnsConfig(messages=name)
    if "prompt" in have and "completion" in have:
        return ColumnsConfig(prompt="prompt", completion="completion")
    raise DataError(
        f"{key}: the columns are {', '.join(have)}; without data.columns a row needs `messages`, or `prompt` and "
        "`completion`. Example: data.columns: {prompt: " + have[0] + ", completion: " + have[-1] + "}"
    )


def prompt_and_completion(row: dict[str, Any], columns: ColumnsConfig) -> list[Message]:
    names = [columns.prompt] if isinstance(columns.prompt, str) else list(columns.prompt or [])
    asked = read_prompt(row, names, columns)
    answer = row[str(columns.completion)]
    if answer in (None, ""):
        raise DataError(f"column {columns.completion!r} is empty")
    if isinstance(answer, (list, dict)):
        return [*asked, *read_turns(answer, role="assistant", column=str(columns.completion))]
    return [*asked, {"role": "assistant", "content": str(answer)}]
