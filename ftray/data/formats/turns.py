"""Columns that hold turns, however they are written."""

from collections.abc import Sequence
from typing import Any

from ftray.config.data import ColumnsConfig
from ftray.errors import DataError
from ftray.model.chat import Message, check_messages

SHAREGPT_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "user": "user",
    "assistant": "assistant",
}


def read_messages(value: Any) -> list[Message]:
    return check_messages([to_message(message) for message in value or []] if isinstance(value, list) else value)


def read_turns(value: Any, *, role: str, column: str) -> list[Message]:
    """A text is one turn of `role`; a message or a list of messages is itself."""
    if isinstance(value, str):
        if not value:
            raise DataError(f"column {column!r} is empty")
        return [{"role": role, "content": value}]
    return read_messages([value] if isinstance(value, dict) else value)


def read_prompt(row: dict[str, Any], names: Sequence[str], columns: ColumnsConfig) -> list[Message]:
    if len(names) == 1 and not isinstance(row[names[0]], str):
        turns = read_turns(row[names[0]], role="user", column=names[0])
    else:
        parts = [str(row[name]) for name in names if row[name] not in (None, "")]
        if not parts:
            raise DataError(f"column {names[0]!r} is empty")
        turns = [{"role": "user", "content": "\n\n".join(parts)}]
    if columns.system is not None and row[columns.system] not in (None, ""):
        turns = [{"role": "system", "content": str(row[columns.system])}, *turns]
    return turns


def to_message(message: Any) -> Any:
    """`datasets` fills keys that only other rows have with None, and templates take a present key for a given one.
    ShareGPT's `from` and `value` become `role` and `content`."""
    if not isinstance(message, dict):
        return message
    given = {key: value for key, value in message.items() if value is not None}
    if "from" in given and "value" in given:
        return {"role": SHAREGPT_ROLES.get(given["from"], given["from"]), "content": given["value"]}
    return given
