"""One raw row as chat messages, by the columns the config names or, without it, by the columns the data has."""

from collections.abc import Callable, Sequence
from typing import Any

from ftray.config.run import ColumnsConfig
from ftray.errors import DataError
from ftray.model.chat import Message, check_messages


def row_reader(columns: ColumnsConfig | None, have: Sequence[str], *, key: str) -> Callable[[dict], list[Message]]:
    """Chooses the mapping once for the whole set; raises `DataError` when a named column is not there."""
    if columns is None:
        columns = guess_columns(have, key=key)
    prompt = [columns.prompt] if isinstance(columns.prompt, str) else columns.prompt or []
    named = [name for name in [columns.messages, *prompt, columns.completion, columns.system] if name is not None]
    missing = [name for name in named if name not in have]
    if missing:
        raise DataError(f"{key}: no column {missing[0]!r}; the data has {', '.join(have)}; see data.columns")
    if columns.messages is not None:
        column = columns.messages
        return lambda row: check_messages([without_nulls(m) for m in row[column] or []])
    return lambda row: prompt_and_completion(row, prompt, columns)


def guess_columns(have: Sequence[str], *, key: str) -> ColumnsConfig:
    if "messages" in have:
        return ColumnsConfig(messages="messages")
    if "prompt" in have and "completion" in have:
        return ColumnsConfig(prompt="prompt", completion="completion")
    raise DataError(
        f"{key}: the columns are {', '.join(have)}; without data.columns a row needs `messages`, or `prompt` and "
        "`completion`. Example: data.columns: {prompt: " + have[0] + ", completion: " + have[-1] + "}"
    )


def prompt_and_completion(row: dict[str, Any], prompt: Sequence[str], columns: ColumnsConfig) -> list[Message]:
    parts = [str(row[name]) for name in prompt if row[name] not in (None, "")]
    answer = row[str(columns.completion)]
    if not parts:
        raise DataError(f"column {prompt[0]!r} is empty")
    if answer in (None, ""):
        raise DataError(f"column {columns.completion!r} is empty")
    turns = [{"role": "user", "content": "\n\n".join(parts)}, {"role": "assistant", "content": str(answer)}]
    if columns.system is not None and row[columns.system] not in (None, ""):
        turns.insert(0, {"role": "system", "content": str(row[columns.system])})
    return turns


def without_nulls(message: Any) -> Any:
    """`datasets` fills keys that only other rows have with None; templates take a present key for a given one."""
    return {k: v for k, v in message.items() if v is not None} if isinstance(message, dict) else message
